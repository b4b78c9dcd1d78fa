"""The {{ name }} format: `{{ name }}.json` with the widths, `{{ name }}.safetensors` with four tensors. Make it yours.

A loader says what the files mean in sae-core's terms: an architecture, fields of its config, tensors under its names and in its
layout. It downloads nothing, guesses nothing, and reads all that is there: a tensor that it does not know is an error.
"""

# D width, F latents

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, final

import torch
from sae_core.errors import ConfigError, FormatError
from sae_core.format.files import join, read_json, read_safetensors
from sae_core.protocols import FileSource, LoadedSAE
from torch import Tensor

CONFIG, WEIGHTS = "{{ name }}.json", "{{ name }}.safetensors"
TENSORS = {"encoder": "W_enc", "encoder_bias": "b_enc", "decoder": "W_dec", "decoder_bias": "b_dec"}
"""Names in the files, and in sae-core."""


def write_example(folder: Path) -> Path:
    """Small files of the format, for the checks."""
    from safetensors.torch import save_file

    drawn = torch.Generator().manual_seed(0)
    shapes = {"encoder": (24, 8), "encoder_bias": (24,), "decoder": (24, 8), "decoder_bias": (8,)}
    save_file({name: torch.randn(*shape, generator=drawn) for name, shape in shapes.items()}, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps({"format": "{{ name }}", "width": 8, "latents": 24}), encoding="utf-8")
    return folder


@final
class {{ class_name }}:
    """One sentence that `sae-core show {{ name }}` prints."""

    example: ClassVar[Mapping[str, Any]] = {"path": write_example}

    def matches(self, source: FileSource, folder: str = "") -> bool:
        """Whether the files are there and the config says that it is one of this format."""
        return source.exists(join(folder, CONFIG)) and read_json(source, join(folder, CONFIG)).get("format") == "{{ name }}"

    def load(
        self,
        source: FileSource,
        folder: str = "",
        *,
        weights: bool = True,
        overrides: Mapping[str, Any] | None = None,
        rows: Sequence[int] | None = None,
    ) -> LoadedSAE:
        """A ReLU dictionary. Raises FormatError that names file and key."""
        if overrides:
            raise ConfigError(f"{{ name }}: the files say everything; overrides {sorted(overrides)} mean nothing here")
        where = f"{source.location}/{join(folder, CONFIG)}"
        said = read_json(source, join(folder, CONFIG))
        if set(said) != {"format", "width", "latents"}:
            raise FormatError(f"{where}: expected format, width and latents, found {', '.join(sorted(said))}")
        config = {"d_in": said["width"], "d_sae": said["latents"] if rows is None else len(rows)}
        if not weights:
            return LoadedSAE("standard", config)
        path = source.path(join(folder, WEIGHTS))
        tensors = read_safetensors(path)
        if unknown := sorted(set(tensors) ^ set(TENSORS)):
            raise FormatError(f"{path}: tensor {unknown[0]!r} is missing or not known; expected {', '.join(TENSORS)}")
        return LoadedSAE("standard", config, {TENSORS[name]: _ours(name, tensors[name], rows) for name in TENSORS})


def _ours(name: str, tensor: Tensor, rows: Sequence[int] | None) -> Tensor:
    """A tensor in sae-core's layout: W_enc is (d_in, d_sae); of the rows asked for alone, where it has one entry a latent."""
    if rows is not None and name != "decoder_bias":
        tensor = tensor[list(rows)]
    return tensor.t() if name == "encoder" else tensor
