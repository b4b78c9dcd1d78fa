"""Dictionaries inside a running model: their reconstructions in place of activations, their latents seen and changed.

`spliced` is a context, `attach` stays until it is removed. In either, each pass of the model runs through the dictionaries:
what a dictionary reads is encoded, edits change its latents, and what it writes takes the place of the model's own
activation. With the error term, what the dictionary did not capture is added back,

    out = x + decode(edited latents) - decode(latents),

so that without an edit the model computes exactly the bits it always did, and with one nothing but the edit changes. Without
it, out = decode(edited latents): the model has to do with what the dictionary says.

A transcoder reads at one place and writes at another. A dictionary that reads several places, as a crosscoder does, needs
them all before it can write the first; the model then runs a first time, only as far as the last of them. Dictionaries at
one place follow each other in the order given, each reading what the one before left.

Gradients flow through encode and decode into the model; the error is a constant.
"""

# B sequences, L positions, W width of a place, K rows that are replaced

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, cast, final

import torch
from sae_core import SAE
from sae_core.codes import SparseCodes
from sae_core.config import require
from sae_core.errors import ConfigError, DataError
from torch import Tensor, nn

from sae_lm.hooks import HookPoint, Passes, capture, edited
from sae_lm.latents import Edit, edit_rows, rows_at, scattered, select_rows
from sae_lm.places import Place, Route, route_of

__all__ = ["Attached", "Edits", "Splice", "attach", "evaluating", "spliced"]

Edits = Edit | Sequence[Edit]
"""One edit of a dictionary's latents, or several in order."""


@final
@dataclass(frozen=True, eq=False)
class Splice:
    """A dictionary to be spliced under a name of its own: `at` says where, as `Route` is written; None: as its metadata say.

    `error_term` and `edit` are for this one; None leaves them to the call.
    """

    sae: SAE[Any]
    at: str | None = None
    error_term: bool | None = None
    edit: Edits | None = None


@final
class Attached:
    """Dictionaries in a model. A context manager; `remove` takes them out again.

    After each pass, `latents` maps each dictionary's name to its latents (sequences, positions, d_sae) as the model went on
    with them, edits included, and `errors` to ``x - decode(latents before edits)``, of the shape of what it writes, for each
    place. Where a dictionary is bypassed, there are no active latents and the error is zero. With `keep_passes`, `passes`
    holds the latents of every pass, as generation makes them.
    """

    def __init__(self, routes: Mapping[str, Route], keep_passes: bool) -> None:
        self.routes: Mapping[str, Route] = routes
        self.latents: dict[str, SparseCodes] = {}
        self.errors: dict[str, tuple[Tensor, ...]] = {}
        self.passes: dict[str, list[SparseCodes]] = {name: [] for name in routes} if keep_passes else {}
        self._stack = ExitStack()

    def remove(self) -> None:
        """Take the dictionaries out of the model; what was seen stays."""
        self._stack.close()

    def __enter__(self) -> Attached:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()


@contextmanager
def spliced(
    model: nn.Module,
    saes: SAE[Any] | Sequence[SAE[Any]] | Mapping[str, SAE[Any] | Splice],
    *,
    error_term: bool = False,
    edit: Edits | Mapping[str, Edits] | None = None,
    where: Tensor | None = None,
    skip_tokens: Sequence[int] = (),
    keep_passes: bool = False,
) -> Generator[Attached, None, None]:
    """`attach` within a context: afterwards the model is what it was, whatever happened.

    >>> from sae_core import create
    >>> from torch import nn, randn
    >>> model, sae = nn.Sequential(nn.Identity(), nn.Identity()), create("topk", d_in=4, d_sae=8, k=2)
    >>> x = randn(3, 4)
    >>> with spliced(model, {"0": sae}) as seen:
    ...     y = model(x)
    >>> bool((y == sae.eval()(x)).all()), seen.latents["0"].shape
    (True, (3, 8))
    >>> with spliced(model, {"0": sae}, error_term=True):
    ...     bool((model(x) == x).all())
    True
    """
    with attach(
        model, saes, error_term=error_term, edit=edit, where=where, skip_tokens=skip_tokens, keep_passes=keep_passes
    ) as attached:
        yield attached


def attach(
    model: nn.Module,
    saes: SAE[Any] | Sequence[SAE[Any]] | Mapping[str, SAE[Any] | Splice],
    *,
    error_term: bool = False,
    edit: Edits | Mapping[str, Edits] | None = None,
    where: Tensor | None = None,
    skip_tokens: Sequence[int] = (),
    keep_passes: bool = False,
) -> Attached:
    """Let `model` run through dictionaries until the result's `remove` is called.

    `saes` is one dictionary or several whose metadata say where they belong, or a mapping: from places, written as `Route`
    is, to dictionaries; or from names of your choice to `Splice` objects. `edit` changes latents: edits by the mapping's
    names, or edits alone where there is one dictionary. `where` (sequences, positions) bool says at which positions
    activations are replaced, `skip_tokens` at which tokens they are not. Dictionaries work as in eval mode, whatever mode
    they are in, on their own device and in their own precision; the model keeps its own.

    Raises ConfigError for a place that the model does not have; a pass raises DataError for activations of another width.
    """
    named = _named(model, saes)
    edits = _edits(named, edit)
    attached = Attached({name: splice.route for name, splice in named.items()}, keep_passes)
    context = _Context(where=where, skip_tokens=_skipped(skip_tokens))
    with ExitStack() as stack:
        running: list[_Running] = []
        functions: list[tuple[HookPoint, Callable[[Tensor], Tensor | None]]] = []
        for name, splice in named.items():
            wants_error = error_term if splice.given.error_term is None else splice.given.error_term
            one = _Running(name, splice.given.sae, splice.route, wants_error, edits[name], attached, context)
            running.append(one)
            functions += one.functions()
        context.passes = passes = stack.enter_context(edited(model, {}))
        if context.skip_tokens is not None:
            passes.on_begin(context.forget_tokens)
            stack.callback(_embeddings(model).register_forward_pre_hook(context.see_tokens).remove)
        if any(one.looks_ahead for one in running):
            passes.on_begin(lambda: _look_ahead(model, context, running))
        for point, function in functions:  # one after the other: places may be named more than once
            stack.enter_context(edited(model, {point: context.unless_looking_ahead(function)}))
        attached._stack = stack.pop_all()  # pyright: ignore[reportPrivateUsage]
    return attached


@contextmanager
def evaluating(sae: SAE[Any]) -> Generator[None, None, None]:
    """Within the context, `sae` works as in eval mode; afterwards it is in the mode it was."""
    if not sae.training:
        yield
        return
    sae.eval()
    try:
        yield
    finally:
        sae.train()


@final
@dataclass(frozen=True, eq=False)
class _Named:
    given: Splice
    route: Route


@final
@dataclass(eq=False)
class _Context:
    """What all dictionaries of one call share: which positions count, and the pass that is going on."""

    where: Tensor | None
    skip_tokens: Tensor | None
    passes: Passes = field(default_factory=Passes)
    looking_ahead: bool = False
    _tokens: Tensor | None = None

    def unless_looking_ahead(self, function: Callable[[Tensor], Tensor | None]) -> Callable[[Tensor], Tensor | None]:
        return lambda activation: None if self.looking_ahead else function(activation)

    def forget_tokens(self) -> None:
        self._tokens = None

    def see_tokens(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        tokens = args[0] if args and isinstance(args[0], Tensor) else None
        if tokens is not None and not tokens.is_floating_point():
            self._tokens = tokens

    def rows(self, leading: tuple[int, ...], device: torch.device) -> Tensor | None:
        """(rows,) bool, the rows to replace; None for all."""
        chosen = None if self.where is None else rows_at(self.where, leading, self.passes.offset, device)
        if self.skip_tokens is not None:
            tokens = self._tokens
            if tokens is None or tuple(tokens.shape) != leading:
                shape = None if tokens is None else tuple(tokens.shape)
                raise DataError(f"skip_tokens: token ids of shape {shape} for activations of {leading} positions")
            other = ~torch.isin(tokens, self.skip_tokens.to(tokens.device)).reshape(-1).to(device)
            chosen = other if chosen is None else chosen & other
        return chosen


@final
class _Running:
    """One dictionary in the model: what it read in this pass, and what it makes of it."""

    def __init__(
        self,
        name: str,
        sae: SAE[Any],
        route: Route,
        error_term: bool,
        edits: Sequence[Edit],
        attached: Attached,
        context: _Context,
    ) -> None:
        self.name, self.sae, self.route = name, sae, route
        self.looks_ahead = len(route.reads) > 1
        self._error_term, self._edits = error_term, edits
        self._attached, self._context = attached, context
        self._read: list[Tensor] = []
        self._result: _Result | None = None

    def functions(self) -> list[tuple[HookPoint, Callable[[Tensor], Tensor | None]]]:
        """What to do at which place, in the order in which it must be registered."""
        if self.route.in_place and not self.looks_ahead:
            place = self.route.reads[0]
            return [(place.point, lambda activation: self._write(0, self._reading(place, activation)))]
        reading: list[tuple[HookPoint, Callable[[Tensor], Tensor | None]]] = []
        if not self.looks_ahead:
            place = self.route.reads[0]
            reading.append((place.point, lambda activation: self._keep(place, activation)))
        writing = [(place.point, self._writer(number)) for number, place in enumerate(self.route.writes)]
        return reading + writing

    def look_ahead(self, activations: Mapping[str, Tensor]) -> None:
        """Take everything that is read from a run made for it."""
        rows = [place.read(activations[str(place.point)]) for place in self.route.reads]
        self._encode(torch.cat([x.to(self.sae.device, _wider(x.dtype, self.sae.dtype)) for x in rows], dim=-1))

    def _writer(self, number: int) -> Callable[[Tensor], Tensor | None]:
        return lambda activation: self._write(number, activation)

    def _keep(self, place: Place, activation: Tensor) -> None:
        self._reading(place, activation)

    def _reading(self, place: Place, activation: Tensor) -> Tensor:
        self._encode(place.read(activation))
        return activation

    def _encode(self, x_BLW: Tensor) -> None:
        sae, context = self.sae, self._context
        leading = tuple(x_BLW.shape[:-1])
        if context.passes.cached and context.passes.offset and sae.reads_sequences:
            raise DataError(
                f"splice {self.name!r}: a {sae.architecture} dictionary reads whole sequences, and with a key-value cache the "
                "model sees one position at a time; generate with use_cache=False"
            )
        # The one place where precision and device change on the way in; `_write` is the one on the way out.
        x_BLW = x_BLW.to(sae.device, sae.dtype)
        chosen = context.rows(leading, sae.device)
        rows_K = None if chosen is None else chosen.nonzero().squeeze(1)
        whole = rows_K is None or sae.reads_sequences
        given = x_BLW if whole else x_BLW.reshape(-1, x_BLW.shape[-1])[rows_K]
        with evaluating(sae):
            codes = sae.encode_sparse(given)
            y_clean = y_edited = sae.decode(codes, x=given).reshape(codes.rows, -1)
            if self._edits:
                full = codes if whole else scattered(codes, cast("Tensor", rows_K), leading)
                full, changed_R = edit_rows(full, self._edits, offset=context.passes.offset, within=chosen)
                codes = full if whole else select_rows(full, cast("Tensor", rows_K))
                if not whole:
                    changed_R = changed_R[rows_K]
                # Rows without a change keep the sums of the first time, to the last bit.
                again = sae.decode(codes, x=given).reshape(codes.rows, -1)
                y_edited = torch.where(changed_R.unsqueeze(1), again, y_clean)
        if rows_K is not None:
            if whole:
                codes = select_rows(codes, rows_K)
                y_clean, y_edited = y_clean[rows_K], y_edited[rows_K]
            codes = scattered(codes, rows_K, leading)
        self._result = _Result(y_clean, y_edited, rows_K)
        attached = self._attached
        attached.latents[self.name] = codes
        attached.errors[self.name] = ()
        if attached.passes:
            attached.passes[self.name].append(codes.detach())

    def _write(self, number: int, activation: Tensor) -> Tensor:
        place, result = self.route.writes[number], self._result
        if result is None:
            raise DataError(
                f"splice {self.name!r}: {place.point} runs before the dictionary has read {self.route.reads[0].point}; "
                "a dictionary can only write later than it reads"
            )
        x_BLW = place.read(activation)
        columns = self._columns(number)
        flat_x = x_BLW.reshape(-1, place.width)
        rows_K = None if result.rows is None else result.rows.to(flat_x.device)
        target = flat_x if rows_K is None else flat_x[rows_K]
        # Back to the model's device here; sums are made in the wider precision of the two and rounded once, by `Place.write`.
        clean = result.clean[:, columns].to(target.device)
        y = result.edited[:, columns].to(target.device)
        if clean.shape != target.shape:
            raise DataError(
                f"splice {self.name!r}: {place.point} has {target.shape[0]} positions, what it reads has {clean.shape[0]}"
            )
        with torch.no_grad():
            wide = target.to(_wider(target.dtype, clean.dtype))
            error = wide - clean
        if self._error_term:
            y = wide.detach() + (y - clean.detach())
        if rows_K is None:
            out, full_error = y, error
        else:
            out = flat_x.to(y.dtype).index_copy(0, rows_K, y)
            full_error = torch.zeros_like(flat_x, dtype=error.dtype).index_copy(0, rows_K, error)
        attached = self._attached
        attached.errors[self.name] = (*attached.errors[self.name], full_error.view(x_BLW.shape))
        if number + 1 == len(self.route.writes):
            self._result = None
        return place.write(activation, out.view(x_BLW.shape))

    def _columns(self, number: int) -> slice:
        start = sum(place.width for place in self.route.writes[:number])
        return slice(start, start + self.route.writes[number].width)


@final
@dataclass(frozen=True, eq=False)
class _Result:
    """Decoded latents before and after edits, (rows, width of all that is written), and which rows they are."""

    clean: Tensor
    edited: Tensor
    rows: Tensor | None


def _look_ahead(model: nn.Module, context: _Context, running: Sequence[_Running]) -> None:
    """Run the model, without any of the dictionaries, as far as those of several places read."""
    passes = context.passes
    if context.looking_ahead:
        return
    if passes.cached:
        raise DataError(
            "splice: a dictionary that reads several places needs them all before it writes the first, and cannot look ahead "
            "with a key-value cache; call the model with use_cache=False"
        )
    wanted = [one for one in running if one.looks_ahead]
    points = {str(place.point): place.point for one in wanted for place in one.route.reads}
    args, kwargs = passes.arguments
    context.looking_ahead = True
    try:
        found = capture(model, list(points.values()), *args, **kwargs)
    finally:
        context.looking_ahead = False
    for one in wanted:
        one.look_ahead(found)


def _wider(a: torch.dtype, b: torch.dtype) -> torch.dtype:
    return torch.promote_types(a, b)


def _skipped(skip_tokens: Sequence[int]) -> Tensor | None:
    return torch.tensor([int(token) for token in skip_tokens]) if len(skip_tokens) else None


def _embeddings(model: nn.Module) -> nn.Module:
    """The module that token ids go into."""
    getter = getattr(model, "get_input_embeddings", None)
    found = getter() if callable(getter) else dict(model.named_children()).get("embed")
    if not isinstance(found, nn.Module):
        raise ConfigError("skip_tokens: the model does not say where token ids go in; give where=, a mask of positions")
    return found


def _named(
    model: nn.Module, saes: SAE[Any] | Sequence[SAE[Any]] | Mapping[str, SAE[Any] | Splice]
) -> dict[str, _Named]:
    if isinstance(saes, SAE):
        saes = [saes]
    if not isinstance(saes, Mapping):
        routes = [route_of(sae, model) for sae in saes]
        names = [str(route) for route in routes]
        twice = sorted({name for name in names if names.count(name) > 1})
        require(not twice, f"splice: two dictionaries at {', '.join(twice)}; give them names: {{name: Splice(sae), …}}")
        return {name: _Named(Splice(sae), route) for name, sae, route in zip(names, saes, routes, strict=True)}
    named: dict[str, _Named] = {}
    for name, value in saes.items():
        given = value if isinstance(value, Splice) else Splice(value, at=name)
        named[name] = _Named(given, route_of(given.sae, model, given.at))
    require(bool(named), "splice: no dictionary is given")
    return named


def _edits(named: Mapping[str, _Named], edit: Edits | Mapping[str, Edits] | None) -> dict[str, Sequence[Edit]]:
    if edit is None:
        by_name: Mapping[str, Edits] = {}
    elif isinstance(edit, Mapping):
        by_name = edit
    else:
        require(len(named) == 1, f"edit: say which of {', '.join(named)} it is for: edit={{name: …}}")
        by_name = {next(iter(named)): edit}
    unknown = sorted(set(by_name) - set(named))
    require(not unknown, f"edit: there is no dictionary {', '.join(unknown)}; there are {', '.join(named)}")
    result: dict[str, Sequence[Edit]] = {}
    for name, splice in named.items():
        own = splice.given.edit
        given = [*_listed(own), *_listed(by_name.get(name))]
        result[name] = given
    return result


def _listed(edits: Edits | None) -> Sequence[Edit]:
    if edits is None:
        return ()
    return (edits,) if isinstance(edits, Edit) else edits
