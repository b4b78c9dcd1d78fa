"""The pages of the documentation that the code writes: hooks, the command line, the API.

``uv run python tools/docs.py`` writes them anew; a test compares them, so none of them can fall behind.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import pkgutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

DOCS = Path(__file__).parents[1] / "docs"
MADE = "<!-- Written by tools/docs.py; change the code and run it again. -->\n"
WIDTH = 100
PACKAGES = ("sae_core", "sae_explorer", "sae_lm", "sae_synthetic", "sae_pretrained", "sae_loaders_gemmascope")
LEFT_OUT = ("_plugin", "cli", "templates", "loaders", "writers")  # named in files and on the command line, not imported
INNER = {  # how it is done; nobody who uses the package or extends it needs these
    "sae_core.format": (
        "hook_names",
        "pair",
        "plain",
        "sae_lens_names",
        "stream",
        "tensors",
        "training_form",
        "trouble",
    ),
    "sae_core.ops": (
        "active",
        "bags",
        "device",
        "dispatch",
        "gradient_sums",
        "largest",
        "layered",
        "memory",
        "own_rows",
        "triton_kernels",
    ),
    "sae_core.plugins": ("finding", "manager", "promises", "switches"),
    "sae_core.testing": ("small",),
    "sae_core.training": ("learner", "monitor", "optimizer", "row_blocks", "steering"),
}


def hooks_page() -> str:
    """docs/hooks.md: what is above the mark stays, what is below comes from the hooks' docstrings."""
    from sae_core.plugins import hookspecs

    intro = (DOCS / "hooks.md").read_text(encoding="utf-8").partition(MADE)[0]
    hooks = [(name, value) for name, value in vars(hookspecs).items() if name.startswith("sae_register_")]
    parts = [
        f"## `{name}({', '.join(inspect.signature(hook).parameters)})`\n\n{inspect.getdoc(hook)}\n"
        for name, hook in hooks
    ]
    return intro + MADE + "\n" + "\n".join(parts)


def cli_page() -> str:
    """docs/cli.md: what ``--help`` prints, of every command and every action of it."""
    from sae_core.cli.arguments import Parser
    from sae_core.plugins import Registry
    from sae_core.plugins.switches import Switches
    from sae_core.protocols import Command

    registry = Registry(switches=Switches(), on_trouble="ignore")
    lines = ["# Command line", "", MADE, "In a clone, write `uv run sae-core` for `sae-core`.", ""]
    for contribution in registry.contributions("command"):
        if contribution.distribution.replace("-", "_") not in PACKAGES:
            continue
        name = contribution.spec.name.replace("_", "-")
        command = cast("Command", registry.usable("command", contribution.qualified)())
        parser = Parser(prog=f"sae-core {name}", description=command.help)
        command.configure(parser)
        lines += [f"## {name}", "", f"{contribution.spec.summary} ({contribution.distribution}).", ""]
        for each in _with_actions(parser):
            each.formatter_class = _Formatter
            lines += ["```text", f"$ {each.prog} --help", each.format_help().rstrip(), "```", ""]
    return "\n".join(lines)


class _Formatter(argparse.HelpFormatter):
    """Of one width, whatever terminal this runs in."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=WIDTH - 2)  # what argparse makes of that many columns


def _with_actions(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for action in cast("list[Any]", parser._actions):  # argparse tells its subcommands nowhere else
        if isinstance(action.choices, Mapping):
            for each in cast("Mapping[str, argparse.ArgumentParser]", action.choices).values():
                yield from _with_actions(each)


def api_pages() -> dict[str, str]:
    """docs/api/PACKAGE.md: every module that says what is public in it, for mkdocstrings to fill."""
    return {f"api/{package}.md": _api_page(package) for package in PACKAGES}


def _api_page(package: str) -> str:
    lines = [f"# {package}", "", MADE]
    for name in _public_modules(package):
        lines += [f"::: {name}", ""]
    return "\n".join(lines)


def _public_modules(package: str) -> Iterator[str]:
    """Modules with an ``__all__`` of names of their own, judged by their text: nothing heavy is imported for it."""
    (folder,) = importlib.import_module(package).__path__
    for module in pkgutil.walk_packages([folder], f"{package}."):
        parent, _, last = module.name.rpartition(".")
        named = [] if parent == "sae_core.testing" else module.name.split(".")[1:]  # its loaders are checks of loaders
        if any(part in LEFT_OUT or part.startswith("_") for part in named):
            continue
        if last in INNER.get(parent, ()):
            continue
        path = Path(folder, *module.name.split(".")[1:])
        file = path / "__init__.py" if module.ispkg else path.with_suffix(".py")
        if "__all__" in file.read_text(encoding="utf-8") and not module.ispkg:
            yield module.name


def pages() -> dict[str, str]:
    """Every page that is written here, by its path under docs/."""
    return {"hooks.md": hooks_page(), "cli.md": cli_page(), **api_pages()}


if __name__ == "__main__":
    for name, text in pages().items():
        (DOCS / name).parent.mkdir(exist_ok=True)
        (DOCS / name).write_text(text, encoding="utf-8")
