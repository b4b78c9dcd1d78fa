"""Crosscoders against truth (arXiv 2504.02922): which of the latents that one model seems to have alone are artefacts?

Two models, base and tuned, that share most features with nearly the same directions; some features are in the tuned model
alone, and some are in base too, but weaker. A crosscoder under an L1 penalty and one with BatchTopK, at one L0, are asked
which of their latents are the tuned model's alone, by decoder norms. The paper finds that L1 calls many of them so that are
not, BatchTopK few, and that latent scaling tells the ones from the others. On real models nobody knows the answer; here it
is known of every latent: it matches a feature that is exclusive, or one that is not.
"""

# F latents

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import torch
from sae_core import SAE
from sae_core.site_analysis import latent_scaling
from sae_core.sites import Sites
from torch import Tensor

from sae_synthetic.evaluation import untrained_like
from sae_synthetic.experiments.result import Claim, ExperimentResult, Settings, mean_and_spread
from sae_synthetic.experiments.steering import SteerL0
from sae_synthetic.firing_probabilities import ConstantFiringProbabilityConfig
from sae_synthetic.matching import match_features
from sae_synthetic.model import OrthogonalizationConfig
from sae_synthetic.multi_site import MultiSiteModel, MultiSiteModelConfig
from sae_synthetic.multi_site_evaluation import eval_sae_on_multi_site_model, site_shares
from sae_synthetic.plots import plot_similarity

__all__ = ["run"]

WIDTH, FEATURES = 48, 96
SITES = {"base": WIDTH, "tuned": WIDTH}
WORLD: dict[str, Any] = {
    "num_features": FEATURES,
    "sites": SITES,
    "exclusive": {"tuned": 12, "base": 6},
    "weak": {"base": 24},
    "weak_strength": 0.3,
    "alike": 0.9,
    "firing_probability": ConstantFiringProbabilityConfig(0.03),
    "orthogonalization": OrthogonalizationConfig(num_steps=100),
    "std_firing_magnitudes": 0.15,
}
BATCH, SAMPLES, LEARNING_RATE = 512, 1_000_000, 3e-3
ARCHITECTURES = {"standard": "L1", "batchtopk": "BatchTopK"}
PUBLISHED = {"standard": "many artefacts", "batchtopk": "few"}
ALONE = 0.9  # share of a latent's norms at the tuned site from which it is called the tuned model's alone
NU_ERROR, NU_RECONSTRUCTION = 0.2, 0.5  # the paper's thresholds below which latent scaling calls it exclusive
EVAL_SAMPLES = 50_000


def run(settings: Settings) -> ExperimentResult:
    """Train both crosscoders; ask both ways."""
    samples = settings.samples(SAMPLES, BATCH)
    scores: dict[str, list[dict[str, float]]] = {name: [] for name in ARCHITECTURES}
    kept: dict[str, tuple[SAE, MultiSiteModel]] = {}
    true_l0 = float("nan")
    with settings.runs(len(ARCHITECTURES) * settings.seeds) as runs:
        for seed, name in itertools.product(range(settings.seeds), ARCHITECTURES):
            world = MultiSiteModel(MultiSiteModelConfig(**WORLD, seed=seed), device=settings.device)
            generator = world.activation_generator
            true_l0 = float(generator.held_out().sample_codes(EVAL_SAMPLES).l0().double().mean())
            sparsity: dict[str, Any] = {"l1_coefficient": 0.3} if name == "standard" else {"k": true_l0}
            source = generator.fork(seed)
            sae = runs.train(
                f"{ARCHITECTURES[name]}, seed {seed}",
                name,
                {"d_in": 2 * WIDTH, "d_sae": FEATURES, "reads": SITES, **sparsity},
                (world.reads(source.sample_codes(BATCH)).detach() for _ in itertools.count()),
                seed,
                callbacks=[SteerL0("l1_coefficient", true_l0, samples, 0.06)] if name == "standard" else [],
                total_samples=samples,
                batch_size=BATCH,
                lr=LEARNING_RATE,
                lr_decay_samples=samples // 3,
                dead_after_samples=50_000,
            )
            scores[name].append(_scores(sae, world))
            kept.setdefault(name, (sae, world))
    sae, world = kept["batchtopk"]
    scores["untrained"] = [_scores(untrained_like(sae), world)]
    mean = {name: {key: _mean(each, key) for key in each[0]} for name, each in scores.items()}
    l1, topk = mean["standard"], mean["batchtopk"]
    auc = _mean(scores["standard"] + scores["batchtopk"], "auc")
    return ExperimentResult(
        name="crosscoder",
        paper="arXiv 2504.02922",
        setting=f"Two models of width {WIDTH} with {FEATURES} features, {WORLD['exclusive']['tuned']} of them in the tuned one "
        f"alone, {WORLD['weak']['base']} three tenths as strong in base; true L0 {true_l0:.2f}; {FEATURES} latents, "
        f"{samples:,} samples, {settings.seeds} seed(s). Tuned-only: latents with {ALONE:.0%} of their decoder norms there. "
        f"Kept: those that latent scaling confirms (nu error < {NU_ERROR}, nu reconstruction < {NU_RECONSTRUCTION}).",
        columns=["crosscoder", "published", "MCC", "tuned-only", "right", "kept", "right of kept", "AUC", "L0"],
        rows=[
            [
                ARCHITECTURES.get(name, name),
                PUBLISHED.get(name, ""),
                mean_and_spread([score["mcc"] for score in each]),
                f"{mean[name]['called']:.1f}",
                f"{mean[name]['called_right']:.1f}",
                f"{mean[name]['confirmed']:.1f}",
                f"{mean[name]['confirmed_right']:.1f}",
                f"{mean[name]['auc']:.3f}",
                f"{mean[name]['l0']:.2f}",
            ]
            for name, each in scores.items()
        ],
        claims=[
            Claim(
                "L1 calls more latents the tuned model's alone that are not, than BatchTopK does",
                l1["called"] - l1["called_right"] > topk["called"] - topk["called_right"],
            ),
            Claim(
                f"latent scaling ranks exclusive latents before artefacts (AUC {auc:.2f}, at least 0.95)", auc >= 0.95
            ),
            Claim(
                "of what latent scaling confirms, a larger share is right than of what decoder norms say",
                l1["confirmed_right"] * l1["called"] > l1["called_right"] * l1["confirmed"],
            ),
        ],
        data={"scores": scores, "true_l0": true_l0},
        figures=[
            (
                f"{ARCHITECTURES[name]}: decoder beside the features, both sites",
                partial(plot_similarity, {ARCHITECTURES[name]: sae.directions()}, world.reads.feature_vectors),
            )
            for name, (sae, world) in kept.items()
        ],
        seconds=runs.seconds,
    )


@torch.no_grad()
def _scores(sae: SAE, world: MultiSiteModel) -> dict[str, float]:
    found = eval_sae_on_multi_site_model(sae, world, EVAL_SAMPLES, baseline=False)
    directions, vectors = sae.directions().cpu(), world.reads.feature_vectors.detach().cpu()
    pairs = match_features(directions, vectors)
    exclusive_N = torch.zeros(FEATURES, dtype=torch.bool)
    exclusive_N[world.exclusive_to("tuned").cpu()] = True
    really_F = torch.zeros(len(directions), dtype=torch.bool)
    really_F[pairs.a_indices] = exclusive_N[pairs.b_indices] & (pairs.cosines.abs() >= 0.7)
    called_F = site_shares(directions, Sites(SITES))[1] >= ALONE
    held_out = world.activation_generator.held_out()
    batches = (world.reads(held_out.sample_codes(4096)) for _ in range(EVAL_SAMPLES // 4096))
    scaling = latent_scaling(sae, batches, own="tuned")
    nu_error, nu_reconstruction = (
        scaling.error_ratio("base").abs().cpu(),
        scaling.reconstruction_ratio("base").abs().cpu(),
    )
    confirmed_F = called_F & (nu_error < NU_ERROR) & (nu_reconstruction < NU_RECONSTRUCTION)
    fires_F = torch.isfinite(nu_error)
    larger = torch.maximum(nu_error / NU_ERROR, nu_reconstruction / NU_RECONSTRUCTION)
    matched_F = torch.zeros_like(really_F)
    matched_F[pairs.a_indices] = pairs.cosines.abs() >= 0.7
    asked_F = fires_F & matched_F
    return {
        "mcc": found.whole.mcc,
        "l0": found.whole.sae_l0,
        "explained_variance": found.whole.explained_variance,
        "share_error": found.share_error or 0.0,
        "called": float(called_F.sum()),
        "called_right": float((called_F & really_F).sum()),
        "confirmed": float(confirmed_F.sum()),
        "confirmed_right": float((confirmed_F & really_F).sum()),
        "auc": _auc(larger[asked_F & really_F], larger[asked_F & ~really_F]),
    }


def _auc(exclusive: Tensor, others: Tensor) -> float:
    """How often an exclusive latent has a smaller number than another; ties count half, nothing to compare 0.5.

    >>> _auc(torch.tensor([0.1, 0.5]), torch.tensor([0.5, 0.9]))
    0.875
    """
    if not len(exclusive) or not len(others):
        return 0.5
    smaller = (exclusive[:, None] < others).double() + 0.5 * (exclusive[:, None] == others).double()
    return float(smaller.mean())


def _mean(runs: list[dict[str, float]], key: str) -> float:
    return sum(run[key] for run in runs) / len(runs)
