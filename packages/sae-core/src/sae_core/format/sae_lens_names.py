"""What SAELens calls an architecture of its own and we call a field: its transcoders, both ways.

SAELens has one class for each activation function and skip path. Here a transcoder is any architecture of the linear frame
with `d_out`, so its names exist in its files alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["from_sae_lens", "of_its_provider", "said_here", "to_sae_lens"]

_D_OUT = 768  # SAELens's own default
_THEIRS: dict[str, tuple[str, dict[str, Any]]] = {
    "transcoder": ("standard", {"skip": False}),
    "skip_transcoder": ("standard", {"skip": True}),
    "jumprelu_transcoder": ("jumprelu", {"skip": False}),
    "jumprelu_skip_transcoder": ("jumprelu", {"skip": True}),
}


def from_sae_lens(architecture: str, cfg: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Architecture and config in our terms, with SAELens's defaults for what only its transcoders have.

    >>> from_sae_lens("skip_transcoder", {"d_in": 8, "d_sae": 32, "d_out": 4})
    ('standard', {'d_out': 4, 'apply_b_dec_to_input': False, 'd_in': 8, 'd_sae': 32, 'skip': True})
    """
    if architecture not in _THEIRS:
        return architecture, dict(cfg)
    name, fields = _THEIRS[architecture]
    return name, {"d_out": _D_OUT, "apply_b_dec_to_input": False, **cfg, **fields}


def to_sae_lens(architecture: str, cfg: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Architecture and config of a file in SAELens's terms, where it has any for it.

    >>> to_sae_lens("jumprelu", {"d_in": 8, "d_out": 4, "skip": True})
    ('jumprelu_skip_transcoder', {'d_in': 8, 'd_out': 4})
    """
    if cfg.get("d_out") is not None:
        for theirs, (name, fields) in _THEIRS.items():
            if (name, fields["skip"]) == (architecture, bool(cfg.get("skip"))):
                return theirs, {key: value for key, value in cfg.items() if key != "skip"}
    return architecture, dict(cfg)


def of_its_provider(architecture: str, provider: str) -> str:
    """The name with the distribution that wrote a file, so that another plugin's claim on the bare name means nothing.

    What a notebook registered may have become a package since; but it is never what sae-core calls by that name.

    >>> of_its_provider("topk", "sae-core"), of_its_provider("topk", "sae-rival")
    ('topk', 'sae-rival:topk')
    """
    from sae_core.plugins import get_registry

    if provider in ("", "sae-core"):
        return architecture
    if provider == "local":
        claims = [c for c in get_registry().contributions("architecture") if c.spec.name == architecture]
        if claims and all(claim.distribution not in ("local", "sae-core") for claim in claims):
            return architecture
    return f"{provider}:{architecture}"


def said_here(architecture: str) -> str:
    """For somebody who asks for one of SAELens's names: what to write instead; empty for any other name.

    >>> said_here("jumprelu_skip_transcoder")
    ". That is SAELens's name; write architecture 'jumprelu' with d_out=..., skip=True"
    """
    if architecture not in _THEIRS:
        return ""
    name, fields = _THEIRS[architecture]
    return (
        f". That is SAELens's name; write architecture {name!r} with d_out=...{', skip=True' if fields['skip'] else ''}"
    )
