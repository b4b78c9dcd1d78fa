"""Files of qresearch's SAEs of the DeepSeek-R1 distillations: one ``.pt`` with two linear layers.

The six facts:

- Weights: ``encoder.weight`` (d_sae, d_in) and ``decoder.weight`` (d_in, d_sae) are both transposed.
- b_dec before encoding: not subtracted.
- ReLU and TopK: plain ReLU.
- Threshold: none.
- Input normalisation: none.
- Decoder norm: whatever the file has.

Anybody's file may hold two layers of these names, encoded in any way. So a file is recognised by its published name,
``DeepSeek-R1-Distill-…-SAE-l19.pt``, and another one only loads where the caller names this format.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, final

from sae_core.errors import FormatError
from sae_core.protocols import FileSource, LoadedSAE

from sae_pretrained.loaders.common import Facts, assemble, place, torch_bag, torch_mapping

__all__ = ["DeepSeekR1Loader"]

_KEYS = {"encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias"}
_PUBLISHED = re.compile(r"(?:^|/)(?P<model>DeepSeek-R1-Distill-[\w.-]+)-SAE-l(?P<layer>\d+)\.pt$")


@final
class DeepSeekR1Loader:
    """Reads qresearch's SAEs."""

    def matches(self, source: FileSource, folder: str = "") -> bool:
        """A .pt file of a published name that holds exactly an encoder and a decoder with biases."""
        return _PUBLISHED.search(folder) is not None and self._holds_two_layers(source, folder)

    def hint(self, source: FileSource, folder: str = "") -> str | None:
        """For a file of another name with the same tensors."""
        if not folder.endswith(".pt") or not self._holds_two_layers(source, folder):
            return None
        return (
            "format='deepseek_r1' for ReLU without subtracting the decoder's bias, or format='dictionary_learning_1' and the "
            "fact dict_class"
        )

    def _holds_two_layers(self, source: FileSource, folder: str) -> bool:
        try:
            return source.exists(folder) and set(torch_mapping(source, folder)) == _KEYS
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
        facts = Facts(overrides, "deepseek_r1")
        where = place(source, folder)
        bag = torch_bag(torch_mapping(source, folder), where, rows=rows, weights=weights)
        tensors = {
            "W_enc": bag.take("encoder.weight", "d_sae d_in").t(),
            "b_enc": bag.take("encoder.bias", "d_sae"),
            "W_dec": bag.take("decoder.weight", "d_in d_sae").t(),
            "b_dec": bag.take("decoder.bias", "d_in"),
        }
        config = {"d_in": bag.sizes["d_in"], "d_sae": bag.sizes["d_sae"], "apply_b_dec_to_input": False}
        published = _PUBLISHED.search(folder)
        found: dict[str, Any] = {}
        if published:
            found = {
                "hook_name": f"blocks.{published['layer']}.hook_resid_post",
                "hf_hook_name": f"model.layers.{published['layer']}",
                "model_name": f"deepseek-ai/{published['model']}",
                "dataset_path": "lmsys/lmsys-chat-1m",
                "context_size": 1024,
            }
        return assemble("standard", config, tensors, facts.metadata(found), bag)
