"""How well reconstructions stand in for activations inside the model they came from.

Windows of tokens run through the model clean, with each candidate's output in place of the activation, with zeros there, and
with the mean. One mask decides everything: a position counts if the token policy keeps it. Only such positions are replaced
and enter the reconstruction metrics; all others, BOS for instance, pass through untouched. The cross-entropy of a next token
counts where the position that predicts it counts, and the token itself is neither padding nor BOS. What each number means is
written in `sae_lm.metrics`.

A first pass, which stops at the places looked at, finds the mean activation and rows to fit the random dictionary to. In the
second one all candidates share the clean run, so many dictionaries of one model cost little more than one.

`evaluate_candidates` takes any function as a candidate. `evaluate_sae` and `evaluate_saes` put a random dictionary of equal
L0 beside each SAE: a number is only as good as its distance to that one's.
"""

# R windows (rows), C positions in a window, K positions that count, N predictions that count, V vocabulary, W widths

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, final

import torch
from sae_core import SAE
from sae_core.codes import SparseCodes
from sae_core.config import require
from sae_core.errors import DataError
from sae_core.protocols import ActivationBatch, Metric
from torch import Tensor, nn

from sae_lm.ablations import Reference, Side, device_of, first_pass, rows_at
from sae_lm.baseline import RandomDictionary
from sae_lm.hooks import HookPoint, capture
from sae_lm.inputs import evaluating as model_in_eval_mode
from sae_lm.inputs import model_inputs
from sae_lm.metrics import WindowSums, intervals, values
from sae_lm.places import Place, Route, route_of, says_place
from sae_lm.results import MASK_RULE, Evaluation
from sae_lm.scoring import Calibration, Candidate, Reconstruct, Scores
from sae_lm.source import HuggingFaceSource
from sae_lm.splicing import evaluating
from sae_lm.text import Part
from sae_lm.tokens import TokenRules, Windows

__all__ = [
    "MASK_RULE",
    "Candidate",
    "Evaluation",
    "Reconstruct",
    "Reference",
    "evaluate",
    "evaluate_activations",
    "evaluate_candidates",
    "evaluate_sae",
    "evaluate_saes",
    "first_tokens",
]

_CALIBRATION_ROWS = 2048
_RANDOM = "random"
_BLOCK = 128
_NOWHERE = Route((), ())
_SECOND = "second."


def evaluate_sae(
    sae: SAE[Any],
    source: HuggingFaceSource,
    *,
    at: str | None = None,
    tokens: int = 8_192,
    part: Part = "held_out",
    batch_prompts: int = 8,
    baseline: bool = True,
    seed: int = 0,
    saelens: bool = False,
    resamples: int = 1000,
    more_metrics: Sequence[Callable[[], Metric]] = (),
    progress: Callable[[int], object] | None = None,
) -> Evaluation:
    """`evaluate_saes` of one: the candidates are ``sae`` and, with `baseline`, ``random``."""
    return evaluate_saes(
        {"sae": sae},
        source,
        at={} if at is None else {"sae": at},
        tokens=tokens,
        part=part,
        batch_prompts=batch_prompts,
        baseline=baseline,
        seed=seed,
        saelens=saelens,
        resamples=resamples,
        more_metrics=more_metrics,
        progress=progress,
    )


def evaluate_saes(
    saes: Mapping[str, SAE[Any]],
    source: HuggingFaceSource,
    *,
    at: Mapping[str, str] | None = None,
    tokens: int = 8_192,
    part: Part = "held_out",
    batch_prompts: int = 8,
    baseline: bool = True,
    seed: int = 0,
    saelens: bool = False,
    resamples: int = 1000,
    more_metrics: Sequence[Callable[[], Metric]] = (),
    reference: Reference | None = None,
    progress: Callable[[int], object] | None = None,
) -> Evaluation:
    """Evaluate SAEs of one model on about `tokens` positions of the source's held-out text, all in one pass over it.

    A dictionary's place is what `at` says of it, or else what its metadata say, or else the source's hook point. One that reads
    a second model is put back into both; the numbers of the second one begin with ``second.``. The mode a dictionary is in does
    not matter. With `baseline`, each has a random dictionary of equal L0 beside it: ``random``, or ``NAME/random`` where there
    are several. `batch_prompts` windows run at a time. `saelens` adds the numbers that SAELens defines in another way, under
    its own names. `resamples` of the windows give 95 % confidence intervals. `more_metrics` make further metrics of the
    candidates that give codes. `reference` is kept from one evaluation to the next of the same text, and leaves out KL.
    `progress` is called with the number of positions done.

    Raises ConfigError when a place is not there, DataError when the widths differ or there is no such text.
    """
    require(bool(saes), "eval: no SAE is given")
    model = source.language_model.model
    second = source.second_language_model.model if source.config.second_model is not None else None
    candidates: dict[str, Candidate] = {}
    for name, sae in saes.items():
        where = (at or {}).get(name) or _default_place(sae, source)
        route = route_of(sae, model, where, second_model=second)
        candidates[name] = Candidate(route, lambda _, sae=sae: _of_sae(sae), sae.reads_sequences, sae)
        if baseline:
            candidates[_baseline_name(name, saes)] = Candidate(
                route, lambda found, sae=sae: _random_like(sae, found, seed)
            )
    with source.model_in_use:
        return evaluate(
            model,
            first_tokens(source.windows(part, rows=batch_prompts), tokens),
            candidates,
            rules=source.rules,
            second_model=second,
            saelens=saelens,
            resamples=resamples,
            seed=seed,
            more_metrics=more_metrics,
            reference=reference,
            progress=progress,
        )


def evaluate_candidates(
    model: nn.Module,
    point: HookPoint | str,
    stream: Iterable[Windows],
    candidates: Mapping[str, Reconstruct],
    *,
    rules: TokenRules,
    saelens: bool = False,
    resamples: int = 1000,
    more_metrics: Sequence[Callable[[], Metric]] = (),
    progress: Callable[[int], object] | None = None,
) -> Evaluation:
    """Run `model` on every window with what each function makes of the activation at `point` in its place.

    Raises DataError when no position counts.
    """
    windows = list(stream)
    point = HookPoint.parse(point) if isinstance(point, str) else point
    width = _width_at(model, point, windows)
    route = Route(place := (Place(point=point, width=width),), place)
    return evaluate(
        model,
        windows,
        {name: Candidate(route, lambda _, function=function: function) for name, function in candidates.items()},
        rules=rules,
        saelens=saelens,
        resamples=resamples,
        more_metrics=more_metrics,
        progress=progress,
    )


@torch.no_grad()
def evaluate(
    model: nn.Module,
    stream: Iterable[Windows],
    candidates: Mapping[str, Candidate],
    *,
    rules: TokenRules,
    second_model: nn.Module | None = None,
    saelens: bool = False,
    resamples: int = 1000,
    seed: int = 0,
    more_metrics: Sequence[Callable[[], Metric]] = (),
    reference: Reference | None = None,
    progress: Callable[[int], object] | None = None,
) -> Evaluation:
    """Run `model` on every window of `stream` with each candidate in its place. Raises DataError when no position counts."""
    windows = [batch for batch in stream if len(batch)]
    routes = list(dict.fromkeys(candidate.route for candidate in candidates.values()))
    models = {False: model} if second_model is None else {False: model, True: second_model}
    known = Reference() if reference is None else reference
    with ExitStack() as modes:
        for each in models.values():
            modes.enter_context(model_in_eval_mode(each))
        unknown = [route for route in routes if route not in known.found]
        known.found |= first_pass(models, windows, unknown) if unknown else {}
        sides = [
            Side(each, second, routes, rules, known, saelens=saelens, divergences=reference is None)
            for second, each in models.items()
        ]
        run = _Run(sides, known, candidates, more_metrics, saelens)
        for batch in windows:
            run.add(batch)
            if progress is not None:
                progress(run.activations)
    return run.result(resamples, seed)


@torch.no_grad()
def evaluate_activations(
    saes: Mapping[str, SAE[Any]],
    batches: Callable[[], Iterable[Tensor | ActivationBatch]],
    *,
    baseline: bool = True,
    seed: int = 0,
    saelens: bool = False,
    resamples: int = 1000,
    more_metrics: Sequence[Callable[[], Metric]] = (),
) -> Evaluation:
    """Evaluate SAEs on activations alone: all numbers that need no model.

    `batches` starts a pass over the same batches, (rows, d_in), with targets (rows, d_out) for transcoders, or (sequences,
    positions, width) for dictionaries that read sequences. Two passes are made. Intervals are over blocks of 128 rows, or over
    sequences. Raises DataError when there is no row, or when a dictionary has another width.
    """
    names = [name for sae in saes for name in ((sae, _baseline_name(sae, saes)) if baseline else (sae,))]
    total, count, first = None, 0, list[tuple[Tensor, Tensor]]()
    for batch in batches():
        inputs, targets = (part.reshape(-1, part.shape[-1]) for part in _pair(batch))
        total = targets.double().sum(0) + (0 if total is None else total)
        if count < _CALIBRATION_ROWS:
            first.append((inputs.float(), targets.float()))
        count += len(inputs)
    if total is None or not count:
        raise DataError("eval: there are no activations")
    rows = [torch.cat(parts)[:_CALIBRATION_ROWS] for parts in zip(*first, strict=True)]
    found = Calibration(rows[0], rows[1], total / count)
    scores: dict[str, Scores] = {}
    for name, sae in saes.items():
        widths = rows[0].shape[1], rows[1].shape[1]
        if widths != (sae.d_in, sae.d_out):
            raise DataError(f"eval: the SAE maps {sae.d_in} to {sae.d_out} columns, the activations have {widths}")
        made = {name: Candidate(_NOWHERE, lambda _, sae=sae: _of_sae(sae), sae.reads_sequences, sae)}
        if baseline:
            made[_baseline_name(name, saes)] = Candidate(_NOWHERE, lambda f, sae=sae: _random_like(sae, f, seed))
        for key, candidate in made.items():
            scores[key] = Scores(candidate, found, [make() for make in more_metrics], saelens)
    windows = 0
    for batch in batches():
        inputs, targets = _pair(batch)
        blocks = (-(-len(inputs) // _BLOCK), _BLOCK)
        shape = (inputs.shape[0], inputs.shape[1]) if inputs.dim() == 3 else blocks
        every = torch.arange(inputs.shape[:-1].numel())
        for score in scores.values():
            if score.sequences and inputs.dim() != 3:
                raise DataError("eval: this dictionary reads sequences; give activations (sequences, positions, width)")
            flat, goal = inputs.reshape(-1, inputs.shape[-1]), targets.reshape(-1, targets.shape[-1])
            score.add(flat, goal, every, every // shape[1], shape)
        windows += shape[0]
    spans: dict[str, Any] = {}
    metrics: dict[str, Any] = {}
    for name in names:
        sums = scores[name].sums.by_window()
        spans[name] = intervals(sums, resamples=resamples, seed=seed)
        metrics[name] = {**values({**sums, **scores[name].totals()}), **scores[name].more()}
    return Evaluation(
        activations=count,
        predictions=0,
        windows=windows,
        candidates=metrics,
        intervals=spans,
        places=dict.fromkeys(names, "activations"),
        latents={name: scores[name].latents() for name in names},
    )


def first_tokens(stream: Iterable[Windows], count: int) -> Iterator[Windows]:
    """The first windows that together hold `count` positions that count; the same ones however they are batched."""
    for windows in stream:
        totals_R = windows.kept.sum(1).cumsum(0)
        needed = int((totals_R < count).sum()) + 1  # the window that reaches `count` is the last
        yield Windows(windows.tokens[:needed], windows.attended[:needed], windows.kept[:needed])
        count -= int(totals_R[-1])
        if count <= 0:
            return


def _baseline_name(name: str, saes: Mapping[str, SAE[Any]]) -> str:
    return _RANDOM if len(saes) == 1 else f"{name}/{_RANDOM}"


def _pair(batch: Tensor | ActivationBatch) -> tuple[Tensor, Tensor]:
    """Inputs, and what the outputs stand for."""
    if isinstance(batch, ActivationBatch):
        return batch.inputs, batch.inputs if batch.targets is None else batch.targets
    return batch, batch


def _default_place(sae: SAE[Any], source: HuggingFaceSource) -> str | None:
    """Where the source hooks the model, for a dictionary that does not say where it belongs."""
    if says_place(sae):
        return None
    reads, writes = (
        ", ".join(site.name for site in sites) for sites in (source.config.read_sites, source.config.write_sites)
    )
    return reads if sae.reconstructs_input else f"{reads} -> {writes}" if writes else None


def _of_sae(sae: SAE[Any]) -> Reconstruct:
    def reconstruct(x: Tensor, /) -> tuple[Tensor, SparseCodes | None]:
        given = x.to(sae.device, sae.dtype)
        with evaluating(sae):
            codes = sae.encode_sparse(given)
            return sae.decode(codes, x=given).to(x.device), codes

    return reconstruct


def _random_like(sae: SAE[Any], found: Calibration, seed: int) -> RandomDictionary:
    """A random dictionary with as many latents, and on these rows as many of them active, as `sae`."""
    with evaluating(sae):
        l0 = sae.encode_sparse(found.inputs.to(sae.device, sae.dtype)).l0().double().mean().item()
    return RandomDictionary(found.inputs, found.targets, sae.d_sae, l0, in_place=sae.reconstructs_input, seed=seed)


def _width_at(model: nn.Module, point: HookPoint, windows: Sequence[Windows]) -> int:
    if not windows:
        raise DataError("eval: the text gives no token that counts")
    batch = windows[0]
    one = Windows(batch.tokens[:1], batch.attended[:1], batch.kept[:1])
    args, kwargs = model_inputs(model, one, device_of(model))
    activation = capture(model, [point], *args, **kwargs)[str(point)]
    shape = tuple(activation.shape)
    if shape[:2] != tuple(one.tokens.shape) and shape[:1] != (one.tokens.numel(),):
        raise DataError(
            f"hook: the {point.at} of {point.module!r} has shape {shape} for tokens of shape {tuple(one.tokens.shape)}; it "
            "must begin with the same two dimensions, or with both joined"
        )
    return activation.numel() // one.tokens.numel()


@final
class _Run:
    """The second pass: all sums of all candidates."""

    def __init__(
        self,
        sides: Sequence[Side],
        known: Reference,
        candidates: Mapping[str, Candidate],
        more_metrics: Sequence[Callable[[], Metric]],
        saelens: bool,
    ) -> None:
        self.sides, self.candidates, self.saelens = sides, candidates, saelens
        self.activations = self.windows = 0
        self.scores = {
            name: Scores(candidate, known.found[candidate.route], [make() for make in more_metrics], saelens)
            for name, candidate in candidates.items()
        }
        self.losses = {(side.second, name): WindowSums() for side in sides for name in candidates}

    def add(self, windows: Windows) -> None:
        """Run one batch."""
        counting_K = windows.kept.flatten().nonzero().squeeze(1)
        self.windows += len(windows)
        self.activations += len(counting_K)
        window_of = counting_K // windows.tokens.shape[1]
        activations: dict[str, Tensor] = {}
        for side in self.sides:
            activations |= side.read(windows)
        for name, candidate in self.candidates.items():
            route = candidate.route
            x = rows_at(route.reads, activations, windows)
            target = x if route.in_place else rows_at(route.writes, activations, windows)
            y = self.scores[name].add(x, target, counting_K, window_of, (len(windows), windows.tokens.shape[1]))
            for side in self.sides:
                if side.writes(route):
                    losses, sums = side.losses_with(route, counting_K, y, windows), self.losses[side.second, name]
                    sums.add(len(windows), *losses.of_predictions(*(("ce", "kl") if side.divergences else ("ce",))))
                    if self.saelens:
                        losses.add_as_saelens(sums, len(windows))
        for side in self.sides:
            side.ablate(counting_K, windows)

    def result(self, resamples: int, seed: int) -> Evaluation:
        """All numbers."""
        metrics: dict[str, dict[str, float]] = {}
        spans: dict[str, dict[str, tuple[float, float]]] = {}
        for name, score in self.scores.items():
            metrics[name], spans[name] = {}, {}
            for side in self.sides:
                sums = {**side.sums(self.candidates[name].route), **self.losses[side.second, name].by_window()}
                more: dict[str, Tensor] = {}
                if not side.second:
                    sums, more = {**sums, **score.sums.by_window()}, score.totals()
                before = _SECOND if side.second else ""
                metrics[name] |= {before + key: value for key, value in values({**sums, **more}).items()}
                found = intervals(sums, resamples=resamples, seed=seed)
                spans[name] |= {before + key: value for key, value in found.items()}
            metrics[name] |= score.more()
        return Evaluation(
            activations=self.activations,
            predictions=max(side.predictions for side in self.sides),
            windows=self.windows,
            candidates=metrics,
            intervals=spans,
            places={name: str(candidate.route) for name, candidate in self.candidates.items()},
            latents={name: score.latents() for name, score in self.scores.items() if score.has_codes},
        )
