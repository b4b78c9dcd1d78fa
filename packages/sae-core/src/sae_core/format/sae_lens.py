"""The native format, which is SAELens's: cfg.json beside sae_weights.safetensors.

Since SAELens 6, cfg.json holds the architecture's fields and everything else under ``metadata``. Before, it was one flat
object in which fields of the SAE, the model and the training run stood side by side; `_upgrade` sorts those out.

A field that the file lacks has the value that SAELens gives it (`_DEFAULTS`), not that of a new SAE of ours: what this
project saves holds every field, so a gap is always somebody else's.

Only what changes the forward pass is config. Facts about the model (`METADATA_FACTS`) are known beside the fields as well as
under ``metadata``, and fields of SAELens's training configs that have no counterpart here are facts about the past, kept in
the metadata under ``training_architecture_details``. Any other unknown key is an error, unless ``ignore_keys`` names it.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast, final

from sae_core.errors import ConfigError, FormatError, UnknownNameError, did_you_mean
from sae_core.format.facts import METADATA_FACTS, known_facts
from sae_core.format.files import CONFIG_FILE, WEIGHTS_FILE, join, read_json
from sae_core.format.pair import read_pair
from sae_core.format.sae_lens_names import from_sae_lens, of_its_provider
from sae_core.protocols import FileSource, LoadedSAE

if TYPE_CHECKING:
    from torch import Tensor

    from sae_core.dictionary import Dictionary

__all__ = ["SaeLensLoader"]

_SCALER_FILE = "activation_scaler.json"  # beside the weights in training checkpoints, which are for scaled activations
_PARAMETER_FACTS = ("dtype", "device")  # where and how weights are held is the caller's choice, not config
_TRAINING_FACTS = frozenset(
    {
        "aux_loss_coefficient",
        "decoder_init_norm",
        "jumprelu_bandwidth",
        "jumprelu_init_threshold",
        "jumprelu_sparsity_loss_mode",
        "jumprelu_ste_to_input",
        "jumprelu_tanh_scale",
        "l0_coefficient",
        "l0_warm_up_steps",
        "l1_coefficient",
        "l1_warm_up_steps",
        "lp_norm",
        "matryoshka_widths",
        "pre_act_loss_coefficient",
        "target_l0",
        "topk_threshold_lr",
        "use_matryoshka_aux_loss",
        "use_sparse_activations",
    }
)
_NAME, _VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*"), re.compile(r"[0-9][0-9A-Za-z.+!]*")
_RENAMED = {"hook_point": "hook_name", "hook_point_head_index": "hook_head_index", "activation_fn_str": "activation_fn"}
_FLAT_FACTS = METADATA_FACTS | {
    "dataset_trust_remote_code",
    "disable_concat_sequences",
    "hook_layer",
    "neuronpedia",
    "num_dead_features",
    "sae_lens_training_version",
    "sae_lens_version",
    "sequence_separator_token",
}
_DEFAULTS: Mapping[str, Any] = {
    "apply_b_dec_to_input": True,
    "normalize_activations": "none",
    "reshape_activations": "none",
    "k": 100,
    "rescale_acts_by_decoder_norm": False,  # unknown before 6.14, and False when missing since
    "residual_threshold": 1e-2,
    "max_iterations": None,
    "stop_on_duplicate_support": True,
    "n_heads": 8,
    "n_attn_layers": 1,
    "bottleneck_factor": 64,
    "sae_diff_type": "topk",
    "kval_topk": None,
    "tied_weights": True,
    "activation_normalization_factor": 1.0,
}


@final
class SaeLensLoader:
    """Reads folders written by SAELens, any version, and by ``sae.save``."""

    def matches(self, source: FileSource, folder: str = "") -> bool:
        """A cfg.json and weights beside it."""
        return source.exists(join(folder, CONFIG_FILE)) and source.exists(join(folder, WEIGHTS_FILE))

    def load(
        self,
        source: FileSource,
        folder: str = "",
        *,
        weights: bool = True,
        overrides: Mapping[str, Any] | None = None,
        rows: Sequence[int] | None = None,
    ) -> LoadedSAE:
        """Config, metadata and tensors of the folder."""
        where = f"{source.location}/{join(folder, CONFIG_FILE)}"
        tensors: dict[str, Tensor] = {}
        if weights:
            cfg, tensors = read_pair(source, folder)
        else:
            cfg = read_json(source, join(folder, CONFIG_FILE))
        metadata = cfg.pop("metadata", None) or {}
        if not isinstance(metadata, Mapping):
            raise FormatError(f"{where}: 'metadata' must be an object, found {type(metadata).__name__}")
        metadata = dict(cast("Mapping[str, Any]", metadata))
        current = _is_current(cfg, metadata)
        if not current:
            cfg = _upgrade(cfg, where)
        written = cfg.pop("architecture", None)
        if not isinstance(written, str):
            raise FormatError(f"{where}: 'architecture' must name one, found {written!r}")
        if not _by_a_plugin(metadata):
            written, cfg = from_sae_lens(written, cfg)
        claimed = (overrides or {}).get("architecture")
        architecture = of_its_provider(written, _provider(metadata)[0]) if claimed is None else str(claimed)
        sae_class = _class(architecture, metadata, where)
        fields = {field.name for field in dataclasses.fields(sae_class.config_class)}
        facts = known_facts(overrides, "sae_lens", {"architecture", "norm_scaling_factor", *fields})
        facts.pop("architecture", None)
        ignored = facts.pop("ignore_keys", None) or []
        scale = facts.pop("norm_scaling_factor", None)
        if scale is None and source.exists(join(folder, _SCALER_FILE)):
            scale = read_json(source, join(folder, _SCALER_FILE)).get("scaling_factor")
        cfg = {key: value for key, value in cfg.items() if key not in ignored or key in fields}
        metadata = _facts_beside(cfg, metadata, fields, current, where)
        cfg |= {key: value for key, value in facts.items() if key in fields}
        metadata |= {key: value for key, value in facts.items() if key not in fields}
        config = _sort(cfg, architecture, metadata, fields, where)
        config = _as_trained(config, written, metadata, sae_class)
        if architecture == written and not _by_a_plugin(metadata):  # whose fields may have the same names
            config = {**{key: value for key, value in _DEFAULTS.items() if key in fields}, **config}
        if weights:
            _upgrade_tensors(tensors, sae_class, f"{source.location}/{join(folder, WEIGHTS_FILE)}")
        if rows is not None:
            _take_rows(tensors, config, rows, sae_class, where)
        return LoadedSAE(architecture, config, tensors, metadata, activation_scale=scale)


def _as_trained(
    config: dict[str, Any], written: str, metadata: Mapping[str, Any], sae_class: type[Dictionary]
) -> dict[str, Any]:
    """`config` with the fields that only training reads, as the run had them that `sae.save` recorded; `written` is the
    architecture's name in the file, which has no owner.
    """
    ours = metadata.get("sae_core")
    recorded = cast("Mapping[str, Any]", ours).get("training_config") if isinstance(ours, Mapping) else None
    if not isinstance(recorded, Mapping) or metadata.get("training_architecture") != written:
        return config
    known = cast("Mapping[str, Any]", recorded)
    names = [field.name for field in dataclasses.fields(sae_class.config_class) if field.metadata.get("training")]
    return {**{name: known[name] for name in names if name in known}, **config}


def _take_rows(
    tensors: dict[str, Tensor], config: dict[str, Any], rows: Sequence[int], sae_class: type[Dictionary], where: str
) -> None:
    """Keep some latents only, in every tensor that the class declares to have one entry a latent."""
    import torch

    d_sae = config.get("d_sae")
    if wrong := [row for row in rows if not (isinstance(d_sae, int) and 0 <= row < d_sae)]:
        raise ConfigError(f"{where}: rows must lie in [0, d_sae = {d_sae}), not {wrong[0]}")
    config["d_sae"] = len(rows)
    for name in tensors:
        axis = sae_class.axis_in_files(name).latent if sae_class.declares(name) else None
        if axis is not None:
            if tensors[name].dim() <= axis or tensors[name].shape[axis] != d_sae:
                raise FormatError(
                    f"{where}: tensor {name!r} has shape {tuple(tensors[name].shape)}, but d_sae is {d_sae}"
                )
            tensors[name] = tensors[name].index_select(axis, torch.tensor(list(rows)))


def _is_current(cfg: Mapping[str, Any], metadata: Mapping[str, Any]) -> bool:
    """Whether SAELens 6 or newer wrote the file: only then are fields and metadata apart."""
    version = cfg.get("sae_lens_version") or metadata.get("sae_lens_version")
    return isinstance(version, str) and version.split(".")[0].isdigit() and int(version.split(".")[0]) >= 6


def _facts_beside(
    cfg: dict[str, Any], metadata: dict[str, Any], fields: set[str], current: bool, where: str
) -> dict[str, Any]:
    """`metadata` with the facts about the model that stand beside the fields, which are taken out of `cfg`.

    A flat config of before 6.0 mixes everything, so what is no field there and does not look like a misspelt one is a fact.
    """
    if current:
        if cfg.get("finetuning_scaling_factor", False) in (False, None):
            cfg.pop("finetuning_scaling_factor", None)
        beside = [key for key in cfg if key in _FLAT_FACTS and key not in fields]
    else:
        beside = [
            key
            for key in cfg
            if key not in fields | _TRAINING_FACTS | {*_PARAMETER_FACTS}
            and not did_you_mean(key, fields - _FLAT_FACTS, cutoff=0.85)
        ]
    for key in beside:
        value = cfg.pop(key)
        if metadata.setdefault(key, value) != value and value is not None and current:
            raise FormatError(
                f"{where}: {key!r} is {value!r}, but {metadata[key]!r} under 'metadata'; if the latter is right, load with the "
                f"fact ignore_keys=[{key!r}]"
            )
    return metadata


def _sort(
    cfg: dict[str, Any], architecture: str, metadata: dict[str, Any], fields: set[str], where: str
) -> dict[str, Any]:
    """The config's own fields; facts about training move to the metadata, and what nobody knows is an error."""
    config = {key: value for key, value in cfg.items() if key in fields}
    for key, value in config.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise FormatError(f"{where}: {key!r} is {value}, expected a finite number")
    facts = {key: value for key, value in cfg.items() if key in _TRAINING_FACTS and key not in fields}
    unknown = sorted(set(cfg) - set(config) - set(facts) - {*_PARAMETER_FACTS, "sae_lens_version"})
    if unknown:
        raise FormatError(
            f"{where}: unknown key {unknown[0]!r} for architecture {architecture!r}{did_you_mean(unknown[0], fields)} "
            f"(known: {', '.join(sorted(fields))}); if it does not change what the SAE computes, load with the fact "
            f"ignore_keys={unknown}"
        )
    if facts:
        said = metadata.get("training_architecture_details")
        known = cast("Mapping[str, Any]", said) if isinstance(said, Mapping) else {}
        metadata["training_architecture_details"] = {**facts, **known}
    return config


def _class(architecture: str, metadata: Mapping[str, Any], where: str) -> type[Dictionary]:
    from sae_core.plugins import get_registry

    try:
        return cast("type[Dictionary]", get_registry().usable("architecture", architecture))
    except UnknownNameError as error:
        package, version = _provider(metadata)
        if package == "local":
            raise UnknownNameError(
                f"{where}: architecture {architecture!r} was registered by the program that saved this, not by an installed "
                "plugin; register it here too (get_registry().register), or say who provides it now: "
                f"overrides={{'architecture': 'distribution:name'}}. ({error})"
            ) from None
        if package and not _is_installed(package):
            named = _NAME.fullmatch(package) and _VERSION.fullmatch(version)  # a file may say anything here
            how = (
                f"install it with: pip install '{package}>={version}'"
                if named
                else "look for it where the file came from"
            )
            raise UnknownNameError(
                f"{where}: architecture {architecture!r} is provided by {package if named else repr(package)} "
                f"{version if named else repr(version)}, which is not installed; {how}; if it has another name now, load with "
                f"overrides={{'architecture': 'distribution:name'}}. ({error})"
            ) from None
        raise UnknownNameError(f"{where}: {error}") from None


def _by_a_plugin(metadata: Mapping[str, Any]) -> bool:
    return _provider(metadata)[0] not in ("", "sae-core")


def _provider(metadata: Mapping[str, Any]) -> tuple[str, str]:
    """Distribution and version that provided the architecture when the file was written; empty if it does not say."""
    ours = metadata.get("sae_core")
    provider = cast("Mapping[str, Any]", ours).get("provider") if isinstance(ours, Mapping) else None
    said = cast("Mapping[str, Any]", provider) if isinstance(provider, Mapping) else {}
    return str(said.get("distribution", "")), str(said.get("version", ""))


def _is_installed(distribution: str) -> bool:
    import importlib.metadata

    try:
        importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _upgrade(flat: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A flat config of SAELens before 6.0 with today's names and values; fields and facts still stand side by side."""
    cfg = {_RENAMED.get(key, key): value for key, value in flat.items()}
    for key in ("d_in", "d_sae"):
        if key not in cfg:
            raise FormatError(f"{where}: no {key!r}; this is not the config of an SAE (keys: {', '.join(sorted(cfg))})")
    if cfg.get("finetuning_scaling_factor"):
        raise FormatError(
            f"{where}: 'finetuning_scaling_factor' was fitted to these latents; that form is not supported"
        )
    activation = cfg.pop("activation_fn", None) or "relu"
    cfg["architecture"] = architecture = cfg.get("architecture") or "standard"
    given = cfg.pop("activation_fn_kwargs", None) or {}
    if not isinstance(given, Mapping):
        raise FormatError(f"{where}: 'activation_fn_kwargs' must be an object, found {type(given).__name__}")
    arguments = dict(cast("Mapping[str, Any]", given))
    if activation == "topk":
        cfg["architecture"] = "topk"
        k = arguments.pop("k", cfg.get("k"))
        if k is None:
            raise FormatError(f"{where}: activation_fn is 'topk' but activation_fn_kwargs has no 'k'")
        cfg["k"] = k
    elif activation != "relu":
        raise FormatError(f"{where}: activation function {activation!r} is not supported (known: relu, topk)")
    elif architecture == "topk" and "k" in arguments:
        cfg["k"] = arguments.pop("k")
    if arguments:
        raise FormatError(f"{where}: activation_fn_kwargs has unknown keys {sorted(arguments)}")
    normalize = cfg.get("normalize_activations")
    if normalize is None or isinstance(normalize, bool):
        cfg["normalize_activations"] = "expected_average_only_in" if normalize else "none"
    cfg.setdefault("reshape_activations", "hook_z" if "hook_z" in str(cfg.get("hook_name", "")) else "none")
    cfg.setdefault("prepend_bos", True)
    return cfg


def _upgrade_tensors(tensors: dict[str, Tensor], sae_class: type[Dictionary], where: str) -> None:
    """What older or foreign files hold otherwise: an unused scaling factor, logarithms of thresholds, a bare running mean.

    A name that the architecture declares as its own means what it means there.
    """
    if "scaling_factor" in tensors and not sae_class.declares("scaling_factor"):
        if not bool((tensors["scaling_factor"] == 1).all()):
            raise FormatError(f"{where}: tensor 'scaling_factor' is not all ones; fine-tuned scaling is not supported")
        del tensors["scaling_factor"]
    if "topk_threshold" in tensors and sae_class.declares("topk_threshold_weight"):
        # a running mean whose weight was not written down: take it as it is
        tensors.setdefault("topk_threshold_weight", tensors["topk_threshold"].new_ones(()))
    if "log_threshold" in tensors and "threshold" not in tensors and not sae_class.declares("log_threshold"):
        tensors["threshold"] = tensors.pop("log_threshold").exp()
