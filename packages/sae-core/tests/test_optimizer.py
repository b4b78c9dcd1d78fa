"""One pass of clipping and Adam equals the two plain ones."""

from __future__ import annotations

import pytest
import torch
from sae_core.training.optimizer import clipped_step


def parameters(dtype: torch.dtype) -> list[torch.nn.Parameter]:
    g = torch.Generator().manual_seed(1)
    made = (torch.randn(5, 30, generator=g), torch.randn(30, 5, generator=g), torch.randn(30, generator=g))
    return [torch.nn.Parameter(tensor.to(dtype)) for tensor in made]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("max_norm", [None, 1.0, 1e6])
def test_clipped_steps_equal_clipping_then_adam(dtype: torch.dtype, max_norm: float | None) -> None:
    plain, ours = parameters(dtype), parameters(dtype)
    adam = torch.optim.Adam(plain, lr=1e-2)
    fused = torch.optim.Adam(ours, lr=1e-2, fused=True)
    g = torch.Generator().manual_seed(2)
    for step in range(10):
        for a, b in zip(plain, ours, strict=True):
            a.grad = torch.randn(a.shape, generator=g, dtype=dtype) * (0.01 if step < 4 else 1.0)
            b.grad = torch.empty_like(b).copy_(a.grad)
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(plain, max_norm)
        adam.step()
        clipped_step(fused, max_norm)
        for a, b in zip(plain, ours, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-6)
