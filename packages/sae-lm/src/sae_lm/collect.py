"""What a study keeps of each latent while text streams by, in memory that does not grow with the text.

Each collector takes the sparse codes of one batch of windows after another and can say its state at any time, so that a study
that was stopped goes on to the same bits. Nothing here depends on how windows are cut into batches.

- `Kept`: a fixed number of examples of each latent, those of the largest score. With the activation as score these are the
  top examples; with a hash of window and latent they are a uniform random sample of all windows in which a latent is active,
  and sorted by activation such a sample is the latent's whole spectrum.
- `Totals`: counts, sums, and a histogram of activations in fixed bins, half an octave each.
- `CoFiring`: which latents are active together, counted at a random part of the positions, in a table of bounded size.
"""

# R windows, C positions in a window, F d_sae, K kept examples, L positions in a snippet, E entries of sparse codes

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from sae_core.codes import SparseCodes
from torch import Tensor

__all__ = ["BIN_EDGES", "CoFiring", "Kept", "Peaks", "Totals", "hashed", "peaks"]

_LOWEST, _HIGHEST, _PER_OCTAVE = -20, 20, 2
BIN_EDGES = torch.tensor(
    [2.0 ** (number / _PER_OCTAVE) for number in range(_LOWEST * _PER_OCTAVE, _HIGHEST * _PER_OCTAVE + 1)]
)
"""(bins + 1,) edges of the histograms of absolute activations; what lies outside is counted in the outermost bins."""

_LATENTS_OF_A_ROW = 256


@final
@dataclass(frozen=True, eq=False)
class Peaks:
    """The largest activation (by absolute value) of each latent in each window in which it is active, (n,) each.

    `windows` counts within the batch, `positions` within the window.
    """

    latents: Tensor
    windows: Tensor
    positions: Tensor
    values: Tensor


def peaks(codes: SparseCodes) -> Peaks:
    """Peaks of codes with leading shape (windows, positions), ordered by latent and window.

    >>> codes = SparseCodes.from_dense(torch.tensor([[[0.0, 2.0], [1.0, -3.0]], [[0.0, 1.0], [0.0, 0.0]]]))
    >>> found = peaks(codes)
    >>> found.latents.tolist(), found.windows.tolist(), found.positions.tolist(), found.values.tolist()
    ([0, 1, 1], [0, 0, 1], [1, 1, 0], [1.0, -3.0, 1.0])
    """
    windows, positions = codes.leading_shape
    active = codes.values != 0
    rows, latents, values = codes.row_ids()[active], codes.indices[active].long(), codes.values[active]
    order = torch.sort(values.abs(), stable=True).indices
    keys = (latents * windows + rows // positions)[order]
    keys, by_key = torch.sort(keys, stable=True)
    order = order[by_key]
    last = torch.ones_like(keys, dtype=torch.bool)
    last[:-1] = keys[1:] != keys[:-1]
    chosen = order[last]
    return Peaks(latents[chosen], rows[chosen] // positions, rows[chosen] % positions, values[chosen])


def hashed(numbers: Tensor, seed: int) -> Tensor:
    """A number in [0, 2^53) for each of some (int64), as good as random and always the same; float64.

    >>> hashed(torch.tensor([1, 2, 1]), 0).unique().numel()
    2
    """
    h = numbers + (seed + 1) * 0x5851F42D4C957F2D % (1 << 62)
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        h = (h ^ (h >> shift & (1 << 64 - shift) - 1)) * factor
    h = h ^ (h >> 31 & (1 << 33) - 1)
    return (h & ((1 << 53) - 1)).double()


@final
class Kept:
    """The `keep` examples of each latent that have the largest scores; at equal scores the earlier ones.

    All are (d_sae, keep): `scores` float64, minus infinity where there is none; `windows` and `positions` of the peak, -1
    where there is none; `values` there. `snippets` (d_sae, keep, L) are the latent's activations around the peak.
    """

    def __init__(self, d_sae: int, keep: int, snippet: int, device: torch.device) -> None:
        self.scores = torch.full((d_sae, keep), -torch.inf, dtype=torch.float64, device=device)
        self.windows = torch.full((d_sae, keep), -1, dtype=torch.long, device=device)
        self.positions = torch.full((d_sae, keep), -1, dtype=torch.long, device=device)
        self.values = torch.zeros(d_sae, keep, device=device)
        self.snippets = torch.zeros(d_sae, keep, snippet, dtype=torch.float16, device=device)

    def offer(self, found: Peaks, scores: Tensor, first_window: int, look_up: SnippetReader) -> None:
        """Take what belongs among the best; the batch's windows are numbered from `first_window`."""
        keep = self.scores.shape[1]
        if keep == 0 or not len(scores):
            return
        better = scores > self.scores[:, -1][found.latents]
        latents, scores = found.latents[better], scores[better]
        if not len(latents):
            return
        touched, slot = torch.unique(latents, return_inverse=True)
        old = self.scores[touched].flatten()
        all_scores = torch.cat([old, scores])
        all_slots = torch.cat([torch.arange(len(touched), device=slot.device).repeat_interleave(keep), slot])
        order = torch.sort(all_scores, descending=True, stable=True).indices
        order = order[torch.sort(all_slots[order], stable=True).indices]
        starts = torch.zeros(len(touched), dtype=torch.long, device=slot.device)
        starts[1:] = torch.bincount(all_slots, minlength=len(touched)).cumsum(0)[:-1]
        chosen = order[(starts.unsqueeze(1) + torch.arange(keep, device=slot.device)).flatten()]
        is_new = chosen >= len(old)
        new = chosen[is_new] - len(old)

        def merged(kept: Tensor, offered: Tensor) -> Tensor:
            rows = kept[touched].flatten(0, 1)
            result = torch.empty((len(chosen), *rows.shape[1:]), dtype=rows.dtype, device=rows.device)
            result[~is_new] = rows[chosen[~is_new]]
            result[is_new] = offered.to(rows.dtype)
            return result.view(len(touched), keep, *rows.shape[1:])

        windows, positions = found.windows[better][new], found.positions[better][new]
        snippets = look_up(windows, positions, latents[new])
        for kept, offered in (
            (self.scores, scores[new]),
            (self.windows, windows + first_window),
            (self.positions, positions),
            (self.values, found.values[better][new]),
            (self.snippets, snippets),
        ):
            kept[touched] = merged(kept, offered)

    def state_dict(self) -> dict[str, Tensor]:
        """All examples."""
        return {name: getattr(self, name) for name in ("scores", "windows", "positions", "values", "snippets")}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a saved state."""
        for name, kept in self.state_dict().items():
            kept.copy_(state[name])


@final
class SnippetReader:
    """Reads activations of one latent at neighbouring positions out of the sparse codes of a batch."""

    def __init__(self, codes: SparseCodes, length: int) -> None:
        self._positions, self._d_sae, self.length = codes.leading_shape[-1], codes.d_sae, length
        keys = codes.row_ids() * codes.d_sae + codes.indices.long()
        self._keys, order = torch.sort(keys)
        self._values = codes.values[order]

    def __call__(self, windows: Tensor, positions: Tensor, latents: Tensor) -> Tensor:
        """(n, length) activations from `first_position` on."""
        if not len(self._keys):
            return torch.zeros(len(latents), self.length, device=latents.device)
        starts = first_position(positions, self._positions, self.length)
        rows = (windows * self._positions + starts).unsqueeze(1) + torch.arange(self.length, device=latents.device)
        wanted = rows * self._d_sae + latents.unsqueeze(1)
        at = torch.searchsorted(self._keys, wanted).clamp_max(len(self._keys) - 1)
        return torch.where(self._keys[at] == wanted, self._values[at], 0.0)


def first_position(positions: Tensor, window: int, length: int) -> Tensor:
    """Where a snippet of `length` around each position begins, so that it lies within a window.

    >>> first_position(torch.tensor([0, 5, 9]), window=10, length=4).tolist()
    [0, 3, 6]
    """
    return (positions - length // 2).clamp(0, window - length)


@final
class Totals:
    """Counts and sums of each latent over all positions: (d_sae,), and (d_sae, bins) for the histogram."""

    def __init__(self, d_sae: int, device: torch.device) -> None:
        self.count = torch.zeros(d_sae, dtype=torch.long, device=device)
        self.windows = torch.zeros(d_sae, dtype=torch.long, device=device)
        self.sum = torch.zeros(d_sae, dtype=torch.float64, device=device)
        self.largest = torch.zeros(d_sae, device=device)
        self.histogram = torch.zeros(d_sae, len(BIN_EDGES) - 1, dtype=torch.int32, device=device)

    def add(self, codes: SparseCodes, found: Peaks) -> None:
        """Account for one batch."""
        active = codes.values != 0
        latents, values = codes.indices[active].long(), codes.values[active].float()
        self.count.index_add_(0, latents, torch.ones_like(latents))
        self.windows.index_add_(0, found.latents, torch.ones_like(found.latents))
        self.sum.index_add_(0, latents, values.double())
        self.largest.scatter_reduce_(0, found.latents, found.values.abs().float(), "amax")
        bins = self.histogram.shape[1]
        place = (values.abs().log2() * _PER_OCTAVE).floor().long() - _LOWEST * _PER_OCTAVE
        flat = latents * bins + place.clamp(0, bins - 1)
        self.histogram.view(-1).index_add_(0, flat, torch.ones_like(flat, dtype=torch.int32))

    def state_dict(self) -> dict[str, Tensor]:
        """All sums."""
        return {name: getattr(self, name) for name in ("count", "windows", "sum", "largest", "histogram")}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a saved state."""
        for name, kept in self.state_dict().items():
            kept.copy_(state[name])


@final
class CoFiring:
    """How often two latents are active at one position, counted at a `rate` of the positions chosen by hash.

    The table holds at most `pairs` pairs; beyond that the rarest are given up, and `given_up` is the largest count that
    was: a pair that is not in the table was counted at most so often before it last left. At a position with more than 256
    active latents the 256 largest take part.
    """

    def __init__(self, d_sae: int, rate: float, pairs: int, seed: int, device: torch.device) -> None:
        self.d_sae, self.rate, self.pairs, self._seed = d_sae, rate, pairs, seed
        self.keys = torch.zeros(0, dtype=torch.long, device=device)
        self.counts = torch.zeros(0, dtype=torch.long, device=device)
        self.alone = torch.zeros(d_sae, dtype=torch.long, device=device)
        self.seen = torch.zeros(2, dtype=torch.long, device=device)  # positions, and the largest count given up

    @property
    def given_up(self) -> int:
        """The largest count of a pair that was given up."""
        return int(self.seen[1])

    def add(self, codes: SparseCodes, first_window: int) -> None:
        """Account for one batch, whose windows are numbered from `first_window`."""
        windows, positions = codes.leading_shape
        rows = torch.arange(windows * positions, device=codes.device)
        chosen_P = hashed(rows + first_window * positions, self._seed) < self.rate * (1 << 53)
        active = (codes.values != 0) & chosen_P[codes.row_ids()]
        row, latent, value = codes.row_ids()[active], codes.indices[active].long(), codes.values[active].abs()
        self.seen[0] += chosen_P.sum()
        self.alone.index_add_(0, latent, torch.ones_like(latent))
        if not len(row):
            return
        order = torch.sort(value, descending=True, stable=True).indices
        order = order[torch.sort(row[order], stable=True).indices]
        row, latent = row[order], latent[order]
        counts = torch.bincount(row, minlength=windows * positions)
        counts = counts[counts > 0]
        starts = torch.nn.functional.pad(counts.cumsum(0), (1, 0))[:-1]
        rank = torch.arange(len(row), device=row.device) - starts.repeat_interleave(counts)
        width = min(int(counts.max()), _LATENTS_OF_A_ROW)
        table = torch.full((len(counts), width), -1, dtype=torch.long, device=row.device)
        inside = rank < width
        number = torch.arange(len(counts), device=row.device).repeat_interleave(counts)
        table[number[inside], rank[inside]] = latent[inside]
        first, second = torch.triu_indices(width, width, 1, device=row.device)
        for block in table.split(max(1, (1 << 22) // max(len(first), 1))):
            a, b = block[:, first].flatten(), block[:, second].flatten()
            both = (a >= 0) & (b >= 0)
            low, high = torch.minimum(a, b)[both], torch.maximum(a, b)[both]
            self._merge(*torch.unique(low * self.d_sae + high, return_counts=True))

    def partners(self, keep: int) -> tuple[Tensor, Tensor, Tensor]:
        """For each latent the latents that it is active with, by their Jaccard index: latents (d_sae, keep), -1 where there
        is none, counts and indices."""
        low, high = self.keys // self.d_sae, self.keys % self.d_sae
        latent, partner, count = torch.cat([low, high]), torch.cat([high, low]), self.counts.repeat(2)
        either = self.alone[latent] + self.alone[partner] - count
        jaccard = count.double() / either.clamp_min(1)
        order = torch.sort(jaccard, descending=True, stable=True).indices
        order = order[torch.sort(latent[order], stable=True).indices]
        latent, partner, count, jaccard = latent[order], partner[order], count[order], jaccard[order]
        per_latent = torch.bincount(latent, minlength=self.d_sae)
        starts = torch.nn.functional.pad(per_latent.cumsum(0), (1, 0))[:-1]
        rank = torch.arange(len(latent), device=latent.device) - starts[latent]
        kept = rank < keep
        shape, device = (self.d_sae, keep), latent.device
        partners = torch.full(shape, -1, dtype=torch.int32, device=device)
        counts = torch.zeros(shape, dtype=torch.int32, device=device)
        indices = torch.zeros(shape, device=device)
        partners[latent[kept], rank[kept]] = partner[kept].int()
        counts[latent[kept], rank[kept]] = count[kept].int()
        indices[latent[kept], rank[kept]] = jaccard[kept].float()
        return partners, counts, indices

    def state_dict(self) -> dict[str, Tensor]:
        """The table."""
        return {"keys": self.keys, "counts": self.counts, "alone": self.alone, "seen": self.seen}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a saved state."""
        device = self.keys.device
        self.keys, self.counts = state["keys"].to(device), state["counts"].to(device)
        self.alone.copy_(state["alone"])
        self.seen.copy_(state["seen"])

    def _merge(self, keys: Tensor, counts: Tensor) -> None:
        merged, slot = torch.unique(torch.cat([self.keys, keys]), return_inverse=True)
        total = torch.zeros_like(merged).index_add_(0, slot, torch.cat([self.counts, counts]))
        if len(merged) > self.pairs:
            order = torch.sort(total, descending=True, stable=True).indices
            self.seen[1] = torch.maximum(self.seen[1], total[order[self.pairs]])
            kept = order[: self.pairs].sort().values
            merged, total = merged[kept], total[kept]
        self.keys, self.counts = merged, total
