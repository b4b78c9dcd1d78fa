"""The tensors of one file, each taken with the shape it must have; and what loaders make of them.

Shapes are written by name, ``bag.take("encoder.weight", "d_sae d_in")``: names that are known are checked, the others are
learnt, and a request for some latents only (`rows`) is applied to whichever axis is called ``d_sae``. When only the config is
asked for, `take` gives tensors on the meta device and a loader runs unchanged.
"""

# D d_in, F d_sae, L layers

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

from sae_core.errors import ConfigError, FormatError
from sae_core.format.tensors import plain_tensor
from sae_core.protocols import LoadedSAE

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["TensorBag", "TensorInfo", "added_up", "assemble", "never_above", "row_norms", "times"]


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Shape and dtype of a tensor in a file."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@final
class TensorBag:
    """The tensors of one file; each must be taken or dropped before `finish`.

    `index` lists them, or is None when the file has not been looked into (config only); `fetch` reads one. `sizes` are the
    widths known so far, by name; `rows` the latents to load, or None for all. With `weights` False, tensors are on the meta
    device, and `peek`, where there is one, reads single numbers all the same.

    >>> import torch
    >>> bag = TensorBag("ae.pt", {"w": TensorInfo((16, 8), torch.float32)}, lambda name: torch.zeros(16, 8), rows=[3, 4])
    >>> bag.take("w", "d_sae d_in").shape, bag.sizes
    (torch.Size([2, 8]), {'d_sae': 16, 'd_in': 8})
    >>> bag.take("b", "d_sae")
    Traceback (most recent call last):
    sae_core.errors.FormatError: ae.pt: no tensor 'b' (found: w)
    """

    def __init__(
        self,
        where: str,
        index: Mapping[str, TensorInfo] | None,
        fetch: Callable[[str], Tensor] | None = None,
        *,
        sizes: Mapping[str, int] | None = None,
        rows: Sequence[int] | None = None,
        weights: bool = True,
        peek: Callable[[str], float] | None = None,
    ) -> None:
        self.where = where
        self._index = index
        self._fetch = fetch
        self._peek = peek
        self.sizes = dict(sizes or {})
        self.rows = rows
        self.weights = weights
        self._done: set[str] = set()

    @property
    def names(self) -> list[str]:
        """All tensor names, sorted; empty when the file has not been looked into."""
        return sorted(self._index or {})

    def has(self, name: str) -> bool:
        """Whether there is such a tensor; False when the file has not been looked into."""
        return self._index is not None and name in self._index

    def ndim(self, name: str) -> int:
        """Number of dimensions of a tensor that must be there."""
        return len(self._info(name).shape)

    def take(self, name: str, dims: str) -> Tensor:
        """A tensor with the named shape, e.g. ``"d_sae d_in"``; ``""`` is a scalar, digits stand for themselves."""
        import torch

        names = dims.split()
        if self._index is None:
            if unknown := [dim for dim in names if not dim.isdigit() and dim not in self.sizes]:
                raise FormatError(
                    f"{self.where}: the width {unknown[0]} is known only from the weights; load with weights"
                )
            return self._cut(torch.empty([self._size(dim) for dim in names], device="meta"), names)
        info = self._info(name)
        self._check(name, info.shape, names)
        self._done.add(name)
        if not self.weights or self._fetch is None:
            return self._cut(torch.empty(info.shape, dtype=info.dtype, device="meta"), names)
        tensor = plain_tensor(self._fetch(name), name, self.where)
        if not tensor.is_floating_point() and names:
            raise FormatError(f"{self.where}: tensor {name!r} has dtype {tensor.dtype}, expected floating point")
        if tensor.dim() <= 1 and (bad := int((~tensor.isfinite()).sum())):
            # vectors are what loaders compute with, and an exponential makes an infinity an unsuspicious zero
            raise FormatError(f"{self.where}: tensor {name!r} holds {bad} values that are NaN or infinite")
        return self._cut(tensor, names)

    def number(self, name: str) -> float | None:
        """The value of a tensor of one element; None when only the config is asked for and looking would mean fetching."""
        import torch

        if self._index is None:
            return None
        info = self._info(name)
        if math.prod(info.shape) != 1:
            raise FormatError(f"{self.where}: tensor {name!r} has shape {info.shape}, expected a single number")
        self._done.add(name)
        if self.weights and self._fetch is not None:
            tensor = plain_tensor(self._fetch(name), name, self.where)
            if tensor.is_complex() or tensor.dtype == torch.bool:
                raise FormatError(f"{self.where}: tensor {name!r} has dtype {tensor.dtype}, expected a real number")
            value = float(tensor.item())
        elif self._peek is not None:
            value = self._peek(name)
        else:
            return None
        if not math.isfinite(value):
            raise FormatError(f"{self.where}: tensor {name!r} is {value}")
        return value

    def drop(self, reason: str, *names: str) -> None:
        """Name tensors that do not change what the SAE computes; `reason` is for the reader of the loader."""
        assert reason
        self._done.update(names)

    def finish(self) -> None:
        """Refuse tensors that nobody took or dropped."""
        left = [name for name in self.names if name not in self._done]
        if left:
            raise FormatError(
                f"{self.where}: {len(left)} tensor{'s' if len(left) > 1 else ''} not understood: {', '.join(left)}; "
                f"used: {', '.join(sorted(self._done)) or 'none'}"
            )

    def _info(self, name: str) -> TensorInfo:
        assert self._index is not None
        if name not in self._index:
            raise FormatError(f"{self.where}: no tensor {name!r} (found: {', '.join(self.names) or 'none'})")
        return self._index[name]

    def _size(self, dim: str) -> int:
        return int(dim) if dim.isdigit() else self.sizes[dim]

    def _check(self, name: str, shape: tuple[int, ...], dims: Sequence[str]) -> None:
        fits = len(shape) == len(dims)
        if fits:
            for size, dim in zip(shape, dims, strict=True):
                expected = int(dim) if dim.isdigit() else self.sizes.setdefault(dim, size)
                fits = fits and size == expected and size > 0
        if not fits:
            wanted = ", ".join(dim if dim.isdigit() else f"{dim}={self.sizes.get(dim, '?')}" for dim in dims)
            raise FormatError(f"{self.where}: tensor {name!r} has shape {tuple(shape)}, expected ({wanted})")

    def _cut(self, tensor: Tensor, dims: Sequence[str]) -> Tensor:
        if self.rows is None or "d_sae" not in dims:
            return tensor
        import torch

        rows = list(self.rows)
        width = tensor.shape[dims.index("d_sae")]
        if wrong := [row for row in rows if not 0 <= row < width]:
            raise ConfigError(f"{self.where}: rows must lie in [0, {width}), not {wrong[0]}")
        return tensor.index_select(dims.index("d_sae"), torch.tensor(rows, device=tensor.device))


def times(tensor: Tensor, factor: Tensor | float) -> Tensor:
    """`tensor` times `factor` without losing precision: half-precision tensors are widened to float32 first.

    A float32 tensor is changed in place, so give it one that nobody else uses, such as one just taken from a bag.
    """
    import torch

    wide = tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()
    return wide.mul_(factor)


def added_up(W_FLD: Tensor) -> Tensor:
    """(d_sae, d): the decoders of all layers, (d_sae, layers, d), added up in float32, a few latents at a time."""
    import torch

    summed = torch.empty(W_FLD.shape[0], W_FLD.shape[2], device=W_FLD.device)
    for latents, found in zip(W_FLD.split(64), summed.split(64), strict=True):
        found.copy_(latents.float().sum(dim=1))
    return summed


def row_norms(W_dec: Tensor) -> Tensor:
    """(..., d_sae) Euclidean norms of the rows of (..., d_sae, d), in float32 and without a widened copy of the whole.

    Give it a tensor taken for this alone: what has been read of the file is then released at once.
    """
    import torch

    norms = torch.empty(W_dec.shape[:-1], device=W_dec.device)
    for rows, found in zip(W_dec.split(256, dim=-2), norms.split(256, dim=-1), strict=True):
        found.copy_(rows.float().norm(dim=-1))
    return norms


def never_above(threshold: Tensor, norms: Tensor) -> Tensor:
    """Thresholds for ``h`` where a format compares ``h * norm`` with `threshold`.

    A latent whose decoder row is zero never passes a non-negative threshold; its own becomes the largest finite number.
    """
    import torch

    limit = torch.finfo(torch.float32).max
    return torch.where(norms > 0, threshold.float() / norms.clamp(min=torch.finfo(torch.float32).tiny), limit).clamp(
        max=limit
    )


def assemble(
    architecture: str,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, Any],
    *bags: TensorBag,
) -> LoadedSAE:
    """The loader's answer: refuses tensors left in `bags`, applies `rows` to d_sae, and leaves tensors out without weights."""
    for bag in bags:
        bag.finish()
    config = dict(config)
    rows = bags[0].rows if bags else None
    if rows is not None:
        config["d_sae"] = len(rows)
    keep = all(bag.weights for bag in bags)
    return LoadedSAE(architecture, config, dict(tensors) if keep else {}, dict(metadata))
