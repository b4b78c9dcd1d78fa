"""What the plugin host knows about a plugin, from first sight to the end: three small records."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from sae_core.plugins.specs import Spec

__all__ = ["CORE", "Candidate", "Contribution", "PluginInfo", "State", "canonical"]

CORE = "sae-core"
"""The distribution whose own plugin is always on and whose names are reserved."""

State: TypeAlias = Literal["loaded", "failed", "disabled", "incompatible", "conflict", "not_loaded"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """An entry point as its metadata describe it; nothing of it is imported yet.

    `remark` is worth showing even if the plugin loads. `refusal` is the state and the reason when the metadata alone
    already rule the plugin out; it is then never loaded.
    """

    name: str
    distribution: str
    version: str
    load: Callable[[], object]
    target: str = ""
    location: str = ""
    requires: tuple[str, ...] = ()
    remark: str = ""
    refusal: tuple[State, str] | None = None

    @property
    def qualified(self) -> str:
        """``"distribution:name"``."""
        return f"{self.distribution}:{self.name}"


@dataclass(frozen=True, kw_only=True, slots=True)
class PluginInfo:
    """One installed plugin and what became of it.

    `reason` says why a plugin is not simply loaded; for a loaded one it is a remark or empty. `import_ms` is the time
    that its module and hooks took, None if it was not imported. `traceback` is the whole story of a failure.
    """

    name: str
    distribution: str
    version: str
    state: State
    reason: str = ""
    import_ms: float | None = None
    provides: tuple[Spec, ...] = ()
    target: str = ""
    location: str = ""
    traceback: str = ""

    @property
    def qualified(self) -> str:
        """``"distribution:name"``, unique among plugins."""
        return f"{self.distribution}:{self.name}"

    def as_json(self) -> dict[str, Any]:
        """What ``list-plugins --json`` prints for it."""
        return {
            "name": self.name,
            "distribution": self.distribution,
            "version": self.version,
            "state": self.state,
            "reason": self.reason,
            "import_ms": self.import_ms,
            "provides": [{"kind": s.kind, "name": s.name, "summary": s.summary} for s in self.provides],
        }


@dataclass(frozen=True, slots=True)
class Contribution:
    """One thing that a plugin provides, and who provides it; `plugin` is the entry point's name."""

    spec: Spec
    plugin: str
    distribution: str
    version: str

    @property
    def qualified(self) -> str:
        """``"distribution:name"``, which means this contribution whatever else is installed."""
        return f"{self.distribution}:{self.spec.name}"

    @property
    def lasting(self) -> str:
        """The name to keep in files: it means this contribution whatever is installed later; ours need no owner."""
        return self.spec.name if self.distribution == CORE else self.qualified


def canonical(distribution: str) -> str:
    """The normalised name of a distribution (PyPA's rule): lower case with single dashes.

    >>> canonical("Sae_Foo.Bar")
    'sae-foo-bar'
    """
    return re.sub(r"[-_.]+", "-", distribution).lower()
