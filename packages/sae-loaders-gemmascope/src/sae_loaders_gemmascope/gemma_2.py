"""Gemma Scope (arXiv 2408.05147): ``params.npz`` for SAEs of Gemma 2, and for transcoders of its MLPs.

The six facts:

- Weights: ``w_enc`` (d_in, d_sae) and ``w_dec`` (d_sae, d_out) lie as ours do; newer files write ``W_enc`` and ``W_dec``.
- b_dec before encoding: not subtracted.
- ReLU and TopK: JumpReLU.
- Threshold: stored as it is.
- Input normalisation: none. Embedding SAEs were trained on the rows of the embedding matrix, which the model multiplies by
  sqrt(d) before anybody sees them; their encoder is divided by that and their decoder multiplied, biases excepted, as SAELens
  does. The files do not say which kind they are, see below.
- Decoder norm: unit rows, for embeddings sqrt(d).

What an SAE is for is only in the published names: the repository's (``gemma-scope-…-res``, ``-mlp``, ``-att``,
``-transcoders``) and the path in it (``layer_{n}/width_…/average_l0_…`` or ``embedding/…``). They count where they stand
together, on the Hub, in its cache or in a copy of the repository, and nowhere else: a folder that somebody called
``embedding`` means nothing. Elsewhere the caller names the format (``gemma_2`` or ``gemma_2_transcoder``) and, for SAEs, the
fact ``embedding``. Attention SAEs read the heads' outputs before W_O, concatenated.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, final

from sae_core.errors import FormatError
from sae_core.protocols import FileSource, LoadedSAE
from sae_pretrained.loaders.common import Facts, TensorBag, assemble, exists, join, npz_bag, place, times

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Gemma2Loader", "Gemma2TranscoderLoader"]

_PUBLISHED = re.compile(
    r"(?:^|/|--)gemma-scope-(?P<size>\d+b)-(?P<tuning>pt|it)-(?P<site>res|mlp|att|transcoders)(?:@[^/]+|/snapshots/[^/]+)?/"
    r"(?:(?P<embedding>embedding)|layer_(?P<layer>\d+))/width_\w+/(?:average_l0_\d+|canonical)/?$"
)
_HOOKS = {"res": "hook_resid_post", "mlp": "hook_mlp_out", "att": "attn.hook_z"}
_MODULES = {"res": "", "mlp": ".post_feedforward_layernorm", "att": ".self_attn.o_proj:input"}


@final
class Gemma2Loader:
    """Reads the SAEs of Gemma Scope."""

    def matches(self, source: FileSource, folder: str = "") -> bool:
        """A folder with params.npz that has not been published as a transcoder."""
        published = _PUBLISHED.search(place(source, folder))
        return exists(source, folder, "params.npz") and not (published and published["site"] == "transcoders")

    def load(
        self,
        source: FileSource,
        folder: str = "",
        *,
        weights: bool = True,
        overrides: Mapping[str, Any] | None = None,
        rows: Sequence[int] | None = None,
    ) -> LoadedSAE:
        """Read the folder; `rows` are the latents to load, None for all."""
        facts = Facts(overrides, "gemma_2", ["embedding"])
        where = place(source, folder)
        published = _PUBLISHED.search(where)
        embeds = _embeds(published, where, facts)
        bag = npz_bag(source, join(folder, "params.npz"), rows=rows, weights=weights)
        tensors = _tensors(bag, "d_in")
        if embeds:
            root = bag.sizes["d_in"] ** 0.5
            tensors["W_enc"], tensors["W_dec"] = times(tensors["W_enc"], 1 / root), times(tensors["W_dec"], root)
        site = "embedding" if embeds else published["site"] if published else None
        config = {
            "d_in": bag.sizes["d_in"],
            "d_sae": bag.sizes["d_sae"],
            "apply_b_dec_to_input": False,
            "reshape_activations": "hook_z" if site == "att" else "none",
        }
        found = _origin(published)
        if embeds:
            found["hook_name"] = "hook_embed"
        elif published and site in _HOOKS:
            found["hook_name"] = f"blocks.{published['layer']}.{_HOOKS[site]}"
            found["hf_hook_name"] = f"model.layers.{published['layer']}{_MODULES[site]}"
        return assemble("jumprelu", config, tensors, facts.metadata(found), bag)


@final
class Gemma2TranscoderLoader:
    """Reads the transcoders of Gemma Scope: from the MLP's normalised input to its output."""

    def matches(self, source: FileSource, folder: str = "") -> bool:
        """A folder with params.npz that has not been published as an SAE."""
        published = _PUBLISHED.search(place(source, folder))
        return exists(source, folder, "params.npz") and (published is None or published["site"] == "transcoders")

    def load(
        self,
        source: FileSource,
        folder: str = "",
        *,
        weights: bool = True,
        overrides: Mapping[str, Any] | None = None,
        rows: Sequence[int] | None = None,
    ) -> LoadedSAE:
        """Read the folder; `rows` are the latents to load, None for all."""
        facts = Facts(overrides, "gemma_2_transcoder")
        published = _PUBLISHED.search(place(source, folder))
        bag = npz_bag(source, join(folder, "params.npz"), rows=rows, weights=weights)
        tensors = _tensors(bag, "d_out")
        config = {key: bag.sizes[key] for key in ("d_in", "d_out", "d_sae")} | {"apply_b_dec_to_input": False}
        found = _origin(published)
        if published and published["layer"]:
            # Hugging Face has no module that puts out the normalised input before the norm's own weights
            found["hook_name"] = f"blocks.{published['layer']}.ln2.hook_normalized"
            found["hook_name_out"] = f"blocks.{published['layer']}.hook_mlp_out"
        return assemble("jumprelu", config, tensors, facts.metadata(found), bag)


def _tensors(bag: TensorBag, out: str) -> dict[str, Tensor]:
    """All tensors; `out` names the width of the output."""

    W = "W" if bag.has("W_enc") or bag.has("W_dec") else "w"
    tensors = {
        "W_enc": bag.take(f"{W}_enc", "d_in d_sae"),
        "b_enc": bag.take("b_enc", "d_sae"),
        "W_dec": bag.take(f"{W}_dec", f"d_sae {out}"),
        "b_dec": bag.take("b_dec", out),
        "threshold": bag.take("threshold", "d_sae"),
    }
    if bag.has("scaling_factor"):
        factor = bag.take("scaling_factor", "d_sae")
        if not factor.is_meta and bool((factor != 1).any()):
            raise FormatError(f"{bag.where}: scaling_factor is not all ones; fine-tuned scaling is not supported")
    return tensors


def _embeds(published: re.Match[str] | None, where: str, facts: Facts) -> bool:
    """Whether this is an embedding SAE, as its published place or the caller says."""
    told = facts.get("embedding", bool)
    if told is not None:
        return told
    if published is None:
        raise FormatError(
            f"{where}: embedding SAEs need their weights scaled and others do not; no file says which this is, and this is not "
            "a place in a published repository (google/gemma-scope-…/layer_…/width_…/average_l0_…); load with the fact "
            "embedding (true or false)"
        )
    return published["embedding"] is not None


def _origin(published: re.Match[str] | None) -> dict[str, Any]:
    if published is None:
        return {}
    instructed = "-it" if published["tuning"] == "it" else ""
    return {
        "model_name": f"google/gemma-2-{published['size']}{instructed}",
        "dataset_path": "monology/pile-uncopyrighted",
        "context_size": 1024,
        "prepend_bos": True,
    }
