"""SAELens's format, which is our own, without what SAELens has no name for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, final

from sae_core.errors import FormatError
from sae_core.format.exports import exported as checked_export
from sae_core.format.exports import qualified
from sae_core.format.express import core_architecture
from sae_core.format.write import save_sae

if TYPE_CHECKING:
    from sae_core.dictionary import Dictionary, Export

__all__ = ["SaeLensWriter", "sae_lens_reads"]

_KNOWN = ("standard", "gated", "topk", "abstopk", "jumprelu", "matching_pursuit", "temporal")
_TRANSCODERS = ("standard", "jumprelu")
_NEWEST = {"abstopk": "6.54"}


@final
class SaeLensWriter:
    """``cfg.json`` and ``sae_weights.safetensors``."""

    def write(self, sae: Dictionary, exported: Export, folder: Path) -> Sequence[str]:
        """What ``sae.save`` writes; FormatError where SAELens could not read it, or would compute something else."""
        name = _checked(sae, exported)
        save_sae(sae, folder)
        return [f"reading it needs SAELens {_NEWEST[name]}"] if name in _NEWEST else []


def sae_lens_reads(sae: Dictionary) -> bool:
    """Whether SAELens reads what is saved of `sae`, and computes the same."""
    try:
        _checked(sae, qualified(checked_export(sae), sae))
    except FormatError:
        return False
    return True


def _checked(sae: Dictionary, exported: Export) -> str:
    """The architecture's name; FormatError for what SAELens cannot express."""
    name = core_architecture(exported, "sae_lens", _KNOWN, _TRANSCODERS)
    if exported.config.normalize_activations == "constant_scalar_rescale":
        raise FormatError(
            f"sae_lens cannot express an input scaled by {exported.config.activation_normalization_factor:g}, which "
            f"architecture {name!r} does not fold into its weights"
        )
    if not sae.reconstructs_input and exported.config.normalize_activations != "none":
        raise FormatError(
            f"sae_lens cannot express a transcoder with normalize_activations: {exported.config.normalize_activations}: "
            "SAELens would undo it on the outputs"
        )
    return name
