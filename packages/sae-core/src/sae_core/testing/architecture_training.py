"""What every architecture promises of training: its objective, its gradients, and that the Trainer can run it and go on."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress

import torch
from torch import Tensor

from sae_core.errors import ConfigError
from sae_core.ops.screening import encoder_products, tallied
from sae_core.protocols import ActivationBatch, RunFacts
from sae_core.sae import SAE, StepContext, StepOutput
from sae_core.testing.architecture_files import NORMALIZATIONS
from sae_core.testing.kit import Check, NotApplicable, Subject
from sae_core.testing.small import is_finite, pairs_for, same, train
from sae_core.training.config import TrainConfig
from sae_core.training.trainer import Progress, Trainer

__all__ = [
    "CHECKS",
    "check_after_step",
    "check_gradients",
    "check_learns",
    "check_mean_over_rows",
    "check_objective",
    "check_objective_is_the_forward_pass",
    "check_restart",
    "check_resume",
    "check_trainer",
    "check_training_is_deterministic",
    "check_training_precisions",
]


def check_objective(subject: Subject) -> None:
    """The training step gives a finite scalar loss, its terms, codes and reconstructions of the right shapes."""
    sae: SAE = subject.new().train()
    batch = pairs_for(sae, 32)
    out = sae.training_step(batch, StepContext(progress=0.5))
    assert isinstance(out, StepOutput), f"training_step gave {type(out).__name__}, not StepOutput"
    assert out.loss.shape == (), f"the loss has shape {tuple(out.loss.shape)}; it must be a scalar"
    is_finite(out.loss, "the loss")
    assert out.losses, "losses is empty: name the terms of the loss, for the log"
    same(sum(out.losses.values(), torch.zeros(())), out.loss, "the sum of the terms and the loss")
    rows = batch.inputs.shape[0] if isinstance(batch, ActivationBatch) else batch.shape[0]
    assert out.codes.shape == (rows, sae.d_sae), f"codes have shape {out.codes.shape}, not {(rows, sae.d_sae)}"
    for what, tensor in (("reconstruction", out.reconstruction), ("target", out.target)):
        assert tensor.shape == (rows, sae.d_out), f"the {what} has shape {tuple(tensor.shape)}, not {(rows, sae.d_out)}"
    sae.training_step(batch, StepContext(progress=0.5, dead=torch.arange(sae.d_sae // 2), density=0.01))
    sae.training_step(batch)


def check_objective_is_the_forward_pass(subject: Subject) -> None:
    """The loss is about what the SAE does: the codes that training uses, what they decode to, in the space of the target.

    In train mode `encode_rows` gives the codes of the objective. Its reconstruction is what `decode_rows` makes of them,
    brought into the space of the target by `to_loss_space`: without it, the numbers in the log are those of another SAE as
    soon as the normalisation differs from row to row.
    """
    for name in ("none", *NORMALIZATIONS):
        try:
            sae: SAE = subject.new(normalize_activations=name)
        except ConfigError:
            continue
        where = "" if name == "none" else f"normalize_activations {name}: "
        sae.fit_normalization(pairs_for(sae))
        train(sae, steps=3)
        batch = pairs_for(sae, 32)
        inputs, targets = (batch.inputs, batch.targets) if isinstance(batch, ActivationBatch) else (batch, None)
        prepared, again = sae.prepare(inputs), sae.prepare(inputs)
        target = sae.target_rows(prepared, targets)
        out = sae.objective(prepared, target, StepContext(progress=1.0))
        same(out.target, target, f"{where}the target of the objective and the one that it was given")
        used = sae.encode_rows(again).to_dense()
        same(out.codes.to_dense(), used, f"{where}the codes of the objective and encode_rows in train mode", 1e-4)
        decoded = SAE.to_loss_space(sae, sae.decode_rows(out.codes, again), again)
        same(out.reconstruction, decoded, f"{where}the reconstruction and what its codes decode to", 1e-4)


def check_gradients(subject: Subject) -> None:
    """Every parameter gets a finite gradient from the training step, and on some batch one that is not zero.

    A parameter that is not trained should be a buffer.
    """
    sae = subject.new().train()
    context = StepContext(progress=0.5, dead=torch.arange(sae.d_sae // 2))
    moved = {name: False for name, parameter in sae.named_parameters() if parameter.requires_grad}
    for seed in range(3):
        sae.zero_grad()
        sae.training_step(pairs_for(sae, seed=seed), context).loss.backward()
        for name, parameter in sae.named_parameters():
            if parameter.grad is not None:
                is_finite(parameter.grad, f"the gradient of {name!r}")
                moved[name] |= bool((parameter.grad != 0).any())
    still = [name for name, has_moved in moved.items() if not has_moved]
    assert not still, f"no gradient ever reaches {', '.join(still)}"


def check_learns(subject: Subject) -> None:
    """Forty steps of Adam on one batch bring the squared error well below that of answering with the mean."""
    sae = subject.new()
    train(sae, steps=40, lr=4e-3)
    with torch.no_grad():
        out = sae.training_step(pairs_for(sae), StepContext(progress=1.0))
    error = (out.reconstruction - out.target).square().sum(-1).mean()
    trivial = (out.target - out.target.mean(0)).square().sum(-1).mean()
    assert float(error) < 0.7 * float(trivial), (
        f"the squared error is {float(error):.3g}; answering with the mean gives {float(trivial):.3g}"
    )


def check_training_is_deterministic(subject: Subject) -> None:
    """Two runs of one seed end with the same bits, so nothing draws from a global generator."""
    ends: list[dict[str, Tensor]] = []
    for global_seed in (1, 2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(global_seed)
            sae = subject.new()
            train(sae, steps=5)
            ends.append(sae.state_dict())
    for name, tensor in ends[0].items():
        assert torch.equal(tensor, ends[1][name]), f"{name!r} differs after two equal runs"


def check_mean_over_rows(subject: Subject) -> None:
    """With `loss_is_mean_over_rows`, a step in blocks of rows is the step at once: loss, terms, metrics and gradients.

    The trainer takes large batches in blocks where this is said. It is wrong for whatever compares rows of a batch: a selection
    over the batch, a penalty that is scaled by a mean, a running statistic.
    """
    sae: SAE = subject.new()
    train(sae, steps=3)
    if not sae.loss_is_mean_over_rows:
        raise NotApplicable("loss_is_mean_over_rows is False")
    context = StepContext(progress=0.5, dead=torch.arange(sae.d_sae // 4))
    batch = pairs_for(sae, 48)
    whole, gradients = _step(sae, batch, context)
    sums: dict[str, Tensor] = {}
    summed: dict[str, Tensor] = {}
    for rows in (slice(0, 32), slice(32, 48)):
        part = (
            ActivationBatch(batch.inputs[rows], None if batch.targets is None else batch.targets[rows])
            if isinstance(batch, ActivationBatch)
            else batch[rows]
        )
        share = (rows.stop - rows.start) / 48
        found, its = _step(sae, part, context)
        sums = {name: sums.get(name, torch.zeros(())) + share * value for name, value in found.items()}
        summed = {name: summed.get(name, torch.zeros(())) + share * gradient for name, gradient in its.items()}
    for name, value in whole.items():
        same(sums[name], value, f"{name} of a batch and of its blocks", 1e-4)
    for name, gradient in gradients.items():
        same(summed[name], gradient, f"the gradient of {name!r} of a batch and of its blocks", 1e-4)


def _step(
    sae: SAE, batch: Tensor | ActivationBatch, context: StepContext
) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
    """Loss, terms and metrics, and gradients, by name."""
    sae.zero_grad()
    out = sae.training_step(batch, context)
    out.loss.backward()
    numbers = {"the loss": out.loss, **{f"the term {n!r}": v for n, v in out.losses.items()}}
    numbers |= {f"the metric {n!r}": v for n, v in out.metrics.items()}
    gradients = {n: p.grad.clone() for n, p in sae.named_parameters() if p.grad is not None}
    return {name: value.detach() for name, value in numbers.items()}, gradients


def check_training_precisions(subject: Subject) -> None:
    """Training works in double and in half precision, and with a screened product where that is claimed.

    Tensors made inside the objective must take dtype and device of those around them. With `has_encoder_product`, the large
    product is left to the ops, which propose in bfloat16 and decide in float32.
    """
    for dtype in (torch.float64, torch.bfloat16):
        sae: SAE = subject.new().to(dtype).train()
        dead = torch.arange(sae.d_sae // 2)
        for progress in (0.0, 0.5):
            sae.zero_grad()
            out = sae.training_step(pairs_for(sae, 64), StepContext(progress=progress, dead=dead))
            is_finite(out.loss, f"the loss of a {dtype} SAE")
            out.loss.backward()
            assert out.reconstruction.dtype == dtype, (
                f"the reconstruction of a {dtype} SAE has {out.reconstruction.dtype}"
            )
            for name, parameter in sae.named_parameters():
                if parameter.grad is not None:
                    is_finite(parameter.grad, f"the gradient of {name!r} of a {dtype} SAE")
            with torch.no_grad():
                sae.after_step()
    sae = subject.new()
    if sae.has_encoder_product:
        with suppress(ConfigError):
            sae = subject.new(d_sae=512)  # narrower ones may do without
        sae.train()
        batch = pairs_for(sae, 64)
        with encoder_products("full"):
            exact = sae.training_step(batch, StepContext(density=0.001)).reconstruction
        with encoder_products("screened"), tallied() as tally:
            screened = sae.training_step(batch, StepContext(density=0.001)).reconstruction
        assert tally.rows, "has_encoder_product is said, but no product of the training step goes through the ops"
        same(screened, exact, "the reconstruction with a screened product and a full one", 1e-3)


def check_after_step(subject: Subject) -> None:
    """`after_step` restores constraints in place: doing it twice does nothing more, and a latent of zeros stays finite.

    The optimiser holds the parameters themselves; one that is replaced is trained no more. A division by a norm needs a floor.
    """
    sae: SAE = subject.new()
    train(sae, steps=3)
    held = dict(sae.named_parameters())
    with torch.no_grad():
        for name, tensor in sae.tensors().items():
            latent = sae.axis(name).latent
            if latent is not None and tensor.is_floating_point():
                tensor.select(latent, 0).zero_()
        sae.after_step()
        once = {name: tensor.clone() for name, tensor in sae.tensors().items()}
        sae.after_step()
    for name, parameter in sae.named_parameters():
        assert parameter is held[name], f"after_step replaces {name!r}; change it in place"
    for name, tensor in sae.tensors().items():
        is_finite(once[name], f"{name!r} after after_step with a latent of zeros")
        same(tensor, once[name], f"{name!r} after a second after_step and after the first")


def check_restart(subject: Subject) -> None:
    """With `restarts_latents`, latents that are restarted write towards the rows that they are given, and nothing else moves.

    An own tensor with one entry a latent has to start anew for these latents, too; say in `AXES` which dimension counts them.
    """
    sae: SAE = subject.new()
    train(sae, steps=3)
    if not sae.restarts_latents:
        raise NotApplicable("restarts_latents is False")
    latents = torch.tensor([1, sae.d_sae - 2])
    batch = pairs_for(sae, 2, seed=3)
    inputs, targets = (batch.inputs, batch.targets) if isinstance(batch, ActivationBatch) else (batch, None)
    before = {name: tensor.clone() for name, tensor in sae.tensors().items()}
    with torch.no_grad():
        prepared = sae.prepare(inputs)
        target = sae.target_rows(prepared, targets)
        sae.restart_latents(latents, prepared, target)
        written = target - sae.offset()
    others = torch.ones(sae.d_sae, dtype=torch.bool).index_fill_(0, latents, value=False).nonzero().squeeze(-1)
    for name, tensor in sae.tensors().items():
        is_finite(tensor, f"{name!r} after restart_latents")
        latent = sae.axis(name).latent
        kept, were = (t if latent is None else t.index_select(latent, others) for t in (tensor, before[name]))
        assert torch.equal(kept, were), f"restart_latents changes {name!r} of latents that are not restarted"
    cosines = torch.nn.functional.cosine_similarity(sae.directions()[latents], written, dim=-1)
    assert bool((cosines > 0.99).all()), (
        f"restarted latents do not write towards their rows: cosines {cosines.tolist()}"
    )


class _Kept:
    """A logger that keeps records."""

    def __init__(self) -> None:
        self.records: list[Mapping[str, float | int | str | None]] = []

    def start(self, run: RunFacts) -> None:
        """Nothing is opened."""

    def log(self, record: Mapping[str, float | int | str | None]) -> None:
        self.records.append(dict(record))

    def close(self) -> None:
        """There is nothing to close."""


_STEPS, _BATCH = 9, 32
_POSITIONS = 8  # of a sequence


def _config() -> TrainConfig:
    return TrainConfig(
        total_samples=_STEPS * _BATCH, batch_size=_BATCH, lr=3e-3, log_every_steps=3, dead_after_samples=2 * _BATCH,
        dead_refresh_steps=2, init_samples=2 * _BATCH, progress_bar=False,
    )  # fmt: skip


def _batches(sae: SAE) -> list[Tensor | ActivationBatch]:
    batches = [pairs_for(sae, _BATCH, seed=seed) for seed in range(_STEPS)]
    if not sae.reads_sequences:
        return batches
    return [batch.unflatten(0, (-1, _POSITIONS)) if isinstance(batch, Tensor) else batch for batch in batches]


def check_trainer(subject: Subject) -> None:
    """The Trainer runs it, dead latents and all; its records have the same names from the first to the last.

    Terms of the loss and metrics are scalars on the SAE's device, and every step names the same ones or the first step names
    them all. `export` must work before training, too.
    """
    sae: SAE = subject.new()
    kept = _Kept()
    result = Trainer(sae, _batches(sae), _config(), loggers=[kept]).fit()
    assert result.samples == _STEPS * _BATCH, f"{result.samples} of {_STEPS * _BATCH} samples were trained on"
    keys = {tuple(record) for record in kept.records}
    assert len(keys) == 1, (
        f"records have different names: {sorted(set().union(*keys) - set.intersection(*map(set, keys)))}"
    )
    for record in kept.records:
        assert record["explained_variance"] is not None, f"no explained variance at step {record['step']}"
    for name, tensor in sae.tensors().items():
        is_finite(tensor, f"{name!r} after {_STEPS} steps of the Trainer")


def check_resume(subject: Subject) -> None:
    """A run that was interrupted and goes on from a checkpoint ends with the bits of one that was not.

    All that decides the next step must be in parameters, persistent buffers, the config or the context.
    """
    sae: SAE = subject.new()
    batches = _batches(sae)
    Trainer(sae, batches, _config()).fit()

    def stop(progress: Progress) -> None:
        if progress.trainer.steps == _STEPS // 2 - 1:
            progress.trainer.stop()

    begun = Trainer(subject.new(), batches, _config(), callbacks=[stop])
    begun.fit()
    resumed = Trainer.resume(begun.save(subject.folder / "checkpoint"), batches)
    resumed.fit()
    for name, tensor in sae.tensors().items():
        assert torch.equal(tensor, resumed.sae.tensors()[name]), f"{name!r} of a run that was resumed differs"


CHECKS: tuple[Check, ...] = (
    check_objective,
    check_objective_is_the_forward_pass,
    check_gradients,
    check_learns,
    check_training_is_deterministic,
    check_mean_over_rows,
    check_training_precisions,
    check_after_step,
    check_restart,
    check_trainer,
    check_resume,
)
