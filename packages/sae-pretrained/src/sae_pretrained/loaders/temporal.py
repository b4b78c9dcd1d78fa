"""Folders of TemporalSAE (Priors in Time, arXiv 2511.01836): ``latest_ckpt.safetensors`` (or ``.pt``) beside ``conf.yaml``.

The six facts:

- Weights: ``D`` is W_dec (d_sae, d_in) and ``E``, unless tied, W_enc (d_in, d_sae); both lie as ours do.
- b_dec before encoding: subtracted; it is called ``b`` and may be stored as (1, d_in).
- ReLU and TopK: ``sae_diff_type`` relu, or topk: ReLU and then the k largest of the novel codes.
- Threshold: none. ``batchtopk``, which has one, and ``nullify`` are refused: they are not our architecture.
- Input normalisation: inputs times ``sae.scaling_factor``; the original multiplies outside its module and we inside ours.
- Decoder norm: whatever the file has.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast, final

from sae_core.errors import FormatError
from sae_core.protocols import FileSource, LoadedSAE

from sae_pretrained.loaders.common import (
    Facts,
    Settings,
    TensorBag,
    assemble,
    exists,
    join,
    layer_of,
    place,
    read_yaml,
    safetensors_bag,
    torch_bag,
    torch_mapping,
)

__all__ = ["TemporalLoader"]

_WEIGHTS = ("latest_ckpt.safetensors", "latest_ckpt.pt")
_PROJECTIONS = {
    "k_ctx": ("bottleneck", "d_sae"),
    "q_target": ("bottleneck", "d_sae"),
    "v_ctx": ("d_sae", "d_sae"),
    "c_proj": ("d_sae", "d_sae"),
}


@final
class TemporalLoader:
    """Reads canrager/temporalSAEs and what the original code saves."""

    def matches(self, source: FileSource, folder: str = "") -> bool:
        """A folder with conf.yaml and latest_ckpt."""
        return exists(source, folder, "conf.yaml") and any(exists(source, folder, name) for name in _WEIGHTS)

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
        facts = Facts(overrides, "temporal", ["norm_scaling_factor"])
        conf = Settings(read_yaml(source, join(folder, "conf.yaml")), place(source, folder, "conf.yaml"))
        llm, sae = conf.section("llm"), conf.section("sae")
        d_in = llm.integer("dimin")
        d_sae = int(d_in * sae.need("exp_factor", float))
        kind = sae.choice("sae_diff_type", ["relu", "topk"])
        scaling = sae.need("scaling_factor", float)
        stated = facts.get("norm_scaling_factor", float)
        if stated is not None and not math.isclose(scaling, stated, rel_tol=0.05):  # catalogues round it to two digits
            raise FormatError(f"{sae.where}: scaling_factor is {scaling}, but the caller says {stated}")
        config: dict[str, Any] = {
            "d_in": d_in,
            "d_sae": d_sae,
            "n_heads": sae.integer("n_heads"),
            "n_attn_layers": sae.integer("n_attn_layers"),
            "bottleneck_factor": sae.integer("bottleneck_factor"),
            "sae_diff_type": kind,
            "tied_weights": sae.need("tied_weights", bool),
            "normalize_activations": "constant_scalar_rescale",
            "activation_normalization_factor": scaling,
        }
        k = sae.get("kval_topk", int, nullable=True)
        if kind == "topk":
            if k is None:
                raise FormatError(f"{sae.where}: sae_diff_type is topk, but kval_topk is missing")
            config["kval_topk"] = k  # with relu the original has the key too and does not read it
        sae.must_be("sae_type", "temporal", "the standard SAEs of that repository have another layout")
        sae.ignore("training only", "block_id gamma_reg inference_mode_batchtopk min_act_regularizer_batchtopk")
        sae.finish(facts.ignore_keys)
        data = Settings(conf.get("data", dict) or {}, f"{conf.where}: data")
        layer = layer_of(f"{source.location}/{folder}")
        found = {
            "model_name": llm.get("model_hf_name", str, nullable=True),
            "hook_name": None if layer is None else f"blocks.{layer}.hook_resid_post",
            "dataset_path": data.get("hf_name", str, nullable=True),
            "context_size": data.get("context_length", int, nullable=True),
        }

        bag = _open(source, folder, {"d_in": d_in, "d_sae": d_sae}, rows, weights)
        bias = "b_dec" if bag.has("b_dec") else "b"
        flat = not bag.has(bias) or bag.ndim(bias) == 1
        tensors = {
            "W_dec": bag.take("D", "d_sae d_in"),
            "b_dec": bag.take(bias, "d_in" if flat else "1 d_in").reshape(-1),
        }
        if not config["tied_weights"]:
            tensors["W_enc"] = bag.take("E", "d_in d_sae")
        bag.sizes["bottleneck"] = d_sae // config["bottleneck_factor"]
        for index in range(config["n_attn_layers"]):
            for projection, (out, into) in _PROJECTIONS.items():
                name = f"attn_layers.{index}.{projection}"
                tensors[f"{name}.weight"] = bag.take(f"{name}.weight", f"{out} {into}")
                tensors[f"{name}.bias"] = bag.take(f"{name}.bias", out)
        return assemble("temporal", config, tensors, facts.metadata(found), bag)


def _open(
    source: FileSource, folder: str, sizes: Mapping[str, int], rows: Sequence[int] | None, weights: bool
) -> TensorBag:
    if exists(source, folder, _WEIGHTS[0]):
        return safetensors_bag(source, join(folder, _WEIGHTS[0]), sizes=sizes, rows=rows, weights=weights)
    where = place(source, folder, _WEIGHTS[1])
    if not weights:
        return TensorBag(where, None, sizes=sizes, rows=rows, weights=False)
    checkpoint = torch_mapping(source, join(folder, _WEIGHTS[1]))
    if checkpoint.check is not None:
        checkpoint.check()
    state = checkpoint.get("sae", checkpoint)
    if not isinstance(state, Mapping):
        raise FormatError(f"{where}: entry 'sae' is {type(state).__name__}, expected a dictionary of tensors")
    return torch_bag(cast("Mapping[str, Any]", state), where, sizes=sizes, rows=rows)
