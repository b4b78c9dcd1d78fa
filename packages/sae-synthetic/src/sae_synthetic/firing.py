"""Which features fire: draws whose cost follows the features that fire, not the features that exist.

All ways of firing answer one question: given parents that fire, which of their children fire? At the top, every sample is
such a parent, and its children are the features without a parent. A feature below another is asked about only where its
parent fires, which gives the same distribution as drawing all features first and applying the hierarchy afterwards.

- Independent: rare children of a parent are points of a Poisson process. Their number is Poisson with the sum of the rates
  l_i = -log(1 - p_i), each point belongs to child i with probability l_i / sum, and child i fires when it has a point:
  with probability 1 - exp(-l_i) = p_i, independently of all others. Frequent children (p > 1/2) are tried one by one.
- Low-rank Gaussian copula: z = F g + sqrt(d) e with g shared within a sample. Given g the features are independent, so those
  below are drawn only where their parent fires. Those at the top need F g for every sample, in blocks of cells that fit a
  cache; all else is dearer, so rare features draw noise only for the few cells where it could matter.
- Full Gaussian copula: z = L e with the Cholesky factor L computed once.
"""

# B batch, N features, T features at the top, R rank, K entries; node N stands for the top

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol, final

import numpy as np
import torch
from torch import Tensor

from sae_synthetic.correlation import LowRankCorrelationMatrix

__all__ = ["Children", "Draw", "Firing", "FullFiring", "IndependentFiring", "LowRankFiring", "make_firing"]

_FREQUENT = 0.5
_CELLS_AT_ONCE = 2**22
_CELLS_IN_CACHE = 2**19
_HIGHEST_LIFT = 2.5  # standard deviations of F_i . g; one sample in 160 is above and looked at by itself
_WORTH_SKIPPING = 0.1
_ROWS_AT_ONCE = 4096
_LUCK_BITS = 5
_LUCKS = 2**_LUCK_BITS  # steps of a Poisson point's luck in the table of what is too far off
_ROUNDING = 1e-4


@final
class Children:
    """Lists of children laid end to end: those of node i are `items[starts[i]:starts[i + 1]]`; node N is the top."""

    def __init__(self, parent_N: Tensor, chosen_N: Tensor) -> None:
        """`parent_N` (N,) nearest feature above or -1; only features where `chosen_N` (N,) holds are listed."""
        num_features = len(parent_N)
        items = chosen_N.nonzero().squeeze(1)
        owner = parent_N[items]
        owner = torch.where(owner < 0, num_features, owner)
        owner, order = torch.sort(owner, stable=True)
        self.items = items[order]
        self.owner = owner
        self.counts = torch.bincount(owner, minlength=num_features + 1)
        self.starts = torch.zeros(num_features + 2, dtype=torch.long, device=parent_N.device)
        torch.cumsum(self.counts, 0, out=self.starts[1:])

    def expand(self, nodes: Tensor) -> tuple[Tensor, Tensor]:
        """(K,) position in `nodes` and (K,) child, for every child of every node."""
        counts = self.counts[nodes]
        which = torch.repeat_interleave(counts)
        first = torch.cumsum(counts, 0) - counts
        place = torch.arange(len(which), device=nodes.device) - first[which] + self.starts[nodes][which]
        return which, self.items[place]


class Draw(Protocol):
    """One batch in the making."""

    def top(self, batch_size: int) -> tuple[Tensor, Tensor]:
        """(K,) sample and (K,) feature of every firing feature without a parent; each pair once."""
        ...

    def below(self, rows: Tensor, nodes: Tensor) -> tuple[Tensor, Tensor]:
        """(K,) position in `nodes` and (K,) child that fires, for firing features `nodes` of samples `rows`."""
        ...


class Firing(Protocol):
    """A distribution of firing features."""

    def begin(self, batch_size: int, generator: torch.Generator) -> Draw: ...


def make_firing(
    probabilities_N: Tensor, correlation: Tensor | LowRankCorrelationMatrix | None, parent_N: Tensor
) -> Firing:
    """The distribution with these marginal probabilities before the hierarchy `parent_N`, on their device."""
    if correlation is None:
        return IndependentFiring(probabilities_N, parent_N)
    if isinstance(correlation, LowRankCorrelationMatrix):
        return LowRankFiring(probabilities_N, correlation, parent_N)
    return FullFiring(probabilities_N, correlation, parent_N)


@final
class IndependentFiring:
    """Every feature fires independently of the others, given its parent."""

    def __init__(self, probabilities_N: Tensor, parent_N: Tensor) -> None:
        self.num_features = len(parent_N)
        self.probabilities_N = probabilities_N.double()
        frequent_N = self.probabilities_N > _FREQUENT
        self.frequent = Children(parent_N, frequent_N) if bool(frequent_N.any()) else None
        self.rare = Children(parent_N, ~frequent_N)
        rates = -torch.log1p(-self.probabilities_N[self.rare.items])
        self.ends = torch.cumsum(rates, 0)  # child i of a node owns the stretch of length l_i that ends at ends[i]
        edges = torch.cat([self.ends.new_zeros(1), self.ends])
        self.begins = edges[self.rare.starts[:-1]]
        self.totals = edges[self.rare.starts[1:]] - self.begins

    def begin(self, batch_size: int, generator: torch.Generator) -> _IndependentDraw:
        """Start a batch."""
        return _IndependentDraw(self, generator)


@final
class _IndependentDraw:
    def __init__(self, firing: IndependentFiring, generator: torch.Generator) -> None:
        self.firing, self.generator = firing, generator

    def top(self, batch_size: int) -> tuple[Tensor, Tensor]:
        firing, top = self.firing, self.firing.num_features
        which, fraction_K = self._points(firing.totals[top].expand(batch_size))
        place = torch.searchsorted(
            firing.ends, fraction_K.mul_(firing.totals[top]).add_(firing.begins[top]), right=True
        )
        rare = self._distinct(which, firing.rare.items.index_select(0, place.clamp_max_(len(firing.ends) - 1)))
        nodes = torch.full((batch_size,), top, device=firing.ends.device)
        return self._with_frequent(*rare, nodes)

    def below(self, rows: Tensor, nodes: Tensor) -> tuple[Tensor, Tensor]:
        del rows  # independent firing is the same in every sample
        firing = self.firing
        totals = firing.totals[nodes]
        which, fraction_K = self._points(totals)
        spot = fraction_K.mul_(totals[which]).add_(firing.begins[nodes][which])
        place = torch.searchsorted(firing.ends, spot, right=True)
        # rounding must not push a point of one node into its neighbour's stretch
        place = torch.minimum(place, firing.rare.starts[nodes + 1][which] - 1)
        return self._with_frequent(*self._distinct(which, firing.rare.items[place]), nodes)

    def _points(self, totals: Tensor) -> tuple[Tensor, Tensor]:
        """(K,) owner of every point, ascending, and (K,) its place in [0, 1) of the owner's stretch, ascending within."""
        which = torch.repeat_interleave(torch.poisson(totals, generator=self.generator).long())
        fraction = torch.rand(len(which), generator=self.generator, device=which.device, dtype=torch.float64)
        return which, torch.sort(fraction.add_(which)).values.sub_(which)

    def _distinct(self, which: Tensor, children: Tensor) -> tuple[Tensor, Tensor]:
        """The pairs without repetition; equal ones are neighbours."""
        new = torch.ones_like(which, dtype=torch.bool)
        torch.logical_or(which[1:] != which[:-1], children[1:] != children[:-1], out=new[1:])
        new = new.nonzero().squeeze(1)
        return which.index_select(0, new), children.index_select(0, new)

    def _with_frequent(self, which: Tensor, children: Tensor, nodes: Tensor) -> tuple[Tensor, Tensor]:
        firing = self.firing
        if firing.frequent is None:
            return which, children
        parents, tried = firing.frequent.expand(nodes)
        luck = torch.rand(len(tried), generator=self.generator, device=nodes.device, dtype=torch.float64)
        fires = luck < firing.probabilities_N[tried]
        return torch.cat([which, parents[fires]]), torch.cat([children, tried[fires]])


@final
class FullFiring:
    """Feature i fires where z_i exceeds its threshold, z ~ N(0, correlation)."""

    def __init__(self, probabilities_N: Tensor, correlation_NN: Tensor, parent_N: Tensor) -> None:
        self.num_features = len(parent_N)
        self.factor_NN = torch.linalg.cholesky(correlation_NN.double()).to(probabilities_N)
        self.thresholds_N = _thresholds(probabilities_N)
        self.children = Children(parent_N, torch.ones_like(parent_N, dtype=torch.bool))
        self.is_top_N = parent_N < 0

    def begin(self, batch_size: int, generator: torch.Generator) -> _FullDraw:
        """Start a batch: z of all features and samples."""
        noise = torch.randn(
            batch_size,
            self.num_features,
            generator=generator,
            device=self.factor_NN.device,
            dtype=self.factor_NN.dtype,
        )
        return _FullDraw(self, noise @ self.factor_NN.T > self.thresholds_N)


@final
class _FullDraw:
    def __init__(self, firing: FullFiring, fires_BN: Tensor) -> None:
        self.firing, self.fires_BN = firing, fires_BN

    def top(self, batch_size: int) -> tuple[Tensor, Tensor]:
        rows, features = (self.fires_BN & self.firing.is_top_N).nonzero(as_tuple=True)
        return rows, features

    def below(self, rows: Tensor, nodes: Tensor) -> tuple[Tensor, Tensor]:
        which, children = self.firing.children.expand(nodes)
        fires = self.fires_BN[rows[which], children]
        return which[fires], children[fires]


@final
class LowRankFiring:
    """Feature i fires where z_i = F_i . g + sqrt(d_i) e_i exceeds its threshold t_i."""

    def __init__(self, probabilities_N: Tensor, correlation: LowRankCorrelationMatrix, parent_N: Tensor) -> None:
        self.num_features = len(parent_N)
        spread_N = correlation.correlation_diag.to(probabilities_N).sqrt()
        # In units of the noise: e_i > cut_i - scaled_i . g
        self.scaled_NR = correlation.correlation_factor.to(probabilities_N) / spread_N.unsqueeze(1)
        self.cuts_N = _thresholds(probabilities_N) / spread_N
        self.children = Children(parent_N, torch.ones_like(parent_N, dtype=torch.bool))
        top = self.children.items[self.children.owner == len(parent_N)]
        limits_N = _HIGHEST_LIFT * self.scaled_NR.norm(dim=1)
        highest_N = torch.special.ndtr(limits_N - self.cuts_N)
        self.often = _Columns(self, top[highest_N[top] > _WORTH_SKIPPING], self.cuts_N)
        self.seldom = _Columns(self, top[highest_N[top] <= _WORTH_SKIPPING], limits_N)
        self.gaps_T = (self.cuts_N - limits_N)[self.seldom.items]
        self.rates_T = _rate(-self.gaps_T)
        lucks = torch.arange(_LUCKS, device=top.device) / _LUCKS
        least = torch.special.ndtri(-torch.expm1(-self.rates_T.double().unsqueeze(1) * lucks)) + self.gaps_T.unsqueeze(
            1
        )
        self.least_TL = least.sub_(_ROUNDING).to(probabilities_N)  # -inf for the smallest lucks

    def begin(self, batch_size: int, generator: torch.Generator) -> _LowRankDraw:
        """Start a batch: g of all samples."""
        rank, device = self.scaled_NR.shape[1], self.scaled_NR.device
        shared_BR = torch.randn(batch_size, rank, generator=generator, device=device, dtype=self.scaled_NR.dtype)
        return _LowRankDraw(self, shared_BR, generator)


@final
class _Columns:
    """Some features of a low-rank copula, one below the other; a product with (g, 1) is F . g less what is to be exceeded."""

    def __init__(self, firing: LowRankFiring, items: Tensor, levels_N: Tensor) -> None:
        self.items = items
        self.scaled_TS = torch.cat([firing.scaled_NR[items], -levels_N[items].unsqueeze(1)], dim=1)


@final
class _LowRankDraw:
    def __init__(self, firing: LowRankFiring, shared_BR: Tensor, generator: torch.Generator) -> None:
        self.firing, self.shared_BR, self.generator = firing, shared_BR, generator

    def top(self, batch_size: int) -> tuple[Tensor, Tensor]:
        parts: list[Tensor] = []
        for start in range(0, batch_size, _ROWS_AT_ONCE):
            shared_BR = self.shared_BR[start : start + _ROWS_AT_ONCE]
            shared_SB = torch.cat([shared_BR, shared_BR.new_ones(len(shared_BR), 1)], dim=1).T.contiguous()
            keys = torch.unique(torch.cat([*self._often(shared_SB), self._seldom(shared_SB)]))
            parts.append(keys.add_(start * self.firing.num_features))
        keys = torch.cat(parts)
        rows = keys // self.firing.num_features
        return rows, keys.sub_(rows * self.firing.num_features)

    def _often(self, shared_SB: Tensor) -> Iterator[Tensor]:
        """(K,) row * N + feature of what fires, with noise in every cell."""
        columns, batch_size = self.firing.often, shared_SB.shape[1]
        at_once = max(1, _CELLS_AT_ONCE // batch_size)
        for start in range(0, len(columns.items), at_once):
            scaled = columns.scaled_TS[start : start + at_once]
            cells = scaled.new_empty(len(scaled), batch_size)
            cells.normal_(generator=self.generator).addmm_(scaled, shared_SB)
            yield self._keys(_positive(cells).add_(start * batch_size), columns.items, batch_size)

    def _seldom(self, shared_SB: Tensor) -> Tensor:
        """(K,) row * N + feature of what fires; noise only where it can matter, a cell may come twice.

        That is where F_i . g is above its limit, and below it where a Poisson process with the rate at the limit has a point.
        A point at a cell that fires with probability Q counts when luck * rate < -log(1 - Q), so the points that count are a
        Poisson process with the rate -log(1 - Q), and the cell has one with probability Q. Most points are too far off for
        their luck, which a table of the least F_i . g says without computing Q.
        """
        firing, columns, batch_size = self.firing, self.firing.seldom, shared_SB.shape[1]
        counts = torch.poisson(firing.rates_T * batch_size, generator=self.generator).long()
        places = torch.repeat_interleave(counts)
        draw = torch.randint(batch_size * _LUCKS, (len(places),), generator=self.generator, device=places.device)
        points = (draw >> _LUCK_BITS).add_(places * batch_size)
        high, excess, excess_at_points = _products(columns, shared_SB, points, torch.cumsum(counts, 0))

        noise = torch.randn(len(high), generator=self.generator, device=excess.device, dtype=excess.dtype)
        gaps = firing.gaps_T.index_select(0, torch.div(high, batch_size, rounding_mode="trunc"))
        high = high.index_select(0, _positive(noise.add_(excess).sub_(gaps)))

        luck = draw.bitwise_and_(_LUCKS - 1)
        least = firing.least_TL.view(-1).index_select(0, (places << _LUCK_BITS).add_(luck))
        maybe = _positive(excess_at_points - least)
        places, points, luck, above = (t.index_select(0, maybe) for t in (places, points, luck, excess_at_points))
        luck = torch.rand(len(luck), generator=self.generator, device=above.device, dtype=above.dtype).add_(luck)
        wanted = _rate(above - firing.gaps_T.index_select(0, places))
        counted = (above <= 0) & (luck * firing.rates_T.index_select(0, places) < _LUCKS * wanted)
        return self._keys(torch.cat([high, points[counted]]), columns.items, batch_size)

    def _keys(self, cells: Tensor, items: Tensor, batch_size: int) -> Tensor:
        """(K,) row * N + feature of cells place * B + row."""
        places = torch.div(cells, batch_size, rounding_mode="trunc")
        rows = cells - places * batch_size
        return rows.mul_(self.firing.num_features).add_(items.index_select(0, places))

    def below(self, rows: Tensor, nodes: Tensor) -> tuple[Tensor, Tensor]:
        firing = self.firing
        which, children = firing.children.expand(nodes)
        lift = (self.shared_BR[rows[which]] * firing.scaled_NR[children]).sum(dim=1)
        noise = torch.randn(len(children), generator=self.generator, device=lift.device, dtype=lift.dtype)
        fires = lift + noise > firing.cuts_N[children]
        return which[fires], children[fires]


def _rate(normal: Tensor) -> Tensor:
    """The rate of a Poisson process that has a point as often as a standard normal variable is below `normal`."""
    return -torch.log1p(-torch.special.ndtr(normal))


def _positive(values: Tensor) -> Tensor:
    """(K,) places of positive entries, counted row after row. On a CPU numpy finds them, in a fifth of torch's time."""
    if values.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(values.numpy() > 0))
    return (values > 0).view(-1).nonzero().squeeze(1)


def _products(columns: _Columns, shared_SB: Tensor, points: Tensor, ends: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cells place * B + row that are above their level, by how much, and how much all `points` are.

    `points` ascend by place; those of place i end at `ends[i]`. The table of all cells is never there at once.
    """
    batch_size, count = shared_SB.shape[1], len(columns.items)
    at_once = max(1, _CELLS_IN_CACHE // batch_size)
    starts = range(0, count, at_once)
    stops = ends[[min(start + at_once, count) - 1 for start in starts]].tolist()
    block = shared_SB.new_empty(min(at_once, count) * batch_size)
    at_points = shared_SB.new_empty(len(points))
    cells: list[Tensor] = [points.new_empty(0)]
    above: list[Tensor] = [block.new_empty(0)]
    seen = 0
    for start, stop in zip(starts, stops, strict=True):
        scaled = columns.scaled_TS[start : start + at_once]
        values = block[: len(scaled) * batch_size]
        torch.mm(scaled, shared_SB, out=values.view(len(scaled), batch_size))
        found = _positive(values)
        above.append(values.index_select(0, found))
        cells.append(found.add_(start * batch_size))
        torch.index_select(values, 0, points[seen:stop] - start * batch_size, out=at_points[seen:stop])
        seen = stop
    return torch.cat(cells), torch.cat(above), at_points


def _thresholds(probabilities: Tensor) -> Tensor:
    """The points that a standard normal variable exceeds with these probabilities; -inf for 1."""
    return (-torch.special.ndtri(probabilities.double())).to(probabilities.dtype)
