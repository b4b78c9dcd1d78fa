"""Language models as activation sources for sae-core, and evaluation inside them.

Importing this package costs next to nothing: every public name is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sae_lm.attribution import Attribution, attribute, integrated_gradients
    from sae_lm.baseline import RandomDictionary
    from sae_lm.cached import CachedActivations, CachedActivationsConfig
    from sae_lm.caching import write_cache
    from sae_lm.checking import CheckError, CheckReport, check
    from sae_lm.evaluation import evaluate, evaluate_activations, evaluate_candidates, evaluate_sae, evaluate_saes
    from sae_lm.hooks import HookPoint, capture, edited, replaced
    from sae_lm.latents import Edit, ablate, clamp, keep_only, scale, steer
    from sae_lm.lens import DirectAttribution, Lens, LogitLens, direct_logit_attribution, directions, logit_lens
    from sae_lm.pretokenized import pretokenize
    from sae_lm.results import Evaluation
    from sae_lm.source import HuggingFaceSource, HuggingFaceSourceConfig
    from sae_lm.splicing import Attached, Splice, attach, spliced
    from sae_lm.studies import StudyConfig, StudyFolder, study
    from sae_lm.text import TextConfig, documents
    from sae_lm.token_sets import enrichment, enrichment_of_latents, matching_tokens, tokens_by_first_letter
    from sae_lm.tokens import TokenPolicy, WindowStream, preview, resolve

__version__ = "0.1.0"

__all__ = [
    "Attached",
    "Attribution",
    "CachedActivations",
    "CachedActivationsConfig",
    "CheckError",
    "CheckReport",
    "DirectAttribution",
    "Edit",
    "Evaluation",
    "HookPoint",
    "HuggingFaceSource",
    "HuggingFaceSourceConfig",
    "Lens",
    "LogitLens",
    "RandomDictionary",
    "Splice",
    "StudyConfig",
    "StudyFolder",
    "TextConfig",
    "TokenPolicy",
    "WindowStream",
    "__version__",
    "ablate",
    "attach",
    "attribute",
    "capture",
    "check",
    "clamp",
    "direct_logit_attribution",
    "directions",
    "documents",
    "edited",
    "enrichment",
    "enrichment_of_latents",
    "evaluate",
    "evaluate_activations",
    "evaluate_candidates",
    "evaluate_sae",
    "evaluate_saes",
    "integrated_gradients",
    "keep_only",
    "logit_lens",
    "matching_tokens",
    "pretokenize",
    "preview",
    "replaced",
    "resolve",
    "scale",
    "spliced",
    "steer",
    "study",
    "tokens_by_first_letter",
    "write_cache",
]

_HOMES = {
    "Attached": "sae_lm.splicing",
    "Attribution": "sae_lm.attribution",
    "CachedActivations": "sae_lm.cached",
    "CachedActivationsConfig": "sae_lm.cached",
    "CheckError": "sae_lm.checking",
    "CheckReport": "sae_lm.checking",
    "DirectAttribution": "sae_lm.lens",
    "Edit": "sae_lm.latents",
    "Evaluation": "sae_lm.results",
    "HookPoint": "sae_lm.hooks",
    "HuggingFaceSource": "sae_lm.source",
    "HuggingFaceSourceConfig": "sae_lm.source",
    "Lens": "sae_lm.lens",
    "LogitLens": "sae_lm.lens",
    "RandomDictionary": "sae_lm.baseline",
    "Splice": "sae_lm.splicing",
    "StudyConfig": "sae_lm.studies",
    "StudyFolder": "sae_lm.studies",
    "TextConfig": "sae_lm.text",
    "TokenPolicy": "sae_lm.tokens",
    "WindowStream": "sae_lm.tokens",
    "ablate": "sae_lm.latents",
    "attach": "sae_lm.splicing",
    "attribute": "sae_lm.attribution",
    "capture": "sae_lm.hooks",
    "check": "sae_lm.checking",
    "clamp": "sae_lm.latents",
    "direct_logit_attribution": "sae_lm.lens",
    "directions": "sae_lm.lens",
    "documents": "sae_lm.text",
    "edited": "sae_lm.hooks",
    "enrichment": "sae_lm.token_sets",
    "enrichment_of_latents": "sae_lm.token_sets",
    "evaluate": "sae_lm.evaluation",
    "evaluate_activations": "sae_lm.evaluation",
    "evaluate_candidates": "sae_lm.evaluation",
    "evaluate_sae": "sae_lm.evaluation",
    "evaluate_saes": "sae_lm.evaluation",
    "integrated_gradients": "sae_lm.attribution",
    "keep_only": "sae_lm.latents",
    "logit_lens": "sae_lm.lens",
    "matching_tokens": "sae_lm.token_sets",
    "pretokenize": "sae_lm.pretokenized",
    "preview": "sae_lm.tokens",
    "replaced": "sae_lm.hooks",
    "resolve": "sae_lm.tokens",
    "scale": "sae_lm.latents",
    "spliced": "sae_lm.splicing",
    "steer": "sae_lm.latents",
    "study": "sae_lm.studies",
    "tokens_by_first_letter": "sae_lm.token_sets",
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
