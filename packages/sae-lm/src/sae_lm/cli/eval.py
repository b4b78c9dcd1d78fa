"""``sae-core eval PATH``: what a saved SAE does to the language model it was trained on."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast, final

if TYPE_CHECKING:
    from sae_core.protocols import Metric

    from sae_lm.evaluate import Evaluation
    from sae_lm.source import HuggingFaceSource

__all__ = ["Eval"]

_ROWS = (
    ("explained variance", "explained_variance", "{:.4f}"),
    ("  forgiving a constant offset", "explained_variance_centered", "{:.4f}"),
    ("mean squared error", "mse", "{:.5g}"),
    ("cosine similarity", "cosine_similarity", "{:.4f}"),
    ("L0", "l0", "{:.2f}"),
    ("dead latents", "dead_fraction", "{:.2%}"),
    ("cross-entropy", "ce", "{:.4f}"),
    ("cross-entropy recovered", "ce_recovered", "{:.4f}"),
    ("KL from the clean model", "kl", "{:.4f}"),
)


@final
class Eval:
    """Evaluate a saved SAE."""

    help: ClassVar[str] = "Evaluate a saved SAE in its language model on held-out text"

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Declare the options."""
        parser.add_argument("path", metavar="PATH", help="folder of the saved SAE")
        parser.add_argument(
            "--tokens", type=int, default=8_192, metavar="N", help="activations to evaluate on (default: 8192)"
        )
        parser.add_argument(
            "--text", metavar="FILE", help="evaluate on all of this .txt or .jsonl file instead of held-out text"
        )
        parser.add_argument("--device", default="auto", help="where model and SAE run (default: cuda if there is one)")
        parser.add_argument("--batch-prompts", type=int, default=8, metavar="N", help="windows at once (default: 8)")
        parser.add_argument("--seed", type=int, default=0, help="seed of the random SAE (default: 0)")
        parser.add_argument("--no-random", action="store_true", help="leave out the random SAE")
        parser.add_argument(
            "--set",
            dest="overrides",
            metavar="KEY=VALUE",
            action="append",
            default=[],
            help="change or supply a setting of the activation source, say model=NAME or text.split=test; may be repeated",
        )
        parser.add_argument(
            "--metric",
            dest="metrics",
            metavar="NAME",
            action="append",
            default=[],
            help="a further metric, see `sae-core list metrics`; may be repeated",
        )
        parser.add_argument("--json", action="store_true", help="print one JSON object")

    def run(self, args: argparse.Namespace) -> int:
        """Evaluate and print."""
        from sae_core import SAE
        from sae_core.config import require
        from sae_core.plugins import get_registry
        from tqdm.auto import tqdm

        from sae_lm.evaluate import evaluate_sae
        from sae_lm.model import place

        require(args.tokens > 0, f"--tokens must be positive, not {args.tokens}")
        require(args.batch_prompts > 0, f"--batch-prompts must be positive, not {args.batch_prompts}")
        more_metrics = [get_registry().resolve("metric", name) for name in args.metrics]
        sae = SAE.load(args.path, device=place(args.device))
        source = _source(sae.metadata, args)
        with tqdm(total=args.tokens, unit="token", disable=None) as bar:  # None: only on a terminal
            result = evaluate_sae(
                sae,
                source,
                tokens=args.tokens,
                part="held_out" if args.text is None else "all",
                batch_prompts=args.batch_prompts,
                baseline=not args.no_random,
                seed=args.seed,
                more_metrics=cast("list[type[Metric]]", more_metrics),
                progress=lambda done: bar.update(done - bar.n),
            )
        described = _described(source, args)
        _warn_of_other_python(sae.metadata, source)
        if result.activations < args.tokens:
            print(f"sae-core: the text holds only {result.activations:,} of {args.tokens:,} tokens", file=sys.stderr)
        if args.json:
            print(json.dumps({"sae": str(args.path), **described, **result.as_dict()}, indent=2))
        else:
            print(_report(result, described))
        return 0


def _source(metadata: Mapping[str, Any], args: argparse.Namespace) -> HuggingFaceSource:
    """The source the SAE was trained on, changed as the command line says."""
    from sae_core.config import require, structure
    from sae_core.errors import ConfigError
    from sae_core.yaml_text import set_by_override

    from sae_lm.source import HuggingFaceSource, HuggingFaceSourceConfig

    known = cast("Mapping[str, Any]", metadata.get("sae_lm") or {}).get("source", {})
    settings: dict[str, Any] = {**known, "device": args.device}
    for override in args.overrides:
        set_by_override(settings, override)
    if args.text is not None:
        settings["text"] = {"kind": "file", "path": str(Path(args.text))}
    missing = sorted({"model", "hook"} - set(settings))
    if missing:
        raise ConfigError(
            f"eval: {args.path} does not say on what it was trained; give {' and '.join(missing)}, "
            "for example: --set model=NAME --set hook=model.layers.9"
        )
    config = structure(settings, HuggingFaceSourceConfig, where="eval")
    require(
        args.text is not None or config.text.held_out > 0,
        "eval: no text was held out in training (text.held_out is 0); give other text with --text FILE",
    )
    return HuggingFaceSource(config)


def _warn_of_other_python(metadata: Mapping[str, Any], source: HuggingFaceSource) -> None:
    """The embedded text is another Python's when the interpreter changed, and with it what is held out."""
    trained = cast("Mapping[str, Any]", metadata.get("sae_lm") or {}).get("python")
    if source.config.text.kind == "stdlib" and trained not in (None, platform.python_version()):
        print(
            f"sae-core: the SAE was trained on the library of Python {trained}, this is {platform.python_version()}: "
            "where docstrings changed, the held-out text may resemble text trained on",
            file=sys.stderr,
        )


def _described(source: HuggingFaceSource, args: argparse.Namespace) -> dict[str, Any]:
    config = source.config
    text = f"{config.text.description}, " + ("all of it" if args.text else "documents held out from training")
    return {"model": config.model, "hook": str(source.point), "text": text, "context_size": config.context_size}


def _report(result: Evaluation, described: Mapping[str, Any]) -> str:
    from sae_core.cli.tables import table

    from sae_lm.evaluate import MASK_RULE

    titles = {"sae": "SAE", "random": "RANDOM SAE"}
    rows: list[Sequence[str]] = []
    known = {name for _, name, _ in _ROWS}
    more = dict.fromkeys(name for metrics in result.candidates.values() for name in metrics if name not in known)
    for label, name, form in [*_ROWS, *((name, name, "{:.5g}") for name in more)]:
        cells = [_cell(metrics.get(name), form) for metrics in result.candidates.values()]
        if any(cells):
            rows.append([label, *cells])
    lines = [f"{described['model']}, {described['hook']}", f"{described['text']}"]
    counts = f"{result.activations:,} activations in {result.windows:,} windows of {described['context_size']}"
    if result.predictions:
        counts += f", {result.predictions:,} next tokens"
        ends = f"Cross-entropy: clean {result.ce_clean:.4f}, with zeros {result.ce_zero_ablation:.4f} nats a token."
    else:
        ends = "The model predicts no next tokens, so there is no cross-entropy."
    lines += [counts, "", table(["", *(titles.get(name, name) for name in result.candidates)], rows), "", ends]
    return "\n".join([*lines, f"Mask: {MASK_RULE}."])


def _cell(value: float | None, form: str) -> str:
    return "" if value is None or value != value else form.format(value)
