"""The models that SAEs were trained on: their exact names, and where in them an activation is.

Published SAEs say where they belong in TransformerLens's terms, ``blocks.20.hook_resid_post``. A Hugging Face model has
modules instead, whose inputs and outputs are such places; ``model.layers.20`` is that module's output, and
``model.layers.20:input`` its input. `hook_point_to_hf` and `hook_point_from_hf` go from one to the other, by the tables
in ``models.toml``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from sae_core.errors import UnknownNameError, did_you_mean
from sae_core.format.hook_names import spell_hook_name

__all__ = ["BaseModel", "base_model", "hook_facts", "hook_point_from_hf", "hook_point_to_hf"]

_AMBIGUOUS = {
    "hook_mlp_in": "it is the residual stream in TransformerLens 2 and the normalised MLP input in version 3; "
    "say hook_resid_mid or mlp.hook_in",
    "ln2.hook_normalized": "it is the MLP's norm before its gain, which no module has as input or output; "
    "mlp.hook_in divided by the gain is the same",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class BaseModel:
    """A model by its Hub id, its other names, and the places of its activations: TransformerLens name -> module."""

    id: str
    family: str
    aliases: tuple[str, ...]
    places: Mapping[str, str]


def base_model(name: str) -> BaseModel:
    """A model by its Hub id or another name it goes by. Raises UnknownNameError with a near match.

    >>> base_model("gpt2-small").id
    'openai-community/gpt2'
    """
    models = _models()
    if name not in models:
        raise UnknownNameError(f"no facts about the model {name!r}{did_you_mean(name, models)}")
    return models[name]


def hook_point_to_hf(model: str, hook_name: str) -> str:
    """The module of the Hugging Face model that has this hook point as output, or with ``:input`` as input.

    Raises UnknownNameError for a model without facts, and for a hook point that no module of it has.

    >>> hook_point_to_hf("google/gemma-2-2b", "blocks.20.hook_resid_post")
    'model.layers.20'
    >>> hook_point_to_hf("gpt2-small", "blocks.3.attn.hook_z")
    'transformer.h.3.attn.c_proj:input'
    """
    known = base_model(model)
    block = re.fullmatch(r"blocks\.(\d+)\.(.+)", hook_name)
    layer, place = (block[1], block[2]) if block else ("", hook_name)
    if place not in known.places or ("{layer}" in known.places[place]) != bool(block):
        why = _AMBIGUOUS.get(place) or f"known: {', '.join(known.places)}{did_you_mean(place, known.places)}"
        raise UnknownNameError(f"{hook_name!r} is no input or output of a module of {known.id}: {why}")
    return known.places[place].replace("{layer}", layer)


def hook_point_from_hf(model: str, hook: str) -> str:
    """The TransformerLens name of a module's output or input. Raises UnknownNameError where there is none.

    >>> hook_point_from_hf("Qwen/Qwen3-8B", "model.layers.7.mlp:input")
    'blocks.7.mlp.hook_in'
    """
    known = base_model(model)
    for place, template in known.places.items():
        before, with_layer, after = template.partition("{layer}")
        found = re.fullmatch(re.escape(before) + (r"(\d+)" if with_layer else "") + re.escape(after), hook)
        if found and not (
            place == "hook_embed" and ".layers." in template
        ):  # the same place as blocks.0.hook_resid_pre
            return f"blocks.{found[1]}.{place}" if with_layer else place
    raise UnknownNameError(f"{hook!r} has no name in TransformerLens's terms in {known.id}")


def hook_facts(model: str | None, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The base model's Hub id, and ``hook_name`` and ``hf_hook_name`` (and the same with ``_out``) where one is missing.

    An ``hf_hook_name`` that is there but spelt for another class or in Gemma Scope's way is respelt. Nothing is said of a
    model without facts, or of a place that has no counterpart.

    >>> hook_facts("gemma-2-2b", {"hook_name": "blocks.3.hook_mlp_out"})
    {'base_model': 'google/gemma-2-2b', 'hf_hook_name': 'model.layers.3.post_feedforward_layernorm'}
    >>> hook_facts("google/gemma-3-4b-it", {"hf_hook_name": "model.layers.9.output"})["hf_hook_name"]
    'model.language_model.layers.9'
    """
    name = model or metadata.get("model_name")
    if not isinstance(name, str) or name not in _models():
        return {}
    known = base_model(name)
    facts: dict[str, Any] = {"base_model": known.id}
    for end in ("", "_out"):
        hook_name, hf_hook_name = metadata.get(f"hook_name{end}"), metadata.get(f"hf_hook_name{end}")
        try:
            if isinstance(hf_hook_name, str):
                facts[f"hf_hook_name{end}"] = spelt = _respelt(hf_hook_name, known)
                if hook_name is None:
                    facts[f"hook_name{end}"] = hook_point_from_hf(name, spelt)
            elif isinstance(hook_name, str):
                facts[f"hf_hook_name{end}"] = hook_point_to_hf(name, hook_name)
        except UnknownNameError:
            continue
    return facts


def _respelt(hook: str, model: BaseModel) -> str:
    """A module path as the model's own class has it, in the form ``path`` or ``path:input``.

    The language model inside one that also sees images sits one level deeper; Gemma Scope writes ``path.output``.
    """
    path, _, side = spell_hook_name(hook).partition(":")
    stack = model.places["hook_resid_post"].partition("{layer}")[0]
    for other in ("model.language_model.layers.", "model.layers."):
        if path.startswith(other):
            path = stack + path.removeprefix(other)
            break
    return f"{path}:input" if side == "input" else path


@cache
def _models() -> dict[str, BaseModel]:
    """All models by id and by every other name."""
    import tomllib

    facts = tomllib.loads((Path(__file__).parent / "models.toml").read_text(encoding="utf-8"))
    models: dict[str, BaseModel] = {}
    for name, (family, *aliases) in facts["models"].items():
        model = BaseModel(id=name, family=family, aliases=tuple(aliases), places=facts["families"][family])
        models |= dict.fromkeys((name, *aliases), model)
    return models
