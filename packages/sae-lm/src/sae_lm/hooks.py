"""Reading and replacing activations of any PyTorch model, with nothing but forward hooks.

A place in a model is a `HookPoint`: a module's path as `named_modules` spells it, and whether its output or its input
is meant. `capture` runs a model and stops it at the moment the last place asked for is reached: modules after it never
run. `edited` lets a model run on with other tensors in those places; it is the one way in which this project changes what
a model computes. Modules may pass tensors, tuples or the dataclass-like outputs of transformers; the activation is their
first float tensor, and the rest of the container is kept as it is.

A module that a model runs several times in one pass counts by its first run, in all functions. In models of
TransformerLens a place is one of that library's hook names, aliases included.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast, final, runtime_checkable
from weakref import WeakKeyDictionary

from sae_core.config import check_fields
from sae_core.errors import ConfigError, DataError, did_you_mean
from torch import Tensor, nn

__all__ = ["HookPoint", "capture", "edited", "find_module", "replaced", "watched"]


@dataclass(frozen=True, slots=True)
class HookPoint:
    """A module's output or input, written ``model.layers.9`` or ``model.layers.9:input``.

    >>> HookPoint.parse("model.layers.9:input")
    HookPoint(module='model.layers.9', at='input')
    >>> str(HookPoint.parse("model.layers.9"))
    'model.layers.9'
    """

    module: str
    at: Literal["output", "input"] = "output"

    def __post_init__(self) -> None:
        check_fields(self)

    @classmethod
    def parse(cls, text: str) -> HookPoint:
        """Read the written form. Raises ConfigError for anything but ``:input`` or ``:output`` behind a module path."""
        module, _, at = text.partition(":")
        if at not in ("", "output", "input") or not module:
            raise ConfigError(
                f"hook {text!r}: write a module path such as 'model.layers.9' for its output, "
                "or 'model.layers.9:input' for its input"
            )
        return cls(module, "input" if at == "input" else "output")

    def __str__(self) -> str:
        return self.module if self.at == "output" else f"{self.module}:{self.at}"


@runtime_checkable
class _NamesHooks(Protocol):
    """A model of TransformerLens."""

    @property
    def hook_dict(self) -> Mapping[str, nn.Module]: ...


def find_module(model: nn.Module, path: str) -> nn.Module:
    """The submodule at `path`. Raises ConfigError that lists near module paths when there is none.

    >>> find_module(nn.Sequential(nn.Linear(2, 3), nn.ReLU()), "1")
    ReLU()
    """
    if isinstance(model, _NamesHooks) and path in model.hook_dict:  # TransformerLens: its names include aliases
        return model.hook_dict[path]
    module, reached = model, ""
    for name in path.split("."):
        children = dict(module.named_children())
        if name not in children:
            raise ConfigError(_no_such_module(model, path, reached, list(children)))
        module, reached = children[name], f"{reached}.{name}" if reached else name
    return module


def _no_such_module(model: nn.Module, path: str, reached: str, children: list[str]) -> str:
    kind = type(model).__name__
    is_list = bool(children) and all(child.isdecimal() for child in children)
    holds = f"{children[0]} to {children[-1]}" if is_list else ", ".join(children) or "no modules"
    inside = f"{kind} has {reached!r}, which holds {holds}" if reached else f"{kind} holds {holds}"

    modules = {name: module for name, module in model.named_modules() if name}
    same_end = [name for name in modules if path.endswith(f".{name}") or name.endswith(f".{path}")]
    hint = "" if is_list else f"; did you mean {same_end[0]!r}?" if same_end else did_you_mean(path, modules)
    if not hint and not is_list:
        stacks = {name: len(module) for name, module in modules.items() if isinstance(module, nn.ModuleList)}
        blocks = max(stacks, key=lambda name: stacks[name], default=None)
        hint = f"; its blocks are {blocks}.0 to {blocks}.{stacks[blocks] - 1}" if blocks and stacks[blocks] else ""
    if path.startswith("blocks.") or "hook_" in path:
        hint += "; hooks are module paths, and TransformerLens names are such only with model_class: HookedTransformer"
    return f"hook: no module {path!r} in the model; {inside}{hint}"


_CAPTURING: ContextVar[object] = ContextVar("capturing", default=None)


def capture(
    model: nn.Module,
    points: Sequence[HookPoint | str],
    *args: Any,
    **kwargs: Any,
) -> dict[str, Tensor]:
    """Run ``model(*args, **kwargs)`` until every point is reached; return the activations by the points' written form.

    The tensors are detached and have whatever shape the model gives them. Raises ConfigError for a module that is not
    there, DataError for one that never ran or that passes no tensor. Hooks are gone afterwards, whatever happened.

    >>> layers = nn.Sequential(nn.Flatten(), nn.ReLU(), nn.Linear(2, 3))
    >>> from torch import tensor
    >>> capture(layers, ["1"], tensor([[-1.0, 2.0]]))
    {'1': tensor([[0., 2.]])}
    """
    wanted = [_parsed(point) for point in points]
    modules = [find_module(model, point.module) for point in wanted]
    found: dict[str, Tensor] = {}
    token = object()

    def receive(point: HookPoint, value: Any) -> None:
        if str(point) in found or _CAPTURING.get() is not token:  # another run inside of this one is not meant
            return
        tensor = _tensor_of(value, point).detach()
        # A later module may write into this tensor, unless there is no later module.
        last = len(found) + 1 == len(set(wanted))
        found[str(point)] = tensor if last else tensor.clone()
        if last:
            raise _Stop(token)

    with ExitStack() as hooks:
        for point, module in zip(wanted, modules, strict=True):
            hooks.enter_context(_hooked(module, point, receive))
        outer = _CAPTURING.set(token)
        try:
            with _stopped_early(model):
                model(*args, **kwargs)
        except _Stop as stop:
            if stop.token is not token:
                raise
        finally:
            _CAPTURING.reset(outer)
    missing = sorted({str(point) for point in wanted} - set(found))
    if missing:
        raise DataError(f"hook: the model ran to its end without running {', '.join(missing)}")
    return {str(point): found[str(point)] for point in wanted}


@contextmanager
def edited(
    model: nn.Module, functions: Mapping[HookPoint | str, Callable[[Tensor], Tensor | None]]
) -> Generator[Passes, None, None]:
    """Within the context, the model goes on with ``function(activation)`` in place of the activation at each point.

    A function may return None to leave the activation as it is. The context's value tells about the pass that is going on.
    Hooks are gone afterwards, whatever happened; contexts may be nested, and end in any order. Raises ConfigError for a
    module that is not there.

    >>> layers = nn.Sequential(nn.Flatten(), nn.ReLU(), nn.Flatten())
    >>> from torch import tensor
    >>> with edited(layers, {"0": lambda x: -x, "2:input": lambda x: x + 1}):
    ...     layers(tensor([[-1.0, 2.0]]))
    tensor([[2., 1.]])
    """
    wanted = [(_parsed(point), function) for point, function in functions.items()]
    modules = [find_module(model, point.module) for point, _ in wanted]
    with ExitStack() as hooks:
        passes = hooks.enter_context(watched(model))
        for (point, function), module in zip(wanted, modules, strict=True):
            hooks.enter_context(_chained(module, point, _once_a_pass(passes, function)))
        yield passes


@contextmanager
def replaced(
    model: nn.Module, point: HookPoint | str, function: Callable[[Tensor], Tensor | None]
) -> Generator[None, None, None]:
    """`edited` at one point.

    >>> layers = nn.Sequential(nn.Flatten(), nn.ReLU())
    >>> from torch import tensor
    >>> with replaced(layers, "0", lambda x: -x):
    ...     layers(tensor([[-1.0, 2.0]]))
    tensor([[1., 0.]])
    """
    with edited(model, {point: function}):
        yield


@final
class Passes:
    """The forward pass that a watched model is in, and how many positions its key-value cache held before it."""

    def __init__(self) -> None:
        self.offset = 0
        self.cached = False
        self.open: list[int] = []  # passes that have begun and not ended: a pass may run another inside of it
        self.arguments: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
        self._count = 0
        self._callbacks: list[Callable[[], None]] = []

    @property
    def current(self) -> int | None:
        """The number of the pass that is going on; None outside of one."""
        return self.open[-1] if self.open else None

    def on_begin(self, callback: Callable[[], None]) -> None:
        """Call `callback` at the beginning of every pass."""
        self._callbacks.append(callback)

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A pass over these arguments begins."""
        self._count += 1
        self.open.append(self._count)
        self.arguments = (args, kwargs)
        self.see_cache(kwargs.get("past_key_values"))
        for callback in self._callbacks:
            callback()

    def end(self) -> None:
        """The pass is over, or failed."""
        if self.open:
            self.open.pop()

    def see_cache(self, cache: Any) -> None:
        """Take the offset from a cache: one of transformers, or one layer's of TransformerLens."""
        self.cached = cache is not None
        if isinstance(cache, _CountsPositions):
            self.offset = int(cache.get_seq_length())
        elif isinstance(keys := getattr(cache, "past_keys", None), Tensor):
            self.offset = keys.shape[1]
        else:
            self.offset = 0


_WATCHERS: WeakKeyDictionary[nn.Module, list[Passes]] = WeakKeyDictionary()


@contextmanager
def _stopped_early(model: nn.Module) -> Generator[None, None, None]:
    """Run a pass that may stop in its middle, and whose end the model's hooks then do not see."""
    before = [(passes, len(passes.open)) for passes in _WATCHERS.get(model, [])]
    try:
        yield
    finally:
        for passes, depth in before:
            del passes.open[depth:]


@runtime_checkable
class _CountsPositions(Protocol):
    def get_seq_length(self) -> int: ...


@contextmanager
def watched(model: nn.Module) -> Generator[Passes, None, None]:
    """Within the context, know when a forward pass of `model` begins and ends."""
    passes = Passes()

    def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        passes.begin(args, kwargs)

    def end(*_: Any) -> None:
        passes.end()

    def block(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if "past_kv_cache_entry" in kwargs:
            passes.see_cache(kwargs["past_kv_cache_entry"])

    with ExitStack() as handles:
        handles.callback(model.register_forward_pre_hook(begin, with_kwargs=True).remove)
        handles.callback(model.register_forward_hook(end, always_call=True).remove)
        if isinstance(model, _NamesHooks):
            # TransformerLens generates by calling `forward` past the hooks of the model itself; its blocks see the cache.
            blocks = dict(model.named_children()).get("blocks")
            for first in list(blocks.children())[:1] if blocks is not None else []:
                handles.callback(first.register_forward_pre_hook(block, with_kwargs=True).remove)
        _WATCHERS.setdefault(model, []).append(passes)
        handles.callback(_WATCHERS[model].remove, passes)
        yield passes


def _once_a_pass(passes: Passes, function: Callable[[Tensor], Tensor | None]) -> Callable[[HookPoint, Any], Any]:
    """`function` at the first run of a module in each pass. A module that runs outside of a pass is on its own."""
    last: int | None = None

    def receive(point: HookPoint, value: Any) -> Any:
        nonlocal last
        if passes.current is not None and passes.current == last:
            return None
        last = passes.current
        changed = function(_tensor_of(value, point))
        return None if changed is None else _with_tensor(value, point, changed)

    return receive


def _parsed(point: HookPoint | str) -> HookPoint:
    return HookPoint.parse(point) if isinstance(point, str) else point


class _Stop(BaseException):
    """Ends a forward pass from inside a hook. Not an Exception, so that no model's own error handling swallows it."""

    def __init__(self, token: object) -> None:
        super().__init__()
        self.token = token


@contextmanager
def _hooked(
    module: nn.Module, point: HookPoint, receive: Callable[[HookPoint, Any], Any], *, first: bool = False
) -> Generator[None, None, None]:
    """Call `receive` with what passes `point`; what it returns, unless None, goes on instead."""

    def on_output(module: nn.Module, args: Any, output: Any) -> Any:
        return receive(point, output)

    def on_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        by_position = _key(args) is not None
        changed = receive(point, args if by_position else kwargs)
        if changed is None:
            return None
        return (changed, kwargs) if by_position else (args, changed)

    if point.at == "output":
        handle = module.register_forward_hook(on_output, prepend=first)
    else:
        handle = module.register_forward_pre_hook(on_input, prepend=first, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@final
class _Chain:
    """Functions that change what passes one place, in the order in which they came."""

    def __init__(self) -> None:
        self.functions: list[Callable[[HookPoint, Any], Any]] = []
        self.hook = ExitStack()

    def __call__(self, point: HookPoint, value: Any) -> Any:
        changed = None
        for function in list(self.functions):
            result = function(point, value)
            if result is not None:
                changed = value = result
        return changed


_CHAINS: WeakKeyDictionary[nn.Module, dict[str, _Chain]] = WeakKeyDictionary()


@contextmanager
def _chained(
    module: nn.Module, point: HookPoint, function: Callable[[HookPoint, Any], Any]
) -> Generator[None, None, None]:
    """Let `function` change what passes `point`, after those that came before it.

    All of them together stand in front of other hooks of the module, so that these, as transformers's own for
    ``output_hidden_states``, see what the model goes on with.
    """
    chains = _CHAINS.setdefault(module, {})
    chain = chains.get(point.at)
    if chain is None:
        chain = chains[point.at] = _Chain()
        chain.hook.enter_context(_hooked(module, point, chain, first=True))
    chain.functions.append(function)
    try:
        yield
    finally:
        chain.functions.remove(function)
        if not chain.functions:
            chain.hook.close()
            del chains[point.at]


def _key(container: Any) -> Any:
    """Where in a tuple, list or mapping the activation is: under a usual name, or else the first float tensor."""
    if isinstance(container, Mapping):
        items = cast("Mapping[Any, Any]", container)
        usual = [key for key in ("hidden_states", "last_hidden_state") if isinstance(items.get(key), Tensor)]
        pairs = [(key, items[key]) for key in usual] or list(items.items())
    elif isinstance(container, tuple | list):
        pairs = list(enumerate(cast("Sequence[Any]", container)))
    else:
        return None
    return next((key for key, value in pairs if isinstance(value, Tensor) and value.is_floating_point()), None)


def _tensor_of(value: Any, point: HookPoint) -> Tensor:
    if isinstance(value, Tensor):
        return value
    key = _key(value)
    if key is None:
        raise DataError(f"hook: the {point.at} of {point.module!r} is {_describe(value)}, which holds no float tensor")
    return value[key]


def _with_tensor(value: Any, point: HookPoint, tensor: Tensor) -> Any:
    """`value` with its activation exchanged; its container stays of its type."""
    if isinstance(value, Tensor):
        return tensor
    key = _key(value)
    if isinstance(value, Mapping):
        changed = copy.copy(cast("dict[Any, Any]", value))
        changed[key] = tensor
        return changed
    items = list(cast("Sequence[Any]", value))
    items[key] = tensor
    if isinstance(value, list):
        return items
    return (
        type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    )  # named tuples take their fields one by one


def _describe(value: Any) -> str:
    if isinstance(value, tuple | list):
        kinds = ", ".join(type(item).__name__ for item in cast("Sequence[Any]", value))
        return f"{type(value).__name__}({kinds})"
    return type(value).__name__
