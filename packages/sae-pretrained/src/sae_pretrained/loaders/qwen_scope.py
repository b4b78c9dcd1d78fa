"""Files of Qwen-Scope: ``layer{n}.sae.pt``, one a layer; k is in ``config.json`` beside them or in the repository's name.

The six facts:

- Weights: ``W_enc`` (d_sae, d_in) and ``W_dec`` (d_in, d_sae) are both transposed.
- b_dec before encoding: not subtracted.
- ReLU and TopK: the k largest, and of them the positive ones.
- Threshold: none.
- Input normalisation: none.
- Decoder norm: whatever the file has.

k comes from ``config.json`` (``k``, ``top_k`` or ``topk``), from ``...-W32K-L0_50`` in the source's name, or from the fact
``k``. Two of them that contradict each other are refused, and so is a file without any.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, final

from sae_core.errors import FormatError
from sae_core.protocols import FileSource, LoadedSAE

from sae_pretrained.loaders.common import (
    Facts,
    Settings,
    assemble,
    exists,
    join,
    place,
    read_json,
    torch_bag,
    torch_mapping,
)

__all__ = ["QwenScopeLoader"]

_FILE = re.compile(r"(?:^|/)layer(\d+)\.sae\.pt$")
_REPOSITORY = re.compile(r"SAE-Res-(?P<model>.+)-W(?P<width>\d+)K-L0_(?P<k>\d+)")


@final
class QwenScopeLoader:
    """Reads Qwen-Scope's residual-stream SAEs."""

    def matches(self, source: FileSource, folder: str = "") -> bool:
        """A file called layer{n}.sae.pt."""
        return _FILE.search(folder) is not None and source.exists(folder)

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
        facts = Facts(overrides, "qwen_scope", ["k"])
        where = place(source, folder)
        named = _REPOSITORY.search(where)
        k = _k(source, folder, where, named, facts)
        bag = torch_bag(torch_mapping(source, folder), where, rows=rows, weights=weights)
        tensors = {
            "W_enc": bag.take("W_enc", "d_sae d_in").t(),
            "b_enc": bag.take("b_enc", "d_sae"),
            "W_dec": bag.take("W_dec", "d_in d_sae").t(),
            "b_dec": bag.take("b_dec", "d_in"),
        }
        if named and bag.sizes["d_sae"] != 1024 * int(named["width"]):
            raise FormatError(
                f"{where}: {bag.sizes['d_sae']} latents, but the repository's name says {named['width']}K"
            )
        config = {
            "d_in": bag.sizes["d_in"],
            "d_sae": bag.sizes["d_sae"],
            "k": k,
            "apply_b_dec_to_input": False,
            "rescale_acts_by_decoder_norm": False,
        }
        layer = _FILE.search(folder)
        found = {
            "model_name": f"Qwen/{named['model']}" if named else None,
            "hook_name": f"blocks.{layer[1]}.hook_resid_post" if layer else None,
            "hf_hook_name": f"model.layers.{layer[1]}" if layer else None,
        }
        return assemble("topk", config, tensors, facts.metadata(found), bag)


def _k(source: FileSource, folder: str, where: str, named: re.Match[str] | None, facts: Facts) -> int:
    """The number of latents kept, from wherever it is said; all who say it must agree."""
    said: dict[str, int] = {}
    home = folder.rpartition("/")[0]
    if exists(source, home, "config.json"):
        record = Settings(read_json(source, join(home, "config.json")), place(source, home, "config.json"))
        said |= {f"config.json ({key})": record.integer(key) for key in ("k", "top_k", "topk") if key in record}
    if named:
        said["the repository's name"] = int(named["k"])
    if (given := facts.get("k", int)) is not None:
        said["the fact k"] = given
    if not said:
        raise FormatError(
            f"{where}: k stands neither in a config.json beside the file nor in the repository's name (…-L0_50); load with the "
            "fact k"
        )
    if len(set(said.values())) > 1:
        raise FormatError(f"{where}: k is " + ", but ".join(f"{value} in {who}" for who, value in said.items()))
    return next(iter(said.values()))
