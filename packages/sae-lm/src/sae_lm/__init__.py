"""Language models as activation sources for sae-core, and evaluation inside them.

Importing this package costs next to nothing: every public name is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sae_lm.baseline import RandomDictionary
    from sae_lm.cached import CachedActivations, CachedActivationsConfig
    from sae_lm.caching import write_cache
    from sae_lm.check import CheckError, CheckReport, check
    from sae_lm.evaluate import evaluate, evaluate_activations, evaluate_candidates, evaluate_sae, evaluate_saes
    from sae_lm.hooks import HookPoint, capture, edited, replaced
    from sae_lm.latents import Edit, ablate, clamp, keep_only, scale, steer
    from sae_lm.pretokenized import pretokenize
    from sae_lm.results import Evaluation
    from sae_lm.source import HuggingFaceSource, HuggingFaceSourceConfig
    from sae_lm.splicing import Attached, Splice, attach, spliced
    from sae_lm.text import TextConfig, documents
    from sae_lm.tokens import TokenPolicy, WindowStream, preview, resolve

__version__ = "0.1.0"

__all__ = [
    "Attached",
    "CachedActivations",
    "CachedActivationsConfig",
    "CheckError",
    "CheckReport",
    "Edit",
    "Evaluation",
    "HookPoint",
    "HuggingFaceSource",
    "HuggingFaceSourceConfig",
    "RandomDictionary",
    "Splice",
    "TextConfig",
    "TokenPolicy",
    "WindowStream",
    "__version__",
    "ablate",
    "attach",
    "capture",
    "check",
    "clamp",
    "documents",
    "edited",
    "evaluate",
    "evaluate_activations",
    "evaluate_candidates",
    "evaluate_sae",
    "evaluate_saes",
    "keep_only",
    "pretokenize",
    "preview",
    "replaced",
    "resolve",
    "scale",
    "spliced",
    "steer",
    "write_cache",
]

_HOMES = {
    "Attached": "sae_lm.splicing",
    "CachedActivations": "sae_lm.cached",
    "CachedActivationsConfig": "sae_lm.cached",
    "CheckError": "sae_lm.check",
    "CheckReport": "sae_lm.check",
    "Edit": "sae_lm.latents",
    "Evaluation": "sae_lm.results",
    "HookPoint": "sae_lm.hooks",
    "HuggingFaceSource": "sae_lm.source",
    "HuggingFaceSourceConfig": "sae_lm.source",
    "RandomDictionary": "sae_lm.baseline",
    "Splice": "sae_lm.splicing",
    "TextConfig": "sae_lm.text",
    "TokenPolicy": "sae_lm.tokens",
    "WindowStream": "sae_lm.tokens",
    "ablate": "sae_lm.latents",
    "attach": "sae_lm.splicing",
    "capture": "sae_lm.hooks",
    "check": "sae_lm.check",
    "clamp": "sae_lm.latents",
    "documents": "sae_lm.text",
    "edited": "sae_lm.hooks",
    "evaluate": "sae_lm.evaluate",
    "evaluate_activations": "sae_lm.evaluate",
    "evaluate_candidates": "sae_lm.evaluate",
    "evaluate_sae": "sae_lm.evaluate",
    "evaluate_saes": "sae_lm.evaluate",
    "keep_only": "sae_lm.latents",
    "pretokenize": "sae_lm.pretokenized",
    "preview": "sae_lm.tokens",
    "replaced": "sae_lm.hooks",
    "resolve": "sae_lm.tokens",
    "scale": "sae_lm.latents",
    "spliced": "sae_lm.splicing",
    "steer": "sae_lm.latents",
    "write_cache": "sae_lm.caching",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sae_lm' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
