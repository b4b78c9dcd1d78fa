"""Strict reading of configs and of facts: every key is used, or named as irrelevant with a reason, or refused."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar, cast, final

from sae_core.errors import ConfigError, FormatError, did_you_mean
from sae_core.format.facts import METADATA_FACTS, known_facts

__all__ = ["METADATA_FACTS", "Facts", "Settings"]

T = TypeVar("T")


def _fitting(value: object, kind: type[T]) -> T | None:
    """`value` as a `kind`, or None: whole numbers are also floats, and truth values are nothing else."""
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return cast("T", float(value))
    return value if isinstance(value, kind) and (kind is bool or not isinstance(value, bool)) else None


@final
class Settings:
    """A config file being read: every key must be used, or named as irrelevant, before `finish`.

    >>> settings = Settings({"d_in": 8, "lr": 1e-3, "shape": "round"}, "cfg.json")
    >>> settings.integer("d_in")
    8
    >>> settings.ignore("training only", "lr steps")
    >>> settings.finish()
    Traceback (most recent call last):
    sae_core.errors.FormatError: cfg.json: unknown key 'shape' (known: d_in, lr, steps); if it does not change what the SAE \
computes, load with the fact ignore_keys=['shape']
    """

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self._values = dict(values)
        self.where = where
        self._known: set[str] = set()
        self._expected: set[str] = set()

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def get(self, key: str, kind: type[T], default: T | None = None, *, nullable: bool = False) -> T | None:
        """The value of `key` if it is there, else `default`. Raises FormatError when it is not a `kind`."""
        self._known.add(key)
        if key not in self._values or (nullable and self._values[key] is None):
            return default
        value = self._values[key]
        fitting = _fitting(value, kind)
        if fitting is None:
            raise FormatError(f"{self.where}: key {key!r} is {value!r}, expected {kind.__name__}")
        if isinstance(fitting, float) and not math.isfinite(fitting):
            raise FormatError(f"{self.where}: key {key!r} is {value!r}, expected a finite number")
        return fitting

    def need(self, key: str, kind: type[T]) -> T:
        """The value of a key that must be there."""
        value = self.get(key, kind)
        if value is None:
            raise FormatError(
                f"{self.where}: key {key!r} is missing (found: {', '.join(sorted(self._values)) or 'none'})"
            )
        return value

    def integer(self, key: str, *, at_least: int = 1) -> int:
        """A whole number that must be there."""
        value = self.need(key, int)
        if value < at_least:
            raise FormatError(f"{self.where}: key {key!r} is {value}, expected at least {at_least}")
        return value

    def choice(self, key: str, allowed: Sequence[str], default: str | None = None) -> str:
        """One of a few words; anything else is refused with a list of what can be read."""
        value = self.need(key, str) if default is None else cast("str", self.get(key, str, default))
        if value not in allowed:
            raise FormatError(
                f"{self.where}: {key} {value!r} cannot be loaded{did_you_mean(value, allowed)}; known: {', '.join(allowed)}"
            )
        return value

    def must_be(self, key: str, value: object, why: str) -> None:
        """Refuse the file unless `key` is absent or equal to `value`."""
        self._known.add(key)
        found = self._values.get(key, value)
        if found != value:
            raise FormatError(f"{self.where}: {key} is {found!r}, and only {value!r} can be loaded: {why}")

    def section(self, key: str) -> Settings:
        """A mapping inside this one, to be finished on its own."""
        return Settings(cast("dict[str, Any]", self.need(key, dict)), f"{self.where}: {key}")

    def ignore(self, reason: str, keys: str) -> None:
        """Name keys, separated by spaces, that do not change what the SAE computes; `reason` is for the loader's reader."""
        assert reason
        self._expected.update(keys.split())

    def finish(self, ignore_keys: Iterable[str] = ()) -> None:
        """Refuse keys that nobody read or named."""
        unknown = sorted(set(self._values) - self._known - self._expected - set(ignore_keys))
        if unknown:
            known = sorted(self._known | self._expected)
            raise FormatError(
                f"{self.where}: unknown key{'s' if len(unknown) > 1 else ''} {', '.join(map(repr, unknown))} "
                f"(known: {', '.join(known)}); if it does not change what the SAE computes, load with the fact "
                f"ignore_keys={unknown}"
            )


@final
class Facts:
    """What the caller knows and the files do not say: a catalogue's overrides, or a user's.

    `own` names facts that only this loader understands. Every loader takes those of `METADATA_FACTS`, and `ignore_keys`.
    Raises ConfigError for any other.
    """

    def __init__(self, overrides: Mapping[str, Any] | None, loader: str, own: Iterable[str] = ()) -> None:
        self._values = known_facts(overrides, loader, own)
        self._loader = loader

    def get(self, key: str, kind: type[T], default: T | None = None) -> T | None:
        """One of this loader's own facts. Raises ConfigError when it is not a `kind`."""
        value = self._values.get(key)
        if value is None:
            return default
        fitting = _fitting(value, kind)
        if fitting is None:
            raise ConfigError(f"loader {self._loader!r}: fact {key!r} is {value!r}, expected {kind.__name__}")
        if isinstance(fitting, float) and not math.isfinite(fitting):
            raise ConfigError(f"loader {self._loader!r}: fact {key!r} is {value!r}, expected a finite number")
        return fitting

    @property
    def ignore_keys(self) -> list[str]:
        """Config keys that the caller declares harmless."""
        return list(self.get("ignore_keys", list, []) or [])

    def metadata(self, found: Mapping[str, Any]) -> dict[str, Any]:
        """What the loader found, with the caller's facts over it and unknowns left out."""
        merged = dict(found) | {key: value for key, value in self._values.items() if key in METADATA_FACTS}
        return {key: value for key, value in merged.items() if value is not None}
