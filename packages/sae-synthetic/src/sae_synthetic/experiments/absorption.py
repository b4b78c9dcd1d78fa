"""Absorption and hedging in Matryoshka SAEs (arXiv 2505.11756): the weight of the inner loss moves between them.

A parent fires with probability 0.25, and each of its three children with 0.15 where the parent does. The SAE has four
latents and starts at the truth. Without an inner loss (weight 0, the standard SAE) children's latents take over the parent,
and the parent's encoder learns to be silent where they fire: absorption. With inner latents that learn from their own loss
alone (weight infinity), the parent's latent takes in its children: hedging. A weight of 0.25 nearly balances the two.
"""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import torch
from sae_core import SAE

from sae_synthetic.absorption import structure_scores
from sae_synthetic.evaluation import untrained_like
from sae_synthetic.experiments.result import Claim, ExperimentResult, Settings, mean_and_spread
from sae_synthetic.features import FeatureDictionary, cosine_similarities
from sae_synthetic.forest import HierarchyNode
from sae_synthetic.forest_modifier import hierarchy_modifier
from sae_synthetic.generator import ActivationGenerator
from sae_synthetic.initialization import init_sae_to_match_feature_dict
from sae_synthetic.plots import plot_sae_feature_similarity
from sae_synthetic.source import SyntheticActivationIterator

__all__ = ["run"]

FEATURES, WIDTH, L1 = 4, 50, 3e-2
RATES = (0.25, 0.15, 0.15, 0.15)
BATCH, SAMPLES, LEARNING_RATE = 1024, 1_500_000, 3e-3
WEIGHTS: dict[str, dict[str, Any]] = {
    "0": {"matryoshka_widths": ()},
    "0.25": {"matryoshka_widths": (1,), "inner_weight": 0.25},
    "infinity": {"matryoshka_widths": (1,), "detach_inner": True},
}
PUBLISHED = {"0": "absorption", "0.25": "balanced", "infinity": "hedging"}


def run(settings: Settings) -> ExperimentResult:
    """Train with each weight."""
    features = FeatureDictionary(FEATURES, WIDTH, seed=0).to(settings.device)
    tree = HierarchyNode(0, [HierarchyNode(child) for child in range(1, FEATURES)])
    samples = settings.samples(SAMPLES, BATCH)
    scores: dict[str, list[dict[str, float]]] = {name: [] for name in WEIGHTS}
    saes: dict[str, SAE] = {}
    firing = ActivationGenerator(FEATURES, torch.tensor(RATES), modify_activations=hierarchy_modifier(tree), seed=0)
    firing.to(settings.device)
    with settings.runs(len(WEIGHTS) * settings.seeds) as runs:
        for seed, name in itertools.product(range(settings.seeds), WEIGHTS):
            generator = firing.fork(seed)
            sae = runs.train(
                f"inner weight {name}, seed {seed}",
                "matryoshka_l1",
                {"d_in": WIDTH, "d_sae": FEATURES, "l1_coefficient": L1, **WEIGHTS[name]},
                SyntheticActivationIterator(features, generator, BATCH).batches(BATCH),
                seed,
                prepare=partial(init_sae_to_match_feature_dict, feature_dict=features),
                total_samples=samples,
                batch_size=BATCH,
                lr=LEARNING_RATE,
                lr_decay_samples=samples // 2,
            )
            scores[name].append(_scores(sae, features, generator))
            saes.setdefault(name, sae)
    scores["untrained"] = [_scores(untrained_like(saes["0"]), features, firing)]
    mean = {name: {key: sum(s[key] for s in runs_) / len(runs_) for key in runs_[0]} for name, runs_ in scores.items()}
    return ExperimentResult(
        name="absorption",
        paper="arXiv 2505.11756",
        setting=f"A parent (probability {RATES[0]}) with three children ({RATES[1]} each, given the parent) in {WIDTH} "
        f"dimensions; {FEATURES} latents that start at the truth, inner width 1, L1 {L1}, {samples:,} samples, "
        f"{settings.seeds} seed(s). 'Reads' is the cosine of the parent's encoder with its children, 'hedging' "
        "that of its decoder; 'children lean' that of their decoders with the parent; 'absorbed' how often a child's latent "
        "stands in for the parent's.",
        columns=["weight", "published", "reads", "hedging", "children lean", "absorbed"],
        rows=[
            [
                name,
                PUBLISHED.get(name, ""),
                *(
                    mean_and_spread([score[key] for score in runs_])
                    for key in ("encoder_lean", "hedging", "child_lean", "absorption")
                ),
            ]
            for name, runs_ in scores.items()
        ],
        claims=[
            Claim(
                "weight 0 absorbs: the parent's encoder is pushed off by its children, and they lean towards it",
                mean["0"]["encoder_lean"] < -0.05 and mean["0"]["child_lean"] > 0.05,
            ),
            Claim(
                "weight infinity hedges: the parent's decoder leans towards its children",
                mean["infinity"]["hedging"] > 0.05 and mean["infinity"]["encoder_lean"] > 0,
            ),
            Claim(
                "weight 0.25 lies in between, nearer to the truth than both",
                abs(mean["0.25"]["encoder_lean"]) < min(abs(mean[name]["encoder_lean"]) for name in ("0", "infinity")),
            ),
        ],
        data={"scores": scores},
        figures=[
            (f"Inner weight {name}", partial(plot_sae_feature_similarity, sae, features, show_plot=False))
            for name, sae in saes.items()
        ],
        seconds=runs.seconds,
    )


def _scores(sae: SAE, features: FeatureDictionary, generator: ActivationGenerator) -> dict[str, float]:
    structure = structure_scores(sae, features, generator)
    encoder: Any = sae.W_enc
    lean = cosine_similarities(encoder.detach().T[:1], features.feature_vectors.detach()[1:])
    return {
        "encoder_lean": float(lean.mean()),
        "hedging": structure.hedging,
        "child_lean": structure.child_lean,
        "absorption": structure.absorption,
    }
