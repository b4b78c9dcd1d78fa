"""Forward and backward passes of one training step, in blocks of rows where a dictionary is still held densely.

A dense step keeps several (batch, d_sae) matrices alive between forward and backward pass. Where the loss is a mean over
rows, it need not: each block of rows goes forward and backward at once, its gradients are added to those of the blocks
before, and its matrices are free for the next. Nothing is computed twice, and memory follows the block, not the batch.

What is left of a step is the same either way: the gradients, the losses, and a summary of the latents, how many were active
in every row and how often each was.
"""

# R rows, F d_sae

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from sae_core.dictionary import Dictionary, StepContext, StepOutput
from sae_core.latent_ranks import latents_over
from sae_core.ops.dispatch import prefer_sparse
from sae_core.ops.gradient_sums import summed
from sae_core.protocols import ActivationBatch

__all__ = ["StepResult", "forward_and_backward"]

_BLOCK_ENTRIES = 8 * 2**20  # smaller blocks add full-size gradients more often, larger ones take more memory


@final
@dataclass(frozen=True, slots=True, eq=False)
class StepResult:
    """What is left of a training step, without a graph; all of it is on the device.

    `loss`, `losses` and `metrics` are those of the objective's `StepOutput`, as are `reconstruction` and `target`,
    (rows, d_out). `l0` (rows,) counts each row's active latents, `firing_counts` (d_sae,) the rows of each latent.
    """

    loss: Tensor
    losses: Mapping[str, Tensor]
    metrics: Mapping[str, Tensor]
    l0: Tensor
    firing_counts: Tensor
    reconstruction: Tensor
    target: Tensor

    @classmethod
    def of(cls, output: StepOutput, share: float = 1.0) -> StepResult:
        """What is left of a block of rows; means over rows are weighted with its share of the rows."""

        def weighted(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: value.detach() * share for name, value in named.items()}

        l0, firing_counts = output.codes.counts()
        return cls(
            output.loss.detach() * share,
            weighted(output.losses),
            weighted(output.metrics),
            l0.flatten(),
            firing_counts,
            output.reconstruction.detach(),
            output.target.detach(),
        )


def forward_and_backward(
    sae: Dictionary, batch: ActivationBatch, context: StepContext, weight: float = 1.0
) -> StepResult:
    """One step's passes; gradients, those of the loss times `weight`, are added to the parameters' ``.grad``."""
    with latents_over(sae.ranks):
        return _forward_and_backward(sae, batch, context, weight)


def _forward_and_backward(sae: Dictionary, batch: ActivationBatch, context: StepContext, weight: float) -> StepResult:
    rows = batch.inputs.numel() // sae.d_in
    blocks = -(-rows * sae.d_sae // _BLOCK_ENTRIES)
    dense = not prefer_sparse(d_sae=sae.d_sae, density=context.density, device=sae.device)
    if blocks <= 1 or not dense or not sae.loss_is_mean_over_rows:
        output = sae.training_step(batch, context)
        (output.loss if weight == 1.0 else output.loss * weight).backward()
        return StepResult.of(output)
    parameters = [parameter for parameter in sae.parameters() if parameter.requires_grad]
    gradients: list[Tensor | None] = [None] * len(parameters)
    results: list[StepResult] = []
    with summed(parameters) as sums:
        for block in _split(batch, blocks):
            output = sae.training_step(block, context)
            share = output.target.shape[0] / rows
            found = torch.autograd.grad(output.loss * (share * weight), parameters, allow_unused=True)
            gradients = [_added(g, more) for g, more in zip(gradients, found, strict=True)]
            results.append(StepResult.of(output, share))
            del output, found
            if context.density is None and sae.device.type == "cpu":  # the other blocks need not look
                context = dataclasses.replace(context, density=float(results[0].l0.double().mean()) / sae.config.d_sae)
    for parameter, gradient, dense_sum in zip(parameters, gradients, sums, strict=True):
        parameter.grad = _added(parameter.grad, _added(gradient, dense_sum.total))
    return _joined(results)


def _joined(results: Sequence[StepResult]) -> StepResult:
    """Of all rows, from blocks of them in order."""
    first = results[0]
    return StepResult(
        _total([result.loss for result in results]),
        {name: _total([result.losses[name] for result in results]) for name in first.losses},
        {name: _total([result.metrics[name] for result in results]) for name in first.metrics},
        torch.cat([result.l0 for result in results]),
        _total([result.firing_counts for result in results]),
        torch.cat([result.reconstruction for result in results]),
        torch.cat([result.target for result in results]),
    )


def _split(batch: ActivationBatch, blocks: int) -> list[ActivationBatch]:
    size = -(-batch.inputs.shape[0] // blocks)
    inputs = batch.inputs.split(size)
    targets = [None] * len(inputs) if batch.targets is None else batch.targets.split(size)
    return [ActivationBatch(x, y) for x, y in zip(inputs, targets, strict=True)]


def _added(total: Tensor | None, gradient: Tensor | None) -> Tensor | None:
    """The sum of both, in the memory of the first; small gradients are copied, as they may be one tensor under two names."""
    if total is not None and gradient is not None:
        return total.add_(gradient)
    if total is None and gradient is not None and gradient.dim() < 2:
        return gradient.clone()
    return gradient if total is None else total


def _total(parts: list[Tensor]) -> Tensor:
    return torch.stack(parts).sum(0)
