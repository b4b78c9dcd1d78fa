"""Folders of Llama Scope: ``checkpoints/final.safetensors`` beside ``hyperparams.json``.

The six facts:

- Weights: ``encoder.weight`` (d_sae, d) and ``decoder.weight`` (d, d_sae) are both transposed.
- b_dec before encoding: only with ``apply_decoder_bias_to_pre_encoder``.
- ReLU and TopK: trained with TopK, published as JumpReLU.
- Threshold: one number in hyperparams.json, stored as it is, and in the units of unscaled activations: the original folds the
  scaling away before it compares. In training units it is the threshold times the output's scale where it is compared with
  latents times decoder norms, and times the input's scale where it is compared with latents themselves. (SAELens does the
  latter always, so its latents differ from these.)
- Input normalisation: inputs times sqrt(d) / average norm.
- Decoder norm: with ``sparsity_include_decoder_norm`` the threshold is compared with pre-activations times decoder norms.

Transcoders (different hook points in and out) have a scale for each side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, final

from sae_core.errors import FormatError
from sae_core.protocols import FileSource, LoadedSAE

from sae_pretrained.loaders.common import (
    Facts,
    Settings,
    assemble,
    exists,
    join,
    never_above,
    place,
    read_json,
    row_norms,
    safetensors_bag,
)
from sae_pretrained.loaders.openmoss_parts import check_close, scaled_dictionary, scales_from_norms

__all__ = ["LlamaScopeLoader"]

_TRAINING_KEYS = (
    "device seed dtype expansion_factor bias_init_method decoder_exactly_fixed_norm init_decoder_norm init_encoder_norm "
    "init_encoder_with_decoder_transpose lp l1_coefficient l1_coefficient_warmup_steps top_k initial_k k_warmup_steps "
    "use_batch_norm_mse use_ghost_grads tp_size ddp_size sae_pretrained_name_or_path strict_loading "
    "decoder_exactly_unit_norm decoder_bias_init_method remove_gradient_parallel_to_decoder_directions exp_name exp_series "
    "exp_result_path"
)


@final
class LlamaScopeLoader:
    """Reads fnlp's Llama Scope repositories."""

    def matches(self, source: FileSource, folder: str = "") -> bool:
        """A folder with hyperparams.json and checkpoints/final.safetensors."""
        return exists(source, folder, "hyperparams.json", "checkpoints/final.safetensors")

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
        import torch

        facts = Facts(overrides, "llama_scope", ["norm_scaling_factor"])
        settings = Settings(
            read_json(source, join(folder, "hyperparams.json")), place(source, folder, "hyperparams.json")
        )
        d, d_sae = settings.integer("d_model"), settings.integer("d_sae")
        settings.must_be("act_fn", "jumprelu", "Llama Scope was published with JumpReLU")
        settings.must_be("use_glu_encoder", False, "a gated-linear encoder is another architecture")
        settings.must_be("use_decoder_bias", True, "every published file has one")
        settings.choice("norm_activation", ["dataset-wise"])
        threshold = settings.need("jump_relu_threshold", float)
        hook_in = settings.need("hook_point_in", str)
        hook_out = settings.get("hook_point_out", str, nullable=True) or hook_in
        subtracts = bool(settings.get("apply_decoder_bias_to_pre_encoder", bool, False))
        by_norm = settings.need("sparsity_include_decoder_norm", bool)
        norms = settings.section("dataset_average_activation_norm")
        scales = scales_from_norms(norms.need("in", float), norms.need("out", float), d, norms.where)
        norms.finish()
        settings.ignore("how it was trained", _TRAINING_KEYS)
        settings.finish(facts.ignore_keys)
        check_close(scales[0], facts.get("norm_scaling_factor", float), settings.where)
        transcodes = hook_in != hook_out
        if transcodes and subtracts:
            raise FormatError(
                f"{settings.where}: a transcoder that subtracts its output's bias from its input makes no sense"
            )

        sizes = {"d_in": d, "d_out": d, "d_sae": d_sae}
        file = join(folder, "checkpoints/final.safetensors")
        bag = safetensors_bag(source, file, sizes=sizes, rows=rows, weights=weights)
        tensors = {
            "W_enc": bag.take("encoder.weight", "d_sae d_in").t(),
            "b_enc": bag.take("encoder.bias", "d_sae"),
            "W_dec": bag.take("decoder.weight", "d_out d_sae").t(),
            "b_dec": bag.take("decoder.bias", "d_out"),
        }
        in_training_units = torch.full_like(
            tensors["b_enc"], threshold * scales[1 if by_norm else 0], dtype=torch.float32
        )
        if by_norm:
            in_training_units = never_above(in_training_units, row_norms(bag.take("decoder.weight", "d_out d_sae").t()))
        tensors["threshold"] = in_training_units
        fields, tensors = scaled_dictionary(scales, transcodes, tensors)
        config: dict[str, Any] = {"d_in": d, "d_sae": d_sae, "apply_b_dec_to_input": subtracts, **fields}
        if transcodes:
            config["d_out"] = d
        found = {
            "model_name": "meta-llama/Llama-3.1-8B",
            "hook_name": hook_in,
            "hook_name_out": hook_out if transcodes else None,
            "dataset_path": "cerebras/SlimPajama-627B",
            "context_size": 1024,
            "prepend_bos": True,
        }
        return assemble("jumprelu", config, tensors, facts.metadata(found), bag)
