"""`TrainConfig`: how to train, as run files and Python say it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sae_core.config import Schedule, check_fields, ends_of, option, require

__all__ = ["TrainConfig", "samples_of"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train.

    Numbers of samples that say "or a fraction" take a whole number of samples, or a float in [0, 1) of `total_samples`.
    """

    total_samples: int = option(help="samples (activation vectors) to train on")
    batch_size: int = option(default=2048, help="samples in a step")
    gradient_accumulation_steps: int = option(
        default=1,
        help="batches that make up one step of the optimiser, with the gradient of their mean loss",
    )
    lr: float | Schedule = option(
        default=3e-4, help="learning rate of Adam; a number or a schedule, times the warm-up and decay below"
    )
    lr_warmup_samples: int | float = option(
        default=0, help="samples, or a fraction of the run, over which the learning rate rises linearly from 0"
    )
    lr_decay_samples: int | float = option(
        default=0, help="samples, or a fraction of the run, at the end over which it falls linearly to 0"
    )
    adam_beta1: float | Schedule = option(default=0.9, help="Adam's decay of the gradient mean; may be a schedule")
    adam_beta2: float | Schedule = option(
        default=0.999, help="Adam's decay of the squared-gradient mean; may be a schedule"
    )
    grad_clip_norm: float | Schedule | None = option(
        default=1.0, help="largest gradient norm; null does not clip; may be a schedule"
    )
    target_l0: float | None = option(
        default=None, help="steer the architecture's sparsity coefficient to this L0; null leaves the coefficient alone"
    )
    dead_after_samples: int | float = option(
        default=1_000_000, help="a latent is dead when it has not fired for this many samples, or fraction of the run"
    )
    dead_refresh_steps: int = option(default=10, help="steps between refreshes of the set of dead latents")
    resample_dead_every_samples: int | float | None = option(
        default=None,
        help="samples, or a fraction of the run, after which dead latents are pointed at inputs that are badly reconstructed, "
        "again and again but not in the last fifth of the run; null leaves them to the architecture's own loss",
    )
    log_every_steps: int = option(default=50, help="steps between records")
    init_samples: int = option(
        default=16_384,
        help="samples looked at before training, for b_dec and the input normalisation; they are then used",
    )
    init_b_dec: Literal["zeros", "mean", "geometric_median"] = option(
        default="geometric_median", help="where b_dec starts, estimated from init_samples"
    )
    encoder_product: Literal["auto", "full"] = option(
        default="auto",
        help="auto: where the hardware is made for it, bfloat16 proposes latents and float32 decides, with a proof that the "
        "choice is the same; full: the large encoder product is always in the precision of the parameters",
    )
    precision: Literal["full", "bfloat16"] = option(
        default="full",
        help="bfloat16: mixed precision, dense products are computed in it, and it proposes latents on any hardware; weights, "
        "thresholds, optimiser and losses keep the precision of the parameters",
    )
    checkpoint_every_samples: int | float | None = option(
        default=None, help="samples, or a fraction of the run, between checkpoints; null goes by minutes alone"
    )
    checkpoint_every_minutes: float | None = option(
        default=10.0, help="minutes between checkpoints, where they have a folder; null goes by samples alone"
    )
    keep_last: int = option(default=2, help="checkpoints kept; older ones are removed")
    progress_bar: bool = option(default=True, help="show a progress bar on stderr")

    def __post_init__(self) -> None:
        check_fields(self)
        for name in (
            "total_samples",
            "batch_size",
            "dead_after_samples",
            "dead_refresh_steps",
            "log_every_steps",
            "gradient_accumulation_steps",
        ):
            require(getattr(self, name) > 0, f"{name} must be positive, not {getattr(self, name)}")
        for name in (
            "lr_warmup_samples",
            "lr_decay_samples",
            "dead_after_samples",
            "checkpoint_every_samples",
            "resample_dead_every_samples",
        ):
            value = getattr(self, name)
            require(
                not isinstance(value, float) or 0 <= value < 1,
                f"{name} is a whole number of samples, or a fraction of the run below 1, not {value}",
            )
        for name in ("lr_warmup_samples", "lr_decay_samples"):
            value = getattr(self, name)
            require(0 <= value <= self.total_samples, f"{name} must lie in [0, total_samples], not {value}")
        require(
            min(ends_of(self.lr)) >= 0 and max(ends_of(self.lr)) > 0,
            f"lr must be positive{', at most zero at the ends of a schedule' if isinstance(self.lr, Schedule) else ''}, "
            f"not {self.lr}",
        )
        for name in ("adam_beta1", "adam_beta2"):
            for value in ends_of(getattr(self, name)):
                require(0 <= value < 1, f"{name} must lie in [0, 1), not {value}")
        if self.grad_clip_norm is not None:
            for value in ends_of(self.grad_clip_norm):
                require(value > 0, f"grad_clip_norm must be positive or null, not {value}")
        for name in (
            "checkpoint_every_samples",
            "checkpoint_every_minutes",
            "resample_dead_every_samples",
            "target_l0",
        ):
            value = getattr(self, name)
            require(value is None or value > 0, f"{name} must be positive or null, not {value}")
        require(self.init_samples > 0, f"init_samples must be positive, not {self.init_samples}")
        require(self.keep_last > 0, f"keep_last must be positive, not {self.keep_last}")


def samples_of(amount: int | float, total: int) -> int:
    """`amount` in samples: itself, or as a fraction of `total`.

    >>> samples_of(500, total=2000), samples_of(0.25, total=2000)
    (500, 500)
    """
    return round(amount * total) if isinstance(amount, float) else amount
