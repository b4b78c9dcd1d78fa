"""One spelling of hook points, on every way in.

A hook point is a TransformerLens name, ``blocks.20.hook_resid_post``, or a module of the model as Hugging Face builds it:
``model.layers.20`` means that module's output, ``model.layers.20:input`` its input. Files in the wild also write
``model.layers.20.output`` (Gemma Scope 2) or ``model.layers.20:output``; no model has such a module.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

__all__ = ["HOOK_KEYS", "spell_hook_name", "spell_hook_names"]

HOOK_KEYS = ("hook_name", "hf_hook_name", "hook_name_out", "hf_hook_name_out")

_SIDE = re.compile(r"((?:model\.)?(?:language_model\.)?(?:model\.)?layers\.\d+(?:\.\w+)*?)\.(input|output)")


def spell_hook_name(name: str) -> str:
    """`name` as the rest of the project spells hook points.

    >>> spell_hook_name("model.layers.1.output"), spell_hook_name("model.layers.1.self_attn.o_proj.input")
    ('model.layers.1', 'model.layers.1.self_attn.o_proj:input')
    >>> spell_hook_name("model.layers.1:output"), spell_hook_name("blocks.3.hook_mlp_out")
    ('model.layers.1', 'blocks.3.hook_mlp_out')
    >>> spell_hook_name("bert.encoder.layer.3.output")  # a module that is called so
    'bert.encoder.layer.3.output'
    """
    name = name.strip()
    if name.endswith(":output"):
        return name.removesuffix(":output")
    found = _SIDE.fullmatch(name)
    if found is None:
        return name
    return f"{found[1]}:input" if found[2] == "input" else found[1]


def spell_hook_names(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """`metadata` with every hook point in it spelt by `spell_hook_name`; other values are left alone."""
    return {
        key: spell_hook_name(value) if key in HOOK_KEYS and isinstance(value, str) else value
        for key, value in metadata.items()
    }
