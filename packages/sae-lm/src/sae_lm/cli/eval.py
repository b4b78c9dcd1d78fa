"""``sae-core eval PATH…``: what saved SAEs do to the language model they were trained on."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast, final

if TYPE_CHECKING:
    from sae_core import SAE

    from sae_lm.results import Evaluation
    from sae_lm.source import HuggingFaceSource

__all__ = ["Eval"]


@final
class Eval:
    """Evaluate saved SAEs."""

    help: ClassVar[str] = "Evaluate saved SAEs in their language model on held-out text"

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Declare the options."""
        parser.add_argument(
            "paths",
            metavar="PATH",
            nargs="+",
            help="folders of saved SAEs; several of one model are evaluated in one pass",
        )
        parser.add_argument(
            "--tokens", type=int, default=8_192, metavar="N", help="activations to evaluate on (default: 8192)"
        )
        parser.add_argument("--text", metavar="FILE", help="evaluate on all of this text file instead of held-out text")
        parser.add_argument(
            "--data", metavar="FILE", action="append", default=[],
            help="evaluate on activations in this .safetensors or .npy file or folder, without a model; may be repeated",
        )  # fmt: skip
        parser.add_argument("--device", default="auto", help="where model and SAE run (default: cuda if there is one)")
        parser.add_argument("--batch-prompts", type=int, default=8, metavar="N", help="windows at once (default: 8)")
        parser.add_argument(
            "--seed", type=int, default=0, help="seed of the random SAE and the resampling (default: 0)"
        )
        parser.add_argument("--no-random", action="store_true", help="leave out the random SAE of equal L0")
        parser.add_argument(
            "--resamples",
            type=int,
            default=1000,
            metavar="N",
            help="resamples for 95%% intervals, 0 for none (default: 1000)",
        )
        parser.add_argument(
            "--saelens", action="store_true", help="also the numbers that SAELens defines otherwise, under its names"
        )
        parser.add_argument(
            "--set", dest="overrides", metavar="KEY=VALUE", action="append", default=[],
            help="change or supply a setting of the activation source, say model=NAME or text.split=test; may be repeated",
        )  # fmt: skip
        parser.add_argument(
            "--metric", dest="metrics", metavar="NAME", action="append", default=[],
            help="a further metric, see `sae-core list metrics`; may be repeated",
        )  # fmt: skip
        parser.add_argument("--json", action="store_true", help="print one JSON object")
        parser.add_argument("--csv", metavar="FILE", help="also write the numbers as CSV")
        parser.add_argument("--html", metavar="FILE", help="also write a page")
        parser.add_argument("--no-save", action="store_true", help="do not keep the results beside the SAE")

    def run(self, args: argparse.Namespace) -> int:
        """Evaluate and print."""
        from sae_core import SAE
        from sae_core.config import require
        from sae_core.plugins import get_registry

        from sae_lm.model import place

        require(args.tokens > 0, f"--tokens must be positive, not {args.tokens}")
        require(args.batch_prompts > 0, f"--batch-prompts must be positive, not {args.batch_prompts}")
        require(args.resamples >= 0, f"--resamples must not be negative, it is {args.resamples}")
        require(not (args.data and args.text), "--data and --text: choose one")
        more_metrics: list[Any] = [get_registry().usable("metric", name) for name in args.metrics]
        names = _names(args.paths)
        saes = {name: SAE.load(path, device=place(args.device)) for name, path in zip(names, args.paths, strict=True)}
        of_columns = [name for name, sae in saes.items() if "columns" in (sae.metadata.get("sae_lm") or {})]
        require(
            not of_columns or len(of_columns) == len(saes),
            f"eval: {', '.join(of_columns)} read columns of a data set and the others text; run them apart",
        )
        evaluate = _on_activations if args.data else _on_columns if of_columns else _in_the_model
        result, facts = evaluate(saes, args, more_metrics)
        facts = {"sae": [str(path) for path in args.paths] if len(args.paths) > 1 else str(args.paths[0]), **facts}
        if not args.no_save:
            _keep(result, facts, names, args.paths)
        for target, content in ((args.csv, result.as_csv), (args.html, lambda: result.as_html(facts))):
            if target is not None:
                Path(target).write_text(content(), encoding="utf-8")
        if args.json:
            print(json.dumps({**facts, **result.as_dict()}, indent=2))
        else:
            print(_report(result, facts))
        return 0


def _names(paths: Sequence[str]) -> list[str]:
    """Short names for SAEs by their folders: as much of the path as tells them apart."""
    from sae_core.config import require

    if len(paths) == 1:
        return ["sae"]
    parts = [Path(path).resolve().parts for path in paths]
    require(len(set(parts)) == len(parts), "eval: an SAE is given twice")
    depth = 1
    while len({part[-depth:] for part in parts}) < len(parts):
        depth += 1
    return ["/".join(part[-depth:]) for part in parts]


def _on_activations(
    saes: Mapping[str, SAE[Any]], args: argparse.Namespace, more_metrics: Sequence[Any]
) -> tuple[Evaluation, dict[str, Any]]:
    """Numbers that need no model, on activations from files."""
    from itertools import islice

    from sae_core.data.tensor_files import TensorFiles, TensorFilesConfig

    from sae_lm.evaluation import evaluate_activations

    source = TensorFiles(TensorFilesConfig(paths=[Path(path) for path in args.data], shuffle=False))
    device = next(iter(saes.values())).device
    size = 1024

    def batches() -> Any:
        taken = (batch.to(device) for batch in source.batches(size))
        yield from islice(taken, -(-args.tokens // size))

    result = evaluate_activations(
        saes,
        batches,
        baseline=not args.no_random,
        seed=args.seed,
        saelens=args.saelens,
        resamples=args.resamples,
        more_metrics=more_metrics,
    )
    return result, {"data": ", ".join(args.data)}


def _on_columns(
    saes: Mapping[str, SAE[Any]], args: argparse.Namespace, more_metrics: Sequence[Any]
) -> tuple[Evaluation, dict[str, Any]]:
    """Numbers of reconstruction, on rows of a data set that were held out from training."""
    from sae_core.config import require
    from sae_core.yaml_text import set_by_override

    from sae_lm.columns import HuggingFaceColumns
    from sae_lm.evaluation import evaluate_activations

    require(args.text is None, "eval: --text is for SAEs of language models; this one reads columns of a data set")
    known = [cast("Mapping[str, Any]", sae.metadata["sae_lm"])["columns"] for sae in saes.values()]
    require(
        all(each == known[0] for each in known), "eval: the SAEs were trained with different settings; run them apart"
    )
    settings: dict[str, Any] = {**known[0], "device": args.device, "batch_rows": args.batch_prompts}
    for override in args.overrides:
        set_by_override(settings, override)
    source = HuggingFaceColumns.from_metadata({"sae_lm": {"columns": settings}})
    require(
        source.config.held_out > 0,
        "eval: no rows were held out in training (held_out is 0); give activations with --data",
    )

    def batches() -> Any:
        done = 0
        for batch in source.held_out_batches():
            yield batch
            done += len(batch.inputs)
            if done >= args.tokens:
                return

    result = evaluate_activations(
        saes,
        batches,
        baseline=not args.no_random,
        seed=args.seed,
        saelens=args.saelens,
        resamples=args.resamples,
        more_metrics=more_metrics,
    )
    reads = ", ".join(site.name for site in source.config.read_sites)
    writes = ", ".join(site.name for site in source.config.write_sites)
    return result, {
        "model": source.config.model,
        "hook": f"{reads} -> {writes}" if writes else reads,
        "data": f"{source.config.data.path}, rows held out from training",
    }


def _in_the_model(
    saes: Mapping[str, SAE[Any]], args: argparse.Namespace, more_metrics: Sequence[Any]
) -> tuple[Evaluation, dict[str, Any]]:
    from tqdm.auto import tqdm

    from sae_lm.evaluation import evaluate_saes
    from sae_lm.origin import source_of

    source, places, part = source_of(
        saes, overrides=args.overrides, text=args.text, device=args.device, command="eval", two_models=True
    )
    with tqdm(total=args.tokens, unit="token", disable=None) as bar:  # None: only on a terminal
        result = evaluate_saes(
            saes,
            source,
            at=places,
            tokens=args.tokens,
            part=part,
            batch_prompts=args.batch_prompts,
            baseline=not args.no_random,
            seed=args.seed,
            saelens=args.saelens,
            resamples=args.resamples,
            more_metrics=more_metrics,
            progress=lambda done: bar.update(done - bar.n),
        )
    for sae in saes.values():
        _warn_of_other_python(sae.metadata, source)
    if result.activations < args.tokens:
        print(f"sae-core: the text holds only {result.activations:,} of {args.tokens:,} tokens", file=sys.stderr)
    config = source.config
    held_out = "documents held out from training" if part == "held_out" else "all of it"
    return result, {
        "model": config.model,
        "hook": ", ".join(dict.fromkeys(result.places.values())),
        "text": f"{config.text.description}, {held_out}",
        "context_size": config.context_size,
    }


def _keep(result: Evaluation, facts: Mapping[str, Any], names: Sequence[str], paths: Sequence[str]) -> None:
    """Results beside each SAE that is a folder one can write to; otherwise it is said."""
    import os

    for name, path in zip(names, paths, strict=True):
        folder = Path(path)
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            print(f"sae-core: {path} is no folder to write to; the results are not kept beside it", file=sys.stderr)
            continue
        own = [candidate for candidate in result.candidates if candidate in (name, "random", f"{name}/random")]
        result.only(own).save(folder, {**facts, "sae": str(path)})


def _warn_of_other_python(metadata: Mapping[str, Any], source: HuggingFaceSource) -> None:
    """The embedded text is another Python's when the interpreter changed, and with it what is held out."""
    trained = cast("Mapping[str, Any]", metadata.get("sae_lm") or {}).get("python")
    if source.config.text.kind == "stdlib" and trained not in (None, platform.python_version()):
        print(
            f"sae-core: the SAE was trained on the library of Python {trained}, this is {platform.python_version()}: "
            "where docstrings changed, the held-out text may resemble text trained on",
            file=sys.stderr,
        )


def _report(result: Evaluation, facts: Mapping[str, Any]) -> str:
    from sae_core.cli.tables import table

    from sae_lm.metrics import DEFINITIONS
    from sae_lm.results import MASK_RULE, SUMMARIES

    known = {d.name: (d.label, d.form) for d in DEFINITIONS} | {k: (v[0], v[2]) for k, v in SUMMARIES.items()}
    known |= {f"second.{d.name}": (f"{d.label}, second model", d.form) for d in DEFINITIONS if d.group == "model"}
    found = dict.fromkeys(name for metrics in result.candidates.values() for name in metrics)
    rows: list[Sequence[str]] = []
    for name in [*(n for n in known if n in found), *(n for n in found if n not in known)]:
        label, form = known.get(name, (name, "{:.5g}"))
        cells = [_cell(metrics.get(name), form) for metrics in result.candidates.values()]
        spans = next(iter(result.intervals.values()), {}).get(name)
        if any(cells):
            between = f"{form.format(spans[0])} – {form.format(spans[1])}" if spans else ""
            rows.append([label, *cells, *([between] if result.intervals else [])])
    lines = [
        ", ".join(str(facts[key]) for key in ("model", "hook", "data") if key in facts),
        str(facts.get("text", "")),
    ]
    counts = f"{result.activations:,} activations in {result.windows:,} windows"
    counts += f" of {facts['context_size']}" if "context_size" in facts else ""
    if result.predictions:
        counts += f", {result.predictions:,} next tokens"
        ends = "Cross-entropies in nats a token."
    else:
        ends = "The model predicts no next tokens, so there is no cross-entropy." if "model" in facts else ""
    first = next(iter(result.candidates))
    heads = ["", *(_TITLES.get(name, name) for name in result.candidates)]
    heads += [f"95 % OF {_TITLES.get(first, first)}"] if result.intervals else []
    lines += [counts, "", table(heads, rows), "", ends, f"Mask: {MASK_RULE}."]
    return "\n".join(line for number, line in enumerate(lines) if line or number > 2)


_TITLES = {"sae": "SAE", "random": "RANDOM SAE"}


def _cell(value: float | None, form: str) -> str:
    return "" if value is None or value != value else form.format(value)
