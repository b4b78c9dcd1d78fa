"""``sae-core compare A B``: two SAEs side by side."""

from __future__ import annotations

import argparse
import json
from typing import ClassVar, final

__all__ = ["Compare"]

_SHOWN = 10


@final
class Compare:
    """Match the latents of two SAEs and print what they share."""

    help: ClassVar[str] = "Compare two SAEs latent by latent: what both have, and what one has and the other lacks."

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Declare the options."""
        name = "a folder or file in any format that is installed, or RELEASE:ID of a published one"
        parser.add_argument("a", metavar="A", help=name)
        parser.add_argument("b", metavar="B", help="the other")
        parser.add_argument(
            "--shared",
            type=float,
            default=0.7,
            metavar="C",
            help="cosine from which two latents are the same (default: 0.7)",
        )
        parser.add_argument(
            "--only",
            type=float,
            default=0.5,
            metavar="C",
            help="cosine below which a latent is like none of the other's (default: 0.5)",
        )
        parser.add_argument("--json", action="store_true", help="print JSON, with every pair")

    def run(self, args: argparse.Namespace) -> int:
        """Load both, compare, print."""
        from sae_core.cli.tables import table
        from sae_core.config import require
        from sae_core.plugins import get_registry
        from sae_core.sae import load_named

        from sae_synthetic.comparison import compare_saes

        for option in ("shared", "only"):
            value = getattr(args, option)
            require(-1 <= value <= 1, f"--{option} must be a cosine in [-1, 1], not {value}")
        saes = [load_named(name) for name in (args.a, args.b)]
        found = compare_saes(saes[0], saes[1])
        if args.json:
            print(json.dumps({"a": args.a, "b": args.b, **found.to_dict(args.shared, args.only)}, indent=2))
            return 0
        smaller = min(len(found.best_in_a), len(found.best_in_b))
        shared = len(found.shared(args.shared))
        only = {"A": found.only_in_a(args.only), "B": found.only_in_b(args.only)}
        names = [get_registry().lasting_name("architecture", type(sae)) for sae in saes]
        rows = [
            ["A", args.a, names[0], str(saes[0].d_sae), str(len(only["A"]))],
            ["B", args.b, names[1], str(saes[1].d_sae), str(len(only["B"]))],
        ]
        print(table(["", "SAE", "ARCHITECTURE", "LATENTS", f"ONLY HERE (< {args.only:g})"], rows))
        print(
            f"\nmean cosine of matched latents {found.consistency:.3f}; "
            f"with a random dictionary {found.random_consistency:.3f}\n"
            f"matched with a cosine of {args.shared:g} or more: {shared} of {smaller} ({shared / smaller:.0%})"
        )
        for name, latents in only.items():
            if len(latents):
                more = f" and {len(latents) - _SHOWN} more (--json lists them)" if len(latents) > _SHOWN else ""
                print(f"only in {name}: {', '.join(str(int(i)) for i in latents[:_SHOWN])}{more}")
        return 0
