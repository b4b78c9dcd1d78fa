"""Someone who comes from SAELens changes the import line: the names are there, and they are called the same way.

`golden/signatures.json` holds all public names of SAELens' synthetic package with their signatures. Whatever differs here
stands in one of the tables below, and in the same words on the page "Coming from SAELens".
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sae_synthetic
from sae_core import create

TABLE: dict[str, Any] = json.loads((Path(__file__).parent / "golden" / "signatures.json").read_text())
REFERENCE: dict[str, dict[str, Any]] = TABLE["names"]
DOCS = Path(__file__).parents[3] / "docs"

LEFT_OUT_ARGUMENTS = {"SyntheticSAERunnerConfig": {"sae_lens_version"}}
LEFT_OUT_MEMBERS = {"SyntheticSAERunnerConfig": {"to_sae_trainer_config"}}
OTHER_DEFAULTS = {("SyntheticSAERunnerConfig", "n_batches_for_norm_estimate")}


def _parameters(thing: Any) -> dict[str, Any]:
    return {p.name: p.default for p in inspect.signature(thing).parameters.values() if p.name not in ("self", "cls")}


def _assert_called_alike(name: str, ours: dict[str, Any], wanted: dict[str, Any], *, extra_needs_default: bool) -> None:
    wanted = {key: value for key, value in wanted.items() if key not in LEFT_OUT_ARGUMENTS.get(name, ())}
    assert list(ours)[: len(wanted)] == list(wanted)
    for key, default in wanted.items():
        if default == "required":
            continue  # code that gives an argument goes on working where it has a default
        if default == "other":
            assert ours[key] is not inspect.Parameter.empty, key
        elif (name, key) not in OTHER_DEFAULTS:
            assert ours[key] == default[0], key
    if extra_needs_default:
        required = [key for key in list(ours)[len(wanted) :] if ours[key] is inspect.Parameter.empty]
        assert not required, "an argument that SAELens does not have must have a default"


@pytest.mark.parametrize("name", REFERENCE)
def test_every_public_name_of_sae_lens_is_here_and_called_the_same_way(name: str) -> None:
    wanted, ours = REFERENCE[name], getattr(sae_synthetic, name)
    assert name in sae_synthetic.__all__
    if wanted["kind"] == "constant":
        assert ours == wanted["value"]
    if wanted["kind"] in ("class", "function"):
        assert inspect.isclass(ours) == (wanted["kind"] == "class")
        _assert_called_alike(name, _parameters(ours), wanted["parameters"], extra_needs_default=True)
    for member, signature in wanted.get("members", {}).items():
        if member in LEFT_OUT_MEMBERS.get(name, ()):
            assert not hasattr(ours, member)
        elif signature == "property":
            assert isinstance(inspect.getattr_static(ours, member), property)
        else:
            _assert_called_alike(member, _parameters(getattr(ours, member)), signature, extra_needs_default=True)


def test_the_tables_of_differences_hold_nothing_that_is_no_difference() -> None:
    for name, missing in LEFT_OUT_ARGUMENTS.items():
        assert missing <= set(REFERENCE[name]["parameters"])
        assert not missing & set(_parameters(getattr(sae_synthetic, name)))
    for name, missing in LEFT_OUT_MEMBERS.items():
        assert missing <= set(REFERENCE[name]["members"])
    for name, key in OTHER_DEFAULTS:
        assert _parameters(getattr(sae_synthetic, name))[key] != REFERENCE[name]["parameters"][key][0]


def test_the_page_for_people_from_sae_lens_names_every_difference() -> None:
    page = (DOCS / "coming-from-saelens-synthetic.md").read_text(encoding="utf-8")
    named = [name for table in (LEFT_OUT_ARGUMENTS, LEFT_OUT_MEMBERS) for names in table.values() for name in names]
    for name in [*named, *(key for _, key in OTHER_DEFAULTS), TABLE["sae_lens"]]:
        assert name in page, name


def test_each_class_of_sae_lens_has_a_row_that_says_what_to_write() -> None:
    page = (DOCS / "coming-from-saelens-synthetic.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1:3] for line in page.splitlines() if line.startswith("| `") and "`create(" in line]
    told = {name for names, _ in rows for name in re.findall(r"`(\w+)`", names)}
    assert told == set(TABLE["architectures"])
    for _, call in rows:
        sae = eval(call.strip().strip("`"), {"create": create})
        assert sae.d_sae == 64


def test_every_name_is_where_the_list_of_names_says() -> None:
    for name in set(sae_synthetic.__all__) - {"__version__"}:
        assert name != sae_synthetic._HOMES[name], "a module of that name would shadow it once imported"
        value = getattr(sae_synthetic, name)
        home = importlib.import_module(f"sae_synthetic.{sae_synthetic._HOMES[name]}")
        assert value is getattr(home, name)
        assert name in home.__all__, name
    with pytest.raises(AttributeError, match="has no attribute 'FeatureDict'"):
        sae_synthetic.FeatureDict  # noqa: B018


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = "import sys, sae_synthetic, sae_synthetic._plugin; print({'torch', 'numpy', 'scipy', 'plotly'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
