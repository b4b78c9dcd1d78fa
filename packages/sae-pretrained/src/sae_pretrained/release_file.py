"""Releases as patterns: what turns a few lines of text into hundreds of catalogue entries.

The SAEs of a release differ in layer, width and sparsity, and their names follow from these. So a release is a list of
*groups*. A group has templates (`id`, `path`, `neuronpedia`, …) with named placeholders, the names of its `columns`,
and `rows` that fill them. A cell may hold alternatives, ``16k,65k``, and integer ranges, ``0..25``; a row stands for every
combination of its cells, and ``""`` is the empty text. These are 2 x 2 + 1 entries:

```toml
repository = "lab/saes"          # on the Hub
model = "lab/small"              # base model, by its Hub id
format = "sae_lens"              # which loader reads the files

[[saes]]
id = "blocks.{layer}.hook_resid_post_{width}"
path = "resid/{layer}/{width}"   # folder or file in the repository; "{id}" if left out
l0 = "{l0}"
columns = "layer width l0"
rows = '''
0..1 1k,4k 20
2    4k    35.5
'''
```

A column named `layer` also says which layer of the model an entry belongs to. Facts that the files themselves lack are
`overrides`, for a release or for one group. The same keys are read from TOML (the releases that come with this package)
and YAML (those of users).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any

from sae_core.errors import ConfigError, did_you_mean
from sae_core.protocols import CatalogueEntry

__all__ = ["parse_release", "sort_key"]

_RELEASE_KEYS = ("repository", "model", "format", "revision", "model_revision", "links", "overrides", "saes")
_MOST = 100_000  # SAEs in one group; the largest release that is known has some thousand
_TEMPLATES = ("id", "path", "neuronpedia")
_NUMBERS = ("l0", "variance_explained", "norm_scaling_factor")
_GROUP_KEYS = (*_TEMPLATES, *_NUMBERS, "overrides", "columns", "rows")


def parse_release(name: str, facts: Any, origin: str) -> dict[str, CatalogueEntry]:
    """The entries of release `name` by id, as the file orders them; `facts` is what TOML or YAML made of its text.

    Raises ConfigError that names `origin` (a file), the release and the key.

    >>> facts = {"repository": "lab/saes", "model": "lab/m", "format": "sae_lens",
    ...          "saes": [{"id": "layer{layer}", "path": "l{layer}.pt", "columns": "layer", "rows": "8..10"}]}
    >>> entries = parse_release("lab-saes", facts, "lab.yaml")
    >>> [(entry.sae_id, entry.path, entry.layer) for entry in entries.values()]
    [('layer8', 'l8.pt', 8), ('layer9', 'l9.pt', 9), ('layer10', 'l10.pt', 10)]
    >>> parse_release("lab-saes", facts | {"modle": "x"}, "lab.yaml")
    Traceback (most recent call last):
    sae_core.errors.ConfigError: lab.yaml: release 'lab-saes': unknown key 'modle'; did you mean 'model'? (known: \
repository, model, format, revision, model_revision, links, overrides, saes)
    """
    where = f"{origin}: release {name!r}"
    _check_keys(facts, _RELEASE_KEYS, ("repository", "saes"), where)
    for key in ("repository", "model", "format", "revision", "model_revision"):
        if not isinstance(facts.get(key), str | None):
            raise ConfigError(f"{where}: {key!r} must be text, not {facts[key]!r}")
    _mapping(facts, "links", where)
    groups = facts["saes"]
    if not isinstance(groups, list) or not groups:
        raise ConfigError(f"{where}: 'saes' must be a list with at least one SAE, not {groups!r}")

    entries: dict[str, CatalogueEntry] = {}
    for number, group in enumerate(groups, start=1):
        for entry in _group_entries(name, facts, group, f"{where}: SAE group {number}"):
            if entry.sae_id in entries:
                raise ConfigError(f"{where}: SAE group {number}: the id {entry.sae_id!r} is given twice")
            entries[entry.sae_id] = entry
    return entries


def sort_key(text: str) -> list[tuple[int, int, str]]:
    """Orders names as people do: numbers inside them by value.

    >>> sorted(["layer_10", "layer_9", "embedding"], key=sort_key)
    ['embedding', 'layer_9', 'layer_10']
    """
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", text) if part]


def _group_entries(name: str, facts: Mapping[str, Any], group: Any, where: str) -> Iterator[CatalogueEntry]:
    _check_keys(group, _GROUP_KEYS, ("id",), where)
    columns, rows = _table(group, where)
    templates = {key: _template(group, key, columns, where) for key in _TEMPLATES if key in group}
    numbers = {key: _template(group, key, columns, where) for key in _NUMBERS if key in group}
    for column in columns:
        if column != "layer" and not any(
            "{" + column + "}" in used for used in (*templates.values(), *numbers.values())
        ):
            raise ConfigError(f"{where}: no template uses the column {column!r}")
    links = facts.get("links", {})
    overrides = {**_mapping(facts, "overrides", where), **_mapping(group, "overrides", where)}
    for cells in rows:
        values = dict(zip(columns, cells, strict=True))
        values["id"] = templates["id"].format_map(values)
        filled = {key: _number(template.format_map(values), key, where) for key, template in numbers.items()}
        scale = filled.pop("norm_scaling_factor", None)
        yield CatalogueEntry(
            release=name,
            sae_id=values["id"],
            repo_id=facts["repository"],
            path=templates.get("path", "{id}").format_map(values),
            model=facts.get("model"),
            format=facts.get("format"),
            revision=facts.get("revision"),
            model_revision=facts.get("model_revision"),
            layer=int(values["layer"]) if values.get("layer", "").isdecimal() else None,
            neuronpedia_id=templates["neuronpedia"].format_map(values) if "neuronpedia" in templates else None,
            links=links,
            overrides=overrides if scale is None else {**overrides, "norm_scaling_factor": scale},
            **filled,
        )


def _table(group: Mapping[str, Any], where: str) -> tuple[list[str], Iterator[tuple[str, ...]]]:
    """The names of a group's columns, and one tuple of their values for each of its SAEs."""
    if "columns" not in group and "rows" not in group:
        return [], iter([()])
    for key in ("columns", "rows"):
        if not isinstance(group.get(key), str):
            raise ConfigError(f"{where}: {key!r} must be text; 'columns' and 'rows' go together")
    columns = group["columns"].split()
    for column in columns:
        if not column.isidentifier() or column == "id" or columns.count(column) > 1:
            raise ConfigError(f"{where}: 'columns' cannot have {column!r}; use different words, and none of them 'id'")
    return columns, _rows(group["rows"], columns, where)


def _rows(text: str, columns: list[str], where: str) -> Iterator[tuple[str, ...]]:
    total = 0
    for line in text.splitlines():
        cells = line.split()
        if cells and len(cells) != len(columns):
            raise ConfigError(
                f"{where}: {line!r} has {len(cells)} cells for {len(columns)} columns ({' '.join(columns)})"
            )
        if cells:
            ways = [_alternatives(cell, f"{where}: {line!r}") for cell in cells]
            total += math.prod(map(len, ways))
            if total > _MOST:
                raise ConfigError(f"{where}: {line!r}: more than {_MOST} SAEs in one group; are its ranges right?")
            yield from product(*ways)


def _alternatives(cell: str, where: str) -> list[str]:
    """``16k,65k`` and ``0..25`` and ``""``, written out. Raises ConfigError for ranges that are empty or too long."""
    written: list[str] = []
    for part in cell.split(","):
        first, dots, last = part.partition("..")
        if dots and first.isdecimal() and last.isdecimal():
            if max(len(first), len(last)) > 9 or int(last) - int(first) >= _MOST:
                raise ConfigError(f"{where}: the range {part} has more than {_MOST} numbers")
            if int(last) < int(first):
                raise ConfigError(f"{where}: the range {part} is empty; the smaller number comes first")
            written.extend(map(str, range(int(first), int(last) + 1)))
        else:
            written.append("" if part == '""' else part)
    return written


def _template(group: Mapping[str, Any], key: str, columns: list[str], where: str) -> str:
    """A template whose placeholders are all known, so that ``str.format_map`` does no more than fill them in."""
    template = group[key]
    if key in _NUMBERS and isinstance(template, int | float) and not isinstance(template, bool):
        return str(template)
    if not isinstance(template, str):
        raise ConfigError(f"{where}: {key!r} must be text, not {template!r}; put it in quotation marks")
    known = columns if key == "id" else [*columns, "id"]
    rest = template
    for name in known:
        rest = rest.replace("{" + name + "}", "")
    if "{" in rest or "}" in rest:
        raise ConfigError(
            f"{where}: {key!r} is {template!r}; its placeholders must be columns ({', '.join(known) or 'none'})"
        )
    return template


def _number(text: str, key: str, where: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"{where}: {key!r} must be a number, not {text!r}") from None


def _mapping(facts: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    value = facts.get(key, {})
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: {key!r} must be a mapping, not {value!r}")
    return value


def _check_keys(facts: Any, known: tuple[str, ...], required: tuple[str, ...], where: str) -> None:
    if not isinstance(facts, dict):
        raise ConfigError(f"{where}: expected a mapping with the keys {', '.join(known)}, found {facts!r}")
    for key in facts:
        if key not in known:
            raise ConfigError(
                f"{where}: unknown key {key!r}{did_you_mean(str(key), known)} (known: {', '.join(known)})"
            )
    for key in required:
        if key not in facts:
            raise ConfigError(f"{where}: missing key {key!r}")
