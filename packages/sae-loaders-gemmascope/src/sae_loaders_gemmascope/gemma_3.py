"""Gemma Scope 2: ``params.safetensors`` beside ``config.json`` for SAEs and transcoders of Gemma 3, and the files of its
cross-layer transcoders, ``params_layer_{n}.safetensors``.

The six facts:

- Weights: ``w_enc`` (d_in, d_sae) and ``w_dec`` (d_sae, d_out) lie as ours do; ``affine_skip_connection`` (d_in, d_out) is
  transposed. A cross-layer transcoder's ``w_dec`` is (d_sae, layers, d).
- b_dec before encoding: not subtracted.
- ReLU and TopK: JumpReLU.
- Threshold: stored as it is.
- Input normalisation: none.
- Decoder norm: whatever the file has.

What a dictionary reads and predicts is in config.json; a transcoder has different hook points in and out. Some published
folders lack that file: there, and nowhere else, the published names of repository and folder count
(``gemma-scope-2-…/transcoder/layer_…``). Elsewhere the fact ``site`` must tell. `folder` is a folder or, for one layer of a
cross-layer transcoder, its file with or without ``.safetensors``; such a layer is loaded with its decoders added up, which is
right for latents and directions, and a warning says that its outputs reconstruct nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from sae_core.errors import ConfigError, FormatError
from sae_core.format.hook_names import spell_hook_name
from sae_core.protocols import FileSource, LoadedSAE
from sae_pretrained.loaders.common import (
    Facts,
    Settings,
    added_up,
    assemble,
    exists,
    join,
    layer_of,
    place,
    read_json,
    safetensors_bag,
)
from sae_pretrained.loaders.mntss_clt_layer_transcoder import warn_of_sum

__all__ = ["Gemma3Loader"]

_HOOKS = {"resid_post": "hook_resid_post", "attn_out": "attn.hook_z", "mlp_out": "hook_mlp_out"}
_SITES = (*_HOOKS, "transcoder", "clt")
_MODULES = {"": "resid_post", "self_attn.o_proj:input": "attn_out", "post_feedforward_layernorm": "mlp_out"}
_PUBLISHED = re.compile(
    r"(?:^|/|--)gemma-scope-2-\w+-(?:pt|it)(?:@[^/]+|/snapshots/[^/]+)?/(?P<site>resid_post|attn_out|mlp_out|transcoder|clt)"
    r"(?:_all)?/(?P<kind>(?:layer_(?P<layer>\d+)_)?width_\w+)"
)
_LAYER = re.compile(r"(?:^|\.)layers\.(?P<layer>\d+)(?:\.(?P<module>.+))?$")


@dataclass(frozen=True, slots=True)
class _Site:
    """What a dictionary reads and predicts; hook points as config.json names them."""

    name: str | None
    transcodes: bool
    hook_in: str | None = None
    hook_out: str | None = None
    model: str | None = None
    width: int | None = None
    affine: bool | None = None
    layer: int | None = None


@final
class Gemma3Loader:
    """Reads Gemma Scope 2."""

    def matches(self, source: FileSource, folder: str = "") -> bool:
        """A folder with params.safetensors, or a file params_layer_{n}.safetensors."""
        if exists(source, folder, "params.safetensors"):
            return True
        file = _layer_file(folder)
        return file is not None and source.exists(file)

    def load(
        self,
        source: FileSource,
        folder: str = "",
        *,
        weights: bool = True,
        overrides: Mapping[str, Any] | None = None,
        rows: Sequence[int] | None = None,
    ) -> LoadedSAE:
        """Read the folder or file; `rows` are the latents to load, None for all."""
        facts = Facts(overrides, "gemma_3", ["site"])
        where = place(source, folder)
        layer_file = _layer_file(folder)
        site = _site(source, folder, where, layer_file is not None, facts)
        sizes = {} if site.width is None else {"d_sae": site.width}
        file = layer_file or join(folder, "params.safetensors")
        bag = safetensors_bag(source, file, sizes=sizes, rows=rows, weights=weights)
        out = "d_out" if site.transcodes else "d_in"
        tensors = {
            "W_enc": bag.take("w_enc", "d_in d_sae"),
            "b_enc": bag.take("b_enc", "d_sae"),
            "W_dec": added_up(bag.take("w_dec", f"d_sae layers {out}"))
            if layer_file
            else bag.take("w_dec", f"d_sae {out}"),
            "b_dec": bag.take("b_dec", out),
            "threshold": bag.take("threshold", "d_sae"),
        }
        skips = bag.has("affine_skip_connection")
        if site.affine is not None and site.affine != skips:
            raise FormatError(
                f"{bag.where}: config.json says affine_connection {str(site.affine).lower()}, but there is "
                f"{'an' if skips else 'no'} affine_skip_connection here"
            )
        if skips:
            if not site.transcodes:
                raise FormatError(
                    f"{bag.where}: an SAE with affine_skip_connection is not an architecture that we have"
                )
            tensors["W_skip"] = bag.take("affine_skip_connection", "d_in d_out").t()
        config: dict[str, Any] = {
            "d_in": bag.sizes["d_in"],
            "d_sae": bag.sizes["d_sae"],
            "apply_b_dec_to_input": False,
        }
        if site.transcodes:
            config |= {"d_out": bag.sizes["d_out"], "skip": skips}
        elif site.name == "attn_out":
            config["reshape_activations"] = "hook_z"
        if layer_file and weights:
            warn_of_sum(bag.where)
        return assemble("jumprelu", config, tensors, facts.metadata(_metadata(site)), bag)


def _layer_file(folder: str) -> str | None:
    """The file of one layer of a cross-layer transcoder that `folder` names, or None."""
    name = folder.rsplit("/", 1)[-1]
    if not name.startswith("params_layer_"):
        return None
    return folder if folder.endswith(".safetensors") else f"{folder}.safetensors"


def _site(source: FileSource, folder: str, where: str, cross_layer: bool, facts: Facts) -> _Site:
    home = folder.rpartition("/")[0] if cross_layer else folder
    file_layer = layer_of(folder, "params_layer_") if cross_layer else None
    if not exists(source, home, "config.json"):
        return _unconfigured(where, cross_layer, file_layer, facts)
    cfg = Settings(read_json(source, join(home, "config.json")), place(source, home, "config.json"))
    cfg.must_be("architecture", "jump_relu", "Gemma Scope 2 was published with JumpReLU")
    model = cfg.get("model_name", str, nullable=True)
    affine = cfg.get("affine_connection", bool, nullable=True)
    width = cfg.get("width", int, nullable=True)
    kind = cfg.get("type", str, nullable=True)
    cfg.ignore("as published, and known from elsewhere", "l0")
    if kind is not None and "crosscoder" in kind.lower():
        raise FormatError(f"{cfg.where}: crosscoders of Gemma Scope 2 are not supported")
    if cross_layer:
        cfg.ignore("one of each for every layer", "hf_hook_point_in hf_hook_point_out")
        cfg.finish(facts.ignore_keys)
        return _Site("clt", True, model=model, width=width, affine=affine, layer=file_layer)
    hook_in = spell_hook_name(cfg.need("hf_hook_point_in", str))
    hook_out = cfg.get("hf_hook_point_out", str, nullable=True)
    hook_out = None if hook_out is None else spell_hook_name(hook_out)
    cfg.finish(facts.ignore_keys)
    transcodes = hook_out not in (None, hook_in)
    if not transcodes and affine is False:
        affine = None
    place_in = _LAYER.search(hook_in)
    layer = int(place_in["layer"]) if place_in else None
    if transcodes:
        return _Site("transcoder", True, hook_in, hook_out, model, width, affine, layer)
    name = _MODULES.get(place_in["module"] or "") if place_in else None
    return _Site(name, False, hook_in, None, model, width, affine, layer)


def _unconfigured(where: str, cross_layer: bool, file_layer: int | None, facts: Facts) -> _Site:
    """What a folder without config.json holds, by its published name or the caller's word."""
    published = _PUBLISHED.search(where)
    told = facts.get("site", str)
    if told is not None and told not in _SITES:
        raise ConfigError(f"{where}: the fact site is {told!r}; known: {', '.join(_SITES)}")
    named = told or ("clt" if cross_layer else published["site"] if published else None)
    if named is None:
        raise FormatError(
            f"{where}: no config.json, and this is not a place in a published repository (google/gemma-scope-2-…), so its kind "
            f"is unknown; load with the fact site, one of {', '.join(_SITES)}"
        )
    transcodes = named in ("transcoder", "clt")
    affine = "affine" in published["kind"] if published and transcodes else None
    layer = int(published["layer"]) if published and published["layer"] else file_layer
    return _Site(named, transcodes, affine=affine, layer=layer)


def _metadata(site: _Site) -> dict[str, Any]:
    found: dict[str, Any] = {
        "model_name": None if site.model is None else _hub_name(site.model),
        "hf_hook_name": site.hook_in,
        "hf_hook_name_out": site.hook_out,
        "dataset_path": "monology/pile-uncopyrighted",
        "context_size": 1024,
        "prepend_bos": True,
    }
    if site.layer is not None:
        if site.transcodes:
            found["hook_name"] = f"blocks.{site.layer}.hook_mlp_in"
            found["hook_name_out"] = f"blocks.{site.layer}.hook_mlp_out"
        elif site.name in _HOOKS:
            found["hook_name"] = f"blocks.{site.layer}.{_HOOKS[site.name]}"
    return found


def _hub_name(model: str) -> str:
    """The Hub's name of the base model: with its owner, and for the smallest one without the suffix that only others have."""
    name = (model if "/" in model else f"google/{model}").replace("-v3", "-3")
    return name.removesuffix("-pt") if "270m" in name else name
