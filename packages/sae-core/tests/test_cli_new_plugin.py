"""``sae-core new-plugin``: what it writes can be built, installed and listed, and keeps the promises of its kind."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from sae_core.cli.new_plugin import render, variables_for
from sae_core.plugins.finding import version_problem
from sae_core.plugins.manager import KINDS
from sae_core.testing import PluginFolder


def install(site: PluginFolder, projects: list[Path]) -> None:
    """Build the projects' wheels and unpack them where wheels of pure Python belong."""
    code = """
import sys
from hatchling.builders.wheel import WheelBuilder
for project in sys.argv[1:]:
    print(*WheelBuilder(project).build(versions=["standard"]))
"""
    built = subprocess.run(
        [sys.executable, "-c", code, *map(str, projects)], capture_output=True, check=True, text=True, timeout=120
    )
    for wheel in built.stdout.split():
        zipfile.ZipFile(wheel).extractall(site.path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_project_has_these_files_and_no_variable_is_left(kind: str, tmp_path: Path) -> None:
    project = render(tmp_path, variables_for("soft-threshold", kind))
    paths = sorted(path for path in project.rglob("*") if path.is_file())
    assert {str(path.relative_to(project)) for path in paths} == {
        "README.md",
        "pyproject.toml",
        "src/sae_soft_threshold/__init__.py",
        "src/sae_soft_threshold/_plugin.py",
        f"src/sae_soft_threshold/{kind}.py",
        "src/sae_soft_threshold/py.typed",
        "tests/test_conformance.py",
    }
    for path in paths:
        text = path.read_text(encoding="utf-8")
        assert "{{" not in text
        assert "}}" not in text.replace("}}}}", "")
        if path.suffix == ".py":
            compile(text, str(path), "exec")
    assert list(tmp_path.glob(".*")) == []


def test_the_requirement_that_is_written_admits_this_core() -> None:
    assert version_problem((f"sae-core{variables_for('cubic')['core']}",)) == ""


@pytest.mark.slow
def test_a_new_plugin_of_each_kind_is_built_listed_and_passes_its_own_tests(site: PluginFolder, tmp_path: Path) -> None:
    """The rest, in an environment of their own and removed again, is in tests/test_isolated_install.py."""
    projects = [render(tmp_path / "projects", variables_for(f"new-{kind}", kind)) for kind in KINDS]
    install(site, projects)
    listing = site.listing("--strict")
    for kind in KINDS:
        listed = listing[f"sae-new-{kind}:new_{kind}"]
        assert (listed["state"], listed["version"], listed["reason"]) == ("loaded", "0.1.0", "")
        assert [(given["kind"], given["name"]) for given in listed["provides"]] == [(kind, f"new_{kind}")]
    command = ["-q", "-p", "no:cacheprovider", "--import-mode=importlib", "-W", "error"]
    command += [str(project / "tests") for project in projects]
    code = f"import runpy, sys; sys.argv[1:] = {command!r}; runpy.run_module('pytest', run_name='__main__')"
    done = site.python(code)
    assert done.returncode == 0, done.stdout
    assert re.search(r"\b\d\d passed, \d+ skipped in\b", done.stdout), done.stdout


@pytest.mark.parametrize("name", ["Cubic", "3d", "cubic_", "a b", "", "sae-", "ünder"])
def test_a_name_that_cannot_be_registered_is_refused(site: PluginFolder, tmp_path: Path, name: str) -> None:
    done = site.cli("new-plugin", name, "--into", str(tmp_path / "out"))
    assert done.returncode == 1
    assert f"{name!r} cannot be the name of a plugin's architecture" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("topk", "sae-core already has the architecture 'topk'; choose another name"),
        ("core", "a package 'sae_core' is installed already; choose another name"),
        ("taken", "out/sae-taken exists already; move it away or choose another name"),
    ],
)
def test_a_name_that_is_taken_is_refused_and_nothing_is_touched(
    site: PluginFolder, tmp_path: Path, name: str, message: str
) -> None:
    keep = tmp_path / "out" / "sae-taken" / "keep.txt"
    keep.parent.mkdir(parents=True)
    keep.write_text("mine")
    done = site.cli("new-plugin", name, "--into", str(tmp_path / "out"))
    assert done.returncode == 1
    assert message in done.stderr
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == [keep]
