"""Train a toy SAE on a synthetic world in one call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from sae_core import SAE, TrainConfig, Trainer, TrainResult
from sae_core.config import require
from sae_core.training.trainer import Progress

from sae_synthetic.features import FeatureDictionary
from sae_synthetic.generator import ActivationGenerator
from sae_synthetic.source import SyntheticActivationIterator

__all__ = ["Snapshot", "due_steps", "train_toy_sae"]

_DEAD_AFTER_STEPS = 1000


@final
@dataclass(frozen=True, slots=True)
class Snapshot:
    """Training at one moment: the SAE itself, not a copy, and how far it is. `trainer` is what trains it."""

    sae: SAE
    n_training_steps: int
    n_training_samples: int
    trainer: Trainer


def train_toy_sae(
    sae: SAE,
    feature_dict: FeatureDictionary,
    activations_generator: ActivationGenerator,
    training_samples: int = 10_000_000,
    batch_size: int = 1024,
    lr: float = 3e-4,
    lr_warm_up_steps: int = 0,
    lr_decay_steps: int = 0,
    device: str | torch.device = "cpu",
    n_snapshots: int = 0,
    snapshot_fn: Callable[[Snapshot], None] | None = None,
    autocast_sae: bool = False,
    autocast_data: bool = False,
    progress_bar: bool = True,
) -> TrainResult:
    """Train `sae` in place on activations of the world; returns what the trainer recorded.

    `snapshot_fn` is called with a `Snapshot` at `n_snapshots` evenly spaced points, the last of them the end. b_dec starts
    where it is, so an SAE that was initialised at the truth starts there. `autocast_data` sums features in bfloat16,
    `autocast_sae` trains in mixed precision, ``TrainConfig(precision="bfloat16")``.
    """
    require(n_snapshots >= 0, f"n_snapshots must not be negative, found {n_snapshots}")
    require(not n_snapshots or snapshot_fn is not None, "n_snapshots asks for snapshots, but snapshot_fn is missing")
    due = due_steps(-(-training_samples // batch_size), n_snapshots)

    def snapshot(progress: Progress) -> None:
        trainer = progress.trainer
        if snapshot_fn is not None and trainer.steps in due:
            snapshot_fn(Snapshot(trainer.sae, trainer.steps, trainer.samples, trainer))

    config = TrainConfig(
        total_samples=training_samples,
        batch_size=batch_size,
        lr=lr,
        lr_warmup_samples=lr_warm_up_steps * batch_size,
        lr_decay_samples=lr_decay_steps * batch_size,
        dead_after_samples=_DEAD_AFTER_STEPS * batch_size,
        init_b_dec="zeros",
        precision="bfloat16" if autocast_sae else "full",
        progress_bar=progress_bar,
    )
    feature_dict.to(device)
    activations_generator.to(device)
    source = SyntheticActivationIterator(feature_dict, activations_generator, batch_size, autocast=autocast_data)
    return Trainer(sae.to(device), source, config, callbacks=[snapshot]).fit()


def due_steps(steps: int, times: int) -> set[int]:
    """The steps at which something is due that happens `times` times, evenly spaced, the last time at the end.

    >>> sorted(due_steps(40, 4))
    [10, 20, 30, 40]
    """
    return {round(steps * (i + 1) / times) for i in range(times)}
