"""Worlds of several sites: one set of features that fire, and at every site a dictionary of its own that writes them down.

A batch of a crosscoder holds several sites side by side, a batch of a transcoder inputs and targets. Here both come from
one draw of features: at site s feature i has the vector strength_si * direction_si. A feature may be everywhere (shared),
at one site only (exclusive), or everywhere but much weaker at one (weak). So it is known of every feature where it is, which
is what crosscoders are asked and cannot be checked on real models.

With `alike` near 1 the sites are like the residual streams of a model and its fine-tuned sibling: a shared feature has nearly
the same direction at all of them. With 0 they are like different layers.
"""

# N features, S sites, D width of a site, W width of all sites together

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, cast, final

import torch
from sae_core import ActivationBatch, SparseCodes
from sae_core.config import check_fields, option, require
from sae_core.errors import ConfigError, FormatError, did_you_mean
from sae_core.format.files import read_safetensors
from sae_core.format.write import write_atomically
from torch import Tensor

from sae_synthetic._random import checked_seed, derived_seed, generator_for
from sae_synthetic.correlation import LowRankCorrelationMatrix, dtype_of
from sae_synthetic.features import FeatureDictionary, orthogonal_initializer
from sae_synthetic.firing_magnitudes import MagnitudeConfig
from sae_synthetic.firing_probabilities import FiringProbabilityConfig, ZipfianFiringProbabilityConfig
from sae_synthetic.generator import ActivationGenerator
from sae_synthetic.hierarchy import Hierarchy, HierarchyConfig
from sae_synthetic.model import (
    LowRankCorrelationConfig,
    OrthogonalizationConfig,
    SyntheticModel,
    SyntheticModelConfig,
)
from sae_synthetic.registry import settings_of

__all__ = ["MULTI_SITE_CONFIG_FILENAME", "MultiSiteModel", "MultiSiteModelConfig", "side_by_side"]

MULTI_SITE_CONFIG_FILENAME = "multi_site_config.json"
_WEIGHTS_FILENAME = "multi_site.safetensors"
_FIRING_FOLDER = "firing"
_PER_SITE = ("sites", "targets", "exclusive", "weak", "weak_strength", "alike", "bias", "orthogonalization")


@final
@dataclass(frozen=True, kw_only=True)
class MultiSiteModelConfig:
    """Everything that defines a world of several sites.

    >>> config = MultiSiteModelConfig(num_features=32, sites={"base": 16, "tuned": 16}, exclusive={"tuned": 4}, seed=1)
    >>> MultiSiteModelConfig.from_dict(config.to_dict()) == config
    True
    """

    num_features: int = option(help="number of true features")
    sites: dict[str, int] = option(help="widths of the sites that are read, by name")
    targets: dict[str, int] = option(
        default_factory=dict, help="widths of the sites that a transcoder predicts; by default none"
    )
    exclusive: dict[str, int] = option(
        default_factory=dict, help="number of features by site that are there and nowhere else"
    )
    weak: dict[str, int] = option(
        default_factory=dict, help="number of shared features by site that are weaker there than elsewhere"
    )
    weak_strength: float = option(default=0.2, help="strength of a weak feature where it is weak; elsewhere it is 1")
    alike: float = option(
        default=0.0,
        help="cosine of a shared feature's directions at any two sites of one width: 0 unrelated, 1 the same",
    )
    firing_probability: FiringProbabilityConfig = option(
        default_factory=ZipfianFiringProbabilityConfig, help="how often each feature fires"
    )
    hierarchy: HierarchyConfig | None = option(default=None, help="shape of a generated hierarchy, or none")
    orthogonalization: OrthogonalizationConfig | None = option(
        default=None, help="how to orthogonalise the features of each site; none leaves random directions"
    )
    correlation: LowRankCorrelationConfig | None = option(default=None, help="correlated firing, or none")
    std_firing_magnitudes: float | MagnitudeConfig = option(default=0.0, help="spread of a firing feature's value")
    mean_firing_magnitudes: float | MagnitudeConfig = option(default=1.0, help="mean of a firing feature's value")
    bias: bool | float = option(default=False, help="norm of each site's bias; true is 1, false is none")
    dtype: str = option(default="float32", help="precision of the activations")
    seed: int | None = option(default=None, help="decides everything; none is random")

    def __post_init__(self) -> None:
        check_fields(self)
        names = [*self.sites, *self.targets]
        require(bool(self.sites), "sites: give at least one, name: width")
        require(len(set(names)) == len(names), f"sites and targets share a name: {', '.join(names)}")
        for name, width in {**self.sites, **self.targets}.items():
            require(
                isinstance(width, int) and not isinstance(width, bool) and width >= 1,
                f"width of site {name!r} must be a positive integer, not {width!r}",
            )
        for field in ("exclusive", "weak"):
            for name, count in cast("dict[str, Any]", getattr(self, field)).items():
                require(
                    name in names, f"{field}: no site {name!r}{did_you_mean(name, names)}; there are {', '.join(names)}"
                )
                require(
                    isinstance(count, int) and count >= 0,
                    f"{field}: {name!r} must be a number of features, not {count!r}",
                )
        require(
            len(names) > 1 or not (self.exclusive or self.weak), "exclusive and weak compare sites; there is only one"
        )
        chosen = sum(self.exclusive.values()) + sum(self.weak.values())
        require(
            chosen <= self.num_features,
            f"exclusive and weak: {chosen} features in all, but there are only {self.num_features}",
        )
        require(0 < self.weak_strength < 1, f"weak_strength must be in (0, 1), not {self.weak_strength}")
        require(0 <= self.alike <= 1, f"alike must be in [0, 1], not {self.alike}")
        widths = set(self.sites.values()) | set(self.targets.values())
        require(
            self.alike == 0 or len(widths) == 1,
            f"alike: directions compare within one width only, not {sorted(widths)}",
        )
        self._firing()

    def _firing(self) -> SyntheticModelConfig:
        """The part of it that says what fires, as the config of a model of one site."""
        own = {name: value for name, value in settings_of(self).items() if name not in _PER_SITE}
        return SyntheticModelConfig(hidden_dim=1, bias=False, **own)

    def to_dict(self) -> dict[str, Any]:
        """The settings as nested JSON values."""
        firing = self._firing().to_dict()
        plain = {name: firing.get(name, value) for name, value in settings_of(self).items()}
        steps = self.orthogonalization
        return {**plain, "orthogonalization": None if steps is None else steps.to_dict(), "bias": self.bias}

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> MultiSiteModelConfig:
        """The config that `to_dict` wrote. Raises ConfigError for unknown keys and impossible values."""
        known = [field.name for field in fields(cls)]
        for key in d:
            if key not in known:
                raise ConfigError(
                    f"multi-site model: unknown key {key!r}{did_you_mean(str(key), known)} (known: {', '.join(known)})"
                )
        missing = [key for key in ("num_features", "sites") if key not in d]
        require(not missing, f"multi-site model: missing key {', '.join(missing)}")
        firing = {key: value for key, value in d.items() if key not in _PER_SITE or key == "orthogonalization"}
        read = SyntheticModelConfig.from_dict({**firing, "hidden_dim": 1})
        return cls(**{**d, **{key: getattr(read, key) for key in firing}})


@final
class MultiSiteModel:
    """A world of several sites.

    `dictionaries` holds a `FeatureDictionary` for every site and target; a feature that is not at a site has the zero vector
    there. `reads` and `writes` are all sites, and all targets or None, side by side. A world may also be put together by hand
    from dictionaries and a generator.

    >>> world = MultiSiteModel(MultiSiteModelConfig(num_features=32, sites={"a": 16, "b": 8}, exclusive={"b": 4}, seed=0))
    >>> world.sample(5).shape, len(world.exclusive_to("b")), len(world.shared())
    (torch.Size([5, 24]), 4, 28)
    """

    def __init__(
        self,
        cfg: MultiSiteModelConfig,
        dictionaries: Mapping[str, FeatureDictionary] | None = None,
        activation_generator: ActivationGenerator | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        self.cfg = cfg
        base = checked_seed(cfg.seed)
        require(
            activation_generator is None or activation_generator.num_features == cfg.num_features,
            f"the generator has not the {cfg.num_features} features of the config",
        )
        self.firing = _firing_model(cfg, base, activation_generator)
        self.dictionaries = dict(dictionaries) if dictionaries is not None else _dictionaries(cfg, base)
        widths = {**cfg.sites, **cfg.targets}
        require(
            list(self.dictionaries) == list(widths), f"dictionaries: give one for each of {', '.join(widths)}, in order"
        )
        for name, features in self.dictionaries.items():
            found = (features.num_features, features.hidden_dim)
            wanted = (cfg.num_features, widths[name])
            require(
                found == wanted, f"the dictionary of site {name!r} has (features, width) {found}, the config {wanted}"
            )
        self.reads = side_by_side(self, list(cfg.sites))
        self.writes = side_by_side(self, list(cfg.targets)) if cfg.targets else None
        self.to(device)

    @property
    def activation_generator(self) -> ActivationGenerator:
        """What fires; replacing it changes what is drawn next."""
        return self.firing.activation_generator

    @activation_generator.setter
    def activation_generator(self, generator: ActivationGenerator) -> None:
        self.firing.activation_generator = generator

    @property
    def sites(self) -> Mapping[str, int]:
        """The sites that are read."""
        return self.cfg.sites

    @property
    def target_sites(self) -> Mapping[str, int]:
        """The sites that are predicted; empty where there are none."""
        return self.cfg.targets

    def strengths(self) -> Tensor:
        """(S, N) norm of every feature's vector at every site and target, in order."""
        return torch.stack([each.feature_vectors.detach().norm(dim=1) for each in self.dictionaries.values()])

    def exclusive_to(self, site: str) -> Tensor:
        """Features that are at `site` and nowhere else. Raises ConfigError for an unknown site."""
        require(site in self.dictionaries, f"no site {site!r}; there are {', '.join(self.dictionaries)}")
        there_SN = self.strengths() > 0
        place = list(self.dictionaries).index(site)
        return (there_SN[place] & (there_SN.sum(0) == 1)).nonzero().squeeze(1)

    def shared(self) -> Tensor:
        """Features that are at every site and target."""
        return (self.strengths() > 0).all(0).nonzero().squeeze(1)

    @torch.no_grad()
    def sample_with_codes(self, batch_size: int) -> tuple[ActivationBatch, SparseCodes]:
        """Inputs (batch_size, W) and targets, and the features behind them."""
        codes = self.activation_generator.sample_codes(batch_size)
        return ActivationBatch(self.reads(codes), None if self.writes is None else self.writes(codes)), codes

    def sample(self, batch_size: int) -> Tensor:
        """(batch_size, W) inputs alone, all sites side by side."""
        return self.sample_with_codes(batch_size)[0].inputs

    def to(self, device: str | torch.device) -> MultiSiteModel:
        """Move everything, in place."""
        for part in (*self.dictionaries.values(), self.reads, self.writes):
            if part is not None:
                part.to(device, dtype_of(self.cfg.dtype))
        self.firing.to(device)
        return self

    def save(self, path: str | Path) -> None:
        """Write the folder: config, vectors of all sites, and what fires. The config comes last."""
        from safetensors.torch import save_file

        folder = Path(path)
        (folder / MULTI_SITE_CONFIG_FILENAME).unlink(missing_ok=True)
        self.firing.save(folder / _FIRING_FOLDER)
        tensors: dict[str, Tensor] = {}
        for name, features in self.dictionaries.items():
            tensors[f"{name}/feature_vectors"] = features.feature_vectors.detach().cpu().contiguous()
            tensors[f"{name}/bias"] = features.bias.detach().cpu().contiguous()
        write_atomically(folder / _WEIGHTS_FILENAME, lambda file: save_file(tensors, file))
        text = json.dumps(self.cfg.to_dict(), indent=2) + "\n"
        write_atomically(
            folder / MULTI_SITE_CONFIG_FILENAME, lambda file: cast("None", file.write_text(text, encoding="utf-8"))
        )

    @classmethod
    def load_from_disk(cls, path: str | Path, device: str | torch.device = "cpu") -> MultiSiteModel:
        """The world in a folder. Raises FormatError that names the file."""
        folder = Path(path)
        file = folder / MULTI_SITE_CONFIG_FILENAME
        try:
            cfg = MultiSiteModelConfig.from_dict(json.loads(file.read_text(encoding="utf-8")))
        except OSError as error:
            raise FormatError(f"{file}: cannot read it: {error.strerror}") from error
        except (ValueError, AttributeError, TypeError) as error:
            raise FormatError(f"{file}: {error}") from error
        weights = folder / _WEIGHTS_FILENAME
        if not weights.is_file():
            raise FormatError(f"{weights}: there is no such file")
        tensors = dict(read_safetensors(weights))
        dictionaries: dict[str, FeatureDictionary] = {}
        for name, width in {**cfg.sites, **cfg.targets}.items():
            shapes = {"feature_vectors": (cfg.num_features, width), "bias": (width,)}
            for key, shape in shapes.items():
                found = tensors.get(f"{name}/{key}")
                if found is None or tuple(found.shape) != shape or not bool(torch.isfinite(found).all()):
                    what = "missing" if found is None else f"of shape {tuple(found.shape)}, or not finite"
                    raise FormatError(f"{weights}: '{name}/{key}' is {what}; {shape} is needed")
            dictionaries[name] = _dictionary(
                tensors.pop(f"{name}/feature_vectors").float(), tensors.pop(f"{name}/bias").float()
            )
        if tensors:
            raise FormatError(f"{weights}: unknown tensor {min(tensors)!r}")
        world = cls(cfg, dictionaries, device="cpu")
        world.firing = SyntheticModel.load_from_disk(folder / _FIRING_FOLDER)
        if world.firing.cfg.num_features != cfg.num_features:
            raise FormatError(
                f"{folder / _FIRING_FOLDER}: {world.firing.cfg.num_features} features, {file} has {cfg.num_features}"
            )
        return world.to(device)


def side_by_side(model: MultiSiteModel, names: Sequence[str]) -> FeatureDictionary:
    """The dictionaries of the named sites as one, their columns in that order."""
    parts = [model.dictionaries[name] for name in names]
    return _dictionary(
        torch.cat([part.feature_vectors.detach() for part in parts], dim=1),
        torch.cat([part.bias.detach() for part in parts]),
    ).to(parts[0].feature_vectors.device, parts[0].feature_vectors.dtype)


def _firing_model(cfg: MultiSiteModelConfig, seed: int, generator: ActivationGenerator | None) -> SyntheticModel:
    """What fires, as a model of one site of width 1, which knows how to save itself."""
    firing = replace(cfg._firing(), seed=seed)  # pyright: ignore[reportPrivateUsage] - of this module
    if generator is None:
        return SyntheticModel(firing)
    roots, correlation = generator.hierarchy_roots, generator.correlation_matrix
    require(
        (firing.hierarchy is None) == (not roots) and (firing.correlation is None) == (correlation is None),
        "the config and the generator that is given must agree on whether there are a hierarchy and correlations",
    )
    require(
        not isinstance(correlation, Tensor),
        "a generator with a full correlation matrix cannot be saved; use a low-rank one",
    )
    return SyntheticModel(
        firing,
        activation_generator=generator,
        hierarchy=Hierarchy(roots) if roots else None,
        correlation_matrix=cast("LowRankCorrelationMatrix | None", correlation),
    )


def _dictionary(vectors_ND: Tensor, bias_D: Tensor) -> FeatureDictionary:
    features = FeatureDictionary(*vectors_ND.shape, initializer=None, seed=0)
    with torch.no_grad():
        features.feature_vectors.copy_(vectors_ND)
        features.bias.copy_(bias_D)
    return features


@torch.no_grad()
def _dictionaries(cfg: MultiSiteModelConfig, seed: int) -> dict[str, FeatureDictionary]:
    """Directions of each site from a seed of its own, times strengths; those of shared features as alike as wanted.

    With c = `alike`, a site's direction is sqrt(c) times one that all sites share plus sqrt(1 - c) times its own, made
    orthogonal to that, so that two sites have the cosine c up to what their own parts happen to have in common.
    """
    steps = cfg.orthogonalization
    initializer = (
        None if steps is None else orthogonal_initializer(steps.num_steps, steps.lr, chunk_size=steps.chunk_size)
    )
    widths = {**cfg.sites, **cfg.targets}
    strengths = _strengths(cfg, seed)

    def draw(purpose: str, width: int, bias: bool | float = False) -> FeatureDictionary:
        return FeatureDictionary(cfg.num_features, width, bias, initializer, seed=derived_seed(seed, purpose))

    common = draw("directions of all sites", next(iter(widths.values()))).feature_vectors if cfg.alike else None
    made: dict[str, FeatureDictionary] = {}
    for place, (name, width) in enumerate(widths.items()):
        features = draw(f"directions of {name}", width, cfg.bias)
        own = features.feature_vectors
        if common is not None:
            apart = own - (own * common).sum(dim=1, keepdim=True) * common
            apart = apart / apart.norm(dim=1, keepdim=True).clamp_min(1e-8)
            own.copy_(cfg.alike**0.5 * common + (1 - cfg.alike) ** 0.5 * apart)
        own.mul_(strengths[place][:, None])
        made[name] = features
    return made


def _strengths(cfg: MultiSiteModelConfig, seed: int) -> Tensor:
    """(S, N): 1 where a feature is, `weak_strength` where it is weak, 0 where it is not. Which ones is drawn by the seed."""
    names = [*cfg.sites, *cfg.targets]
    order = torch.randperm(
        cfg.num_features, generator=generator_for(derived_seed(seed, "which features are where"))
    ).tolist()
    strengths = torch.ones(len(names), cfg.num_features)
    for name, count in cfg.exclusive.items():
        chosen, order = order[:count], order[count:]
        strengths[:, chosen] = 0
        strengths[names.index(name), chosen] = 1
    for name, count in cfg.weak.items():
        chosen, order = order[:count], order[count:]
        strengths[names.index(name), chosen] = cfg.weak_strength
    return strengths
