"""``sae-core synthetic``: published experiments on synthetic data, and scores against saved worlds."""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path
from typing import ClassVar, final

__all__ = ["Synthetic"]


@final
class Synthetic:
    """List and run experiments."""

    help: ClassVar[str] = (
        "Run published experiments on synthetic data, beside the published numbers; score SAEs against saved worlds."
    )

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Declare the options."""
        actions = parser.add_subparsers(title="actions", metavar="ACTION", dest="action", required=True)
        actions.add_parser("list", help="the experiments, where they were published, how long they take")
        run = actions.add_parser("run", help="run one of them")
        run.add_argument("name", metavar="NAME", help="its name, as `sae-core synthetic list` shows it")
        run.add_argument("--seeds", type=int, metavar="N", help="number of seeds (default: the experiment's own)")
        run.add_argument(
            "--processes",
            type=int,
            default=1,
            metavar="N",
            help="processes that share the seeds, where the experiment can (default: %(default)s)",
        )
        run.add_argument(
            "--scale",
            type=float,
            default=1.0,
            metavar="X",
            help="factor on the training samples; 0.1 is a quick look (default: %(default)s)",
        )
        run.add_argument("--device", default="cpu", help="where to train (default: %(default)s)")
        run.add_argument(
            "--output",
            type=Path,
            metavar="DIR",
            help="where result.json and report.html go (default: runs/synthetic-NAME)",
        )
        run.add_argument(
            "--overwrite", action="store_true", help="replace a result that is already in the output folder"
        )
        run.add_argument("--no-report", action="store_true", help="write no HTML report (it needs plotly)")
        score = actions.add_parser("score", help="score an SAE of any library against a saved world")
        score.add_argument(
            "sae", metavar="PATH", help="a folder or file in any format that is installed, or RELEASE:ID"
        )
        score.add_argument("--world", type=Path, required=True, metavar="DIR", help="folder of a saved synthetic model")
        score.add_argument(
            "--samples", type=int, default=100_000, metavar="N", help="held-out samples (default: %(default)s)"
        )
        score.add_argument("--batch-size", type=int, metavar="N", help="samples at a time (default: 4096)")
        score.add_argument("--device", default="cpu", help="where to compute (default: %(default)s)")
        score.add_argument("--json", action="store_true", help="print JSON")

    def run(self, args: argparse.Namespace) -> int:
        """List, or run and save."""
        from sae_core.cli.tables import table

        from sae_synthetic.experiments import PRESETS, get_preset

        if args.action == "list":
            rows = [[p.name, p.summary, p.paper, p.duration] for p in PRESETS.values()]
            print(table(["NAME", "WHAT IT SHOWS", "PUBLISHED", "2 CORES"], rows))
            return 0
        if args.action == "score":
            from sae_synthetic.cli.score import print_scores

            return print_scores(args)
        preset = get_preset(args.name)
        settings = preset.settings(args.seeds, args.scale, args.device, processes=args.processes)
        folder = _usable(args.output or Path("runs") / f"synthetic-{args.name}", args.overwrite)
        if not args.no_report:
            from sae_synthetic.plots import require_plotly

            require_plotly()
        result = preset.load()(settings)
        print(f"{result.name} ({result.paper})\n{textwrap.fill(result.setting, 79)}\n")
        print(table([column.upper() for column in result.columns], result.rows))
        print()
        for claim in result.claims:
            mark = "[seen]    " if claim.holds else "[NOT seen]"
            print(textwrap.fill(f"{mark} {claim.text}", 79, subsequent_indent=" " * 11))
        paths = result.save(folder, report=not args.no_report)
        print(f"\n{result.seconds:.0f} s of training. Written: {', '.join(map(str, paths))}")
        return 0


def _usable(folder: Path, overwrite: bool) -> Path:
    """The folder, made now: hours of training must not end in a path that cannot be written, nor in the loss of others."""
    from sae_core.errors import ConfigError

    if (folder / "result.json").exists() and not overwrite:
        raise ConfigError(f"{folder}: already holds a result; choose another --output or pass --overwrite")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output: {folder} cannot be a folder: {error.strerror}") from error
    return folder
