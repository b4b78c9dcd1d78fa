"""The source that a run file names, for commands that use it without training."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sae_lm.source import HuggingFaceSource

__all__ = ["add_run_arguments", "source_of"]


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the run file and ``--set``."""
    parser.add_argument("run", metavar="RUN.yaml", help="the run file")
    parser.add_argument(
        "--set",
        dest="overrides",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="change one setting of the run file, say source.context_size=64; may be repeated",
    )


def source_of(args: argparse.Namespace) -> HuggingFaceSource:
    """The run's source. Raises ConfigError when it is none of a language model."""
    from sae_core.config import require, structure
    from sae_core.run import read_run

    from sae_lm.source import HuggingFaceSource, HuggingFaceSourceConfig

    run = read_run(args.run, args.overrides)
    settings = dict(run.source)
    name = settings.pop("name")
    require(
        name in ("huggingface", "sae-lm:huggingface"),
        f"{args.run}: the source is {name!r}; this command is for 'huggingface'",
    )
    return HuggingFaceSource(structure({"seed": run.seed, **settings}, HuggingFaceSourceConfig, where="source"))
