"""``sae-core explore SAE``: a local page for the latents of dictionaries, with their model behind it."""

from __future__ import annotations

import argparse
from typing import ClassVar, final

from sae_explorer.cli.dashboard import add_study_options

__all__ = ["Explore"]


@final
class Explore:
    """Study if need be, load the model, serve."""

    help: ClassVar[str] = (
        "Look at the latents of SAEs in a local page with the model behind it: type a text, steer, compare, label."
    )

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Declare the options."""
        parser.add_argument(
            "saes", metavar="SAE", nargs="+",
            help="folder of a saved SAE, RELEASE:ID or RELEASE ID of a published one; several of one model may be named",
        )  # fmt: skip
        parser.add_argument("--port", type=int, default=0, metavar="N", help="port on 127.0.0.1 (default: a free one)")
        add_study_options(parser, several=True)

    def run(self, args: argparse.Namespace) -> int:
        """Serve until Ctrl-C."""
        from sae_explorer.opening import open_studied
        from sae_explorer.playing import Model
        from sae_explorer.server import listen, serve

        with listen(args.port) as listening:  # first, for a study may take hours
            opened = open_studied(
                names_of(args.saes), studies=args.studies, tokens=args.tokens, text=args.text, device=args.device,
                overrides=args.overrides,
            )  # fmt: skip
            assert opened.source is not None
            model = Model(opened.source, opened.studied)
            serve(opened.studied, model, listening, say=lambda text: print(text, flush=True))
        return 0


def names_of(words: list[str]) -> list[str]:
    """Names of dictionaries; ``RELEASE ID``, where neither is a path, is ``RELEASE:ID``.

    >>> names_of(["gpt2-small-res-jb", "blocks.8.hook_resid_pre"])
    ['gpt2-small-res-jb:blocks.8.hook_resid_pre']
    """
    from pathlib import Path

    if len(words) == 2 and not any(Path(word).exists() or ":" in word for word in words):
        return [":".join(words)]
    return words
