"""What writers of foreign formats share: refusing what a format cannot express, and moving b_dec.

Some formats subtract b_dec from the input before encoding and others do not, and

    (x - b_dec) W_enc + b_enc  =  x W_enc + (b_enc - b_dec W_enc)

says how either becomes the other. Latents and reconstructions are the same as before.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_core.errors import FormatError
from sae_core.plugins import get_registry
from sae_core.plugins.records import CORE

if TYPE_CHECKING:
    from torch import Tensor

    from sae_core.dictionary import Export

__all__ = ["centred", "core_architecture", "plain_input", "whole_k", "write_json"]


def core_architecture(
    exported: Export, to: str, known: Sequence[str], transcoders: Sequence[str] = (), *, keeps_negative: bool = False
) -> str:
    """The name of sae-core's architecture that `exported` is, one of `known`, or of `transcoders` where it has targets.

    Raises FormatError for any other, for one of another plugin under the same name, and for dictionaries of several sites;
    unless the format `keeps_negative` latents, for ``apply_relu: false`` too.
    """
    sites = [name for name in ("reads", "writes") if len(getattr(exported.config, name, {})) > 1]
    if sites:
        raise FormatError(
            f"{to} cannot express {' and '.join(sites)} of several sites; its readers would take them for one activation"
        )
    transcodes = getattr(exported.config, "d_out", None) is not None
    if not keeps_negative and not getattr(exported.config, "apply_relu", True):
        raise FormatError(f"{to} cannot express apply_relu: false, with which latents are kept below zero")
    can = transcoders if transcodes else known
    owner, _, name = exported.architecture.rpartition(":")
    if owner != CORE or name not in can:
        what = "a transcoder of architecture" if transcodes else "architecture"
        shown = name if owner == CORE else exported.architecture
        raise FormatError(
            f"{to} cannot express {what} {shown!r} (it can: {', '.join(can) or 'none'}); "
            f"formats that can be written: {', '.join(get_registry().names('writer'))}"
        )
    return name


def plain_input(exported: Export, to: str) -> list[str]:
    """Refuse normalisations of each row; note that heads must be concatenated by whoever runs the SAE."""
    if exported.config.normalize_activations != "none":
        raise FormatError(
            f"{to} cannot express normalize_activations: {exported.config.normalize_activations}, which scales each input by "
            "its own norm"
        )
    if exported.config.reshape_activations == "hook_z":
        return [f"{to} does not reshape: inputs are (..., n_heads * d_head), heads concatenated"]
    return []


def centred(exported: Export, wanted: bool) -> dict[str, Tensor]:
    """The tensors with encoder biases for inputs from which b_dec is subtracted (`wanted`), or is not.

    Biases that move are computed in float64; half-precision dictionaries then come out in float32, since rounding the new
    biases would change what they compute.
    """
    import torch

    tensors = dict(exported.tensors)
    if exported.config.apply_b_dec_to_input == wanted:
        return tensors
    shift_F = tensors["b_dec"].double() @ tensors["W_enc"].double()
    sign = 1.0 if wanted else -1.0
    half = tensors["W_enc"].dtype in (torch.float16, torch.bfloat16)
    kept = {name: tensor.float() if half else tensor for name, tensor in tensors.items()}
    for name in {"b_enc", "b_gate", "b_mag"} & set(kept):
        gain = kept["r_mag"].double().exp() if name == "b_mag" else 1.0
        kept[name] = (tensors[name].double() + sign * gain * shift_F).to(kept[name].dtype)
    return kept


def whole_k(exported: Export) -> int:
    """The config's `k`; FormatError unless it is a whole number."""
    k: object = getattr(exported.config, "k", None)
    if not isinstance(k, int):
        raise FormatError(f"k is {k!r}, not a whole number")
    return k


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write `value` as JSON that people can read."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
