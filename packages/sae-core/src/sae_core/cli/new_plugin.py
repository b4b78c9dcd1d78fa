"""``sae-core new-plugin NAME --kind KIND``: a plugin package that works, to start from.

The template is a folder of what all kinds share and one of what each kind adds; paths and texts hold ``{{ variable }}``, which
a regular expression fills in.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import shutil
from collections.abc import Iterator, Mapping
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import ClassVar, final

from sae_core.durable import unique_folder
from sae_core.errors import ConfigError, PluginError
from sae_core.plugins import get_registry
from sae_core.plugins.finding import core_version
from sae_core.plugins.manager import KINDS

__all__ = ["NewPlugin", "render"]

_VARIABLE = re.compile(r"\{\{ (\w+) \}\}")
_SUFFIXES = {"architecture": "SAE", "metric": "Metric"}  # of class names; others are called after their kind


@final
class NewPlugin:
    """Write a plugin package: an entry point, one contribution that works, its conformance test."""

    help: ClassVar[str] = (
        "Start a plugin package of your own: an architecture that trains, or something else that works, its entry point and "
        "its conformance test."
    )

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Add the options."""
        parser.add_argument("name", help="what it is called, as in `create(NAME, ...)` or `sae-core list`; say cubic")
        parser.add_argument(
            "--kind", choices=KINDS, default="architecture", help="what the package provides (default: %(default)s)"
        )
        parser.add_argument(
            "--into", type=Path, default=Path(), metavar="DIR", help="where to put the folder (default: here)"
        )

    def run(self, args: argparse.Namespace) -> int:
        """Render the template."""
        variables = variables_for(args.name, args.kind)
        _refuse_taken(variables)
        folder = render(args.into, variables)
        print(f"wrote {folder}:")
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            print(f"  {path.relative_to(folder)}")
        name = variables["name"]
        print(
            f"\nNext:\n  cd {folder}\n  pip install -e . pytest\n  sae-core show {name}\n  sae-core check {name}\n  pytest"
        )
        return 0


def variables_for(name: str, kind: str = "architecture") -> dict[str, str]:
    """What the template's variables stand for. Raises ConfigError for a name that cannot be registered.

    >>> variables_for("sae-soft-threshold")["class_name"], variables_for("npz_dump", "loader")["class_name"]
    ('SoftThresholdSAE', 'NpzDumpLoader')
    """
    bare = name.removeprefix("sae-").removeprefix("sae_").replace("-", "_")
    if not re.fullmatch(r"[a-z][a-z0-9_]*[a-z0-9]|[a-z]", bare):
        raise ConfigError(
            f"{name!r} cannot be the name of a plugin's {kind}: use lower case letters, digits and underscores, starting "
            "with a letter"
        )
    camel = "".join(part.capitalize() for part in bare.split("_"))
    major, minor, *_ = core_version().split(".")
    return {
        "kind": kind,
        "name": bare,
        "what": f"The {bare} {kind}",
        "command": bare.replace("_", "-"),
        "variable": f"{bare.upper()}_SAES",
        "distribution": f"sae-{bare.replace('_', '-')}",
        "package": f"sae_{bare}",
        "class_name": camel + _SUFFIXES.get(kind, kind.capitalize()),
        "config_name": f"{camel}Config",
        "core": f">={major}.{minor},<{major}.{int(minor) + 1}",
    }


def _refuse_taken(variables: Mapping[str, str]) -> None:
    name, kind, package = variables["name"], variables["kind"], variables["package"]
    for contribution in get_registry().contributions(kind):
        if contribution.spec.name == name:
            raise PluginError(f"{contribution.distribution} already has the {kind} {name!r}; choose another name")
    if importlib.util.find_spec(package) is not None:
        raise PluginError(f"a package {package!r} is installed already; choose another name")


def render(into: Path, variables: Mapping[str, str]) -> Path:
    """Write the template, filled in, as a folder in `into` named like the distribution; return its path.

    The folder appears complete or not at all. Raises ConfigError if it is there already.
    """
    folder = into / variables["distribution"]
    if folder.exists():
        raise ConfigError(f"{folder} exists already; move it away or choose another name")
    into.mkdir(parents=True, exist_ok=True)
    temporary = unique_folder(folder)
    try:
        for part in ("common", variables["kind"]):
            for relative, text in _files(files("sae_core") / "templates" / "plugin" / part):
                path = temporary / _fill(relative, variables)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(_fill(text, variables), encoding="utf-8")
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _files(folder: Traversable, above: str = "") -> Iterator[tuple[str, str]]:
    """Relative path and text of every file in a folder."""
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if entry.is_dir() and entry.name != "__pycache__":
            yield from _files(entry, f"{above}{entry.name}/")
        elif entry.is_file():
            yield above + entry.name, entry.read_text(encoding="utf-8")


def _fill(text: str, variables: Mapping[str, str]) -> str:
    return _VARIABLE.sub(lambda match: variables[match[1]], text)
