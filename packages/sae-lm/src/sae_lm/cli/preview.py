"""``sae-core preview RUN.yaml``: the first windows that a run would train on, as text."""

from __future__ import annotations

import argparse
from typing import ClassVar, final

from sae_lm.cli.run_source import add_run_arguments, source_of

__all__ = ["Preview"]


@final
class Preview:
    """Show a run's first windows."""

    help: ClassVar[str] = "Show the first windows a run would train on; tokens left out of training are in [brackets]"

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Declare the options."""
        add_run_arguments(parser)
        parser.add_argument("--rows", type=int, default=2, metavar="N", help="windows to show (default: 2)")

    def run(self, args: argparse.Namespace) -> int:
        """Print the windows."""
        from sae_core.config import require

        require(args.rows > 0, f"--rows must be positive, not {args.rows}")
        print(source_of(args).preview(args.rows))
        return 0
