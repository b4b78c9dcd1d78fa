"""What a plugin's hooks return: small frozen records that name a class by string.

A spec holds nothing heavy. Its `target`, ``"package.module:Class"``, is imported only when somebody uses the name, so
listing a hundred architectures costs a hundred dataclass instances and no torch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

__all__ = [
    "ActivationSourceSpec",
    "ArchitectureSpec",
    "CatalogueSpec",
    "CommandSpec",
    "LoaderSpec",
    "LoggerSpec",
    "MetricSpec",
    "Spec",
    "WriterSpec",
]

_NAME = re.compile(r"[a-z][a-z0-9_]*")
_TARGET = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


@dataclass(frozen=True, kw_only=True, slots=True)
class Spec:
    """One contribution of a plugin.

    `name` is what users write (lower case letters, digits, underscores), `target` is ``"package.module:Class"``,
    `summary` is one line for listings. Raises ValueError for a malformed name or target, TypeError for a non-string.
    """

    kind: ClassVar[str] = ""

    name: str
    target: str
    summary: str = ""

    def __post_init__(self) -> None:
        for field in ("name", "target", "summary"):
            if not isinstance(getattr(self, field), str):
                raise TypeError(f"{type(self).__name__}.{field} must be a string, not {getattr(self, field)!r}")
        if not _NAME.fullmatch(self.name):
            raise ValueError(
                f"{type(self).__name__}.name {self.name!r}: use lower case letters, digits and underscores, "
                "starting with a letter"
            )
        if not _TARGET.fullmatch(self.target):
            raise ValueError(
                f"{type(self).__name__}.target {self.target!r} of {self.name!r} "
                "is not of the form 'package.module:Class'"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class ArchitectureSpec(Spec):
    """A dictionary architecture; `target` is a `sae_core.SAE` subclass with a `config_class`."""

    kind: ClassVar[str] = "architecture"


@dataclass(frozen=True, kw_only=True, slots=True)
class LoaderSpec(Spec):
    """A checkpoint format; `target` satisfies `sae_core.protocols.Loader` and is constructed without arguments."""

    kind: ClassVar[str] = "loader"


@dataclass(frozen=True, kw_only=True, slots=True)
class WriterSpec(Spec):
    """A format to convert to; `target` satisfies `sae_core.protocols.Writer` and is constructed without arguments."""

    kind: ClassVar[str] = "writer"


@dataclass(frozen=True, kw_only=True, slots=True)
class ActivationSourceSpec(Spec):
    """An activation source; `target` satisfies `sae_core.protocols.ActivationSource` and has a `config_class`."""

    kind: ClassVar[str] = "source"


@dataclass(frozen=True, kw_only=True, slots=True)
class CatalogueSpec(Spec):
    """A list of published SAEs; `target` satisfies `sae_core.protocols.Catalogue`, constructed without arguments."""

    kind: ClassVar[str] = "catalogue"


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricSpec(Spec):
    """A streaming metric; `target` satisfies `sae_core.protocols.Metric` and is constructed without arguments."""

    kind: ClassVar[str] = "metric"


@dataclass(frozen=True, kw_only=True, slots=True)
class LoggerSpec(Spec):
    """Where training records go; `target` satisfies `sae_core.protocols.Logger` and has a `config_class`."""

    kind: ClassVar[str] = "logger"


@dataclass(frozen=True, kw_only=True, slots=True)
class CommandSpec(Spec):
    """A subcommand of ``sae-core``; `target` satisfies `sae_core.protocols.Command`, constructed without arguments.

    A dash in a command's name is written as an underscore here: ``list_plugins`` is ``sae-core list-plugins``.
    """

    kind: ClassVar[str] = "command"
