"""``sae-core lm pretokenize RUN.yaml OUT``: the windows of tokens that a run would train on, to disk."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from sae_lm.cli.run_source import add_run_arguments, source_of

__all__ = ["HELP", "configure", "run"]

HELP = "Write the windows of tokens that a run would train on, and those held out, to disk; an unfinished folder is continued"


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add_run_arguments(parser)
    parser.add_argument("out", metavar="OUT", type=Path, help="folder for the windows")
    parser.add_argument("--rows", type=int, metavar="N", help="windows to write of each part (default: all)")
    parser.add_argument(
        "--shuffle", action="store_true", help="put the windows of each file into a random order, by the source's seed"
    )
    parser.add_argument(
        "--hub", metavar="REPO", help="upload the finished folder to this data set repository of the Hub"
    )
    parser.add_argument("--private", action="store_true", help="make that repository private")


def run(args: argparse.Namespace) -> int:
    """Tokenise, and say what came out and how to use it."""
    from sae_core.config import require

    from sae_lm.pretokenized import pretokenize
    from sae_lm.shards import upload

    require(args.hub is not None or not args.private, "--private belongs to --hub")

    def told(part: str, rows: int) -> None:
        print(f"  {part}: {rows:,} windows", file=sys.stderr, flush=True)

    record = pretokenize(source_of(args), args.out, rows=args.rows, shuffle=args.shuffle, after_file=told)
    counts = {part: sum(file["rows"] for file in files["files"]) for part, files in record["parts"].items()}
    print(
        f"{counts['train']:,} windows of {record['context_size']} tokens to train on and {counts['held_out']:,} held out, "
        f"in {args.out}."
    )
    print(f"Use them with text: {{kind: pretokenized, path: {args.out}}}")
    if args.hub is not None:
        print(f"Uploaded: {upload(args.out, args.hub, private=args.private)}")
    return 0
