"""YAML as people write it in run files and after ``--set``.

Two things differ from PyYAML's safe loader. A key given twice in one mapping is an error, where PyYAML keeps the last one in
silence. And ``1e-4`` is a number, as YAML 1.2 and every programming language have it, where PyYAML reads a string; ``1e5``
and ``1.5e6``, which have no fraction, are whole ones.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any, final

import yaml

from sae_core.errors import ConfigError

__all__ = ["parse_yaml", "set_by_override", "to_yaml"]

# YAML 1.2's numbers that PyYAML, which knows 1.1, takes for strings: an exponent without a dot or without a sign.
_FLOAT = re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$")
_EXPONENT = re.compile(r"^[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)e\+?[0-9]+$")


@final
class _Loader(yaml.SafeLoader):
    def construct_yaml_float(self, node: yaml.ScalarNode) -> float:
        text = str(node.value).replace("_", "").lower()
        if _EXPONENT.match(text):
            exact = Decimal(text)
            if exact == exact.to_integral_value() and abs(exact) <= 2**53:  # beyond, floats are written so, too
                return int(exact)
        return super().construct_yaml_float(node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key: Any = self.construct_object(key_node, deep=True)
            try:
                twice = key in seen
            except TypeError:
                raise ConfigError(
                    f"line {_line(key_node)}: {key!r} cannot be a key; keys are names or numbers"
                ) from None
            if twice:
                raise ConfigError(f"line {_line(key_node)}: the key {key!r} is given twice")
            seen.add(key)
        return super().construct_mapping(node, deep)


@final
class _Dumper(yaml.SafeDumper):
    """Puts text that resembles such a number in quotes, and escapes line ends that it would take for spaces when reading."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    unusual = any(end in text for end in "\x85\u2028\u2029")
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if unusual else None)


_Dumper.add_representer(str, _text)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_yaml_float)
for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1


def parse_yaml(text: str) -> Any:
    """The plain data that `text` holds.

    Raises ConfigError for text that is not YAML, tags that would construct objects, and keys given twice. The message names
    the line, not the file, which the caller knows.

    >>> parse_yaml("{lr: 1e-4, k: 32, samples: 1e5, half: 5e-1}")
    {'lr': 0.0001, 'k': 32, 'samples': 100000, 'half': 0.5}
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"not valid YAML: {error}") from None


def to_yaml(data: Mapping[str, Any]) -> str:
    """The text that `parse_yaml` reads back as `data`, keys in their order."""
    return yaml.dump(dict(data), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def set_by_override(settings: dict[str, Any], override: str) -> None:
    """Set one value of nested `settings` as ``key=value`` says, with dots for nested keys and the value in YAML.

    Raises ConfigError for another form, and where a key on the way is not a mapping.

    >>> run = {"train": {"lr": 0.1}}
    >>> set_by_override(run, "train.lr=3e-4")
    >>> run
    {'train': {'lr': 0.0003}}
    """
    key, equals, value = override.partition("=")
    *parents, leaf = key.split(".")
    if not equals or not all((*parents, leaf)):
        raise ConfigError(f"--set {override!r}: write key=value, with dots for nested keys, say train.lr=0.001")
    place = settings
    for parent in parents:
        inner = place.get(parent)
        if inner is not None and not isinstance(inner, dict):
            raise ConfigError(f"--set {override!r}: {parent!r} is one value, not a group of settings")
        place[parent] = dict(inner or {})  # pyright: ignore[reportUnknownArgumentType] keys of parsed YAML
        place = place[parent]
    try:
        place[leaf] = parse_yaml(value)
    except ConfigError as error:
        raise ConfigError(f"--set {override!r}: {error}") from None
