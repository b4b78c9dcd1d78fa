"""Crosscoders: dictionaries that read and write several models' (or layers') activations with one set of latents.

Two layouts are read:

- science-of-finetuning's: ``model.safetensors`` beside ``config.json`` (or a ``.pt`` of the same tensors), with
  ``encoder.weight`` (L, d, F), ``encoder.bias`` (F), ``decoder.weight`` (L, F, d), ``decoder.bias`` (L, d).
- Neel Nanda's and Connor Kissane's: ``cc_weights.pt`` beside ``cfg.json``, or ``{v}.pt`` beside ``{v}_cfg.json``, with
  ``W_enc`` (L, d, F), ``W_dec`` (F, L, d), ``b_enc`` (F), ``b_dec`` (L, d).

A crosscoder is exactly one of our dictionaries on the concatenation of its inputs, and that is what is loaded: d_in = L *
d, the activations of input 0 first. Its sites are ``input 0``, ``input 1``, … in the first layout, whose inputs may be models
or layers, and ``model 0`` and ``model 1`` in the second. The fact ``only: i`` gives the view of one input, a transcoder from
and to it, where that view is exact: when the encoder reads nothing else. Otherwise it is refused, since latents computed from
one model alone are others.

The six facts:

- Weights: flattened as above.
- b_dec before encoding: not subtracted.
- ReLU and TopK: ReLU, or BatchTopK with a threshold, which is JumpReLU.
- Threshold: stored as it is, and compared with latents times the code norm that ``code_normalization`` names: the sum of the
  decoders' norms over inputs (CROSSCODER), the norm of them together (SAE), both (MIXED), or 1 (NONE). Latents themselves are
  not multiplied by it. DECOUPLED has a latent for each input and is refused. A negative threshold was never estimated; theirs
  and ours then keep every positive value.
- Input normalisation: none, or a mean and a scale for each input, folded into the weights here. The second layout was
  trained on scaled inputs and does not say by how much: it needs the fact ``input_scaling``, one factor for each input ([1,
  1] to feed scaled inputs).
- Decoder norm: whatever the file has; ``code_normalization`` SAE is ``decoder_norm: joint``, all others ``sum_of_sites``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, final

from sae_core.errors import ConfigError, FormatError
from sae_core.protocols import FileSource, LoadedSAE

from sae_pretrained.loaders.common import (
    Facts,
    Settings,
    TensorBag,
    assemble,
    exists,
    join,
    never_above,
    place,
    read_json,
    row_norms,
    safetensors_bag,
    safetensors_names,
    times,
    torch_bag,
    torch_mapping,
)

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["CrosscoderLoader"]

_CODE_NORMS = ("CROSSCODER", "SAE", "MIXED", "NONE", "DECOUPLED")  # code_normalization_id counts from 1
_HUB_KEYS = (
    "same_init_for_all_layers norm_init_scale init_with_transpose decoder_type dict_class model_type num_decoder_layers "
    "num_decoder_output_layers target_rms activation_mean activation_std"
)
_RUN_KEYS = (
    "seed batch_size buffer_mult lr num_tokens l1_coeff beta1 beta2 seq_len enc_dtype model_name site device device_A device_B "
    "model_batch_size log_every save_every dec_init_norm wandb_project wandb_entity dump_dir"
)


@final
class CrosscoderLoader:
    """Reads crosscoders as dictionaries on concatenated activations."""

    def matches(self, source: FileSource, folder: str = "") -> bool:
        """The files of either layout."""
        if exists(source, folder, "config.json", "model.safetensors"):
            names = safetensors_names(source, join(folder, "model.safetensors"))
            return {"encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias"} <= set(names)
        config, weights = _diffing_files(folder)
        if not source.exists(config) or not source.exists(weights):
            return False
        return {"hook_point", "dict_size", "dec_init_norm"} <= set(read_json(source, config))

    def load(
        self,
        source: FileSource,
        folder: str = "",
        *,
        weights: bool = True,
        overrides: Mapping[str, Any] | None = None,
        rows: Sequence[int] | None = None,
    ) -> LoadedSAE:
        """Read config and weights; `rows` are the latents to load, None for all."""
        facts = Facts(overrides, "crosscoder", ["only", "input_scaling"])
        if exists(source, folder, "config.json", "model.safetensors"):
            return _load_hub(source, folder, facts, weights, rows)
        return _load_diffing(source, folder, facts, weights, rows)


def _load_hub(source: FileSource, folder: str, facts: Facts, weights: bool, rows: Sequence[int] | None) -> LoadedSAE:
    cfg = Settings(read_json(source, join(folder, "config.json")), place(source, folder, "config.json"))
    sizes = {"d": cfg.integer("activation_dim"), "d_sae": cfg.integer("dict_size")}
    count = cfg.get("num_layers", int) or cfg.get("num_encoder_layers", int)
    named = cfg.get("code_normalization", str, "CROSSCODER")
    alphas = (
        cfg.get("code_normalization_alpha_sae", float, 1.0, nullable=True),
        cfg.get("code_normalization_alpha_cc", float, 0.1, nullable=True),
    )
    reads = cfg.get("encoder_layers", list, nullable=True) or cfg.get("encoder_layers_indices", list, nullable=True)
    k = cfg.get("k", int, nullable=True)
    cfg.must_be("latent_processor", None, "a function between encoder and decoder is not stored")
    cfg.must_be("keep_relative_variance", True, "other normalisers are per neuron")
    cfg.ignore("initialisation, or stored as tensors", _HUB_KEYS)
    cfg.finish(facts.ignore_keys)

    bag = safetensors_bag(source, join(folder, "model.safetensors"), sizes=sizes, rows=rows, weights=weights)
    W_dec_LFD, b_dec_LD = bag.take("decoder.weight", "outputs d_sae d"), bag.take("decoder.bias", "outputs d")
    W_enc_SDF, b_enc = bag.take("encoder.weight", "inputs d d_sae"), bag.take("encoder.bias", "d_sae")
    inputs, outputs = bag.sizes["inputs"], bag.sizes["outputs"]
    chosen = list(range(inputs)) if reads is None else [int(layer) for layer in reads]
    if len(chosen) != inputs or (count is not None and (max(chosen) >= count or outputs > count)):
        raise FormatError(
            f"{bag.where}: {inputs} encoders and {outputs} decoders do not fit {count} inputs read at {chosen}"
        )
    code = _code_norm_name(bag, named or "CROSSCODER")
    tensors: dict[str, Tensor] = {}
    architecture, metadata = "standard", {}
    if bag.has("threshold"):
        architecture, metadata = "jumprelu", {"training_architecture": "batchtopk"}
        tensors["threshold"] = _threshold(bag, code, alphas, k)
    scale_L, mean_LD = _normaliser(bag, max(inputs, outputs))
    if scale_L is not None and mean_LD is not None:
        # relu((x - m) s W + b), y / s' + m with s' = s + 1e-8: the affine maps move into weights and biases
        W_enc_SDF = times(W_enc_SDF, scale_L[chosen][:, None, None])
        b_enc = b_enc - mean_LD[chosen].flatten() @ W_enc_SDF.flatten(0, 1)
        undo = 1 / (scale_L[:outputs] + 1e-8)
        W_dec_LFD = times(W_dec_LFD, undo[:, None, None])
        b_dec_LD = b_dec_LD * undo[:, None] + mean_LD[:outputs]
    tensors |= {"W_enc": W_enc_SDF, "b_enc": b_enc, "W_dec": W_dec_LFD, "b_dec": b_dec_LD}
    del W_enc_SDF, W_dec_LFD  # so that joining the decoders releases the file's copy
    return _joined(architecture, tensors, chosen, "input", code, facts, metadata, bag)


def _load_diffing(
    source: FileSource, folder: str, facts: Facts, weights: bool, rows: Sequence[int] | None
) -> LoadedSAE:
    config, file = _diffing_files(folder)
    cfg = Settings(read_json(source, config), place(source, "", config))
    sizes = {"d": cfg.integer("d_in"), "d_sae": cfg.integer("dict_size"), "inputs": 2}
    hook = cfg.get("hook_point", str, nullable=True)
    cfg.ignore("how it was trained", _RUN_KEYS)
    cfg.finish(facts.ignore_keys)
    scaling = facts.get("input_scaling", list)
    where = place(source, "", file)
    if scaling is None:
        raise FormatError(
            f"{where}: trained on activations scaled to a mean norm of sqrt(d) for each model, by factors that no file "
            "holds; load with the fact input_scaling=[factor of model 0, factor of model 1]"
        )
    if len(scaling) != 2 or not all(isinstance(value, int | float) and value > 0 for value in scaling):
        raise ConfigError(f"{where}: the fact input_scaling must be two positive numbers, not {scaling!r}")
    bag = (
        torch_bag(torch_mapping(source, file), where, sizes=sizes, rows=rows)
        if weights
        else TensorBag(where, None, sizes=sizes, rows=rows, weights=False)
    )
    tensors = {
        "W_enc": bag.take("W_enc", "inputs d d_sae"),
        "b_enc": bag.take("b_enc", "d_sae"),
        "W_dec": bag.take("W_dec", "d_sae inputs d").transpose(0, 1),
        "b_dec": bag.take("b_dec", "inputs d"),
    }
    if any(value != 1 for value in scaling):
        import torch

        factor = torch.tensor(scaling, device=tensors["b_enc"].device)
        tensors["W_enc"] = times(tensors["W_enc"], factor[:, None, None])
        tensors["W_dec"] = times(tensors["W_dec"], 1 / factor[:, None, None])
        tensors["b_dec"] = times(tensors["b_dec"], 1 / factor[:, None])
    return _joined("standard", tensors, [0, 1], "model", "CROSSCODER", facts, {"hook_name": hook}, bag)


def _joined(
    architecture: str,
    tensors: dict[str, Tensor],
    chosen: Sequence[int],
    called: str,
    code: str,
    facts: Facts,
    metadata: Mapping[str, Any],
    bag: TensorBag,
) -> LoadedSAE:
    """Concatenate W_enc (inputs, d, d_sae), W_dec (outputs, d_sae, d) and b_dec (outputs, d), or take one input's view.

    `chosen` are the inputs read, `called` what an input is, and `code` how latents are normalised.
    """
    only = facts.get("only", int)
    W_dec_LFD, b_dec_LD = tensors.pop("W_dec"), tensors["b_dec"]
    outputs, d_sae = W_dec_LFD.shape[0], bag.sizes["d_sae"]
    if only is not None:
        if list(chosen) != [only] or not 0 <= only < outputs:
            raise FormatError(
                f"{bag.where}: the latents read inputs {list(chosen)}; from input {only} alone they would have other values, "
                "so there is no view of it by itself. Load the concatenation and slice W_dec for its directions"
            )
        W_dec_LFD, b_dec_LD = W_dec_LFD[only : only + 1], b_dec_LD[only : only + 1]
        outputs = 1
    d_in, d_out = bag.sizes["inputs"] * bag.sizes["d"], outputs * bag.sizes["d"]
    tensors = tensors | {
        "W_enc": tensors["W_enc"].reshape(d_in, -1),
        "W_dec": W_dec_LFD.transpose(0, 1).reshape(-1, d_out),
        "b_dec": b_dec_LD.reshape(d_out),
    }
    d = bag.sizes["d"]
    config: dict[str, Any] = {
        "d_in": d_in,
        "d_sae": d_sae,
        "apply_b_dec_to_input": False,
        "reads": {f"{called} {i}": d for i in chosen},
    }
    written = range(outputs) if only is None else [only]
    if list(chosen) != list(written):
        config |= {"d_out": d_out, "writes": {f"{called} {i}": d for i in written}}
    if code == "SAE" and len(written) > 1:
        config["decoder_norm"] = "joint"
    return assemble(architecture, config, tensors, facts.metadata(metadata), bag)


def _code_norm_name(bag: TensorBag, named: str) -> str:
    if named.upper() not in _CODE_NORMS:
        raise FormatError(f"{bag.where}: code_normalization {named!r} is unknown (known: {', '.join(_CODE_NORMS)})")
    stored = bag.number("code_normalization_id") if bag.has("code_normalization_id") else None
    if stored is not None and (not 1 <= stored <= len(_CODE_NORMS) or _CODE_NORMS[int(stored) - 1] != named.upper()):
        raise FormatError(f"{bag.where}: code_normalization_id {int(stored)} contradicts {named!r} in config.json")
    return named.upper()


def _threshold(bag: TensorBag, code: str, alphas: tuple[float | None, float | None], k: int | None) -> Tensor:
    import torch

    if code == "DECOUPLED":
        raise FormatError(
            f"{bag.where}: DECOUPLED crosscoders have a latent for each input, which is not one dictionary"
        )
    stored = bag.number("k") if bag.has("k") else None
    if stored is not None and k is not None and int(stored) != k:
        raise FormatError(f"{bag.where}: k is {int(stored)} here, but {k} in config.json")
    norms_LF = row_norms(bag.take("decoder.weight", "outputs d_sae d"))
    apart, together = norms_LF.sum(0), norms_LF.square().sum(0).sqrt()
    norms = {
        "CROSSCODER": apart,
        "SAE": together,
        "MIXED": together * (1.0 if alphas[0] is None else alphas[0])
        + apart * (0.1 if alphas[1] is None else alphas[1]),
        "NONE": torch.ones_like(apart),
    }[code]
    value = bag.number("threshold")
    return never_above(torch.full_like(norms, max(value or 0.0, 0.0)), norms)


def _normaliser(bag: TensorBag, count: int) -> tuple[Tensor | None, Tensor | None]:
    """Scale (inputs,) and mean (inputs, d), or two Nones where none was set (NaN stands for that)."""
    names = ("activation_mean", "activation_std", "activation_global_scale", "target_rms")
    present = [name for name in names if bag.has(name)]
    if not present:
        return None, None
    if len(present) != len(names):
        raise FormatError(
            f"{bag.where}: of the normaliser only {', '.join(present)} is there; it needs {', '.join(names)}"
        )
    bag.sizes["layers"] = max(count, bag.sizes.get("layers", 0))
    mean_LD = bag.take("activation_mean", "layers d")
    bag.drop("already in activation_global_scale", "activation_std", "target_rms")
    scale_L = bag.take("activation_global_scale", "layers")
    if not mean_LD.is_meta and bool(mean_LD.isnan().any()):
        return None, None
    return scale_L, mean_LD


def _diffing_files(folder: str) -> tuple[str, str]:
    """Config and weights of the second layout: `folder` is a folder, or the .pt file itself."""
    if folder.endswith(".pt"):
        return folder.removesuffix(".pt") + "_cfg.json", folder
    return join(folder, "cfg.json"), join(folder, "cc_weights.pt")
