"""What fires, how often, together with what, and how strongly; and that seeds mean what they say."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_core import SparseCodes
from sae_core.errors import ConfigError
from sae_synthetic import (
    ActivationGenerator,
    HierarchyNode,
    create_correlation_matrix_from_correlations,
    firing,
    firing_probabilities_for_rates,
    generate_random_low_rank_correlation_matrix,
    hierarchy_modifier,
    zipfian_firing_probabilities,
)
from scipy import stats
from torch import Tensor

Rates = Callable[[Tensor, int, Tensor], None]
ROWS = 100_000


def _fires(generator: ActivationGenerator, rows: int = ROWS) -> Tensor:
    return generator.sample_codes(rows).to_dense() > 0


def test_features_fire_at_their_probabilities(assert_rates: Rates) -> None:
    probabilities = torch.cat(
        [zipfian_firing_probabilities(300, 0.7, 0.9, 1e-4), torch.tensor([1.0, 0.5, 0.501, 0.999])]
    )
    codes = ActivationGenerator(304, probabilities, seed=1).sample_codes(ROWS)
    assert_rates(codes.firing_counts(), ROWS, probabilities)


def test_independent_features_fire_independently() -> None:
    fires = _fires(ActivationGenerator(6, torch.tensor([0.6, 0.4, 0.3, 0.2, 0.1, 0.05]), seed=2))
    patterns = (fires.long() * (2 ** torch.arange(6))).sum(1)
    counts = torch.bincount(patterns, minlength=64).double()
    p = torch.tensor([0.6, 0.4, 0.3, 0.2, 0.1, 0.05], dtype=torch.float64)
    bits = (torch.arange(64).unsqueeze(1) >> torch.arange(6)) & 1
    expected = torch.where(bits == 1, p, 1 - p).prod(1) * ROWS
    big = expected >= 5
    observed = torch.cat([counts[big], counts[~big].sum().view(1)])
    wanted = torch.cat([expected[big], expected[~big].sum().view(1)])
    assert stats.chisquare(observed.numpy(), wanted.numpy()).pvalue > 1e-4


def test_samples_of_a_batch_and_of_different_batches_differ() -> None:
    generator = ActivationGenerator(50, 0.5, seed=3)
    first, second = generator.sample(200), generator.sample(200)
    assert len(torch.cat([first, second]).unique(dim=0)) == 400


@pytest.mark.parametrize("device_dtype", ["float32", "float64", "bfloat16", "float16"])
def test_magnitudes_are_normal_around_their_means(device_dtype: str) -> None:
    means, spreads = torch.tensor([2.0, 10.0]), torch.tensor([0.3, 1.0])
    generator = ActivationGenerator(2, 1.0, spreads, means, dtype=device_dtype, seed=4)
    values = generator.sample(20_000)
    assert str(values.dtype) == f"torch.{device_dtype}"
    if device_dtype in ("float32", "float64"):
        for column in range(2):
            scaled = (values[:, column] - means[column]) / spreads[column]
            assert stats.kstest(scaled.numpy(), "norm").pvalue > 1e-4


def test_negative_magnitudes_become_zero_and_do_not_count_as_firing() -> None:
    codes = ActivationGenerator(1, 1.0, std_firing_magnitudes=1.0, mean_firing_magnitudes=0.5, seed=5).sample_codes(
        ROWS
    )
    assert bool((codes.values > 0).all())
    wanted = stats.norm.cdf(0.5)
    error = math.sqrt(wanted * (1 - wanted) / ROWS)
    assert abs(codes.values.numel() / ROWS - wanted) < 4 * error


def _pair_probability(p: float, q: float, correlation: float) -> float:
    point = [stats.norm.ppf(p), stats.norm.ppf(q)]
    return float(stats.multivariate_normal(cov=[[1, correlation], [correlation, 1]]).cdf(point))


def test_full_correlations_are_those_of_the_gaussian_copula(assert_rates: Rates) -> None:
    p = torch.tensor([0.4, 0.2, 0.1])
    matrix = create_correlation_matrix_from_correlations(3, {(0, 1): 0.6, (0, 2): -0.5, (1, 2): 0.1})
    fires = _fires(ActivationGenerator(3, p, correlation_matrix=matrix, seed=6))
    for i, j in ((0, 1), (0, 2), (1, 2)):
        together = int((fires[:, i] & fires[:, j]).sum())
        wanted = _pair_probability(float(p[i]), float(p[j]), float(matrix[i, j]))
        assert abs(together - ROWS * wanted) < 4 * math.sqrt(ROWS * wanted)
    for i in range(3):
        assert stats.binomtest(int(fires[:, i].sum()), ROWS, float(p[i])).pvalue > 1e-4


def test_low_rank_correlations_are_those_of_the_gaussian_copula() -> None:
    p = zipfian_firing_probabilities(40, 0.5, 0.5, 0.05)
    low_rank = generate_random_low_rank_correlation_matrix(40, 4, 0.28, seed=7)
    fires = _fires(ActivationGenerator(40, p, correlation_matrix=low_rank, seed=7)).double()
    full = low_rank.correlation_factor @ low_rank.correlation_factor.T
    together = fires.T @ fires
    scores = [
        (float(together[i, j]) - ROWS * wanted) / math.sqrt(ROWS * wanted * (1 - wanted))
        for i in range(0, 40, 3)
        for j in range(i + 1, 40, 3)
        for wanted in [_pair_probability(float(p[i]), float(p[j]), float(full[i, j]))]
    ]
    assert stats.kstest(scores, "norm").pvalue > 1e-4
    assert max(map(abs, scores)) < 4.5


def test_rare_features_of_a_low_rank_correlation_skip_noise_and_fire_no_differently(assert_rates: Rates) -> None:
    p = torch.linspace(0.002, 0.02, 12)
    low_rank = generate_random_low_rank_correlation_matrix(12, 3, 0.3, seed=3)
    generator = ActivationGenerator(12, p, correlation_matrix=low_rank, seed=5)
    assert len(generator._firing.seldom.items) >= 6  # type: ignore[attr-defined]
    rows = 400_000
    fires = _fires(generator, rows).double()
    assert_rates(fires.sum(0).long(), rows, p)
    together = fires.T @ fires
    full = low_rank.correlation_factor @ low_rank.correlation_factor.T
    scores = [
        (float(together[i, j]) - rows * wanted) / math.sqrt(rows * wanted)
        for i in range(12)
        for j in range(i + 1, 12)
        for wanted in [_pair_probability(float(p[i]), float(p[j]), float(full[i, j]))]
        if rows * wanted > 20
    ]
    assert len(scores) > 30
    assert stats.kstest(scores, "norm").pvalue > 1e-4
    assert max(map(abs, scores)) < 4.5


def test_a_low_rank_correlation_draws_the_same_in_blocks_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    p = zipfian_firing_probabilities(300, 0.5, 0.3, 0.002)
    low_rank = generate_random_low_rank_correlation_matrix(300, 4, 0.2, seed=3)

    def draw() -> Tensor:
        return ActivationGenerator(300, p, correlation_matrix=low_rank, seed=5).sample(64)

    whole = draw()
    assert int((whole[:, 200:] > 0).sum()) > 10  # the last block has some too
    monkeypatch.setattr(firing, "_CELLS_IN_CACHE", 64 * 7)
    assert torch.equal(draw(), whole)
    monkeypatch.setattr(firing, "_CELLS_IN_CACHE", 1)
    assert torch.equal(draw(), whole)


def test_a_low_rank_correlation_fires_alike_in_all_parts_of_a_large_batch(
    assert_rates: Rates, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(firing, "_ROWS_AT_ONCE", 30_000)
    p = torch.tensor([0.3, 0.02, 0.01, 0.005])
    low_rank = generate_random_low_rank_correlation_matrix(4, 2, 0.3, seed=3)
    fires = _fires(ActivationGenerator(4, p, correlation_matrix=low_rank, seed=5), 70_000)
    for part in fires.split(30_000):
        assert_rates(part.sum(0), len(part), p)


def test_a_low_rank_correlation_fires_like_the_same_matrix_in_full() -> None:
    low_rank = generate_random_low_rank_correlation_matrix(5, 2, 0.5, seed=8)
    full = low_rank.correlation_factor @ low_rank.correlation_factor.T + torch.diag(low_rank.correlation_diag)
    powers = 2 ** torch.arange(5)
    counts = [
        torch.bincount(
            (_fires(ActivationGenerator(5, 0.3, correlation_matrix=c, seed=9)) * powers).sum(1), minlength=32
        )
        for c in (low_rank, full.fill_diagonal_(1.0))
    ]
    assert stats.chi2_contingency(torch.stack(counts).numpy()).pvalue > 1e-4


TREE = [
    HierarchyNode(
        0,
        [
            HierarchyNode(1, scale_children_by_parent=True, children=[HierarchyNode(3), HierarchyNode(4)]),
            HierarchyNode(2, [HierarchyNode(5), HierarchyNode(6), HierarchyNode(7)], mutually_exclusive_children=True),
        ],
    ),
    HierarchyNode(
        children=[HierarchyNode(8), HierarchyNode(children=[HierarchyNode(9), HierarchyNode(10)])],
        mutually_exclusive_children=True,
    ),
]
BASE = torch.tensor([0.6, 0.7, 0.5, 0.3, 0.9, 0.4, 0.5, 0.2, 0.3, 0.4, 0.6, 0.25])


def _pattern_counts(fires: Tensor) -> dict[tuple[bool, ...], int]:
    patterns, counts = fires.unique(dim=0, return_counts=True)
    return {tuple(p): c for p, c in zip(patterns.tolist(), counts.tolist(), strict=True)}


def _same_distribution(one: Tensor, other: Tensor) -> float:
    """p-value of a chi-square test that two sets of patterns come from one distribution."""
    a, b = _pattern_counts(one), _pattern_counts(other)
    keys = sorted(a.keys() | b.keys())
    table = [[a.get(key, 0) for key in keys], [b.get(key, 0) for key in keys]]
    common = [i for i in range(len(keys)) if table[0][i] + table[1][i] >= 20]
    rest = [sum(row) - sum(row[i] for i in common) for row in table]
    compact = [[*(row[i] for i in common), left + 1] for row, left in zip(table, rest, strict=True)]
    return float(stats.chi2_contingency(compact).pvalue)


def _apply_by_hand(dense: Tensor, means: Tensor, seed: int) -> Tensor:
    """The hierarchy as its definition says, one sample at a time."""
    generator = torch.Generator().manual_seed(seed)

    scales = means.tolist()

    def clear(row: list[float], node: HierarchyNode) -> None:
        for index in node.get_all_feature_indices():
            row[index] = 0

    def active(row: list[float], node: HierarchyNode) -> bool:
        if node.feature_index is not None:
            return row[node.feature_index] > 0
        return any(active(row, child) for child in node.children)

    def visit(row: list[float], node: HierarchyNode) -> None:
        index = node.feature_index
        if index is not None and row[index] <= 0:
            clear(row, node)
            return
        if node.mutually_exclusive_children:
            firing = [child for child in node.children if active(row, child)]
            if len(firing) > 1:
                kept = int(torch.randint(len(firing), (1,), generator=generator))
                for place, child in enumerate(firing):
                    if place != kept:
                        clear(row, child)
        if node.scale_children_by_parent:
            for child in node.children:
                row[child.feature_index] *= row[index] / scales[index]
        for child in node.children:
            visit(row, child)

    rows = dense.tolist()
    for row in rows:
        for root in TREE:
            visit(row, root)
    return torch.tensor(rows)


@pytest.mark.parametrize("correlated", [False, True])
def test_sampling_from_a_hierarchy_is_drawing_everything_and_applying_it(correlated: bool) -> None:
    low_rank = generate_random_low_rank_correlation_matrix(12, 2, 0.3, seed=1) if correlated else None
    rows = 20_000
    means = torch.linspace(1.0, 2.0, 12)
    plain = ActivationGenerator(12, BASE, 0.1, means, correlation_matrix=low_rank, seed=10)
    drawn = ActivationGenerator(12, BASE, 0.1, means, hierarchy_modifier(TREE), correlation_matrix=low_rank, seed=11)
    wanted = _apply_by_hand(plain.sample(rows), means, seed=1)
    found = drawn.sample(rows)
    assert _same_distribution(found > 0, wanted > 0) > 1e-4
    for feature in (3, 4, 5):  # scaled, scaled, not scaled
        a, b = found[found[:, feature] > 0, feature], wanted[wanted[:, feature] > 0, feature]
        assert stats.ks_2samp(a.numpy(), b.numpy()).pvalue > 1e-4


def test_a_hierarchy_applied_to_given_activations_does_the_same() -> None:
    means = torch.linspace(1.0, 2.0, 12)
    generator = ActivationGenerator(12, BASE, 0.1, means, seed=12)
    dense = generator.sample(20_000)
    modifier = hierarchy_modifier(TREE)
    applied = modifier(dense, generator)
    assert _same_distribution(applied > 0, _apply_by_hand(dense, means, seed=2) > 0) > 1e-4
    assert bool(((applied > 0) <= (dense > 0)).all())
    later = ActivationGenerator(12, BASE, 0.1, means, [lambda x: x, modifier], seed=13)  # not the first modifier
    assert _same_distribution(later.sample(20_000) > 0, applied > 0) > 1e-4
    sparse = modifier(dense[:100].to_sparse(), generator)
    assert sparse.is_sparse
    assert bool(((sparse.to_dense() > 0) <= (dense[:100] > 0)).all())


def test_a_child_scales_with_its_parents_value() -> None:
    chain = HierarchyNode(0, [HierarchyNode(1, [HierarchyNode(2)], scale_children_by_parent=True)], False, True)
    means = torch.tensor([2.0, 3.0, 5.0])
    values = ActivationGenerator(
        3, 1.0, torch.tensor([0.5, 0.0, 0.0]), means, hierarchy_modifier(chain), seed=1
    ).sample(50)
    torch.testing.assert_close(values[:, 1], 3.0 * values[:, 0] / 2.0)
    torch.testing.assert_close(values[:, 2], 5.0 * values[:, 1] / 3.0)


def test_exact_rates_are_met(assert_rates: Rates) -> None:
    rates = torch.tensor([0.5, 0.3, 0.2, 0.1, 0.05, 0.04, 0.03, 0.02])
    roots = [
        HierarchyNode(0, [HierarchyNode(i) for i in (1, 3, 4)], mutually_exclusive_children=True),
        HierarchyNode(2, [HierarchyNode(i) for i in (5, 6, 7)]),
    ]
    probabilities = firing_probabilities_for_rates(roots, rates)
    generator = ActivationGenerator(8, probabilities, modify_activations=hierarchy_modifier(roots), seed=14)
    codes = generator.sample_codes(ROWS)
    assert_rates(codes.firing_counts(), ROWS, rates)
    fires = codes.to_dense() > 0
    assert int(fires[:, [1, 3, 4]].sum(1).max()) == 1


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ([0.2, 0.3, 0.1], "feature 1 is wanted with rate 0.3, its parent 0 only with 0.2"),
        ([0.5, 0.3, 0.3], "wanted together in 1.2 of the samples"),
        ([0.5, 0.0, 0.3], r"rates must be in \(0, 1\]"),
    ],
)
def test_rates_that_cannot_be_are_refused(rates: list[float], message: str) -> None:
    pair = HierarchyNode(0, [HierarchyNode(1), HierarchyNode(2)], mutually_exclusive_children=True)
    with pytest.raises(ConfigError, match=message):
        firing_probabilities_for_rates([pair], torch.tensor(rates))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(1e-3, 1.0), min_size=1, max_size=20), st.integers(1, 40), st.integers(0, 2**31))
def test_codes_are_well_formed(probabilities: list[float], rows: int, seed: int) -> None:
    codes = ActivationGenerator(len(probabilities), torch.tensor(probabilities), 0.4, seed=seed).sample_codes(rows)
    assert isinstance(codes, SparseCodes)
    keys = codes.row_ids() * codes.d_sae + codes.indices
    assert bool((keys.diff() > 0).all())  # every cell once, rows and features ascending
    assert codes.row_offsets()[0] == 0
    assert codes.row_offsets()[-1] == codes.values.numel()
    assert bool((codes.values > 0).all())


def test_a_seed_is_exact_and_none_is_random() -> None:
    def draw(seed: int | None) -> Tensor:
        generator = ActivationGenerator(30, 0.3, 0.2, seed=seed)
        return torch.cat([generator.sample(10), generator.sample(20)])

    assert torch.equal(draw(5), draw(5))
    assert not torch.equal(draw(5), draw(6))
    assert not torch.equal(draw(None), draw(None))


def test_sampling_neither_reads_nor_moves_the_global_generator() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    tree = hierarchy_modifier(HierarchyNode(0, [HierarchyNode(1)]))
    ActivationGenerator(30, 0.3, 0.2, modify_activations=tree, seed=1).sample(10)
    assert torch.equal(before, torch.get_rng_state())


def test_a_saved_position_continues_exactly_also_after_a_move() -> None:
    generator = ActivationGenerator(30, 0.3, 0.2, seed=1)
    generator.sample(10)
    state = generator.state_dict()
    wanted = generator.sample(10)
    other = ActivationGenerator(30, 0.3, 0.2, seed=99)
    other.load_state_dict(state)
    assert torch.equal(other.to("cpu").sample(10), wanted)
    fork = generator.fork(1)
    assert torch.equal(fork.sample(10), ActivationGenerator(30, 0.3, 0.2, seed=1).sample(10))


@pytest.mark.gpu
def test_a_move_to_a_gpu_and_back_keeps_the_row_of_batches() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    stay, move = (ActivationGenerator(30, 0.3, 0.2, seed=1) for _ in range(2))
    stay.sample(10)
    move.to("cuda").sample(10)
    assert torch.equal(stay.sample(10), move.to("cpu").sample(10))


def test_held_out_samples_repeat_and_are_not_those_of_training() -> None:
    generator = ActivationGenerator(30, 0.5, 0.2, seed=1)
    first = generator.held_out().sample(10)
    generator.sample(10)
    assert torch.equal(first, generator.held_out().sample(10))
    assert not torch.equal(first, ActivationGenerator(30, 0.5, 0.2, seed=1).sample(10))


def test_sparse_tensors_hold_the_same_numbers() -> None:
    dense, sparse = (
        ActivationGenerator(30, 0.3, 0.2, seed=1),
        ActivationGenerator(30, 0.3, 0.2, use_sparse_tensors=True, seed=1),
    )
    found = sparse.sample(7)
    assert found.is_sparse
    assert torch.equal(found.to_dense(), dense.sample(7))


def test_modifiers_run_in_order_and_negative_values_become_zero() -> None:
    seen: list[object] = []

    def with_owner(activations: Tensor, generator: ActivationGenerator) -> Tensor:
        seen.append(generator)
        return activations * 2

    generator = ActivationGenerator(3, 1.0, modify_activations=[lambda x: x - 3, with_owner], seed=0)
    assert generator.sample(4).tolist() == [[0.0] * 3] * 4
    raised = ActivationGenerator(3, 1.0, modify_activations=[with_owner, lambda x: x - 1.5], seed=0)
    assert raised.sample(2).tolist() == [[0.5] * 3] * 2
    assert seen[-1] is raised


def test_cost_follows_what_fires_not_how_many_features_there_are() -> None:
    def seconds(num_features: int) -> float:
        generator = ActivationGenerator(num_features, 10 / num_features, seed=0)
        generator.sample_codes(512)
        times = []
        for _ in range(5):
            started = time.process_time()
            generator.sample_codes(512)
            times.append(time.process_time() - started)
        return min(times)

    assert seconds(400_000) < 6 * seconds(4_000) + 0.002


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"firing_probabilities": 1.5},
            r"firing_probabilities must be in \(0, 1\]; found 1.5 for feature 0 \(3 such\)",
        ),
        ({"firing_probabilities": torch.tensor([0.5, 0.0, 0.1])}, "found 0 for feature 1"),
        ({"firing_probabilities": torch.tensor([0.5, float("nan"), 0.1])}, "found nan for feature 1"),
        (
            {"firing_probabilities": torch.tensor([0.5, 0.1])},
            r"firing_probabilities: shape \(2,\) does not fit 3 features",
        ),
        ({"firing_probabilities": "often"}, "firing_probabilities must be a number"),
        ({"std_firing_magnitudes": -0.1}, "std_firing_magnitudes must not be negative"),
        (
            {"mean_firing_magnitudes": torch.tensor([1.0, -2.0, 1.0])},
            "mean_firing_magnitudes .* found -2 for feature 1",
        ),
        ({"num_features": 0}, "num_features must be a positive integer"),
        ({"correlation_matrix": torch.eye(2)}, r"correlation_matrix: shape \(2, 2\) does not fit 3 features"),
        ({"correlation_matrix": 2 * torch.eye(3)}, "every diagonal entry must be 1"),
        ({"correlation_matrix": torch.eye(3) + torch.tensor([[0, 0.5, 0], [0, 0, 0], [0, 0, 0]])}, "symmetric"),
        (
            {"correlation_matrix": torch.tensor([[1, 0.9, -0.9], [0.9, 1, 0.9], [-0.9, 0.9, 1]])},
            "not positive definite .*nearest_correlation_matrix",
        ),
        ({"modify_activations": "twice"}, "is not a function"),
        ({"dtype": "int8"}, "dtype must be one of"),
        ({"seed": -1}, "seed must be a non-negative integer"),
        ({"modify_activations": hierarchy_modifier(HierarchyNode(0, [HierarchyNode(7)]))}, "only 3 features"),
    ],
)
def test_bad_settings_are_refused_at_construction_by_name(arguments: dict[str, object], message: str) -> None:
    settings_of: dict[str, object] = {"num_features": 3, "firing_probabilities": 0.5, **arguments}
    with pytest.raises(ConfigError, match=message):
        ActivationGenerator(**settings_of)  # type: ignore[arg-type]
