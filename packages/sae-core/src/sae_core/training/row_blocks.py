"""A training step in blocks of rows, for dictionaries that are still held densely.

A dense step keeps several (batch, d_sae) matrices alive between forward and backward pass. Where the loss is a mean over
rows, it need not: each block of rows goes forward and backward at once, its gradients are added to those of the blocks
before, and its matrices are free for the next. Nothing is computed twice, and memory follows the block, not the batch.

What remains of the latents is a summary: how many were active in every row, and how often each was.
"""

# R rows

from __future__ import annotations

import dataclasses
from typing import Any, cast

import torch
from torch import Tensor

from sae_core.codes import FiringSummary
from sae_core.ops.dispatch import prefer_sparse
from sae_core.ops.gradient_sums import summed
from sae_core.protocols import ActivationBatch
from sae_core.sae import SAE, StepContext, StepOutput

__all__ = ["training_step"]

_BLOCK_ENTRIES = 8 * 2**20  # smaller blocks add full-size gradients more often, larger ones take more memory


def training_step(sae: SAE, batch: ActivationBatch, context: StepContext) -> StepOutput:
    """What ``sae.training_step`` gives, in blocks of rows where the loss allows it and latents are held densely.

    In blocks, the gradients exist before ``loss.backward()``, which hands them out once.
    """
    rows = batch.inputs.numel() // sae.d_in
    blocks = -(-rows * sae.d_sae // _BLOCK_ENTRIES)
    dense = not prefer_sparse(d_sae=sae.d_sae, density=context.density, device=sae.device)
    if blocks <= 1 or not dense or not sae.loss_is_mean_over_rows:
        return sae.training_step(batch, context)
    parameters = [parameter for parameter in sae.parameters() if parameter.requires_grad]
    gradients: list[Tensor | None] = [None] * len(parameters)
    outputs: list[StepOutput] = []
    with summed(parameters) as sums:
        for block in _split(batch, blocks):
            output = sae.training_step(block, context)
            share = output.target.shape[0] / rows
            found = torch.autograd.grad(output.loss * share, parameters, allow_unused=True)
            gradients = [_added(g, more) for g, more in zip(gradients, found, strict=True)]
            outputs.append(_summary(output, share))
            del output, found
            if context.density is None and sae.device.type == "cpu":  # the other blocks need not look
                context = dataclasses.replace(context, density=float(outputs[0].codes.l0().double().mean()) / sae.d_sae)
    gradients = [_added(g, dense.total) for g, dense in zip(gradients, sums, strict=True)]
    loss = cast("Tensor", _WithGradients.apply(_total([output.loss for output in outputs]), gradients, *parameters))
    return StepOutput(
        loss,
        {name: _total([output.losses[name] for output in outputs]) for name in outputs[0].losses},
        FiringSummary.joined([cast("FiringSummary", output.codes) for output in outputs]),
        torch.cat([output.reconstruction for output in outputs]),
        torch.cat([output.target for output in outputs]),
        {name: _total([output.metrics[name] for output in outputs]) for name in outputs[0].metrics},
    )


def _split(batch: ActivationBatch, blocks: int) -> list[ActivationBatch]:
    size = -(-batch.inputs.shape[0] // blocks)
    inputs = batch.inputs.split(size)
    targets = [None] * len(inputs) if batch.targets is None else batch.targets.split(size)
    return [ActivationBatch(x, y) for x, y in zip(inputs, targets, strict=True)]


def _summary(output: StepOutput, share: float) -> StepOutput:
    """A block's output without its graph and its latents; means over rows are weighted with its share of the rows."""
    return StepOutput(
        output.loss.detach() * share,
        {name: value.detach() * share for name, value in output.losses.items()},
        FiringSummary(output.codes.l0().flatten(), output.codes.firing_counts()),
        output.reconstruction.detach(),
        output.target.detach(),
        {name: value.detach() * share for name, value in output.metrics.items()},
    )


def _added(total: Tensor | None, gradient: Tensor | None) -> Tensor | None:
    """The sum of both, in the memory of the first; small gradients are copied, as they may be one tensor under two names."""
    if total is not None and gradient is not None:
        return total.add_(gradient)
    if total is None and gradient is not None and gradient.dim() < 2:
        return gradient.clone()
    return gradient if total is None else total


def _total(parts: list[Tensor]) -> Tensor:
    return torch.stack(parts).sum(0)


class _WithGradients(torch.autograd.Function):
    """A number, and its gradients by the parameters, which are known already."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor | None], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        gradients = cast("list[Tensor | None]", ctx.gradients)
        if ctx.gradients is None:
            raise RuntimeError("a step in blocks of rows goes backward once; its gradients have been handed out")
        ctx.gradients = None
        return None, None, *(None if g is None else g.mul_(grads[0]) for g in gradients)
