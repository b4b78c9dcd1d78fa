"""Matching learnt features to true ones: each at most once, so that the cosines of the pairs add up to the most.

Small problems go to the Hungarian method as they are. A wide one (16,384 x 4,096 say) is solved on the best few candidates
of every row instead, which is a sparse problem, and then *proved* optimal: the solution gives every column a price and every
row a profit, and a row whose profit is at least its best cosine outside its candidates cannot gain by leaving them. Rows for
which that fails get all columns as candidates, and the problem is solved again. The result is the exact optimum either way.
"""

# A rows, B columns with A <= B, C candidates a row

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from sae_core.errors import DataError, ShapeError
from torch import Tensor

from sae_synthetic._random import derived_seed, generator_for
from sae_synthetic.features import cosine_similarities

__all__ = ["Matching", "match_features", "mean_correlation_coefficient", "random_dictionary"]

_SMALL = 512 * 2048  # entries up to which the dense method is the quicker one
_CANDIDATES = 48
_ROWS_AT_ONCE = 1024
_MOST_EDGES = 40_000_000
_SLACK = 1e-6


class Matching(NamedTuple):
    """Pairs (`a_indices[i]`, `b_indices[i]`) with their cosines, ordered by `a_indices`; all are (pairs,) tensors."""

    a_indices: Tensor
    b_indices: Tensor
    cosines: Tensor


def mean_correlation_coefficient(features_a: Tensor, features_b: Tensor, signed: bool = False) -> float:
    """Mean cosine of the best one-to-one matching of the rows of two matrices, absolute unless `signed`.

    1 means that the smaller set is found whole in the larger one, up to scale and, unless `signed`, sign.

    >>> truth = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    >>> mean_correlation_coefficient(torch.tensor([[0.0, -2.0], [1.0, 0.0]]), truth)
    1.0
    >>> mean_correlation_coefficient(torch.tensor([[0.0, -2.0], [1.0, 0.0]]), truth, signed=True)
    0.0
    """
    matching = match_features(features_a, features_b, signed=signed)
    return float((matching.cosines if signed else matching.cosines.abs()).double().mean())


def match_features(features_a: Tensor, features_b: Tensor, signed: bool = False) -> Matching:
    """The one-to-one matching of rows with the largest sum of cosines, absolute ones unless `signed`.

    Every row of the smaller matrix is matched. Raises ShapeError for matrices of different widths, DataError for values
    that are not finite.
    """
    a, b = features_a.detach().float(), features_b.detach().float()
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[1]:
        raise ShapeError(f"match_features: need two matrices of one width, found {tuple(a.shape)} and {tuple(b.shape)}")
    for name, matrix in (("first", a), ("second", b)):
        if not len(matrix):
            raise ShapeError(f"match_features: the {name} matrix has no rows, so there is nothing to match")
    for name, matrix in (("first", a), ("second", b)):
        if not bool(torch.isfinite(matrix).all()):
            raise DataError(f"match_features: the {name} matrix has values that are not finite")
    if len(a) > len(b):
        swapped = match_features(b, a, signed)
        order = torch.argsort(swapped.b_indices)
        return Matching(swapped.b_indices[order], swapped.a_indices[order], swapped.cosines[order])
    columns = _assign(a, b, signed)
    rows = torch.arange(len(a))
    pairs = torch.from_numpy(columns)
    unit_a = torch.nn.functional.normalize(a, dim=1, eps=1e-8)
    unit_b = torch.nn.functional.normalize(b[pairs.to(b.device)], dim=1, eps=1e-8)
    return Matching(rows, pairs, (unit_a * unit_b).sum(dim=1).clamp(-1, 1).cpu())


def random_dictionary(num_latents: int, hidden_dim: int, seed: int = 0) -> Tensor:
    """(num_latents, hidden_dim) random unit vectors: what a dictionary that has learnt nothing looks like.

    They share no random number with a `FeatureDictionary` of the same seed.
    """
    vectors = torch.randn(num_latents, hidden_dim, generator=generator_for(derived_seed(seed, "random dictionary")))
    return torch.nn.functional.normalize(vectors, dim=1)


def _assign(a: Tensor, b: Tensor, signed: bool) -> NDArray[np.int64]:
    """(A,) the column of every row, A <= B."""
    if len(a) * len(b) <= _SMALL or len(b) <= 2 * _CANDIDATES:
        return _dense(a, b, signed)
    candidates, cosines = _candidates(a, b, signed)
    outside = cosines[:, -1].copy()  # nothing that is left out of a row is larger than its last candidate
    rows = np.repeat(np.arange(len(a)), _CANDIDATES)
    columns, weights = candidates.ravel(), cosines.ravel()
    complete = np.zeros(len(a), dtype=bool)
    while True:
        chosen, profit = _solve_and_price(rows, columns, weights, len(a), len(b), -1.0 if signed else 0.0)
        doubtful = ~complete & ((profit < outside - _SLACK) | (chosen < 0))
        if not doubtful.any():
            return _with_free_columns(chosen, len(b))
        added = np.flatnonzero(doubtful)
        if len(rows) + len(added) * len(b) > _MOST_EDGES:
            return _dense(a, b, signed)
        kept = ~doubtful[rows]
        all_cosines = _weights(a[torch.from_numpy(added).to(a.device)], b, signed).numpy()
        rows = np.concatenate([rows[kept], np.repeat(added, len(b))])
        columns = np.concatenate([columns[kept], np.tile(np.arange(len(b)), len(added))])
        weights = np.concatenate([weights[kept], all_cosines.ravel()])
        complete |= doubtful


def _with_free_columns(chosen: NDArray[np.int64], num_columns: int) -> NDArray[np.int64]:
    """Rows that stayed single although they saw every column (-1) gain the least from each: they take what is left."""
    single = chosen < 0
    chosen[single] = np.setdiff1d(np.arange(num_columns), chosen)[: single.sum()]
    return chosen


def _weights(a: Tensor, b: Tensor, signed: bool) -> Tensor:
    cosines = cosine_similarities(a, b)
    return (cosines if signed else cosines.abs()).cpu()


def _dense(a: Tensor, b: Tensor, signed: bool) -> NDArray[np.int64]:
    from scipy.optimize import linear_sum_assignment  # scipy.optimize takes a quarter of a second to import

    _, columns = linear_sum_assignment(_weights(a, b, signed).numpy(), maximize=True)
    return columns.astype(np.int64)


def _candidates(a: Tensor, b: Tensor, signed: bool) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """(A, C) best columns of every row and their weights, best first, computed a block of rows at a time."""
    best = [torch.topk(_weights(part, b, signed), _CANDIDATES, dim=1) for part in a.split(_ROWS_AT_ONCE)]
    return torch.cat([top.indices for top in best]).numpy(), torch.cat([top.values for top in best]).numpy()


def _solve_and_price(
    rows: NDArray[np.int64],
    columns: NDArray[np.int64],
    weights: NDArray[np.float32],
    num_rows: int,
    num_columns: int,
    least: float,
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The best matching on the given edges, -1 for a row that stays single, and every row's profit.

    A private column of weight `least`, the smallest there can be, lets a row stay single when its candidates are taken.
    Prices solve v_j >= w_ij - (w_i,match(i) - v_match(i)) for every edge: longest paths, which exist because no exchange
    improves an optimal matching.
    """
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import min_weight_full_bipartite_matching

    private = np.arange(num_rows)
    all_rows = np.concatenate([rows, private])
    all_columns = np.concatenate([columns, num_columns + private])
    gains = np.concatenate([weights.astype(np.float64), np.full(num_rows, least)])
    # The solver takes a missing entry for a missing edge, so gains in [-1, 1] become costs in [1, 3].
    graph = coo_matrix((2.0 - gains, (all_rows, all_columns)), shape=(num_rows, num_columns + num_rows)).tocsr()
    matched_rows, matched_columns = min_weight_full_bipartite_matching(graph)
    chosen = np.empty(num_rows, dtype=np.int64)
    chosen[matched_rows] = matched_columns
    own_gain = np.zeros(num_rows)
    matched_edge = all_columns == chosen[all_rows]
    own_gain[all_rows[matched_edge]] = gains[matched_edge]
    prices = np.zeros(num_columns + num_rows)
    profit = own_gain.copy()
    for _ in range(num_rows):
        before = math.fsum(prices)
        np.maximum.at(prices, all_columns, gains - profit[all_rows])
        profit = own_gain - prices[chosen]
        if math.fsum(prices) - before <= 1e-9:
            break
    chosen[chosen >= num_columns] = -1
    return chosen, profit
