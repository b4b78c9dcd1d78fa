"""`sae-core {{ command }}`. As rendered it prints the norms of a dictionary's directions; make it do what you need.

The module is imported for the help, so what is heavy is imported in `run`.
"""

from __future__ import annotations

import argparse
from typing import ClassVar, final


@final
class {{ class_name }}:
    """One sentence that `sae-core show {{ name }}` prints."""

    help: ClassVar[str] = "Print the norms of the directions of a saved SAE."

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Add the options."""
        parser.add_argument("path", help="folder or file of an SAE, in any format that is installed")
        parser.add_argument("--most", type=int, default=10, metavar="N", help="how many, the largest first (default: 10)")

    def run(self, args: argparse.Namespace) -> int:
        """Print them; what is returned is the exit code. A SaeCoreError raised here is printed as one message."""
        from sae_core import SAE

        norms = SAE.load(args.path).directions().norm(dim=-1)
        for latent in norms.argsort(descending=True)[: args.most].tolist():
            print(f"{latent}\t{float(norms[latent]):.4f}")
        return 0
