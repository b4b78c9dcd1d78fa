"""How much each latent matters for a number that the model's output gives: gradient × activation, and integrated gradients.

`attribute` runs the model once forward and once backward and says, for each active latent at each position, its value times the
derivative of the number by it: what removing the latent would change, to first order (Marks et al., arXiv 2403.19647). With the
error term, the model is the one that it always was, and what a dictionary does not capture has a share of its own. Without it,
dictionaries stand in the model, and derivatives run through them.

`integrated_gradients` takes the mean of the derivatives on the straight way from no latents to all (Sundararajan et al., arXiv
1703.01365). It costs one run a step, and its shares add up to the difference between the two ends.
"""

# B sequences, L positions, E entries of sparse codes

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast, final

import torch
from sae_core import SAE
from sae_core.codes import SparseCodes
from sae_core.config import require
from sae_core.errors import DataError
from torch import Tensor, nn

from sae_lm.hooks import HookPoint, edited
from sae_lm.latents import select_rows
from sae_lm.places import Place, Route, route_of
from sae_lm.splicing import evaluating

__all__ = ["Attribution", "Shares", "attribute", "integrated_gradients", "shares_of"]

Measure = Callable[[Any], Tensor]
"""Maps what the model returns to one number, such as a difference of logits."""


@final
@dataclass(frozen=True, eq=False)
class Shares:
    """Sparse codes whose values are shares of latents, of leading shape (sequences, positions)."""

    codes: SparseCodes

    def at(self, position: int) -> SparseCodes:
        """The shares at one position of each sequence, as (sequences,) rows."""
        sequences, positions = self.codes.leading_shape
        rows = torch.arange(sequences, device=self.codes.device) * positions + position % positions
        return select_rows(self.codes.reshape(self.codes.rows), rows)


@final
@dataclass(frozen=True, eq=False)
class Attribution:
    """The shares of one dictionary: `latents` holds each active latent's share in place of its value, of leading shape
    (sequences, positions); `errors` (sequences, positions) is the share of what the dictionary does not capture, zero where
    dictionaries stand in for activations. `codes` are the latents' values, `gradients` the derivatives by them; all three have
    the same entries.
    """

    codes: SparseCodes
    latents: SparseCodes
    gradients: SparseCodes
    errors: Tensor

    def by_latent(self) -> Tensor:
        """(d_sae,) shares summed over all positions."""
        total = self.latents.values.new_zeros(self.latents.d_sae)
        return total.index_add(0, self.latents.indices, self.latents.values)

    def top(self, k: int) -> list[tuple[int, float]]:
        """The `k` latents of the largest absolute share over all positions, largest first."""
        shares = self.by_latent()
        chosen = shares.abs().topk(min(k, len(shares))).indices
        return [(int(latent), float(shares[latent])) for latent in chosen]


def attribute(
    model: nn.Module,
    saes: Mapping[str, SAE[Any]] | Sequence[SAE[Any]] | SAE[Any],
    measure: Measure,
    *args: Any,
    error_term: bool = True,
    **kwargs: Any,
) -> dict[str, Attribution]:
    """The share of each latent in ``measure(model(*args, **kwargs))``, by the names of `saes` (as in `spliced`).

    `measure` returns one number, differentiable in the output. Gradients of the model's parameters are left alone. Raises
    DataError when the number does not depend on a place at all.
    """
    named = _routes(model, saes)
    written: dict[str, list[Tensor]] = {name: [] for name in named}
    read: dict[str, list[Tensor]] = {name: [] for name in named}
    stand_ins: dict[str, Tensor] = {}

    def reading(name: str, place: Place) -> Callable[[Tensor], None]:
        return lambda activation: read[name].append(place.read(activation))

    def writing(name: str, sae: SAE[Any], number: int, place: Place) -> Callable[[Tensor], Tensor]:
        def go_on(activation: Tensor) -> Tensor:
            if not error_term:
                if name not in stand_ins:
                    x = torch.cat(read[name], dim=-1).to(sae.device, sae.dtype)
                    with evaluating(sae):
                        stand_ins[name] = sae.decode(sae.encode_sparse(x), x=x)
                columns = stand_ins[name].split([p.width for p in named[name][1].writes], dim=-1)[number]
                activation = place.write(activation, columns.reshape(place.read(activation).shape))
            if not activation.requires_grad:
                activation = activation.detach().requires_grad_()
            written[name].append(activation)
            return activation

        return go_on

    functions: list[tuple[HookPoint, Callable[[Tensor], Tensor | None]]] = []
    for name, (sae, route) in named.items():
        require(
            error_term or len(route.reads) == 1,
            f"attribution: {name} reads several places and cannot stand in before all are known; keep the error term",
        )
        functions += [(place.point, reading(name, place)) for place in route.reads]
        functions += [(place.point, writing(name, sae, number, place)) for number, place in enumerate(route.writes)]
    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        for sae, _ in named.values():
            stack.enter_context(_frozen(sae))
        stack.enter_context(_all_edited(model, functions))
        value = _number(measure(model(*args, **kwargs)))
    places = [activation for activations in written.values() for activation in activations]
    gradients = iter(cast("tuple[Tensor | None, ...]", torch.autograd.grad(value, places, allow_unused=True)))
    found: dict[str, Attribution] = {}
    for name, (sae, route) in named.items():
        parts: list[Tensor] = []
        targets: list[Tensor] = []
        for place, activation in zip(route.writes, written[name], strict=True):
            gradient = next(gradients)
            if gradient is None:
                raise DataError(f"attribution: what is measured does not depend on {place.point}")
            parts.append(_own(place, gradient))
            targets.append(place.read(activation.detach()))
        x = torch.cat([part.detach() for part in read[name]], dim=-1)
        found[name] = _attributed(sae, x, torch.cat(parts, -1), torch.cat(targets, -1), error_term)
    return found


def integrated_gradients(
    model: nn.Module,
    sae: SAE[Any],
    measure: Measure,
    *args: Any,
    steps: int = 16,
    at: str | None = None,
    **kwargs: Any,
) -> Attribution:
    """As `attribute` of one dictionary with the error term, with derivatives averaged on the way from no latents to all.

    At step i of n, all latents have (i - 1/2) / n of their values, at all positions. The shares add up to the difference that
    the latents make, up to the error of the midpoint rule. The error term's share is that of the last end.
    """
    require(steps > 0, f"integrated gradients: steps must be positive, not {steps}")
    route = route_of(sae, model, at)
    (place,) = route.writes
    seen: list[Tensor] = []
    targets: list[Tensor] = []
    functions: list[tuple[HookPoint, Callable[[Tensor], Tensor | None]]] = [
        (p.point, lambda activation, p=p: seen.append(p.read(activation))) for p in route.reads
    ]
    functions.append((place.point, lambda activation: targets.append(activation)))
    with torch.no_grad(), _all_edited(model, functions):
        model(*args, **kwargs)
    x = torch.cat(seen, dim=-1).to(sae.device, sae.dtype)
    with torch.no_grad(), evaluating(sae):
        codes = sae.encode_sparse(x)
        clean = sae.decode(codes, x=x)
    total = torch.zeros_like(codes.values)
    own = place.read(targets[0])
    for step in range(steps):
        values = (codes.values * ((step + 0.5) / steps)).detach().requires_grad_()

        def scaled(activation: Tensor, values: Tensor = values) -> Tensor:
            with evaluating(sae), _frozen(sae):
                y = sae.decode(codes.with_values(values), x=x)
            return place.write(activation, own + (y - clean).view(own.shape).to(own.device))

        with torch.enable_grad(), edited(model, {place.point: scaled}):
            value = _number(measure(model(*args, **kwargs)))
        total += torch.autograd.grad(value, values)[0]
    mean = total / steps
    shape = codes.leading_shape
    return Attribution(codes, codes.with_values(mean * codes.values), codes.with_values(mean), torch.zeros(shape))


def shares_of(sae: SAE[Any], x: Tensor, gradient: Tensor) -> tuple[Shares, Tensor]:
    """The shares of latents in the product of a dictionary's output with `gradient` (…, d_out), and that of the rest of the
    output (…,): biases, and whatever else does not come from latents. Inputs are `x` (…, d_in)."""
    codes, slopes, y = _slopes(sae, x, gradient)
    values = slopes * codes.values
    shares = codes.with_values(values)
    rest = (y.float() * gradient.float()).sum(-1) - shares.row_sums().view(y.shape[:-1]).float()
    return Shares(shares), rest


def _slopes(sae: SAE[Any], x: Tensor, gradient: Tensor) -> tuple[SparseCodes, Tensor, Tensor]:
    """Codes of `x`, the derivative of output · gradient by each entry's value, and the output."""
    x = x.detach().to(sae.device, sae.dtype)
    with evaluating(sae), _frozen(sae):
        with torch.no_grad():
            codes = sae.encode_sparse(x)
        with torch.enable_grad():
            values = codes.values.detach().requires_grad_()
            y = sae.decode(codes.with_values(values), x=x)
            (slopes,) = torch.autograd.grad(y, values, gradient.to(y).view(y.shape))
    return codes, slopes, y.detach()


@contextmanager
def _frozen(sae: SAE[Any]) -> Generator[None, None, None]:
    """Within the context nothing computes gradients of the dictionary's parameters, which are as large as they are."""
    learning = [parameter for parameter in sae.parameters() if parameter.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


def _attributed(sae: SAE[Any], x: Tensor, gradient: Tensor, target: Tensor, error_term: bool) -> Attribution:
    codes, slopes, y = _slopes(sae, x, gradient)
    errors = torch.zeros(y.shape[:-1], device=target.device)
    if error_term:
        errors = ((target.float() - y.to(target.device).float()) * gradient.float()).sum(-1)
    return Attribution(codes, codes.with_values(slopes * codes.values), codes.with_values(slopes), errors)


def _own(place: Place, gradient: Tensor) -> Tensor:
    """The gradient by the rows that `place` writes: it adds what changes, so it is that of the activation's own part."""
    return Place(point=place.point, width=place.width, head=place.head).read(gradient)


def _number(value: Tensor) -> Tensor:
    if not isinstance(value, Tensor) or value.numel() != 1:
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise DataError(f"attribution: what is measured must be one number, not {shape}")
    return value.reshape(())


def _routes(
    model: nn.Module, saes: Mapping[str, SAE[Any]] | Sequence[SAE[Any]] | SAE[Any]
) -> dict[str, tuple[SAE[Any], Route]]:
    if isinstance(saes, SAE):
        saes = [saes]
    if isinstance(saes, Mapping):
        return {name: (sae, route_of(sae, model, name)) for name, sae in saes.items()}
    routes = [(sae, route_of(sae, model)) for sae in saes]
    return {str(route): (sae, route) for sae, route in routes}


@contextmanager
def _all_edited(
    model: nn.Module, functions: Sequence[tuple[HookPoint, Callable[[Tensor], Tensor | None]]]
) -> Generator[None, None, None]:
    with ExitStack() as stack:
        for point, function in functions:  # one after the other: places may be named more than once
            stack.enter_context(edited(model, {point: function}))
        yield
