"""Writing SAEs in the formats of other libraries: SAELens, dictionary_learning, EleutherAI's sparsify, circuit-tracer.

What is written is the inference form (`sae.export()`), so input scaling and decoder norms are folded into the weights already.
What remains to be moved is b_dec: some formats subtract it from the input before encoding and others do not, and

    (x - b_dec) W_enc + b_enc  =  x W_enc + (b_enc - b_dec W_enc)

says how either becomes the other. Latents and reconstructions are the same as before. What a format cannot express is refused:
nothing is approximated. A folder appears complete or not at all, and never replaces another.
"""

# D d_in, F d_sae

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_core.errors import ConfigError, FormatError, did_you_mean

if TYPE_CHECKING:
    from sae_core import SAE
    from sae_core.sae import Export
    from torch import Tensor

__all__ = ["FORMATS", "convert"]

_SAE_LENS = ("standard", "gated", "topk", "abstopk", "jumprelu", "matching_pursuit", "temporal")
_SAE_LENS_TRANSCODERS = ("standard", "jumprelu")


def convert(sae: SAE, to: str, output: str | Path) -> list[str]:
    """Write `sae` to the folder `output` in the format `to`; returns notes on what the format leaves out.

    Raises ConfigError for a format that is not in `FORMATS` or an `output` that is there already, and FormatError when the
    format cannot express the SAE.
    """
    if to not in FORMATS:
        raise ConfigError(f"cannot write format {to!r}{did_you_mean(to, FORMATS)} (known: {', '.join(FORMATS)})")
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"{output}: is there already; give the name of a new folder")
    exported = sae.export()
    for name, tensor in exported.tensors.items():
        if not bool(tensor.isfinite().all()):
            raise FormatError(f"not converted: tensor {name!r} holds NaN or infinite values")
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        notes = FORMATS[to](sae, exported, temporary / output.name)
        for path in (temporary / output.name).iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        (temporary / output.name).rename(output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return notes


# ----------------------------------------------------------------------------------------------------------------------
# The formats


def _write_sae_lens(sae: SAE, exported: Export, folder: Path) -> list[str]:
    """``cfg.json`` and ``sae_weights.safetensors``: our own layout, without the architectures that only we have."""
    _require_architecture(exported, "sae_lens", _SAE_LENS, _SAE_LENS_TRANSCODERS)
    if not sae.reconstructs_input and exported.config.normalize_activations != "none":
        raise FormatError(
            f"sae_lens cannot express a transcoder with normalize_activations: {exported.config.normalize_activations}: "
            "SAELens would undo it on the outputs"
        )
    sae.save(folder)
    newest = {"abstopk": "6.54"}
    return [f"reading it needs SAELens {version}" for name, version in newest.items() if name == exported.architecture]


def _write_dictionary_learning(sae: SAE, exported: Export, folder: Path) -> list[str]:
    """``ae.pt`` and ``config.json``, of the class that computes the same."""
    import torch

    _require_architecture(exported, "dictionary_learning", ("standard", "gated", "topk", "jumprelu"))
    notes = _plain_input(exported, "dictionary_learning")
    k: int | None = None
    if exported.architecture == "standard":
        unit = torch.allclose(
            exported.tensors["W_dec"].norm(dim=1), torch.ones(1, dtype=exported.tensors["W_dec"].dtype)
        )
        if exported.config.apply_b_dec_to_input and unit:
            name, t = "AutoEncoder", _linear(_centred(exported, True))
            state = {"bias": t.pop("b_dec"), **t}
        else:  # AutoEncoder's own loader would rescale the latents to unit decoder norm, AutoEncoderNew's does not
            name, t = "AutoEncoderNew", _linear(_centred(exported, False))
            state = {"decoder.bias": t.pop("b_dec"), **t}
    elif exported.architecture == "gated":
        name, t = "GatedAutoEncoder", _centred(exported, True)
        state = {
            "encoder.weight": t["W_enc"].t(),
            "decoder.weight": t["W_dec"].t(),
            "decoder_bias": t["b_dec"],
            "gate_bias": t["b_gate"],
            "mag_bias": t["b_mag"],
            "r_mag": t["r_mag"],
        }
    elif exported.architecture == "topk":
        name, t = "AutoEncoderTopK", _linear(_centred(exported, True))
        k = _k(exported)
        # the threshold that its training estimates on the side; -1 is its value for "not estimated"
        state = {**t, "k": torch.tensor(k, dtype=torch.int), "threshold": torch.tensor(-1.0)}
    else:
        name, state = "JumpReluAutoEncoder", _centred(exported, False)
    trainer: dict[str, Any] = {"dict_class": name, "activation_dim": sae.d_in, "dict_size": sae.d_sae}
    trainer |= {} if k is None else {"k": k}
    trainer["lm_name"] = sae.metadata.get("model_name")
    if found := re.fullmatch(r"blocks\.(\d+)\.hook_resid_post", str(sae.metadata.get("hook_name"))):
        trainer |= {"layer": int(found[1]), "submodule_name": f"resid_post_layer_{found[1]}"}
    context = sae.metadata.get("context_size")
    folder.mkdir()
    torch.save({key: value.contiguous() for key, value in state.items()}, folder / "ae.pt")
    _write_json(folder / "config.json", {"trainer": trainer} | ({"buffer": {"ctx_len": context}} if context else {}))
    return notes


def _write_sparsify(sae: SAE, exported: Export, folder: Path) -> list[str]:
    """``sae.safetensors`` and ``cfg.json`` of a SparseCoder."""
    from safetensors.torch import save_file

    _require_architecture(exported, "sparsify", ("topk", "groupmax"), ("topk", "groupmax"))
    notes = _plain_input(exported, "sparsify")
    transcodes, skips = not sae.reconstructs_input, "W_skip" in exported.tensors
    if transcodes and sae.d_out != sae.d_in:
        raise FormatError(f"sparsify cannot express a transcoder from width {sae.d_in} to another, {sae.d_out}")
    t = exported.tensors if transcodes else _centred(exported, True)
    state = {"encoder.weight": t["W_enc"].t(), "encoder.bias": t["b_enc"], "W_dec": t["W_dec"], "b_dec": t["b_dec"]}
    if skips:
        state["W_skip"] = t["W_skip"]
    config = {
        "activation": "groupmax" if exported.architecture == "groupmax" else "topk",
        "expansion_factor": max(1, sae.d_sae // sae.d_in),
        "normalize_decoder": bool(((t["W_dec"].float().norm(dim=1) - 1).abs() < 1e-3).all()),
        "num_latents": sae.d_sae,
        "k": _k(exported),
        "multi_topk": False,
        "skip_connection": skips,
        "transcode": transcodes,
        "d_in": sae.d_in,
    }
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "sae.safetensors")
    _write_json(folder / "cfg.json", config)
    return [*notes, "the format has no place for base model and hook point; sparsify names the folder after the module"]


def _write_circuit_tracer(sae: SAE, exported: Export, folder: Path) -> list[str]:
    """``config.yaml`` beside ``layer_{n}.safetensors``, or beside a cross-layer one's W_enc_{n} and W_dec_{n} of each layer."""
    from safetensors.torch import save_file

    whole = exported.architecture == "cross_layer_transcoder"
    files, config = (_cross_layer_files if whole else _layer_files)(sae, exported)
    folder.mkdir()
    for name, tensors in files.items():
        save_file({key: value.contiguous() for key, value in tensors.items()}, folder / name)
    config = {key: value for key, value in config.items() if value is not None}
    (folder / "config.yaml").write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in config.items()))
    notes = [] if whole else ["an attribution graph needs a file like this for every layer of the model, in one folder"]
    if "k" in exported.tensors or getattr(exported.config, "k", None) is not None:
        notes.append("circuit-tracer 0.5 itself loads ReLU and JumpReLU alone; 'k' is for readers that know its TopK")
    for key in ("model_name", "feature_input_hook", "feature_output_hook"):
        if key not in config:
            notes.append(f"config.yaml lacks {key}, which the dictionary does not say; add it")
    return notes


def _layer_files(sae: SAE, exported: Export) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    import torch

    if sae.reconstructs_input:
        raise FormatError("circuit_tracer cannot express an SAE, only transcoders (d_out) and cross_layer_transcoder")
    _require_architecture(exported, "circuit_tracer", (), ("standard", "jumprelu", "topk"))
    _plain_input(exported, "circuit_tracer")
    if sae.d_out != sae.d_in:
        raise FormatError(f"circuit_tracer cannot express a transcoder from width {sae.d_in} to another, {sae.d_out}")
    t = exported.tensors
    state = {"W_enc": t["W_enc"].t(), "b_enc": t["b_enc"], "W_dec": t["W_dec"], "b_dec": t["b_dec"]}
    if "W_skip" in t:
        state["W_skip"] = t["W_skip"]
    if "threshold" in t:
        state["activation_function.threshold"] = _without_relu(exported, t["threshold"])
    if exported.architecture == "topk":
        if getattr(exported.config, "apply_relu", True):
            raise FormatError(
                "circuit_tracer cannot express topk with apply_relu: its TopK keeps the k largest even where they are negative"
            )
        state["k"] = torch.tensor(_k(exported))
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
    _plain_input(exported, "circuit_tracer")
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


FORMATS: dict[str, Callable[[SAE, Export, Path], list[str]]] = {
    "sae_lens": _write_sae_lens,
    "dictionary_learning": _write_dictionary_learning,
    "sparsify": _write_sparsify,
    "circuit_tracer": _write_circuit_tracer,
}
"""Format names and their writers: they create the folder they are given."""


# ----------------------------------------------------------------------------------------------------------------------
# What the writers share


def _require_architecture(exported: Export, to: str, known: Sequence[str], transcoders: Sequence[str] = ()) -> None:
    sites = [name for name in ("reads", "writes") if len(getattr(exported.config, name, {})) > 1]
    if sites:
        raise FormatError(
            f"{to} cannot express {' and '.join(sites)} of several sites; its readers would take them for one activation"
        )
    transcodes = getattr(exported.config, "d_out", None) is not None
    if to != "circuit_tracer" and not getattr(exported.config, "apply_relu", True):
        raise FormatError(f"{to} cannot express apply_relu: false, with which latents are kept below zero")
    can = transcoders if transcodes else known
    if exported.architecture not in can:
        what = "a transcoder of architecture" if transcodes else "architecture"
        raise FormatError(
            f"{to} cannot express {what} {exported.architecture!r} (it can: {', '.join(can) or 'none'}); "
            f"formats that can be written: {', '.join(FORMATS)}"
        )


def _plain_input(exported: Export, to: str) -> list[str]:
    """Refuse normalisations of each row; note that heads must be concatenated by whoever runs the SAE."""
    if exported.config.normalize_activations != "none":
        raise FormatError(
            f"{to} cannot express normalize_activations: {exported.config.normalize_activations}, which scales each input by "
            "its own norm"
        )
    if exported.config.reshape_activations == "hook_z":
        return [f"{to} does not reshape: inputs are (..., n_heads * d_head), heads concatenated"]
    return []


def _centred(exported: Export, wanted: bool) -> dict[str, Tensor]:
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


def _linear(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names and layout of two linear layers; b_dec keeps its name."""
    return {
        "encoder.weight": tensors["W_enc"].t(),
        "encoder.bias": tensors["b_enc"],
        "decoder.weight": tensors["W_dec"].t(),
        "b_dec": tensors["b_dec"],
    }


def _k(exported: Export) -> int:
    k: object = getattr(exported.config, "k", None)
    if not isinstance(k, int):
        raise FormatError(f"k is {k!r}, not a whole number")
    return k


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
