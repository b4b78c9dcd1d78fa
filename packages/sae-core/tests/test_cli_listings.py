"""What ``list-plugins``, ``list``, ``show`` and ``doctor`` print."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from sae_core.plugins import HOOKSPEC_VERSION
from sae_core.plugins.finding import core_version
from sae_core.plugins.manager import KINDS
from sae_core.testing import PluginFolder

DOCS = Path(__file__).parents[3] / "docs"

FULL = """
from sae_core.plugins import LoggerSpec, MetricSpec, hookimpl

@hookimpl
def sae_register_metrics():
    yield MetricSpec(name="hoyer", target="sae_full.parts:Hoyer", summary="Hoyer sparsity of the latents")
    yield MetricSpec(name="gini", target="sae_full.parts:Gini")

@hookimpl
def sae_register_loggers():
    yield LoggerSpec(name="pigeon", target="sae_full.parts:Pigeon", summary="Records by carrier pigeon")
"""

PARTS = '''
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from sae_core.config import option

@dataclass(frozen=True, kw_only=True)
class Ring:
    metal: str = option(default="tin", help="what the ring is made of")

@dataclass(frozen=True, kw_only=True)
class PigeonConfig:
    home: Path = option(help="where the pigeons live")
    flock: int = option(default=3, help="pigeons a record; they are not told what the record says, and it would be of no "
                                        "use to them if they were")
    colour: Literal["grey", "white"] = option(default="grey", help="")
    ring: Ring = option(default=Ring(metal="gold"), help="what the leg carries")

class Pigeon:
    """Send every record by carrier pigeon.

    Losses of birds are not reported.
    """
    config_class = PigeonConfig

class Hoyer:
    """Hoyer sparsity."""

class Gini: ...
'''


@pytest.fixture
def full(site: PluginFolder) -> PluginFolder:
    site.add("sae-full", FULL, version="1.2", files={"parts.py": PARTS})
    return site


def test_the_json_of_list_plugins_is_what_is_documented(full: PluginFolder) -> None:
    full.add("sae-bad", "raise RuntimeError('broken')")
    full.add("sae-off")
    done = full.cli("list-plugins", "--json", SAE_CORE_DISABLE_PLUGINS="sae-off,sae-gone")
    printed = json.loads(done.stdout)
    mine = [plugin for plugin in printed["plugins"] if plugin["distribution"] in ("sae-full", "sae-bad", "sae-off")]
    for plugin in mine:
        assert plugin["import_ms"] is None or 0 <= plugin["import_ms"] < 10_000
        plugin["import_ms"] = plugin["import_ms"] is not None
    installed = [f"{plugin['distribution']}:{plugin['name']}" for plugin in printed["plugins"]]
    assert {**printed, "plugins": mine} == {
        "core": core_version(),
        "hookspec": HOOKSPEC_VERSION,
        "plugins": [
            {
                "name": "bad",
                "distribution": "sae-bad",
                "version": "0.1",
                "state": "failed",
                "reason": "RuntimeError: broken",
                "import_ms": True,
                "provides": [],
            },
            {
                "name": "full",
                "distribution": "sae-full",
                "version": "1.2",
                "state": "loaded",
                "reason": "",
                "import_ms": True,
                "provides": [
                    {"kind": "metric", "name": "hoyer", "summary": "Hoyer sparsity of the latents"},
                    {"kind": "metric", "name": "gini", "summary": ""},
                    {"kind": "logger", "name": "pigeon", "summary": "Records by carrier pigeon"},
                ],
            },
            {
                "name": "off",
                "distribution": "sae-off",
                "version": "0.1",
                "state": "disabled",
                "reason": "named in SAE_CORE_DISABLE_PLUGINS",
                "import_ms": False,
                "provides": [],
            },
        ],
        "problems": [
            "SAE_CORE_DISABLE_PLUGINS names 'sae-gone', which is not installed; did you mean 'sae-core'? "
            f"(installed: {', '.join(installed)})"
        ],
    }


def test_the_documented_json_has_exactly_these_keys_and_states(full: PluginFolder) -> None:
    page = (DOCS / "plugins.md").read_text(encoding="utf-8")
    example = json.loads(re.findall(r"```json\n(.*?)```", page, re.DOTALL)[0])
    printed = json.loads(full.cli("list-plugins", "--json").stdout)
    assert example.keys() == printed.keys()
    real = next(plugin for plugin in printed["plugins"] if plugin["name"] == "full")
    for plugin in example["plugins"]:
        assert plugin.keys() == real.keys()
        for given in plugin["provides"]:
            assert given.keys() == real["provides"][0].keys()
    for state in ("loaded", "failed", "disabled", "incompatible", "conflict", "not_loaded"):
        assert f"`{state}`" in page


@pytest.mark.parametrize("arguments", [["list-plugins"], ["list"], ["list", "metrics"], ["show", "pigeon"], ["doctor"]])
def test_what_is_printed_for_people_fits_80_columns(full: PluginFolder, arguments: list[str]) -> None:
    (full.path / "torch.py").write_text("raise OSError('not today')")  # saves the doctor seconds
    full.add("sae-bad", "raise RuntimeError('a long story ' * 30)")
    lines = full.cli(*arguments).stdout.splitlines()
    paragraphs = [line for line in lines if not re.match(r"\d+\. ", line)]  # the doctor's problems are sentences
    assert len(paragraphs) > 3
    assert max(map(len, paragraphs)) <= 80


def test_the_table_of_plugins_shows_what_each_provides_or_why_not(full: PluginFolder) -> None:
    full.add("sae-bad", "raise RuntimeError('broken')")
    flat = " ".join(full.cli("list-plugins").stdout.split())
    assert "sae-full:full 1.2 loaded metrics hoyer, gini; logger pigeon" in flat
    assert "sae-bad:bad 0.1 failed RuntimeError: broken" in flat


def test_verbose_shows_time_place_target_and_traceback(full: PluginFolder) -> None:
    full.add("sae-bad", "def inner():\n    raise RuntimeError('broken')\ninner()")
    printed = full.cli("list-plugins", "-v").stdout
    assert re.search(r"^sae-full:full 1\.2: loaded, \d+\.\d ms$", printed, re.MULTILINE)
    assert f"  sae_full._plugin in {full.path}\n" in printed
    assert "  provides metric hoyer: Hoyer sparsity of the latents (sae_full.parts:Hoyer)\n" in printed
    assert re.search(r"    Traceback .*in inner\n.*RuntimeError: broken", printed, re.DOTALL)


def test_list_prints_names_summaries_and_providers(full: PluginFolder) -> None:
    rows = full.cli("list", "loggers").stdout.splitlines()
    assert any(re.fullmatch(r"pigeon +Records by carrier pigeon +sae-full 1\.2", row) for row in rows)
    assert any(row.startswith("jsonl ") and row.endswith(f"sae-core {core_version()}") for row in rows)
    everything = full.cli("list").stdout
    assert re.search(r"^metric +hoyer ", everything, re.MULTILINE)
    assert re.search(r"^logger +pigeon ", everything, re.MULTILINE)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_can_be_listed(site: PluginFolder, kind: str) -> None:
    done = site.cli("list", f"{kind}s", "--json", SAE_CORE_PLUGINS="")
    assert done.returncode == 0
    assert {entry["kind"] for entry in json.loads(done.stdout)} <= {kind}


def test_list_says_when_there_is_nothing(site: PluginFolder) -> None:
    assert site.cli("list", "catalogues", SAE_CORE_PLUGINS="").stdout == "no catalogues installed\n"


def test_list_prints_json(full: PluginFolder) -> None:
    printed = json.loads(full.cli("list", "metrics", "--json").stdout)
    assert [entry for entry in printed if entry["name"] == "hoyer"] == [
        {
            "kind": "metric",
            "name": "hoyer",
            "qualified": "sae-full:hoyer",
            "summary": "Hoyer sparsity of the latents",
            "distribution": "sae-full",
            "version": "1.2",
            "target": "sae_full.parts:Hoyer",
        }
    ]


def test_show_prints_docs_options_and_provider(full: PluginFolder) -> None:
    assert full.cli("show", "pigeon").stdout == (
        "logger pigeon, from sae-full 1.2 (sae_full.parts:Pigeon)\n"
        "\n"
        "Send every record by carrier pigeon.\n"
        "\n"
        "Losses of birds are not reported.\n"
        "\n"
        "options:\n"
        "home: Path (required)\n"
        "    where the pigeons live\n"
        "flock: int = 3\n"
        "    pigeons a record; they are not told what the record says, and it would be of\n"
        "    no use to them if they were\n"
        "colour: 'grey' | 'white' = 'grey'\n"
        "ring.metal: str = 'gold'\n"
        "    what the ring is made of\n"
    )


def test_show_prints_json(full: PluginFolder) -> None:
    printed = json.loads(full.cli("show", "sae-full:pigeon", "--json").stdout)
    assert printed["qualified"] == "sae-full:pigeon"
    assert printed["doc"].startswith("Send every record")
    assert printed["options"][1]["name"] == "flock"
    assert (printed["options"][1]["required"], printed["options"][1]["default"]) == (False, 3)


def test_show_of_a_command_takes_the_name_as_it_is_typed(site: PluginFolder) -> None:
    done = site.cli("show", "list-plugins", SAE_CORE_PLUGINS="")
    assert done.stdout.startswith("command list_plugins, from sae-core")


def test_show_of_a_name_of_two_kinds_asks_for_the_kind(full: PluginFolder) -> None:
    source = (
        FULL.replace("pigeon", "hoyer")
        .replace("sae_full.parts", "sae_full._plugin")
        .replace('name="hoyer"', 'name="x"', 1)
    )
    full.add("sae-also", source)
    done = full.cli("show", "hoyer")
    assert (done.returncode, done.stdout) == (1, "")
    assert "'hoyer' names things of several kinds; add --kind metric or --kind logger" in done.stderr
    assert full.cli("show", "hoyer", "--kind", "metric").stdout.startswith("metric hoyer, from sae-full 1.2")
    assert full.cli("show", "sae-full:hoyer").stdout.startswith("metric hoyer, from sae-full 1.2")


def test_show_of_an_unknown_name_offers_what_is_near_in_any_kind(full: PluginFolder) -> None:
    done = full.cli("show", "pidgeon")
    assert done.returncode == 1
    assert "unknown name 'pidgeon'; did you mean 'pigeon'?" in done.stderr
    assert full.cli("show", "pigeon", "--kind", "metric").returncode == 1
    assert full.cli("show", "pigeon", "--kind", "bird").returncode == 2


@pytest.mark.slow
def test_the_doctor_finds_nothing_wrong_with_the_core_alone(site: PluginFolder) -> None:
    done = site.cli("doctor", SAE_CORE_PLUGINS="")
    assert "no problems found" in done.stdout
    assert done.returncode == 0
    flat = " ".join(done.stdout.split())
    assert f"sae-core {core_version()}" in flat
    assert "SAE_CORE_PLUGINS ''" in flat
    assert "SAE_CORE_TRACEBACK not set" in flat
    assert re.search(r"built for (CUDA|CPU only)", flat)


def test_the_doctor_finds_everything_that_is_wrong(site: PluginFolder) -> None:
    (site.path / "torch.py").write_text("raise OSError('libcudart.so.99: cannot open shared object file')")
    site.add("sae-old", "from sae_core.plugins import Gone", version="2.0", requires=["sae-core<0.0.1"])
    site.add(
        "sae-loads",
        FULL.replace("sae_full", "sae_loads"),
        requires=["sae-core>99"],
        files={"parts.py": PARTS.replace("class Gini", "Gini = 3\nclass Other")},
    )
    site.add("sae-off", "raise AssertionError")
    methods = "".join(f"    def {name}(self, *_): ...\n" for name in ("releases", "sae_ids", "lookup", "files"))
    site.add(
        "sae-shy",
        "from sae_core.plugins import CatalogueSpec, hookimpl\n\n@hookimpl\ndef sae_register_catalogues():\n"
        "    yield CatalogueSpec(name='shelf', target='sae_shy.parts:Shelf')\n",
        files={"parts.py": f"class Shelf:\n    def __init__(self): raise RuntimeError('not today')\n{methods}"},
    )
    done = site.cli("doctor", SAE_CORE_PLUGINS="old,sae-loads,sae-shy,sae-missing")
    assert done.returncode == 1
    problems = "\n".join(line for line in done.stdout.splitlines() if re.match(r"\d+\. ", line))
    assert "torch cannot be imported: OSError: libcudart.so.99" in problems
    assert "SAE_CORE_PLUGINS names 'sae-missing', which is not installed" in problems
    assert re.search(
        r"plugin sae-old:old 2\.0 is incompatible: needs sae-core<0\.0\.1, this is \S+; ImportError", problems
    )
    assert "sae-loads needs sae-core>99, this is" in problems
    assert "metric 'gini' of sae-loads 0.1: target 'sae_loads.parts:Gini' is not a class but int" in problems
    assert "catalogue sae-shy:shelf 0.1 cannot be made: RuntimeError: not today" in problems
    assert "plugin sae-off" not in problems


def test_the_doctor_does_not_mind_an_optional_library_that_is_missing(site: PluginFolder) -> None:
    parts = """
    from sae_core.errors import MissingDependencyError
    raise MissingDependencyError("pip install hoyer")  # instead of Hoyer, Gini and Pigeon
    """
    (site.path / "torch.py").write_text("raise OSError('not today')")
    site.add("sae-full", FULL, files={"parts.py": parts})
    assert "pip install hoyer" not in site.cli("doctor", SAE_CORE_PLUGINS="full").stdout
