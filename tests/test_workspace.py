"""The workspace: six packages that fit together and are laid out alike."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sae_core
from packaging.requirements import Requirement
from sae_core.plugins import Registry
from sae_core.plugins.errors import OUR_EXTENSIONS
from sae_core.plugins.switches import Switches

ROOT = Path(__file__).parents[1]
MEMBERS = sorted(path.parent for path in (ROOT / "packages").glob("*/pyproject.toml"))
HEAVY = {
    "datasets",
    "huggingface_hub",
    "numpy",
    "plotly",
    "safetensors",
    "scipy",
    "torch",
    "transformer_lens",
    "transformers",
    "wandb",
}


def project(folder: Path) -> dict[str, Any]:
    return tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))


PROJECTS = {folder.name: project(folder)["project"] for folder in MEMBERS}
each_member = pytest.mark.parametrize("folder", MEMBERS, ids=lambda folder: folder.name)


def test_the_members_are_the_six_packages() -> None:
    names = ["sae-core", "sae-explorer", "sae-lm", "sae-loaders-gemmascope", "sae-pretrained", "sae-synthetic"]
    assert list(PROJECTS) == names
    assert [settings["name"] for settings in PROJECTS.values()] == names


def test_versions_are_in_step() -> None:
    assert {settings["version"] for settings in PROJECTS.values()} == {sae_core.__version__}


def test_bounds_between_members_admit_each_other() -> None:
    # uv does not check this inside a workspace, and a release would not install.
    checked = 0
    for name, settings in PROJECTS.items():
        extras = [line for lines in settings.get("optional-dependencies", {}).values() for line in lines]
        for requirement in map(Requirement, [*settings["dependencies"], *extras]):
            if requirement.name in PROJECTS:
                checked += 1
                version = PROJECTS[requirement.name]["version"]
                assert requirement.specifier.contains(version), f"{name} wants {requirement}, there is {version}"
                assert any(bound.operator == "<" for bound in requirement.specifier), (
                    f"{name}: {requirement} has no end"
                )
    assert checked >= 5


def test_the_root_brings_every_member() -> None:
    root = project(ROOT)
    required = {Requirement(line).name for line in root["project"]["dependencies"]}
    assert required == set(PROJECTS)
    assert {name for name, source in root["tool"]["uv"]["sources"].items() if source == {"workspace": True}} == required


@each_member
def test_a_package_has_the_parts_that_all_have(folder: Path) -> None:
    package = folder / "src" / folder.name.replace("-", "_")
    for part in ("__init__.py", "_plugin.py", "py.typed"):
        assert (package / part).is_file(), part
    for part in ("README.md", "CHANGELOG.md"):
        assert (folder / part).read_text(encoding="utf-8").startswith("# "), part
    assert list((folder / "tests").glob("test_*.py"))
    settings = PROJECTS[folder.name]
    assert list(settings["entry-points"]["sae_core.plugins"].values()) == [f"{package.name}._plugin"]
    assert settings["requires-python"] == ">=3.11"
    assert settings["license"] == "MIT"
    assert settings["description"]


@each_member
def test_what_is_imported_to_list_plugins_imports_nothing_heavy(folder: Path) -> None:
    package = folder / "src" / folder.name.replace("-", "_")
    light = [*package.glob("plugins/*.py"), *package.glob("cli/*.py"), package / "_plugin.py", package / "__init__.py"]
    assert len(light) >= 2
    for path in light:
        heavy = _imported_at_module_level(path) & HEAVY
        assert not heavy, f"{path.relative_to(ROOT)} imports {', '.join(sorted(heavy))} at module level"


def _imported_at_module_level(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


def test_every_plugin_of_the_workspace_loads_without_a_remark() -> None:
    ours = [plugin for plugin in Registry(switches=Switches()).plugins() if plugin.distribution in PROJECTS]
    assert [plugin.distribution for plugin in ours] == list(PROJECTS)
    assert [(plugin.state, plugin.reason) for plugin in ours] == [("loaded", "")] * len(ours)


def test_a_missing_name_of_ours_is_known_to_the_core() -> None:
    """If this fails, sae_core/plugins/errors.py is behind: its OUR_EXTENSIONS tells users what to install for a name."""
    given: dict[str, dict[str, list[str]]] = {}
    for plugin in Registry(switches=Switches()).plugins():
        if plugin.distribution in PROJECTS and plugin.distribution != "sae-core":
            for spec in plugin.provides:
                given.setdefault(plugin.distribution, {}).setdefault(spec.kind, []).append(spec.name)
    said = {d: {kind: sorted(names.split()) for kind, names in gives.items()} for d, gives in OUR_EXTENSIONS.items()}
    assert said == {d: {kind: sorted(names) for kind, names in gives.items()} for d, gives in given.items()}


def test_the_template_lies_where_the_design_says() -> None:
    assert (ROOT / "templates" / "plugin" / "common" / "pyproject.toml").is_file()


def test_commands_and_packages_that_messages_name_come_with_what_says_so() -> None:
    """A message of a package may send its reader to a command of that package or of sae-core, and to extras that exist."""
    commands: dict[str, str] = {}
    for plugin in Registry(switches=Switches()).plugins():
        for spec in plugin.provides:
            if spec.kind == "command":
                commands[spec.name.replace("_", "-")] = plugin.distribution
    extras = {name: set(about.get("optional-dependencies", {})) for name, about in PROJECTS.items()}
    wrong: list[str] = []
    for name in PROJECTS:
        for path in (ROOT / "packages" / name / "src").rglob("*.py"):
            if "templates" in path.parts:
                continue
            for text in _spoken(path):
                for command in re.findall(r"\bsae-core ([a-z][a-z-]+)", text):
                    if command in commands and commands[command] not in (name, "sae-core"):
                        wrong.append(f"{path.name}: sae-core {command}, which comes with {commands[command]}")
                for package, extra in re.findall(r"\b(sae-[a-z-]+)\[([a-z-]+)\]", text):
                    if extra not in extras.get(package, set()):
                        wrong.append(f"{path.name}: {package}[{extra}]")
                for package in re.findall(r"install '?(sae-[a-z-]+)", text):
                    if package not in PROJECTS:
                        wrong.append(f"{path.name}: {package}")
    assert wrong == []


def _spoken(path: Path) -> Iterator[str]:
    """The strings of a module without its docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    documents = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documents:
            yield node.value
