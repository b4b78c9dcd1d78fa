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
from dataclasses import dataclass
from typing import Any, Protocol, final

import torch
from sae_core import SAE
from sae_core.codes import SparseCodes
from sae_core.config import require
from sae_core.errors import DataError
from sae_core.protocols import ActivationBatch, Metric
from torch import Tensor, nn
from torch.nn import functional

from sae_lm.baseline import RandomDictionary
from sae_lm.hooks import HookPoint, capture, edited
from sae_lm.inputs import evaluating as model_in_eval_mode
from sae_lm.inputs import model_inputs
from sae_lm.latents import select_rows
from sae_lm.metrics import WindowSums, intervals, values
from sae_lm.model import next_token_logits
from sae_lm.places import Place, Route, route_of, says_place
from sae_lm.results import MASK_RULE, Evaluation, Latents
from sae_lm.source import HuggingFaceSource
from sae_lm.splicing import evaluating
from sae_lm.text import Part
from sae_lm.tokens import TokenRules, Windows

__all__ = [
    "MASK_RULE",
    "Candidate",
    "Evaluation",
    "Reconstruct",
    "evaluate",
    "evaluate_activations",
    "evaluate_candidates",
    "evaluate_sae",
    "evaluate_saes",
    "first_tokens",
]

_LOGITS_AT_ONCE = 256  # rows of float32 log-probabilities in work at a time: they are as wide as the vocabulary
_CALIBRATION_ROWS = 2048
_RANDOM = "random"
_BLOCK = 128
_NOWHERE = Route((), ())


class Reconstruct(Protocol):
    """Maps activations (rows, d_in) to what stands in for them (rows, d_out), and to the codes between if there are any."""

    def __call__(self, x: Tensor, /) -> tuple[Tensor, SparseCodes | None]: ...


@final
@dataclass(frozen=True, eq=False)
class Calibration:
    """What the first pass found at the places of a route: rows (n, d_in) and (n, d_out), and the mean of all targets."""

    inputs: Tensor
    targets: Tensor
    mean: Tensor


@final
@dataclass(frozen=True, eq=False)
class Candidate:
    """Something to evaluate: where it reads and writes, and how to make the function that does it.

    With `sequences`, the function gets whole windows (windows, positions, d_in) and gives as many outputs. `sae` is the
    dictionary that weight statistics are of, if there is one.
    """

    route: Route
    make: Callable[[Calibration], Reconstruct]
    sequences: bool = False
    sae: SAE[Any] | None = None


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
    progress: Callable[[int], object] | None = None,
) -> Evaluation:
    """Evaluate SAEs of one model on about `tokens` positions of the source's held-out text, all in one pass over it.

    A dictionary's place is what `at` says of it, or else what its metadata say, or else the source's hook point. The mode it
    is in does not matter. With `baseline`, each has a random dictionary of equal L0 beside it: ``random``, or ``NAME/random``
    where there are several. `batch_prompts` windows run at a time. `saelens` adds the numbers that SAELens defines in another
    way, under its own names. `resamples` of the windows give 95 % confidence intervals. `more_metrics` make further metrics of
    the candidates that give codes. `progress` is called with the number of positions done.

    Raises ConfigError when a place is not there, DataError when the widths differ or there is no such text.
    """
    require(bool(saes), "eval: no SAE is given")
    model = source.language_model.model
    candidates: dict[str, Candidate] = {}
    for name, sae in saes.items():
        where = (at or {}).get(name) or _default_place(sae, source)
        route = route_of(sae, model, where)
        candidates[name] = Candidate(route, lambda _, sae=sae: _of_sae(sae), sae.reads_sequences, sae)
        if baseline:
            candidates[_baseline_name(name, saes)] = Candidate(
                route, lambda found, sae=sae: _random_like(sae, found, seed)
            )
    return evaluate(
        model,
        first_tokens(source.windows(part, rows=batch_prompts), tokens),
        candidates,
        rules=source.rules,
        saelens=saelens,
        resamples=resamples,
        seed=seed,
        more_metrics=more_metrics,
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
    saelens: bool = False,
    resamples: int = 1000,
    seed: int = 0,
    more_metrics: Sequence[Callable[[], Metric]] = (),
    progress: Callable[[int], object] | None = None,
) -> Evaluation:
    """Run `model` on every window of `stream` with each candidate in its place. Raises DataError when no position counts."""
    windows = [batch for batch in stream if len(batch)]
    routes = list(dict.fromkeys(candidate.route for candidate in candidates.values()))
    with model_in_eval_mode(model):
        found = _first_pass(model, windows, routes)
        run = _Run(model, rules, saelens, routes, found, candidates, more_metrics)
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
    scores: dict[str, _Scores] = {}
    for name, sae in saes.items():
        widths = rows[0].shape[1], rows[1].shape[1]
        if widths != (sae.d_in, sae.d_out):
            raise DataError(f"eval: the SAE maps {sae.d_in} to {sae.d_out} columns, the activations have {widths}")
        made = {name: Candidate(_NOWHERE, lambda _, sae=sae: _of_sae(sae), sae.reads_sequences, sae)}
        if baseline:
            made[_baseline_name(name, saes)] = Candidate(_NOWHERE, lambda f, sae=sae: _random_like(sae, f, seed))
        for key, candidate in made.items():
            scores[key] = _Scores(candidate, found, [make() for make in more_metrics], saelens)
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
    args, kwargs = model_inputs(model, one, _device(model))
    activation = capture(model, [point], *args, **kwargs)[str(point)]
    shape = tuple(activation.shape)
    if shape[:2] != tuple(one.tokens.shape) and shape[:1] != (one.tokens.numel(),):
        raise DataError(
            f"hook: the {point.at} of {point.module!r} has shape {shape} for tokens of shape {tuple(one.tokens.shape)}; it "
            "must begin with the same two dimensions, or with both joined"
        )
    return activation.numel() // one.tokens.numel()


def _device(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def _points(routes: Iterable[Route]) -> list[HookPoint]:
    return list(dict.fromkeys(place.point for route in routes for place in (*route.reads, *route.writes)))


def _rows(places: Sequence[Place], activations: Mapping[str, Tensor], windows: Windows) -> Tensor:
    """(windows * positions, width of all places)."""
    parts: list[Tensor] = []
    for place in places:
        read = place.read(activations[str(place.point)])
        if read.shape[:-1].numel() != windows.tokens.numel():
            raise DataError(
                f"eval: {place.point} has {tuple(activations[str(place.point)].shape)} activations for tokens of shape "
                f"{tuple(windows.tokens.shape)}"
            )
        parts.append(read.reshape(-1, place.width))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def _first_pass(model: nn.Module, windows: Sequence[Windows], routes: Sequence[Route]) -> dict[Route, Calibration]:
    """Means of what is written, and the first rows of everything; the model runs only as far as that takes."""
    sums: dict[Route, Tensor] = {}
    rows: dict[Route, list[tuple[Tensor, Tensor]]] = {route: [] for route in routes}
    kept = count = 0
    device, points = _device(model), _points(routes)
    for batch in windows:
        counting_K = batch.kept.flatten().nonzero().squeeze(1)
        if not len(counting_K):
            continue
        args, kwargs = model_inputs(model, batch, device)
        activations = capture(model, points, *args, **kwargs)
        count += len(counting_K)
        for route in routes:
            inputs = _rows(route.reads, activations, batch)
            targets = inputs if route.in_place else _rows(route.writes, activations, batch)
            here = counting_K.to(targets.device)
            total = targets[here].double().sum(0)
            sums[route] = sums[route] + total if route in sums else total
            if kept < _CALIBRATION_ROWS:
                rows[route].append((inputs[here].float(), targets[here].float()))
        kept += len(counting_K)
    if not count:
        raise DataError("eval: the text gives no token that counts")

    def first(parts: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(parts))[:_CALIBRATION_ROWS]

    return {
        route: Calibration(first([x for x, _ in rows[route]]), first([y for _, y in rows[route]]), sums[route] / count)
        for route in routes
    }


@final
class _Run:
    """The second pass: all sums of all candidates."""

    def __init__(
        self,
        model: nn.Module,
        rules: TokenRules,
        saelens: bool,
        routes: Sequence[Route],
        found: Mapping[Route, Calibration],
        candidates: Mapping[str, Candidate],
        more_metrics: Sequence[Callable[[], Metric]],
    ) -> None:
        self.model, self.rules, self.saelens = model, rules, saelens
        self.routes, self.found, self.candidates = routes, found, candidates
        self.points, self.device = _points(routes), _device(model)
        self.runs_to_the_end = not getattr(getattr(model, "config", None), "is_encoder_decoder", False)
        self.activations = self.predictions = self.windows = 0
        self.clean = WindowSums()
        self.ablated = {route: WindowSums() for route in routes}
        self.scores = {
            name: _Scores(candidate, found[candidate.route], [make() for make in more_metrics], saelens)
            for name, candidate in candidates.items()
        }

    def add(self, windows: Windows) -> None:
        """Run one batch."""
        args, kwargs = model_inputs(self.model, windows, self.device)
        counting_K = windows.kept.flatten().nonzero().squeeze(1)
        self.windows += len(windows)
        self.activations += len(counting_K)
        window_of = counting_K // windows.tokens.shape[1]
        activations, output = self._read(args, kwargs)
        clean = None
        if output is not None and (logits := self._logits(output, windows)) is not None:
            clean = _Losses(_Counted.of(windows, self.rules), logits, None, self.saelens)
        if clean is not None:
            self._add_clean(clean, windows)
        for name, candidate in self.candidates.items():
            route = candidate.route
            x = _rows(route.reads, activations, windows)
            target = x if route.in_place else _rows(route.writes, activations, windows)
            y = self.scores[name].add(x, target, counting_K, window_of, (len(windows), windows.tokens.shape[1]))
            if clean is not None:
                losses = clean.beside(self._spliced(route, counting_K, y, windows, args, kwargs))
                self.scores[name].sums.add(len(windows), *losses.of_predictions("ce", "kl"))
                if self.saelens:
                    losses.add_as_saelens(self.scores[name].sums, len(windows))
        if clean is not None:
            for route in self.routes:
                self._add_ablations(route, clean, counting_K, windows, args, kwargs)

    def result(self, resamples: int, seed: int) -> Evaluation:
        """All numbers."""
        clean = self.clean.by_window()
        metrics: dict[str, dict[str, float]] = {}
        spans: dict[str, dict[str, tuple[float, float]]] = {}
        for name, score in self.scores.items():
            route = self.candidates[name].route
            sums = {**clean, **self.ablated[route].by_window(), **score.sums.by_window()}
            spans[name] = intervals(sums, resamples=resamples, seed=seed)
            metrics[name] = {**values({**sums, **score.totals()}), **score.more()}
        return Evaluation(
            activations=self.activations,
            predictions=self.predictions,
            windows=self.windows,
            candidates=metrics,
            intervals=spans,
            places={name: str(candidate.route) for name, candidate in self.candidates.items()},
            latents={name: score.latents() for name, score in self.scores.items() if score.has_codes},
        )

    def _read(self, args: Any, kwargs: Any) -> tuple[dict[str, Tensor], Any]:
        """The activations at all points and the model's output, from one pass."""
        if not self.runs_to_the_end:
            return capture(self.model, self.points, *args, **kwargs), None
        seen: dict[str, Tensor] = {}

        def keep(point: HookPoint) -> Callable[[Tensor], None]:
            # Later modules may write into the tensor.
            return lambda activation: seen.update({str(point): activation.detach().clone()})

        with edited(self.model, {point: keep(point) for point in self.points}):
            output = self.model(*args, **kwargs)
        if len(seen) < len(self.points):
            capture(self.model, self.points, *args, **kwargs)  # says which module did not run
        return seen, output

    def _logits(self, output: Any, windows: Windows) -> Tensor | None:
        """(windows * positions, vocabulary), None for a model without next-token logits."""
        logits_RCV = next_token_logits(self.model, output, windows.tokens)
        return None if logits_RCV is None else logits_RCV.flatten(0, 1)

    def _spliced(self, route: Route, rows_K: Tensor, y_KW: Tensor, windows: Windows, args: Any, kwargs: Any) -> Tensor:
        """The model's logits with rows `y_KW` where they count, and the rest of the activation as it is."""
        changed: dict[HookPoint | str, Callable[[Tensor], Tensor]] = {}
        columns = y_KW.split([place.width for place in route.writes], dim=-1)
        for place, part in zip(route.writes, columns, strict=True):

            def put(activation: Tensor, place: Place = place, part: Tensor = part) -> Tensor:
                own = place.read(activation)
                flat = own.reshape(-1, place.width).to(torch.promote_types(own.dtype, part.dtype))
                flat = flat.index_copy(0, rows_K.to(flat.device), part.to(flat))
                return place.write(activation, flat.view(own.shape))

            changed[place.point] = put
        with edited(self.model, changed):
            logits = self._logits(self.model(*args, **kwargs), windows)
        assert logits is not None  # the clean run of the same model had logits
        return logits

    def _add_clean(self, clean: _Losses, windows: Windows) -> None:
        window_of, losses = clean.of_predictions("ce_clean")
        self.predictions += len(window_of)
        self.clean.add(len(windows), window_of, {"predictions": torch.ones(len(window_of)), **losses})
        if self.saelens:
            clean.add_as_saelens(self.clean, len(windows), "_clean")

    def _add_ablations(
        self,
        route: Route,
        clean: _Losses,
        counting_K: Tensor,
        windows: Windows,
        args: Any,
        kwargs: Any,
    ) -> None:
        width = sum(place.width for place in route.writes)
        mean = self.found[route].mean.float()
        zeros = torch.zeros(len(counting_K), width, device=mean.device)
        for name, rows in (("zero", zeros), ("mean", mean.expand(len(counting_K), -1))):
            losses = clean.beside(self._spliced(route, counting_K, rows, windows, args, kwargs))
            self.ablated[route].add(len(windows), *losses.of_predictions(f"ce_{name}", f"kl_{name}"))
        if self.saelens:
            everywhere = torch.arange(windows.tokens.numel())
            rows = torch.zeros(len(everywhere), width, device=mean.device)
            losses = clean.beside(self._spliced(route, everywhere, rows, windows, args, kwargs))
            losses.add_as_saelens(self.ablated[route], len(windows), "_zero")


@final
@dataclass(frozen=True, eq=False)
class _Counted:
    """Which positions (windows * positions,) of a batch count for what, and the token that follows each."""

    kept: Tensor
    counts: Tensor
    next: Tensor
    following: Tensor
    positions: int

    @classmethod
    def of(cls, windows: Windows, rules: TokenRules) -> _Counted:
        following_RC = windows.tokens[:, 1:]
        next_RC = windows.kept[:, :-1] & windows.attended[:, 1:]
        counts_RC = next_RC if rules.bos_id is None else next_RC & (following_RC != rules.bos_id)
        padded = [functional.pad(tensor, (0, 1)).flatten() for tensor in (counts_RC, next_RC, following_RC)]
        return cls(windows.kept.flatten(), padded[0], padded[1], padded[2], windows.tokens.shape[1])


@final
class _Losses:
    """Cross-entropy of next tokens, and KL from the clean run, of one run over a batch.

    They are measured at the positions whose next token counts, with `saelens` at all that are kept.
    """

    def __init__(self, counted: _Counted, logits_PV: Tensor, clean: _Losses | None, saelens: bool) -> None:
        self._counted, self._logits_PV, self._clean, self._saelens = counted, logits_PV, clean, saelens
        where = counted.kept if saelens else counted.counts
        self.ce = torch.zeros(len(where), dtype=torch.float64)
        self.kl = torch.zeros(len(where), dtype=torch.float64)
        device = logits_PV.device
        for at in where.nonzero().squeeze(1).split(_LOGITS_AT_ONCE):
            here = at.to(device)
            log_q = logits_PV[here].float().log_softmax(-1)
            targets = counted.following[at].to(device).unsqueeze(1)
            self.ce[at] = -log_q.gather(1, targets).squeeze(1).double().cpu()
            if clean is not None:
                log_p = clean._logits_PV[here].float().log_softmax(-1)
                self.kl[at] = (log_p.exp() * (log_p - log_q)).sum(-1).double().cpu()

    def beside(self, logits_PV: Tensor) -> _Losses:
        """Those of another run over the same batch, with KL from this one."""
        return _Losses(self._counted, logits_PV, self, self._saelens)

    def of_predictions(self, *names: str) -> tuple[Tensor, dict[str, Tensor]]:
        """The windows of the next tokens that count, and by name their cross-entropies and, if named, KL."""
        at = self._counted.counts.nonzero().squeeze(1)
        losses = dict(zip(names, (self.ce[at], self.kl[at]), strict=False))
        return at // self._counted.positions, losses

    def add_as_saelens(self, sums: WindowSums, windows: int, end: str = "") -> None:
        """Add these losses over SAELens's positions: all kept ones that have a next token, and for KL the last one too."""
        positions = self._counted.positions
        following, everywhere = (mask.nonzero().squeeze(1) for mask in (self._counted.next, self._counted.kept))
        sums.add(windows, following // positions, {f"saelens_ce{end}": self.ce[following]})
        if self._clean is None:
            sums.add(windows, following // positions, {"saelens_next": torch.ones(len(following))})
            sums.add(windows, everywhere // positions, {"saelens_all": torch.ones(len(everywhere))})
        else:
            sums.add(windows, everywhere // positions, {f"saelens_kl{end}": self.kl[everywhere]})


@final
class _Scores:
    """All sums of one candidate."""

    def __init__(self, candidate: Candidate, found: Calibration, more: Sequence[Metric], saelens: bool = False) -> None:
        self._candidate, self._more_metrics, self._saelens = candidate, more, saelens
        self.sequences = candidate.sequences
        self._reconstruct = candidate.make(found)
        self._mean = found.mean
        self.sums = WindowSums()
        self.has_codes = False
        self._residual: Tensor | None = None
        self._rows = 0
        self._counts: Tensor | None = None
        self._windows_fired: Tensor | None = None
        self._total: Tensor | None = None
        self._largest: Tensor | None = None

    def add(
        self, x_PW: Tensor, target_PW: Tensor, counting_K: Tensor, window_of: Tensor, shape: tuple[int, int]
    ) -> Tensor:
        """Account for one batch of `shape` (windows, positions); return the outputs (K, d_out) where positions count."""
        here = counting_K.to(x_PW.device)
        if self._candidate.sequences:
            y, codes = self._reconstruct(x_PW.view(*shape, -1))
            y_KW = y.reshape(len(x_PW), -1)[here]
            if codes is not None:
                codes = select_rows(codes.reshape(codes.rows), here.to(codes.device))
        else:
            y_KW, codes = self._reconstruct(x_PW[here])
        target_KW = target_PW[here]
        if y_KW.shape != target_KW.shape:
            raise DataError(f"eval: outputs of shape {tuple(y_KW.shape)} for activations {tuple(target_KW.shape)}")
        self._add_rows(target_KW, y_KW, codes, window_of, shape[0])
        if codes is not None:
            self._add_codes(codes, window_of)
            for metric in self._more_metrics:
                metric.update(target_KW, y_KW, codes)
        return y_KW

    def totals(self) -> dict[str, Tensor]:
        """Sums that are not sums of windows."""
        if self._residual is None:
            return {}
        return {"error_of_mean": (self._residual.square().sum() / self._rows).cpu()}

    def more(self) -> dict[str, float]:
        """Numbers that are not quotients of sums, and further metrics."""
        found: dict[str, float] = {}
        if self._counts is not None:
            found |= self.latents().summary()
            for metric in self._more_metrics:
                found.update(metric.compute())
        return found

    def latents(self) -> Latents:
        """What is known of each latent."""
        assert self._counts is not None
        assert self._windows_fired is not None
        assert self._total is not None
        assert self._largest is not None
        return Latents.of(
            counts=self._counts,
            windows=self._windows_fired,
            totals=self._total,
            largest=self._largest,
            rows=self._rows,
            sae=self._candidate.sae,
        )

    def _add_rows(self, x: Tensor, y: Tensor, codes: SparseCodes | None, window_of: Tensor, windows: int) -> None:
        x, y = x.double(), y.to(x.device).double()
        mean = self._mean.to(x)
        residual = x - y
        self._rows += len(x)
        self._residual = residual.sum(0) + (0 if self._residual is None else self._residual)
        norm_in, norm_out, dot = x.norm(dim=1), y.norm(dim=1), (x * y).sum(1)
        both = norm_in * norm_out
        tiny = torch.finfo(torch.float64).tiny
        error, spread = residual.square().sum(1), (x - mean).square().sum(1)
        quantities = {
            "positions": torch.ones(len(x)),
            "error": error,
            "spread": spread,
            "cosine": torch.where(both > 0, dot / both.clamp_min(tiny), 0.0),
            "norm_in": norm_in,
            "norm_out": norm_out,
            "nonzero": (norm_in > 0).double(),
            "norm_ratio": torch.where(norm_in > 0, norm_out / norm_in.clamp_min(tiny), 0.0),
            "square_out": norm_out.square(),
            "dot": dot,
        }
        if self._saelens:
            quantities["legacy"] = torch.where(spread > 0, 1 - error / spread.clamp_min(tiny), 0.0)
        if codes is not None:
            quantities["l0"] = codes.l0().double()
            quantities["l1"] = codes.row_sums(codes.values.abs()).double()
        self.sums.add(windows, window_of, quantities)

    def _add_codes(self, codes: SparseCodes, window_of: Tensor) -> None:
        self.has_codes = True
        codes = codes.detach()
        values_ = codes.values.double()
        d_sae = codes.d_sae
        if self._counts is None:
            self._counts = torch.zeros(d_sae, dtype=torch.long, device=codes.device)
            self._windows_fired = torch.zeros_like(self._counts)
            self._total = torch.zeros(d_sae, dtype=torch.float64, device=codes.device)
            self._largest = torch.zeros(d_sae, dtype=torch.float64, device=codes.device)
        assert self._windows_fired is not None
        assert self._total is not None
        assert self._largest is not None
        self._counts += codes.firing_counts()
        self._total.index_add_(0, codes.indices, values_)
        self._largest.scatter_reduce_(0, codes.indices, values_.abs(), "amax")
        active = codes.values != 0
        keys = window_of.to(codes.device)[codes.row_ids()[active]] * d_sae + codes.indices[active]
        self._windows_fired += torch.bincount(keys.unique() % d_sae, minlength=d_sae)
