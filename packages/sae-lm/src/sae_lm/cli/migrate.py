"""``sae-core migrate CFG``: SAELens's runner config as a run file."""

from __future__ import annotations

import argparse
from typing import ClassVar, final

__all__ = ["Migrate"]


@final
class Migrate:
    """Turn a runner config into a run file."""

    help: ClassVar[str] = "Turn a runner config of SAELens 6 (JSON) into a run file, and name what has no equivalent"

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Declare the options."""
        parser.add_argument("config", metavar="CFG", help="runner_cfg.json")
        parser.add_argument("--output", metavar="RUN.yaml", help="write the run file there instead of printing it")

    def run(self, args: argparse.Namespace) -> int:
        """Print the run file; what it does not say goes to stderr."""
        import json
        import sys
        from pathlib import Path

        import yaml
        from sae_core.errors import FormatError

        from sae_lm.migrate import migrate
        from sae_lm.results import write_atomically

        try:
            config = json.loads(Path(args.config).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise FormatError(f"{args.config}: cannot be read as JSON: {error}") from None
        if not isinstance(config, dict):
            raise FormatError(f"{args.config}: holds no JSON object")
        found = migrate(config)
        text = yaml.safe_dump(found.run, sort_keys=False)
        if args.output:
            write_atomically(Path(args.output), text.encode())
        else:
            print(text, end="")
        for name, why in found.left_out.items():
            print(f"sae-core: not in the run file: {name}: {why}", file=sys.stderr)
        return 0
