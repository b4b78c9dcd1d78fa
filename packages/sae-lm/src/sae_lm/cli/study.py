"""``sae-core lm study SAE``: what each latent of a dictionary is about, from one pass over text."""

from __future__ import annotations

import argparse

__all__ = ["HELP", "configure", "run"]

HELP = "Collect examples, densities, promoted tokens and partners of every latent of a saved SAE into a folder"


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("path", metavar="SAE", help="folder of the saved SAE")
    parser.add_argument("--output", metavar="DIR", help="where the study goes (default: SAE/study)")
    parser.add_argument("--tokens", type=int, metavar="N", help="positions to look at (default: 200000)")
    parser.add_argument("--text", metavar="FILE", help="study all of this text file instead of the SAE's own text")
    parser.add_argument("--device", default="auto", help="where model and SAE run (default: cuda if there is one)")
    parser.add_argument("--batch-prompts", type=int, default=8, metavar="N", help="windows at once (default: 8)")
    parser.add_argument(
        "--set", dest="overrides", metavar="KEY=VALUE", action="append", default=[],
        help="change a setting of the activation source, say model=NAME, or with study. in front one of the study, say "
        "study.top=32; may be repeated",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Study and say where the result is."""
    from pathlib import Path

    from sae_core import SAE
    from sae_core.config import require
    from tqdm.auto import tqdm

    from sae_lm.model import place
    from sae_lm.origin import source_of
    from sae_lm.studies import settings_from, study

    require(args.batch_prompts > 0, f"--batch-prompts must be positive, not {args.batch_prompts}")
    config, overrides = settings_from(args.overrides, args.tokens)
    sae = SAE.load(args.path, device=place(args.device))
    source, places, _ = source_of(
        {"sae": sae}, overrides=overrides, text=args.text, device=args.device, command="study"
    )
    output = Path(args.output) if args.output else Path(args.path) / "study"
    print(
        f"studying {sae.d_sae:,} latents at {places['sae']} on {config.tokens:,} positions; keeps "
        f"{config.memory(sae.d_sae) / 1e6:,.0f} MB beside the model"
    )
    with tqdm(total=config.tokens, unit="token", disable=None) as bar:  # None: only on a terminal
        index = study(
            sae,
            source,
            output,
            config,
            at=places["sae"],
            batch_prompts=args.batch_prompts,
            facts={"sae_path": str(args.path)},
            progress=lambda done: bar.update(done - bar.n),
        )
    print(f"the study is in {index.parent}")
    return 0
