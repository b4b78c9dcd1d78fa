"""Changing latents of sparse codes: adding to them, setting, scaling and removing them, at chosen positions.

An `Edit` names latents, positions, and what becomes of the latents' values there. It never touches the others, and it works
on the sparse codes themselves: what is not named is neither looked at nor copied to a dense form. The four usual edits
have names: `steer` adds, `clamp` sets, `scale` multiplies, `ablate` removes; `keep_only` removes all but the named ones.

A position is counted from the start of the text, also while a model generates with a key-value cache and sees one new
position at a time; a negative one from the end of what the model sees in the pass, so that -1 is always the newest.
"""

# R rows (positions of all sequences, flattened), N named latents

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from sae_core.codes import SparseCodes
from sae_core.config import require
from sae_core.errors import ConfigError, ShapeError
from torch import Tensor

__all__ = [
    "Edit",
    "Positions",
    "ablate",
    "apply_edits",
    "clamp",
    "edit_rows",
    "keep_only",
    "rows_at",
    "scale",
    "scattered",
    "select_rows",
    "steer",
    "values_of",
]

Positions = int | slice | Sequence[int] | Tensor | None
"""Where an edit applies: one position, a slice, several, a bool mask (sequences, positions), or None for everywhere."""


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Edit:
    """What becomes of some latents at some positions.

    `change` maps the latents' values (rows, n), zero where one is not active, to new ones; a latent whose new value is zero
    is not active. `latents` (n,) None means all others than `spared`, which become zero.
    """

    latents: Tensor | None
    change: Callable[[Tensor], Tensor]
    positions: Positions = None
    spared: Tensor | None = None


def steer(latents: int | Sequence[int] | Mapping[int, float], by: float = 1.0, *, positions: Positions = None) -> Edit:
    """Add `by` to each latent, active or not; a mapping gives each its own amount.

    With the error term kept, this adds ``by`` times the latent's decoder direction to the model's own activation.
    """
    chosen, amounts = _amounts(latents, by)
    return Edit(latents=chosen, change=lambda old: old + amounts.to(old), positions=positions)


def clamp(latents: int | Sequence[int] | Mapping[int, float], to: float = 0.0, *, positions: Positions = None) -> Edit:
    """Set each latent to `to`, active or not; a mapping gives each its own value."""
    chosen, amounts = _amounts(latents, to)
    return Edit(latents=chosen, change=lambda old: torch.zeros_like(old) + amounts.to(old), positions=positions)


def scale(latents: int | Sequence[int] | Mapping[int, float], by: float = 1.0, *, positions: Positions = None) -> Edit:
    """Multiply each latent by `by`; a mapping gives each its own factor. A latent that is not active stays so."""
    chosen, amounts = _amounts(latents, by)
    return Edit(latents=chosen, change=lambda old: old * amounts.to(old), positions=positions)


def ablate(latents: int | Sequence[int], *, positions: Positions = None) -> Edit:
    """Set each latent to zero."""
    return Edit(latents=_indices(latents), change=torch.zeros_like, positions=positions)


def keep_only(latents: int | Sequence[int], *, positions: Positions = None) -> Edit:
    """Set all latents but these to zero."""
    return Edit(latents=None, change=torch.zeros_like, positions=positions, spared=_indices(latents))


def apply_edits(codes: SparseCodes, edits: Sequence[Edit], *, offset: int = 0) -> SparseCodes:
    """`codes` after the edits, one after the other; `offset` is the position at which the codes' sequences begin.

    Differentiable in the values. Raises ConfigError for a latent that the dictionary does not have.

    >>> codes = SparseCodes.from_dense(torch.tensor([[0.0, 2.0, 0.0], [1.0, 0.0, 3.0]]))
    >>> apply_edits(codes, [steer(0, 5.0), ablate(2)]).to_dense().tolist()
    [[5.0, 2.0, 0.0], [6.0, 0.0, 0.0]]
    >>> apply_edits(codes, [scale({1: 10.0})]).to_dense().tolist()
    [[0.0, 20.0, 0.0], [1.0, 0.0, 3.0]]
    """
    return edit_rows(codes, edits, offset=offset)[0]


def edit_rows(
    codes: SparseCodes, edits: Sequence[Edit], *, offset: int = 0, within: Tensor | None = None
) -> tuple[SparseCodes, Tensor]:
    """`apply_edits`, and (rows,) bool: the rows that are not what they were. `within` (rows,) bool limits where edits reach."""
    changed_R = torch.zeros(codes.rows, dtype=torch.bool, device=codes.device)
    for edit in edits:
        chosen_R = rows_at(edit.positions, codes.leading_shape, offset, codes.device)
        codes, now_R = _edited(codes, edit, chosen_R if within is None else chosen_R & within)
        changed_R |= now_R
    return codes, changed_R


def rows_at(positions: Positions, leading_shape: tuple[int, ...], offset: int, device: torch.device) -> Tensor:
    """(rows,) bool: which rows of codes of this leading shape are at the positions.

    The last dimension of the shape is the position in the sequence. Raises ShapeError for a mask of another shape.

    >>> rows_at(slice(1, None), (2, 3), 0, torch.device("cpu")).tolist()
    [False, True, True, False, True, True]
    >>> rows_at(-1, (1, 3), 4, torch.device("cpu")).tolist(), rows_at([5], (1, 3), 4, torch.device("cpu")).tolist()
    ([False, False, True], [False, True, False])
    """
    length = leading_shape[-1] if leading_shape else 1
    if isinstance(positions, Tensor) and positions.dtype == torch.bool:
        return _rows_of_mask(positions, leading_shape, offset, device)
    here_L = torch.zeros(length, dtype=torch.bool, device=device)
    if positions is None:
        here_L[:] = True
    elif isinstance(positions, slice):
        start, stop, step = positions.indices(offset + length)
        chosen = [p - offset for p in range(start, stop, step) if p >= offset]
        here_L[torch.tensor(chosen, dtype=torch.long, device=device)] = True
    else:
        listed = [positions] if isinstance(positions, int) else [int(p) for p in positions]
        near = [p - offset if p >= 0 else p + length for p in listed]
        inside = [p for p in near if 0 <= p < length]
        here_L[torch.tensor(inside, dtype=torch.long, device=device)] = True
    return here_L.expand(leading_shape or (1,)).reshape(-1)


def _rows_of_mask(mask: Tensor, leading_shape: tuple[int, ...], offset: int, device: torch.device) -> Tensor:
    """A mask covers positions from the first one on; those behind its end are not meant."""
    length = leading_shape[-1] if leading_shape else 1
    if mask.shape[:-1] != leading_shape[:-1]:
        raise ShapeError(
            f"positions: a mask of shape {tuple(mask.shape)} for activations of {tuple(leading_shape)} positions"
        )
    here = mask[..., offset : offset + length].to(device)
    missing = length - here.shape[-1]
    return torch.nn.functional.pad(here, (0, missing)).reshape(-1)


def values_of(codes: SparseCodes, latents: Tensor) -> Tensor:
    """(rows, n) values of some latents, zero where one is not active; differentiable.

    >>> codes = SparseCodes.from_dense(torch.tensor([[0.0, 2.0, 0.0], [1.0, 0.0, 3.0]]))
    >>> values_of(codes, torch.tensor([2, 1])).tolist()
    [[0.0, 2.0], [3.0, 0.0]]
    """
    place_of = torch.full((codes.d_sae,), -1, dtype=torch.long, device=codes.device)
    place_of[latents] = torch.arange(len(latents), device=codes.device)
    places = place_of[codes.indices]
    found = places >= 0
    flat = codes.values.new_zeros(codes.rows * len(latents))
    at = codes.row_ids()[found] * len(latents) + places[found]
    return flat.index_add(0, at, codes.values[found]).view(codes.rows, len(latents))


def select_rows(codes: SparseCodes, rows: Tensor) -> SparseCodes:
    """The codes of some rows, by number (n,) in rising order, as one list of rows.

    >>> codes = SparseCodes.from_dense(torch.tensor([[0.0, 2.0], [1.0, 0.0], [3.0, 4.0]]))
    >>> select_rows(codes, torch.tensor([0, 2])).to_dense().tolist()
    [[0.0, 2.0], [3.0, 4.0]]
    """
    wanted = torch.zeros(codes.rows, dtype=torch.bool, device=codes.device)
    wanted[rows] = True
    kept = wanted[codes.row_ids()]
    offsets = codes.row_offsets().diff()[rows].cumsum(0)
    return SparseCodes(
        codes.values[kept], codes.indices[kept], (len(rows),), codes.d_sae, torch.nn.functional.pad(offsets, (1, 0))
    )


def scattered(codes: SparseCodes, rows: Tensor, leading_shape: tuple[int, ...]) -> SparseCodes:
    """Codes of some rows as codes of all rows of `leading_shape`: the others have no active latent.

    >>> codes = SparseCodes.from_dense(torch.tensor([[0.0, 2.0]]))
    >>> scattered(codes, torch.tensor([1]), (1, 2)).to_dense().tolist()
    [[[0.0, 0.0], [0.0, 2.0]]]
    """
    total = 1
    for size in leading_shape:
        total *= size
    counts = torch.zeros(total, dtype=torch.long, device=codes.device)
    counts[rows] = codes.row_offsets().diff()
    offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    return SparseCodes(codes.values, codes.indices, leading_shape, codes.d_sae, offsets)


def _edited(codes: SparseCodes, edit: Edit, chosen_R: Tensor) -> tuple[SparseCodes, Tensor]:
    device, row_ids = codes.device, codes.row_ids()
    if edit.latents is None:
        assert edit.spared is not None
        spared = _checked(edit.spared, codes.d_sae, device)
        keep = torch.isin(codes.indices, spared) | ~chosen_R[row_ids]
        changed_R = torch.zeros_like(chosen_R)
        changed_R[row_ids[~keep & (codes.values != 0)]] = True
        return _assembled(codes, codes.values[keep], codes.indices[keep], row_ids[keep]), changed_R
    latents_N = _checked(edit.latents, codes.d_sae, device)
    old_RN = values_of(codes, latents_N)
    new_RN = torch.where(chosen_R.unsqueeze(1), edit.change(old_RN), old_RN)
    others = ~torch.isin(codes.indices, latents_N)
    at_row, at_latent = (new_RN != 0).nonzero(as_tuple=True)
    edited = _assembled(
        codes,
        torch.cat([codes.values[others], new_RN[at_row, at_latent]]),
        torch.cat([codes.indices[others], latents_N[at_latent].to(codes.indices.dtype)]),
        torch.cat([row_ids[others], at_row]),
    )
    return edited, (new_RN != old_RN).any(1)


def _assembled(codes: SparseCodes, values: Tensor, indices: Tensor, rows: Tensor) -> SparseCodes:
    """Codes of the shape of `codes` from entries in any order."""
    order = torch.sort(rows, stable=True).indices
    counts = torch.zeros(codes.rows, dtype=torch.long, device=codes.device).index_add_(0, rows, torch.ones_like(rows))
    offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    return SparseCodes(values[order], indices[order], codes.leading_shape, codes.d_sae, offsets)


def _checked(latents: Tensor, d_sae: int, device: torch.device) -> Tensor:
    beyond = [latent for latent in latents.tolist() if not 0 <= latent < d_sae]
    if beyond:
        raise ConfigError(f"edit: there is no latent {beyond[0]}; the dictionary has {d_sae}, numbered from 0")
    return latents.to(device)


def _amounts(latents: int | Sequence[int] | Mapping[int, float], amount: float) -> tuple[Tensor, Tensor]:
    if isinstance(latents, Mapping):
        return _indices(list(latents)), torch.tensor([float(value) for value in latents.values()])
    chosen = _indices(latents)
    return chosen, torch.full((len(chosen),), float(amount))


def _indices(latents: int | Sequence[int]) -> Tensor:
    listed = [latents] if isinstance(latents, int) else [int(latent) for latent in latents]
    require(len(listed) > 0, "edit: name at least one latent")
    require(len(set(listed)) == len(listed), f"edit: a latent is named twice in {listed}")
    return torch.tensor(listed)
