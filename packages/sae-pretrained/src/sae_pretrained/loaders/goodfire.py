"""Files that Goodfire published: one ``.pt`` or ``.pth`` with two linear layers.

The six facts:

- Weights: ``encoder_linear.weight`` (d_sae, d_in) and ``decoder_linear.weight`` (d_in, d_sae) are both transposed.
- b_dec before encoding: not subtracted.
- ReLU and TopK: plain ReLU.
- Threshold: none.
- Input normalisation: none.
- Decoder norm: whatever the file has.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, final

from sae_core.errors import FormatError
from sae_core.protocols import FileSource, LoadedSAE

from sae_pretrained.loaders.common import Facts, assemble, place, torch_bag, torch_mapping

__all__ = ["GoodfireLoader"]

_PUBLISHED = re.compile(r"(?:^|/)(?P<model>[Ll]lama-3\.[\w.-]+)-SAE-l(?P<layer>\d+)\.pth?$")
_KEYS = {"encoder_linear.weight", "encoder_linear.bias", "decoder_linear.weight", "decoder_linear.bias"}


@final
class GoodfireLoader:
    """Reads Goodfire's Llama SAEs."""

    def matches(self, source: FileSource, folder: str = "") -> bool:
        """A .pt or .pth file with encoder_linear and decoder_linear."""
        if not folder.endswith((".pt", ".pth")) or not source.exists(folder):
            return False
        try:
            return set(torch_mapping(source, folder)) >= _KEYS
        except FormatError:
            return False

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
        facts = Facts(overrides, "goodfire")
        where = place(source, folder)
        bag = torch_bag(torch_mapping(source, folder), where, rows=rows, weights=weights)
        tensors = {
            "W_enc": bag.take("encoder_linear.weight", "d_sae d_in").t(),
            "b_enc": bag.take("encoder_linear.bias", "d_sae"),
            "W_dec": bag.take("decoder_linear.weight", "d_in d_sae").t(),
            "b_dec": bag.take("decoder_linear.bias", "d_in"),
        }
        config = {"d_in": bag.sizes["d_in"], "d_sae": bag.sizes["d_sae"], "apply_b_dec_to_input": False}
        published = _PUBLISHED.search(folder)
        found: dict[str, Any] = {}
        if published:
            found = {
                "hook_name": f"blocks.{published['layer']}.hook_resid_post",
                "hf_hook_name": f"model.layers.{published['layer']}",
                "model_name": f"meta-llama/{published['model']}",
                "dataset_path": "lmsys/lmsys-chat-1m",
            }
        return assemble("standard", config, tensors, facts.metadata(found), bag)
