"""Straight-through estimators for thresholds: gradients for functions that have none (2407.14435, eq. 11 and 12).

A jump at the threshold has no useful derivative, so one is borrowed from a window of width `bandwidth` around it: with
K(u) = 1[|u| < 1/2] and g the incoming gradient,

    count = 1[h > theta]        d / d theta = - K((h - theta) / bandwidth) / bandwidth * g
    jump  = h 1[h > theta]      d / d theta = - theta K((h - theta) / bandwidth) / bandwidth * g

Both depend on h and theta only through h - theta (the jump: near the threshold), so `to_input` adds the negated gradient
to that of h as well. By default h gets the plain derivative, 0 and 1[h > theta].
"""

# V the shape of a code's values: (entries,) or (rows, d_sae); thresholds are of that shape or broadcast over rows

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

__all__ = ["active_count", "jump"]


def jump(h_V: Tensor, threshold_V: Tensor, bandwidth: float, *, to_input: bool = False) -> Tensor:
    """``h`` where it is above its threshold, else zero.

    >>> jump(torch.tensor([0.4, 0.6]), torch.tensor(0.5), 0.1).tolist()
    [0.0, 0.6000000238418579]
    """
    return cast("Tensor", _Jump.apply(h_V, threshold_V, bandwidth, to_input))


def active_count(h_V: Tensor, threshold_V: Tensor, bandwidth: float, *, to_input: bool = False) -> Tensor:
    """One where ``h`` is above its threshold, else zero; in the threshold's precision, since counts are summed.

    >>> active_count(torch.tensor([0.4, 0.6]), torch.tensor(0.5), 0.1).tolist()
    [0.0, 1.0]
    """
    return cast("Tensor", _Step.apply(h_V, threshold_V, bandwidth, to_input))


def _near(grad_V: Tensor, h_V: Tensor, threshold_V: Tensor, bandwidth: float) -> Tensor:
    """The incoming gradient where ``h`` is within the window, else zero."""
    distance_V = (h_V - threshold_V).abs_()
    near_V = distance_V < bandwidth / 2
    if distance_V.dtype != grad_V.dtype or distance_V.shape != grad_V.shape:
        return torch.where(near_V, grad_V, 0.0)
    return torch.where(near_V, grad_V, grad_V.new_zeros(()), out=distance_V)  # matrices this large are not made twice


def _to_threshold(near_V: Tensor, factor_V: Tensor | float, threshold_V: Tensor) -> Tensor:
    """The threshold's gradient: summed over rows first where it was broadcast over them, then scaled."""
    return -(near_V.sum_to_size(threshold_V.shape) * factor_V).to(threshold_V.dtype)


class _Jump(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h_V: Tensor, threshold_V: Tensor, bandwidth: float, to_input: bool) -> Tensor:
        ctx.save_for_backward(h_V, threshold_V)
        ctx.bandwidth, ctx.to_input = bandwidth, to_input
        return torch.where(h_V > threshold_V, h_V, 0.0)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        grad_V = cast("Tensor", grads[0])
        h_V, threshold_V = ctx.saved_tensors
        factor_V = threshold_V / ctx.bandwidth
        near_V = _near(grad_V, h_V, threshold_V, ctx.bandwidth)
        grad_threshold = _to_threshold(near_V, factor_V, threshold_V)
        extra_V = factor_V * near_V if ctx.to_input else None
        del near_V
        grad_h = torch.where(h_V > threshold_V, grad_V, 0.0)
        if extra_V is not None:
            grad_h = grad_h + extra_V
        return grad_h.to(h_V.dtype), grad_threshold, None, None


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h_V: Tensor, threshold_V: Tensor, bandwidth: float, to_input: bool) -> Tensor:
        ctx.save_for_backward(h_V, threshold_V)
        ctx.bandwidth, ctx.to_input = bandwidth, to_input
        return (h_V > threshold_V).to(threshold_V.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        grad_V = cast("Tensor", grads[0])
        h_V, threshold_V = ctx.saved_tensors
        near_V = _near(grad_V, h_V, threshold_V, ctx.bandwidth)
        grad_h = (near_V / ctx.bandwidth).to(h_V.dtype) if ctx.to_input else None
        return grad_h, _to_threshold(near_V, 1 / ctx.bandwidth, threshold_V), None, None
