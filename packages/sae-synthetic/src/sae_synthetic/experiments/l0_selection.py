"""The right L0 found without the truth (arXiv 2508.16560), on the correlated features of `sparse-but-wrong`.

A BatchTopK SAE is trained while its k falls over a wide range, and the n-th decoder projection s_n, which needs no truth, is
looked at on the way. A second one goes slowly over a narrow range around the least. The true L0 is 10.96. Beside what each says
stands how well the features were found when the SAE was there.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from sae_core import SAE

from sae_synthetic.evaluation import untrained_like
from sae_synthetic.experiments.result import Claim, ExperimentResult, Settings, mean_and_spread
from sae_synthetic.experiments.sparse_but_wrong import BATCH, FEATURES, LEARNING_RATE, WIDTH, world
from sae_synthetic.l0_path import L0Path
from sae_synthetic.matching import mean_correlation_coefficient
from sae_synthetic.plots import plot_pareto
from sae_synthetic.scores import decoder_projection
from sae_synthetic.source import SyntheticActivationIterator

if TYPE_CHECKING:
    from sae_core.training.trainer import Progress

__all__ = ["run"]

SAMPLES = 1_500_000  # of each of the two
HIGHEST, LOWEST, AROUND = 20.0, 4.0, 3.0
PLACES = (20, 22, 25)
LOOKS = 30
LOOK_SAMPLES = 4_000
EVAL_SAMPLES = 50_000


def run(settings: Settings) -> ExperimentResult:
    """Go down twice a seed: over all, and around what was found."""
    features, generator = world()
    features.to(settings.device)
    generator.to(settings.device)
    true_l0 = float(generator.held_out().sample_codes(EVAL_SAMPLES).l0().double().mean())
    with torch.no_grad():
        x = features(generator.held_out().sample_codes(LOOK_SAMPLES))
    samples = settings.samples(SAMPLES, BATCH)
    every = max(samples // BATCH // LOOKS, 1)
    chosen: dict[str, list[float]] = {"wide": [], "narrow": []}
    mcc: dict[str, list[float]] = {"wide": [], "narrow": []}
    curves: dict[str, list[tuple[float, float]]] = {}
    untrained: SAE | None = None
    with settings.runs(2 * settings.seeds) as runs:
        for seed in range(settings.seeds):
            highest, lowest = HIGHEST, LOWEST
            for name in chosen:
                path = L0Path(x, PLACES, every)
                recovery: list[float] = []

                def look(progress: Progress, recovery: list[float] = recovery) -> None:
                    if progress.trainer.steps % every == 0:
                        found = progress.trainer.sae.directions()
                        recovery.append(mean_correlation_coefficient(found, features.feature_vectors))

                sae = runs.train(
                    f"{name}, seed {seed}",
                    "batchtopk",
                    {"d_in": WIDTH, "d_sae": FEATURES, "k": {"from": highest, "to": lowest, "over": 1.0}},
                    SyntheticActivationIterator(features, generator.fork(seed), BATCH).batches(BATCH),
                    seed,
                    callbacks=[path, look],
                    total_samples=samples,
                    batch_size=BATCH,
                    lr=LEARNING_RATE,
                    dead_after_samples=100_000,
                )
                untrained = untrained or untrained_like(sae)
                found = path.best()
                by_l0 = dict(zip(path.projections, recovery, strict=True))
                chosen[name].append(found.k)
                mcc[name].append(by_l0[found.k])
                if not seed:
                    curves[f"s_n, {name}"] = [(k, value) for k, value in sorted(found.projections.items())]
                    curves[f"1 - MCC, {name}"] = [(k, 1 - value) for k, value in sorted(by_l0.items())]
                highest, lowest = found.k + AROUND, max(found.k - AROUND, 1.0)
    assert untrained is not None
    random_projection = sum(abs(decoder_projection(untrained, x, n)) for n in PLACES) / len(PLACES)
    random_mcc = mean_correlation_coefficient(untrained.directions(), features.feature_vectors)
    worst = max(abs(k - true_l0) for k in chosen["narrow"])
    least = {name: min(value for _, value in curves[f"s_n, {name}"]) for name in chosen}
    return ExperimentResult(
        name="l0-selection",
        paper="arXiv 2508.16560",
        setting=f"The {FEATURES} correlated features of sparse-but-wrong, true L0 {true_l0:.2f}; BatchTopK with {FEATURES} "
        f"latents whose k falls from {HIGHEST:g} to {LOWEST:g}, then around what was found, {samples:,} samples each, "
        f"{settings.seeds} seed(s). s_n is the decoder projection, averaged over n = {', '.join(map(str, PLACES))}.",
        columns=["range", "published", "L0 chosen", "least s_n", "MCC there"],
        rows=[
            *(
                [
                    name,
                    "the true one",
                    mean_and_spread(chosen[name]),
                    f"{least[name]:.4f}",
                    mean_and_spread(mcc[name]),
                ]
                for name in chosen
            ),
            ["untrained", "", "-", f"{random_projection:.3f}", f"{random_mcc:.3f}"],
        ],
        claims=[
            Claim(
                f"the L0 chosen is within 1 of the true one (off by {worst:.2f} at most)",
                worst <= 1,
            ),
            Claim("the features are found there (MCC at least 0.95)", min(mcc["narrow"]) >= 0.95),
        ],
        data={"chosen": chosen, "mcc": mcc, "curves": curves, "true_l0": true_l0},
        figures=[("Decoder projection and what is not recovered", partial(plot_pareto, curves, "L0", ""))],
        seconds=runs.seconds,
    )
