"""The optimiser step: gradient clipping and Adam in one pass over parameters, gradients and moments.

Clipping does not rewrite the gradients beforehand: fused Adam divides them by `grad_scale` as it reads them.

    clipped = g * min(1, max_norm / (|g| + 1e-6))   =   g / max(1, (|g| + 1e-6) / max_norm)

`Adam` is torch's, less the import of torch's compiler: an optimiser's first method brings it in, only to tell it to keep out,
and that takes two seconds of every process.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, final

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from sae_core.dictionary import Dictionary

__all__ = ["Adam", "clipped_step"]

_Optimizer: Any = torch.optim.Optimizer


@final
class Adam(torch.optim.Adam):
    """torch's fused Adam, outside of `torch.compile`."""

    add_param_group = inspect.unwrap(_Optimizer.add_param_group)
    state_dict = inspect.unwrap(_Optimizer.state_dict)
    load_state_dict = inspect.unwrap(_Optimizer.load_state_dict)
    zero_grad = inspect.unwrap(_Optimizer.zero_grad)
    step = torch.no_grad()(inspect.unwrap(torch.optim.Adam.step))


@torch.no_grad()
def clipped_step(optimizer: torch.optim.Optimizer, max_norm: float | None, sae: Dictionary | None = None) -> None:
    """One step of a fused `optimizer`, with the gradients of its parameters clipped to a norm of `max_norm`.

    Gradients are divided where they lie, so afterwards they are the clipped ones. Where the latents of `sae`, whose parameters
    these are, are shared out over ranks, the norm is that of the gradients of all of them.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if max_norm is None or not any(parameter.grad is not None for parameter in parameters):
        optimizer.step()
        return
    divided: set[int] = set()
    if sae is not None and sae.ranks is not None:
        divided = {
            id(parameter) for name, parameter in sae.named_parameters() if sae.latent_dimension(name) is not None
        }
    norm = _norm([parameter.grad for parameter in parameters if id(parameter) not in divided])
    if sae is not None and sae.ranks is not None:
        squares = _norm([parameter.grad for parameter in parameters if id(parameter) in divided]).square().reshape(1)
        sae.ranks.add([squares])
        norm = (norm.square() + squares[0]).sqrt()
    optimizer.grad_scale = ((norm + 1e-6) / max_norm).clamp(min=1.0)  # pyright: ignore[reportAttributeAccessIssue] - read by the fused kernel
    try:
        optimizer.step()
    finally:
        del optimizer.grad_scale  # pyright: ignore[reportAttributeAccessIssue]


def _norm(gradients: list[Tensor | None]) -> Tensor:
    """The Euclidean norm of all of them together."""
    found = [gradient for gradient in gradients if gradient is not None]
    precision = [torch.promote_types(gradient.dtype, torch.float32) for gradient in found]
    norms = [torch.linalg.vector_norm(g, dtype=dtype).float() for g, dtype in zip(found, precision, strict=True)]
    return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())
