"""Trees of features: their shape, what is impossible, how they are generated, and how probabilities make up for them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_core.errors import ConfigError, FormatError, ShapeError
from sae_synthetic import (
    ActivationGenerator,
    ConstantFiringProbabilityConfig,
    ConstantMagnitudeConfig,
    Hierarchy,
    HierarchyConfig,
    HierarchyModifier,
    HierarchyNode,
    SyntheticModel,
    SyntheticModelConfig,
    SyntheticSource,
    SyntheticSourceConfig,
    ZipfianFiringProbabilityConfig,
    generate_hierarchy,
    hierarchy_modifier,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

Node = HierarchyNode
HALF = ConstantFiringProbabilityConfig(0.5)


def test_generated_hierarchies_are_those_of_sae_lens(golden_numbers: dict[str, Any]) -> None:
    for case in golden_numbers["hierarchies"]:
        config = HierarchyConfig.from_dict(case["config"])
        found = generate_hierarchy(case["num_features"], config, case["seed"])
        assert found.to_dict()["roots"] == case["roots"]


def _loop() -> list[HierarchyNode]:
    child = Node(1)
    root = Node(0, [child])
    child.children.append(root)
    return [root]


def _two_parents() -> list[HierarchyNode]:
    shared = Node(2)
    return [Node(0, [shared]), Node(1, [shared])]


def _emptied_group() -> list[HierarchyNode]:
    root = Node(0, [Node(1), Node(2)], mutually_exclusive_children=True)
    root.children.pop()
    return [root]


IMPOSSIBLE: list[tuple[Callable[[], list[HierarchyNode]], str]] = [
    (_loop, r"feature_index 0\): loop, it is below itself"),
    (_two_parents, r"feature_index 2\): it has two parents, .*feature_index 0\) and .*feature_index 1\)"),
    (lambda: [Node(0, [Node(1), Node(1)])], r"feature_index 1\): the feature occurs twice"),
    (lambda: [Node(0, [Node(1)]), Node(1)], r"feature_index 1\): the feature occurs twice"),
    (lambda: [Node(0, [Node(0)])], r"feature_index 0\): the feature occurs twice"),
    (_emptied_group, "mutually_exclusive_children needs at least 2 children, found 1"),
    (lambda: [Node(children=[Node(0)], scale_children_by_parent=True)], "scale_children_by_parent on a group"),
]


@pytest.mark.parametrize(("make", "message"), IMPOSSIBLE)
def test_impossible_trees_are_refused_when_the_modifier_is_made(
    make: Callable[[], list[HierarchyNode]], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        hierarchy_modifier(make())


@pytest.mark.parametrize(("make", "message"), [case for case in IMPOSSIBLE if "scale" not in case[1]])
def test_impossible_trees_are_refused_by_validate_and_by_a_hierarchy(
    make: Callable[[], list[HierarchyNode]], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        Hierarchy(make())
    with pytest.raises(ConfigError, match=message):
        Node(children=make()).validate()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Node(-1), "feature_index must be an integer from 0"),
        (lambda: Node(1.5), "feature_index must be an integer from 0"),
        (lambda: Node(0, [Node(1)], mutually_exclusive_children=True), "needs at least 2 children, found 1"),
        (lambda: Node.from_dict({"feature_index": 0, "childs": []}), "keys among children"),
        (lambda: Hierarchy.from_dict({"trees": []}), "single key 'roots'"),
        (lambda: HierarchyConfig(total_root_nodes=0), "total_root_nodes must be at least 1"),
        (lambda: HierarchyConfig(branching_factor=1), "branching_factor must be at least 2"),
        (lambda: HierarchyConfig(branching_factor=(4, 2)), "branching_factor must be at least 2, in order"),
        (lambda: HierarchyConfig(max_depth=0), "max_depth must be at least 1"),
        (lambda: HierarchyConfig(mutually_exclusive_portion=1.1), "mutually_exclusive_portion must be in"),
        (lambda: HierarchyConfig(mutually_exclusive_min_depth=-1), "mutually_exclusive_min_depth must not be negative"),
        (
            lambda: HierarchyConfig(mutually_exclusive_min_depth=2, mutually_exclusive_max_depth=1),
            "mutually_exclusive_max_depth 1 is below",
        ),
        (lambda: HierarchyConfig.from_dict({"total_root_node": 3}), "total_root_node"),
        (lambda: generate_hierarchy(0, HierarchyConfig(total_root_nodes=6)), "num_features must be at least 1, not 0"),
        (
            lambda: ActivationGenerator(3, 0.1, modify_activations=hierarchy_modifier(Node(0, [Node(7)]))),
            r"feature_index 7\): there are only 3 features",
        ),
    ],
)
def test_impossible_settings_are_refused_by_name(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_a_tree_survives_json_and_reads_the_older_name_of_an_identity() -> None:
    tree = Node(0, [Node(1, feature_id="cat"), Node(children=[Node(2), Node(3)])], True, True, "animal")
    again = Node.from_dict(json.loads(json.dumps(tree.to_dict())))
    assert again.to_dict() == tree.to_dict()
    assert again.get_all_feature_indices() == [0, 1, 2, 3]
    assert Node.from_dict({"feature_index": 5, "id": 7}).feature_id == "7"
    assert repr(tree) == "0 [animal] (exclusive children)\n  1 [cat]\n  group\n    2\n    3"


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 6),
    st.one_of(st.integers(2, 4), st.tuples(st.integers(2, 3), st.integers(3, 5))),
    st.integers(1, 4),
    st.floats(0, 1),
    st.integers(6, 80),
    st.integers(0, 99),
)
def test_generated_forests_have_the_shape_asked_for(
    roots: int, branching: int | tuple[int, int], depth: int, portion: float, num_features: int, seed: int
) -> None:
    config = HierarchyConfig(roots, branching, depth, portion, mutually_exclusive_min_depth=1)
    forest = generate_hierarchy(num_features, config, seed)
    fewest, most = config.branching_range
    level, before, full = forest.roots, 0, True
    used: list[int | None] = []
    eligible = exclusive = 0
    for below in range(depth + 1):
        used += [node.feature_index for node in level]
        assert used[before:] == list(range(before, before + len(level)))  # level by level, in order
        before += len(level)
        for node in level:
            full = full and fewest <= len(node.children) <= most
            assert len(node.children) <= most
            assert below < depth or not node.children
            eligible += below >= 1 and len(node.children) >= 2
            exclusive += node.mutually_exclusive_children
            assert below >= 1 or not node.mutually_exclusive_children
        level = [child for node in level for child in node.children]
    assert not level
    assert exclusive == int(eligible * portion)
    assert forest.feature_indices_used == set(used)


def test_a_seed_of_a_hierarchy_is_exact_and_none_is_random() -> None:
    config = HierarchyConfig(4, (2, 6), 3, 0.5)
    one, same, other = (generate_hierarchy(500, config, seed).to_dict() for seed in (1, 1, 2))
    assert one == same != other
    assert generate_hierarchy(500, config).to_dict() != generate_hierarchy(500, config).to_dict()


def test_correction_factors_of_a_hand_worked_tree() -> None:
    tree = Node(0, [Node(1, [Node(3)]), Node(2)], mutually_exclusive_children=True)
    factors = Hierarchy([tree]).compute_probability_correction_factors(torch.tensor([0.5, 0.2, 0.1, 0.1, 0.3]))
    wanted = [1, 2 * (1 + 0.1 / 0.5), 2 * (1 + 0.2 / 0.5), 1 / 0.2, 1]
    torch.testing.assert_close(factors, torch.tensor(wanted))


def test_compensated_probabilities_that_end_at_1_are_reported() -> None:
    def model(least: float) -> SyntheticModelConfig:
        return SyntheticModelConfig(
            num_features=15,
            hidden_dim=4,
            firing_probability=ZipfianFiringProbabilityConfig(0.5, 0.3, least),
            hierarchy=HierarchyConfig(5, 2, 1, 1.0, compensate_probabilities=True),
            seed=0,
        )

    with pytest.warns(UserWarning, match=r"compensate_probabilities: \d+ of 15 features would need .* more than 1"):
        clamped = SyntheticModel(model(0.25))
    assert float(clamped.activation_generator.firing_probabilities.max()) == 1
    assert float(SyntheticModel(model(0.001)).activation_generator.firing_probabilities.max()) < 1


def test_a_modifier_alone_needs_the_means_only_to_scale() -> None:
    plain, scaled = (hierarchy_modifier(Node(0, [Node(1)], scale_children_by_parent=flag)) for flag in (False, True))
    given_activations = torch.tensor([[2.0, 3.0], [0.0, 3.0]])
    assert plain(given_activations).tolist() == [[2.0, 3.0], [0.0, 0.0]]
    with pytest.raises(ConfigError, match="scale_children_by_parent needs the features' mean magnitudes"):
        scaled(given_activations)
    with pytest.raises(ShapeError, match=r"must be \(batch, features\), not \(2,\)"):
        plain(torch.ones(2))
    assert scaled(given_activations, ActivationGenerator(2, 0.5, mean_firing_magnitudes=4.0)).tolist() == [
        [2.0, 1.5],
        [0.0, 0.0],
    ]


def test_excluding_children_are_chosen_evenly_whatever_group_they_are_in() -> None:
    tree = Node(
        children=[Node(0), Node(children=[Node(1), Node(2)]), Node(3)],
        mutually_exclusive_children=True,
    )
    applied = hierarchy_modifier(tree)(torch.ones(30_000, 4)) > 0
    patterns, counts = applied.unique(dim=0, return_counts=True)
    assert sorted(patterns.long().tolist()) == [[0, 0, 0, 1], [0, 1, 1, 0], [1, 0, 0, 0]]
    assert bool(((counts - 10_000).abs() < 4 * (30_000 * 2 / 9) ** 0.5).all())


def test_many_samples_of_a_wide_forest_stay_consistent() -> None:
    forest = generate_hierarchy(2000, HierarchyConfig(40, (2, 5), 4, 0.6), seed=3)
    codes = ActivationGenerator(2000, 0.4, 0.1, modify_activations=forest.modifier, seed=1).sample_codes(50)
    fires: Tensor = codes.to_dense() > 0
    for root in forest.roots:
        for node in root.walk():
            below = [child.feature_index for child in node.children]
            if below:
                assert bool((fires[:, below].any(1) <= fires[:, node.feature_index]).all())
            if node.mutually_exclusive_children:
                assert int(fires[:, below].sum(1).max()) <= 1


def test_features_may_run_out_among_the_roots() -> None:
    shape = HierarchyConfig(total_root_nodes=6, branching_factor=2)
    assert generate_hierarchy(5, shape, seed=0) == Hierarchy([Node(index) for index in range(5)])
    model = SyntheticModel(SyntheticModelConfig(num_features=5, hidden_dim=2, hierarchy=shape, seed=0))
    assert model.hierarchy is not None
    assert model.hierarchy.feature_indices_used == set(range(5))


def test_trees_are_equal_when_they_say_the_same() -> None:
    def tree(**changed: Any) -> Node:
        return Node(**{"feature_index": 0, "children": [Node(1), Node(2)], "feature_id": "a", **changed})

    assert tree() == tree()
    assert Hierarchy([tree()]) == Hierarchy([tree()], modifier=None)
    different: list[dict[str, Any]] = [
        {"feature_index": 3},
        {"children": [Node(2), Node(1)]},
        {"children": [Node(1)]},
        {"children": [Node(1), Node(2, [Node(3)])]},
        {"mutually_exclusive_children": True},
        {"scale_children_by_parent": True},
        {"feature_id": "b"},
    ]
    for changed in different:
        assert tree() != tree(**changed), changed
        assert Hierarchy([tree()]) != Hierarchy([tree(**changed)]), changed
    assert Hierarchy([tree()]) != Hierarchy([])
    assert tree() != 0
    assert Hierarchy([]) != []


def test_a_hierarchy_made_by_hand_has_the_modifier_of_its_roots() -> None:
    chain = [Node(0, [Node(1)])]
    assert Hierarchy(chain).modifier is not None
    assert Hierarchy(chain, modifier=None).modifier is None
    config = SyntheticModelConfig(num_features=2, hidden_dim=2, firing_probability=HALF, seed=0)
    codes = SyntheticModel(config, hierarchy=Hierarchy(chain)).sample_with_features(400)[1]
    assert bool((codes[:, 1] > 0).any())
    assert not bool(((codes[:, 1] > 0) & (codes[:, 0] == 0)).any())


def test_below_a_parent_that_never_fires_no_factor_helps() -> None:
    tree = Node(0, [Node(1), Node(2)], mutually_exclusive_children=True)
    factors = Hierarchy([tree]).compute_probability_correction_factors(torch.tensor([0.0, 0.5, 0.25]))
    assert factors.tolist() == [1.0, 1.0, 1.0]


SCALING = Node(0, [Node(1)], scale_children_by_parent=True)


def _zero_mean_model(**settings: Any) -> SyntheticModelConfig:
    return SyntheticModelConfig(
        num_features=6,
        hidden_dim=2,
        hierarchy=HierarchyConfig(2, 2, 1, scale_children_by_parent=True),
        std_firing_magnitudes=0.5,
        seed=0,
        **settings,
    )


def _saved_with_zero_mean(folder: Path) -> SyntheticModel:
    SyntheticModel(_zero_mean_model()).save(folder)
    file = folder / "synthetic_model.safetensors"
    tensors = load_file(file)
    tensors["mean_firing_magnitudes"][1] = 0
    save_file(tensors, file)
    return SyntheticModel.load_from_disk(folder)


@pytest.mark.parametrize(
    "make",
    [
        lambda _: ActivationGenerator(
            2, 0.5, 0.5, torch.tensor([0.0, 1.0]), modify_activations=hierarchy_modifier(SCALING)
        ),
        lambda _: ActivationGenerator(
            2, 0.5, 0.5, torch.tensor([0.0, 1.0]), modify_activations=[torch.relu, hierarchy_modifier(SCALING)]
        ),
        lambda _: ActivationGenerator(
            2, 0.5, 0.5, torch.tensor([1e-44, 1.0]), modify_activations=hierarchy_modifier(SCALING)
        ),
        lambda _: SyntheticModel(_zero_mean_model(mean_firing_magnitudes=0.0)),
        lambda _: SyntheticModel(_zero_mean_model(mean_firing_magnitudes=ConstantMagnitudeConfig(0.0))),
        lambda _: SyntheticSource(
            SyntheticSourceConfig(
                num_features=6,
                d_in=2,
                hierarchy={"total_root_nodes": 2, "branching_factor": 2, "scale_children_by_parent": True},
                mean_firing_magnitudes=0.0,
                std_firing_magnitudes=0.5,
            )
        ),
        _saved_with_zero_mean,
    ],
)
def test_scaling_by_a_parent_of_mean_zero_is_refused_before_anything_is_drawn(make: Any, tmp_path: Path) -> None:
    with pytest.raises(
        (ConfigError, FormatError), match=r"scale_children_by_parent divides by the mean of feature [01]"
    ):
        make(tmp_path)


def test_scaling_activations_drawn_elsewhere_by_a_parent_of_mean_zero_is_refused() -> None:
    class Means:
        mean_firing_magnitudes = torch.tensor([0.0, 1.0])

    modifier = hierarchy_modifier(SCALING)
    fires = torch.tensor([[2.0, 3.0]])
    for activations in (fires, fires.to_sparse(), torch.cat([fires, torch.zeros(40, 2)])):
        with pytest.raises(ConfigError, match="divides by the mean magnitude of feature 0, which is 0"):
            modifier(activations, Means())
    silent = torch.tensor([[0.0, 3.0]])
    assert modifier(silent, Means()).tolist() == [[0.0, 0.0]]  # no parent fires, so nothing is divided


def test_a_parent_that_never_fires_scales_nothing() -> None:
    never = ActivationGenerator(
        2, 0.5, 0.0, torch.tensor([0.0, 1.0]), modify_activations=hierarchy_modifier(SCALING), seed=0
    )
    assert not bool(never.sample(50).any())


@pytest.mark.parametrize("layout", ["dense", "sparse", "few in many"])
def test_values_that_are_not_positive_pass_unless_their_parent_is_silent(layout: str) -> None:
    tree = Node(0, [Node(1, [Node(2)])], scale_children_by_parent=True)
    given = torch.tensor([[2.0, -3.0, 5.0, -1.0], [-2.0, 3.0, 5.0, 4.0], [4.0, 1.0, -5.0, 0.0]])
    wanted = torch.tensor([[2.0, -6.0, 0.0, -1.0], [-2.0, 0.0, 0.0, 4.0], [4.0, 4.0, -5.0, 0.0]])

    class Means:
        mean_firing_magnitudes = torch.ones(4)

    if layout == "few in many":
        given, wanted = (torch.cat([part, torch.zeros(200, 4)]) for part in (given, wanted))
    found = hierarchy_modifier(tree)(given.to_sparse() if layout == "sparse" else given, Means())
    assert torch.equal(found.to_dense(), wanted)
    nothing = given.to_sparse() if layout == "sparse" else given
    assert torch.equal(hierarchy_modifier([])(nothing).to_dense(), given)


@given(seed=st.integers(0, 10_000), density=st.sampled_from([0.02, 0.3, 1.0]))
@settings(max_examples=40, deadline=None)
def test_dense_and_sparse_activations_obey_one_hierarchy(seed: int, density: float) -> None:
    """Without groups there is no chance in it, so all layouts agree; with groups all obey the rules."""
    source = torch.Generator().manual_seed(seed)
    shape = HierarchyConfig(3, (2, 4), 3, scale_children_by_parent=bool(seed % 2))
    activations = torch.rand(8, 60, generator=source) * (torch.rand(8, 60, generator=source) < density)

    class Means:
        mean_firing_magnitudes = torch.rand(60, generator=source) + 0.5

    plain = generate_hierarchy(50, shape, seed)
    dense = HierarchyModifier(plain.roots)._modify_dense(activations, Means.mean_firing_magnitudes, source)
    sparse = hierarchy_modifier(plain.roots)(activations.to_sparse(), Means())
    torch.testing.assert_close(dense, sparse.to_dense())
    grouped = generate_hierarchy(50, replace(shape, mutually_exclusive_portion=0.8), seed)
    result = HierarchyModifier(grouped.roots)._modify_dense(activations, Means.mean_firing_magnitudes, source)
    for node in (node for root in grouped.roots for node in root.walk()):
        fires = result[:, [child.feature_index for child in node.children]] > 0
        assert not bool((fires.any(dim=1) & ~(result[:, node.feature_index] > 0)).any())
        if node.mutually_exclusive_children:
            assert int(fires.sum(dim=1).max()) <= 1
            could = (dense[:, [child.feature_index for child in node.children]] > 0).any(dim=1)
            could &= result[:, node.feature_index] > 0
            assert torch.equal(fires.any(dim=1), could), "a group loses all but one, never all"


def test_choices_in_dense_activations_are_uniform_over_what_fires() -> None:
    tree = Node(0, [Node(1), Node(2), Node(3), Node(None, [Node(4), Node(5)])], mutually_exclusive_children=True)
    activations = torch.ones(8000, 6)
    activations[:, 3] = 0  # it does not compete
    left = hierarchy_modifier(tree)(activations)
    shares = (left[:, 1:] > 0).double().mean(dim=0).tolist()
    assert shares == pytest.approx([1 / 3, 1 / 3, 0, 1 / 3, 1 / 3], abs=0.02)
    assert torch.equal(left[:, 4], left[:, 5]), "a group counts as one"
