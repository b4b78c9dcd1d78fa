"""Feature dictionaries: the true directions of a synthetic world, and how they are made nearly orthogonal.

A dictionary maps feature activations (batch, num_features) to hidden activations (batch, hidden_dim) by
``h = f @ feature_vectors + bias``. Orthogonalisation minimises the sum of squared overlaps of different features,

    sum_{i != j} (e_i . e_j)^2 + n sum_i (|e_i|^2 - 1)^2 .

The first sum is |E^T E|^2 - sum_i |e_i|^4, so its gradient is 4 (E (E^T E) - |e_i|^2 e_i): a step costs n d^2 and holds
one (d, d) matrix, never the (n, n) one, and 65,536 features in 1,024 dimensions fit in a few times their own size.
"""

# B batch, N features, D hidden_dim

from __future__ import annotations

from typing import Protocol, cast, final

import torch
import torch.nn.functional as F
from sae_core import SparseCodes
from sae_core.config import require
from sae_core.errors import ConfigError, ShapeError
from sae_core.training.optimizer import Adam
from torch import Tensor, nn
from tqdm import tqdm

from sae_synthetic._random import generator_for

__all__ = [
    "FeatureDictionary",
    "FeatureDictionaryInitializer",
    "cosine_similarities",
    "decode_codes",
    "orthogonal_initializer",
    "orthogonalize_embeddings",
]


class FeatureDictionaryInitializer(Protocol):
    """Changes the vectors of a fresh dictionary in place."""

    def __call__(self, feature_dict: FeatureDictionary, /) -> None: ...


def cosine_similarities(mat1: Tensor, mat2: Tensor | None = None) -> Tensor:
    """(rows of mat1, rows of mat2) cosines between rows; `mat2` is `mat1` by default. A zero row has cosine 0 with all.

    >>> cosine_similarities(torch.tensor([[2.0, 0.0]]), torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    tensor([[0.6000, 0.0000]])
    """
    other = mat1 if mat2 is None else mat2
    if mat1.dim() != 2 or other.dim() != 2 or mat1.shape[1] != other.shape[1]:
        raise ShapeError(
            f"cosine_similarities: need two matrices of one width, found {tuple(mat1.shape)} and {tuple(other.shape)}"
        )
    return _unit_rows(mat1) @ _unit_rows(other).T


def orthogonalize_embeddings(
    embeddings: Tensor, num_steps: int = 200, lr: float = 0.01, show_progress: bool = False, chunk_size: int = 1024
) -> Tensor:
    """Unit vectors near `embeddings` (N, D) with overlaps as small as `num_steps` of Adam make them.

    A step costs 8 N D^2 operations and, beside the vectors, the memory of one (D, D) matrix and of `chunk_size` rows.
    Raises ConfigError for settings that make no sense, ShapeError for anything but a matrix.

    >>> square = orthogonalize_embeddings(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)))
    >>> bool((square @ square.T - torch.eye(8)).abs().max() < 1e-3)
    True
    """
    if embeddings.dim() != 2:
        raise ShapeError(
            f"orthogonalize_embeddings: embeddings must be (features, width), not {tuple(embeddings.shape)}"
        )
    require(num_steps >= 0, f"orthogonalize_embeddings: num_steps must be at least 0, not {num_steps}")
    require(lr > 0, f"orthogonalize_embeddings: lr must be positive, not {lr}")
    require(chunk_size > 0, f"orthogonalize_embeddings: chunk_size must be positive, not {chunk_size}")
    working = torch.promote_types(embeddings.dtype, torch.float32)
    vectors_ND = _unit_rows(embeddings.detach().to(working, copy=True)).requires_grad_()
    optimizer = Adam([vectors_ND], lr=lr, foreach=True)
    with torch.no_grad():
        vectors_ND.grad = torch.empty_like(vectors_ND)
        for _ in tqdm(range(num_steps), desc="orthogonalising", disable=not show_progress, ncols=79):
            gram_DD = vectors_ND.T @ vectors_ND
            for rows, gradient in zip(vectors_ND.split(chunk_size), vectors_ND.grad.split(chunk_size), strict=True):
                squared = rows.square().sum(dim=1, keepdim=True)
                overlap = rows @ gram_DD - squared * rows
                gradient.copy_(4 * overlap + 4 * len(vectors_ND) * (squared - 1) * rows)
            optimizer.step()
    return _unit_rows(vectors_ND.detach()).to(embeddings.dtype)


def orthogonal_initializer(
    num_steps: int = 200, lr: float = 0.01, show_progress: bool = False, chunk_size: int = 1024
) -> FeatureDictionaryInitializer:
    """An initialiser that applies `orthogonalize_embeddings` to a fresh dictionary."""

    def initialize(feature_dict: FeatureDictionary, /) -> None:
        vectors = orthogonalize_embeddings(
            feature_dict.feature_vectors.detach(), num_steps, lr, show_progress=show_progress, chunk_size=chunk_size
        )
        with torch.no_grad():
            feature_dict.feature_vectors.copy_(vectors)

    return initialize


def decode_codes(codes: SparseCodes, vectors_ND: Tensor) -> Tensor:
    """(*leading, D) sum of the active features' vectors; work follows the number of active features."""
    if codes.d_sae != vectors_ND.shape[0]:
        raise ShapeError(f"codes over {codes.d_sae} features do not fit a dictionary of {vectors_ND.shape[0]}")
    if codes.values.numel() == 0:
        return vectors_ND.new_zeros(*codes.leading_shape, vectors_ND.shape[1])
    flat = F.embedding_bag(
        codes.indices,
        vectors_ND,
        codes.row_offsets(),
        mode="sum",
        per_sample_weights=codes.values.to(vectors_ND.dtype),
        include_last_offset=True,
    )
    return flat.view(*codes.leading_shape, vectors_ND.shape[1])


@final
class FeatureDictionary(nn.Module):
    """`num_features` unit vectors in `hidden_dim` dimensions, and a bias.

    `bias` is False (none, and no gradient for it), True (a random direction of norm 1) or the norm it shall have.
    `initializer` changes the random unit vectors in place and may be None. `seed` None draws a random dictionary; a seed
    fixes it, on every device.

    >>> features = FeatureDictionary(3, 4, seed=0)
    >>> hidden = features(torch.tensor([[2.0, 0.0, 0.0]]))
    >>> bool(torch.allclose(hidden, 2 * features.feature_vectors[:1]))
    True
    """

    feature_vectors: nn.Parameter
    bias: nn.Parameter

    def __init__(
        self,
        num_features: int,
        hidden_dim: int,
        bias: bool | float = False,
        initializer: FeatureDictionaryInitializer | None = orthogonal_initializer(),  # noqa: B008 - it is a pure function
        device: str | torch.device = "cpu",
        seed: int | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("num_features", num_features), ("hidden_dim", hidden_dim)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"FeatureDictionary: {name} must be a positive integer, not {value!r}")
        self.num_features, self.hidden_dim = num_features, hidden_dim
        generator = generator_for(seed)  # on the CPU, so that a seed means the same vectors everywhere
        vectors = _unit_rows(torch.randn(num_features, hidden_dim, generator=generator))
        self.feature_vectors = nn.Parameter(vectors.to(device))
        self.bias = nn.Parameter(torch.zeros(hidden_dim, device=device), requires_grad=bool(bias))
        if bias:
            direction = torch.randn(hidden_dim, generator=generator)
            with torch.no_grad():
                self.bias.copy_(direction / direction.norm() * float(bias))
        if initializer is not None:
            initializer(self)

    def forward(self, feature_activations: Tensor | SparseCodes) -> Tensor:
        """(..., hidden_dim) from dense activations (..., num_features), a sparse COO matrix, or `SparseCodes`."""
        if isinstance(feature_activations, SparseCodes):
            return decode_codes(feature_activations, self.feature_vectors) + self.bias
        if feature_activations.shape[-1] != self.num_features:
            raise ShapeError(
                f"FeatureDictionary: activations {tuple(feature_activations.shape)} must end in {self.num_features} features"
            )
        if feature_activations.is_sparse:
            return cast("Tensor", torch.sparse.mm(feature_activations, self.feature_vectors)) + self.bias
        return feature_activations @ self.feature_vectors + self.bias


def _unit_rows(matrix: Tensor) -> Tensor:
    return matrix / matrix.norm(dim=1, keepdim=True).clamp_min(1e-8)
