"""``sae-core show NAME``: one contribution with its options, its documentation and its provider."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import sys
import typing
from collections.abc import Iterator
from contextlib import redirect_stdout
from typing import Any, ClassVar, final

from sae_core.cli.names import find_one
from sae_core.cli.tables import paragraphs
from sae_core.plugins import Contribution, get_registry
from sae_core.plugins.manager import KINDS

__all__ = ["Show"]


@final
class Show:
    """Show what a name means: options with types, defaults and meaning, the class's documentation, the provider."""

    help: ClassVar[str] = (
        "Show one name: its options with types, defaults and meaning, its documentation, its provider."
    )

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Add the options."""
        parser.add_argument("name", help="as `sae-core list` prints it; distribution:name picks one provider")
        parser.add_argument("--kind", choices=KINDS, help="needed when things of several kinds have this name")
        parser.add_argument("--json", action="store_true", help="print JSON")

    def run(self, args: argparse.Namespace) -> int:
        """Print it."""
        with redirect_stdout(sys.stderr):  # what a plugin prints while it loads is no part of the answer
            registry = get_registry()
            contribution = find_one(registry, args.name, args.kind)
            described = _describe(contribution, registry.resolve(contribution.spec.kind, contribution.qualified))
        if args.json:
            print(json.dumps(described, indent=2, default=str))
        else:
            print(_as_text(described))
        return 0


def _describe(contribution: Contribution, cls: type) -> dict[str, Any]:
    config_class = getattr(cls, "config_class", None)
    options = list(_options(config_class)) if isinstance(config_class, type) else []
    return {
        "kind": contribution.spec.kind,
        "name": contribution.spec.name,
        "qualified": contribution.qualified,
        "summary": contribution.spec.summary,
        "distribution": contribution.distribution,
        "version": contribution.version,
        "target": contribution.spec.target,
        "doc": inspect.getdoc(cls) or "",
        "options": options,
    }


def _options(config_class: type, above: str = "", defaults: object = None) -> Iterator[dict[str, Any]]:
    """The fields of a config, those of a config inside it as ``outer.inner``, which is how ``--set`` names them."""
    from sae_core.config import Schedule, describe_fields

    hints = typing.get_type_hints(config_class)
    for field in describe_fields(config_class):
        default = field.default if defaults is None else getattr(defaults, field.name)
        types = [t for t in (hints[field.name], *typing.get_args(hints[field.name])) if isinstance(t, type)]
        inner = [t for t in types if dataclasses.is_dataclass(t) and not issubclass(t, Schedule)]
        if inner:
            yield from _options(inner[0], f"{above}{field.name}.", default)
        else:
            required = field.required and defaults is None
            yield {
                "name": above + field.name,
                "type": field.type,
                "required": required,
                "default": default,
                "help": field.help,
            }


def _as_text(described: dict[str, Any]) -> str:
    parts = ["{kind} {name}, from {distribution} {version} ({target})".format(**described)]
    if described["doc"]:
        parts.append(described["doc"])
    options = [
        paragraphs(f"{o['name']}: {o['type']} " + ("(required)" if o["required"] else f"= {o['default']!r}"), o["help"])
        for o in described["options"]
    ]
    if options:
        parts.append("options:\n" + "\n".join(options))
    return "\n\n".join(parts)
