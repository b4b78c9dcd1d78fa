"""The true directions: their seeds, how orthogonal they become, with how much memory, and what they decode."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_core import SparseCodes
from sae_core.errors import ConfigError, ShapeError
from sae_synthetic import (
    ActivationGenerator,
    FeatureDictionary,
    cosine_similarities,
    orthogonal_initializer,
    orthogonalize_embeddings,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_seed_gives_the_dictionary_that_sae_lens_gives(golden_tensors: dict[str, Tensor]) -> None:
    features = FeatureDictionary(12, 6, bias=2.0, seed=9)
    torch.testing.assert_close(features.feature_vectors.detach(), golden_tensors["feature_vectors"], atol=1e-5, rtol=0)
    torch.testing.assert_close(features.bias.detach(), golden_tensors["bias"])


def test_orthogonalising_takes_the_steps_of_sae_lens(golden_tensors: dict[str, Tensor]) -> None:
    found = orthogonalize_embeddings(golden_tensors["b"], num_steps=30)
    torch.testing.assert_close(found, golden_tensors["orthogonal"], atol=1e-5, rtol=0)


@settings(max_examples=10, deadline=None)
@given(st.integers(3, 12), st.integers(2, 12), st.integers(1, 5))
def test_a_step_follows_the_gradient_of_the_sum_over_all_pairs(n: int, d: int, chunk: int) -> None:
    start = torch.nn.functional.normalize(_randn(n, d, seed=n * d).double(), dim=1)
    naive = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([naive], lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        gram = naive @ naive.T
        different = gram - torch.diag(gram.diagonal())
        loss = different.square().sum() + n * (naive.square().sum(1) - 1).square().sum()
        loss.backward()
        optimizer.step()
    found = orthogonalize_embeddings(start, num_steps=3, chunk_size=chunk)
    torch.testing.assert_close(found, torch.nn.functional.normalize(naive.detach(), dim=1), atol=1e-6, rtol=0)


def test_more_features_than_dimensions_come_close_to_the_least_overlap_there_is() -> None:
    n, d = 64, 32
    overlaps = cosine_similarities(orthogonalize_embeddings(_randn(n, d), num_steps=500)).fill_diagonal_(0)
    least = n * (n - d) / d  # Welch's bound on the sum of squares
    assert least <= float(overlaps.square().sum()) < 1.02 * least


class _Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation returns."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return out


def test_orthogonalising_makes_no_tensor_larger_than_the_features() -> None:
    n, d = 512, 16
    with _Largest() as largest:
        FeatureDictionary(n, d, initializer=orthogonal_initializer(num_steps=2, chunk_size=32), seed=0)
    assert largest.numbers == n * d
    with _Largest() as naive:  # the measure sees what it should
        cosine_similarities(_randn(n, d))
    assert naive.numbers == n * n


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_orthogonalising_keeps_the_dtype_and_leaves_its_input_alone(dtype: torch.dtype) -> None:
    given_vectors = _randn(8, 16).to(dtype)
    before = given_vectors.clone()
    found = orthogonalize_embeddings(given_vectors)
    assert found.dtype == dtype
    assert torch.equal(given_vectors, before)
    torch.testing.assert_close(found.float().norm(dim=1), torch.ones(8), atol=1e-2, rtol=0)


def test_vectors_are_of_norm_1_and_a_bias_has_the_norm_wanted() -> None:
    assert not bool(FeatureDictionary(5, 8, seed=0).bias.any())
    for bias, norm in ((True, 1.0), (2.5, 2.5), (0.0, 0.0)):
        features = FeatureDictionary(5, 8, bias=bias, initializer=None, seed=0)
        assert float(features.bias.detach().norm()) == pytest.approx(norm)
        torch.testing.assert_close(features.feature_vectors.detach().norm(dim=1), torch.ones(5))


def test_a_seed_of_a_dictionary_is_exact_and_none_is_random() -> None:
    def draw(seed: int | None) -> Tensor:
        return FeatureDictionary(5, 8, bias=True, seed=seed).feature_vectors.detach()

    before = torch.get_rng_state()
    assert torch.equal(draw(3), draw(3))
    assert not torch.equal(draw(3), draw(4))
    assert not torch.equal(draw(None), draw(None))
    assert torch.equal(before, torch.get_rng_state())


def test_dense_sparse_and_coded_activations_decode_alike() -> None:
    features = FeatureDictionary(40, 6, bias=1.0, initializer=None, seed=1)
    codes = ActivationGenerator(40, 0.1, 0.3, seed=2).sample_codes(50)
    dense = codes.to_dense()
    wanted = dense @ features.feature_vectors + features.bias
    for given_activations in (codes, dense, dense.to_sparse(), dense.view(5, 10, 40)):
        found = features(given_activations)
        torch.testing.assert_close(found.reshape(50, 6), wanted, atol=1e-6, rtol=1e-5)
    nothing = SparseCodes.from_dense(torch.zeros(3, 40))
    torch.testing.assert_close(features(nothing), features.bias.expand(3, 6))


def test_gradients_reach_the_vectors_through_codes() -> None:
    features = FeatureDictionary(4, 3, initializer=None, seed=1)
    dense = torch.tensor([[1.0, 0.0, 2.0, 0.0], [0.0, 0.0, 3.0, 0.0]])
    features(SparseCodes.from_dense(dense)).sum().backward()
    torch.testing.assert_close(features.feature_vectors.grad, torch.tensor([1.0, 0, 5, 0]).unsqueeze(1).expand(4, 3))


def test_cosines_of_hand_worked_rows() -> None:
    a = torch.tensor([[3.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    half = 0.5**0.5
    torch.testing.assert_close(cosine_similarities(a), torch.tensor([[1, 0, half], [0, 0, 0], [half, 0, 1]]))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: FeatureDictionary(0, 3), ConfigError, "num_features must be a positive integer, not 0"),
        (lambda: FeatureDictionary(3, 2.5), ConfigError, "hidden_dim must be a positive integer, not 2.5"),  # type: ignore[arg-type]
        (lambda: FeatureDictionary(3, 2, seed=-1), ConfigError, "seed must be a non-negative integer"),
        (lambda: orthogonalize_embeddings(torch.ones(3)), ShapeError, r"must be \(features, width\), not \(3,\)"),
        (lambda: orthogonalize_embeddings(torch.ones(3, 3), num_steps=-1), ConfigError, "num_steps must be at least 0"),
        (lambda: orthogonalize_embeddings(torch.ones(3, 3), lr=0), ConfigError, "lr must be positive"),
        (lambda: orthogonalize_embeddings(torch.ones(3, 3), chunk_size=0), ConfigError, "chunk_size must be positive"),
        (lambda: cosine_similarities(torch.ones(3, 3), torch.ones(3, 2)), ShapeError, "two matrices of one width"),
        (
            lambda: FeatureDictionary(3, 2, initializer=None)(torch.ones(5, 4)),
            ShapeError,
            r"\(5, 4\) must end in 3 features",
        ),
        (
            lambda: FeatureDictionary(3, 2, initializer=None)(SparseCodes.from_dense(torch.ones(5, 4))),
            ShapeError,
            "codes over 4 features do not fit a dictionary of 3",
        ),
    ],
)
def test_wrong_sizes_and_settings_are_named(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_a_dictionary_without_a_bias_learns_none() -> None:
    assert not FeatureDictionary(4, 3, seed=0).bias.requires_grad
    assert not FeatureDictionary(4, 3, bias=0.0, seed=0).bias.requires_grad
    assert FeatureDictionary(4, 3, bias=0.5, seed=0).bias.requires_grad
    assert FeatureDictionary(4, 3, seed=0).feature_vectors.requires_grad
