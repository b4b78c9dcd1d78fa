"""Training ends where it should: on one budget every architecture is as good as SAELens's, and none finds a degenerate corner.

The task and its scores are in `golden/quality_task.py`; SAELens 6.54.12's scores were written by `make_sae_lens_quality.py`.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_core import TrainConfig, Trainer, create

GOLDEN = Path(__file__).parent / "golden"
REFERENCE: dict[str, dict[str, Any]] = json.loads((GOLDEN / "sae_lens_quality.json").read_text(encoding="utf-8"))
SLACK = {"explained_variance": 0.02, "l0": 0.05, "mcc": 0.05}  # seeds of one library differ by about as much

_spec = importlib.util.spec_from_file_location("quality_task", GOLDEN / "quality_task.py")
assert _spec is not None
assert _spec.loader is not None
task = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(task)


def trained(architecture: str, fields: dict[str, Any], seed: int) -> dict[str, float]:
    """The scores of one dictionary of ours, for data of their own."""
    sae = create(architecture, d_in=task.D_IN, d_sae=task.D_SAE, seed=seed, **fields)
    config = TrainConfig(
        total_samples=task.BATCH * task.STEPS,
        batch_size=task.BATCH,
        lr=task.LR,
        dead_after_samples=task.BATCH * task.DEAD_AFTER_STEPS,
        progress_bar=False,
    )
    Trainer(sae, task.activations(seed, stream=0, rows=task.BATCH), config).fit()
    x = next(task.activations(seed, stream=1, rows=4096))
    with torch.no_grad():
        sae.eval()
        return task.scores(x, sae(x), sae.encode(x), sae.directions().clone(), seed)


def means(case: str) -> dict[str, float]:
    seeds = list(REFERENCE[case]["seeds"].values())
    return {name: sum(seed[name] for seed in seeds) / len(seeds) for name in seeds[0]}


def is_no_worse(found: dict[str, float], reference: dict[str, float]) -> None:
    assert found["explained_variance"] >= reference["explained_variance"] - SLACK["explained_variance"]
    assert found["l0"] <= reference["l0"] * (1 + SLACK["l0"])
    assert found["mcc"] >= reference["mcc"] - SLACK["mcc"]


@pytest.mark.slow
@pytest.mark.parametrize("case", REFERENCE)
def test_a_dictionary_is_no_worse_than_that_of_sae_lens_on_the_same_budget(case: str) -> None:
    reference = REFERENCE[case]
    is_no_worse(trained(reference["architecture"], reference["fields"], seed=0), means(case))


@pytest.mark.slow
def test_the_frozen_decoder_of_gated_does_not_escape_from_its_penalty() -> None:
    """Where the decoder could shrink under the penalty, nearly every latent was open and little explained."""
    found = trained("gated", REFERENCE["gated"]["fields"] | {"freeze_decoder_in_aux": True}, seed=0)
    assert found["explained_variance"] >= means("gated")["explained_variance"]
    assert found["l0"] <= 0.6 * task.D_SAE
    assert found["mcc"] >= means("gated")["mcc"] - 0.15
