"""Every error that sae-core raises on purpose.

A message says what was asked, what was found, where (file, key, field, plugin) and what to do next. All of them derive
from `SaeCoreError`, so one `except` catches whatever this project reports, and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable

__all__ = [
    "ConfigError",
    "DataError",
    "FormatError",
    "MissingDependencyError",
    "PluginError",
    "SaeCoreError",
    "ShapeError",
    "UnknownNameError",
    "did_you_mean",
]


class SaeCoreError(Exception):
    """Root of all errors of the project."""


class ConfigError(SaeCoreError, ValueError):
    """A config has an unknown key, a wrong type or an impossible value."""


class ShapeError(SaeCoreError, ValueError):
    """A tensor given to an SAE has the wrong width, dtype or device."""


class DataError(SaeCoreError, ValueError):
    """Activations are unusable: NaN, infinite, of the wrong width, or there are none."""


class FormatError(SaeCoreError, ValueError):
    """A file or folder does not hold what its format promises."""


class PluginError(SaeCoreError):
    """A plugin could not be loaded, or what it declares does not exist."""


class UnknownNameError(PluginError, LookupError, ValueError):
    """No plugin provides the name that was asked for, or more than one does."""


class MissingDependencyError(SaeCoreError, ImportError):
    """An optional library is needed for this and is not installed."""


def did_you_mean(name: str, known: Iterable[str], *, cutoff: float = 0.6) -> str:
    """Return ``"; did you mean 'x'?"`` for the nearest of `known`, or an empty string if none is as near as `cutoff`.

    >>> did_you_mean("tpok", ["relu", "topk"])
    "; did you mean 'topk'?"
    >>> did_you_mean("zebra", ["relu", "topk"])
    ''
    """
    import difflib  # needed only for messages

    near = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f"; did you mean {near[0]!r}?" if near else ""
