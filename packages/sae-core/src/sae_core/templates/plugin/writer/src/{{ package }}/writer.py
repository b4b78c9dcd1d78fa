"""The {{ name }} format, to convert to. As rendered: `{{ name }}.json` with the widths, `{{ name }}.npz` with four arrays.

A writer says what its format cannot express and approximates nothing. What it is given is the inference form, in which
normalisations and decoder norms are folded into the weights already.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import final

import torch
from sae_core.errors import FormatError
from sae_core.sae import SAE, Export

ARRAYS = ("W_enc", "b_enc", "W_dec", "b_dec")


@final
class {{ class_name }}:
    """One sentence that `sae-core show {{ name }}` prints."""

    def write(self, sae: SAE, exported: Export, folder: Path) -> Sequence[str]:
        """Fill the empty folder; returns what is left out, a sentence each. Raises FormatError."""
        import numpy as np

        if exported.architecture != "sae-core:standard":
            raise FormatError(f"{{ name }} holds ReLU dictionaries (sae-core:standard), not {exported.architecture}")
        if set(exported.tensors) != set(ARRAYS) or exported.config.normalize_activations != "none":
            raise FormatError("{{ name }} has no place for a skip path, nor for a normalisation that differs from row to row")
        widths = {"width": exported.config.d_in, "latents": exported.config.d_sae}
        more = {"outputs": sae.d_out, "centred": bool(exported.config.apply_b_dec_to_input)}
        (folder / "{{ name }}.json").write_text(json.dumps({**widths, **more}), encoding="utf-8")
        arrays = {name: exported.tensors[name].to(torch.float32).cpu().numpy() for name in ARRAYS}
        np.savez(folder / "{{ name }}.npz", **arrays)
        return ["facts about the model and training are left out"]
