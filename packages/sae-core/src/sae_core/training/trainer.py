"""The trainer: batches in, optimiser steps, records out; the same loop for every architecture.

A step is forward, backward, gradient clipping and fused Adam, and nothing in it waits for the device. What is measured
accumulates there and crosses to the host every `log_every_steps` steps. The set of dead latents is refreshed every
`dead_refresh_steps` steps for the same reason.

A batch with NaN or infinite values, of the wrong width or dtype, ends the run with an error that says which; the SAE keeps
everything it had learnt before that batch. All randomness belongs to the source and to `create(seed=…)`, so two runs of
one seed give the same bits on one machine's CPU.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, final

import torch
from torch import Tensor

from sae_core.config import option, require
from sae_core.errors import DataError, ShapeError
from sae_core.ops import memory
from sae_core.protocols import ActivationBatch, ActivationSource, HasMetadata, Logger
from sae_core.sae import SAE, StepContext, StepOutput
from sae_core.training import row_blocks
from sae_core.training.monitor import DeadLatents, Window, check_batch
from sae_core.training.optimizer import clipped_step, contiguous_views, drop_gradients
from sae_core.training.schedules import learning_rate_factor

__all__ = ["Callback", "Progress", "TrainConfig", "TrainResult", "Trainer"]

Record = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train."""

    total_samples: int = option(help="samples (activation vectors) to train on")
    batch_size: int = option(default=2048, help="samples in a step")
    lr: float = option(default=3e-4, help="peak learning rate of Adam")
    lr_warmup_samples: int = option(default=0, help="samples over which the learning rate rises linearly from 0")
    lr_decay_samples: int = option(default=0, help="samples at the end over which it falls linearly to 0")
    adam_beta1: float = option(default=0.9, help="Adam's decay of the gradient mean")
    adam_beta2: float = option(default=0.999, help="Adam's decay of the squared-gradient mean")
    grad_clip_norm: float | None = option(default=1.0, help="largest gradient norm; null does not clip")
    dead_after_samples: int = option(
        default=1_000_000, help="a latent is dead when it has not fired for this many samples"
    )
    dead_refresh_steps: int = option(default=10, help="steps between refreshes of the set of dead latents")
    log_every_steps: int = option(default=50, help="steps between records")
    init_samples: int = option(
        default=16_384,
        help="samples looked at before training, for b_dec and the input normalisation; they are then used",
    )
    init_b_dec: Literal["zeros", "mean", "geometric_median"] = option(
        default="geometric_median", help="where b_dec starts, estimated from init_samples"
    )
    encoder_product: Literal["full", "bfloat16"] = option(
        default="full",
        help="precision of the large encoder product; bfloat16 is faster and may change which latents are chosen",
    )
    progress_bar: bool = option(default=True, help="show a progress bar on stderr")

    def __post_init__(self) -> None:
        for name in ("total_samples", "batch_size", "dead_after_samples", "dead_refresh_steps", "log_every_steps"):
            require(getattr(self, name) > 0, f"{name} must be positive, not {getattr(self, name)}")
        for name in ("lr_warmup_samples", "lr_decay_samples"):
            value = getattr(self, name)
            require(0 <= value <= self.total_samples, f"{name} must lie in [0, total_samples], not {value}")
        require(self.lr > 0, f"lr must be positive, not {self.lr}")
        for name in ("adam_beta1", "adam_beta2"):
            require(0 <= getattr(self, name) < 1, f"{name} must lie in [0, 1), not {getattr(self, name)}")
        require(
            self.grad_clip_norm is None or self.grad_clip_norm > 0,
            f"grad_clip_norm must be positive or null, not {self.grad_clip_norm}",
        )
        require(self.init_samples > 0, f"init_samples must be positive, not {self.init_samples}")


@dataclass(frozen=True, slots=True)
class Progress:
    """What a callback sees after each step; reading `output` waits for the device."""

    trainer: Trainer
    output: StepOutput
    record: Record | None
    """The record of this step's flush, or None between flushes."""


Callback = Callable[[Progress], None]


@dataclass(slots=True)
class TrainResult:
    """A finished run: the SAE in eval mode, the records in order, and how much was seen."""

    sae: SAE
    history: list[Record] = field(default_factory=list[Record])
    samples: int = 0
    seconds: float = 0.0


@final
class Trainer:
    """Trains one SAE on one source.

    `callbacks` are called after every step with a `Progress`; `loggers` receive every record. `source` may be any
    ActivationSource or an iterable of batches, tensors (batch, d_in) or `ActivationBatch`.
    """

    def __init__(
        self,
        sae: SAE,
        source: ActivationSource | Iterable[Tensor | ActivationBatch],
        config: TrainConfig,
        callbacks: Sequence[Callback] = (),
        loggers: Sequence[Logger] = (),
    ) -> None:
        if isinstance(source, ActivationSource) and source.d_in != sae.d_in:
            raise ShapeError(f"the source gives activations of width {source.d_in}, the SAE has d_in {sae.d_in}")
        self.sae = sae
        self.source = source
        self.config = config
        self.callbacks = list(callbacks)
        self.loggers = list(loggers)
        self.samples = 0
        self.steps = 0
        self.history: list[Record] = []
        _store_latent_major(sae)
        self._parameters = contiguous_views(sae.parameters())
        self.optimizer = torch.optim.Adam(
            [contiguous for _, contiguous in self._parameters],
            lr=config.lr,
            betas=(config.adam_beta1, config.adam_beta2),
            fused=True,
        )
        self._window = Window(sae.d_out, sae.d_sae, sae.device)
        self._dead = DeadLatents(sae.d_sae, config.dead_after_samples, sae.device)
        self._dead_indices: Tensor | None = None
        self._density: float | None = None
        self._bad_since: Tensor | None = None

    def fit(self) -> TrainResult:
        """Train until `total_samples` or the end of the data, whichever is first.

        Raises DataError for a bad batch or an empty source; the SAE then holds what it had learnt before.
        """
        started = time.perf_counter()
        batches = self._batches()
        self.sae.train()
        try:
            batches = self._initialise(batches)
            with self._progress_bar() as bar:
                for batch in batches:
                    if self.samples >= self.config.total_samples:
                        break
                    before = self.samples
                    self.step(batch)
                    bar.update(self.samples - before)
                    self._show(bar)
            self._flush()
        finally:
            self.sae.eval()
            memory.forget()
            for logger in self.loggers:
                logger.close()
        if not self.steps:
            raise DataError("the source gave no batch: there is nothing to train on")
        self._record_provenance()
        return TrainResult(self.sae, self.history, self.samples, time.perf_counter() - started)

    def step(self, batch: Tensor | ActivationBatch) -> StepOutput:
        """One optimiser step on one batch, cut to what is left of `total_samples`."""
        batch = self._placed(batch)
        if self.steps % self.config.dead_refresh_steps == 0:
            self._dead_indices = self._dead.indices()
        context = StepContext(
            progress=min(self.samples / self.config.total_samples, 1.0),
            dead=self._dead_indices,
            density=self._density,
            product_dtype=torch.bfloat16 if self.config.encoder_product == "bfloat16" else None,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr * learning_rate_factor(
                self.samples + batch.inputs.shape[0],
                total=self.config.total_samples + batch.inputs.shape[0],
                warmup=self.config.lr_warmup_samples,
                decay=self.config.lr_decay_samples,
            )
        drop_gradients(self._parameters)
        output = row_blocks.training_step(self.sae, batch, context)
        output.loss.backward()
        clipped_step(self.optimizer, self._parameters, self.config.grad_clip_norm)
        self.sae.after_step()
        self._window.add(output)
        self._dead.add(output)
        self.samples += output.target.shape[0]
        self.steps += 1
        record = self._flush() if self.steps % self.config.log_every_steps == 0 else None
        for callback in self.callbacks:
            callback(Progress(self, output, record))
        return output

    def _batches(self) -> Iterator[Tensor | ActivationBatch]:
        if isinstance(self.source, ActivationSource):
            return iter(self.source.batches(self.config.batch_size))
        return iter(self.source)

    def _initialise(self, batches: Iterator[Tensor | ActivationBatch]) -> Iterator[Tensor | ActivationBatch]:
        """Look at the first samples, start b_dec and the normalisation from them, and give them back to be trained on."""
        wants_b_dec = self.config.init_b_dec != "zeros" and self.sae.reconstructs_input and self.steps == 0
        if self.sae.normalization.fitted and not wants_b_dec:
            return batches
        first: list[Tensor | ActivationBatch] = []
        rows: list[Tensor] = []
        while sum(len(part) for part in rows) < self.config.init_samples:
            batch = next(batches, None)
            if batch is None:
                break
            first.append(batch)
            seen = sum(len(part) for part in rows)
            rows.append(self._placed(batch, seen).inputs.reshape(-1, self.sae.d_in).to(self.sae.dtype))
        if rows:
            x_RD = torch.cat(rows)
            if not self.sae.normalization.fitted:
                self.sae.normalization.fit([x_RD])
            if wants_b_dec:
                z_RD = self.sae.prepare(x_RD).z
                median = self.config.init_b_dec == "geometric_median"
                with torch.no_grad():
                    self.sae.b_dec.copy_(geometric_median(z_RD) if median else z_RD.mean(0))
        return itertools.chain(first, batches)

    def _placed(self, batch: Tensor | ActivationBatch, first_sample: int | None = None) -> ActivationBatch:
        """The batch on the SAE's device, checked, and no longer than what is left to train on."""
        if not isinstance(batch, ActivationBatch):
            batch = ActivationBatch(batch)
        start = self.samples if first_sample is None else first_sample
        where = f"step {self.steps}" if first_sample is None else "initialisation"
        inputs = self._checked(batch.inputs, self.sae.d_in, start, f"{where}, samples from {start}: inputs")
        targets = None
        if batch.targets is not None:
            targets = self._checked(batch.targets, self.sae.d_out, start, f"{where}, samples from {start}: targets")
        left = self.config.total_samples - start
        if inputs.dim() == 2 and 0 < left < inputs.shape[0]:
            inputs, targets = inputs[:left], None if targets is None else targets[:left]
        return ActivationBatch(inputs, targets)

    def _checked(self, part: object, width: int, start: int, name: str) -> Tensor:
        """`part` on the SAE's device; DataError for what cannot be trained on.

        On the host, values are checked at once. On a device, looking would mean waiting for it: a bad value there is noted,
        the optimiser skips this and all later steps, and the next flush raises the error.
        """
        if not isinstance(part, Tensor) or not part.is_floating_point():
            kind = part.dtype if isinstance(part, Tensor) else type(part).__name__
            raise DataError(f"{name}: floating point activations are needed, found {kind}")
        joined = part.shape[-2:].numel() if part.dim() > 2 else 0  # attention heads, which the SAE joins
        if part.dim() < 2 or (part.shape[-1] != width and joined != width):
            raise DataError(f"{name}: shape {tuple(part.shape)}, but rows of width {width} are needed")
        if part.numel() == 0:
            raise DataError(f"{name}: shape {tuple(part.shape)} holds no activations")
        if part.device.type == "cpu":
            check_batch(part, start, name)
            return part.to(self.sae.device, non_blocking=True)
        self._bad_since = self._first_bad(part, start)
        return part.to(self.sae.device).nan_to_num(0.0, 0.0, 0.0)

    @torch.no_grad()
    def _first_bad(self, part: Tensor, start: int) -> Tensor:
        """The number of the first sample of the first bad batch so far, or -1, on the device."""
        bad = ~torch.isfinite(part).all()
        since = torch.full((), -1, device=part.device) if self._bad_since is None else self._bad_since
        since = torch.where(bad & (since < 0), start, since)
        self.optimizer.found_inf = (since >= 0).float().to(self.sae.device)  # pyright: ignore[reportAttributeAccessIssue] - read by fused Adam, which then skips the step
        return since

    def _flush(self) -> Record | None:
        means = self._window.flush()
        if not means:
            return None
        if self._bad_since is not None and int(self._bad_since) >= 0:
            raise DataError(
                f"NaN or infinite activations in the batch that starts at sample {int(self._bad_since)}; "
                "no step was taken with it or after it"
            )
        if not all(
            value == value and abs(value) != float("inf") for key, value in means.items() if key.startswith("loss")
        ):
            raise DataError(
                f"step {self.steps}: the loss is {means['loss']}; training diverged within the last "
                f"{self.config.log_every_steps} steps. Lower lr ({self.config.lr}) or check the scale of the activations"
            )
        self._density = means["l0"] / self.sae.d_sae
        dead = self._dead.indices()
        record: Record = {
            "step": self.steps,
            "samples": self.samples,
            "lr": self.optimizer.param_groups[0]["lr"],
            **means,
            "dead_fraction": 0.0 if dead is None else dead.numel() / self.sae.d_sae,
        }
        self.history.append(record)
        for logger in self.loggers:
            logger.log(record)
        return record

    def _progress_bar(self) -> Any:
        from tqdm.auto import tqdm

        return tqdm(
            total=self.config.total_samples,
            initial=self.samples,
            unit="sample",
            unit_scale=True,
            disable=not self.config.progress_bar,
            dynamic_ncols=True,
            mininterval=0.1 if sys.stderr.isatty() else 10,  # a log file wants a line now and then
        )

    def _show(self, bar: Any) -> None:
        if self.history and self.steps % self.config.log_every_steps == 0:
            last = self.history[-1]
            bar.set_postfix_str(f"L0 {last['l0']:.1f} EV {last['explained_variance']:.3f}", refresh=False)

    def _record_provenance(self) -> None:
        """Keep with the SAE what it was trained on and how."""
        if isinstance(self.source, HasMetadata):
            self.sae.metadata.update(self.source.metadata())
        from sae_core.config import unstructure

        ours = self.sae.metadata.setdefault("sae_core", {})
        ours["training"] = {"samples": self.samples, "steps": self.steps, "train_config": unstructure(self.config)}
        if self.history:
            last = self.history[-1]
            ours["training"]["final"] = {
                key: last[key]
                for key in ("loss", "explained_variance", "l0", "dead_fraction")
                if last[key] == last[key]
            }


@torch.no_grad()
def geometric_median(x_RD: Tensor, iterations: int = 50, tolerance: float = 1e-6) -> Tensor:
    """The point with the least summed distance to all rows, by Weiszfeld's iteration.

    >>> geometric_median(torch.tensor([[0.0], [0.0], [0.0], [100.0]])).abs().item() < 1e-2
    True
    """
    centre = x_RD.mean(0)
    spread = (x_RD - centre).norm(dim=-1).mean().clamp_min(torch.finfo(x_RD.dtype).tiny)
    for _ in range(iterations):
        weights = 1 / (x_RD - centre).norm(dim=-1).clamp_min(1e-6 * spread)
        moved = (weights @ x_RD) / weights.sum()
        if bool((moved - centre).norm() <= tolerance * spread):
            return moved
        centre = moved
    return centre


@torch.no_grad()
def _store_latent_major(sae: SAE) -> None:
    """Give encoders the memory layout in which a latent's column is contiguous; values do not change."""
    for name, parameter in sae.named_parameters():
        if name == "W_enc" and not parameter.t().is_contiguous():
            parameter.data = parameter.data.t().contiguous().t()
