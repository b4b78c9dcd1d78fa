"""Write the release files of this package from a SAELens catalogue (``pretrained_saes.yaml``).

    python tools/build_releases.py pretrained_saes.yaml --diff     # what would change; nothing is written
    python tools/build_releases.py pretrained_saes.yaml

For each release it looks at the numbers in the SAEs' ids, paths and Neuronpedia ids, finds templates that several SAEs
share, and writes their values as the fewest rows it can. It also writes ``tests/catalogue_digest.json``: the number of
SAEs and a checksum of every release, taken from the *source*, which the tests compare with what the written files
expand to. Facts that the source has wrong are corrected here, each with its reason.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import itertools
import json
import re
import sys
import tomllib
from collections import defaultdict
from pathlib import Path
from typing import Any

import yaml
from sae_pretrained.models import base_model
from sae_pretrained.release_file import parse_release

PACKAGE = Path(__file__).parents[1]
RELEASES = PACKAGE / "src" / "sae_pretrained" / "releases"
DIGEST = PACKAGE / "tests" / "catalogue_digest.json"

MODEL_CORRECTIONS = {
    # Its repository, google/gemma-scope-9b-it-res, and its canonical sibling say that the model is the instruction-tuned one.
    "gemma-scope-9b-it-res": "google/gemma-2-9b-it",
}

# What the numbers in a name mean, by what stands beside them.
_PATTERNS = {
    "layer": (
        r"(?<=layer_)\d+|(?<=blocks\.)\d+|(?<=^layer)\d+|(?<=^l)\d+(?=[ram]_)|(?<=-L)\d+(?=[RAM]-)|(?<=/L)\d+(?=R$)"
        r"|(?<=_L)\d+(?=_)|^\d+(?=-(?:att|mlp|res)|$)|(?<=/)\d+(?=-)"
    ),
    "width": r"(?<=width_)\d+[km]|(?<=-)\d+[km](?=$|__)",
    "size": r"(?<=l0_)(?:big|medium|small)",
    "l0": r"(?<=average_l0_)\d+|(?<=__l0-)\d+",
    "trainer": r"(?<=trainer_)\d+",
    "step": r"(?<=step_)\d+",
    "affine": r"_affine$",
}
_NUMBERS = re.compile("|".join(f"(?P<{name}>{pattern})" for name, pattern in _PATTERNS.items()))
_NUMERIC_KEYS = ("l0", "variance_explained", "norm_scaling_factor")
_KNOWN_SAE_KEYS = {"id", "path", "neuronpedia", *_NUMERIC_KEYS}
_KNOWN_RELEASE_KEYS = {"repo_id", "model", "conversion_func", "links", "config_overrides", "saes"}


def main() -> int:
    """Run the tool."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--diff", action="store_true", help="print what is new, gone and changed, and write nothing")
    arguments = parser.parse_args()
    source = read_source(arguments.source)
    if arguments.diff:
        print("\n".join(differences(source)) or "nothing has changed")  # noqa: T201 - a tool reports
        return 0
    for old in RELEASES.glob("*.toml"):
        old.unlink()
    for name, release in source.items():
        (RELEASES / f"{name}.toml").write_text(write_release(name, release))
    DIGEST.write_text(json.dumps(digest(source), indent=1, sort_keys=True) + "\n")
    lines = sum(len(path.read_text().splitlines()) for path in RELEASES.glob("*.toml"))
    print(f"{len(source)} releases, {sum(len(release['saes']) for release in source.values())} SAEs, {lines} lines")  # noqa: T201 - a tool reports
    return 0


def differences(source: dict[str, dict[str, Any]]) -> list[str]:
    """What the source says that the written files do not, one line each: releases, SAEs, and facts of SAEs."""
    said: list[str] = []
    written = {path.stem: path for path in RELEASES.glob("*.toml")}
    for name in sorted({*source, *written}):
        if name not in source:
            said.append(f"- {name}: gone")
            continue
        new = parse_release(name, tomllib.loads(write_release(name, source[name])), name)
        if name not in written:
            said.append(f"+ {name}: {len(new)} SAEs of {source[name].get('model')}, {source[name].get('repo_id')}")
            continue
        old = parse_release(name, tomllib.loads(written[name].read_text(encoding="utf-8")), name)
        said += [f"+ {name}: {sae_id}" for sae_id in new.keys() - old.keys()]
        said += [f"- {name}: {sae_id}" for sae_id in old.keys() - new.keys()]
        for sae_id in sorted(old.keys() & new.keys()):
            before, after = dataclasses.asdict(old[sae_id]), dataclasses.asdict(new[sae_id])
            said += [
                f"~ {name}: {sae_id}: {key} {before[key]!r} -> {after[key]!r}"
                for key in before
                if before[key] != after[key]
            ]
    return said


def read_source(path: Path) -> dict[str, dict[str, Any]]:
    """The source's releases, with its defects mended: nested releases unnested, paths text, models by Hub id."""
    releases = yaml.load(path.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    for name, release in releases.items():
        _unnest(name, release)
        if unknown := release.keys() - _KNOWN_RELEASE_KEYS:
            sys.exit(f"{name}: this script does not know the keys {sorted(unknown)}")
        for sae in release["saes"]:
            if unknown := sae.keys() - _KNOWN_SAE_KEYS:
                sys.exit(f"{name}: {sae['id']}: this script does not know the keys {sorted(unknown)}")
            sae["path"] = str(sae["path"])
        release["model"] = MODEL_CORRECTIONS.get(name) or base_model(release["model"]).id
        release["format"] = release["conversion_func"] or "sae_lens"
    return releases


def _unnest(name: str, release: dict[str, Any]) -> None:
    """A release indented too far sits inside another's SAE, where nobody finds it; take its SAEs out."""
    for sae in list(release["saes"]):
        if "saes" not in sae:
            continue
        nested = {key: sae.pop(key) for key in ("conversion_func", "links", "model", "repo_id", "saes")}
        same_place = all(nested[key] == release[key] for key in ("conversion_func", "links", "model", "repo_id"))
        if not same_place:
            sys.exit(f"{name}: the release nested in {sae['id']} is another one; it needs a name of its own")
        known = {other["id"]: other for other in release["saes"]}
        for lost in nested["saes"]:
            if known.setdefault(lost["id"], lost) != lost:
                sys.exit(f"{name}: {lost['id']} is described in two ways")
        release["saes"] = list(known.values())


def digest(source: dict[str, dict[str, Any]]) -> dict[str, list[Any]]:
    """Release -> number of SAEs and checksum of all facts, as `tests/test_catalogue.py` computes them from our side."""
    table: dict[str, list[Any]] = {}
    for name, release in source.items():
        overrides = release.get("config_overrides", {})
        lines: list[str] = []
        for sae in release["saes"]:
            scale = {"norm_scaling_factor": sae["norm_scaling_factor"]} if "norm_scaling_factor" in sae else {}
            facts = [
                sae["id"],
                release["repo_id"],
                sae["path"],
                release["model"],
                release["format"],
                None if sae.get("l0") is None else float(sae["l0"]),
                sae.get("variance_explained"),
                sae.get("neuronpedia"),
                {**overrides, **scale},
                release.get("links", {}),
            ]
            lines.append(json.dumps(facts, sort_keys=True))
        table[name] = [len(lines), hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()]
    return table


# --- From SAEs to templates ---


def write_release(name: str, release: dict[str, Any]) -> str:
    """The text of one release file."""
    saes = release["saes"]
    groups = _groups(saes, free_paths=False)
    if len(groups) > 3 and len(groups) > len(saes) / 3:  # no pattern in the paths: write each out
        groups = _groups(saes, free_paths=True)
    lines = [f"repository = {json.dumps(release['repo_id'])}", f"model = {json.dumps(release['model'])}"]
    if name in MODEL_CORRECTIONS:
        lines[-1] += "  # other lists say gemma-2-9b; the repository holds SAEs of the instruction-tuned model"
    lines.append(f"format = {json.dumps(release['format'])}")
    for key, ours in (("links", "links"), ("config_overrides", "overrides")):
        if release.get(key):
            lines.append(f"{ours} = {_inline(release[key])}")
    for templates, rows in groups:
        columns = list(rows[0])
        lines += ["", "[[saes]]"]
        lines += [f"{key} = {json.dumps(value)}" for key, value in templates.items()]
        if columns:
            merged = _fewest_rows([tuple(row[column] for column in columns) for row in rows])
            written = _aligned(merged)
            lines.append(f'columns = "{" ".join(columns)}"')
            lines += [f'rows = "{written[0]}"'] if len(written) == 1 else ['rows = """', *written, '"""']
    return "\n".join(lines) + "\n"


def _groups(saes: list[dict[str, Any]], *, free_paths: bool) -> list[tuple[dict[str, Any], list[dict[str, str]]]]:
    """SAEs that share templates, as (templates, values of the columns of each SAE)."""
    found: dict[tuple[tuple[str, str], ...], list[dict[str, str]]] = defaultdict(list)
    for sae in saes:
        values: dict[str, str] = {}
        templates = {"id": _template(sae["id"], values)}
        if "size" in values and "affine" not in values:
            values["affine"] = ""
            templates["id"] += "{affine}"
        if sae["path"].endswith(sae["id"]):
            templates["path"] = _template(sae["path"].removesuffix(sae["id"]), values) + "{id}"
        elif free_paths:
            values["path"] = sae["path"]
            templates["path"] = "{path}"
        else:
            templates["path"] = _template(sae["path"], values)
        if "neuronpedia" in sae:
            templates["neuronpedia"] = _template(sae["neuronpedia"], values)
        for key in _NUMERIC_KEYS:
            if key in sae:
                column = key if values.get(key, str(sae[key])) == str(sae[key]) else f"{key}_published"
                values[column] = str(sae[key])
                templates[key] = "{" + column + "}"
        if templates["path"] == "{id}":
            del templates["path"]
        found[tuple(templates.items())].append(values)

    groups: list[tuple[dict[str, Any], list[dict[str, str]]]] = []
    for key, rows in found.items():
        templates: dict[str, Any] = dict(key)
        constant = {c: v for c, v in rows[0].items() if c != "layer" and all(row[c] == v for row in rows)}
        for field, template in templates.items():
            for column, value in constant.items():
                template = template.replace("{" + column + "}", value)
            templates[field] = float(template) if field in _NUMERIC_KEYS and "{" not in template else template
        order = [c for c in ("layer", "width", "size") if c in rows[0]]
        order += [c for c in rows[0] if c not in order]
        groups.append((templates, [{c: row[c] for c in order if c not in constant} for row in rows]))
    return groups


def _template(text: str, values: dict[str, str]) -> str:
    """`text` with its meaningful numbers as placeholders; their values are added to `values`."""

    def placeholder(match: re.Match[str]) -> str:
        name = match.lastgroup or ""
        while values.setdefault(name, match.group()) != match.group():
            name += "_of_files"
        return "{" + name + "}"

    return _NUMBERS.sub(placeholder, text)


def _fewest_rows(rows: list[tuple[str, ...]]) -> list[tuple[tuple[str, ...], ...]]:
    """Rows of alternatives that stand for exactly `rows`: merging column by column, in the best order of columns."""
    best: list[tuple[tuple[str, ...], ...]] = []
    for order in itertools.permutations(range(len(rows[0]))):
        merged = [tuple((cell,) for cell in row) for row in rows]
        for column in order:
            alike: dict[tuple[tuple[str, ...], ...], list[str]] = defaultdict(list)
            for row in merged:
                alike[row[:column] + row[column + 1 :]].extend(row[column])
            merged = [(*key[:column], tuple(cells), *key[column:]) for key, cells in alike.items()]
        if not best or len(merged) < len(best):
            best = merged
    return sorted(best, key=lambda row: [_natural(cell) for cell in row])


def _aligned(rows: list[tuple[tuple[str, ...], ...]]) -> list[str]:
    written = [[_cell(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*written, strict=True)]
    return [" ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in written]


def _cell(alternatives: tuple[str, ...]) -> str:
    """``0..25`` for a run of at least three integers, else the alternatives with commas."""
    parts: list[str] = []
    run: list[int] = []
    for value in [*sorted(alternatives, key=_natural), None]:
        if value is not None and value.isdigit() and (not run or int(value) == run[-1] + 1):
            run.append(int(value))
            continue
        parts += [f"{run[0]}..{run[-1]}"] if len(run) > 2 else map(str, run)
        run = [int(value)] if value is not None and value.isdigit() else []
        if value is not None and not run:
            parts.append(value or '""')
    return ",".join(parts)


def _natural(text: Any) -> list[tuple[int, str]]:
    text = text[0] if isinstance(text, tuple) else text
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", text)]


def _inline(mapping: dict[str, Any]) -> str:
    """A TOML inline table."""
    pairs = (
        f"{key} = {_inline(value) if isinstance(value, dict) else json.dumps(value)}" for key, value in mapping.items()
    )
    return "{ " + ", ".join(pairs) + " }"


if __name__ == "__main__":
    sys.exit(main())
