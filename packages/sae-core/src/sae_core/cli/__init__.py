"""The ``sae-core`` command line: one file a command, heavy imports inside the command that runs.

Commands are contributions like any other, found through the registry. sae-core's own are looked up first and with
nothing else loaded, so that ``list-plugins`` and ``doctor`` work whatever is installed beside them; extensions are loaded
when the command is not one of ours, or when the help has to list them all. Only the command that runs is imported.

Exit codes: 0 done, 1 it went wrong (one message on stderr; SAE_CORE_TRACEBACK=1 shows where), 2 wrong usage.
"""

from __future__ import annotations

import argparse
import errno
import io
import os
import sys
import warnings
from collections.abc import Generator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from typing import TextIO, cast

from sae_core.cli.arguments import Parser
from sae_core.errors import PluginError, SaeCoreError
from sae_core.plugins import Contribution, PluginWarning, Registry, get_registry
from sae_core.plugins.errors import unknown_name
from sae_core.plugins.finding import core_version, find_own_plugin
from sae_core.plugins.switches import Switches, flag
from sae_core.protocols import Command

__all__ = ["main"]

_EPILOG = """\
`sae-core COMMAND --help` says more about a command, `sae-core list-plugins` shows where commands come from.
SAE_CORE_PLUGINS= (set to nothing) starts without any extension.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code; wrong usage exits with 2."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a plugin's summary must not fail on a plain terminal
    try:
        with _plain_warnings():
            code = _dispatch(list(sys.argv[1:] if argv is None else argv))
        if sys.stdout is not None:  # pyright: ignore[reportUnnecessaryComparison] - it is None where it was closed (>&-)
            sys.stdout.flush()
        return code
    except SaeCoreError as error:
        if flag("SAE_CORE_TRACEBACK"):
            raise
        print("\n".join([f"sae-core: error: {error}", *getattr(error, "__notes__", [])]), file=sys.stderr)
        return 1
    except KeyboardInterrupt as interrupt:
        print("\n".join(["sae-core: interrupted", *getattr(interrupt, "__notes__", [])]), file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, `head` for one, has seen enough
        _silence_stdout()
        return 141
    except OSError as error:
        if not _is_about_stdout(error) or flag("SAE_CORE_TRACEBACK"):
            raise
        _silence_stdout()
        print(f"sae-core: error: the output cannot be written: {error.strerror}", file=sys.stderr)
        return 1


def _is_about_stdout(error: OSError) -> bool:
    """Whether it names no file: commands say which file they could not read or write."""
    return error.filename is None and error.errno in (errno.EBADF, errno.ENOSPC, errno.EIO, errno.EPIPE)


def _silence_stdout() -> None:
    """So that the flush at exit is silent too."""
    with suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _dispatch(arguments: list[str]) -> int:
    chosen = next((argument for argument in arguments if not argument.startswith("-")), None)
    registry = Registry(find_own_plugin, Switches(), on_trouble="raise")
    if chosen not in _commands(registry) and arguments != ["--version"]:
        with redirect_stdout(sys.stderr):  # what a plugin prints while it loads is no part of a command's output
            registry = get_registry()
    commands = _commands(registry)
    parser = Parser(
        prog="sae-core",
        description="Train, read and evaluate sparse autoencoders and transcoders of language models.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"sae-core {core_version()}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND")
    parsers = {
        name: subparsers.add_parser(name, help=contribution.spec.summary.replace("%", "%%"))
        for name, contribution in commands.items()
    }
    if chosen is not None and chosen not in commands:
        parser.error(unknown_name("command", chosen, list(commands), registry.plugins()))
    if chosen is None:
        parser.parse_args(arguments)  # --help and --version end here
        parser.print_help(sys.stderr)
        return 2
    contribution = commands[chosen]
    command = _instance(registry, contribution)
    with _attributed(contribution):
        parsers[chosen].description = command.help
        command.configure(parsers[chosen])
    arguments_given = parser.parse_args(arguments)
    with _attributed(contribution):
        code = cast("object", command.run(arguments_given))
    if isinstance(code, bool) or not isinstance(code, int):
        raise PluginError(f"the command {chosen!r} of {contribution.distribution} returned {code!r}, not an exit code")
    return code


def _commands(registry: Registry) -> dict[str, Contribution]:
    """Commands by the name that is typed, which has dashes for underscores."""
    return {registry.name_of(c).replace("_", "-"): c for c in registry.contributions("command")}


def _instance(registry: Registry, contribution: Contribution) -> Command:
    with _attributed(contribution):
        command = registry.resolve("command", contribution.qualified)()
    if not isinstance(command, Command):
        raise PluginError(
            f"the command {contribution.qualified!r} ({contribution.spec.target}) must have `help`, `configure` and `run`"
        )
    return command


@contextmanager
def _attributed(contribution: Contribution) -> Generator[None]:
    """Say in the traceback of a plugin's own mistake whose mistake it is."""
    try:
        yield
    except SaeCoreError:
        raise
    except Exception as error:
        error.add_note(f"in the command {contribution.qualified} of {contribution.distribution} {contribution.version}")
        raise


@contextmanager
def _plain_warnings() -> Generator[None]:
    """Print a plugin's trouble as a sentence, without the line of code that happened to find it."""
    with warnings.catch_warnings():
        usual = warnings.showwarning

        def show(
            message: Warning | str, category: type[Warning], filename: str, lineno: int,
            file: TextIO | None = None, line: str | None = None,
        ) -> None:  # fmt: skip
            if issubclass(category, PluginWarning):
                print(f"sae-core: warning: {message}", file=sys.stderr)
            else:
                usual(message, category, filename, lineno, file, line)

        warnings.showwarning = show
        yield
