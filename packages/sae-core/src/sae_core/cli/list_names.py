"""``sae-core list KIND``: what the installed plugins provide, one kind at a time or all of it."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import redirect_stdout
from typing import ClassVar, final

from sae_core.cli.tables import table
from sae_core.plugins import Contribution, Registry, get_registry
from sae_core.plugins.manager import KINDS

__all__ = ["List"]


@final
class List:
    """List architectures, loaders, writers, sources, catalogues, metrics, loggers or commands, and who provides them."""

    help: ClassVar[str] = "List what can be used by name, and which plugin provides it."

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Add the options."""
        plurals = [f"{kind}s" for kind in KINDS]
        parser.add_argument("kind", nargs="?", choices=plurals, help="one of %(choices)s; all of them if left out")
        parser.add_argument("--json", action="store_true", help="print JSON")

    def run(self, args: argparse.Namespace) -> int:
        """Print the list."""
        kinds = [args.kind.removesuffix("s")] if args.kind else list(KINDS)
        with redirect_stdout(sys.stderr):  # what a plugin prints while it loads is no part of the list
            registry = get_registry()
        found = [contribution for kind in kinds for contribution in registry.contributions(kind)]
        if args.json:
            print(json.dumps([_as_json(registry, contribution) for contribution in found], indent=2))
        elif not found:
            print(f"no {args.kind} installed")
        else:
            headers = ["NAME", "WHAT IT IS", "FROM"] if args.kind else ["KIND", "NAME", "WHAT IT IS", "FROM"]
            rows = [
                [c.spec.kind, registry.name_of(c), c.spec.summary, f"{c.distribution} {c.version}"][-len(headers) :]
                for c in found
            ]
            print(table(headers, rows))
        return 0


def _as_json(registry: Registry, contribution: Contribution) -> dict[str, str]:
    return {
        "kind": contribution.spec.kind,
        "name": registry.name_of(contribution),
        "qualified": contribution.qualified,
        "summary": contribution.spec.summary,
        "distribution": contribution.distribution,
        "version": contribution.version,
        "target": contribution.spec.target,
    }
