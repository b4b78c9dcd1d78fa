"""Folders of OpenMOSS's library as it writes them now (lm-saes 2): ``sae_weights.safetensors`` beside ``config.json``.

SAEs, and transcoders where the hook points in and out differ (``sae_type: sae`` in both cases).

The six facts:

- Weights: ``W_E`` (d, d_sae) and ``W_D`` (d_sae, d) lie as ours do.
- b_dec before encoding: not subtracted.
- ReLU and TopK: ``act_fn`` relu, jumprelu or topk; TopK keeps positive values only. (Versions of 2026 find the k-th largest by
  bisection and may keep one more or less; ours is exact.)
- Threshold: ``activation_function.log_jumprelu_threshold``, the logarithm, in the units of training.
- Input normalisation: ``norm_activation`` dataset-wise (inputs times sqrt(d) / average norm, a tensor of the file), token-wise
  (each input times sqrt(d) / its own norm) or inference (none).
- Decoder norm: with ``sparsity_include_decoder_norm`` the activation function sees pre-activations times decoder norms.

Refused, because nothing here computes the same: batchtopk (its choice depends on the rest of the batch), batch-wise
normalisation (likewise), gated-linear encoders, token-wise transcoders, and TopK by decoder norm unless all norms are 1. In the
last case the fact ``latents_in_decoder_units: true`` loads latents multiplied by their decoder norms, with equal outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, final

from sae_core.errors import FormatError
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
)
from sae_pretrained.loaders.openmoss_parts import Scales, norm_tensors, scaled_dictionary

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["OpenMOSSLoader"]

_RUNTIME_KEYS = (
    "dtype device sae_pretrained_name_or_path strict_loading use_triton_kernel sparsity_threshold_for_triton_spmm_kernel "
    "sparsity_threshold_for_csr jumprelu_threshold_window promote_act_fn_dtype use_auxk k_aux dead_threshold "
    "force_unit_decoder_norm"
)


@final
class OpenMOSSLoader:
    """Reads what OpenMOSS's ``save_pretrained`` writes."""

    def matches(self, source: FileSource, folder: str = "") -> bool:
        """A folder with config.json and sae_weights.safetensors that holds W_E and W_D."""
        if not exists(source, folder, "config.json", "sae_weights.safetensors"):
            return False
        return {"W_E", "W_D"} <= set(safetensors_names(source, join(folder, "sae_weights.safetensors")))

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
        facts = Facts(overrides, "openmoss", ["latents_in_decoder_units"])
        settings = Settings(read_json(source, join(folder, "config.json")), place(source, folder, "config.json"))
        settings.choice("sae_type", ["sae"])
        d, factor = settings.integer("d_model"), settings.need("expansion_factor", float)
        act = settings.choice("act_fn", ["relu", "jumprelu", "topk"], "relu")
        norm = settings.choice("norm_activation", ["dataset-wise", "token-wise", "inference"], "dataset-wise")
        hook_in = settings.need("hook_point_in", str)
        hook_out = settings.need(
            "hook_point_out", str
        )  # the library knows no default: without it, is this a transcoder?
        by_norm = bool(settings.get("sparsity_include_decoder_norm", bool, True))
        biased = bool(settings.get("use_decoder_bias", bool, True))
        k = (settings.integer("top_k") if "topk" in act else settings.get("top_k", int)) if "top_k" in settings else 50
        settings.must_be("use_glu_encoder", False, "a gated-linear encoder is another architecture")
        settings.must_be("apply_decoder_bias_to_pre_encoder", False, "a key of older versions, which subtracted b_dec")
        settings.ignore("training, or how the original runs it", _RUNTIME_KEYS)
        settings.finish(facts.ignore_keys)
        transcodes = hook_in != hook_out
        if transcodes and norm == "token-wise":
            raise FormatError(
                f"{settings.where}: a token-wise transcoder predicts outputs scaled by their own, unknown norms"
            )

        sizes = {"d_in": d, "d_out": d, "d_sae": int(d * factor)}
        bag = safetensors_bag(source, join(folder, "sae_weights.safetensors"), sizes=sizes, rows=rows, weights=weights)
        tensors = {
            "W_enc": bag.take("W_E", "d_in d_sae"),
            "b_enc": bag.take("b_E", "d_sae"),
            "W_dec": bag.take("W_D", "d_sae d_out"),
        }
        tensors["b_dec"] = bag.take("b_D", "d_out") if biased else tensors["W_dec"].new_zeros(d)
        bag.drop("statistics of training", "tokens_since_last_activation", "is_dead", "current_k")
        architecture, extra = _activation(act, by_norm, k or 0, bag, tensors, facts)
        stored = norm_tensors(bag, hook_in, hook_out, d)
        fields, tensors = _normalised(norm, stored, transcodes, bag, tensors)
        if transcodes:
            extra["d_out"] = d
        found = {"hook_name": hook_in, "hook_name_out": hook_out if transcodes else None}
        config = {"d_in": d, "d_sae": sizes["d_sae"], "apply_b_dec_to_input": False, **extra, **fields}
        return assemble(architecture, config, tensors, facts.metadata(found), bag)


def _activation(
    act: str, by_norm: bool, k: int, bag: TensorBag, tensors: dict[str, Tensor], facts: Facts
) -> tuple[str, dict[str, Any]]:
    """Architecture and its own config fields; adds the threshold to `tensors`."""
    if act == "relu":
        return "standard", {}
    norms = row_norms(bag.take("W_D", "d_sae d_out"))
    if act == "jumprelu":
        threshold = bag.take("activation_function.log_jumprelu_threshold", "d_sae").float().exp()
        tensors["threshold"] = never_above(threshold, norms) if by_norm else threshold
        return "jumprelu", {}
    rescales = False
    if by_norm and not norms.is_meta and bool(((norms - 1).abs() > 1e-5).any()):
        rescales = bool(facts.get("latents_in_decoder_units", bool, False))
        if not rescales:
            raise FormatError(
                f"{bag.where}: TopK chooses by pre-activation times decoder norm and then divides by the norm again; we have "
                "TopK by that product only with latents multiplied by the norms. The fact latents_in_decoder_units=True "
                "loads it so: outputs are equal, latents are multiplied by their decoder norms"
            )
    return "topk", {"k": k, "rescale_acts_by_decoder_norm": rescales}


def _normalised(
    norm: str, stored: Scales | None, transcodes: bool, bag: TensorBag, tensors: dict[str, Tensor]
) -> tuple[Mapping[str, Any], dict[str, Tensor]]:
    if norm == "inference":
        return {}, tensors
    if norm == "token-wise":
        return {"normalize_activations": "constant_norm_rescale"}, tensors
    if stored is None:
        raise FormatError(
            f"{bag.where}: norm_activation is dataset-wise, but no tensor dataset_average_activation_norm.* says the norms"
        )
    return scaled_dictionary(stored, transcodes, tensors)
