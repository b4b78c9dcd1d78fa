"""One layer of a cross-layer transcoder in circuit-tracer's layout, such as mntss's.

Its files are ``W_enc_{n}.safetensors`` and ``W_dec_{n}.safetensors``. The latents of layer n read the residual stream there
and write to the MLP outputs of layers n, n+1, …: ``W_dec_{n}`` is (d_sae, layers, d). `folder` is the layer's number or the
encoder's file; ``config.yaml`` names model and hook points.

A whole cross-layer transcoder is more than one dictionary. Its encoder is exactly ours; of its decoders the fact ``decoder``
picks a view:

- ``"sum"`` (default, as SAELens): all decoders added up. Right for latents and for directions, but what comes out is no
  reconstruction of anything, and a warning says so.
- a layer's number t >= n: what these latents write to layer t. Added over all n <= t this is the transcoder's output at t; the
  bias of layer t is in the view n = t only, so that it is added once.

The six facts:

- Weights: ``W_enc_{n}`` (d_sae, d_in) is transposed.
- b_dec before encoding: not subtracted; ``b_dec_{n}`` belongs to the outputs of layer n.
- ReLU and TopK: ReLU; JumpReLU if there is a tensor ``threshold_{n}``.
- Threshold: stored as it is; a negative one, with which the original keeps negative latents, is refused.
- Input normalisation: none.
- Decoder norm: whatever the file has.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, final

from sae_core.errors import ConfigError
from sae_core.protocols import FileSource, LoadedSAE

from sae_pretrained.loaders.common import (
    Facts,
    Settings,
    TensorBag,
    added_up,
    assemble,
    place,
    read_yaml,
    safetensors_bag,
)
from sae_pretrained.loaders.mwhanna_transcoder import not_negative

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["MntssCLTLayerLoader", "warn_of_sum"]


@final
class MntssCLTLayerLoader:
    """Reads one layer of a cross-layer transcoder."""

    def matches(self, source: FileSource, folder: str = "") -> bool:
        """A number n, or the file W_enc_{n}.safetensors, with W_dec_{n}.safetensors and config.yaml beside it."""
        layer = _number(folder)
        files = (f"W_enc_{layer}.safetensors", f"W_dec_{layer}.safetensors", "config.yaml")
        return layer is not None and all(source.exists(name) for name in files)

    def load(
        self,
        source: FileSource,
        folder: str = "",
        *,
        weights: bool = True,
        overrides: Mapping[str, Any] | None = None,
        rows: Sequence[int] | None = None,
    ) -> LoadedSAE:
        """Read layer `folder`; `rows` are the latents to load, None for all."""
        facts = Facts(overrides, "mntss_clt_layer_transcoder", ["decoder"])
        n = _number(folder)
        if n is None:
            raise ConfigError(
                f"{source.location}: a cross-layer transcoder is loaded by layer: give its number, not {folder!r}"
            )
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
        architecture = "standard"
        if encoder.has(f"threshold_{n}"):
            name = f"threshold_{n}"
            tensors["threshold"] = not_negative(encoder.take(name, "d_sae"), f"{encoder.where}: tensor {name!r}")
            architecture = "jumprelu"
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
        config = {key: encoder.sizes[key] for key in ("d_in", "d_out", "d_sae")} | {"apply_b_dec_to_input": False}
        if target is None and weights:
            warn_of_sum(encoder.where)
        return assemble(architecture, config, tensors, facts.metadata(found), encoder, decoder)


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
