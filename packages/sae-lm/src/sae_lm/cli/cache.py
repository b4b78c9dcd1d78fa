"""``sae-core lm cache RUN.yaml OUT``: the activations that a run would train on, to disk."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from sae_lm.cli.run_source import add_run_arguments, source_of

__all__ = ["HELP", "configure", "run"]

HELP = "Write the activations that a run would train on to disk; an unfinished cache is continued"


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add_run_arguments(parser)
    parser.add_argument("out", metavar="OUT", type=Path, help="folder of the cache")
    parser.add_argument(
        "--rows",
        type=int,
        metavar="N",
        help="activations to cache, rounded up to a batch of windows (default: one pass over the text)",
    )
    parser.add_argument(
        "--shard-mb", type=float, default=256.0, metavar="MB", help="largest size of a file (default: %(default)g)"
    )
    parser.add_argument("--dry-run", action="store_true", help="say how large the cache will be, and write nothing")
    parser.add_argument(
        "--hub", metavar="REPO", help="upload the finished cache to this data set repository of the Hub"
    )
    parser.add_argument("--private", action="store_true", help="make that repository private")


def run(args: argparse.Namespace) -> int:
    """Say how much it will be, write it, say where it is."""
    from sae_core.config import require

    from sae_lm.caching import estimate, write_cache
    from sae_lm.shards import size, upload

    require(args.shard_mb > 0, f"--shard-mb must be positive, not {args.shard_mb}")
    require(args.hub is not None or not args.private, "--private belongs to --hub")
    source = source_of(args)
    planned = estimate(source, args.rows)
    places = ", ".join(f"{name} ({width})" for name, width in planned.sites.items())
    print(
        f"{planned.rows:,} activations of {places} in {planned.dtype}: {size(planned.bytes)} in {args.out}", flush=True
    )
    if args.dry_run:
        return 0

    def told(shards: int, rows: int) -> None:
        print(f"  shard {shards}: {rows:,} of {planned.rows:,} activations", file=sys.stderr, flush=True)

    record = write_cache(
        source, args.out, rows=args.rows, planned=planned, shard_bytes=args.shard_mb * 1e6, after_shard=told
    )
    print(f"The cache is complete: {record['rows']:,} activations in {len(record['shards'])} shard(s).")
    print(f"Train on it with source: {{name: activation_cache, path: {args.out}}}")
    if args.hub is not None:
        print(f"Uploaded: {upload(args.out, args.hub, private=args.private)}")
    return 0
