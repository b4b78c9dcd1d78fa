"""The Matryoshka tree toy (Nabeshima 2024): nested SAEs keep parents whole where flat ones let children absorb them.

Three parents with probability 0.15, each with three children that exclude each other and fire with 0.2 given the parent,
and eight features of 0.05 on their own; 20 orthogonal directions, values near 1. A flat L1 SAE and a nested one, both with
20 latents, get an L1 penalty that is steered to the true L0 while they train.

The third draws its nested widths anew for every batch and nests by what latents contribute. Its inner losses weigh little: they
pull a part of the children into their parent (hedging), and a small weight is enough against absorption where the penalty is
small, too. The penalty is not steered, and latents that fall silent are pointed at what is badly reconstructed.
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
BATCH, SAMPLES = 500, 2_000_000
DRAWN_SAMPLES = 600_000
STEERED: dict[str, dict[str, Any]] = {
    "flat": {"l1_coefficient": 0.1},
    "nested": {"l1_coefficient": 0.1, "matryoshka_widths": (2, 4, 7, 11, 15)},
}
DRAWN: dict[str, Any] = {"random_widths": 9, "sort_latents": True, "inner_weight": 0.05, "l1_coefficient": 0.05}
RECIPES = {**STEERED, "drawn widths": DRAWN}
PUBLISHED = {"flat": "absorbs", "nested": "", "drawn widths": "recovers the tree"}


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
    scores: dict[str, list[dict[str, float]]] = {name: [] for name in RECIPES}
    saes: dict[str, tuple[SAE, FeatureDictionary]] = {}
    true_l0 = float("nan")
    with settings.runs(len(RECIPES) * settings.seeds) as runs:
        for seed, name in itertools.product(range(settings.seeds), RECIPES):
            features, generator = world(seed)
            features.to(settings.device)
            generator.to(settings.device)
            true_l0 = float(generator.held_out().sample_codes(50_000).l0().double().mean())
            samples = settings.samples(SAMPLES if name in STEERED else DRAWN_SAMPLES, BATCH)
            training: dict[str, Any] = (
                {"lr": 3e-3, "callbacks": [SteerL0("l1_coefficient", true_l0, samples)]}
                if name in STEERED
                else {"lr": 5e-3, "resample_dead_every_samples": samples // 12, "dead_after_samples": samples // 25}
            )
            sae = runs.train(
                f"{name}, seed {seed}",
                "matryoshka_l1",
                {"d_in": WIDTH, "d_sae": FEATURES, **RECIPES[name]},
                SyntheticActivationIterator(features, generator, BATCH).batches(BATCH),
                seed,
                total_samples=samples,
                batch_size=BATCH,
                lr_decay_samples=samples // 4,
                **training,
            )
            scores[name].append(_scores(sae, features, generator))
            saes.setdefault(name, (sae, features))
    sae, features = saes["drawn widths"]
    scores["untrained"] = [_scores(untrained_like(sae), features, world(0)[1].to(settings.device))]
    mean = {name: {key: sum(s[key] for s in runs_) / len(runs_) for key in runs_[0]} for name, runs_ in scores.items()}
    return ExperimentResult(
        name="tree",
        paper="Nabeshima 2024",
        setting=f"{FEATURES} orthogonal features, {PARENTS} parents with {CHILDREN} excluding children each, true L0 "
        f"{true_l0:.2f}; {FEATURES} latents, {settings.samples(SAMPLES, BATCH):,} samples, "
        f"{settings.samples(DRAWN_SAMPLES, BATCH):,} with drawn widths, {settings.seeds} seed(s).",
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
            Claim(
                "with drawn widths the tree is recovered wholly (MCC at least 0.99)",
                min(each["mcc"] for each in scores["drawn widths"]) >= 0.99,
            ),
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
