"""circuit-tracer's formats: transcoders of single layers, and cross-layer transcoders."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from sae_core.errors import FormatError
from sae_core.format.express import core_architecture, plain_input, whole_k

if TYPE_CHECKING:
    from sae_core import SAE
    from sae_core.sae import Export
    from torch import Tensor

__all__ = ["CircuitTracerWriter"]


@final
class CircuitTracerWriter:
    """``config.yaml`` and safetensors files."""

    def write(self, sae: SAE, exported: Export, folder: Path) -> Sequence[str]:
        """``config.yaml`` beside ``layer_{n}.safetensors``, or beside W_enc_{n} and W_dec_{n} of each layer."""
        from safetensors.torch import save_file

        whole = exported.architecture == "sae-core:cross_layer_transcoder"
        files, config = (_cross_layer_files if whole else _layer_files)(sae, exported)
        for name, tensors in files.items():
            save_file({key: value.contiguous() for key, value in tensors.items()}, folder / name)
        config = {key: value for key, value in config.items() if value is not None}
        (folder / "config.yaml").write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in config.items()))
        notes = (
            [] if whole else ["an attribution graph needs a file like this for every layer of the model, in one folder"]
        )
        if "k" in exported.tensors or getattr(exported.config, "k", None) is not None:
            notes.append(
                "circuit-tracer 0.5 itself loads ReLU and JumpReLU alone; 'k' is for readers that know its TopK"
            )
        for key in ("model_name", "feature_input_hook", "feature_output_hook"):
            if key not in config:
                notes.append(f"config.yaml lacks {key}, which the dictionary does not say; add it")
        return notes


def _layer_files(sae: SAE, exported: Export) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    import torch

    if sae.reconstructs_input:
        raise FormatError("circuit_tracer cannot express an SAE, only transcoders (d_out) and cross_layer_transcoder")
    kinds = ("standard", "jumprelu", "topk")
    architecture = core_architecture(exported, "circuit_tracer", (), kinds, keeps_negative=True)
    plain_input(exported, "circuit_tracer")
    if sae.d_out != sae.d_in:
        raise FormatError(f"circuit_tracer cannot express a transcoder from width {sae.d_in} to another, {sae.d_out}")
    t = exported.tensors
    state = {"W_enc": t["W_enc"].t(), "b_enc": t["b_enc"], "W_dec": t["W_dec"], "b_dec": t["b_dec"]}
    if "W_skip" in t:
        state["W_skip"] = t["W_skip"]
    if "threshold" in t:
        state["activation_function.threshold"] = _without_relu(exported, t["threshold"])
    if architecture == "topk":
        if getattr(exported.config, "apply_relu", True):
            raise FormatError(
                "circuit_tracer cannot express topk with apply_relu: its TopK keeps the k largest even where they are negative"
            )
        state["k"] = torch.tensor(whole_k(exported))
    hooks = [re.fullmatch(r"blocks\.(\d+)\.(.+)", str(sae.metadata.get(key))) for key in ("hook_name", "hook_name_out")]
    read, written = hooks
    if read is None or (written is not None and written[1] != read[1]):
        raise FormatError(
            "circuit_tracer cannot express a transcoder without the layer it belongs to: hook_name in its metadata must be "
            f"blocks.N.…, and hook_name_out of the same layer; they are {sae.metadata.get('hook_name')!r} and "
            f"{sae.metadata.get('hook_name_out')!r}"
        )
    config = {
        "model_kind": "transcoder_set",
        "model_name": sae.metadata.get("model_name"),
        "feature_input_hook": read[2],
        "feature_output_hook": written and written[2],
    }
    return {f"layer_{read[1]}.safetensors": state}, config


def _cross_layer_files(sae: SAE, exported: Export) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    plain_input(exported, "circuit_tracer")
    if (activation := getattr(exported.config, "activation", None)) != "jumprelu":
        raise FormatError(
            f"circuit_tracer cannot express a cross_layer_transcoder with activation: {activation}, only jumprelu"
        )
    reads, writes = list(sae.reads.values()), list(sae.writes.values())
    if len({*reads, *writes}) != 1:
        raise FormatError(
            f"circuit_tracer cannot express layers of several widths: {dict(sae.reads)} and {dict(sae.writes)}"
        )
    hooks: list[str | None] = []
    for names in (sae.reads, sae.writes):
        found = [re.fullmatch(r"blocks\.(\d+)\.(.+)", name) for name in names]
        said = [(int(each[1]), each[2]) for each in found if each is not None]
        if said and said != [(n, said[0][1]) for n in range(len(names))]:
            raise FormatError(
                f"circuit_tracer cannot express the sites {', '.join(names)}: its layers are the model's from 0 on, "
                "all at one hook point"
            )
        hooks.append(said[0][1] if said else None)
    files: dict[str, dict[str, Tensor]] = {}
    t = exported.tensors
    for n, width in enumerate(writes):
        files[f"W_enc_{n}.safetensors"] = {
            f"W_enc_{n}": t[f"encoder.{n}"],
            f"b_enc_{n}": t[f"b_enc.{n}"],
            f"b_dec_{n}": t[f"b_dec.{n}"],
            f"threshold_{n}": _without_relu(exported, t[f"threshold.{n}"]),
        }
        files[f"W_dec_{n}.safetensors"] = {f"W_dec_{n}": t[f"W_dec.{n}"].unflatten(1, (-1, width))}
    config = {
        "model_kind": "cross_layer_transcoder",
        "model_name": sae.metadata.get("model_name"),
        "feature_input_hook": hooks[0],
        "feature_output_hook": hooks[1],
    }
    return files, config


def _without_relu(exported: Export, threshold: Tensor) -> Tensor:
    """Thresholds for a JumpReLU that keeps negative latents: with a ReLU, those below zero are as good as zero."""
    return threshold.clamp(min=0) if getattr(exported.config, "apply_relu", True) else threshold
