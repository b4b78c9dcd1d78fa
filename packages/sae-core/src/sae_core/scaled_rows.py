"""`ScaledRows`: a matrix times or over one number per row, worked out when it is looked at and not before.

A dictionary whose decoder norms are folded into its weights is saved without ever being held twice: the matrices of its
inference form are made a few rows at a time, on their way to the file, while the disk works on the rows before.

    with scaling_put_off():
        made = sae.export()       # shapes and dtypes are known, the work is still to be done

For everything but writing it is a tensor as any other, whose values come to be as soon as an operation asks for them.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, cast, final

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

__all__ = ["ScaledRows", "scaling_is_put_off", "scaling_put_off"]

_put_off: ContextVar[bool] = ContextVar("rows are scaled when they are looked at", default=False)


@contextmanager
def scaling_put_off() -> Generator[None]:
    """Inside, folded matrices of float32 on the CPU are `ScaledRows`."""
    token = _put_off.set(True)
    try:
        yield
    finally:
        _put_off.reset(token)


def scaling_is_put_off() -> bool:
    """Whether this is inside `scaling_put_off`."""
    return _put_off.get()


@final
class ScaledRows(Tensor):
    """``operation(rows, numbers)`` of a matrix (F, W) and one number (F,) per row; with `turned` its transpose (W, F).

    >>> scaled = ScaledRows.of(torch.ones(2, 3), torch.tensor([2.0, 4.0]), torch.div)
    >>> scaled.shape, scaled.t().shape, (scaled.t() + 1).tolist()
    (torch.Size([2, 3]), torch.Size([3, 2]), [[1.5, 1.25], [1.5, 1.25], [1.5, 1.25]])
    """

    rows: Tensor
    numbers: Tensor
    operation: Callable[..., Tensor]
    turned: bool

    @classmethod
    def of(cls, rows: Tensor, numbers: Tensor, operation: Callable[..., Tensor], *, turned: bool = False) -> ScaledRows:
        """What `operation` makes of the rows and their numbers, or its transpose."""
        shape = rows.shape[::-1] if turned else rows.shape
        made = cast("Any", Tensor)._make_subclass(cls, torch.empty(shape, dtype=rows.dtype, device="meta"))
        made.rows, made.numbers, made.operation, made.turned = rows, numbers, operation, turned
        return made

    def made(self) -> Tensor:
        """The matrix itself."""
        made = self.operation(self.rows, self.numbers[:, None])
        return made.t() if self.turned else made

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        first = args[0] if args else None
        if isinstance(first, ScaledRows):
            if func in _KNOWN_BEFORE:
                with cast("Any", torch)._C.DisableTorchFunctionSubclass():
                    return func(*args, **(kwargs or {}))
            if func == Tensor.device.__get__:
                return first.rows.device
            if func is Tensor.detach:
                return first
            if func is Tensor.t:
                return ScaledRows.of(first.rows, first.numbers, first.operation, turned=not first.turned)
        args, named = tree_map_only(ScaledRows, ScaledRows.made, (args, kwargs or {}))
        return func(*args, **named)


_KNOWN_BEFORE = frozenset(
    {
        *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "ndim", "layout", "requires_grad")),
        *(getattr(Tensor, name) for name in ("size", "dim", "numel", "element_size", "__len__")),
    }
)  # fmt: skip
"""What is asked of a tensor without looking at its values."""
