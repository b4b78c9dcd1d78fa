"""Write `sae_lens_quality.json`: how good SAELens 6.54.12's dictionaries are after the budget of `quality_task`.

Run with the Python of an environment that holds SAELens 6.54.12:

    python make_sae_lens_quality.py

For every case: the architecture, the fields of its config, and explained variance, L0 and MCC for each seed. Dictionaries
are scored as SAELens's own evaluation does, by the training class: selections over a batch are over the batch of evaluation.
"""

from __future__ import annotations

import json
import logging
import sys
import warnings
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

warnings.simplefilter("ignore")
logging.disable(logging.WARNING)
sys.path.insert(0, str(Path(__file__).parent))

import quality_task as task  # noqa: E402
import sae_lens.saes as saes  # noqa: E402 - its import is what the filters above silence
from sae_lens.config import LoggingConfig, SAETrainerConfig  # noqa: E402
from sae_lens.training.sae_trainer import SAETrainer  # noqa: E402

SEEDS = (0, 1)
CLASSES = {
    "standard": "StandardTrainingSAE",
    "gated": "GatedTrainingSAE",
    "topk": "TopKTrainingSAE",
    "abstopk": "AbsTopKTrainingSAE",
    "batchtopk": "BatchTopKTrainingSAE",
    "matryoshka_batchtopk": "MatryoshkaBatchTopKTrainingSAE",
    "jumprelu": "JumpReLUTrainingSAE",
    "matching_pursuit": "MatchingPursuitTrainingSAE",
}
# case: (architecture, fields that SAELens and sae-core both know by these names)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "standard": ("standard", {"l1_coefficient": 0.15}),
    "standard_half_norm": ("standard", {"l1_coefficient": 0.01, "lp_norm": 0.5}),
    "gated": ("gated", {"l1_coefficient": 0.15}),
    "topk": ("topk", {"k": 5}),
    "abstopk": ("abstopk", {"k": 5}),
    "batchtopk": ("batchtopk", {"k": 5}),
    "matryoshka_batchtopk": ("matryoshka_batchtopk", {"k": 5, "matryoshka_widths": [16, 32]}),
    "jumprelu_step": ("jumprelu", {"l0_coefficient": 0.03}),
    "jumprelu_quadratic": (
        "jumprelu",
        {"l0_coefficient": 0.03, "jumprelu_sparsity_loss_mode": "quadratic", "target_l0": 5.0},
    ),
    "jumprelu_tanh": (
        "jumprelu",
        {"l0_coefficient": 0.05, "jumprelu_sparsity_loss_mode": "tanh", "jumprelu_ste_to_input": True},
    ),
    "jumprelu_pre_act": (
        "jumprelu",
        {"l0_coefficient": 0.05, "jumprelu_sparsity_loss_mode": "tanh", "pre_act_loss_coefficient": 0.01},
    ),
    "matching_pursuit": ("matching_pursuit", {"max_iterations": 5}),
}


def trained(architecture: str, fields: dict[str, Any], seed: int) -> dict[str, float]:
    """The scores of one dictionary."""
    torch.manual_seed(seed)
    sae_class = getattr(saes, CLASSES[architecture])
    config = getattr(saes, f"{CLASSES[architecture]}Config")
    sae = sae_class(config(d_in=task.D_IN, d_sae=task.D_SAE, **fields))
    trainer = SAETrainerConfig(
        total_training_samples=task.BATCH * task.STEPS,
        train_batch_size_samples=task.BATCH,
        lr=task.LR,
        lr_end=task.LR,
        dead_feature_window=task.DEAD_AFTER_STEPS,
        logger=LoggingConfig(log_to_wandb=False),
    )
    SAETrainer(trainer, sae, task.activations(seed, stream=0, rows=task.BATCH)).fit()
    x = next(task.activations(seed, stream=1, rows=4096))
    with torch.no_grad():
        latents = sae.encode(x)
        return task.scores(x, sae.decode(latents), latents, sae.W_dec.detach(), seed)


def work(job: tuple[str, int]) -> tuple[str, int, dict[str, float]]:
    """One case with one seed."""
    torch.set_num_threads(1)
    return *job, trained(*CASES[job[0]], job[1])


def main() -> None:
    """Train every case with every seed, and write the file."""
    assert version("sae-lens") == "6.54.12"
    cases: dict[str, Any] = {
        name: {"architecture": architecture, "fields": fields, "seeds": {}}
        for name, (architecture, fields) in CASES.items()
    }
    with get_context("fork").Pool(4) as pool:
        for name, seed, run in pool.imap(work, [(name, seed) for seed in SEEDS for name in CASES]):
            cases[name]["seeds"][seed] = {key: round(value, 4) for key, value in run.items()}
            print(name, seed, cases[name]["seeds"][seed], flush=True)
    path = Path(__file__).with_name("sae_lens_quality.json")
    path.write_text(json.dumps(cases, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
