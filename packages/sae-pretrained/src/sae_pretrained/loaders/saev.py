"""Files of saev (vision SAEs): a line of JSON that describes the SAE, then the bytes of ``torch.save``.

Schemas 2 to 5 are read. Files without a schema, and of schema 1, are older than the moment at which the library stopped
subtracting b_dec before encoding, and nothing in them says on which side they fall; they need the fact
``apply_b_dec_to_input``.

The six facts:

- Weights: ``W_enc`` (d_in, d_sae) and ``W_dec`` (d_sae, d_in) lie as ours do.
- b_dec before encoding: not subtracted since schema 2.
- ReLU and TopK: Relu; TopK without ReLU, which differs from ours where fewer than k pre-activations are positive, so it needs
  the fact ``drop_negative_latents: true``; BatchTopK as JumpReLU.
- Threshold: ``activation.threshold``, one number for all latents, stored as it is. Schemas before it existed are refused, since
  their BatchTopK was a TopK of each sample.
- Input normalisation: none.
- Decoder norm: ``normalize_w_dec`` concerns training; the file's decoder is used as it is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast, final

from sae_core.errors import FormatError
from sae_core.protocols import FileSource, LoadedSAE

from sae_pretrained.loaders.common import Facts, Settings, TensorBag, assemble, place, torch_bag, torch_mapping

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["SaevLoader"]

_HEADER_BYTES = 64 * 1024
_TRAINING_KEYS = (
    "n_reinit_samples remove_parallel_grads normalize_w_dec seed reinit_blend reinit_enc_dec_tranpose sparsity_coeff "
    "ghost_grads l1_coeff use_ghost_grads"
)


@final
class SaevLoader:
    """Reads what saev's ``dump`` writes."""

    def matches(self, source: FileSource, folder: str = "") -> bool:
        """A .pt file that starts with a JSON object."""
        if not folder.endswith(".pt") or not source.exists(folder):
            return False
        return source.read_range(folder, 0, 1) == b"{"

    def load(
        self,
        source: FileSource,
        folder: str = "",
        *,
        weights: bool = True,
        overrides: Mapping[str, Any] | None = None,
        rows: Sequence[int] | None = None,
    ) -> LoadedSAE:
        """Read the file `folder`; `rows` are the latents to load, None for all."""
        facts = Facts(overrides, "saev", ["apply_b_dec_to_input"])
        where = place(source, folder)
        header, length = _header(source, folder, where)
        schema = header.get("schema")
        if schema not in (None, 1, 2, 3, 4, 5):
            raise FormatError(f"{where}: schema {schema!r} is unknown (known: none, 1 to 5)")
        subtracts = facts.get("apply_b_dec_to_input", bool)
        if schema in (None, 1):
            if subtracts is None:
                raise FormatError(
                    f"{where}: nothing in a file of this age says whether b_dec is subtracted before encoding; load with the "
                    "fact apply_b_dec_to_input"
                )
        elif subtracts:
            raise FormatError(f"{where}: schema {schema} does not subtract b_dec before encoding")

        cfg = Settings(
            cast("Mapping[str, Any]", header if schema is None else header.get("cfg", {})), f"{where}: header"
        )
        sizes = _sizes(cfg)
        kind, top_k = _activation(cfg, header)
        cfg.ignore("training only", _TRAINING_KEYS)
        cfg.finish(facts.ignore_keys)

        bag = (
            torch_bag(torch_mapping(source, folder, skip=length), where, sizes=sizes, rows=rows)
            if weights
            else TensorBag(where, None, sizes=sizes, rows=rows, weights=False)
        )
        tensors = {
            "W_enc": bag.take("W_enc", "d_in d_sae"),
            "b_enc": bag.take("b_enc", "d_sae"),
            "W_dec": bag.take("W_dec", "d_sae d_in"),
            "b_dec": bag.take("b_dec", "d_in"),
        }
        architecture, extra = _architecture(kind, top_k, bag, tensors)
        config = {**sizes, "apply_b_dec_to_input": bool(subtracts), **extra}
        details = {"training_architecture": "batchtopk"} if kind == "BatchTopK" else {}
        return assemble(architecture, config, tensors, facts.metadata(details), bag)


def _header(source: FileSource, folder: str, where: str) -> tuple[dict[str, Any], int]:
    start = source.read_range(folder, 0, _HEADER_BYTES)
    line, newline, _ = start.partition(b"\n")
    try:
        value = json.loads(line)
    except ValueError:
        value = None
    if not newline or not isinstance(value, dict):
        raise FormatError(f"{where}: does not start with a line of JSON")
    return cast("dict[str, Any]", value), len(line) + 1


def _sizes(cfg: Settings) -> dict[str, int]:
    d_in = cfg.integer("d_model") if "d_model" in cfg else cfg.integer("d_vit")
    if "d_sae" in cfg:
        return {"d_in": d_in, "d_sae": cfg.integer("d_sae")}
    return {"d_in": d_in, "d_sae": d_in * cfg.integer("exp_factor")}


def _activation(cfg: Settings, header: Mapping[str, Any]) -> tuple[str, int]:
    """The activation's class and its k (0 for Relu)."""
    known = ("Relu", "TopK", "BatchTopK")
    schema = header.get("schema")
    if schema is None:
        return "Relu", 0
    old = header.get("cls")
    if schema == 1 and old in known:
        return str(old), 0 if old == "Relu" else cfg.integer("top_k")
    activation = cfg.section("activation")
    kind = activation.choice("cls", known)
    params = activation.section("params")
    activation.finish()
    top_k = 0 if kind == "Relu" else params.integer("top_k")
    params.ignore("training only", "key kind sparsity aux momentum")
    params.finish()
    return kind, top_k


def _architecture(kind: str, top_k: int, bag: TensorBag, tensors: dict[str, Tensor]) -> tuple[str, dict[str, Any]]:
    import torch

    if kind == "Relu":
        return "standard", {}
    if kind == "TopK":
        return "topk", {"k": top_k, "rescale_acts_by_decoder_norm": False, "apply_relu": False}
    if bag.weights and not bag.has("activation.threshold"):
        raise FormatError(
            f"{bag.where}: no tensor 'activation.threshold', without which BatchTopK depends on the rest of the batch"
        )
    count = bag.sizes["d_sae"] if bag.rows is None else len(bag.rows)
    value = bag.number("activation.threshold")
    tensors["threshold"] = (
        torch.full((count,), max(value, 0.0)) if value is not None else torch.empty(count, device="meta")
    )
    return "jumprelu", {}
