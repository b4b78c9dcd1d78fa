"""What a class must be for its kind, checked when its name is first used.

A plugin names its classes by string, so what is behind a name is known only when it is imported. Then it either has what
those who use it will ask for, or one error says what is missing; not an AttributeError in the middle of a run.
"""

from __future__ import annotations

import importlib

__all__ = ["missing_of"]

_PROTOCOLS = {
    "loader": "Loader",
    "writer": "Writer",
    "source": "ActivationSource",
    "catalogue": "Catalogue",
    "metric": "Metric",
    "logger": "Logger",
    "command": "Command",
}
_CONFIGURED = ("architecture", "source", "logger")


def missing_of(kind: str, cls: type) -> str:
    """What `cls` lacks to be one of this kind, as a sentence; empty when it lacks nothing.

    Members that are no methods may be set by a constructor, and are not looked for on the class.

    >>> class Nothing: ...
    >>> missing_of("command", Nothing)
    'Nothing is no command: it has no configure, run (see sae_core.protocols.Command)'
    """
    if kind == "architecture":
        base = importlib.import_module("sae_core.sae").SAE
        if not issubclass(cls, base):
            return f"{cls.__name__} is no architecture: it is not a subclass of sae_core.SAE"
        wanted, where = [], "sae_core.SAE"
    else:
        protocol = getattr(importlib.import_module("sae_core.protocols"), _PROTOCOLS[kind])
        wanted = sorted(
            name for name, member in vars(protocol).items() if callable(member) and not name.startswith("_")
        )
        where = f"sae_core.protocols.{_PROTOCOLS[kind]}"
    lacking = [name for name in wanted if not callable(getattr(cls, name, None))]
    if kind in _CONFIGURED and not isinstance(getattr(cls, "config_class", None), type):
        lacking.append("config_class")
    return f"{cls.__name__} is no {kind}: it has no {', '.join(lacking)} (see {where})" if lacking else ""
