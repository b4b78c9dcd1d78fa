"""Names of files in a source, and its small JSON and YAML files."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from sae_core.errors import ConfigError, FormatError
from sae_core.format.files import parse_json
from sae_core.format.trouble import first_line, trouble
from sae_core.protocols import FileSource

__all__ = ["exists", "first_line", "join", "layer_of", "place", "read_json", "read_yaml"]


def join(folder: str, name: str) -> str:
    """A name inside a folder of a source; `folder` may be empty.

    >>> join("", "cfg.json"), join("layers.3/", "cfg.json")
    ('cfg.json', 'layers.3/cfg.json')
    """
    folder = folder.strip("/")
    return f"{folder}/{name}" if folder and folder != "." else name


def place(source: FileSource, folder: str, name: str = "") -> str:
    """Where a file is, for messages.

    >>> class Repo:
    ...     location = "lab/saes@main"
    >>> place(Repo(), "layer_3", "cfg.json")
    'lab/saes@main/layer_3/cfg.json'
    """
    parts = [source.location.rstrip("/"), join(folder, name).strip("/")]
    return "/".join(part for part in parts if part)


def exists(source: FileSource, folder: str, *names: str) -> bool:
    """Whether all `names` are in `folder`."""
    return all(source.exists(join(folder, name)) for name in names)


def layer_of(path: str, pattern: str = "layer_") -> int | None:
    """The number after `pattern` in a path, the last one if there are several; None when there is none.

    >>> layer_of("resid_post/layer_12/width_16k"), layer_of("embedding/width_4k")
    (12, None)
    """
    import re

    found = re.findall(re.escape(pattern) + r"(\d+)", path)
    return int(found[-1]) if found else None


def read_json(source: FileSource, name: str) -> dict[str, Any]:
    """A JSON object. Raises FormatError naming the file when it is missing or not one."""
    where, path = place(source, "", name), source.path(name)
    with trouble(where, "reading"):
        text = path.read_text("utf-8")
    return parse_json(text, where)


def read_yaml(source: FileSource, name: str) -> dict[str, Any]:
    """A YAML mapping of plain values; tags that would construct objects are refused."""
    from sae_core.yaml_text import parse_yaml

    return _mapping(source, name, parse_yaml, "YAML mapping")


def _mapping(source: FileSource, name: str, parse: Callable[[str], object], kind: str) -> dict[str, Any]:
    where = place(source, "", name)
    path = source.path(name)
    with trouble(where, "reading"):
        try:
            value = parse(path.read_text("utf-8"))
        except ConfigError as error:
            raise FormatError(f"{where}: not a {kind}: {first_line(error)}") from error
    if not isinstance(value, dict):
        raise FormatError(f"{where}: expected a {kind}, found {type(value).__name__}")
    return cast("dict[str, Any]", value)
