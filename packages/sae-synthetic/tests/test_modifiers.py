"""Plain functions as modifiers: how they are called, in which order, and what they must return."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sae_core import SparseCodes
from sae_core.errors import ConfigError, ShapeError
from sae_synthetic import ActivationGenerator, HierarchyNode, SparseModifier, hierarchy_modifier
from torch import Tensor


def _sample(modifier: Any, num_features: int = 3) -> Tensor:
    return ActivationGenerator(num_features, 1.0, modify_activations=modifier, seed=0).sample(4)


class Halving:
    """A modifier that needs no dense activations."""

    def __call__(self, activations: Tensor) -> Tensor:
        raise AssertionError("made dense")

    def modify_codes(self, codes: SparseCodes, means: Tensor | None, random_source: torch.Generator) -> SparseCodes:
        assert means is not None
        return codes.with_values(codes.values / (2 * means[codes.indices]))


def test_a_sparse_modifier_never_sees_dense_activations() -> None:
    assert isinstance(Halving(), SparseModifier)
    assert not isinstance(torch.relu, SparseModifier)
    assert _sample(Halving()).tolist() == [[0.5] * 3] * 4


def test_functions_of_any_kind_are_modifiers() -> None:
    class Method:
        def twice(self, activations: Tensor) -> Tensor:
            return activations * 2

    def with_default(activations: Tensor, factor: float = 4.0) -> Tensor:
        return activations * factor

    assert _sample(Method().twice).tolist() == [[2.0] * 3] * 4
    assert _sample(with_default).tolist() == [[4.0] * 3] * 4  # a default is not the generator
    assert _sample(torch.sqrt).tolist() == [[1.0] * 3] * 4  # a builtin has no signature
    assert _sample([]).tolist() == _sample(None).tolist()


def test_a_hierarchy_that_is_not_first_is_applied_to_what_came_before() -> None:
    def silence_first(activations: Tensor) -> Tensor:
        changed = activations.clone()
        changed[:, 0] = 0
        return changed

    chain = hierarchy_modifier(HierarchyNode(0, [HierarchyNode(1)]))
    assert _sample([silence_first, chain]).tolist() == [[0.0, 0.0, 1.0]] * 4
    assert _sample([chain, silence_first]).tolist() == [[0.0, 1.0, 1.0]] * 4


def test_a_sparse_result_is_taken_too() -> None:
    assert _sample(lambda x: x.to_sparse()).tolist() == [[1.0] * 3] * 4


@pytest.mark.parametrize(
    ("modifier", "error", "message"),
    [
        (lambda x: x[:, :2], ShapeError, r"returned \(4, 2\) for activations \(4, 3\)"),
        (lambda x: None, ShapeError, "returned NoneType for activations"),
        (3, ConfigError, "modify_activations: 3 is not a function of activations"),
        ([torch.relu, "twice"], ConfigError, "modify_activations: 'twice' is not a function"),
    ],
)
def test_what_is_no_modifier_is_refused_by_name(modifier: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        _sample(modifier)


def test_a_generator_shows_its_modifiers_as_they_were_given() -> None:
    def shown(modifiers: Any) -> Any:
        return ActivationGenerator(3, 1.0, modify_activations=modifiers, seed=0).modify_activations

    assert shown(None) is None
    assert shown([]) is None
    assert shown(torch.relu) is torch.relu
    assert shown([torch.relu, torch.sqrt]) == (torch.relu, torch.sqrt)
