"""Sparse autoencoders and transcoders of language models: protocols, training, formats and the plugin host.

Importing this package costs next to nothing: every public name is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sae_core.codes import DenseCodes, SparseCodes
    from sae_core.config import Schedule
    from sae_core.errors import SaeCoreError
    from sae_core.plugins.hookspecs import hookimpl
    from sae_core.plugins.registry import list_plugins
    from sae_core.protocols import ActivationBatch
    from sae_core.sae import SAE, StepContext, StepOutput, create
    from sae_core.training.config import TrainConfig
    from sae_core.training.trainer import Trainer, TrainResult

__version__ = "0.1.0"

__all__ = [
    "SAE",
    "ActivationBatch",
    "DenseCodes",
    "SaeCoreError",
    "Schedule",
    "SparseCodes",
    "StepContext",
    "StepOutput",
    "TrainConfig",
    "TrainResult",
    "Trainer",
    "__version__",
    "create",
    "hookimpl",
    "list_plugins",
]

_HOMES = {
    "SAE": "sae_core.sae",
    "ActivationBatch": "sae_core.protocols",
    "DenseCodes": "sae_core.codes",
    "SaeCoreError": "sae_core.errors",
    "Schedule": "sae_core.config",
    "SparseCodes": "sae_core.codes",
    "StepContext": "sae_core.sae",
    "StepOutput": "sae_core.sae",
    "TrainConfig": "sae_core.training.config",
    "TrainResult": "sae_core.training.trainer",
    "Trainer": "sae_core.training.trainer",
    "create": "sae_core.sae",
    "hookimpl": "sae_core.plugins.hookspecs",
    "list_plugins": "sae_core.plugins.registry",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sae_core' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
