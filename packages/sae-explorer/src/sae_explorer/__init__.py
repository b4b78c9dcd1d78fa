"""Look inside dictionaries of language models: dashboards as files, and a local page with the model behind it.

The two commands are ``sae-core dashboard`` and ``sae-core explore``. Importing this package costs next to nothing: every public
name is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sae_explorer.dashboard import write_dashboard
    from sae_explorer.labels import Labels
    from sae_explorer.opening import Opened, open_studied
    from sae_explorer.reading import Studied
    from sae_explorer.upload import NeuronpediaId, write_upload

__version__ = "0.1.0"

__all__ = [
    "Labels",
    "NeuronpediaId",
    "Opened",
    "Studied",
    "__version__",
    "open_studied",
    "write_dashboard",
    "write_upload",
]

_HOMES = {
    "Labels": "labels",
    "NeuronpediaId": "upload",
    "Opened": "opening",
    "Studied": "reading",
    "open_studied": "opening",
    "write_dashboard": "dashboard",
    "write_upload": "upload",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sae_explorer' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"sae_explorer.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
