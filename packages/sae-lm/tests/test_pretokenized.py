from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from sae_core.cli import main
from sae_core.config import structure
from sae_core.errors import ConfigError, DataError, FormatError
from sae_lm.pretokenized import pretokenize
from sae_lm.source import HuggingFaceSource, HuggingFaceSourceConfig
from sae_lm.text import Part

PARTS: tuple[Part, ...] = ("train", "held_out")


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("\n\n".join(f"Document {i}: {'word ' * (i % 7)}and {i * i}." for i in range(60)))
    return file


@pytest.fixture
def make_source(llama: Any, tokenizer: Any, text_file: Path) -> Callable[..., HuggingFaceSource]:
    def make(**changes: Any) -> HuggingFaceSource:
        settings: dict[str, Any] = {
            "model": "tiny-llama", "hook": "model.layers.0", "context_size": 16, "batch_prompts": 4, "buffer_rows": 300,
            "text": {"kind": "file", "path": str(text_file), "held_out": 0.2}, **changes,
        }  # fmt: skip
        return HuggingFaceSource(structure(settings, HuggingFaceSourceConfig), model=llama, tokenizer=tokenizer)

    return make


def using(folder: Path, held_out: float = 0.2) -> dict[str, Any]:
    return {"kind": "pretokenized", "path": str(folder), "held_out": held_out}


def rows_of(source: HuggingFaceSource, part: Part) -> list[list[int]]:
    return [
        tokens[attended].tolist()
        for windows in source.windows(part)
        for tokens, attended in zip(windows.tokens, windows.attended, strict=True)
    ]


@pytest.mark.parametrize("tokens", [{}, {"packing": "document"}, {"bos": "document", "incomplete": "drop"}])
def test_the_windows_are_those_of_the_text_itself_on_both_sides(
    make_source: Callable[..., HuggingFaceSource], tmp_path: Path, tokens: dict[str, Any]
) -> None:
    plain = make_source(tokens=tokens)
    record = pretokenize(plain, tmp_path / "windows", rows_per_file=40)
    assert len(record["parts"]["train"]["files"]) > 1
    used = make_source(tokens=tokens, text=using(tmp_path / "windows"))
    for part in PARTS:
        assert rows_of(used, part) == rows_of(plain, part)
    assert all(torch.equal(a, b) for a, b in zip(used.batches(16), plain.batches(16), strict=True))  # pyright: ignore[reportArgumentType]


def test_another_policy_than_that_of_the_windows_is_refused(
    make_source: Callable[..., HuggingFaceSource], tmp_path: Path
) -> None:
    pretokenize(make_source(), tmp_path / "windows")
    for changes, message in (
        ({"context_size": 32}, "context_size: 16, not 32"),
        ({"tokens": {"bos": "none"}}, "tokens.bos: 'auto', not 'none'"),
        ({"tokens": {"eos_token": 5}}, "tokens.resolved.eos_id: 1, not 5"),
        ({"text": using(tmp_path / "windows", 0.3)}, "text.held_out: 0.2, not 0.3"),
    ):
        with pytest.raises(ConfigError, match=f"made by another policy .*{message}"):
            make_source(**{"text": using(tmp_path / "windows"), **changes}).windows("train")
    # What counts is a matter of use.
    fewer = make_source(text=using(tmp_path / "windows"), tokens={"exclude_first": 3})
    assert not next(fewer.windows("train")).kept[:, :3].any()
    with pytest.raises(ConfigError, match="set kind: pretokenized"):
        make_source(text={"kind": "file", "path": str(tmp_path / "windows")}).windows("train")
    with pytest.raises(ConfigError, match="is pretokenised already"):
        pretokenize(fewer, tmp_path / "again")


@pytest.mark.parametrize("shuffle", [False, True])
def test_an_interrupted_run_goes_on_and_ends_the_same(
    make_source: Callable[..., HuggingFaceSource], tmp_path: Path, shuffle: bool
) -> None:
    class Stop(Exception):
        pass

    def stop(part: str, rows: int) -> None:
        if (part, rows) == stop_at:
            raise Stop

    seen: list[tuple[str, int]] = []
    whole = pretokenize(
        make_source(), tmp_path / "whole", shuffle=shuffle, rows_per_file=30, after_file=lambda *told: seen.append(told)
    )
    for number, stop_at in enumerate(seen):
        folder = tmp_path / f"cut{number}"
        with pytest.raises(Stop):
            pretokenize(make_source(), folder, shuffle=shuffle, rows_per_file=30, after_file=stop)
        if stop_at != seen[-1]:
            with pytest.raises(FormatError, match="did not come to its end"):
                make_source(text=using(folder)).windows("train")
        assert pretokenize(make_source(), folder, shuffle=shuffle, rows_per_file=30) == whole
    plain, used = rows_of(make_source(), "train"), rows_of(make_source(text=using(tmp_path / "whole")), "train")
    assert (plain == used) is not shuffle
    assert sorted(plain) == sorted(used)


def test_damage_and_foreign_folders_are_named(make_source: Callable[..., HuggingFaceSource], tmp_path: Path) -> None:
    pretokenize(make_source(), tmp_path / "windows")
    with pytest.raises(ConfigError, match=r"made otherwise \(context_size: 16, not 8"):
        pretokenize(make_source(context_size=8), tmp_path / "windows")
    file = tmp_path / "windows" / "train" / "part-00000.parquet"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(FormatError, match=r"part-00000\.parquet: damaged"):
        list(make_source(text=using(tmp_path / "windows")).windows("train"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("")
    with pytest.raises(ConfigError, match="holds no pretokenised text"):
        pretokenize(make_source(), tmp_path / "mine")
    with pytest.raises(FormatError, match="no pretokenised text"):
        make_source(text=using(tmp_path / "mine")).windows("train")
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(DataError, match="gives no window to train on"):
        pretokenize(make_source(text={"kind": "file", "path": str(tmp_path / "empty.txt")}), tmp_path / "nothing")


def test_the_first_windows_are_enough_if_so_asked(
    make_source: Callable[..., HuggingFaceSource], tmp_path: Path
) -> None:
    pretokenize(make_source(), tmp_path / "windows", rows=5)
    for part in PARTS:
        assert rows_of(make_source(text=using(tmp_path / "windows")), part) == rows_of(make_source(), part)[:5]


def test_other_tools_read_the_windows_as_a_data_set(
    make_source: Callable[..., HuggingFaceSource], tmp_path: Path
) -> None:
    import datasets

    pretokenize(make_source(), tmp_path / "windows")
    facts = json.loads((tmp_path / "windows" / "sae_lens.json").read_text())
    assert (facts["context_size"], facts["begin_batch_token"], facts["sequence_separator_token"]) == (16, "bos", "eos")
    data: Any = datasets.load_dataset(
        str(tmp_path / "windows" / "train"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert data["input_ids"][:] == rows_of(make_source(), "train")


def test_pretokenize_preview_and_cache_from_the_command_line_without_the_models_weights(
    saved_model: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = tmp_path / "tokenizer"
    bare.mkdir()
    for file in saved_model.iterdir():
        if file.suffix != ".safetensors":
            (bare / file.name).write_bytes(file.read_bytes())
    run = {
        "output": str(tmp_path / "out"), "sae": {"architecture": "topk", "d_sae": 64, "k": 4},
        "train": {"total_samples": 100},
        "source": {
            "name": "huggingface", "model": str(bare), "hook": "model.layers.1", "context_size": 16,
            "text": {"kind": "file", "path": str(text_file), "held_out": 0.2},
        },
    }  # fmt: skip
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(run))
    assert main(["lm", "pretokenize", str(file), str(tmp_path / "windows"), "--shuffle"]) == 0
    printed = capsys.readouterr().out
    assert "windows of 16 tokens to train on and " in printed
    assert "text: {kind: pretokenized, path: " in printed
    text = json.dumps(using(tmp_path / "windows"))
    assert main(["preview", str(file), "--rows", "1", "--set", f"source.text={text}"]) == 0
    assert capsys.readouterr().out.startswith("window 0: ")
