"""``sae-core convert``: an SAE of any format that can be read, written in the format of another library."""

from __future__ import annotations

import argparse
from typing import Any, ClassVar, final

from sae_core.errors import ConfigError

__all__ = ["Convert"]


@final
class Convert:
    """``sae-core convert``."""

    help: ClassVar[str] = "Write an SAE in the format of another library."

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Declare the arguments."""
        parser.add_argument("path", metavar="PATH", help="a folder or file with an SAE, in any format that can be read")
        parser.add_argument("--to", required=True, metavar="FORMAT", help="a format of `sae-core list writers`")
        parser.add_argument("--output", required=True, metavar="DIR", help="the folder to write, which must be new")
        parser.add_argument("--format", help="PATH's format, if it is not to be recognised by the files")
        parser.add_argument("--dtype", help="precision to write, such as float32; PATH's by default")
        parser.add_argument(
            "--fact",
            action="append",
            default=[],
            metavar="NAME=VALUE",
            help="something that PATH's files do not say (value in YAML); may be given more than once",
        )

    def run(self, args: argparse.Namespace) -> int:
        """Load, convert, and print what was written and what the format leaves out."""
        from sae_core import SAE
        from sae_core.format.convert import convert
        from sae_core.plugins import get_registry

        get_registry().find("writer", args.to)  # before a large file is read
        sae = SAE.load(args.path, format=args.format, dtype=args.dtype, overrides=_facts(args.fact) or None)
        notes = convert(sae, args.to, args.output)
        print(f"{args.output}: {sae.architecture}, {sae.d_sae} latents, {args.to}")
        for note in notes:
            print(f"note: {note}")
        return 0


def _facts(given: list[str]) -> dict[str, Any]:
    from sae_core.yaml_text import parse_yaml

    facts: dict[str, Any] = {}
    for item in given:
        name, equals, value = item.partition("=")
        if not equals or not name:
            raise ConfigError(f"--fact {item!r}: expected NAME=VALUE")
        try:
            facts[name] = parse_yaml(value)
        except ConfigError as error:
            raise ConfigError(f"--fact {item!r}: {error}") from None
    return facts
