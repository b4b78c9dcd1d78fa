"""A plugin that was written against the first version of the hooks is found, loaded and run by this one.

If this fails, plugins that people have written fail too. The files of ``first_hooks`` stay as they are; see its README.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from sae_core import SAE, TrainConfig, Trainer, create
from sae_core.cli import main
from sae_core.format.convert import convert
from sae_core.plugins import get_registry, reset_registry
from sae_core.plugins.manager import KINDS
from sae_core.testing import run_checks

FOLDER = Path(__file__).parent / "first_hooks"
AS_IT_WAS = "31683bb2d07a5a3d27d23cbb54f1ba7cc83a8ff1e04e6c4f238e5dca7bb27e94"


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Its folder is on the import path, as site-packages are, and its metadata are found there."""
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.delenv("SAE_CORE_PLUGINS", raising=False)
    monkeypatch.delenv("SAE_CORE_DISABLE_PLUGINS", raising=False)
    reset_registry()
    yield
    reset_registry()
    for name in [name for name in sys.modules if name.partition(".")[0] == "sae_first"]:
        del sys.modules[name]


def test_its_files_are_as_they_were() -> None:
    paths = sorted(path for path in FOLDER.rglob("*") if path.is_file() and path.suffix not in (".pyc",))
    text = b"\0".join(path.relative_to(FOLDER).as_posix().encode() + b"\0" + path.read_bytes() for path in paths)
    assert hashlib.sha256(text).hexdigest() == AS_IT_WAS


def test_it_is_loaded_with_all_that_it_gives() -> None:
    (plugin,) = [plugin for plugin in get_registry().plugins() if plugin.distribution == "sae-first"]
    assert (plugin.state, plugin.reason, plugin.version) == ("loaded", "", "1.0")
    assert {(spec.kind, spec.name) for spec in plugin.provides} >= {(kind, f"first_{kind}") for kind in KINDS[:8]}


@pytest.mark.parametrize(
    "kind", ["architecture", "loader", "writer", "source", "catalogue", "metric", "logger", "command"]
)
def test_what_it_gives_keeps_the_promises_of_its_kind(kind: str) -> None:
    assert [result for result in run_checks(kind, f"first_{kind}") if not result.ok] == []


def test_it_does_its_work(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    source = get_registry().resolve("source", "first_source")
    config = source.config_class(d_in=8, seed=3)
    sae = create("first_architecture", d_in=8, d_sae=24)
    train = TrainConfig(total_samples=128, batch_size=32, init_samples=32, progress_bar=False)
    Trainer(sae, source(config), train).fit()
    x = torch.randn(10, 8, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(SAE.load(sae.save(tmp_path / "sae"))(x), sae(x))
    plain = create("standard", d_in=8, d_sae=24).eval()
    assert convert(plain, "first_writer", tmp_path / "first") == ["metadata are left out"]
    catalogue = get_registry().resolve("catalogue", "first_catalogue")
    monkeypatch.setattr(catalogue, "folder", tmp_path / "first")
    torch.testing.assert_close(SAE.from_pretrained("first-release", "only")(x), plain(x))
    assert main(["first-command", "hello"]) == 0
    assert capsys.readouterr().out.strip() == "hello"
