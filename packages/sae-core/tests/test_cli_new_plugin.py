"""``sae-core new-plugin``: what it writes can be built, installed and listed, and keeps the promises of its kind."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
from sae_core.cli.new_plugin import render, variables_for
from sae_core.plugins import get_registry, reset_registry
from sae_core.plugins.finding import version_problem
from sae_core.plugins.manager import KINDS
from sae_core.testing import PluginFolder, parametrize_with_checks, run_checks


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


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_plugin_of_each_kind_keeps_the_promises_of_its_kind(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How it is built, installed, listed, used and removed again is in tests/test_isolated_install.py."""
    variables = variables_for(f"new-{kind}", kind)
    project = render(tmp_path, variables)
    monkeypatch.syspath_prepend(str(project / "src"))
    module = importlib.import_module(f"{variables['package']}._plugin")
    try:
        info = get_registry().register(module, variables["distribution"])
        assert [(spec.kind, spec.name) for spec in info.provides] == [(kind, f"new_{kind}")]
        results = run_checks(kind, f"{variables['distribution']}:new_{kind}")
        assert [result for result in results if not result.ok] == []
        marks = parametrize_with_checks([f"new_{kind}"], kind=kind).args[1]
        text = (project / "tests" / "test_conformance.py").read_text(encoding="utf-8")
        assert len(marks) == len(results)
        assert f'parametrize_with_checks(["new_{kind}"]' in text
    finally:
        reset_registry()
        for name in [name for name in sys.modules if name.partition(".")[0] == variables["package"]]:
            del sys.modules[name]


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
