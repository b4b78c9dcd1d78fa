"""Cross-layer transcoders in circuit-tracer's layout, such as mntss's: whole, or one layer of them.

Their files are ``W_enc_{n}.safetensors`` and ``W_dec_{n}.safetensors``, one of each a layer. The latents of layer n read the
residual stream there and write to the MLP outputs of layers n, n+1, …: ``W_dec_{n}`` is (d_sae, layers, d). ``config.yaml``
names model and hook points.

With `folder` the folder of these files, the whole is loaded as ``cross_layer_transcoder``: its sites are the hook points of
the layers, its latents are numbered layer by layer, and its outputs are the predictions of every layer.

With `folder` a layer's number, or the encoder's file, that layer's latents are loaded as a dictionary of their own. Its
encoder is exactly ours; of its decoders the fact ``decoder`` picks a view:

- ``"sum"`` (default, as SAELens): all decoders added up. Right for latents and for directions, but what comes out is no
  reconstruction of anything, and a warning says so.
- a layer's number t >= n: what these latents write to layer t. Added over all n <= t this is the transcoder's output at t; the
  bias of layer t is in the view n = t only, so that it is added once.

The six facts:

- Weights: ``W_enc_{n}`` (d_sae, d_in) is transposed for one layer, and lies as ours does in the whole.
- b_dec before encoding: not subtracted; ``b_dec_{n}`` belongs to the outputs of layer n.
- ReLU and TopK: ReLU; JumpReLU if there is a tensor ``threshold_{n}``. In the whole, ReLU is a threshold of zero.
- Threshold: stored as it is; where one is negative, with which the original keeps negative latents, ``apply_relu: false``.
- Input normalisation: none.
- Decoder norm: whatever the file has.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, final

from sae_core.errors import ConfigError, FormatError
from sae_core.protocols import FileSource, LoadedSAE

from sae_pretrained.loaders.common import (
    Facts,
    Settings,
    TensorBag,
    added_up,
    assemble,
    exists,
    join,
    place,
    read_yaml,
    safetensors_bag,
)
from sae_pretrained.loaders.mwhanna_transcoder import below_zero

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["MntssCLTLayerLoader", "warn_of_sum"]


@final
class MntssCLTLayerLoader:
    """Reads a cross-layer transcoder, or one layer of it."""

    def matches(self, source: FileSource, folder: str = "") -> bool:
        """A number n, or the file W_enc_{n}.safetensors, with W_dec_{n} and config.yaml beside it; or their folder."""
        layer = _number(folder)
        if layer is None:
            return exists(source, folder, *_files(0), "config.yaml")
        files = (f"W_enc_{layer}.safetensors", f"W_dec_{layer}.safetensors", "config.yaml")
        return all(source.exists(name) for name in files)

    def load(
        self,
        source: FileSource,
        folder: str = "",
        *,
        weights: bool = True,
        overrides: Mapping[str, Any] | None = None,
        rows: Sequence[int] | None = None,
    ) -> LoadedSAE:
        """Read layer `folder`, or all of them; `rows` are the latents of a layer to load, None for all."""
        n = _number(folder)
        if n is None:
            return _load_whole(source, folder, weights, overrides, rows)
        facts = Facts(overrides, "mntss_clt_layer_transcoder", ["decoder"])
        settings = Settings(read_yaml(source, "config.yaml"), place(source, "", "config.yaml"))
        model = settings.get("model_name", str, nullable=True)
        hook_in, hook_out = settings.need("feature_input_hook", str), settings.need("feature_output_hook", str)
        settings.ignore("names of the set and of its members", "model_kind scan transcoders repo_id revision")
        settings.finish(facts.ignore_keys)

        encoder = safetensors_bag(source, f"W_enc_{n}.safetensors", rows=rows, weights=weights)
        tensors = {
            "W_enc": encoder.take(f"W_enc_{n}", "d_sae d_in").t(),
            "b_enc": encoder.take(f"b_enc_{n}", "d_sae"),
            "b_dec": encoder.take(f"b_dec_{n}", "d_out"),
        }
        architecture, below = "standard", dict[str, Any]()
        if encoder.has(f"threshold_{n}"):
            tensors["threshold"] = encoder.take(f"threshold_{n}", "d_sae")
            architecture, below = "jumprelu", below_zero(tensors["threshold"])
        decoder = safetensors_bag(source, f"W_dec_{n}.safetensors", sizes=encoder.sizes, rows=rows, weights=weights)
        written = decoder.take(f"W_dec_{n}", "d_sae layers d_out")
        target, tensors["W_dec"] = _view(written, int(n), facts, decoder)
        if target not in (None, int(n)):
            tensors["b_dec"] = tensors["b_dec"].new_zeros(tensors["b_dec"].shape)
        found = {
            "model_name": model,
            "hook_name": f"blocks.{n}.{hook_in}",
            "hook_name_out": f"blocks.{n if target is None else target}.{hook_out}",
            "model_from_pretrained_kwargs": {"fold_ln": False},
        }
        config = {key: encoder.sizes[key] for key in ("d_in", "d_out", "d_sae")}
        config |= {"apply_b_dec_to_input": False, **below}
        if target is None and weights:
            warn_of_sum(encoder.where)
        return assemble(architecture, config, tensors, facts.metadata(found), encoder, decoder)


def _load_whole(
    source: FileSource, folder: str, weights: bool, overrides: Mapping[str, Any] | None, rows: Sequence[int] | None
) -> LoadedSAE:
    """All layers as one dictionary."""
    import torch

    facts = Facts(overrides, "mntss_clt_layer_transcoder")
    where = place(source, folder)
    if rows is not None:
        raise ConfigError(
            f"{where}: rows= cannot be used with the whole; load the layer that they are of, by its number"
        )
    settings = Settings(read_yaml(source, join(folder, "config.yaml")), place(source, folder, "config.yaml"))
    model = settings.get("model_name", str, nullable=True)
    hooks = [settings.get(key, str, nullable=True) for key in ("feature_input_hook", "feature_output_hook")]
    settings.must_be("model_kind", "cross_layer_transcoder", "this is something else")
    settings.ignore("names of the set and of its members", "scan transcoders repo_id revision")
    settings.finish(facts.ignore_keys)
    layers = next(n for n in range(len(source.files()) + 1) if not source.exists(join(folder, _files(n)[0])))

    tensors: dict[str, Tensor] = {}
    bags: list[TensorBag] = []
    sizes: dict[str, int] = {}
    for n in range(layers):
        encoder = safetensors_bag(source, join(folder, _files(n)[0]), sizes=sizes, weights=weights)
        tensors[f"encoder.{n}"] = encoder.take(f"W_enc_{n}", "d_sae d_in")
        tensors[f"b_enc.{n}"] = encoder.take(f"b_enc_{n}", "d_sae")
        tensors[f"b_dec.{n}"] = encoder.take(f"b_dec_{n}", "d_out")
        if encoder.has(f"threshold_{n}"):
            tensors[f"threshold.{n}"] = encoder.take(f"threshold_{n}", "d_sae")
        else:
            tensors[f"threshold.{n}"] = torch.zeros(encoder.sizes["d_sae"], device=tensors[f"b_enc.{n}"].device)
        sizes = {key: encoder.sizes[key] for key in ("d_sae", "d_in", "d_out")}
        decoder = safetensors_bag(source, join(folder, _files(n)[1]), sizes=sizes, weights=weights)
        tensors[f"W_dec.{n}"] = decoder.take(f"W_dec_{n}", "d_sae layers d_out").flatten(1)
        if decoder.sizes["layers"] != layers - n:
            raise FormatError(
                f"{decoder.where}: writes to {decoder.sizes['layers']} layers, but {layers} layers have files, of which layer "
                f"{n} and later ones are {layers - n}; a file is missing or left over"
            )
        bags += [encoder, decoder]
    known = [n for n in range(layers) if bags[2 * n].has(f"threshold_{n}")]
    if known and len(known) != layers:
        raise FormatError(f"{where}: layers {known} have thresholds and the others have none")
    inner, outer = (hook or default for hook, default in zip(hooks, ("input", "output"), strict=True))
    config: dict[str, Any] = {
        "d_in": layers * sizes["d_in"],
        "d_sae": layers * sizes["d_sae"],
        "reads": {f"blocks.{n}.{inner}": sizes["d_in"] for n in range(layers)},
        "writes": {f"blocks.{n}.{outer}": sizes["d_out"] for n in range(layers)},
        **below_zero(*(tensors[f"threshold.{n}"] for n in range(layers))),
    }
    metadata = facts.metadata({"model_name": model, "model_from_pretrained_kwargs": {"fold_ln": False}})
    return assemble("cross_layer_transcoder", config, tensors, metadata, *bags)


def _files(n: int) -> tuple[str, str]:
    return f"W_enc_{n}.safetensors", f"W_dec_{n}.safetensors"


def _number(folder: str) -> str | None:
    found = re.fullmatch(r"(?:W_enc_)?(\d+)(?:\.safetensors)?", folder.strip("/"))
    return found[1] if found else None


def _view(written: Tensor, n: int, facts: Facts, bag: TensorBag) -> tuple[int | None, Tensor]:
    """The target layer (None: all of them) and the decoder (d_sae, d_out)."""
    if facts.get("decoder", object, "sum") == "sum":
        return None, added_up(written)
    target = facts.get("decoder", int) or 0
    last = n + bag.sizes["layers"] - 1
    if not n <= target <= last:
        raise ConfigError(f"{bag.where}: layer {n} writes to layers {n} to {last}; the fact decoder is {target}")
    return target, written[:, target - n]


def warn_of_sum(where: str) -> None:
    """Say that the outputs of a layer of a cross-layer transcoder are not a reconstruction."""
    warnings.warn(
        f"{where}: one layer of a cross-layer transcoder with its decoders added up: latents and directions are right, but "
        "outputs reconstruct nothing",
        stacklevel=3,
    )
