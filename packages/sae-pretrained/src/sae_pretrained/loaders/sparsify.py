"""Folders of EleutherAI's sparsify (formerly sae): ``sae.safetensors`` beside ``cfg.json``, one folder a hook point.

SAEs, transcoders and transcoders with a skip connection, of the library and of its fork clt-training. The run's own
``config.json``, one folder up, tells the base model if it is there.

The six facts:

- Weights: ``encoder.weight`` (d_sae, d_in) is transposed, ``W_dec`` (d_sae, d_out) and ``W_skip`` (d_out, d_in) lie as ours do.
- b_dec before encoding: subtracted by SAEs, not by transcoders (``transcode``); files older than that key are SAEs. A skip
  connection without ``transcode`` subtracts it for the encoder and feeds the skip the raw input: loaded as a transcoder whose
  b_enc has taken up what was subtracted.
- ReLU and TopK: ReLU first, then the k largest, which gives the same values as the other order. The old key ``signed``
  meant no ReLU and the k largest by magnitude: AbsTopK.
- Threshold: none.
- Input normalisation: none; clt-training's ``normalize_io`` scales inputs and outputs by stored norms, folded in here.
- Decoder norm: ``normalize_decoder`` concerns training; the file's decoder is used as it is.

The skip connection reads the raw input. ``activation: groupmax`` picks one latent in each of k groups of neighbours; as a
transcoder it is refused, since there is no such architecture here. Of clt-training, coders that write to several layers, or
whose latents compete with those of other layers, are refused by the name of the key; a bias that is added to active latents
before decoding (``post_enc``) is refused unless it is zero, and a scale there (``post_enc_scale``) moves into the decoder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
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
    place,
    read_json,
    safetensors_bag,
    times,
)

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["SparsifyLoader"]

_DECODER = ("W_dec", "b_dec", "W_skip")
_FORK_KEYS = (
    "dtype tp_output divide_cross_layer train_post_encoder post_encoder_scale per_source_tied secondary_target_tied matryoshka "
    "matryoshka_expansion_factors"
)


@final
class SparsifyLoader:
    """Reads what sparsify's ``SparseCoder.save_to_disk`` writes."""

    def matches(self, source: FileSource, folder: str = "") -> bool:
        """A folder with sae.safetensors and cfg.json."""
        return exists(source, folder, "sae.safetensors", "cfg.json")

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
        facts = Facts(overrides, "sparsify")
        config = Settings(read_json(source, join(folder, "cfg.json")), place(source, folder, "cfg.json"))
        d_in = config.integer("d_in")
        d_sae = config.get("num_latents", int, 0) or d_in * (config.get("expansion_factor", int, 32) or 0)
        k = config.integer("k") if "k" in config else 32
        activation = config.choice("activation", ("topk", "groupmax"), "topk")
        signed = bool(config.get("signed", bool, False))
        transcodes = bool(config.get("transcode", bool, False))
        skips = bool(config.get("skip_connection", bool, False))
        scaled = bool(config.get("normalize_io", bool, False))
        targets = _refuse_what_other_layers_decide(config)
        config.ignore("training only", "normalize_decoder multi_topk expansion_factor")
        config.ignore("training, or how clt-training runs it", _FORK_KEYS)
        config.finish(facts.ignore_keys)
        if signed and (activation != "topk" or transcodes or skips):
            raise FormatError(f"{config.where}: signed latents are known of plain top-k SAEs only")

        sizes = {"d_in": d_in, "d_sae": d_sae}
        bag = safetensors_bag(source, join(folder, "sae.safetensors"), sizes=sizes, rows=rows, weights=weights)
        end = ".0" if targets and bag.has("W_decs.0") else ""
        W_dec, b_dec, W_skip = (f"{name}s.0" for name in _DECODER) if end else _DECODER
        tensors = {
            "W_enc": bag.take("encoder.weight", "d_sae d_in").t(),
            "b_enc": bag.take("encoder.bias", "d_sae"),
            "W_dec": bag.take(W_dec, "d_sae d_out" if transcodes else "d_sae d_in"),
            "b_dec": bag.take(b_dec, "d_out" if transcodes else "d_in"),
        }
        if skips:
            tensors["W_skip"] = bag.take(W_skip, "d_out d_in" if transcodes else "d_in d_in")
        if end:  # the fork keeps the first target under its old name too
            bag.drop("the same tensors once more", *_DECODER)
        subtracts = not transcodes
        if subtracts and (skips or scaled):
            shift_F = tensors["b_dec"].double() @ tensors["W_enc"].double()
            tensors["b_enc"] = (tensors["b_enc"].double() - shift_F).to(tensors["b_enc"].dtype)
            subtracts = False
        _decode_as_stored(bag, tensors, scaled, end)
        extra: dict[str, Any] = {"k": k, "apply_b_dec_to_input": subtracts, "rescale_acts_by_decoder_norm": False}
        if transcodes or skips:
            extra |= {"d_out": bag.sizes["d_out" if transcodes else "d_in"], "skip": skips}
        architecture = "abstopk" if signed else activation
        metadata = facts.metadata(_metadata(source, folder, transcodes))
        return assemble(architecture, {**sizes, **extra}, tensors, metadata, bag)


def _refuse_what_other_layers_decide(config: Settings) -> int:
    """Number of targets, 0 or 1. Raises FormatError for a coder of clt-training that is more than one dictionary."""
    targets = config.get("n_targets", int, 0) or 0
    sources = config.get("n_sources", int, 0) or 0
    if targets > 1:
        raise FormatError(
            f"{config.where}: n_targets is {targets}: a coder that writes to several layers is no dictionary"
        )
    if targets and sources > 1:
        raise FormatError(f"{config.where}: n_sources is {sources}: what other layers write is added to its output")
    config.must_be("coalesce_topk", "none", "latents of several layers compete")
    config.must_be("topk_coalesced", False, "latents of several layers compete")
    config.must_be("use_fp8", False, "products in float8 are not computed here")
    return targets


def _decode_as_stored(bag: TensorBag, tensors: dict[str, Tensor], scaled: bool, end: str) -> None:
    """Fold what clt-training does between its latents and its output, and to its inputs, into the weights."""
    bias, factor = (f"post_encs{end}", f"post_enc_scales{end}") if end else ("post_enc", "post_enc_scale")
    if bag.has(bias):
        added = bag.take(bias, "d_sae")
        if not added.is_meta and bool((added != 0).any()):
            raise FormatError(
                f"{bag.where}: tensor {bias!r} is not all zeros: it is added to active latents before they are decoded, which "
                "no architecture here does"
            )
    if bag.has(factor):
        tensors["W_dec"] = times(tensors["W_dec"], bag.take(factor, "d_sae").float()[:, None])
    if not scaled:
        return
    norm_in, norm_out = bag.number("in_norm"), bag.number("out_norm")
    if norm_in is None or norm_out is None:
        return
    if not (norm_in > 0 and norm_out > 0):
        raise FormatError(f"{bag.where}: in_norm and out_norm must be positive, not {norm_in} and {norm_out}")
    into, out = bag.sizes["d_in"] ** 0.5 / norm_in, norm_out / tensors["b_dec"].shape[0] ** 0.5
    factors = {"W_enc": into, "W_dec": out, "b_dec": out, "W_skip": into * out}
    tensors.update({name: times(tensor, factors[name]) for name, tensor in tensors.items() if name in factors})


def _metadata(source: FileSource, folder: str, transcodes: bool) -> dict[str, Any]:
    folder = folder.strip("/")
    module = (folder or source.location.rstrip("/")).rsplit("/", 1)[-1]
    known = module.split(".")[0] in ("layers", "h", "embed_tokens", "blocks", "model", "transformer")
    found: dict[str, Any] = {"hf_hook_name": module if known else None}
    parts = module.split(".")
    if not transcodes and len(parts) in (2, 3) and parts[0] in ("layers", "h") and parts[1].isdigit():
        site = {
            2: "hook_resid_post",
            3: {"mlp": "hook_mlp_out", "attn": "hook_attn_out", "self_attn": "hook_attn_out"}.get(parts[-1]),
        }
        found["hook_name"] = f"blocks.{parts[1]}.{site[len(parts)]}" if site[len(parts)] else None
    run = join(str(PurePosixPath(folder).parent), "config.json") if folder else ""
    if run and source.exists(run):
        values = Settings(read_json(source, run), place(source, "", run))
        found["model_name"] = values.get("model", str, nullable=True)
        found["dataset_path"] = values.get("dataset", str, nullable=True)
        found["context_size"] = values.get("ctx_len", int, nullable=True)
    return found
