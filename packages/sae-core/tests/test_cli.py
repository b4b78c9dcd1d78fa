"""The ``sae-core`` command as a user meets it: in its own process, with right input and wrong."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pytest
from sae_core.cli.arguments import whole_number
from sae_core.testing import PluginFolder

COMMAND = """
from sae_core.plugins import CommandSpec, hookimpl

@hookimpl
def sae_register_commands():
    yield CommandSpec(name="say_hello", target="sae_hello.cli:Hello", summary="Say hello, 100 % of the time")
"""

HELLO = """
from sae_core.errors import ConfigError

class Hello:
    help = "Say hello to somebody."

    def configure(self, parser):
        parser.add_argument("name")

    def run(self, args):
        {run}
"""


def hello(site: PluginFolder, run: str = "print('hello', args.name); return 0") -> PluginFolder:
    site.add("sae-hello", COMMAND, version="0.4", files={"cli.py": HELLO.format(run=run)})
    return site


def test_the_console_script_prints_the_version() -> None:
    script = Path(sys.executable).with_name("sae-core")
    done = subprocess.run([script, "--version"], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.startswith("sae-core 0.")


def test_without_a_command_the_help_goes_to_stderr_and_the_exit_code_is_2(site: PluginFolder) -> None:
    done = site.cli()
    assert (done.returncode, done.stdout) == (2, "")
    assert "usage: sae-core" in done.stderr


def test_a_plugins_command_is_in_the_help_and_runs(site: PluginFolder) -> None:
    hello(site)
    assert "say-hello   Say hello, 100 % of the time" in site.cli("--help").stdout
    done = site.cli("say-hello", "world")
    assert (done.returncode, done.stdout, done.stderr) == (0, "hello world\n", "")
    assert "Say hello to somebody." in site.cli("say-hello", "--help").stdout


def test_the_exit_code_is_the_commands(site: PluginFolder) -> None:
    assert hello(site, run="return 5").cli("say-hello", "world").returncode == 5


def test_wrong_usage_exits_with_2_and_shows_the_usage(site: PluginFolder) -> None:
    done = hello(site).cli("say-hello")
    assert done.returncode == 2
    assert "usage: sae-core say-hello" in done.stderr
    assert site.cli("list-plugins", "--jsno").returncode == 2
    assert site.cli("list", "architecture").returncode == 2


COUNT = """
class Hello:
    help = "Count."

    def configure(self, parser):
        action = parser.add_subparsers().add_parser("up")
        action.add_argument("--to", type=int)

    def run(self, args):
        print(args.to)
        return 0
"""


def test_whole_numbers_of_every_command_may_have_an_exponent(site: PluginFolder) -> None:
    site.add("sae-hello", COMMAND, version="0.4", files={"cli.py": COUNT})
    assert site.cli("say-hello", "up", "--to", "1e6").stdout == "1000000\n"
    assert "'1.5' is no whole number" in site.cli("say-hello", "up", "--to", "1.5").stderr


@pytest.mark.parametrize("text", ["", "x", "0.5", "1e-3", "nan", "inf", "1e19", "1e999999999", "1e6x"])
def test_what_is_no_whole_number_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=r"is no (whole )?number"):
        whole_number(text)


def test_an_unknown_command_exits_with_2_and_offers_the_nearest(site: PluginFolder) -> None:
    done = site.cli("list-plugin")
    assert done.returncode == 2
    assert "unknown command 'list-plugin'; did you mean 'list-plugins'?" in done.stderr


def test_an_unknown_command_repeats_which_plugin_failed(site: PluginFolder) -> None:
    site.add("sae-hello", "raise RuntimeError('no licence')", version="0.4")
    done = site.cli("say-hello")
    assert done.returncode == 2
    assert "plugin sae-hello:hello 0.4 failed to load: RuntimeError: no licence" in done.stderr


def test_an_error_of_ours_is_one_message_and_exit_code_1(site: PluginFolder) -> None:
    hello(site, run="raise ConfigError('lr must be positive')")
    done = site.cli("say-hello", "world")
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "sae-core: error: lr must be positive\n")


def test_the_traceback_of_our_error_is_shown_on_request(site: PluginFolder) -> None:
    hello(site, run="raise ConfigError('lr must be positive')")
    done = site.cli("say-hello", "world", SAE_CORE_TRACEBACK="1")
    assert done.returncode == 1
    assert "Traceback (most recent call last)" in done.stderr


def test_a_mistake_in_a_plugins_command_says_whose_it_is(site: PluginFolder) -> None:
    done = hello(site, run="return 1 / 0").cli("say-hello", "world")
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr
    assert "in the command sae-hello:say_hello of sae-hello 0.4" in done.stderr


@pytest.mark.parametrize("run", ["return None", "return 'done'", "return True"])
def test_a_command_that_returns_no_exit_code_is_an_error(site: PluginFolder, run: str) -> None:
    done = hello(site, run=run).cli("say-hello", "world")
    assert done.returncode == 1
    assert "not an exit code" in done.stderr


def test_a_command_that_is_none_is_an_error(site: PluginFolder) -> None:
    site.add("sae-hello", COMMAND, files={"cli.py": "class Hello: ..."})
    done = site.cli("say-hello")
    assert done.returncode == 1
    assert "'sae-hello:say_hello' (sae_hello.cli:Hello) must have `help`, `configure` and `run`" in done.stderr


@pytest.mark.parametrize(
    "code", ["raise RuntimeError('x') #Hello", "import sys; sys.exit(9) #Hello", "def broken(: #Hello"]
)
def test_a_broken_command_breaks_neither_the_help_nor_the_others(site: PluginFolder, code: str) -> None:
    site.add("sae-hello", COMMAND, files={"cli.py": code})
    done = site.cli("--help")
    assert done.returncode == 0
    assert "say-hello" in done.stdout
    assert site.cli("list", "loaders").returncode == 0
    broken = site.cli("say-hello", "world")
    assert broken.returncode == 1
    assert broken.stderr.startswith("sae-core: error: command 'say_hello' of sae-hello 0.1: cannot import")


def test_a_broken_plugin_breaks_no_help_and_is_one_line_on_stderr(site: PluginFolder) -> None:
    site.add("sae-bad", "import sys; sys.exit('gone')")
    done = site.cli("--help")
    assert done.returncode == 0
    assert "list-plugins" in done.stdout
    mine = [line for line in done.stderr.splitlines() if "sae-bad" in line]
    assert mine == [
        "sae-core: warning: plugin sae-bad:bad 0.1 failed to load: SystemExit: gone; run `sae-core list-plugins -v`"
    ]


def test_a_strangers_command_never_replaces_one_of_ours_and_is_reached_by_its_full_name(site: PluginFolder) -> None:
    source = COMMAND.replace("say_hello", "list_plugins")
    site.add("sae-hello", source, files={"cli.py": HELLO.format(run="print('hello'); return 0")})
    assert "sae-core:core" in site.cli("list-plugins").stdout
    assert site.cli("sae-hello:list-plugins", "x").stdout == "hello\n"
    assert "sae-hello:list-plugins" in site.cli("--help").stdout


def test_only_the_command_that_runs_is_imported(site: PluginFolder) -> None:
    hello(site)
    source = COMMAND.replace("say_hello", "other").replace("sae_hello", "sae_other")
    site.add("sae-other", source, files={"cli.py": "raise AssertionError('imported') # Hello"})
    assert site.cli("say-hello", "world").stdout == "hello world\n"


def test_a_reader_that_has_seen_enough_is_no_error(site: PluginFolder) -> None:
    hello(site, run="[print(i) for i in range(200_000)]; return 0")
    code = "import sys; from sae_core.cli import main; sys.exit(main())"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "say-hello", "world"],
        env=site.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == "0\n"
    process.stdout.close()
    assert process.wait(timeout=60) == 141
    assert process.stderr.read() == ""
    process.stderr.close()


def test_an_interrupt_is_one_word_and_exit_code_130(site: PluginFolder) -> None:
    done = hello(site, run="raise KeyboardInterrupt").cli("say-hello", "world")
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "sae-core: interrupted\n")


def test_a_terminal_without_unicode_gets_escapes(site: PluginFolder) -> None:
    source = COMMAND.replace("Say hello, 100 % of the time", "k ≤ d_sae")
    site.add("sae-hello", source, files={"cli.py": HELLO.format(run="return 0")})
    done = site.cli("list", "commands", PYTHONIOENCODING="ascii")
    assert done.returncode == 0
    assert r"k \u2264 d_sae" in done.stdout


def test_a_checkout_that_is_not_installed_says_what_to_do(tmp_path: Path) -> None:
    # -S leaves out site-packages; what the command line needs is linked in without any metadata.
    import pluggy
    import sae_core

    for package in (pluggy, sae_core):
        assert package.__file__ is not None
        (tmp_path / package.__name__).symlink_to(Path(package.__file__).parent)
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from sae_core.cli import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-S", "-c", code, "list"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert "sae-core: error: sae-core runs from a folder that is not installed" in done.stderr
