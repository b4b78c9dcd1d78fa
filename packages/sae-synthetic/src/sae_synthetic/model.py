"""`SyntheticModel`: a whole synthetic world in one object, from a config or from disk.

A model is a feature dictionary, a generator of activations and, perhaps, a hierarchy and correlations. Everything random
about it follows from the config's seed: seed for the vectors and the firing probabilities, seed + 1 for the standard
deviations, + 2 for the means, + 3 for the hierarchy, + 4 for the correlations. Without a seed all of it is random, once.

On disk it is the folder that SAELens 6.54 writes and reads: ``synthetic_model_config.json``, ``synthetic_model.safetensors``
and, with a hierarchy, ``hierarchy.json``. The safetensors file written here also holds the magnitudes, so that a model
without a seed comes back as it was.
"""

# N features, D hidden_dim, R rank

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast, final

import torch
from sae_core import SparseCodes
from sae_core.config import option, require, structure
from sae_core.errors import ConfigError, FormatError, did_you_mean
from sae_core.format.files import read_safetensors
from sae_core.format.write import write_atomically
from torch import Tensor

from sae_synthetic._random import checked_seed, derived_seed
from sae_synthetic.correlation import (
    LowRankCorrelationMatrix,
    dtype_of,
    generate_random_low_rank_correlation_matrix,
)
from sae_synthetic.features import FeatureDictionary, orthogonal_initializer
from sae_synthetic.firing_magnitudes import MagnitudeConfig, generate_magnitudes
from sae_synthetic.firing_probabilities import FiringProbabilityConfig, ZipfianFiringProbabilityConfig
from sae_synthetic.generator import ActivationGenerator
from sae_synthetic.hierarchy import Hierarchy, HierarchyConfig, generate_hierarchy
from sae_synthetic.registry import settings_of

__all__ = [
    "SYNTHETIC_MODEL_CONFIG_FILENAME",
    "SYNTHETIC_MODEL_HIERARCHY_FILENAME",
    "SYNTHETIC_MODEL_WEIGHTS_FILENAME",
    "LowRankCorrelationConfig",
    "OrthogonalizationConfig",
    "SyntheticModel",
    "SyntheticModelConfig",
]

SYNTHETIC_MODEL_CONFIG_FILENAME = "synthetic_model_config.json"
SYNTHETIC_MODEL_WEIGHTS_FILENAME = "synthetic_model.safetensors"
SYNTHETIC_MODEL_HIERARCHY_FILENAME = "hierarchy.json"


@final
@dataclass(frozen=True)
class OrthogonalizationConfig:
    """How the feature vectors are made nearly orthogonal; see `orthogonalize_embeddings`."""

    num_steps: int = option(default=200, help="steps of descent")
    lr: float = option(default=0.01, help="learning rate")
    chunk_size: int = option(default=1024, help="features at a time; bounds the memory")

    def __post_init__(self) -> None:
        require(self.num_steps >= 0, f"num_steps must be at least 0, not {self.num_steps}")
        require(self.lr > 0, f"lr must be positive, not {self.lr}")
        require(self.chunk_size >= 1, f"chunk_size must be at least 1, not {self.chunk_size}")

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON values."""
        return settings_of(self)

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> OrthogonalizationConfig:
        """The config that `to_dict` wrote. Raises ConfigError."""
        return structure(d, cls, where="orthogonalization")


@final
@dataclass(frozen=True)
class LowRankCorrelationConfig:
    """Random low-rank correlations; see `generate_random_low_rank_correlation_matrix`."""

    rank: int = option(default=32, help="rank of the correlations")
    correlation_scale: float = option(default=0.1, help="standard deviation of the factor's entries")
    seed: int | None = option(default=None, help="seed of the correlations; by default the model's seed + 4")

    def __post_init__(self) -> None:
        require(self.rank >= 1, f"rank must be at least 1, not {self.rank}")
        require(self.correlation_scale >= 0, f"correlation_scale must not be negative, found {self.correlation_scale}")

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON values."""
        return settings_of(self)

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> LowRankCorrelationConfig:
        """The config that `to_dict` wrote. Raises ConfigError."""
        return structure(d, cls, where="correlation")


@final
@dataclass(frozen=True)
class SyntheticModelConfig:
    """Everything that defines a synthetic model.

    >>> config = SyntheticModelConfig(num_features=64, hidden_dim=16, std_firing_magnitudes=0.2, seed=1)
    >>> SyntheticModelConfig.from_dict(config.to_dict()) == config
    True
    """

    num_features: int = option(help="number of true features")
    hidden_dim: int = option(help="width of the activations")
    firing_probability: FiringProbabilityConfig = option(
        default_factory=ZipfianFiringProbabilityConfig, help="how often each feature fires"
    )
    hierarchy: HierarchyConfig | None = option(default=None, help="shape of a generated hierarchy, or none")
    orthogonalization: OrthogonalizationConfig | None = option(
        default=None, help="how to orthogonalise the features; none leaves random directions"
    )
    correlation: LowRankCorrelationConfig | None = option(default=None, help="correlated firing, or none")
    std_firing_magnitudes: float | MagnitudeConfig = option(default=0.0, help="spread of a firing feature's value")
    mean_firing_magnitudes: float | MagnitudeConfig = option(default=1.0, help="mean of a firing feature's value")
    bias: bool | float = option(default=1.0, help="norm of the bias; true is 1, false is none")
    dtype: str = option(default="float32", help="precision of the activations")
    seed: int | None = option(default=None, help="decides everything; none is random")

    def __post_init__(self) -> None:
        for name in ("num_features", "hidden_dim"):
            value = getattr(self, name)
            require(
                isinstance(value, int) and not isinstance(value, bool) and value >= 1,
                f"{name} must be a positive integer, not {value!r}",
            )
        kinds: dict[str, tuple[type, ...]] = {
            "firing_probability": (FiringProbabilityConfig,),
            "hierarchy": (HierarchyConfig, type(None)),
            "orthogonalization": (OrthogonalizationConfig, type(None)),
            "correlation": (LowRankCorrelationConfig, type(None)),
            "std_firing_magnitudes": (int, float, MagnitudeConfig),
            "mean_firing_magnitudes": (int, float, MagnitudeConfig),
            "bias": (bool, int, float),
        }
        for name, kind in kinds.items():
            value = getattr(self, name)
            names = " or ".join(one.__name__ for one in kind)
            require(isinstance(value, kind), f"{name} must be {names}, not {type(value).__name__}")
        for name in ("std_firing_magnitudes", "mean_firing_magnitudes"):
            value = getattr(self, name)
            require(isinstance(value, MagnitudeConfig) or value >= 0, f"{name} must not be negative, found {value}")
        dtype_of(self.dtype)
        checked_seed(self.seed)

    def to_dict(self) -> dict[str, Any]:
        """The settings as nested JSON values."""
        plain = settings_of(self)
        return {key: value.to_dict() if hasattr(value, "to_dict") else value for key, value in plain.items()}

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> SyntheticModelConfig:
        """The config that `to_dict` wrote. Raises ConfigError for unknown keys and impossible values."""
        known = [field.name for field in fields(cls)]
        unknown = [key for key in d if key not in known]
        if unknown:
            hint = did_you_mean(str(unknown[0]), known)
            raise ConfigError(f"synthetic model: unknown key {unknown[0]!r}{hint} (known: {', '.join(known)})")
        missing = [key for key in ("num_features", "hidden_dim") if key not in d]
        require(not missing, f"synthetic model: missing key {', '.join(missing)}")
        values = dict(d)
        for key, read in _NESTED.items():
            if isinstance(values.get(key), Mapping):
                values[key] = read(values[key])
        return cls(**values)


_NESTED: dict[str, Any] = {
    "firing_probability": FiringProbabilityConfig.from_dict,
    "hierarchy": HierarchyConfig.from_dict,
    "orthogonalization": OrthogonalizationConfig.from_dict,
    "correlation": LowRankCorrelationConfig.from_dict,
    "std_firing_magnitudes": MagnitudeConfig.from_dict,
    "mean_firing_magnitudes": MagnitudeConfig.from_dict,
}


@final
class SyntheticModel:
    """A synthetic world: `feature_dict`, `activation_generator`, `hierarchy` and `correlation_matrix`.

    Parts that are given are taken instead of being made from `cfg`. `sample` continues one row of batches that the seed
    decides; `state_dict` holds the position.

    >>> world = SyntheticModel(SyntheticModelConfig(num_features=64, hidden_dim=16, seed=0))
    >>> hidden, features = world.sample_with_features(5)
    >>> hidden.shape, features.shape
    (torch.Size([5, 16]), torch.Size([5, 64]))
    """

    def __init__(
        self,
        cfg: SyntheticModelConfig,
        feature_dict: FeatureDictionary | None = None,
        activation_generator: ActivationGenerator | None = None,
        hierarchy: Hierarchy | None = None,
        correlation_matrix: LowRankCorrelationMatrix | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        self.cfg = cfg
        base = checked_seed(cfg.seed)
        self.hierarchy = hierarchy
        if hierarchy is None and cfg.hierarchy is not None:
            self.hierarchy = generate_hierarchy(cfg.num_features, cfg.hierarchy, base + 3)
        self.correlation_matrix = correlation_matrix
        if correlation_matrix is None and cfg.correlation is not None:
            chosen = cfg.correlation.seed
            self.correlation_matrix = generate_random_low_rank_correlation_matrix(
                cfg.num_features,
                cfg.correlation.rank,
                cfg.correlation.correlation_scale,
                base + 4 if chosen is None else chosen,
            )
        if feature_dict is None:
            steps = cfg.orthogonalization
            initializer = None
            if steps is not None:
                initializer = orthogonal_initializer(steps.num_steps, steps.lr, chunk_size=steps.chunk_size)
            feature_dict = FeatureDictionary(
                cfg.num_features, cfg.hidden_dim, bias=cfg.bias, initializer=initializer, seed=base
            )
        self.feature_dict = feature_dict
        if activation_generator is None:
            activation_generator = _make_generator(cfg, base, self.hierarchy, self.correlation_matrix)
        self.activation_generator = activation_generator
        for name, size in (
            ("feature_dict", feature_dict.num_features),
            ("generator", activation_generator.num_features),
        ):
            require(size == cfg.num_features, f"{name} has {size} features, the config {cfg.num_features}")
        require(
            feature_dict.hidden_dim == cfg.hidden_dim,
            f"feature_dict has width {feature_dict.hidden_dim}, the config {cfg.hidden_dim}",
        )
        self.to(device, dtype_of(cfg.dtype))

    @property
    def device(self) -> torch.device:
        """Where samples are made."""
        return self.feature_dict.feature_vectors.device

    @property
    def d_in(self) -> int:
        """Width of the activations."""
        return self.cfg.hidden_dim

    @property
    def use_sparse_tensors(self) -> bool:
        """Whether `sample_with_features` returns features as sparse COO tensors."""
        return self.activation_generator.use_sparse_tensors

    @use_sparse_tensors.setter
    def use_sparse_tensors(self, value: bool) -> None:
        self.activation_generator.use_sparse_tensors = value

    @torch.no_grad()
    def sample_with_codes(self, batch_size: int) -> tuple[Tensor, SparseCodes]:
        """(batch_size, hidden_dim) activations, and the features behind them as `SparseCodes`."""
        codes = self.activation_generator.sample_codes(batch_size)
        return self.feature_dict(codes), codes

    def sample(self, batch_size: int) -> Tensor:
        """(batch_size, hidden_dim) activations."""
        return self.sample_with_codes(batch_size)[0]

    forward = sample
    __call__ = sample

    def sample_with_features(self, batch_size: int) -> tuple[Tensor, Tensor]:
        """(batch_size, hidden_dim) activations and (batch_size, num_features) feature activations."""
        hidden, codes = self.sample_with_codes(batch_size)
        return hidden, self.activation_generator.as_tensor(codes)

    def to(
        self,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
        non_blocking: bool = False,
    ) -> SyntheticModel:
        """Move everything, in place; what is sampled next keeps its place in the row of batches."""
        if dtype is not None:
            self.feature_dict.to(dtype_of(dtype))
            self.activation_generator.dtype = dtype_of(dtype)
        if device is not None:
            self.feature_dict.to(device, non_blocking=non_blocking)
            self.activation_generator.to(device)
        return self

    def state_dict(self) -> dict[str, Any]:
        """The position in the row of batches."""
        return self.activation_generator.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue at a saved position."""
        self.activation_generator.load_state_dict(dict(state))

    def save(self, path: str | Path) -> None:
        """Write the folder. The config comes last, so an interrupted save leaves no folder that could be loaded."""
        from safetensors.torch import save_file

        folder = Path(path)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FormatError(f"{folder}: cannot save a synthetic model there: {error.strerror}") from error
        config_path = folder / SYNTHETIC_MODEL_CONFIG_FILENAME
        config_path.unlink(missing_ok=True)
        generator = self.activation_generator
        tensors = {
            "feature_vectors": self.feature_dict.feature_vectors,
            "bias": self.feature_dict.bias,
            "firing_probabilities": generator.firing_probabilities,
            "mean_firing_magnitudes": generator.mean_firing_magnitudes,
            "std_firing_magnitudes": generator.std_firing_magnitudes,
        }
        if self.correlation_matrix is not None:
            tensors |= self.correlation_matrix._asdict()
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        write_atomically(folder / SYNTHETIC_MODEL_WEIGHTS_FILENAME, lambda file: save_file(plain, file))
        hierarchy_path = folder / SYNTHETIC_MODEL_HIERARCHY_FILENAME
        if self.hierarchy is None:
            hierarchy_path.unlink(missing_ok=True)
        else:
            _write_json(hierarchy_path, self.hierarchy.to_dict())
        _write_json(config_path, self.cfg.to_dict())

    @classmethod
    def load_from_disk(cls, path: str | Path, device: str | torch.device = "cpu") -> SyntheticModel:
        """The model in a folder. Raises FormatError that names the file, and the key where there is one."""
        folder = Path(path)
        try:
            cfg = SyntheticModelConfig.from_dict(_read_json(folder / SYNTHETIC_MODEL_CONFIG_FILENAME))
            hierarchy = None
            if (folder / SYNTHETIC_MODEL_HIERARCHY_FILENAME).exists():
                hierarchy = Hierarchy.from_dict(_read_json(folder / SYNTHETIC_MODEL_HIERARCHY_FILENAME))
        except ConfigError as error:
            raise FormatError(f"{folder}: {error}") from error
        if cfg.hierarchy is not None and hierarchy is None:
            raise FormatError(
                f"{folder}: the config has a hierarchy, but {SYNTHETIC_MODEL_HIERARCHY_FILENAME} is missing"
            )
        weights = folder / SYNTHETIC_MODEL_WEIGHTS_FILENAME
        if not weights.is_file():
            raise FormatError(f"{weights}: there is no such file")
        tensors = _checked(dict(read_safetensors(weights)), cfg, weights)
        features = FeatureDictionary(cfg.num_features, cfg.hidden_dim, bias=cfg.bias, initializer=None, seed=0)
        with torch.no_grad():
            features.feature_vectors.copy_(tensors["feature_vectors"])
            features.bias.copy_(tensors["bias"])
        correlation = None
        if "correlation_factor" in tensors:
            correlation = LowRankCorrelationMatrix(
                tensors["correlation_factor"].float(), tensors["correlation_diag"].float()
            )
        try:
            generator = _make_generator(cfg, checked_seed(cfg.seed), hierarchy, correlation, tensors)
        except ConfigError as error:
            raise FormatError(f"{folder}: {error}") from error
        return cls(cfg, features, generator, hierarchy, correlation, device=device)

    @classmethod
    def from_pretrained(
        cls,
        repo_id: str,
        model_path: str | None = None,
        device: str | torch.device = "cpu",
        force_download: bool = False,
        revision: str | None = None,
    ) -> SyntheticModel:
        """A published model from the Hugging Face Hub; `model_path` is its folder in the repository.

        Raises SyntheticHubError where the Hub has not what is asked for, FormatError where it is no synthetic model.
        """
        from sae_synthetic.hub import fetch_folder

        names = (
            SYNTHETIC_MODEL_CONFIG_FILENAME,
            SYNTHETIC_MODEL_WEIGHTS_FILENAME,
            SYNTHETIC_MODEL_HIERARCHY_FILENAME,
        )
        folder = fetch_folder(repo_id, model_path or "", names, revision=revision, force_download=force_download)
        return cls.load_from_disk(folder, device=device)

    @classmethod
    def load_from_source(
        cls, source: SyntheticModelConfig | str | Path, device: str | torch.device = "cpu"
    ) -> SyntheticModel:
        """A model from a config, a folder, or a repository of the Hub as ``owner/name`` or ``owner/name:folder``."""
        if isinstance(source, SyntheticModelConfig):
            return cls(source, device=device)
        if (folder := Path(source).expanduser()).exists():
            return cls.load_from_disk(folder, device=device)
        repo_id, _, model_path = str(source).partition(":")
        if repo_id.count("/") != 1:
            raise FormatError(f"{source}: neither a folder nor a repository of the form owner/name")
        return cls.from_pretrained(repo_id, model_path or None, device=device)


def _make_generator(
    cfg: SyntheticModelConfig,
    base: int,
    hierarchy: Hierarchy | None,
    correlation: LowRankCorrelationMatrix | None,
    saved: Mapping[str, Tensor] | None = None,
) -> ActivationGenerator:
    """The generator of a config; what is `saved` is taken from there."""
    tensors = dict(saved or {})
    if "firing_probabilities" not in tensors:
        wanted = cfg.firing_probability.generate(cfg.num_features, base)
        if hierarchy is not None and cfg.hierarchy is not None and cfg.hierarchy.compensate_probabilities:
            wanted = _compensated(wanted, hierarchy)
        tensors["firing_probabilities"] = wanted
    for name, seed in (("std_firing_magnitudes", base + 1), ("mean_firing_magnitudes", base + 2)):
        if name not in tensors:
            rule = cast("float | MagnitudeConfig", getattr(cfg, name))
            tensors[name] = generate_magnitudes(cfg.num_features, rule, seed)
    return ActivationGenerator(
        cfg.num_features,
        tensors["firing_probabilities"],
        tensors["std_firing_magnitudes"],
        tensors["mean_firing_magnitudes"],
        modify_activations=None if hierarchy is None else hierarchy.modifier,
        correlation_matrix=correlation,
        dtype=cfg.dtype,
        seed=derived_seed(base, "samples"),
    )


def _compensated(wanted_N: Tensor, hierarchy: Hierarchy) -> Tensor:
    """(N,) probabilities raised for the hierarchy; a warning where even 1 is too little."""
    raised_N = wanted_N * hierarchy.compute_probability_correction_factors(wanted_N)
    if too_rare := int(((raised_N > 1) & (wanted_N < 1)).sum()):
        warnings.warn(
            f"hierarchy.compensate_probabilities: {too_rare} of {len(wanted_N)} features would need a probability of more "
            "than 1 where their parent fires and get 1; they stay rarer than wanted. Lower firing_probability, or take "
            "firing_probabilities_for_rates, which is exact",
            stacklevel=4,
        )
    return raised_N.clamp_max(1.0)


def _checked(tensors: dict[str, Tensor], cfg: SyntheticModelConfig, path: Path) -> dict[str, Tensor]:
    """The tensors of a file, if they are those that the config asks for."""
    shapes: dict[str, tuple[int, ...]] = {
        "feature_vectors": (cfg.num_features, cfg.hidden_dim),
        "bias": (cfg.hidden_dim,),
        "firing_probabilities": (cfg.num_features,),
    }
    if cfg.correlation is not None:
        shapes["correlation_factor"] = (cfg.num_features, cfg.correlation.rank)
        shapes["correlation_diag"] = (cfg.num_features,)
    optional = dict.fromkeys(("mean_firing_magnitudes", "std_firing_magnitudes"), (cfg.num_features,))
    for name, shape in (shapes | {key: value for key, value in optional.items() if key in tensors}).items():
        if name not in tensors:
            raise FormatError(f"{path}: the tensor {name!r} is missing; there are {', '.join(sorted(tensors))}")
        if tuple(tensors[name].shape) != shape:
            raise FormatError(f"{path}: {name!r} has shape {tuple(tensors[name].shape)}, the config asks for {shape}")
        if not bool(torch.isfinite(tensors[name]).all()):
            raise FormatError(f"{path}: {name!r} has values that are not finite")
    if unknown := sorted(set(tensors) - set(shapes) - set(optional)):
        raise FormatError(f"{path}: unknown tensor {unknown[0]!r}; known are {', '.join([*shapes, *optional])}")
    rules = [getattr(cfg, name) for name in optional if name not in tensors]
    if cfg.seed is None and any(isinstance(rule, MagnitudeConfig) and _is_random(rule) for rule in rules):
        warnings.warn(
            f"{path}: the model has no seed and its file holds no magnitudes, so random ones are drawn anew",
            stacklevel=3,
        )
    return tensors


def _is_random(rule: MagnitudeConfig) -> bool:
    return not torch.equal(rule.generate(16, 0), rule.generate(16, 1))


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    text = json.dumps(data, indent=2) + "\n"
    write_atomically(path, lambda file: _fill(file, text))


def _fill(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FormatError(f"{path}: cannot read it: {error.strerror}") from error
    except ValueError as error:
        raise FormatError(f"{path}: not JSON: {error}") from error
    if not isinstance(data, dict):
        raise FormatError(f"{path}: expected a JSON object, found {type(data).__name__}")
    return cast("dict[str, Any]", data)
