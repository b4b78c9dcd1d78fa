"""`Learner`: all that training keeps for one dictionary, and one optimiser step of it.

Everything that decides what comes next lives here and in the stream of batches: weights, Adam's moments, the sums of the
running window, how long each latent has been silent, the set of dead latents as it was last looked at, the density from
which ops choose their form. `state_dict` holds all of it, so that a run can be interrupted anywhere between two steps and
go on with the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal, final

import torch
from torch import Tensor

from sae_core.config import ends_of, require, structure, unstructure, value_at
from sae_core.data.stream import Batch, Part, part_of
from sae_core.data.wiring import Wiring
from sae_core.errors import DataError, FormatError
from sae_core.format.slices import TensorPart
from sae_core.latent_ranks import all_latents
from sae_core.ops.mixed import dense_products_in
from sae_core.ops.screening import ProductForm, Tally, encoder_products, may_screen, tallied
from sae_core.ops.whole_batch import ALL_HERE, WholeBatch, divided
from sae_core.parallel.ranks import ALONE, Ranks
from sae_core.protocols import ActivationBatch
from sae_core.sae import SAE, StepContext
from sae_core.training.checkpoint import without_parts
from sae_core.training.config import TrainConfig, samples_of
from sae_core.training.gradients import GradientSums
from sae_core.training.monitor import DeadLatents, Window, check_batch
from sae_core.training.optimizer import Adam, clipped_step
from sae_core.training.resampling import forget_moments, resample
from sae_core.training.row_blocks import StepResult, forward_and_backward
from sae_core.training.schedules import learning_rate_factor
from sae_core.training.steering import CoefficientSteering

__all__ = ["UNCERTAIN_ROWS", "DivergedError", "Learner", "Record", "geometric_median"]

Record = dict[str, float | None]
"""One flush: step, samples, lr, loss and its terms, and what is measured; None for what is not known yet."""

UNCERTAIN_ROWS = "uncertain_rows"
"""The metric of steps with screened products: the share of rows that had to be computed in full."""

_FAR_BELOW_ZERO = -10.0
_ERROR_GREW = 10.0
_LAST_PART = 0.9
_RESAMPLED_PART = 0.8


class DivergedError(DataError):
    """Training made the dictionary worse than useless; its weights are not worth keeping."""


@dataclass(frozen=True, slots=True, eq=False)
class _Placed:
    """What is computed here of a batch of `items`, each of `item_rows` rows, and the `share` of the batch that it counts for.

    `together` is what those ask for whom the batch must be whole.
    """

    batch: ActivationBatch
    items: int
    item_rows: int
    together: WholeBatch
    share: float

    @property
    def rows(self) -> int:
        """Rows of the batch, on all ranks."""
        return self.items * self.item_rows

    def whole(self, ranks: Ranks) -> ActivationBatch:
        """The whole batch."""
        if self.together.ranks.size == 1:
            return self.batch
        inputs, targets = self.batch.inputs, self.batch.targets
        return ActivationBatch(
            ranks.whole(inputs, self.items), None if targets is None else ranks.whole(targets, self.items)
        )


@final
class Learner:
    """One dictionary in training: `sae`, its `config`, `optimizer`, `samples` and `steps` done, `history` of records.

    `wiring` takes of the stream's batches what this dictionary reads and predicts; None: batches are its own. Where `ranks` are
    several, each has the whole dictionary and a part of every batch, and all take the same steps.
    """

    def __init__(self, sae: SAE, config: TrainConfig, wiring: Wiring | None = None, ranks: Ranks = ALONE) -> None:
        require(
            config.encoder_product == "auto" or sae.has_encoder_product,
            f"encoder_product: {config.encoder_product} makes no difference to {sae.architecture}, which has no large encoder "
            "product of the ops; remove it",
        )
        require(
            config.precision == "full" or sae.has_encoder_product,
            f"precision: {config.precision} makes no difference to {sae.architecture}, which has no dense products of the ops; "
            "remove it",
        )
        require(
            config.resample_dead_every_samples is None or sae.restarts_latents,
            f"resample_dead_every_samples: latents of {sae.architecture} cannot be restarted; remove it",
        )
        self.sae = sae
        self.config = config
        self.ranks = ranks
        self._wiring = wiring
        self.samples = 0
        self.steps = 0
        self.history: list[Record] = []
        self.optimizer = Adam(
            sae.parameters(),
            lr=value_at(config.lr, 0.0),
            betas=(value_at(config.adam_beta1, 0.0), value_at(config.adam_beta2, 0.0)),
            fused=True,
        )
        self.window = Window(sae.d_out, sae.d_sae, sae.device)
        self.dead = DeadLatents(sae.d_sae, samples_of(config.dead_after_samples, config.total_samples), sae.device)
        self._fired = torch.zeros(sae.d_sae, dtype=torch.long, device=sae.device)  # over the last part of the run
        self._fired_here = torch.zeros_like(self._fired)  # what of that other ranks have not been told
        self._fired_rows = 0
        self.steering: CoefficientSteering | None = None
        if config.target_l0 is not None:
            self.steering = CoefficientSteering(
                sae,
                config.target_l0,
                steps=config.total_samples / config.batch_size,
                every=config.dead_refresh_steps,
            )
        self.density: float | None = None
        self._sums = GradientSums(list(sae.parameters()), ranks)
        self._resampled = 0  # since the last record
        self._gathered_rows = 0  # whose gradients wait for the optimiser's step
        self._dead_indices: Tensor | None = None
        self._dead_elsewhere = 0
        self._bad_since: Tensor | None = None
        self._first_error: Tensor | None = None
        self._best_error = math.inf

    @property
    def finished(self) -> bool:
        """Whether `total_samples` have been trained on."""
        return self.samples >= self.config.total_samples

    # Before the first step.

    @property
    def looks_ahead(self) -> bool:
        """Whether `initialise` wants to see the first samples."""
        return not self.ready or self._wants_b_dec or (self.sae.starts_from_data and self.steps == 0)

    @property
    def ready(self) -> bool:
        """Whether the normalisations have what they need."""
        targets = self.sae.target_normalization
        return self.sae.normalization.fitted and (targets is None or targets.fitted)

    def initialise(self, first: Sequence[Batch | Part]) -> None:
        """Start b_dec and the normalisation from the first batches, on every rank whole; they are trained on afterwards."""
        placed: list[ActivationBatch] = []
        seen = 0
        for batch in first:
            if seen >= self.config.init_samples:
                break
            found = self._placed(batch, seen)
            placed.append(found.whole(self.ranks))
            seen += found.rows
        if placed:
            _start_from(self.sae, _joined(placed, self.sae), self.config.init_b_dec if self._wants_b_dec else "zeros")

    # Steps.

    def step(self, batch: Batch | Part) -> StepResult:
        """One optimiser step on one batch, cut to what is left of `total_samples`; of it this rank computes its rows."""
        found = self._placed(batch)
        placed, rows, share = found.batch, found.rows, found.share
        if self.steps == 0:
            self._announce(placed)
        self.sae.train()
        if self.steps % self.config.dead_refresh_steps == 0:
            self._dead_indices, self._dead_elsewhere = self._find_dead()
            if self.steering is not None:
                self.steering.adjust(self.ranks)
        context = self._context(self._dead_indices, self._dead_elsewhere)
        self._set_optimizer(rows, context.progress)
        if not self._gathered_rows:
            self.optimizer.zero_grad(set_to_none=True)
        gathers = self.config.gradient_accumulation_steps > 1
        is_last = not gathers or self._all_gathered(rows)
        with (
            dense_products_in(torch.bfloat16 if self.config.precision == "bfloat16" else None),
            divided(found.together),
            self._sums.during_backward() if is_last else nullcontext(),
        ):
            result = self._passes(placed, context, rows * share if gathers else share)
        if is_last:
            self._sums.finish()
            if gathers:
                self._mean_of_gathered()
            clip = self.config.grad_clip_norm
            clipped_step(self.optimizer, None if clip is None else value_at(clip, context.progress), self.sae)
            with torch.no_grad():
                self.sae.after_step()
        self.window.add(result, rows, share)
        self.dead.add(result, rows)
        if context.progress >= _LAST_PART:
            if share:
                self._fired_here += result.firing_counts
            self._fired_rows += rows
        if self.steering is not None:
            self.steering.add(result, rows, share)
        if self.steps == 0:
            self._first_error = _error(result) * share
        self.samples += rows
        self.steps += 1
        if self._resampling_is_due(rows):
            self._resample(found, result)
        return result

    def _passes(self, batch: ActivationBatch, context: StepContext, weight: float) -> StepResult:
        """Forward and backward; where products may be screened, with the share of rows that had to be computed in full."""
        with encoder_products(self._form), tallied() as tally:
            result = forward_and_backward(self.sae, batch, context, weight=weight)
        return replace(result, metrics={**result.metrics, **self._counted(tally)})

    def _counted(self, tally: Tally) -> dict[str, torch.Tensor]:
        """The share of rows that had to be computed in full, where products may be screened."""
        return {UNCERTAIN_ROWS: tally.share(self.sae.device)} if tally.asked and self._screens else {}

    @property
    def _form(self) -> ProductForm:
        if self.config.encoder_product == "auto" and self.config.precision == "bfloat16":
            return "screened"
        return self.config.encoder_product

    @property
    def _screens(self) -> bool:
        with encoder_products(self._form):
            return may_screen(self.sae.device, self.sae.dtype)

    def _all_gathered(self, rows: int) -> bool:
        """Count a batch's gradients, which are sums over rows; whether enough have come together."""
        self._gathered_rows += rows
        last = self.samples + rows >= self.config.total_samples
        return last or (self.steps + 1) % self.config.gradient_accumulation_steps == 0

    def _mean_of_gathered(self) -> None:
        for parameter in self.sae.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(1 / self._gathered_rows)
        self._gathered_rows = 0

    def _resampling_is_due(self, rows: int) -> bool:
        every, total = self.config.resample_dead_every_samples, self.config.total_samples
        if every is None or self.samples > _RESAMPLED_PART * total:
            return False
        size = max(samples_of(every, total), 1)
        return self.samples // size > (self.samples - rows) // size

    def _resample(self, found: _Placed, result: StepResult) -> None:
        """Look for dead latents, which waits for the device, and start them anew."""
        latents, elsewhere = self._find_dead()
        if latents is None:
            return
        resample(self.sae, latents, found.batch, result, self.samples, found.together)
        forget_moments(self.optimizer, self.sae, latents)
        self.dead.samples_since_fired[latents] = 0
        self._dead_indices, self._dead_elsewhere = None, 0
        self._resampled += len(latents) + elsewhere

    def flush(self) -> Record | None:
        """The record of the steps since the last flush; None when there were none.

        Raises DataError for bad values that came on a device, DivergedError when the steps did harm.
        """
        means = self.window.flush(self.ranks)
        if not means:
            return None
        self._tell_others()
        if self._bad_since is not None and int(self._bad_since) >= 0:
            raise DataError(
                f"NaN or infinite activations in the batch that starts at sample {int(self._bad_since)}; "
                "no step was taken with it or after it"
            )
        error = means.pop("residual") or 0.0
        self._check_progress(means, error)
        l0, (dead, elsewhere) = means["l0"], self._find_dead()
        d_sae = self.sae.config.d_sae
        self.density = None if l0 is None else l0 / d_sae
        known = self.samples > self.dead.after  # before, none can be dead, which says nothing
        record: Record = {
            "step": self.steps,
            "samples": self.samples,
            "lr": self.optimizer.param_groups[0]["lr"],
            **means,
            **({} if self.steering is None else {"sparsity_coefficient": self.steering.coefficient}),
            **({} if self.config.resample_dead_every_samples is None else {"resampled": self._resampled}),
            "dead_fraction": (elsewhere + (0 if dead is None else dead.numel())) / d_sae if known else None,
        }
        self._resampled = 0
        self.history.append(record)
        return record

    def firing_density(self) -> Tensor | None:
        """(d_sae,) the fraction of samples on which each latent fired over the last tenth of the run; None before it.

        Where latents are shared out over ranks, those of all, and all ask for it.
        """
        if not self._fired_rows:
            return None
        return all_latents(self._fired + self._fired_here, self.sae.ranks).double() / self._fired_rows

    def moments(self, name: str) -> Tensor | None:
        """Adam's running mean of the squared gradient of the parameter `name`; None before the first step."""
        return self.optimizer.state.get(self.sae.get_parameter(name), {}).get("exp_avg_sq")

    # The whole state.

    def settle(self) -> None:
        """Before a state is taken: bring what ranks have summed up together at the first, where a state has it."""
        if self.ranks.size == 1:
            return
        self._tell_others()
        self.window.settle(self.ranks)
        self.dead.indices(self.ranks)
        if self.steering is not None:
            self.steering.settle(self.ranks)
        if self._gathered_rows:
            self._sums.finish()
        self._leave_to_first()

    def _tell_others(self) -> None:
        """Sums that every rank has whole."""
        self.ranks.add([self._fired_here])
        self._fired += self._fired_here
        self._fired_here.zero_()
        if self._first_error is not None:
            self.ranks.add([self._first_error])

    def _leave_to_first(self) -> None:
        """The first rank has sums whole, and the others go on from nothing."""
        if not self.ranks.rank:
            return
        waiting = [parameter.grad for parameter in self.sae.parameters()] if self._gathered_rows else []
        for tensor in (self._first_error, *waiting):
            if tensor is not None:
                tensor.zero_()

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next steps depend on; on several ranks after `settle`, and of the first, or of those that share
        out the latents. What belongs to latents is a `TensorPart`.
        """
        moments = {
            name: {
                key: self._part(name, value, parameter)
                for key, value in self.optimizer.state.get(parameter, {}).items()
            }
            for name, parameter in self.sae.named_parameters()
        }
        weights = {**self.sae.state_dict(), **dict(self.sae.named_buffers())}
        return {
            "architecture": self.sae.architecture,
            "sae_config": unstructure(self.sae.config),
            "dtype": str(self.sae.dtype).removeprefix("torch."),
            "metadata": self.sae.metadata,
            "weights": {name: self._part(name, tensor) for name, tensor in weights.items()},
            "optimizer": moments,
            "window": self.window.state_dict(),
            "silent_samples": TensorPart(self.dead.samples_since_fired, 0),
            "dead": self._dead_mask(),
            "n_dead": self._context(self._dead_indices, self._dead_elsewhere).n_dead,
            "fired": TensorPart(self._fired + self._fired_here, 0),
            "fired_rows": self._fired_rows,
            "resampled": self._resampled,
            "gathered_rows": self._gathered_rows,
            "gradients": self._gathered(),
            "density": self.density,
            "steering": None if self.steering is None else self.steering.state_dict(),
            "bad_since": self._bad_since,
            "first_error": self._first_error,
            "best_error": self._best_error,
            "samples": self.samples,
            "steps": self.steps,
            "history": self.history,
        }

    def _gathered(self) -> dict[str, TensorPart]:
        """Gradients that wait for the optimiser's step."""
        named = self.sae.named_parameters() if self._gathered_rows else ()
        return {name: self._part(name, parameter.grad) for name, parameter in named if parameter.grad is not None}

    def _dead_mask(self) -> TensorPart | None:
        """(d_sae,) whether a latent is dead; None where none is."""
        if self._dead_indices is None:
            return None
        none = torch.zeros(self.sae.d_sae, dtype=torch.bool, device=self.sae.device)
        return TensorPart(none.index_fill_(0, self._dead_indices, True), 0)

    def _part(self, name: str, tensor: Tensor, like: Tensor | None = None) -> TensorPart:
        """A tensor that has the form of the SAE's tensor `name`; or if it has that of `like`."""
        same = like is None or tensor.shape == like.shape
        return TensorPart(tensor, self.sae.latent_dimension(name) if same else None)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with a saved state, of what belongs to latents with this rank's. Raises FormatError where it belongs to another
        dictionary.
        """
        state = without_parts(state)
        self.sae.config = structure(state["sae_config"], type(self.sae.config), where="checkpoint")
        self.sae.metadata = dict(state["metadata"])
        self._load_weights(state["weights"])
        device = self.sae.device
        for name, parameter in self.sae.named_parameters():
            moments = state["optimizer"].get(name, {})
            if moments:  # the count of steps keeps its type, the others have the parameter's
                self.optimizer.state[parameter] = {
                    key: value.to(device, parameter.dtype if value.dim() else value.dtype)
                    for key, value in moments.items()
                }
        self.window.load_state_dict(state["window"])
        self.dead.samples_since_fired.copy_(state["silent_samples"])
        self._fired.copy_(state["fired"])
        self._fired_rows = state["fired_rows"]
        self._resampled, self._gathered_rows = state["resampled"], state["gathered_rows"]
        for name, gradient in state["gradients"].items():
            parameter = self.sae.get_parameter(name)
            parameter.grad = gradient.to(device, parameter.dtype)
        dead, self._bad_since, self._first_error = (
            None if state[key] is None else state[key].to(device) for key in ("dead", "bad_since", "first_error")
        )
        self._dead_indices = None if dead is None else dead.nonzero().squeeze(-1)
        self._dead_elsewhere = state["n_dead"] - (0 if self._dead_indices is None else self._dead_indices.numel())
        if self.steering is not None and state["steering"] is not None:
            self.steering.load_state_dict(state["steering"])
        self.density, self._best_error = state["density"], state["best_error"]
        self.samples, self.steps, self.history = state["samples"], state["steps"], list(state["history"])
        if self.ranks.rank:
            self.window.forget()
            if self.steering is not None:
                self.steering.forget()
            self._leave_to_first()

    def _load_weights(self, weights: Mapping[str, Tensor]) -> None:
        persistent = set(self.sae.state_dict())
        try:
            self.sae.load_state_dict({name: tensor for name, tensor in weights.items() if name in persistent})
        except RuntimeError as error:
            raise FormatError(f"the checkpoint's weights are not those of this dictionary: {error}") from None
        buffers = dict(self.sae.named_buffers())
        for name in set(weights) - persistent:
            if name not in buffers:
                raise FormatError(f"the checkpoint has a tensor {name!r} that this dictionary has not")
            buffers[name].copy_(weights[name])

    # Parts of a step.

    @property
    def _wants_b_dec(self) -> bool:
        return self.config.init_b_dec != "zeros" and self.steps == 0

    def _find_dead(self) -> tuple[Tensor | None, int]:
        """The dead latents that are here, or None where there are none at all, and how many other ranks hold."""
        found, latents = self.dead.indices(self.ranks), self.sae.ranks
        if latents is None:
            return found, 0
        here = torch.zeros(0, dtype=torch.long, device=self.sae.device) if found is None else found
        elsewhere = sum(latents.everyone(here.numel())) - here.numel()
        return (here if here.numel() + elsewhere else None), elsewhere

    def _context(self, dead: Tensor | None, elsewhere: int) -> StepContext:
        return StepContext(
            progress=min(self.samples / self.config.total_samples, 1.0),
            dead=dead,
            density=self.density,
            dead_elsewhere=elsewhere,
        )

    def _set_optimizer(self, rows: int, progress: float) -> None:
        """What the schedules say for this step of `rows` samples."""
        config, total = self.config, self.config.total_samples
        factor = learning_rate_factor(
            self.samples + rows,
            total=total + rows,
            warmup=samples_of(config.lr_warmup_samples, total),
            decay=samples_of(config.lr_decay_samples, total),
        )
        for group in self.optimizer.param_groups:
            group["lr"] = value_at(config.lr, progress) * factor
            group["betas"] = (value_at(config.adam_beta1, progress), value_at(config.adam_beta2, progress))

    @torch.no_grad()
    def _announce(self, batch: ActivationBatch) -> None:
        """Have the objective name all its terms once, that of dead latents included."""
        was = self.sae.training
        few = ActivationBatch(batch.inputs[:2], None if batch.targets is None else batch.targets[:2])
        self.sae.eval()  # running statistics stay as they are
        elsewhere = 0 if self.sae.ranks is None else self.sae.ranks.size - 1
        context = self._context(torch.zeros(1, dtype=torch.long, device=self.sae.device), elsewhere)
        with encoder_products(self._form), tallied() as tally:
            output = self.sae.training_step(few, context)
        require(
            self.config.encoder_product == "auto" or tally.asked > 0,
            f"encoder_product: {self.config.encoder_product} makes no difference to {self.sae.architecture}, whose objective "
            "does not leave the product to the ops; remove it",
        )
        self.window.announce(output.losses, {**output.metrics, **self._counted(tally)})
        self.sae.train(was)

    def _placed(self, given: Batch | Part, first_sample: int | None = None) -> _Placed:
        """The batch on the SAE's device, checked, and no longer than what is left to train on."""
        if not isinstance(given, Part) and self.ranks.size > 1:
            given = part_of(given, self.ranks)
        part, batch = (given, given.batch) if isinstance(given, Part) else (None, given)
        if not isinstance(batch, ActivationBatch):
            batch = ActivationBatch(batch)
        batch = batch if self._wiring is None else self._wiring(batch)
        start = self.samples if first_sample is None else first_sample
        where = f"step {self.steps}" if first_sample is None else "initialisation"
        inputs = self._checked(batch.inputs, self.sae.d_in, start, f"{where}, samples from {start}: inputs")
        targets = None
        if batch.targets is not None:
            targets = self._checked(batch.targets, self.sae.d_out, start, f"{where}, samples from {start}: targets")
        if self.sae.reads_sequences and inputs.dim() < 3:
            raise DataError(
                f"{where}, samples from {start}: inputs: shape {tuple(inputs.shape)}, but {self.sae.architecture} reads whole "
                "sequences, (sequences, positions, d_in); rows in random order would be taken for neighbours"
            )
        items = inputs.shape[0] if part is None else part.items
        together = inputs.shape[1:].numel() // self.sae.d_in
        left = self.config.total_samples - start
        if 0 < left < items * together:  # whole sequences stay whole
            items = math.ceil(left / together)
        ranks = self.ranks
        if (
            part is not None and items < ranks.size
        ):  # too few for all: every rank computes all of them, and the first counts
            inputs, targets = ranks.whole(inputs, items), None if targets is None else ranks.whole(targets, items)
            return _Placed(ActivationBatch(inputs, targets), items, together, ALL_HERE, float(not ranks.rank))
        keep = ranks.items(items)
        here = ActivationBatch(inputs[:keep], None if targets is None else targets[:keep])
        if ranks.size == 1:
            return _Placed(here, items, together, ALL_HERE, 1.0)
        return _Placed(here, items, together, WholeBatch(ranks, items * together, together), keep / items)

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
        if part.numel() == 0 and self.ranks.size == 1:
            raise DataError(f"{name}: shape {tuple(part.shape)} holds no activations")
        if part.device.type == "cpu":
            check_batch(part, start + self.ranks.rank, name, self.ranks.size)
            return part.to(self.sae.device, non_blocking=True)
        self._bad_since = self._first_bad(part, start)
        return part.to(self.sae.device).nan_to_num(0.0, 0.0, 0.0)

    @torch.no_grad()
    def _first_bad(self, part: Tensor, start: int) -> Tensor:
        """The number of the first sample of the first bad batch so far, or -1, on the device."""
        bad = self.ranks.most((~torch.isfinite(part).all()).int().reshape(1))[0] > 0
        since = torch.full((), -1, device=part.device) if self._bad_since is None else self._bad_since
        since = torch.where(bad & (since < 0), start, since)
        self.optimizer.found_inf = (since >= 0).float().to(self.sae.device)  # pyright: ignore[reportAttributeAccessIssue] - read by fused Adam, which then skips the step
        return since

    def _check_progress(self, means: Mapping[str, float | None], error: float) -> None:
        """Raise DivergedError when the losses are not finite, or the dictionary is far worse than at its best and useless."""
        within = f"within the last {self.config.log_every_steps} steps"
        advice = f"Lower lr ({max(ends_of(self.config.lr))}) or check the scale of the activations"
        losses = [value for name, value in means.items() if name.startswith("loss") and value is not None]
        if not all(map(math.isfinite, losses)):
            raise DivergedError(f"step {self.steps}: the loss is {means['loss']}; training diverged {within}. {advice}")
        if self._first_error is not None:
            self._best_error = min(self._best_error, float(self._first_error))
            self._first_error = None
        variance = means["explained_variance"]
        if variance is not None and variance < _FAR_BELOW_ZERO and error > _ERROR_GREW * self._best_error:
            raise DivergedError(
                f"step {self.steps}: the squared error grew from {self._best_error:.3g} to {error:.3g} a sample and "
                f"explained variance is {variance:.3g}; training diverged {within}. {advice}"
            )
        self._best_error = min(self._best_error, error)


def _error(result: StepResult) -> Tensor:
    """The squared error of a row, on the device."""
    residual = result.reconstruction.detach() - result.target
    return residual.double().square().sum() / residual.shape[0]


@torch.no_grad()
def _start_from(sae: SAE, batch: ActivationBatch, centre: Literal["zeros", "mean", "geometric_median"]) -> None:
    """Fit the normalisations to a batch unless they are, and start what an architecture wants to start from data: biases in
    the middle of what is to be reconstructed.
    """
    sae.fit_normalization(batch)
    if centre == "zeros" and not sae.starts_from_data:
        return
    prepared = sae.prepare(batch.inputs)
    y_RO = prepared.z if sae.reconstructs_input else sae.target_rows(prepared, batch.targets)
    if sae.starts_from_data:
        sae.start_from(prepared.z, y_RO)
    if centre != "zeros":
        sae.start_at(geometric_median(y_RO) if centre == "geometric_median" else y_RO.mean(0))


def _joined(batches: Sequence[ActivationBatch], sae: SAE) -> ActivationBatch:
    """All rows of several batches as one; where sequences are read, all sequences."""

    def rows(parts: Sequence[Tensor], width: int) -> Tensor:
        positions = parts[0].shape[-2:-1] if sae.reads_sequences else ()
        return torch.cat([part.reshape(-1, *positions, width).to(sae.dtype) for part in parts])

    targets = [batch.targets for batch in batches if batch.targets is not None]
    return ActivationBatch(
        rows([batch.inputs for batch in batches], sae.d_in), rows(targets, sae.d_out) if targets else None
    )


_NO_SPREAD = 1e-30  # of rows that are one point: nothing can be divided by distances between them


@torch.no_grad()
def geometric_median(x_RD: Tensor, iterations: int = 50, tolerance: float = 1e-6) -> Tensor:
    """The point with the least summed distance to all rows, by Weiszfeld's iteration.

    >>> geometric_median(torch.tensor([[0.0], [0.0], [0.0], [100.0]])).abs().item() < 1e-2
    True
    """
    x_RD = x_RD.to(torch.promote_types(x_RD.dtype, torch.float32))
    centre = x_RD.mean(0)
    spread = (x_RD - centre).norm(dim=-1).mean()
    if bool(spread < _NO_SPREAD):
        return centre
    for _ in range(iterations):
        weights = 1 / (x_RD - centre).norm(dim=-1).clamp_min(1e-6 * spread)
        moved = (weights @ x_RD) / weights.sum()
        if bool((moved - centre).norm() <= tolerance * spread):
            return moved
        centre = moved
    return centre
