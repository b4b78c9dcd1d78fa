"""Feature hedging (arXiv 2505.11756): what one latent learns when there are two features.

Two features in 50 dimensions, the parent with probability 0.25. An SAE with a single latent has no room for the child, yet
where the two fire together more often than by chance it takes in a part of the child, for that lowers the squared error;
where they avoid each other it takes in a negative part; where they are independent it takes in nothing.
"""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import torch
from sae_core import SAE

from sae_synthetic.experiments.result import Claim, ExperimentResult, Settings, mean_and_spread
from sae_synthetic.features import FeatureDictionary, cosine_similarities
from sae_synthetic.forest import HierarchyNode
from sae_synthetic.forest_modifier import hierarchy_modifier
from sae_synthetic.generator import ActivationGenerator
from sae_synthetic.matching import random_dictionary
from sae_synthetic.plots import plot_similarity
from sae_synthetic.source import SyntheticActivationIterator

__all__ = ["run"]

WIDTH, PARENT, CHILD, L1 = 50, 0.25, 0.2, 1e-3
BATCH, SAMPLES, LEARNING_RATE = 1024, 1_000_000, 3e-3
PUBLISHED = {"hierarchy": "positive", "correlated": "positive", "independent": "none", "anti-correlated": "negative"}


def run(settings: Settings) -> ExperimentResult:
    """Train one latent on each world."""
    features = FeatureDictionary(2, WIDTH, seed=0).to(settings.device)
    samples = settings.samples(SAMPLES, BATCH)
    leans: dict[str, list[list[float]]] = {name: [] for name in PUBLISHED}
    saes: dict[str, SAE] = {}
    with settings.runs(len(leans) * settings.seeds) as runs:
        for seed, name in itertools.product(range(settings.seeds), leans):
            generator = _world(name, seed).to(settings.device)
            sae = runs.train(
                f"{name}, seed {seed}",
                "standard",
                {"d_in": WIDTH, "d_sae": 1, "l1_coefficient": L1},
                SyntheticActivationIterator(features, generator, BATCH).batches(BATCH),
                seed,
                prepare=lambda sae: _start_at_parent(sae, features),
                total_samples=samples,
                batch_size=BATCH,
                lr=LEARNING_RATE,
                lr_decay_samples=samples // 2,
            )
            leans[name].append(cosine_similarities(sae.directions(), features.feature_vectors.detach())[0].tolist())
            saes.setdefault(name, sae)
    cosines = cosine_similarities(random_dictionary(1, WIDTH), features.feature_vectors.detach().cpu())
    leans["random direction"] = cosines.tolist()
    child = {name: [cosines[1] for cosines in values] for name, values in leans.items()}
    mean = {name: sum(values) / len(values) for name, values in child.items()}
    data: dict[str, Any] = {"cosines with parent and child": leans}
    return ExperimentResult(
        name="hedging",
        paper="arXiv 2505.11756",
        setting=f"A parent (probability {PARENT}) and a child ({CHILD}, in the hierarchy {CHILD} given the parent) in {WIDTH} "
        f"dimensions; one latent, L1 {L1}, {samples:,} samples, {settings.seeds} seed(s). Cosines of the decoder direction; "
        "published is the sign of the child's part.",
        columns=["features", "with parent", "with child", "published"],
        rows=[
            [name, mean_and_spread([c[0] for c in cosines]), mean_and_spread(child[name]), PUBLISHED.get(name, "")]
            for name, cosines in leans.items()
        ],
        claims=[
            Claim("below a parent the child is mixed in", mean["hierarchy"] > 0.05),
            Claim("correlated features are mixed", mean["correlated"] > 0.05),
            Claim("independent features are not", abs(mean["independent"]) < 0.03),
            Claim("anti-correlated features are mixed with the opposite sign", mean["anti-correlated"] < -0.05),
        ],
        data=data,
        figures=[
            (
                "Decoder",
                partial(plot_similarity, {k: sae.directions() for k, sae in saes.items()}, features.feature_vectors),
            )
        ],
        seconds=runs.seconds,
    )


def _world(name: str, seed: int) -> ActivationGenerator:
    rates = torch.tensor([PARENT, CHILD])
    if name == "hierarchy":
        tree = HierarchyNode(0, [HierarchyNode(1)])
        return ActivationGenerator(2, rates, modify_activations=hierarchy_modifier(tree), seed=seed)
    correlation = {"correlated": 0.4, "independent": 0.0, "anti-correlated": -0.4}[name]
    matrix = torch.tensor([[1.0, correlation], [correlation, 1.0]])
    return ActivationGenerator(2, rates, correlation_matrix=matrix, seed=seed)


@torch.no_grad()
def _start_at_parent(sae: SAE, features: FeatureDictionary) -> None:
    """The latent begins as the parent's, so that the result does not hang on which feature it happens to find first."""
    from sae_synthetic.initialization import init_sae_to_match_feature_dict

    init_sae_to_match_feature_dict(sae, features)
