"""``sae-core train RUN.yaml``: train a dictionary as a run file says."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, ClassVar, final

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sae_core.run import RunConfig
    from sae_core.training.trainer import TrainResult

__all__ = ["Train"]


@final
class Train:
    """Train from a run file."""

    help: ClassVar[str] = "Train a dictionary from a run file"

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Declare the options."""
        parser.add_argument("run", metavar="RUN.yaml", nargs="?", help="the run file; not needed with --resume OUTPUT")
        parser.add_argument(
            "--set",
            dest="overrides",
            metavar="KEY=VALUE",
            action="append",
            default=[],
            help="change one setting of the run file, say train.lr=0.001; may be repeated",
        )
        parser.add_argument(
            "--overwrite",
            action="store_true",
            help="replace the run that is already in the output folder, once the new one has ended well",
        )
        parser.add_argument(
            "--resume",
            metavar="OUTPUT",
            nargs="?",
            const="",
            help="go on with the run in the output folder, from its newest checkpoint; without one, start it",
        )
        parser.add_argument(
            "--force", action="store_true", help="resume in spite of differences that change the numbers"
        )

    def run(self, args: argparse.Namespace) -> int:
        """Train, save, and say what came out and where it is. Of several processes the first one says it."""
        from sae_core.parallel.joining import joined
        from sae_core.run import RunStopped, execute_all

        with joined() as ranks:
            run = _run_of(args)
            try:
                results = execute_all(
                    run, overwrite=args.overwrite, resume=args.resume is not None, force=args.force, ranks=ranks
                )
            except RunStopped as stopped:
                if ranks.first:
                    print(f"sae-core: {stopped}", file=sys.stderr)
                return 128 + stopped.signal
            if ranks.first:
                return self._say(run, results)
        return 0 if not results or any(result.dropped is None for result in results.values()) else 1

    def _say(self, run: RunConfig, results: Mapping[str, TrainResult]) -> int:
        from sae_core.cli.tables import table
        from sae_core.run_folder import LOG, REPORT, RUN_FILE

        if list(results) != [""]:
            return _several(run, results)
        result = results[""]
        last = result.history[-1]
        planned = run.train.total_samples
        ended = "" if result.samples >= planned else f" of {planned:,}: the source ended"
        measured = (("loss", "loss", ".4g"), ("explained variance", "explained_variance", ".4f"), ("L0", "l0", ".2f"))
        print(
            table(
                ["TRAINED", ""],
                [
                    ["samples", f"{result.samples:,}{ended}"],
                    ["seconds", f"{result.seconds:.1f}"],
                    *([label, _number(last[key], form)] for label, key, form in measured),
                    ["dead latents", _number(last["dead_fraction"], ".2%", unknown=_dead_unknown(run))],
                ],
            )
        )
        for finding in result.health:
            print(f"\nNote: {finding}.")
        kept = [name for name in (RUN_FILE, LOG, REPORT) if (run.output / name).exists()]
        print(f"\nThe SAE is in {run.output} (with {', '.join(kept[:-1])} and {kept[-1]}).")
        return 0


def _several(run: RunConfig, results: Mapping[str, TrainResult]) -> int:
    """The table of a run of several dictionaries; 1 when none of them has come out."""
    from sae_core.cli.tables import table
    from sae_core.run_folder import COMPARISON, MEMBERS, REPORT
    from sae_core.training.comparison import compared

    rows = compared(results)
    print(
        table(
            ["SAE", "L0", "EXPLAINED VARIANCE", "LOSS", "DEAD", "BEST"],
            [
                [
                    row["name"],
                    *(
                        _number(row[key], form)
                        for key, form in (("l0", ".2f"), ("explained_variance", ".4f"), ("loss", ".4g"))
                    ),
                    _number(row["dead_fraction"], ".2%"),
                    "dropped" if row["dropped"] else "yes" if row["best"] else "",
                ]
                for row in rows
            ],
        )
    )
    print("\nBEST: no other one explains as much with a smaller L0.")
    for row in rows:
        if row["dropped"]:
            print(f"dropped: {row['name']}: {row['dropped']}")
        for finding in results[row["name"]].health:
            print(f"Note on {row['name']}: {finding}.")
    tables = " and ".join(name for name in (REPORT, COMPARISON) if (run.output / name).exists())
    print(f"The SAEs are in {run.output / MEMBERS}, each with its log.jsonl; the comparison is in {tables}.")
    return 0 if any(not row["dropped"] for row in rows) else 1


def _dead_unknown(run: RunConfig) -> str:
    return f"not known before {run.train.dead_after_samples:,} samples"


def _run_of(args: argparse.Namespace) -> RunConfig:
    """The run file with its overrides; with ``--resume OUTPUT`` the one that the output folder keeps."""
    from pathlib import Path

    from sae_core.errors import ConfigError
    from sae_core.run import kept_run_file, read_run

    if args.resume is not None and args.overwrite:
        raise ConfigError("--resume goes on with a run and --overwrite starts anew; give one of them")
    if args.force and args.resume is None:
        raise ConfigError("--force belongs to --resume")
    if args.run is None and not args.resume:
        raise ConfigError("give a run file, or --resume and the output folder of a run")
    if args.run is None:
        return read_run(kept_run_file(Path(str(args.resume))), args.overrides)
    run = read_run(args.run, args.overrides)
    if args.resume and Path(args.resume).absolute() != run.output.absolute():
        raise ConfigError(f"--resume {args.resume}: the run file's output is {run.output}")
    return run


def _number(value: float | None, form: str, unknown: str = "not known") -> str:
    return unknown if value is None else f"{value:{form}}"
