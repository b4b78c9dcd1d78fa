"""Crosscoders, transcoders and SAEs of single sites judged against a world of several sites.

The scores of `eval_sae_on_synthetic_data` are taken of all written sites side by side. What only such worlds can tell comes
beside them: how well each site's directions are found, whether latents are as strong at every site as their features are,
and, of the latents that are written at one site alone, how many stand for a feature that is there alone.
"""

# F latents, N true features, S sites, P pairs

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, final

from sae_core import SAE
from sae_core.config import require
from sae_core.errors import ConfigError
from sae_core.sites import Sites
from torch import Tensor

from sae_synthetic.evaluation import SyntheticDataEvalResult, judge
from sae_synthetic.features import FeatureDictionary
from sae_synthetic.matching import match_features, mean_correlation_coefficient
from sae_synthetic.multi_site import MultiSiteModel, side_by_side

__all__ = ["MultiSiteEvalResult", "SiteScores", "eval_sae_on_multi_site_model", "site_shares"]

_ALONE = 0.9  # share of a latent's norms from which it counts as written at one site alone
_FOUND = 0.7  # cosine from which a matched latent counts as the feature


@final
@dataclass(frozen=True)
class SiteScores:
    """One written site.

    `mcc` matches the latents' directions at this site with those of the features that are there. `exclusive_features` of the
    world are at this site alone; `exclusive_found` is the share of them whose matched latent is written here alone too.
    `exclusive_latents` are written here alone; `exclusive_right` is the share of them that match an exclusive feature: the
    others are artefacts. Shares of nothing are None.
    """

    mcc: float
    exclusive_features: int
    exclusive_found: float | None
    exclusive_latents: int
    exclusive_right: float | None


@final
@dataclass(frozen=True)
class MultiSiteEvalResult:
    """What `eval_sae_on_multi_site_model` measures.

    `whole` holds the scores of all written sites side by side; `share_error` is the mean absolute difference, over matched
    pairs, between the shares of a latent's norm and of its feature's strength at a site (None for one site); `sites` holds
    each site's own scores.
    """

    whole: SyntheticDataEvalResult
    share_error: float | None
    sites: dict[str, SiteScores] = field(default_factory=dict[str, SiteScores])

    def to_dict(self) -> dict[str, Any]:
        """All values, nested as they are here."""
        return asdict(self)

    def to_log_dict(self, prefix: str = "") -> dict[str, float | int]:
        """All values flat, after `prefix`; what is None is left out."""
        flat = self.whole.to_log_dict(prefix)
        if self.share_error is not None:
            flat[f"{prefix}share_error"] = self.share_error
        for name, scores in self.sites.items():
            flat |= {f"{prefix}sites/{name}/{key}": value for key, value in asdict(scores).items() if value is not None}
        return flat


def eval_sae_on_multi_site_model(
    sae: SAE,
    model: MultiSiteModel,
    num_samples: int = 100_000,
    batch_size: int | None = None,
    *,
    reads: Sequence[str] = (),
    writes: Sequence[str] = (),
    baseline: bool = True,
) -> MultiSiteEvalResult:
    """Scores of `sae` on held-out samples of a world.

    A dictionary that names its sites finds them by name; one that does not reads all of the world's, or `reads`, and, if it
    is a transcoder, writes the world's targets, or `writes`. `baseline` adds the whole scores of an untrained one. Raises
    ConfigError for sites that the world has not, and for widths that do not fit.

    >>> from sae_core import create
    >>> from sae_synthetic import MultiSiteModelConfig
    >>> world = MultiSiteModel(MultiSiteModelConfig(num_features=8, sites={"a": 6, "b": 6}, exclusive={"b": 2}, seed=0))
    >>> crosscoder = create("topk", d_in=12, d_sae=8, k=2, reads={"a": 6, "b": 6}, seed=0)
    >>> found = eval_sae_on_multi_site_model(crosscoder, world, num_samples=100)
    >>> found.sites["b"].exclusive_features, found.sites["a"].exclusive_features
    (2, 0)
    """
    read = _chosen(sae.reads, reads, list(model.sites), model, "reads")
    if sae.reconstructs_input:
        require(not writes, "writes: this dictionary writes the sites that it reads")
        written = read
    else:
        written = _chosen(sae.writes, writes, list(model.target_sites) or list(model.sites), model, "writes")
    inputs, outputs = side_by_side(model, read), side_by_side(model, written)
    for what, names, wanted, found in (
        ("reads", read, inputs.hidden_dim, sae.d_in),
        ("writes", written, outputs.hidden_dim, sae.d_out),
    ):
        columns = f"{', '.join(names)} have {wanted}"
        require(wanted == found, f"the dictionary {what} {found} columns, {columns}; name the sites with {what}=[...]")
    whole = judge(sae, inputs, outputs, model.activation_generator, num_samples, batch_size, baseline=baseline)
    return _with_sites(sae, whole, outputs, {name: model.dictionaries[name] for name in written})


def site_shares(vectors: Tensor, sites: Sites) -> Tensor:
    """(S, rows) share of each site in the summed norms of the rows of `vectors` (rows, width); zero rows have NaN.

    >>> import torch
    >>> site_shares(torch.tensor([[3.0, 4.0, 0.0], [1.0, 0.0, 1.0]]), Sites({"a": 2, "b": 1})).tolist()
    [[1.0, 0.5], [0.0, 0.5]]
    """
    norms_SR = sites.per_site_norms(vectors)
    return norms_SR / norms_SR.sum(dim=0)


def _with_sites(
    sae: SAE, whole: SyntheticDataEvalResult, truth: FeatureDictionary, dictionaries: dict[str, FeatureDictionary]
) -> MultiSiteEvalResult:
    directions = sae.directions().float().cpu()
    vectors = truth.feature_vectors.detach().float().cpu()
    there = (vectors.norm(dim=1) > 0).nonzero().squeeze(1)
    sites = Sites({name: features.hidden_dim for name, features in dictionaries.items()})
    pairs = match_features(directions, vectors[there])
    latents, features, cosines = pairs.a_indices, there[pairs.b_indices], pairs.cosines.abs()
    latent_shares_SF, feature_shares_SN = site_shares(directions, sites), site_shares(vectors, sites)
    apart = (latent_shares_SF[:, latents] - feature_shares_SN[:, features]).abs().nanmean()
    scores: dict[str, SiteScores] = {}
    for place, (name, columns) in enumerate(sites.slices().items()):
        own = vectors[:, columns]
        exclusive_N = feature_shares_SN[place] == 1
        alone_F = latent_shares_SF[place] >= _ALONE
        right = alone_F[latents] & exclusive_N[features] & (cosines >= _FOUND)
        several = len(sites.widths) > 1
        exclusive, alone = (int(exclusive_N.sum()), int(alone_F.sum())) if several else (0, 0)
        scores[name] = SiteScores(
            mcc=mean_correlation_coefficient(directions[:, columns], own[own.norm(dim=1) > 0]),
            exclusive_features=exclusive,
            exclusive_found=float(right.sum()) / exclusive if exclusive else None,
            exclusive_latents=alone,
            exclusive_right=float(right.sum()) / alone if alone else None,
        )
    return MultiSiteEvalResult(whole, float(apart) if len(sites.widths) > 1 else None, scores)


def _chosen(own: Any, asked: Sequence[str], default: list[str], model: MultiSiteModel, what: str) -> list[str]:
    """Names of the world's sites: those that the dictionary names, or that were asked for, or all."""
    named = [name for name in own if name]
    if asked and named and list(asked) != named:
        raise ConfigError(f"{what}: the dictionary names its own sites, {', '.join(named)}")
    chosen = named or list(asked) or default
    for name in chosen:
        require(
            name in model.dictionaries,
            f"{what}: the world has no site {name!r}; it has {', '.join(model.dictionaries)}",
        )
    return chosen
