"""The format of EleutherAI's sparsify: a SparseCoder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, final

from sae_core.errors import FormatError
from sae_core.format.express import centred, core_architecture, plain_input, whole_k, write_json

if TYPE_CHECKING:
    from sae_core import SAE
    from sae_core.sae import Export

__all__ = ["SparsifyWriter"]


@final
class SparsifyWriter:
    """``sae.safetensors`` and ``cfg.json``."""

    def write(self, sae: SAE, exported: Export, folder: Path) -> Sequence[str]:
        """``sae.safetensors`` and ``cfg.json`` of a SparseCoder."""
        from safetensors.torch import save_file

        activation = core_architecture(exported, "sparsify", ("topk", "groupmax"), ("topk", "groupmax"))
        notes = plain_input(exported, "sparsify")
        transcodes, skips = not sae.reconstructs_input, "W_skip" in exported.tensors
        if transcodes and sae.d_out != sae.d_in:
            raise FormatError(f"sparsify cannot express a transcoder from width {sae.d_in} to another, {sae.d_out}")
        t = exported.tensors if transcodes else centred(exported, True)
        state = {"encoder.weight": t["W_enc"].t(), "encoder.bias": t["b_enc"], "W_dec": t["W_dec"], "b_dec": t["b_dec"]}
        if skips:
            state["W_skip"] = t["W_skip"]
        config = {
            "activation": activation,
            "expansion_factor": max(1, sae.d_sae // sae.d_in),
            "normalize_decoder": bool(((t["W_dec"].float().norm(dim=1) - 1).abs() < 1e-3).all()),
            "num_latents": sae.d_sae,
            "k": whole_k(exported),
            "multi_topk": False,
            "skip_connection": skips,
            "transcode": transcodes,
            "d_in": sae.d_in,
        }
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "sae.safetensors")
        write_json(folder / "cfg.json", config)
        return [
            *notes,
            "the format has no place for base model and hook point; sparsify names the folder after the module",
        ]
