"""``sae-core lm``: work with a language model that is no training: pretokenise, cache activations, study a dictionary."""

from __future__ import annotations

import argparse
from typing import ClassVar, final

from sae_lm.cli import cache, pretokenize, study

__all__ = ["Lm"]

_ACTIONS = {"cache": cache, "pretokenize": pretokenize, "study": study}


@final
class Lm:
    """Its actions are a module each, with `HELP`, `configure` and `run`."""

    help: ClassVar[str] = "Work with a language model: pretokenise text, cache activations, study the latents of an SAE"

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Declare the actions and their options."""
        actions = parser.add_subparsers(title="actions", metavar="ACTION", dest="action", required=True)
        for name, module in _ACTIONS.items():
            module.configure(actions.add_parser(name, help=module.HELP, description=module.HELP, allow_abbrev=False))

    def run(self, args: argparse.Namespace) -> int:
        """Do what was asked."""
        return _ACTIONS[args.action].run(args)
