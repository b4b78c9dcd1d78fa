"""Folders of the dictionary_learning library: ``ae.pt`` beside ``config.json`` (its wheel 0.1.0 and the files before it).

``config.json`` names the class, and the class fixes the keys:

| dict_class | becomes | keys of ae.pt (F latents, D width) |
|---|---|---|
| AutoEncoder | standard | bias (D), encoder.weight (F, D), encoder.bias, decoder.weight (D, F) |
| AutoEncoderNew | standard | encoder.weight, encoder.bias, decoder.weight, decoder.bias |
| AutoEncoderTopK | topk | encoder.weight, encoder.bias, decoder.weight, b_dec, k, threshold (unused by its encode) |
| BatchTopKSAE | jumprelu | the same |
| MatryoshkaBatchTopKSAE | jumprelu | W_enc (D, F), b_enc, W_dec (F, D), b_dec, k, threshold, group_sizes |
| GatedAutoEncoder | gated | encoder.weight, decoder.weight, decoder_bias, r_mag, gate_bias, mag_bias |
| JumpReluAutoEncoder | jumprelu | W_enc (D, F), b_enc, W_dec (F, D), b_dec, threshold (F) |

The six facts:

- Weights: ``encoder.weight`` and ``decoder.weight`` are transposed, ``W_enc`` and ``W_dec`` lie as ours do.
- b_dec before encoding: subtracted, except by AutoEncoderNew and JumpReluAutoEncoder.
- ReLU and TopK: ReLU first, then the k largest, which gives the same values as the other order.
- Threshold: stored as it is; one number for all latents of the BatchTopK classes, compared with the value after the ReLU.
  A negative one means that training ended before it was ever estimated; the library then keeps every positive value, and
  so do we (threshold 0).
- Input normalisation: none; a norm used in training has been folded into the biases.
- Decoder norm: whatever the file has. The library's ``AutoEncoder.from_pretrained`` rescales latents to unit decoder norm
  after reading the file; that is a choice of view, and is not made here.

An ``ae.pt`` whose ``config.json`` is lost loads with the fact ``dict_class`` and, where a TopK class of old has no k in its
file, the fact ``k``; widths follow from the tensors.
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
    place,
    read_json,
    torch_bag,
    torch_mapping,
)

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["DictionaryLearningLoader"]

_CLASSES = (
    "AutoEncoder",
    "AutoEncoderNew",
    "AutoEncoderTopK",
    "BatchTopKSAE",
    "MatryoshkaBatchTopKSAE",
    "GatedAutoEncoder",
    "JumpReluAutoEncoder",
)

_TRAINING_KEYS = (
    "trainer_class lr steps seed device wandb_name warmup_steps decay_start sparsity_warmup_steps resample_steps "
    "resample_interval reinit_interval l1_penalty l0_penalty aux_penalty entropy sparsity_penalty initial_sparsity_penalty "
    "sparsity_function sparsity_queue_length n_sparsity_updates anneal_start anneal_end p_start p_end lp_norm bandwidth "
    "target_l0 auxk_alpha top_k_aux threshold_beta threshold_start_step group_fractions group_weights group_sizes "
    "k_anneal_steps ghost_grads ghost_threshold use_wandb batch_size temp norm_factor"
)
# norm_factor: recorded by newer versions, which have already multiplied it into the biases they save


@final
class DictionaryLearningLoader:
    """Reads what dictionary_learning's ``trainSAE`` saves."""

    def matches(self, source: FileSource, folder: str = "") -> bool:
        """A folder with ae.pt and config.json, or its ae.pt."""
        return exists(source, _home(folder), "ae.pt", "config.json")

    def hint(self, source: FileSource, folder: str = "") -> str | None:
        """For an ae.pt without its config.json."""
        if not exists(source, _home(folder), "ae.pt"):
            return None
        return f"format='dictionary_learning_1' and the fact dict_class, one of {', '.join(_CLASSES)}"

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
        facts = Facts(overrides, "dictionary_learning_1", ["dict_class", "k"])
        folder = _home(folder)
        sizes: dict[str, int] = {}
        metadata: dict[str, Any] = {}
        told, k = facts.get("dict_class", str), facts.get("k", int)
        if exists(source, folder, "config.json"):
            config = Settings(read_json(source, join(folder, "config.json")), place(source, folder, "config.json"))
            trainer = config.section("trainer")
            name = trainer.choice("dict_class", _CLASSES)
            if told not in (None, name):
                raise FormatError(f"{config.where}: dict_class is {name!r}, but the caller says {told!r}")
            sizes = {"d_in": trainer.integer("activation_dim"), "d_sae": trainer.integer("dict_size")}
            stated = trainer.get("k", int)
            if None not in (stated, k) and stated != k:
                raise FormatError(f"{config.where}: k is {stated}, but the caller says {k}")
            k = stated if k is None else k
            metadata = _metadata(trainer, config)
            trainer.ignore("how it was trained", _TRAINING_KEYS)
            trainer.finish(facts.ignore_keys)
            config.finish(facts.ignore_keys)
        elif told in _CLASSES:
            name = told
        else:
            raise FormatError(
                f"{place(source, folder)}: no config.json says which class this is, and the class decides how it encodes; load "
                f"with the fact dict_class, one of {', '.join(_CLASSES)}" + (f" (not {told!r})" if told else "")
            )
        metadata = facts.metadata(metadata)

        file = join(folder, "ae.pt")
        bag = (
            torch_bag(torch_mapping(source, file), place(source, "", file), sizes=sizes, rows=rows, weights=weights)
            if weights or not sizes
            else TensorBag(place(source, "", file), None, sizes=sizes, rows=rows, weights=False)
        )
        architecture, extra, tensors = _convert(name, bag, k)
        if architecture == "jumprelu" and name != "JumpReluAutoEncoder":
            training = "matryoshka_batchtopk" if name == "MatryoshkaBatchTopKSAE" else "batchtopk"
            metadata = {"training_architecture": training, "training_architecture_details": {"k": k}} | metadata
        sizes = {"d_in": bag.sizes["d_in"], "d_sae": bag.sizes["d_sae"]}
        return assemble(architecture, {**sizes, **extra}, tensors, metadata, bag)


def _home(folder: str) -> str:
    """The folder, where the file in it has been named."""
    return folder.rpartition("/")[0] if folder.rpartition("/")[2] == "ae.pt" else folder


def _metadata(trainer: Settings, config: Settings) -> dict[str, Any]:
    layer = trainer.get("layer", int, nullable=True)
    model = trainer.get("lm_name", str, nullable=True)
    submodule = trainer.get("submodule_name", str, nullable=True)
    # how activations were collected: a record of the run, of which the context size concerns the user
    buffer = Settings(config.get("buffer", dict, nullable=True) or {}, config.where)
    residual = layer is not None and (submodule is None or submodule.startswith("resid_post"))
    return {
        "model_name": model,
        "hook_name": f"blocks.{layer}.hook_resid_post" if residual else None,
        "context_size": buffer.get("ctx_len", int, nullable=True),
    }


def _convert(name: str, bag: TensorBag, k: int | None) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    if name in ("MatryoshkaBatchTopKSAE", "JumpReluAutoEncoder"):
        tensors = {
            "W_enc": bag.take("W_enc", "d_in d_sae"),
            "W_dec": bag.take("W_dec", "d_sae d_in"),
            "b_enc": bag.take("b_enc", "d_sae"),
            "b_dec": bag.take("b_dec", "d_in"),
        }
        if name == "JumpReluAutoEncoder":
            return "jumprelu", {"apply_b_dec_to_input": False}, tensors | {"threshold": bag.take("threshold", "d_sae")}
        bag.drop("the nesting matters to training; all groups are active afterwards", "group_sizes")
        return "jumprelu", {}, tensors | {"threshold": _shared_threshold(bag, k)}

    tensors = {
        "W_enc": bag.take("encoder.weight", "d_sae d_in").t(),
        "W_dec": bag.take("decoder.weight", "d_in d_sae").t(),
    }
    if name == "GatedAutoEncoder":
        gated = {
            "b_dec": bag.take("decoder_bias", "d_in"),
            "b_gate": bag.take("gate_bias", "d_sae"),
            "b_mag": bag.take("mag_bias", "d_sae"),
            "r_mag": bag.take("r_mag", "d_sae"),
        }
        return "gated", {}, tensors | gated
    tensors["b_enc"] = bag.take("encoder.bias", "d_sae")
    if name == "AutoEncoder":
        return "standard", {}, tensors | {"b_dec": bag.take("bias", "d_in")}
    if name == "AutoEncoderNew":
        return "standard", {"apply_b_dec_to_input": False}, tensors | {"b_dec": bag.take("decoder.bias", "d_in")}
    tensors["b_dec"] = bag.take("b_dec", "d_in")
    if name == "BatchTopKSAE":
        return "jumprelu", {}, tensors | {"threshold": _shared_threshold(bag, k)}
    bag.drop("AutoEncoderTopK estimates a threshold but encodes by top-k", "threshold")
    return "topk", {"k": _agreed_k(bag, k), "rescale_acts_by_decoder_norm": False}, tensors


def _agreed_k(bag: TensorBag, k: int | None) -> int:
    """The k of the weights file (older files have none) and of the config; they must agree."""
    stored = bag.number("k") if bag.has("k") else None
    if stored is not None and k is not None and int(stored) != k:
        raise FormatError(f"{bag.where}: k is {int(stored)} here, but {k} in config.json")
    if stored is None and k is None:
        raise FormatError(f"{bag.where}: neither it nor config.json says k; load with the fact k")
    return k if k is not None else int(stored or 0)


def _shared_threshold(bag: TensorBag, k: int | None) -> Tensor:
    import torch

    _agreed_k(bag, k)
    value = bag.number("threshold")
    count = bag.sizes["d_sae"] if bag.rows is None else len(bag.rows)
    return torch.full((count,), max(value, 0.0)) if value is not None else torch.empty(count, device="meta")
