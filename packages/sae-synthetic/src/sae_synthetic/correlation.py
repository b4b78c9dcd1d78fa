"""Which features like to fire together: correlations of the Gaussian variable behind each feature.

Feature i fires when its standard normal variable z_i exceeds the point that a fraction p_i of the normal distribution
lies above (a Gaussian copula). A correlation matrix says how the z are related: given in full (num_features,
num_features), or in low rank as F F^T + diag(d), which needs num_features x rank numbers and scales to any width.

What is drawn at random depends on the seed alone.
"""

# N features, R rank

from __future__ import annotations

import random
import warnings
from typing import NamedTuple

import torch
from sae_core.config import require
from sae_core.errors import ConfigError
from torch import Tensor

from sae_synthetic._random import checked_seed, generator_for

__all__ = [
    "CorrelationMatrixInput",
    "LowRankCorrelationMatrix",
    "create_correlation_matrix_from_correlations",
    "generate_random_correlation_matrix",
    "generate_random_correlations",
    "generate_random_low_rank_correlation_matrix",
    "nearest_correlation_matrix",
    "validated_correlation",
]

_SMALLEST_EIGENVALUE = 1e-5  # rounding to float32 must not undo it
_SMALLEST_DIAGONAL = 0.01


class LowRankCorrelationMatrix(NamedTuple):
    """The correlation matrix F F^T + diag(d): `correlation_factor` F is (N, R), `correlation_diag` d is (N,)."""

    correlation_factor: Tensor
    correlation_diag: Tensor


CorrelationMatrixInput = Tensor | LowRankCorrelationMatrix | tuple[Tensor, Tensor]


def create_correlation_matrix_from_correlations(
    num_features: int,
    correlations: dict[tuple[int, int], float] | None = None,
    default_correlation: float = 0.0,
) -> Tensor:
    """(N, N) correlation matrix with the given pairs, and `default_correlation` elsewhere.

    Where no such matrix exists (it would not be positive definite), negative directions are cut off and the diagonal is
    set back to 1, so the result can differ from what was asked for; a warning says by how much at most.

    >>> create_correlation_matrix_from_correlations(2, {(0, 1): 0.5})
    tensor([[1.0000, 0.5000],
            [0.5000, 1.0000]])
    """
    require(num_features >= 1, f"num_features must be at least 1, not {num_features}")
    require(-1 <= default_correlation <= 1, f"default_correlation must be in [-1, 1], not {default_correlation}")
    matrix = torch.full((num_features, num_features), float(default_correlation))
    for (i, j), value in (correlations or {}).items():
        require(
            0 <= i < num_features and 0 <= j < num_features and i != j,
            f"correlations: the pair {(i, j)} must name two different features of 0 .. {num_features - 1}",
        )
        require(-1 <= value <= 1, f"correlations: the value of {(i, j)} must be in [-1, 1], not {value}")
        matrix[i, j] = matrix[j, i] = value
    return _made_definite(matrix.fill_diagonal_(1.0))


def generate_random_correlations(
    num_features: int,
    positive_ratio: float = 0.5,
    uncorrelated_ratio: float = 0.3,
    min_correlation_strength: float = 0.1,
    max_correlation_strength: float = 0.8,
    seed: int | None = None,
) -> dict[tuple[int, int], float]:
    """Random correlations of pairs (i, j) with i < j, as `create_correlation_matrix_from_correlations` takes them.

    A fraction `uncorrelated_ratio` of all pairs is left out; of the others, `positive_ratio` are positive. Strengths are
    uniform. For wide dictionaries use `generate_random_correlation_matrix`, which builds no Python objects per pair.
    """
    correlated, positive = _pair_counts(
        num_features, positive_ratio, uncorrelated_ratio, min_correlation_strength, max_correlation_strength
    )
    source = random.Random(checked_seed(seed))
    pairs = [(i, j) for i in range(num_features) for j in range(i + 1, num_features)]
    chosen = source.sample(pairs, correlated)
    signs = [1] * positive + [-1] * (correlated - positive)
    source.shuffle(signs)
    return {
        pair: sign * source.uniform(min_correlation_strength, max_correlation_strength)
        for pair, sign in zip(chosen, signs, strict=True)
    }


def generate_random_correlation_matrix(
    num_features: int,
    positive_ratio: float = 0.5,
    uncorrelated_ratio: float = 0.3,
    min_correlation_strength: float = 0.1,
    max_correlation_strength: float = 0.8,
    seed: int | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str = torch.float32,
) -> Tensor:
    """(N, N) random correlation matrix, positive definite; the arguments mean what they mean for pairs.

    Strong correlations of many pairs cannot all hold together; the matrix is then weakened until it is definite, without
    a warning, since no particular pair was asked for.
    """
    correlated, positive = _pair_counts(
        num_features, positive_ratio, uncorrelated_ratio, min_correlation_strength, max_correlation_strength
    )
    generator = generator_for(seed)
    rows, columns = torch.triu_indices(num_features, num_features, offset=1)
    chosen = torch.randperm(len(rows), generator=generator)[:correlated]
    strengths = torch.rand(correlated, generator=generator)
    strengths = min_correlation_strength + (max_correlation_strength - min_correlation_strength) * strengths
    strengths[positive:] *= -1
    matrix = torch.eye(num_features)
    matrix[rows[chosen], columns[chosen]] = strengths
    matrix[columns[chosen], rows[chosen]] = strengths
    return _made_definite(matrix, warn=False).to(device=device, dtype=dtype_of(dtype))


def generate_random_low_rank_correlation_matrix(
    num_features: int,
    rank: int,
    correlation_scale: float = 0.075,
    seed: int | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str = torch.float32,
) -> LowRankCorrelationMatrix:
    """F with independent normal entries of standard deviation `correlation_scale`, and d = 1 - |F_i|^2.

    The typical correlation of two features is correlation_scale^2 sqrt(rank). Rows of F too long to leave d at least 0.01
    are shortened; a warning counts them.
    """
    require(num_features >= 1, f"num_features must be at least 1, not {num_features}")
    require(rank >= 1, f"rank must be at least 1, not {rank}")
    require(correlation_scale >= 0, f"correlation_scale must not be negative, found {correlation_scale}")
    factor = torch.randn(num_features, rank, generator=generator_for(seed)) * correlation_scale
    squared = factor.square().sum(dim=1)
    longest = 1 - _SMALLEST_DIAGONAL
    if too_long := int((squared > longest).sum()):
        warnings.warn(
            f"low-rank correlation: {too_long} of {num_features} features are almost fully correlated and were weakened; "
            "choose a smaller rank or correlation_scale",
            stacklevel=2,
        )
        factor = factor * (longest / squared).sqrt().clamp_max(1.0).unsqueeze(1)
        squared = factor.square().sum(dim=1)
    kind = dtype_of(dtype)
    return LowRankCorrelationMatrix(factor.to(device, kind), (1 - squared).to(device, kind))


def nearest_correlation_matrix(matrix: Tensor, smallest_eigenvalue: float = 1e-4, max_steps: int = 100) -> Tensor:
    """The positive definite correlation matrix nearest to a symmetric `matrix` (N, N) in the Frobenius norm.

    Higham's alternating projections (IMA J. Numer. Anal. 22, 2002) with Dykstra's correction, in float64, then one cut
    that guarantees the smallest eigenvalue.

    >>> nearest_correlation_matrix(torch.tensor([[1.0, 2.0], [2.0, 1.0]])).round(decimals=2)
    tensor([[1., 1.],
            [1., 1.]])
    """
    if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1] or not bool(torch.isfinite(matrix).all()):
        raise ConfigError(
            f"nearest_correlation_matrix: need a square matrix of finite numbers, found {tuple(matrix.shape)}"
        )
    current = ((matrix + matrix.T) / 2).double()
    correction = torch.zeros_like(current)
    for _ in range(max_steps):
        before = current
        shifted = current - correction
        definite = _cut_spectrum(shifted, smallest_eigenvalue)
        correction = definite - shifted
        current = definite.clone().fill_diagonal_(1.0)
        if float((current - before).norm()) <= 1e-7 * float(current.norm()):
            break
    return _made_definite(current, warn=False, smallest=smallest_eigenvalue).to(matrix.dtype)


def validated_correlation(matrix: CorrelationMatrixInput, num_features: int) -> Tensor | LowRankCorrelationMatrix:
    """`matrix`, a plain pair named; ConfigError unless it is a positive definite correlation of that many features."""
    if isinstance(matrix, tuple) and len(matrix) == 2 and all(isinstance(part, Tensor) for part in matrix):
        factor, diagonal = matrix
        if factor.dim() != 2 or factor.shape[0] != num_features or diagonal.shape != (num_features,):
            raise ConfigError(
                f"correlation_matrix: factor {tuple(factor.shape)} and diagonal {tuple(diagonal.shape)} do not fit "
                f"({num_features}, rank) and ({num_features},)"
            )
        require(bool(torch.isfinite(factor).all()), "correlation_matrix: the factor has entries that are not finite")
        require(bool((diagonal > 0).all()), "correlation_matrix: correlation_diag must be positive everywhere")
        error = float((factor.double().square().sum(1) + diagonal.double() - 1).abs().max())
        tolerance = 10 * torch.finfo(factor.dtype).eps * max(1, factor.shape[1])
        require(
            error <= max(tolerance, 1e-4),
            f"correlation_matrix: the diagonal of F F^T + diag(d) must be 1; it is off by {error:.2g}",
        )
        return LowRankCorrelationMatrix(factor, diagonal)
    if not isinstance(matrix, Tensor):
        raise ConfigError(
            f"correlation_matrix must be a tensor, a LowRankCorrelationMatrix or its pair of tensors, not {matrix!r}"
        )
    if matrix.shape != (num_features, num_features):
        raise ConfigError(f"correlation_matrix: shape {tuple(matrix.shape)} does not fit {num_features} features")
    require(bool(torch.isfinite(matrix).all()), "correlation_matrix: it has entries that are not finite")
    require(bool((matrix.diagonal() - 1).abs().max() <= 1e-4), "correlation_matrix: every diagonal entry must be 1")
    require(bool((matrix - matrix.T).abs().max() <= 1e-4), "correlation_matrix: it must be symmetric")
    if int(torch.linalg.cholesky_ex(matrix.double()).info) != 0:
        smallest = float(torch.linalg.eigvalsh(matrix.double())[0])
        raise ConfigError(
            f"correlation_matrix: it is not positive definite (smallest eigenvalue {smallest:.3g}), so no variables have these "
            "correlations; sae_synthetic.nearest_correlation_matrix(matrix) gives the nearest one that is"
        )
    return matrix


def dtype_of(dtype: torch.dtype | str) -> torch.dtype:
    """The floating dtype of that name, with or without ``torch.``. Raises ConfigError.

    >>> dtype_of("bfloat16")
    torch.bfloat16
    """
    known = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
    name = str(dtype).removeprefix("torch.")
    if name not in known:
        raise ConfigError(f"dtype must be one of {', '.join(known)}, not {dtype!r}")
    return known[name]


def _pair_counts(
    num_features: int, positive_ratio: float, uncorrelated_ratio: float, weakest: float, strongest: float
) -> tuple[int, int]:
    """How many pairs are correlated, and how many of these positively."""
    require(num_features >= 1, f"num_features must be at least 1, not {num_features}")
    require(0 <= positive_ratio <= 1, f"positive_ratio must be in [0, 1], not {positive_ratio}")
    require(0 <= uncorrelated_ratio <= 1, f"uncorrelated_ratio must be in [0, 1], not {uncorrelated_ratio}")
    require(
        0 <= weakest <= strongest <= 1,
        "need 0 <= min_correlation_strength <= max_correlation_strength <= 1, "
        f"found min_correlation_strength = {weakest} and max_correlation_strength = {strongest}",
    )
    pairs = num_features * (num_features - 1) // 2
    correlated = pairs - int(pairs * uncorrelated_ratio)
    return correlated, int(correlated * positive_ratio)


def _cut_spectrum(matrix: Tensor, smallest: float) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(smallest)) @ vectors.T


def _made_definite(matrix: Tensor, *, warn: bool = True, smallest: float = _SMALLEST_EIGENVALUE) -> Tensor:
    """`matrix` itself where it is definite enough, else with its spectrum cut off and its diagonal set back to 1."""
    asked = matrix.double()
    if float(torch.linalg.eigvalsh(asked)[0]) >= smallest:
        return matrix
    # Setting the diagonal back can shrink the smallest eigenvalue by its largest entry, so the cut leaves room for that.
    fixed = _cut_spectrum(asked, smallest)
    fixed = _cut_spectrum(asked, smallest * float(fixed.diagonal().max()) * 1.5)
    scale = fixed.diagonal().rsqrt()
    fixed = fixed * scale.unsqueeze(0) * scale.unsqueeze(1)
    fixed = ((fixed + fixed.T) / 2).fill_diagonal_(1.0)
    if warn:
        change = float((fixed - asked).abs().max())
        warnings.warn(
            f"no variables have these correlations together; they were changed by up to {change:.3f}", stacklevel=3
        )
    return fixed.to(matrix.dtype)
