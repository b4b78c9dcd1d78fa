"""The model, place and text that a saved SAE was trained on, found from what it says of itself.

An SAE trained by this project carries its whole source in its metadata. One from elsewhere says less: SAELens writes the
model's name, the hook's name and some of the token policy; a catalogue adds the exact model. `source_of` makes a source
of either, with what the caller changes, and loads the model once for all SAEs of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from sae_core import SAE
from sae_core.config import require, structure
from sae_core.errors import ConfigError
from sae_core.yaml_text import set_by_override

from sae_lm.model import LanguageModel, load
from sae_lm.places import Route, route_of, says_place
from sae_lm.source import HuggingFaceSource, HuggingFaceSourceConfig
from sae_lm.text import Part

__all__ = ["known_settings", "source_of"]

# TransformerLens's short names whose Hub names differ in more than the owner.
_OWNERS = {"gpt2": "openai-community", "pythia": "EleutherAI", "gemma": "google", "Qwen": "Qwen"}


def source_of(
    saes: Mapping[str, SAE[Any]],
    *,
    overrides: Sequence[str] = (),
    text: str | None = None,
    device: str = "auto",
    command: str = "eval",
    two_models: bool = False,
) -> tuple[HuggingFaceSource, dict[str, str], Part]:
    """A source for SAEs of one model, the place of each, and which part of the text nobody trained on.

    `overrides` change settings, ``key=value``, a ``hook`` among them is the place of all; `text` is a file to read all of
    instead. With `two_models`, dictionaries that read a second model are allowed. Raises ConfigError when the SAEs do not say
    on what they were trained, or were trained on different models.
    """
    settings: dict[str, Any] = {}
    differing: set[str] = set()
    for sae in saes.values():
        known = known_settings(sae.metadata)
        if settings:
            differing |= {key for key in ("model", "revision", "second_model", "model_class", "context_size", "tokens")
                          if known.get(key) != settings.get(key)}  # fmt: skip
        settings = settings or known
    changed = {text_.partition("=")[0].partition(".")[0] for text_ in overrides}
    different = sorted(differing - changed)
    require(
        not different,
        f"{command}: the SAEs were trained with different settings ({', '.join(different)}); run them apart, or --set them",
    )
    hook = next((text_.partition("=")[2] for text_ in overrides if text_.startswith("hook=")), None)
    settings["device"] = device
    for override in overrides:
        set_by_override(settings, override)
    if text is not None:
        settings["text"] = {"kind": "file", "path": str(Path(text))}
    trained_by_us = all("source" in _ours(sae.metadata) for sae in saes.values())
    part: Part = "held_out" if trained_by_us and text is None else "all"
    of_columns = [name for name, sae in saes.items() if "columns" in _ours(sae.metadata)]
    require(
        not of_columns, f"{command}: {', '.join(of_columns)} was trained on columns of a data set; this is for text"
    )
    missing = [] if "model" in settings else ["model"]
    if hook is None and not {"hook", "reads"} & set(settings) and not all(says_place(sae) for sae in saes.values()):
        missing.insert(0, "hook")
    if missing:
        raise ConfigError(
            f"{command}: {', '.join(saes) if len(saes) > 1 else 'the SAE'} does not say on what it was trained; give "
            f"{' and '.join(missing)}, for example: --set model=NAME --set hook=model.layers.9"
        )
    named = {} if {"hook", "reads"} & set(settings) else {"hook": "unknown"}
    config = structure({**settings, **named}, HuggingFaceSourceConfig, where=command)
    require(
        part == "all" or config.text.held_out > 0,
        f"{command}: no text was held out in training (text.held_out is 0); give other text with --text FILE",
    )
    found = _loaded(config, config.model, config.revision)
    second = None
    if config.second_model is not None:
        require(
            two_models,
            f"{command}: the SAE reads two models ({config.model} and {config.second_model}); this is done in one",
        )
        second = _loaded(config, config.second_model, config.second_revision).model
    routes: dict[str, Route] = {}
    for name, sae in saes.items():
        own = hook or (None if says_place(sae) else ", ".join(site.name for site in config.read_sites))
        routes[name] = route_of(sae, found.model, own, second_model=second)
    names = list(dict.fromkeys(place.name for route in routes.values() for place in route.reads))
    kept = {key: value for key, value in settings.items() if key not in ("hook", "reads", "writes", "head")}
    reads = {"hook": names[0]} if second is None else {"reads": names}
    config = structure({**kept, **reads}, HuggingFaceSourceConfig, where=command)
    source = HuggingFaceSource(config, model=found.model, tokenizer=found.tokenizer, second_model=second)
    return source, {name: str(route) for name, route in routes.items()}, part


def _loaded(config: HuggingFaceSourceConfig, name: str, revision: str | None) -> LanguageModel:
    return load(
        name, revision=revision, model_class=config.model_class, dtype=config.dtype, device=config.device,
        tokenizer=config.tokenizer, with_tokenizer=name == config.model, options=config.model_options,
    )  # fmt: skip


def known_settings(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of the source, as far as an SAE's metadata say: ours whole, or what SAELens and catalogues write.

    >>> known_settings({"model_name": "gpt2-small", "hook_name": "blocks.8.hook_resid_pre", "context_size": 128})
    {'model': 'openai-community/gpt2', 'context_size': 128}
    """
    ours = _ours(metadata).get("source")
    if isinstance(ours, Mapping):
        return dict(cast("Mapping[str, Any]", ours))
    facts = cast("Mapping[str, Any]", metadata.get("sae_core") or {})
    found: dict[str, Any] = {}
    model = facts.get("base_model") or hub_name(metadata.get("model_name"))
    if isinstance(model, str):
        found["model"] = model
        if isinstance(revision := facts.get("base_model_revision"), str):
            found["revision"] = revision
    if isinstance(size := metadata.get("context_size"), int):
        found["context_size"] = size
    tokens: dict[str, Any] = {}
    if metadata.get("prepend_bos") is False:
        tokens["bos"] = "none"
    if metadata.get("disable_concat_sequences") is True:
        tokens["packing"] = "document"
    excluded = metadata.get("exclude_special_tokens")
    if isinstance(excluded, list) and excluded:
        tokens["exclude_tokens"] = cast("list[Any]", excluded)
    if tokens:
        found["tokens"] = tokens
    return found


def hub_name(name: Any) -> str | None:
    """The Hub name behind a model's name as TransformerLens has it, where that is only a question of the owner."""
    if not isinstance(name, str):
        return None
    if "/" in name or name.startswith((".", "package:")):
        return name
    short = "gpt2" if name == "gpt2-small" else name
    owner = next((owner for start, owner in _OWNERS.items() if short.startswith(start)), None)
    return short if owner is None else f"{owner}/{short}"


def _ours(metadata: Mapping[str, Any]) -> Mapping[str, Any]:
    ours = metadata.get("sae_lm")
    return cast("Mapping[str, Any]", ours) if isinstance(ours, Mapping) else {}
