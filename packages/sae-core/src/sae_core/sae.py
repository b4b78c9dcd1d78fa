"""`SAE`: a dictionary with its files: save, load, load what others have published.

What it computes is in `sae_core.dictionary`, how it is read and written in `sae_core.format` and `sae_core.pretrained`; those
know dictionaries only, and this class is where both meet. Every architecture derives from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch

from sae_core.config import require, structure
from sae_core.dictionary import (
    Axis,
    ConfigT_co,
    Dictionary,
    Export,
    Prepared,
    SAEConfig,
    StepContext,
    StepOutput,
    as_device,
    as_dtype,
    caller_initialises,
    training_option,
)
from sae_core.errors import ConfigError, FormatError, UnknownNameError
from sae_core.format.sae_lens_names import said_here
from sae_core.plugins import get_registry

__all__ = [
    "SAE",
    "Axis",
    "Export",
    "Prepared",
    "SAEConfig",
    "StepContext",
    "StepOutput",
    "as_device",
    "as_dtype",
    "create",
    "load_named",
    "training_option",
]


class SAE(Dictionary[ConfigT_co]):
    """A dictionary that can be saved and loaded; the base of all architectures.

    See `Dictionary` for what it computes and for what a class says of itself.
    """

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write the inference form as a folder that other tools can read: cfg.json and sae_weights.safetensors.

        The folder appears complete or not at all. An SAE of this format that is there already is replaced in one step, and
        other files in the folder stay; an SAE of another format, or somebody's cfg.json, is refused with FormatError unless
        `overwrite`. What training needs and the inference form cannot hold (that of BatchTopK is JumpReLU) goes into one more
        file, training_form.safetensors, for ``SAE.load(path, form="training")``. Returns the path.
        """
        from sae_core.format.write import save_sae

        return save_sae(self, Path(path), overwrite=overwrite)

    @staticmethod
    def load(
        path: str | Path,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | str | None = None,
        format: str | None = None,
        overrides: Mapping[str, Any] | None = None,
        rows: Sequence[int] | None = None,
        mmap: bool | None = None,
        form: Literal["inference", "training"] = "inference",
    ) -> SAE:
        """Load an SAE from a local folder or file in any format that an installed plugin reads.

        `dtype` None keeps the file's. `format` names the loader instead of recognising it by the files. `overrides` are
        facts that the files lack, under names that the format's loader knows. `rows` are the latents to load, None for all;
        ConfigError for architectures in which latents compete, since some of them alone would have other values. `mmap` True
        maps the file into memory, so that nothing is read before it is used: the file must then stay as it is. False copies
        it; None maps files of more than 64 MB. `form` "training" gives the SAE as it was in training, in train mode: from the
        file beside the inference form that `save` writes where the latter cannot hold it. Raises
        FormatError that names file and key when anything is missing, left over, of the wrong shape, or not finite.
        """
        from sae_core.format.read import load_sae

        if form == "training":
            from sae_core.format.training_form import load_training_form

            claimed = dict(overrides or {})
            architecture = claimed.pop("architecture", None)
            if format is not None or claimed or rows is not None:
                raise ConfigError(
                    "form='training' is of SAEs that sae.save wrote: it takes neither format nor rows, and of overrides only "
                    "architecture"
                )
            return cast("SAE", load_training_form(Path(path), device=device, dtype=dtype, architecture=architecture))
        if form != "inference":  # pyright: ignore[reportUnnecessaryComparison] - what callers give is not checked
            raise ConfigError(f"form must be 'inference' or 'training', not {form!r}")
        found = load_sae(
            Path(path), device=device, dtype=dtype, format=format, overrides=overrides, rows=rows, mmap=mmap
        )
        return cast("SAE", found)

    @staticmethod
    def from_pretrained(
        release: str,
        sae_id: str,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | str | None = None,
        revision: str | None = None,
        overrides: Mapping[str, Any] | None = None,
        rows: Sequence[int] | None = None,
        mmap: bool | None = None,
    ) -> SAE:
        """Load a published SAE by release and id, from any installed catalogue, or by repository and folder.

        The other arguments are those of `load`; `overrides` go over the facts that the catalogue knows.
        """
        from sae_core.pretrained import load_pretrained

        found = load_pretrained(
            release, sae_id, device=device, dtype=dtype, revision=revision, overrides=overrides, rows=rows, mmap=mmap
        )
        return cast("SAE", found)


def load_named(name: str, *, device: str | torch.device = "cpu") -> SAE:
    """An SAE as a command line names it: a folder or file, or RELEASE:ID of a published one. Raises FormatError for neither."""
    if Path(name).exists():
        return SAE.load(name, device=device)
    release, colon, sae_id = name.partition(":")
    if not colon:
        raise FormatError(f"{name}: there is no such folder or file, and it is not RELEASE:ID of a published SAE")
    return SAE.from_pretrained(release, sae_id, device=device)


def create(
    architecture: str,
    *,
    seed: int = 0,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str = torch.float32,
    **config: Any,
) -> SAE:
    """A new SAE of any registered architecture, initialised from `seed`.

    `config` holds the architecture's fields; unknown ones raise ConfigError with the known ones listed, as do widths for
    which there is not the memory.

    >>> sae = create("topk", d_in=8, d_sae=32, k=4, seed=0)
    >>> sae.encode_sparse(torch.ones(3, 8)).shape
    (3, 32)
    """
    require(isinstance(architecture, str), f"architecture must be a name, as 'topk', not {architecture!r}")  # pyright: ignore[reportUnnecessaryIsInstance] - what callers give is not checked
    drawn = _generator(seed)
    try:
        sae_class = cast("type[SAE]", get_registry().usable("architecture", architecture))
    except UnknownNameError as error:
        raise UnknownNameError(f"{error}{said_here(architecture)}") from None
    place = as_device(device)
    fields = structure(config, sae_class.config_class, where=f"architecture {architecture!r}")
    try:
        with caller_initialises():
            sae = sae_class(fields)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            f"architecture {architecture!r}: d_in = {fields.d_in} and d_sae = {fields.d_sae} cannot be: {reason}"
        ) from None
    sae.to(as_dtype(dtype))
    sae.reset_parameters(drawn)
    return sae.to(place)


def _generator(seed: int) -> torch.Generator:
    try:
        return torch.Generator().manual_seed(seed)
    except (RuntimeError, TypeError, ValueError):
        raise ConfigError(f"seed must be a whole number of 64 bits, not {seed!r}") from None
