"""Tensors as files hold them, and as computation needs them.

Files may hold what no product accepts: eight-bit floats, sparse or quantised layouts, views that negate or repeat. What can be
had exactly is made plain; the rest is refused with the tensor's name before anything else looks at it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from sae_core.errors import FormatError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["common_dtype", "plain_tensor"]


def plain_tensor(tensor: Tensor, name: str, where: str) -> Tensor:
    """A dense tensor with the same values, without history. Raises FormatError for what is none.

    Floats of eight bits become float32, as they do wherever they are read without a scale of their own.

    >>> import torch
    >>> plain_tensor(torch.ones(2).to(torch.float8_e4m3fn), "W_enc", "sae.pt").dtype
    torch.float32
    >>> plain_tensor(torch.eye(2).to_sparse(), "W_enc", "sae.pt")
    Traceback (most recent call last):
    sae_core.errors.FormatError: sae.pt: tensor 'W_enc' is stored as sparse_coo; save it as an ordinary tensor (to_dense())
    """
    import torch

    tensor = tensor.detach()
    if tensor.is_quantized:
        raise FormatError(f"{where}: tensor {name!r} is quantised; save it as an ordinary tensor (dequantize())")
    if tensor.layout != torch.strided:
        layout = str(tensor.layout).removeprefix("torch.")
        raise FormatError(f"{where}: tensor {name!r} is stored as {layout}; save it as an ordinary tensor (to_dense())")
    if tensor.is_meta:
        raise FormatError(f"{where}: tensor {name!r} has a shape and no values")
    if any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
        raise FormatError(f"{where}: tensor {name!r} is a view that repeats its values; save it as contiguous()")
    tensor = tensor.resolve_conj().resolve_neg()
    if tensor.is_floating_point() and tensor.element_size() == 1:
        tensor = tensor.float()
    return tensor


def common_dtype(dtypes: Iterable[torch.dtype]) -> torch.dtype | None:
    """The narrowest precision that holds all of `dtypes`; None when they are one already, or none.

    >>> import torch
    >>> common_dtype([torch.float16, torch.bfloat16]), common_dtype([torch.float32, torch.float32])
    (torch.float32, None)
    """
    import torch

    found = list(dict.fromkeys(dtypes))
    if len(found) < 2:
        return None
    wide = found[0]
    for dtype in found[1:]:
        wide = torch.promote_types(wide, dtype)
    return wide
