"""dictionary_learning's format: of its classes, the one that computes the same."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from sae_core.format.express import centred, core_architecture, plain_input, whole_k, write_json

if TYPE_CHECKING:
    from sae_core import SAE
    from sae_core.sae import Export
    from torch import Tensor

__all__ = ["DictionaryLearningWriter"]


@final
class DictionaryLearningWriter:
    """``ae.pt`` and ``config.json``."""

    def write(self, sae: SAE, exported: Export, folder: Path) -> Sequence[str]:
        """``ae.pt`` and ``config.json``, of the class that computes the same."""
        import torch

        architecture = core_architecture(exported, "dictionary_learning", ("standard", "gated", "topk", "jumprelu"))
        notes = plain_input(exported, "dictionary_learning")
        k: int | None = None
        if architecture == "standard":
            unit = torch.allclose(
                exported.tensors["W_dec"].norm(dim=1), torch.ones(1, dtype=exported.tensors["W_dec"].dtype)
            )
            if exported.config.apply_b_dec_to_input and unit:
                name, t = "AutoEncoder", _linear(centred(exported, True))
                state = {"bias": t.pop("b_dec"), **t}
            else:  # AutoEncoder's own loader would rescale the latents to unit decoder norm, AutoEncoderNew's does not
                name, t = "AutoEncoderNew", _linear(centred(exported, False))
                state = {"decoder.bias": t.pop("b_dec"), **t}
        elif architecture == "gated":
            name, t = "GatedAutoEncoder", centred(exported, True)
            state = {
                "encoder.weight": t["W_enc"].t(),
                "decoder.weight": t["W_dec"].t(),
                "decoder_bias": t["b_dec"],
                "gate_bias": t["b_gate"],
                "mag_bias": t["b_mag"],
                "r_mag": t["r_mag"],
            }
        elif architecture == "topk":
            name, t = "AutoEncoderTopK", _linear(centred(exported, True))
            k = whole_k(exported)
            # the threshold that its training estimates on the side; -1 is its value for "not estimated"
            state = {**t, "k": torch.tensor(k, dtype=torch.int), "threshold": torch.tensor(-1.0)}
        else:
            name, state = "JumpReluAutoEncoder", centred(exported, False)
        trainer: dict[str, Any] = {"dict_class": name, "activation_dim": sae.d_in, "dict_size": sae.d_sae}
        trainer |= {} if k is None else {"k": k}
        trainer["lm_name"] = sae.metadata.get("model_name")
        if found := re.fullmatch(r"blocks\.(\d+)\.hook_resid_post", str(sae.metadata.get("hook_name"))):
            trainer |= {"layer": int(found[1]), "submodule_name": f"resid_post_layer_{found[1]}"}
        context = sae.metadata.get("context_size")
        torch.save({key: value.contiguous() for key, value in state.items()}, folder / "ae.pt")
        write_json(folder / "config.json", {"trainer": trainer} | ({"buffer": {"ctx_len": context}} if context else {}))
        return notes


def _linear(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names and layout of two linear layers; b_dec keeps its name."""
    return {
        "encoder.weight": tensors["W_enc"].t(),
        "encoder.bias": tensors["b_enc"],
        "decoder.weight": tensors["W_dec"].t(),
        "b_dec": tensors["b_dec"],
    }
