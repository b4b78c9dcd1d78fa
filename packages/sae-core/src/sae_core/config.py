"""Strict configs: a dataclass is the schema, and nothing outside it is accepted.

`structure` turns plain data (from YAML, JSON or keyword arguments) into a frozen dataclass and refuses unknown keys and
wrong types; `unstructure` is its inverse. cattrs does the walking, and the rules here only make it strict: a string is
not a number, a float is not an int, a bool is neither.

A value that may change during training is written as a number or as a schedule,
``k: {from: 60, to: 25, over: 0.5}``: linear from 60 to 25 over the first half of the run, then constant. A list of such pieces
is gone through in turn, each starting where the one before ended unless it says otherwise:
``lr: [{from: 0, to: 1e-3, over: 0.1}, {over: 0.7}, {to: 0, over: 0.2, shape: cosine}]`` warms up, stays, and decays.
"""

from __future__ import annotations

import dataclasses
import glob
import itertools
import math
import numbers
import operator
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

from sae_core.errors import ConfigError, did_you_mean

if typing.TYPE_CHECKING:
    from cattrs import Converter

__all__ = [
    "FieldInfo",
    "Schedule",
    "absolute_paths",
    "check_fields",
    "default_of",
    "describe_fields",
    "ends_of",
    "option",
    "require",
    "structure",
    "unstructure",
    "value_at",
]

T = TypeVar("T")


def option(
    *,
    default: Any = MISSING,
    default_factory: Any = MISSING,
    help: str,
    omit_default: bool = False,
    may_be_path: bool = False,
) -> Any:
    """A dataclass field with a sentence that says what it means; ``sae-core show`` prints it.

    With `omit_default` saved SAEs name the field only when it is not its default, so that tools that do not know it can
    still read them. Text that `may_be_path`, the name of something or a path of the user's, is made absolute where such a path
    exists, as every `Path` is, so that a run means the same from any directory.
    """
    metadata = {"help": help, "omit_default": omit_default, "may_be_path": may_be_path}
    if default_factory is not MISSING:
        return dataclasses.field(default_factory=default_factory, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def absolute_paths(config: Any) -> Any:
    """The config dataclass with every path in it made absolute, so that it means the same from any directory.

    Paths are every `Path`, and text in fields that may be one (`option(may_be_path=True)`) where such a path exists.
    """
    if isinstance(config, Path):
        return config.absolute()
    if isinstance(config, list | tuple):
        return type(config)(absolute_paths(item) for item in cast("list[Any]", config))
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        changed = {
            field.name: (_absolute_text if field.metadata.get("may_be_path") else absolute_paths)(
                getattr(config, field.name)
            )
            for field in dataclasses.fields(config)
            if field.init
        }
        return dataclasses.replace(config, **changed)
    return config


def _absolute_text(value: Any) -> Any:
    """Text made absolute where what it says, before any wildcard, is there; of a tuple each."""
    if isinstance(value, tuple):
        return tuple(_absolute_text(item) for item in cast("tuple[Any, ...]", value))
    if not isinstance(value, str):
        return value
    path = Path(value).expanduser()
    fixed = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), path.parts))
    return str(path.absolute()) if path.parts and fixed.exists() else value


def default_of(field: dataclasses.Field[Any]) -> Any:
    """The default of a dataclass field; MISSING where it has none."""
    return field.default_factory() if field.default_factory is not MISSING else field.default


def require(condition: bool, message: str) -> None:
    """Raise ConfigError(message) unless `condition` holds."""
    if not condition:
        raise ConfigError(message)


def check_fields(config: Any) -> None:
    """Raise ConfigError for every field of a dataclass that is none of its choices, or no number, text or flag where one is
    needed. Called first in ``__post_init__``, so that Python is told what a run file would be.

    >>> @dataclass(frozen=True)
    ... class Product:
    ...     precision: typing.Literal["full", "bfloat16"] = "full"
    ...     def __post_init__(self) -> None:
    ...         check_fields(self)
    >>> Product(precision="float32x")
    Traceback (most recent call last):
    sae_core.errors.ConfigError: precision must be one of 'full' | 'bfloat16', not 'float32x'
    """
    problems: list[str] = []
    for name, kinds, choices, wanted in _simple_fields(type(config)):
        value = getattr(config, name)
        fits = isinstance(value, kinds) and (not isinstance(value, bool) or bool in kinds)
        if not fits and not _is_one_of(value, choices):
            problems.append(f"{name} must be {'one of ' if choices else ''}{wanted}, not {value!r}")
    require(not problems, "; ".join(problems))


@cache
def _simple_fields(config_class: type) -> list[tuple[str, tuple[type, ...], tuple[Any, ...], str]]:
    """Of every field that takes only choices, numbers, text, flags, schedules and paths: name, classes, choices and type."""
    try:
        hints = typing.get_type_hints(config_class)
    except NameError:  # of a class made inside a function, from names that are known there alone
        return []
    found: list[tuple[str, tuple[type, ...], tuple[Any, ...], str]] = []
    for field in dataclasses.fields(config_class):
        hint = hints[field.name]
        members = typing.get_args(hint) if _is_union(hint) else (hint,)
        choices = tuple(c for m in members if typing.get_origin(m) is typing.Literal for c in typing.get_args(m))
        others = [member for member in members if typing.get_origin(member) is not typing.Literal]
        if all(other in _KINDS for other in others):
            kinds = tuple(kind for other in others for kind in _KINDS[other])
            found.append((field.name, kinds, choices, _type_name(hint)))
    return found


def distinct_numbers(rows: Sequence[int], what: str) -> list[int]:
    """`rows` as a list of distinct whole numbers; ConfigError, which begins with `what`, for anything else. Whether there are
    such latents is not asked.

    >>> distinct_numbers(range(3), "rows="), distinct_numbers([4, 2], "rows=")
    ([0, 1, 2], [4, 2])
    >>> distinct_numbers([1, 1], "rows=")
    Traceback (most recent call last):
    sae_core.errors.ConfigError: rows= must be a sequence of distinct latent numbers; 1 comes twice
    """
    wanted = f"{what} must be a sequence of distinct latent numbers"
    if isinstance(rows, str | bytes | Mapping | set | frozenset) or not hasattr(rows, "__iter__"):
        raise ConfigError(f"{wanted}, not {rows!r}")
    found: list[int] = []
    try:
        items = list(cast("Sequence[Any]", rows))
        for row in items:
            if isinstance(row, bool) or (hasattr(row, "dtype") and "bool" in str(row.dtype)):
                raise TypeError
            found.append(operator.index(row))
    except TypeError:
        raise ConfigError(f"{wanted}, not {rows!r}") from None
    if not found:
        raise ConfigError(f"{wanted}; this one is empty")
    if len(set(found)) < len(found):
        twice = next(row for row in found if found.count(row) > 1)
        raise ConfigError(f"{wanted}; {twice} comes twice")
    if min(found) < 0:
        raise ConfigError(f"{wanted}, counted from 0; {min(found)} is negative")
    return found


@dataclass(frozen=True, slots=True)
class Schedule:
    """A value that moves from `start` to `end` over the next `over` of training, a fraction of the run, then goes on or stays.

    `shape` is the way: a straight line; half a cosine, flat at both ends; or exponential, by equal factors, for which both ends
    have the same sign. `restarts` goes the way that many times more, each time from `start`. `then` is what follows.

    >>> value_at(Schedule(60, 25, over=0.5), progress=0.25)
    42.5
    >>> value_at(Schedule(1.0, 0.0, shape="cosine", restarts=1), progress=0.75)
    0.5
    >>> value_at(Schedule(0, 8, over=0.1, then=Schedule(8, 2, over=0.4, shape="exponential")), progress=0.3)
    4.0
    >>> value_at(3.0, progress=0.25)
    3.0
    """

    start: float
    end: float
    over: float = 1.0
    shape: typing.Literal["linear", "cosine", "exponential"] = "linear"
    restarts: int = 0
    then: Schedule | None = None

    def __post_init__(self) -> None:
        for name in ("start", "end", "over"):
            value = getattr(self, name)
            require(
                isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value),
                f"schedule: {name!r} must be a finite number, not {value!r}",
            )
        require(0 < self.over <= 1, f"schedule: 'over' is a fraction of the run in (0, 1], not {self.over!r}")
        whole = sum(piece.over for piece in self.pieces())
        require(whole <= 1 + _ROUNDING, f"schedule: the pieces take {whole:g} of the run, more than all of it")
        require(self.shape in _SHAPES, f"schedule: 'shape' is one of {', '.join(_SHAPES)}, not {self.shape!r}")
        require(
            self.shape != "exponential" or self.start * self.end > 0,
            f"schedule: an exponential one never reaches zero or changes sign; found {self.start} to {self.end}",
        )
        require(
            isinstance(self.restarts, int) and not isinstance(self.restarts, bool) and self.restarts >= 0,
            f"schedule: 'restarts' must be a whole number, not {self.restarts!r}",
        )

    def pieces(self) -> tuple[Schedule, ...]:
        """This one and those that follow."""
        return (self, *(() if self.then is None else self.then.pieces()))


_KINDS: dict[Any, tuple[type, ...]] = {
    int: (numbers.Integral,),
    float: (numbers.Real,),
    str: (str,),
    bool: (bool,),
    type(None): (type(None),),
    Path: (Path, str),
    Schedule: (Schedule,),
}
_ROUNDING = 1e-9
_SHAPES = ("linear", "cosine", "exponential")


def value_at(value: float | Schedule, progress: float) -> float:
    """The value at `progress`, a fraction of training in [0, 1]."""
    if not isinstance(value, Schedule):
        return float(value)
    if value.then is not None and progress >= value.over - _ROUNDING:
        return value_at(value.then, progress - value.over)
    way = min(max(progress, 0.0) / value.over, 1.0) * (value.restarts + 1)
    if abs(way - round(way)) < _ROUNDING:  # a restart is not missed by rounding
        way = round(way)
    if way < value.restarts + 1:
        way %= 1
    else:
        way = 1.0
    if value.shape == "cosine":
        way = (1 - math.cos(math.pi * way)) / 2
    if value.shape == "exponential":
        return value.start * (value.end / value.start) ** way
    return value.start + (value.end - value.start) * way


def ends_of(value: float | Schedule) -> tuple[float, ...]:
    """The number itself, or where the pieces of a schedule start and end: every value lies between the least and the largest.

    >>> ends_of(0.5), ends_of(Schedule(0, 8, over=0.1, then=Schedule(8, 2, over=0.9)))
    ((0.5,), (0, 8, 8, 2))
    """
    if not isinstance(value, Schedule):
        return (value,)
    return tuple(end for piece in value.pieces() for end in (piece.start, piece.end))


def structure(data: Mapping[str, Any], into: type[T], *, where: str = "config") -> T:
    """Build the dataclass `into` from plain data.

    Raises ConfigError that lists every unknown key, missing key and wrong type at once, each with its path.

    >>> @dataclass(frozen=True)
    ... class Ridge:
    ...     width: int
    >>> structure({"width": 3}, Ridge)
    Ridge(width=3)
    >>> structure({"widht": 3}, Ridge)
    Traceback (most recent call last):
    sae_core.errors.ConfigError: config: unknown key 'widht'; did you mean 'width'? (known: width); missing key 'width'
    """
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where}: expected a mapping of settings, found {type(data).__name__} {data!r}")
    problems = list(_problems(dict(data), into, ""))
    if problems:
        raise ConfigError(f"{where}: " + "; ".join(problems))
    try:
        return _converter().structure(data, into)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    except Exception as error:  # noqa: BLE001 - cattrs wraps what a converter or __post_init__ raised; unwrap it below
        raise ConfigError(f"{where}: " + "; ".join(_messages(error))) from None


def unstructure(config: Any) -> dict[str, Any]:
    """Plain data (dicts, lists, numbers, strings) that `structure` turns back into an equal config."""
    return cast("dict[str, Any]", _converter().unstructure(config))


@dataclass(frozen=True, slots=True)
class FieldInfo:
    """One field of a config, for people: name, type, default (None when required) and meaning."""

    name: str
    type: str
    required: bool
    default: Any
    help: str


def describe_fields(config_class: type) -> list[FieldInfo]:
    """All fields of a config dataclass, in order."""
    hints = typing.get_type_hints(config_class)
    described: list[FieldInfo] = []
    for field in dataclasses.fields(config_class):
        required = field.default is MISSING and field.default_factory is MISSING
        default = None if required else default_of(field)
        described.append(
            FieldInfo(field.name, _type_name(hints[field.name]), required, default, str(field.metadata.get("help", "")))
        )
    return described


def _type_name(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return " | ".join(repr(choice) for choice in typing.get_args(hint))
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " | ".join(_type_name(part) for part in typing.get_args(hint))
    if hint is type(None):
        return "None"
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint).replace("typing.", "")


def _problems(data: Any, into: Any, path: str) -> typing.Iterator[str]:
    """Unknown and missing keys of a dataclass and of the dataclasses inside it; types are cattrs's part."""
    known = [field.name for field in dataclasses.fields(into) if field.init]
    hints = typing.get_type_hints(into)
    for key in data:
        if key not in known:
            yield f"unknown key {path + str(key)!r}{did_you_mean(str(key), known)} (known: {', '.join(known)})"
    for field in dataclasses.fields(into):
        if field.init and field.name not in data:
            if field.default is MISSING and field.default_factory is MISSING:
                yield f"missing key {path + field.name!r}"
        elif field.init and dataclasses.is_dataclass(hints[field.name]) and hints[field.name] is not Schedule:
            value = data[field.name]
            if isinstance(value, Mapping):
                yield from _problems(value, hints[field.name], f"{path}{field.name}.")
        elif field.init and typing.get_origin(hints[field.name]) is dict and not isinstance(data[field.name], Mapping):
            value = data[field.name]
            yield f"expected a mapping at {path}{field.name}, found {type(value).__name__} {value!r}"
        elif field.init and isinstance(data[field.name], str) and _is_list(hints[field.name]):
            yield f"expected a list at {path}{field.name}, found str {data[field.name]!r}"  # its letters would be taken


def _is_list(hint: Any) -> bool:
    """Whether a field takes a list and no text."""
    members = typing.get_args(hint) if _is_union(hint) else (hint,)
    takes_text = any(each in (str, Path) or typing.get_origin(each) is typing.Literal for each in members)
    return not takes_text and any(typing.get_origin(each) in (list, tuple) for each in members)


@cache
def _converter() -> Converter:
    from cattrs import Converter

    converter = Converter(forbid_extra_keys=True)
    for kind, accepts in ((int, int), (float, (int, float)), (str, str), (bool, bool)):
        converter.register_structure_hook(kind, _strict(kind, accepts))
    converter.register_structure_hook_func(_is_choice, _choice)
    converter.register_structure_hook(Path, lambda value, _: _path(value))
    converter.register_unstructure_hook(Path, str)
    converter.register_structure_hook(Schedule, lambda value, _: _schedule(value))
    converter.register_unstructure_hook(Schedule, _plain_schedule)
    converter.register_structure_hook_func(_is_union, lambda value, hint: _union(converter, value, hint))
    return converter


def _strict(kind: type, accepts: type | tuple[type, ...]) -> typing.Callable[[Any, Any], Any]:
    def check(value: Any, _: Any) -> Any:
        if not isinstance(value, accepts) or (isinstance(value, bool) and kind is not bool):
            raise TypeError(f"expected {_type_name(kind)}, found {type(value).__name__} {value!r}")
        return kind(value)

    return check


def _is_choice(hint: Any) -> bool:
    return typing.get_origin(hint) is typing.Literal


def _is_one_of(value: Any, choices: tuple[Any, ...]) -> bool:
    """Whether a value is a choice: 1 is neither True nor 1.0."""
    return any(type(value) is type(choice) and value == choice for choice in choices)


def _choice(value: Any, hint: Any) -> Any:
    if not _is_one_of(value, typing.get_args(hint)):
        raise TypeError(f"expected {_type_name(hint)}, found {type(value).__name__} {value!r}")
    return value


def _path(value: Any) -> Path:
    if not isinstance(value, str | Path) or value == "":
        raise TypeError(f"expected a path, found {type(value).__name__} {value!r}")
    return Path(value)


def _schedule(value: Any) -> Schedule:
    if isinstance(value, Schedule):
        return value
    if isinstance(value, list):
        return _schedule_of_pieces(cast("list[Any]", value))
    if not isinstance(value, Mapping):
        raise TypeError(f"expected a schedule {{from, to, over}}, found {type(value).__name__} {value!r}")
    return _schedule_of_pieces([value])


def _schedule_of_pieces(pieces: list[Any]) -> Schedule:
    """Pieces in turn; ``from`` is by default where the piece before ended, ``to`` where this one starts."""
    whole: list[dict[str, Any]] = []
    for number, piece in enumerate(pieces):
        require(isinstance(piece, Mapping), f"schedule: each piece is {{from, to, over}}, found {piece!r}")
        unknown = sorted(set(map(str, piece)) - {*_PIECE})
        require(not unknown, f"schedule: unknown key {unknown} (known: {', '.join(_PIECE)})")
        need = [key for key in ("from", "to") if key not in piece] if len(pieces) == 1 else []
        need += ["from"] if number == 0 and "from" not in piece and len(pieces) > 1 else []
        need += ["over"] if len(pieces) > 1 and "over" not in piece else []
        require(not need, f"schedule: missing key {need}" + (f" in piece {number + 1}" if len(pieces) > 1 else ""))
        start = piece["from"] if "from" in piece else whole[-1]["end"]
        end = piece.get("to", start)
        others = {key: piece[key] for key in ("over", "shape", "restarts") if key in piece}
        whole.append({"start": start, "end": end, **others})
    require(len(whole) > 0, "schedule: an empty list")
    made: Schedule | None = None
    for piece in reversed(whole):
        made = Schedule(**piece, then=made)
    return cast("Schedule", made)


_PIECE = ("from", "to", "over", "shape", "restarts")


def _plain_schedule(schedule: Schedule) -> Any:
    plain: list[dict[str, Any]] = []
    for piece in schedule.pieces():
        plain.append({"from": piece.start, "to": piece.end, "over": piece.over})
        if piece.shape != "linear":
            plain[-1]["shape"] = piece.shape
        if piece.restarts:
            plain[-1]["restarts"] = piece.restarts
    return plain[0] if len(plain) == 1 else plain


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _union(converter: Converter, value: Any, hint: Any) -> Any:
    """The first member that accepts the value exactly; a number meets int before float, a mapping a Schedule."""
    members = typing.get_args(hint)
    if value is None and type(None) in members:
        return None
    errors: list[str] = []
    for member in members:
        if member is type(None):
            continue
        try:
            return converter.structure(value, member)
        except ConfigError:
            raise
        except Exception as error:  # noqa: BLE001 - another member may accept it; if none does, all reasons are shown
            errors.extend(_messages(error))
    raise TypeError(f"expected {_type_name(hint)}, found {type(value).__name__} {value!r}")


def _messages(error: BaseException) -> list[str]:
    """Flatten cattrs's exception groups into one line each, with the path of the field."""
    from cattrs import transform_error

    return [
        message.replace("invalid type, ", "").replace(" @ $.", " at ").replace(" @ $", "")
        for message in transform_error(error, format_exception=_plain)
    ]


def _plain(error: BaseException, _: type | None) -> str:
    return str(error) or type(error).__name__
