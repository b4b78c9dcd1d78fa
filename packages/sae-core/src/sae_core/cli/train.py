"""``sae-core train RUN.yaml``: train a dictionary as a run file says."""

from __future__ import annotations

import argparse
from typing import ClassVar, final

__all__ = ["Train"]


@final
class Train:
    """Train from a run file."""

    help: ClassVar[str] = "Train a dictionary from a run file"

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Declare the options."""
        parser.add_argument("run", metavar="RUN.yaml", help="the run file")
        parser.add_argument(
            "--set",
            dest="overrides",
            metavar="KEY=VALUE",
            action="append",
            default=[],
            help="change one setting of the run file, say train.lr=0.001; may be repeated",
        )
        parser.add_argument(
            "--overwrite", action="store_true", help="replace an SAE that is already in the output folder"
        )

    def run(self, args: argparse.Namespace) -> int:
        """Train, save, and say what came out and where it is."""
        from sae_core.cli.tables import table
        from sae_core.run import execute, read_run

        run = read_run(args.run, args.overrides)
        result = execute(run, overwrite=args.overwrite)
        last = result.history[-1]
        planned = run.train.total_samples
        ended = "" if result.samples >= planned else f" of {planned:,}: the source ended"
        dead = f"not known before {run.train.dead_after_samples:,} samples"
        measured = (("loss", "loss", ".4g"), ("explained variance", "explained_variance", ".4f"), ("L0", "l0", ".2f"))
        print(
            table(
                ["TRAINED", ""],
                [
                    ["samples", f"{result.samples:,}{ended}"],
                    ["seconds", f"{result.seconds:.1f}"],
                    ["samples/s", f"{result.samples / result.seconds:,.0f}"],
                    *([label, _number(last[key], form)] for label, key, form in measured),
                    ["dead latents", _number(last["dead_fraction"], ".2%", unknown=dead)],
                ],
            )
        )
        print(f"\nThe SAE is in {run.output} (with run.yaml and log.jsonl).")
        return 0


def _number(value: float | None, form: str, unknown: str = "not known") -> str:
    return unknown if value is None else f"{value:{form}}"
