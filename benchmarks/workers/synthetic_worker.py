"""Synthetic data, as a benchmark worker: one file for sae-synthetic and SAELens, since their names are the same.

Started with its specification as JSON in its argument, it builds the world, says so, and then answers every line of its
standard input, ``{"times": n}``, with the seconds of n batches.
"""

from __future__ import annotations

import importlib
import json
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from protocol import MARK


def world(spec: dict[str, Any]) -> Callable[[], Any]:
    """A function that makes one batch of hidden activations and returns the features behind it."""
    own = spec["library"] == "sae-core"
    S: Any = importlib.import_module("sae_synthetic" if own else "sae_lens.synthetic")
    n, batch, seed = spec["features"], spec["batch"], {"seed": 0} if own else {}
    weights = torch.arange(1, n + 1, dtype=torch.float64) ** -0.5
    probabilities = (weights / weights.sum() * spec["l0"]).float().clamp(max=1)
    modifier = correlation = None
    if spec["hierarchy"]:
        config = S.HierarchyConfig(
            total_root_nodes=n // 128,
            branching_factor=4,
            max_depth=3,
            mutually_exclusive_portion=1.0,
            compensate_probabilities=True,
            scale_children_by_parent=True,
        )
        hierarchy = S.generate_hierarchy(n, config, seed=0)
        modifier = hierarchy.modifier
        factors = hierarchy.compute_probability_correction_factors(probabilities)
        probabilities = (probabilities * factors).clamp(max=1)
    if spec["correlation"] == "low-rank":
        correlation = S.generate_random_low_rank_correlation_matrix(n, 25, 0.1, seed=0)
    elif spec["correlation"] == "full":
        correlation = S.generate_random_correlation_matrix(n, 0.5, 0.3, 0.01, 0.02, seed=0)
    features = S.FeatureDictionary(n, spec["d"], initializer=None, seed=0)
    generator = S.ActivationGenerator(
        n, probabilities, 0.1, 1.0, modifier, correlation, use_sparse_tensors=spec["sparse"], **seed
    )
    model = S.SyntheticModel(S.SyntheticModelConfig(num_features=n, hidden_dim=spec["d"], seed=0), features, generator)
    return lambda: model.sample_with_features(batch)[1]


def orthogonalising(spec: dict[str, Any]) -> Callable[[], Any]:
    """A function that takes one step of orthogonalisation."""
    S: Any = importlib.import_module("sae_synthetic" if spec["library"] == "sae-core" else "sae_lens.synthetic")
    vectors = torch.randn(spec["features"], spec["d"], generator=torch.Generator().manual_seed(0))
    return lambda: S.orthogonalize_embeddings(vectors, num_steps=1)


def active(features: torch.Tensor) -> float:
    """Mean number of firing features."""
    values = features.coalesce().values() if features.is_sparse else features
    return float((values > 0).sum() / features.shape[0])


def reply(**values: Any) -> None:
    """One line to the driver."""
    print(MARK + json.dumps(values), flush=True)


def main() -> None:
    """Build, then serve."""
    spec = json.loads(sys.argv[1])
    torch.set_num_threads(spec["threads"])
    torch.manual_seed(0)
    with torch.no_grad():
        step = orthogonalising(spec) if spec["task"] == "orthogonalise" else world(spec)
    reply(ready=True)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for line in sys.stdin:
        seconds: list[float] = []
        for _ in range(json.loads(line)["times"]):
            started = time.perf_counter()
            made = step()
            seconds.append(time.perf_counter() - started)
        l0 = float("nan") if spec["task"] == "orthogonalise" else active(made)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        reply(seconds=seconds, l0=l0, grown_mib=grown / 1024)


if __name__ == "__main__":
    main()
