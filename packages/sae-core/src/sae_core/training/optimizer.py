"""The optimiser step: gradient clipping and Adam in one pass over parameters, gradients and moments.

Clipping does not rewrite the gradients beforehand: fused Adam divides them by `grad_scale` as it reads them.

    clipped = g * min(1, max_norm / (|g| + 1e-6))   =   g / max(1, (|g| + 1e-6) / max_norm)
"""

from __future__ import annotations

import torch

__all__ = ["clipped_step"]


@torch.no_grad()
def clipped_step(optimizer: torch.optim.Optimizer, max_norm: float | None) -> None:
    """One step of a fused `optimizer`, with the gradients of its parameters clipped to a norm of `max_norm`.

    Gradients are divided where they lie, so afterwards they are the clipped ones.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if max_norm is None or not gradients:
        optimizer.step()
        return
    precision = [torch.promote_types(gradient.dtype, torch.float32) for gradient in gradients]
    norms = [torch.linalg.vector_norm(g, dtype=dtype).float() for g, dtype in zip(gradients, precision, strict=True)]
    norm = torch.linalg.vector_norm(torch.stack(norms))
    optimizer.grad_scale = ((norm + 1e-6) / max_norm).clamp(min=1.0)  # pyright: ignore[reportAttributeAccessIssue] - read by the fused kernel
    try:
        optimizer.step()
    finally:
        del optimizer.grad_scale  # pyright: ignore[reportAttributeAccessIssue]
