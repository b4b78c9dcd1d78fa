"""``sae-core dashboard SAE OUT``: the latents of a dictionary as a page that needs no server and no network."""

from __future__ import annotations

import argparse
from typing import ClassVar, final

__all__ = ["DashboardCommand", "add_study_options"]


def add_study_options(parser: argparse.ArgumentParser, *, several: bool) -> None:
    """Options about the study and the model."""
    parser.add_argument(
        "--study", dest="studies", metavar="DIR", action="append", default=[],
        help="folder of the study, made if there is none (default: SAE/study; studies/NAME here for published ones)"
        + ("; one for each SAE, in the same order" if several else ""),
    )  # fmt: skip
    parser.add_argument(
        "--tokens",
        type=int,
        metavar="N",
        help="positions that a study looks at if it is made (default: 200000)",
    )
    parser.add_argument("--text", metavar="FILE", help="study all of this text file instead of the SAE's own text")
    parser.add_argument("--device", default="auto", help="where model and SAE run (default: cuda if there is one)")
    parser.add_argument(
        "--set", dest="overrides", metavar="KEY=VALUE", action="append", default=[],
        help="change a setting of the activation source, say model=NAME, or with study. in front one of the study; may be "
        "repeated",
    )  # fmt: skip


@final
class DashboardCommand:
    """Study if need be, and write the page."""

    help: ClassVar[str] = "Write a page that shows the latents of a saved SAE; it opens without a server or a network."

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Declare the options."""
        parser.add_argument("sae", metavar="SAE", help="folder of the saved SAE, or RELEASE:ID of a published one")
        parser.add_argument("out", metavar="OUT", help="folder to write, or a file that ends in .html for few latents")
        parser.add_argument("--latents", metavar="LIST", help="only these, say 3,17,100-199 (default: all)")
        parser.add_argument(
            "--no-model", action="store_true", help="do without the model if there is a study; logits get no histograms"
        )
        parser.add_argument(
            "--neuronpedia", metavar="ID",
            help="write no page but the files that Neuronpedia takes; ID says where they belong, say gpt2-small/8-res-jb",
        )  # fmt: skip
        add_study_options(parser, several=False)

    def run(self, args: argparse.Namespace) -> int:
        """Write it and say where it is."""
        from sae_core.sae import load_named
        from sae_lm.model import place
        from tqdm.auto import tqdm

        from sae_explorer.dashboard import parse_latents, require_room, write_dashboard
        from sae_explorer.opening import open_studied
        from sae_explorer.upload import NeuronpediaId, write_upload

        where = None if args.neuronpedia is None else NeuronpediaId.parse(args.neuronpedia)
        sae = load_named(args.sae, device=place(args.device))
        latents = range(sae.d_sae) if args.latents is None else parse_latents(args.latents, sae.d_sae)
        require_room(args.out, latents)
        opened = open_studied(
            {args.sae: sae}, studies=args.studies, tokens=args.tokens, text=args.text, device=args.device,
            overrides=args.overrides, with_model=not args.no_model,
        )  # fmt: skip
        with tqdm(total=len(latents), unit="latent", disable=None) as bar:

            def progress(done: int) -> object:
                return bar.update(done - bar.n)

            if where is None:
                page = write_dashboard(opened.studied[args.sae], args.out, latents, progress=progress)
                said = f"open {page.absolute().as_uri()}"
            else:
                said = f"wrote {write_upload(opened.studied[args.sae], args.out, where, latents, progress=progress)}"
        print(said)
        return 0
