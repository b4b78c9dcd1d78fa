"""What every command promises: help for each of its options, and nothing heavy before it runs."""

from __future__ import annotations

import argparse
import io
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from typing import cast

from sae_core.plugins.manager import HEAVY
from sae_core.protocols import Command
from sae_core.testing.kit import Check, Subject, check_class

__all__ = [
    "CHECKS",
    "check_configure",
    "check_help",
    "check_light",
    "check_wrong_usage",
]

_LOADS = """
import argparse, importlib, sys
command = getattr(importlib.import_module({module!r}), {name!r})()
command.configure(argparse.ArgumentParser())
print(",".join(name for name in {heavy!r} if name in sys.modules))
"""


def check_help(subject: Subject) -> None:
    """`help` says what the command does, and every argument says what it is for; ``--help`` prints it all.

    A per cent sign in a help text is written twice, or argparse trips over it.
    """
    command, parser = _configured(subject)
    assert isinstance(command, Command), f"{type(command).__name__} lacks help, configure or run"
    assert command.help.strip(), "help is empty"
    for name, action in _actions(parser):
        assert action.help, f"{name} has no help"
    with redirect_stdout(io.StringIO()) as printed:
        code = _exit_code(parser, ["--help"])
    assert code == 0, f"--help ends with exit code {code}"
    assert "usage:" in printed.getvalue(), "--help prints no usage"


def check_configure(subject: Subject) -> None:
    """`configure` adds to any parser, as often as it is asked: nothing is kept on the class."""
    _, first = _configured(subject)
    _, second = _configured(subject)
    assert first.format_help() == second.format_help(), "a second configure() gives other options"


def check_wrong_usage(subject: Subject) -> None:
    """What does not exist is refused by the parser, with exit code 2 and a message on stderr."""
    _, parser = _configured(subject)
    with redirect_stderr(io.StringIO()) as said, redirect_stdout(io.StringIO()):
        code = _exit_code(parser, ["--no-such-option-of-this-command"])
    assert code == 2, f"an unknown option ends with {code}, not with exit code 2"
    assert "error" in said.getvalue(), "an unknown option is refused without a message"


def check_light(subject: Subject) -> None:
    """Until `run`, nothing heavy is imported: ``sae-core COMMAND --help`` answers at once.

    Import torch and its like inside `run`, or in modules that `run` imports.
    """
    module, _, name = subject.contribution.spec.target.partition(":")
    code = _LOADS.format(module=module, name=name, heavy=HEAVY)
    path = "import sys; sys.path[:] = " + repr(sys.path) + "\n"
    done = subprocess.run([sys.executable, "-c", path + code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, (
        f"a fresh process cannot configure it: {(done.stderr.strip().splitlines() or ['?'])[-1]}"
    )
    heavy = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""
    assert not heavy, f"importing and configuring it imports {heavy.replace(',', ', ')}"


def _configured(subject: Subject) -> tuple[Command, argparse.ArgumentParser]:
    command = cast("Command", subject.new())
    parser = argparse.ArgumentParser(prog=f"sae-core {subject.contribution.spec.name}", allow_abbrev=False)
    command.configure(parser)
    return command, parser


def _actions(parser: argparse.ArgumentParser, above: str = "") -> list[tuple[str, argparse.Action]]:
    """Every argument by name, those of subcommands too."""
    found: list[tuple[str, argparse.Action]] = []
    for action in parser._actions:  # pyright: ignore[reportPrivateUsage] - argparse shows them nowhere else
        if isinstance(action, argparse._SubParsersAction):  # pyright: ignore[reportPrivateUsage]
            for name, inner in action.choices.items():
                found += _actions(inner, f"{above}{name} ")
            continue
        found.append((above + (action.option_strings or [action.dest])[-1], action))
    return found


def _exit_code(parser: argparse.ArgumentParser, arguments: list[str]) -> object:
    try:
        parser.parse_args(arguments)
    except SystemExit as ended:
        return ended.code
    return None


CHECKS: tuple[Check, ...] = (check_class, check_help, check_configure, check_wrong_usage, check_light)
