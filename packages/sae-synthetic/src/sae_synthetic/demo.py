"""The main job in small, on data whose features are known: 256 features in 128 dimensions, read by a TopK SAE of
512 latents. A trained SAE finds them; a random dictionary of the same size does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sae_core import TrainConfig, Trainer, create
from sae_core.config import require
from sae_core.errors import ConfigError
from sae_core.training.trainer import Progress
from torch import Tensor

from sae_synthetic._random import checked_seed, derived_seed
from sae_synthetic.evaluation import SyntheticDataEvalResult, eval_sae_on_synthetic_data, untrained_like
from sae_synthetic.features import FeatureDictionary, cosine_similarities
from sae_synthetic.firing_probabilities import linear_firing_probabilities
from sae_synthetic.generator import ActivationGenerator
from sae_synthetic.matching import mean_correlation_coefficient
from sae_synthetic.source import SyntheticActivationIterator

__all__ = ["DemoResult", "run_demo"]

NUM_FEATURES, HIDDEN_DIM, NUM_LATENTS, ACTIVE = 256, 128, 512, 9
BATCH_SIZE, LEARNING_RATE = 1024, 0.01
FOUND = 0.9
EVALUATED = 50_000  # fresh samples


@dataclass(frozen=True)
class DemoResult:
    """What `run_demo` measured and wrote; `rows` is the table it prints: name, trained, random."""

    trained: SyntheticDataEvalResult
    random: SyntheticDataEvalResult
    rows: list[list[str]]
    samples: int
    seconds: float
    sae_path: Path
    report_path: Path | None


def run_demo(output: Path, seed: int = 0, samples: int = 1_000_000, report: bool = True) -> DemoResult:
    """Train, evaluate, save to `output`/sae and write `output`/report.html.

    Raises ConfigError for impossible settings, MissingDependencyError when a report is wanted and plotly is missing; both
    before any training.
    """
    require(samples >= 1, f"samples must be at least 1, not {samples}")
    checked_seed(seed)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output: {output} cannot be a folder: {error.strerror}") from error
    if report:
        from sae_synthetic.plots import require_plotly

        require_plotly()
    features = FeatureDictionary(NUM_FEATURES, HIDDEN_DIM, seed=seed)
    firing = linear_firing_probabilities(NUM_FEATURES, max_prob=0.05, min_prob=0.015)
    generator = ActivationGenerator(NUM_FEATURES, firing, std_firing_magnitudes=0.2, seed=seed)
    source = SyntheticActivationIterator(features, generator, BATCH_SIZE)
    sae = create("topk", d_in=HIDDEN_DIM, d_sae=NUM_LATENTS, k=ACTIVE, seed=derived_seed(seed, "initial weights"))
    config = TrainConfig(
        total_samples=samples,
        batch_size=BATCH_SIZE,
        lr=LEARNING_RATE,
        lr_decay_samples=samples // 3,
        dead_after_samples=100_000,
    )
    curve: list[Mapping[str, float | None]] = []

    def watch(progress: Progress) -> None:
        if progress.record is not None:
            mcc = mean_correlation_coefficient(sae.directions(), features.feature_vectors)
            curve.append({**progress.record, "MCC": mcc})

    result = Trainer(sae, source, config, callbacks=[watch]).fit()
    trained = eval_sae_on_synthetic_data(sae, features, generator, num_samples=EVALUATED)
    random = trained.baseline
    assert random is not None
    curve.append(
        {
            "samples": result.samples,
            "explained_variance": trained.explained_variance,
            "l0": trained.sae_l0,
            "dead_fraction": trained.dead_latents / NUM_LATENTS,
            "MCC": trained.mcc,
        }
    )
    vectors = {"trained": sae.directions(), "random": untrained_like(sae).directions()}
    rows = [
        ["explained variance", f"{trained.explained_variance:.3f}", f"{random.explained_variance:.3f}"],
        [f"L0 (features: {trained.true_l0:.2f})", f"{trained.sae_l0:.2f}", f"{random.sae_l0:.2f}"],
        ["dead latents", *(f"{scores.dead_latents} of {NUM_LATENTS}" for scores in (trained, random))],
        ["MCC with the truth", f"{trained.mcc:.3f}", f"{random.mcc:.3f}"],
        [f"features found (cosine > {FOUND})", *(_found(each, features) for each in vectors.values())],
    ]
    sae_path = sae.save(output / "sae")
    report_path = None
    if report:
        report_path = _write_report(output / "report.html", features, generator, curve, vectors, rows)
    return DemoResult(trained, random, rows, result.samples, result.seconds, sae_path, report_path)


def _found(vectors: Tensor, features: FeatureDictionary) -> str:
    best = cosine_similarities(features.feature_vectors.detach(), vectors).abs().max(dim=1).values
    return f"{int((best > FOUND).sum())} of {NUM_FEATURES}"


def _write_report(
    path: Path,
    features: FeatureDictionary,
    generator: ActivationGenerator,
    curve: list[Mapping[str, float | None]],
    vectors: Mapping[str, Tensor],
    rows: list[list[str]],
) -> Path:
    from sae_synthetic.plots import plot_recovery, plot_similarity, plot_training
    from sae_synthetic.report import Report

    report = Report("sae-core demo: a TopK SAE against the truth")
    report.text(
        f"{NUM_FEATURES} features in {HIDDEN_DIM} dimensions fire independently, eight at a time. A TopK SAE "
        f"with {NUM_LATENTS} latents and k = {ACTIVE} was trained on sums of them, and is compared here with the features "
        f"themselves and with an untrained SAE of the same size, on {EVALUATED:,} samples that neither has seen."
    )
    report.table(["", "trained", "random"], rows)
    report.heading("Training")
    report.text("Measured on the batches of training; the last point is what the table says, on fresh samples.")
    report.figure(plot_training(curve, ["explained_variance", "l0", "dead_fraction", "MCC"], title=""))
    report.heading("Latents and true features")
    report.text("Absolute cosine of every latent's decoder direction with every true feature. Latents are ordered by the "
                "feature they match best: what was found lies on the diagonal.")  # fmt: skip
    report.figure(plot_similarity(vectors, features.feature_vectors))
    report.heading("Recovery against firing rate")
    report.text(_rare_against_frequent(vectors["trained"], features, generator.firing_probabilities))
    report.figure(plot_recovery(vectors, features.feature_vectors, generator.firing_probabilities, title=""))
    return report.write(path)


def _rare_against_frequent(vectors: Tensor, features: FeatureDictionary, rates: Tensor) -> str:
    """What the figure below it shows, in numbers: how well the rarer and the more frequent half of the features are found."""
    best = cosine_similarities(features.feature_vectors.detach(), vectors).abs().max(dim=1).values
    order = rates.argsort()
    rare, frequent = (float(best[half].mean()) for half in order.split(-(-len(order) // 2)))
    difference = frequent - rare
    if abs(difference) < 0.01:
        verdict = "rarity makes no difference here"
    else:
        verdict = f"the {'rarer' if difference > 0 else 'more frequent'} ones are harder to find"
    return (
        f"The best cosine is {rare:.3f} on average for the rarer half of the features and {frequent:.3f} for the more frequent "
        f"half: {verdict}."
    )
