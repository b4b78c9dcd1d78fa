"""An SAE judged against the truth on held-out samples, with an untrained SAE beside it.

Samples come from a fork of the generator: an evaluation neither uses up nor repeats what training sees, and is the same
each time.
"""

# B rows, F latents, N true features

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from sae_core import SAE
from sae_core.config import require
from sae_core.errors import ConfigError
from torch import Tensor

from sae_synthetic._random import derived_seed, generator_for
from sae_synthetic.features import FeatureDictionary
from sae_synthetic.generator import ActivationGenerator
from sae_synthetic.matching import mean_correlation_coefficient
from sae_synthetic.scores import (
    ClassificationMetrics,
    ClassificationMetricsCalculator,
    DeadLatentsCalculator,
    ExplainedVarianceCalculator,
    L0Calculator,
    ShrinkageCalculator,
    best_matches,
    feature_uniqueness,
)

__all__ = ["ActivationScaler", "SyntheticDataEvalResult", "eval_sae_on_synthetic_data", "judge", "untrained_like"]


@runtime_checkable
class ActivationScaler(Protocol):
    """What brings activations into an SAE's units, and its output back: SAELens's class of that name, or any other."""

    def scale(self, acts: Tensor, /) -> Tensor: ...

    def unscale(self, acts: Tensor, /) -> Tensor: ...


@dataclass(frozen=True)
class SyntheticDataEvalResult:
    """What `eval_sae_on_synthetic_data` measures.

    `true_l0` and `sae_l0` are mean active features and latents a sample; `dead_latents` never fired; `shrinkage` is the
    mean of |reconstruction| / |input|; `mcc` matches decoder directions to true ones by |cosine|, `signed_mcc` by cosine;
    `uniqueness` is the share of distinct best matches; `classification` takes latents as detectors. `baseline` holds the
    same of an SAE that is `untrained_like` the one judged: what a random dictionary gets for nothing. The last four are None
    where nobody measured them.
    """

    true_l0: float
    sae_l0: float
    dead_latents: int
    shrinkage: float
    explained_variance: float
    mcc: float
    uniqueness: float
    classification: ClassificationMetrics
    signed_mcc: float | None = None
    num_latents: int | None = None
    num_samples: int | None = None
    baseline: SyntheticDataEvalResult | None = None

    def to_dict(self) -> dict[str, Any]:
        """All values, nested as they are here."""
        return asdict(self)

    def to_log_dict(self, prefix: str = "") -> dict[str, float | int]:
        """All values flat, ``classification/…`` for the detectors', ``baseline/…`` for the untrained SAE's, after `prefix`."""
        return {f"{prefix}{name}": value for name, value in _flat(self.to_dict())}


@torch.no_grad()
def eval_sae_on_synthetic_data(
    sae: SAE,
    feature_dict: FeatureDictionary,
    activations_generator: ActivationGenerator,
    num_samples: int = 100_000,
    batch_size: int | None = None,
    activation_scaler: ActivationScaler | None = None,
    baseline: bool = True,
) -> SyntheticDataEvalResult:
    """Scores of `sae` on `num_samples` held-out samples, `batch_size` (by default 4,096) at a time.

    `activation_scaler` scales what the SAE reads, and its output back, for an SAE that does not do so itself. `baseline` adds
    those of an untrained SAE on the same samples, for as much time again. Memory follows the batch size alone. The SAE is put
    into eval mode meanwhile. Raises ConfigError for sizes that do not fit each other.
    """
    require(num_samples >= 1, f"num_samples must be at least 1, not {num_samples}")
    require(batch_size is None or batch_size >= 1, f"batch_size must be at least 1, not {batch_size}")
    require(
        sae.reconstructs_input,
        "eval_sae_on_synthetic_data: a transcoder writes other activations than it reads; eval_sae_on_multi_site_model "
        "scores it on a world that has both",
    )
    require(
        activation_scaler is None or isinstance(activation_scaler, ActivationScaler),
        f"activation_scaler: {activation_scaler!r} has no methods scale and unscale",
    )
    if sae.d_in != feature_dict.hidden_dim or feature_dict.num_features != activations_generator.num_features:
        raise ConfigError(
            f"the SAE has d_in {sae.d_in}, the dictionary {feature_dict.num_features} features in {feature_dict.hidden_dim} "
            f"dimensions, the generator {activations_generator.num_features} features: they do not fit each other"
        )
    return judge(
        sae, feature_dict, feature_dict, activations_generator, num_samples, batch_size, activation_scaler, baseline
    )


@torch.no_grad()
def judge(
    sae: SAE,
    reads: FeatureDictionary,
    writes: FeatureDictionary,
    activations_generator: ActivationGenerator,
    num_samples: int,
    batch_size: int | None,
    activation_scaler: ActivationScaler | None = None,
    baseline: bool = True,
) -> SyntheticDataEvalResult:
    """Scores of a dictionary that reads the sums of one dictionary of features and shall write those of another.

    Latents are matched with the features that are written at all: whose vectors there are not zero.
    """
    world = (reads, writes, activations_generator, num_samples, batch_size, activation_scaler)
    generator = activations_generator.held_out()
    vectors = writes.feature_vectors.detach()
    there = (vectors.norm(dim=1) > 0).nonzero().squeeze(1)
    directions, truth_vectors = sae.directions(), vectors[there]
    true_l0, sae_l0, dead = L0Calculator(), L0Calculator(), DeadLatentsCalculator(sae.d_sae)
    shrinkage, variance = ShrinkageCalculator(), ExplainedVarianceCalculator()
    matches = there.cpu()[best_matches(directions, truth_vectors).cpu()]
    detectors = ClassificationMetricsCalculator(directions, vectors, matches)
    was_training = sae.training
    sae.eval()
    try:
        for start in range(0, num_samples, batch_size or 4096):
            truth = generator.sample_codes(min(batch_size or 4096, num_samples - start))
            hidden = reads(truth).to(sae.device, sae.dtype)
            target = hidden if writes is reads else writes(truth).to(sae.device, sae.dtype)
            read = hidden if activation_scaler is None else activation_scaler.scale(hidden)
            latents = sae.encode_sparse(read)
            output = sae.decode(latents, read)
            output = output if activation_scaler is None else activation_scaler.unscale(output)
            true_l0.add_batch(truth)
            sae_l0.add_batch(latents)
            dead.add_batch(latents)
            shrinkage.add_batch(output, target)
            variance.add_batch(output, target)
            detectors.add_batch(latents, truth)
    finally:
        sae.train(was_training)
    return SyntheticDataEvalResult(
        true_l0=true_l0.compute(),
        sae_l0=sae_l0.compute(),
        dead_latents=dead.compute(),
        shrinkage=shrinkage.compute(),
        explained_variance=variance.compute(),
        mcc=mean_correlation_coefficient(directions, truth_vectors),
        uniqueness=feature_uniqueness(directions, truth_vectors),
        classification=detectors.compute(),
        signed_mcc=mean_correlation_coefficient(directions, truth_vectors, signed=True),
        num_latents=sae.d_sae,
        num_samples=num_samples,
        baseline=judge(untrained_like(sae), *world, baseline=False) if baseline else None,
    )


def untrained_like(sae: SAE, seed: int = 0) -> SAE:
    """An SAE of the same architecture and settings, its normalisation too, with random weights; in eval mode."""
    random = type(sae)(sae.config).to(sae.dtype)
    random.reset_parameters(generator_for(derived_seed(seed, "untrained baseline")))
    random.normalization.load_state_dict(sae.normalization.state_dict())
    return random.to(sae.device).eval()


def _flat(values: Mapping[str, Any], above: str = "") -> list[tuple[str, float | int]]:
    flat: list[tuple[str, float | int]] = []
    for name, value in values.items():
        if value is None:
            continue
        flat += _flat(value, f"{above}{name}/") if isinstance(value, Mapping) else [(above + name, value)]
    return flat
