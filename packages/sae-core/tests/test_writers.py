"""Formats to convert to come from plugins, and are told whose dictionary it is that they are to write."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
from sae_core import SAE, create
from sae_core.architectures.topk import TopKConfig
from sae_core.cli import main
from sae_core.errors import ConfigError, FormatError, PluginError, UnknownNameError
from sae_core.format.convert import convert
from sae_core.plugins import WriterSpec, get_registry, reset_registry
from sae_core.sae import Export


class NumbersWriter:
    """Writes the decoder's shape, and only that of sae-core's TopK."""

    seen: ClassVar[list[str]] = []

    def write(self, sae: SAE[Any], exported: Export, folder: Path) -> Sequence[str]:
        self.seen.append(exported.architecture)
        if exported.architecture != "sae-core:topk":
            raise FormatError(f"numbers cannot express {exported.architecture}")
        (folder / "part").mkdir()
        (folder / "part" / "numbers.json").write_text(json.dumps(list(exported.tensors["W_dec"].shape)))
        return ["the weights are left out"]


class SilentWriter:
    """Writes nothing."""

    def write(self, sae: SAE[Any], exported: Export, folder: Path) -> Sequence[str]:
        return []


class MuteWriter(SilentWriter):
    """Returns no notes."""

    def write(self, sae: SAE[Any], exported: Export, folder: Path) -> Any:
        (folder / "x").touch()


class FailingWriter:
    """Has a mistake in it."""

    def write(self, sae: SAE[Any], exported: Export, folder: Path) -> Sequence[str]:
        (folder / "half").touch()
        return [exported.nothing]  # pyright: ignore[reportAttributeAccessIssue] - the mistake


class NoWriter:
    """Nothing at all."""


@pytest.fixture(autouse=True)
def writers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    module = ModuleType("writers_of_a_stranger")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for cls in (NumbersWriter, SilentWriter, MuteWriter, FailingWriter, NoWriter):
        module.__dict__[cls.__name__] = cls
        name = cls.__name__.removesuffix("Writer").lower()
        get_registry().register(
            WriterSpec(name=name, target=f"{module.__name__}:{cls.__name__}", summary="A test"), f"sae-{name}"
        )
    NumbersWriter.seen.clear()
    yield
    reset_registry()


def topk() -> SAE[Any]:
    return create("topk", d_in=4, d_sae=8, k=2)


def test_a_plugins_writer_is_listed_and_used_by_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    topk().save(tmp_path / "sae")
    assert main(["list", "writers", "--json"]) == 0
    assert "sae-numbers:numbers" in [each["qualified"] for each in json.loads(capsys.readouterr().out)]
    assert main(["convert", str(tmp_path / "sae"), "--to", "numbers", "--output", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out == (f"{tmp_path}/out: topk, 8 latents, numbers\nnote: the weights are left out\n")
    assert json.loads((tmp_path / "out/part/numbers.json").read_text()) == [8, 4]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "sae"]


@pytest.mark.parametrize(
    ("to", "error", "message"),
    [
        ("silent", PluginError, "the writer sae-silent:silent wrote nothing"),
        ("mute", PluginError, "the writer sae-mute:mute returned None, not a list of notes"),
        ("failing", PluginError, "the writer sae-failing:failing failed: .*no attribute 'nothing'"),
        ("no", PluginError, "NoWriter is no writer: it has no write"),
        ("numers", UnknownNameError, "unknown writer 'numers'; did you mean 'numbers'"),
    ],
)
def test_a_writer_that_does_not_do_its_part_is_one_error_that_leaves_nothing(
    tmp_path: Path, to: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        convert(topk(), to, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_another_plugins_dictionary_is_not_taken_for_the_cores_of_that_name(
    tmp_path: Path, rival: type[SAE[Any]]
) -> None:
    theirs = create("sae-rival:topk", d_in=4, d_sae=8, k=2)
    assert type(theirs) is rival
    with pytest.raises(FormatError, match="numbers cannot express sae-rival:topk"):
        convert(theirs, "numbers", tmp_path / "out")
    with pytest.raises(FormatError, match="sae_lens cannot express architecture 'sae-rival:topk'"):
        convert(theirs, "sae_lens", tmp_path / "out")
    assert isinstance(theirs.config, TopKConfig)
    convert(topk(), "numbers", tmp_path / "out")
    assert NumbersWriter.seen == ["sae-rival:topk", "sae-core:topk"]


def test_what_is_there_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").touch()
    with pytest.raises(ConfigError, match="is there already"):
        convert(topk(), "numbers", tmp_path / "out")
    with pytest.raises(FormatError, match="cannot be written: something of this name is there already"):
        convert(topk(), "numbers", tmp_path / "out/mine/deeper")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


def test_sae_lens_reads_what_is_written_for_it(tmp_path: Path) -> None:
    sae, x = topk(), torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    assert convert(sae, "sae_lens", tmp_path / "out") == []
    torch.testing.assert_close(SAE.load(tmp_path / "out")(x), sae.eval()(x))
    with pytest.raises(FormatError, match="sae_lens cannot express architecture 'groupmax'"):
        convert(create("groupmax", d_in=4, d_sae=8, k=2), "sae_lens", tmp_path / "other")


def test_sae_lens_has_no_name_for_an_input_scaled_by_a_constant(tmp_path: Path) -> None:
    scaled: dict[str, Any] = {
        "normalize_activations": "constant_scalar_rescale",
        "activation_normalization_factor": 0.5,
    }
    pursuit = create("matching_pursuit", d_in=4, d_sae=8, **scaled)  # does not fold it
    with pytest.raises(FormatError, match=r"sae_lens cannot express an input scaled by 0\.5"):
        convert(pursuit, "sae_lens", tmp_path / "pursuit")
    convert(create("standard", d_in=4, d_sae=8, **scaled), "sae_lens", tmp_path / "standard")
    assert SAE.load(tmp_path / "standard").config.normalize_activations == "none"
