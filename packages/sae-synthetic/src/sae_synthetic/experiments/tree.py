"""The Matryoshka tree toy (Nabeshima 2024): nested SAEs keep parents whole where flat ones let children absorb them.

Three parents with probability 0.15, each with three children that exclude each other and fire with 0.2 given the parent,
and eight features of 0.05 on their own; 20 orthogonal directions, values near 1. A flat L1 SAE and a nested one, both with
20 latents, get an L1 penalty that is steered to the true L0 while they train.
"""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import torch
from sae_core import SAE

from sae_synthetic.absorption import structure_scores
from sae_synthetic.evaluation import eval_sae_on_synthetic_data, untrained_like
from sae_synthetic.experiments.result import Claim, ExperimentResult, Settings, mean_and_spread
from sae_synthetic.experiments.steering import SteerL0
from sae_synthetic.features import FeatureDictionary
from sae_synthetic.forest import HierarchyNode
from sae_synthetic.forest_modifier import hierarchy_modifier
from sae_synthetic.generator import ActivationGenerator
from sae_synthetic.plots import plot_sae_feature_similarity
from sae_synthetic.rates import firing_probabilities_for_rates
from sae_synthetic.source import SyntheticActivationIterator

__all__ = ["run", "world"]

PARENTS, CHILDREN, LONERS, WIDTH = 3, 3, 8, 20
FEATURES = PARENTS * (1 + CHILDREN) + LONERS
BATCH, SAMPLES, LEARNING_RATE = 500, 2_000_000, 3e-3
WIDTHS: dict[str, tuple[int, ...]] = {"flat": (), "nested": (2, 4, 7, 11, 15)}
PUBLISHED = {"flat": "absorbs", "nested": "recovers the tree"}


def world(seed: int) -> tuple[FeatureDictionary, ActivationGenerator]:
    """Directions and how they fire: parents 0, 4, 8, their children after each, then the loners."""
    roots: list[HierarchyNode] = []
    rates = torch.full((FEATURES,), 0.05)
    for parent in range(0, PARENTS * (1 + CHILDREN), 1 + CHILDREN):
        children = list(range(parent + 1, parent + 1 + CHILDREN))
        roots.append(HierarchyNode(parent, [HierarchyNode(c) for c in children], mutually_exclusive_children=True))
        rates[parent] = 0.15
        rates[children] = 0.15 * 0.2
    generator = ActivationGenerator(
        FEATURES,
        firing_probabilities_for_rates(roots, rates),
        mean_firing_magnitudes=1.0,
        std_firing_magnitudes=0.05,
        modify_activations=hierarchy_modifier(roots),
        seed=seed,
    )
    return FeatureDictionary(FEATURES, WIDTH, seed=0), generator


def run(settings: Settings) -> ExperimentResult:
    """Train both."""
    samples = settings.samples(SAMPLES, BATCH)
    scores: dict[str, list[dict[str, float]]] = {name: [] for name in WIDTHS}
    saes: dict[str, tuple[SAE, FeatureDictionary]] = {}
    true_l0 = float("nan")
    with settings.runs(len(WIDTHS) * settings.seeds) as runs:
        for seed, name in itertools.product(range(settings.seeds), WIDTHS):
            features, generator = world(seed)
            features.to(settings.device)
            generator.to(settings.device)
            true_l0 = float(generator.held_out().sample_codes(50_000).l0().double().mean())
            config: dict[str, Any] = {"matryoshka_widths": WIDTHS[name], "l1_coefficient": 0.1}
            sae = runs.train(
                f"{name}, seed {seed}",
                "matryoshka_l1",
                {"d_in": WIDTH, "d_sae": FEATURES, **config},
                SyntheticActivationIterator(features, generator, BATCH).batches(BATCH),
                seed,
                callbacks=[SteerL0("l1_coefficient", true_l0, samples)],
                total_samples=samples,
                batch_size=BATCH,
                lr=LEARNING_RATE,
                lr_decay_samples=samples // 4,
            )
            scores[name].append(_scores(sae, features, generator))
            saes.setdefault(name, (sae, features))
    sae, features = saes["nested"]
    scores["untrained"] = [_scores(untrained_like(sae), features, world(0)[1].to(settings.device))]
    mean = {name: {key: sum(s[key] for s in runs_) / len(runs_) for key in runs_[0]} for name, runs_ in scores.items()}
    return ExperimentResult(
        name="tree",
        paper="Nabeshima 2024",
        setting=f"{FEATURES} orthogonal features, {PARENTS} parents with {CHILDREN} excluding children each, true L0 "
        f"{true_l0:.2f}; {FEATURES} latents, {samples:,} samples, {settings.seeds} seed(s).",
        columns=["SAE", "published", "MCC", "absorption", "children lean", "L0", "EV"],
        rows=[
            [
                name,
                PUBLISHED.get(name, ""),
                *(mean_and_spread([s[key] for s in runs_]) for key in ("mcc", "absorption", "child_lean")),
                f"{mean[name]['l0']:.2f}",
                f"{mean[name]['explained_variance']:.3f}",
            ]
            for name, runs_ in scores.items()
        ],
        claims=[
            Claim("the flat SAE's children absorb their parents", mean["flat"]["child_lean"] > 0.1),
            Claim("the nested SAE's hardly do", mean["nested"]["child_lean"] < mean["flat"]["child_lean"] / 2),
            Claim("the nested SAE finds the features better", mean["nested"]["mcc"] > mean["flat"]["mcc"]),
        ],
        data={"scores": scores, "true_l0": true_l0},
        figures=[
            (name, partial(plot_sae_feature_similarity, sae, features, reorder_features=True, show_plot=False))
            for name, (sae, features) in saes.items()
        ],
        seconds=runs.seconds,
    )


def _scores(sae: SAE, features: FeatureDictionary, generator: ActivationGenerator) -> dict[str, float]:
    held_out = eval_sae_on_synthetic_data(sae, features, generator, num_samples=50_000, baseline=False)
    structure = structure_scores(sae, features, generator)
    return {
        "mcc": held_out.mcc,
        "l0": held_out.sae_l0,
        "explained_variance": held_out.explained_variance,
        "absorption": structure.absorption,
        "child_lean": structure.child_lean,
    }
