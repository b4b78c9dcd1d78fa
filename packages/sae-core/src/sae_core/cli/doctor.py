"""``sae-core doctor``: what is installed here, and everything that is wrong with it.

It does what nothing else should: it imports torch and the class behind every name, because a promise that cannot be kept
is worth knowing before a run depends on it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from typing import ClassVar, final

from sae_core.cli.tables import table
from sae_core.errors import MissingDependencyError, SaeCoreError
from sae_core.plugins import Registry
from sae_core.plugins.errors import one_line, plugin_trouble
from sae_core.plugins.finding import version_problem
from sae_core.plugins.manager import KINDS
from sae_core.plugins.records import CORE, canonical

__all__ = ["Doctor"]

_SWITCHES = (
    "SAE_CORE_PLUGINS",
    "SAE_CORE_DISABLE_PLUGINS",
    "SAE_CORE_STRICT_PLUGINS",
    "SAE_CORE_TRACE_PLUGINS",
    "SAE_CORE_TRACEBACK",
)


_MADE_PLAINLY = ("loader", "writer", "catalogue", "metric", "command")  # the others take a config


@final
class Doctor:
    """Check the installation: versions, torch's build, switches, and every name that plugins promise."""

    help: ClassVar[str] = "Check this installation. Exits with 1 if something is broken, and says what to do about it."

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """There are no options."""

    def run(self, args: argparse.Namespace) -> int:
        """Print what is here, then the problems."""
        with redirect_stdout(sys.stderr):
            registry = Registry(on_trouble="ignore")
        problems: list[str] = []
        print(table(["WHAT", "VERSION"], [["python", f"{platform.python_version()}, {sys.executable}"], *_system()]))
        print()
        print(table(["PACKAGE", "VERSION", "NEEDED BY SAE-CORE"], list(_packages(problems))))
        print()
        print(table(["TORCH", ""], list(_torch(problems))))
        print()
        print(
            table(
                ["SWITCH", "VALUE"],
                [[name, repr(os.environ[name]) if name in os.environ else "not set"] for name in _SWITCHES],
            )
        )
        print()
        print(table(["PLUGIN", "VERSION", "STATE"], [[p.qualified, p.version, p.state] for p in registry.plugins()]))
        problems += registry.problems
        problems += _plugin_problems(registry)
        print()
        if not problems:
            print("no problems found")
            return 0
        print(f"{len(problems)} problem{'s' * (len(problems) > 1)}:")
        for number, problem in enumerate(problems, start=1):
            print(f"{number}. {problem}")
        return 1


def _system() -> list[list[str]]:
    return [["platform", platform.platform()], ["processors", str(os.cpu_count())]]


def _packages(problems: list[str]) -> Iterator[list[str]]:
    from packaging.requirements import Requirement

    yield [CORE, importlib.metadata.version(CORE), ""]
    for line in importlib.metadata.requires(CORE) or ():
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            problems.append(f"{requirement.name} is not installed: pip install '{requirement}'")
            version = "not installed"
        else:
            if not requirement.specifier.contains(version, prereleases=True):
                problems.append(f"{requirement.name} {version} is too old or too new: pip install '{requirement}'")
        yield [requirement.name, version, str(requirement.specifier)]


def _torch(problems: list[str]) -> Iterator[list[str]]:
    try:
        import torch
    except Exception as error:  # noqa: BLE001 - a broken build raises OSError, ImportError and worse; it is what we look for
        problems.append(f"torch cannot be imported: {one_line(error)}")
        yield ["import", one_line(error)]
        return
    yield ["version", torch.__version__]
    yield ["built for", f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"]
    if torch.cuda.is_available():
        yield ["devices", ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))]
    else:
        yield ["devices", "mps" if torch.backends.mps.is_available() else "no GPU in sight"]
    yield ["threads", str(torch.get_num_threads())]


def _plugin_problems(registry: Registry) -> Iterator[str]:
    for plugin in registry.plugins():
        if plugin.state in ("failed", "incompatible", "conflict"):
            yield plugin_trouble(plugin)
        elif plugin.reason and plugin.state == "loaded":
            yield f"plugin {plugin.qualified} {plugin.version}: {plugin.reason}"
    for distribution in {p.distribution for p in registry.plugins() if p.state in ("loaded", "conflict")}:
        if problem := version_problem(tuple(_requires(distribution))):
            yield f"{distribution} {problem}; it loads, but nobody has tested the two together"
    for kind in KINDS:
        for contribution in registry.contributions(kind):
            try:
                found = registry.usable(kind, contribution.qualified)
                if kind in _MADE_PLAINLY:
                    found()
            except MissingDependencyError:
                continue  # an optional library that whoever uses this name is asked to install
            except SaeCoreError as error:
                yield str(error)
            except Exception as error:  # noqa: BLE001 - a stranger's constructor may raise anything, which is what is asked
                yield f"{kind} {contribution.qualified} {contribution.version} cannot be made: {one_line(error)}"


def _requires(distribution: str) -> list[str]:
    try:
        return importlib.metadata.requires(canonical(distribution)) or []
    except importlib.metadata.PackageNotFoundError:
        return []  # registered by hand
