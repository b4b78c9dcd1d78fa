"""One model in an evaluation: run clean, with outputs of candidates in place of its activations, with zeros and with the mean.

An evaluation has one `Side`, or two for dictionaries that read two models: each model gets back what belongs to it, and its
losses are counted by themselves. `Reference` holds what no dictionary changes, so that it need not be run again when the same
windows serve more than once, as they do during training.
"""

# K positions that count, P = windows * positions, V vocabulary, W widths

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, final

import torch
from sae_core.errors import DataError
from torch import Tensor, nn

from sae_lm.hooks import HookPoint, capture, edited
from sae_lm.inputs import model_inputs
from sae_lm.metrics import WindowSums
from sae_lm.model import next_token_logits
from sae_lm.places import Place, Route
from sae_lm.scoring import Calibration, Counted, Losses
from sae_lm.tokens import TokenRules, Windows

__all__ = ["Reference", "Side", "device_of", "first_pass", "rows_at"]

_CALIBRATION_ROWS = 2048


@final
class Reference:
    """What of an evaluation no dictionary changes: what a first pass found, and the losses of the clean and the ablated model.

    An evaluation fills it. Given to another one of the same windows, it is not found out again; there is no KL then, since that
    needs the clean model's logits.
    """

    def __init__(self) -> None:
        self.found: dict[Route, Calibration] = {}
        self.clean: dict[bool, WindowSums] = {}
        self.ablated: dict[tuple[bool, Route], WindowSums] = {}
        self.predicts: dict[bool, bool] = {}


@final
class Side:
    """One of the models: where it is read and written, and its sums in `known`, which grow where they are not there yet."""

    def __init__(
        self,
        model: nn.Module,
        second: bool,
        routes: Sequence[Route],
        rules: TokenRules,
        known: Reference,
        *,
        saelens: bool,
        divergences: bool,
    ) -> None:
        self.model, self.second, self.device = model, second, device_of(model)
        self.points = list(
            dict.fromkeys(p.point for route in routes for p in (*route.reads, *route.writes) if p.second == second)
        )
        self._rules, self._known, self._saelens, self.divergences = rules, known, saelens, divergences
        self._runs_to_the_end = not getattr(getattr(model, "config", None), "is_encoder_decoder", False)
        self._wants_clean = second not in known.clean
        written = [route for route in routes if any(place.second == second for place in route.writes)]
        self._to_ablate = [route for route in written if (second, route) not in known.ablated]
        self.clean = known.clean.setdefault(second, WindowSums())
        for route in self._to_ablate:
            known.ablated[second, route] = WindowSums()
        self._losses: Losses | None = None
        self._arguments: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})

    @property
    def predictions(self) -> int:
        """How many next tokens count."""
        return int(self.clean.by_window().get("predictions", torch.zeros(0)).sum())

    @property
    def predicts(self) -> bool:
        """Whether the model predicts next tokens, as far as is known."""
        return self._known.predicts.get(self.second, False)

    def read(self, windows: Windows) -> dict[str, Tensor]:
        """The activations at all points, by the names of their places; from the clean pass, if that is still to be counted."""
        self._arguments = model_inputs(self.model, windows, self.device)
        self._losses = None
        args, kwargs = self._arguments
        if not (self._runs_to_the_end and (self._wants_clean or self.divergences)):
            self._known.predicts.setdefault(self.second, False)
            return self._named(capture(self.model, self.points, *args, **kwargs))
        seen: dict[str, Tensor] = {}

        def keep(point: HookPoint) -> Callable[[Tensor], None]:
            # Later modules may write into the tensor.
            return lambda activation: seen.update({str(point): activation.detach().clone()})

        with edited(self.model, {point: keep(point) for point in self.points}):
            output = self.model(*args, **kwargs)
        if len(seen) < len(self.points):
            capture(self.model, self.points, *args, **kwargs)  # says which module did not run
        logits_PV = self._logits(output, windows)
        self._known.predicts[self.second] = logits_PV is not None
        if logits_PV is not None:
            self._losses = Losses(Counted.of(windows, self._rules), logits_PV, None, self._saelens)
            if self._wants_clean:
                self._add_clean(self._losses, len(windows))
        return self._named(seen)

    def losses_with(self, route: Route, rows_K: Tensor, y_KW: Tensor, windows: Windows) -> Losses:
        """The losses with rows `y_KW`, the columns of all that `route` writes, where they count."""
        logits_PV = self._spliced(route, rows_K, y_KW, windows)
        if self._losses is not None and self.divergences:
            return self._losses.beside(logits_PV)
        return Losses(Counted.of(windows, self._rules), logits_PV, None, self._saelens)

    def ablate(self, counting_K: Tensor, windows: Windows) -> None:
        """Count the losses with zeros and with the mean, where that is still to be done."""
        for route in self._to_ablate if self.predicts else ():
            sums = self._known.ablated[self.second, route]
            width = sum(place.width for place in route.writes)
            mean = self._known.found[route].mean.float()
            zeros = torch.zeros(len(counting_K), width, device=mean.device)
            for name, rows in (("zero", zeros), ("mean", mean.expand(len(counting_K), -1))):
                losses = self.losses_with(route, counting_K, rows, windows)
                names = (f"ce_{name}", f"kl_{name}") if self.divergences else (f"ce_{name}",)
                sums.add(len(windows), *losses.of_predictions(*names))
            if self._saelens:
                everywhere = torch.arange(windows.tokens.numel())
                rows = torch.zeros(len(everywhere), width, device=mean.device)
                self.losses_with(route, everywhere, rows, windows).add_as_saelens(sums, len(windows), "_zero")

    def writes(self, route: Route) -> bool:
        """Whether a candidate with this route changes this model, and the model predicts something."""
        return self.predicts and any(place.second == self.second for place in route.writes)

    def sums(self, route: Route) -> dict[str, Tensor]:
        """(windows,) sums of the clean and the ablated model."""
        ablated = self._known.ablated.get((self.second, route))
        return {**self.clean.by_window(), **({} if ablated is None else ablated.by_window())}

    def _named(self, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {Place(point=p, width=0, second=self.second).name: found[str(p)] for p in self.points}

    def _logits(self, output: Any, windows: Windows) -> Tensor | None:
        """(windows * positions, vocabulary), None for a model without next-token logits."""
        logits_RCV = next_token_logits(self.model, output, windows.tokens)
        return None if logits_RCV is None else logits_RCV.flatten(0, 1)

    def _spliced(self, route: Route, rows_K: Tensor, y_KW: Tensor, windows: Windows) -> Tensor:
        """The model's logits with rows `y_KW` where they count, and the rest of the activation as it is."""
        changed: dict[HookPoint | str, Callable[[Tensor], Tensor]] = {}
        columns = y_KW.split([place.width for place in route.writes], dim=-1)
        for place, part in zip(route.writes, columns, strict=True):
            if place.second != self.second:
                continue

            def put(activation: Tensor, place: Place = place, part: Tensor = part) -> Tensor:
                own = place.read(activation)
                flat = own.reshape(-1, place.width).to(torch.promote_types(own.dtype, part.dtype))
                flat = flat.index_copy(0, rows_K.to(flat.device), part.to(flat))
                return place.write(activation, flat.view(own.shape))

            changed[place.point] = put
        args, kwargs = self._arguments
        with edited(self.model, changed):
            logits_PV = self._logits(self.model(*args, **kwargs), windows)
        assert logits_PV is not None  # the clean run of the same model had logits
        return logits_PV

    def _add_clean(self, losses: Losses, windows: int) -> None:
        window_of, found = losses.of_predictions("ce_clean")
        self.clean.add(windows, window_of, {"predictions": torch.ones(len(window_of)), **found})
        if self._saelens:
            losses.add_as_saelens(self.clean, windows, "_clean")


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter is."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def rows_at(places: Sequence[Place], activations: Mapping[str, Tensor], windows: Windows) -> Tensor:
    """(windows * positions, width of all places), on the first one's device. Raises DataError for other positions."""
    parts: list[Tensor] = []
    for place in places:
        read = place.read(activations[place.name])
        if read.shape[:-1].numel() != windows.tokens.numel():
            raise DataError(
                f"eval: {place.name} has {tuple(activations[place.name].shape)} activations for tokens of shape "
                f"{tuple(windows.tokens.shape)}"
            )
        parts.append(read.reshape(-1, place.width))
    return parts[0] if len(parts) == 1 else torch.cat([part.to(parts[0].device) for part in parts], dim=-1)


def first_pass(
    models: Mapping[bool, nn.Module], windows: Sequence[Windows], routes: Sequence[Route]
) -> dict[Route, Calibration]:
    """Means of what is written, and the first rows of everything; the models run only as far as that takes.

    Raises DataError when no position counts.
    """
    sums: dict[Route, Tensor] = {}
    rows: dict[Route, list[tuple[Tensor, Tensor]]] = {route: [] for route in routes}
    kept = count = 0
    for batch in windows:
        counting_K = batch.kept.flatten().nonzero().squeeze(1)
        if not len(counting_K):
            continue
        activations = {
            name: value for second, model in models.items() for name, value in _captured(model, second, routes, batch)
        }
        count += len(counting_K)
        for route in routes:
            inputs = rows_at(route.reads, activations, batch)
            targets = inputs if route.in_place else rows_at(route.writes, activations, batch)
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


def _captured(
    model: nn.Module, second: bool, routes: Sequence[Route], windows: Windows
) -> Iterable[tuple[str, Tensor]]:
    places = {p.name: p for route in routes for p in (*route.reads, *route.writes) if p.second == second}
    if not places:
        return []
    args, kwargs = model_inputs(model, windows, device_of(model))
    found = capture(model, list(dict.fromkeys(place.point for place in places.values())), *args, **kwargs)
    return [(name, found[str(place.point)]) for name, place in places.items()]
