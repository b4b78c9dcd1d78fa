"""The right L0 found without the truth (arXiv 2508.16560), on the correlated features of `sparse-but-wrong`.

BatchTopK SAEs are trained with few samples at several k, and the n-th decoder projection s_n, which needs no truth, says which
k to look at next: a coarse grid, then smaller steps around the least. The true L0 is 10.96. With the chosen k the features are
found; beside it stands how well each k that was looked at finds them.
"""

# F latents

from __future__ import annotations

from functools import partial

import torch
from sae_core import SAE

from sae_synthetic.evaluation import untrained_like
from sae_synthetic.experiments.result import Claim, ExperimentResult, Settings, mean_and_spread
from sae_synthetic.experiments.sparse_but_wrong import BATCH, FEATURES, LEARNING_RATE, WIDTH, world
from sae_synthetic.l0_selection import L0Selection, find_l0
from sae_synthetic.matching import mean_correlation_coefficient
from sae_synthetic.plots import plot_pareto
from sae_synthetic.scores import decoder_projection
from sae_synthetic.source import SyntheticActivationIterator

__all__ = ["run"]

SAMPLES = 1_000_000
LOWEST, HIGHEST, COARSE = 5, 17, 5
PLACES = (18, 20, 22, 25)
EVAL_SAMPLES = 20_000
_MOST_TRAININGS = 11


def run(settings: Settings) -> ExperimentResult:
    """Home in on the least s_n, once a seed."""
    features, generator = world()
    features.to(settings.device)
    generator.to(settings.device)
    held_out = generator.held_out().sample_codes(EVAL_SAMPLES)
    true_l0 = float(held_out.l0().double().mean())
    with torch.no_grad():
        x = features(held_out)
    samples = settings.samples(SAMPLES, BATCH)
    mcc: dict[int, list[float]] = {}
    projections: dict[int, list[float]] = {}
    chosen: list[int] = []
    untrained: list[SAE] = []
    with settings.runs(_MOST_TRAININGS * settings.seeds) as runs:
        for seed in range(settings.seeds):

            def train(k: int, seed: int = seed) -> SAE:
                sae = runs.train(
                    f"k {k}, seed {seed}",
                    "batchtopk",
                    {"d_in": WIDTH, "d_sae": FEATURES, "k": k},
                    SyntheticActivationIterator(features, generator.fork(seed), BATCH).batches(BATCH),
                    seed,
                    total_samples=samples,
                    batch_size=BATCH,
                    lr=LEARNING_RATE,
                    lr_decay_samples=samples // 3,
                    dead_after_samples=200_000,
                )
                mcc.setdefault(k, []).append(mean_correlation_coefficient(sae.directions(), features.feature_vectors))
                untrained[:] = untrained or [untrained_like(sae)]
                return sae

            found: L0Selection = find_l0(train, x, lowest=LOWEST, highest=HIGHEST, places=PLACES, coarse=COARSE)
            chosen.append(found.k)
            for k, projection in found.projections.items():
                projections.setdefault(k, []).append(projection)
    ks = sorted(mcc)
    random = untrained[0]
    random_projection = sum(decoder_projection(random, x, n) for n in PLACES) / len(PLACES)
    random_mcc = mean_correlation_coefficient(random.directions(), features.feature_vectors)
    mean = {k: (_mean(projections[k]), _mean(mcc[k])) for k in ks}
    return ExperimentResult(
        name="l0-selection",
        paper="arXiv 2508.16560",
        setting=f"The {FEATURES} correlated features of sparse-but-wrong, true L0 {true_l0:.2f}; BatchTopK with {FEATURES} "
        f"latents, {samples:,} samples each, {settings.seeds} seed(s). s_n is the decoder projection, averaged over n = "
        f"{', '.join(map(str, PLACES))}. Chosen: k = {', '.join(map(str, chosen))}.",
        columns=["k", "published", "s_n", "MCC", "times chosen"],
        rows=[
            *(
                [
                    str(k),
                    "the least" if k == round(true_l0) else "",
                    mean_and_spread(projections[k]),
                    mean_and_spread(mcc[k]),
                    str(chosen.count(k)),
                ]
                for k in ks
            ),
            ["untrained", "", f"{random_projection:.3f}", f"{random_mcc:.3f}", "-"],
        ],
        claims=[
            Claim("the L0 chosen is within 1 of the true one", all(abs(k - true_l0) <= 1 for k in chosen)),
            Claim("no other k that was looked at finds the features clearly better", _none_better(mean, chosen)),
        ],
        data={"chosen": chosen, "projections": projections, "mcc": mcc, "true_l0": true_l0},
        figures=[
            (
                "Decoder projection and recovery",
                partial(
                    plot_pareto,
                    {
                        "MCC": [(k, mean[k][1]) for k in ks],
                        "s_n, relative": [(k, mean[k][0] / max(value for value, _ in mean.values())) for k in ks],
                    },
                    "k",
                    "",
                ),
            )
        ],
        seconds=runs.seconds,
    )


def _none_better(mean: dict[int, tuple[float, float]], chosen: list[int]) -> bool:
    best = max(found for _, found in mean.values())
    return all(mean[k][1] >= best - 0.03 for k in chosen)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
