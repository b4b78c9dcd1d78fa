"""The nested L1 architecture: the loss by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sae_core import SAE, StepContext, TrainConfig, Trainer, create
from sae_core.errors import ConfigError
from sae_synthetic import (
    ActivationGenerator,
    FeatureDictionary,
    HierarchyNode,
    SyntheticActivationIterator,
    firing_probabilities_for_rates,
    hierarchy_modifier,
    init_sae_to_match_feature_dict,
    match_features,
    mean_correlation_coefficient,
)
from sae_synthetic.experiments.tree import DRAWN
from sae_synthetic.matryoshka_l1 import drawn_widths


def _by_hand(sae: torch.nn.Module, x: torch.Tensor, widths: list[int], weight: float, l1: float) -> torch.Tensor:
    f = torch.relu((x - sae.b_dec) @ sae.W_enc + sae.b_enc)
    total = x.new_zeros(())
    for width in widths:
        part = f[:, :width]
        error = (part @ sae.W_dec[:width] + sae.b_dec - x).square().sum(1).mean()
        penalty = (part * sae.W_dec[:width].norm(dim=1)).sum(1).mean()
        total = total + (1.0 if width == widths[-1] else weight) * (error + l1 * penalty)
    return total


def test_the_loss_is_the_weighted_sum_over_levels() -> None:
    sae = create("matryoshka_l1", d_in=6, d_sae=8, matryoshka_widths=(2, 5), inner_weight=0.25, l1_coefficient=0.3)
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(sae.training_step(x).loss, _by_hand(sae, x, [2, 5, 8], 0.25, 0.3))


def test_a_detached_inner_level_learns_from_its_own_loss_alone() -> None:
    sae = create("matryoshka_l1", d_in=6, d_sae=8, matryoshka_widths=(3,), detach_inner=True, l1_coefficient=0.3)
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(1))
    sae.training_step(x).loss.backward()
    inner = sae.W_dec.grad[:3].clone()
    sae.zero_grad()
    _by_hand(sae, x, [3], 1.0, 0.3).backward()
    torch.testing.assert_close(inner, sae.W_dec.grad[:3])


def test_without_inner_levels_it_is_the_standard_sae() -> None:
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(1))
    ours = create("matryoshka_l1", d_in=6, d_sae=8, l1_coefficient=0.3)
    standard = create("standard", d_in=6, d_sae=8, l1_coefficient=0.3)
    standard.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours.training_step(x).loss, standard.training_step(x).loss)


@pytest.mark.parametrize("widths", [(4, 2), (0,), (8,)])
def test_impossible_widths_are_refused(widths: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="matryoshka_widths"):
        create("matryoshka_l1", d_in=6, d_sae=8, matryoshka_widths=widths)


def test_random_widths_are_drawn_anew_for_every_batch_and_again_the_same_when_resumed() -> None:
    sae = create("matryoshka_l1", d_in=6, d_sae=8, random_widths=3, inner_weight=0.5, l1_coefficient=0.3)
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(1))
    seen = set()
    for progress in torch.linspace(0, 1, 50).tolist():
        widths = list(drawn_widths(3, 8, progress))
        seen.add(tuple(widths))
        found = sae.training_step(x, StepContext(progress=progress)).loss
        torch.testing.assert_close(found, _by_hand(sae, x, [*widths, 8], 0.5, 0.3))
        assert widths == list(drawn_widths(3, 8, progress))
    assert len(seen) > 20


def test_small_widths_are_drawn_more_often_than_large_ones_and_none_twice() -> None:
    counts = torch.zeros(65)
    for step in range(4000):
        for width in drawn_widths(1, 64, step / 4000):
            counts[width] += 1
    assert counts[0] == counts[64] == 0
    for width in (1, 7, 28):  # P(width <= w) = sqrt(w) / sqrt(63)
        assert float(counts[: width + 1].sum()) / 4000 == pytest.approx((width / 63) ** 0.5, abs=0.03)
    assert drawn_widths(7, 8, 0.5) == (1, 2, 3, 4, 5, 6, 7)


def test_sorted_latents_nest_by_what_they_contribute_to_the_batch() -> None:
    settings: dict[str, object] = {"d_in": 6, "d_sae": 8, "matryoshka_widths": (2, 5), "l1_coefficient": 0.3}
    sae = create("matryoshka_l1", sort_latents=True, **settings)
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        sae.W_dec *= torch.tensor([0.1, 0.5, 2.0, 0.2, 1.0, 3.0, 0.3, 1.5])[:, None]
        f = torch.relu((x - sae.b_dec) @ sae.W_enc + sae.b_enc) * sae.W_dec.norm(dim=1)
        order = sorted(range(8), key=lambda i: -float(f[:, i].square().mean()))
        assert order != list(range(8))
        sorted_sae = create("matryoshka_l1", **settings)
        sorted_sae.W_dec.copy_(sae.W_dec[order])
        sorted_sae.encoder.copy_(sae.encoder[order])
    found = sae.training_step(x)
    torch.testing.assert_close(found.loss, _by_hand(sorted_sae, x, [2, 5, 8], 1.0, 0.3))
    found.loss.backward()
    assert bool((sae.W_dec.grad.abs().sum(dim=1) > 0).all())
    torch.testing.assert_close(found.codes.to_dense(), sae.encode(x))  # latents keep their places


@pytest.mark.parametrize(
    "settings",
    [
        {"random_widths": -1},
        {"random_widths": 8},
        {"random_widths": 2, "matryoshka_widths": (3,)},
        {"sort_latents": True},
    ],
)
def test_random_widths_and_an_order_without_meaning_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="random_widths"):
        create("matryoshka_l1", d_in=6, d_sae=8, **settings)


def _trained_from_the_truth_of_a_tree(**nesting: Any) -> tuple[SAE, FeatureDictionary]:
    """Two parents, each with two children that exclude each other, and two features on their own."""
    roots = [
        HierarchyNode(p, [HierarchyNode(p + 1), HierarchyNode(p + 2)], mutually_exclusive_children=True) for p in (0, 3)
    ]
    generator = ActivationGenerator(
        8,
        firing_probabilities_for_rates(roots, torch.tensor([0.2, 0.06, 0.06, 0.2, 0.06, 0.06, 0.1, 0.1])),
        std_firing_magnitudes=0.05,
        modify_activations=hierarchy_modifier(roots),
        seed=0,
    )
    features = FeatureDictionary(8, 8, seed=0)
    sae = create("matryoshka_l1", d_in=8, d_sae=8, seed=1, **nesting)
    init_sae_to_match_feature_dict(sae, features)
    plan = TrainConfig(
        total_samples=30_000, batch_size=250, lr=1e-2, lr_decay_samples=0.25, init_b_dec="zeros", progress_bar=False
    )
    Trainer(sae, SyntheticActivationIterator(features, generator, 250), plan).fit()
    return sae, features


def test_with_drawn_widths_a_tree_stays_whole_where_a_flat_dictionary_absorbs_it() -> None:
    flat, features = _trained_from_the_truth_of_a_tree(l1_coefficient=DRAWN["l1_coefficient"])
    nested, _ = _trained_from_the_truth_of_a_tree(**{**DRAWN, "random_widths": 4})
    found = match_features(nested.directions(), features.feature_vectors)
    assert float(found.cosines.mean()) >= 0.99
    assert float(found.cosines.min()) >= 0.98
    assert mean_correlation_coefficient(flat.directions(), features.feature_vectors) < 0.97
