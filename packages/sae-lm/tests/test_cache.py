"""Activations written to disk and read back: the same rows, and the same batches as from the model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from sae_core import SAE
from sae_core.cli import main
from sae_core.config import structure
from sae_core.errors import ConfigError, DataError, FormatError
from sae_core.protocols import ActivationBatch, ActivationSource, HasMetadata, Resumable
from sae_lm.cached import CachedActivations, CachedActivationsConfig
from sae_lm.caching import estimate, write_cache
from sae_lm.source import HuggingFaceSource, HuggingFaceSourceConfig
from torch import Tensor

LAYERS = ["model.layers.0", "model.layers.2"]


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("\n\n".join(f"Document {i}: {'word ' * (i % 7)}and {i * i}." for i in range(60)))
    return file


@pytest.fixture
def make_source(llama: Any, tokenizer: Any, text_file: Path) -> Callable[..., HuggingFaceSource]:
    def make(**changes: Any) -> HuggingFaceSource:
        settings: dict[str, Any] = {
            "model": "tiny-llama", "context_size": 16, "batch_prompts": 4, "buffer_rows": 300,
            "text": {"kind": "file", "path": str(text_file), "held_out": 0.1}, **changes,
        }  # fmt: skip
        if "reads" not in settings:
            settings.setdefault("hook", LAYERS[0])
        return HuggingFaceSource(structure(settings, HuggingFaceSourceConfig), model=llama, tokenizer=tokenizer)

    return make


def cached(path: Path, **settings: Any) -> CachedActivations:
    return CachedActivations(structure({"path": str(path), **settings}, CachedActivationsConfig))


def plain(batches: Any) -> list[Tensor]:
    return [torch.cat([b.inputs, b.targets], -1) if isinstance(b, ActivationBatch) else b for b in batches]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) > 0 and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"reads": LAYERS, "writes": ["model.layers.1.mlp"], "epochs": 2},
        {"sequences": True, "tokens": {"exclude_last": 1}},
        {"activation_dtype": "bfloat16", "on_exhausted": "cycle"},
    ],
)
def test_a_cache_gives_the_very_batches_of_the_live_source(
    make_source: Callable[..., HuggingFaceSource], tmp_path: Path, settings: dict[str, Any]
) -> None:
    live = make_source(**settings)
    record = write_cache(live, tmp_path / "cache", shard_bytes=20_000)
    assert record["complete"]
    assert len(record["shards"]) > 2
    passes = {key: settings[key] for key in ("epochs", "on_exhausted") if key in settings}
    source = cached(tmp_path / "cache", **passes)
    assert isinstance(source, ActivationSource)
    assert isinstance(source, HasMetadata)
    assert (dict(source.sites), dict(source.target_sites)) == (dict(live.sites), dict(live.target_sites))
    assert source.sequence_length == live.sequence_length
    stop = 200 if settings.get("on_exhausted") == "cycle" else None
    from itertools import islice

    assert same(plain(islice(source.batches(28), stop)), plain(islice(live.batches(28), stop)))
    assert source.metadata()["sae_lm"]["source"]["model"] == "tiny-llama"


def test_a_resumed_reader_goes_on_exactly(make_source: Callable[..., HuggingFaceSource], tmp_path: Path) -> None:
    write_cache(make_source(), tmp_path / "cache", shard_bytes=20_000)
    batches = cached(tmp_path / "cache", epochs=2).batches(16)
    assert isinstance(batches, Resumable)
    for _ in range(60):
        next(batches)
    state = batches.state_dict()
    rest = plain(batches)
    resumed = cached(tmp_path / "cache", epochs=2).batches(16)
    resumed.load_state_dict(state)
    assert same(plain(resumed), rest)


def test_some_of_the_places_can_be_read(make_source: Callable[..., HuggingFaceSource], tmp_path: Path) -> None:
    write_cache(make_source(reads=LAYERS), tmp_path / "cache")
    source = cached(tmp_path / "cache", reads=[LAYERS[1]])
    assert same(plain(source.batches(16)), plain(make_source(hook=LAYERS[1]).batches(16)))
    metadata = source.metadata()
    assert metadata["hook_name"] == metadata["sae_lm"]["source"]["hook"] == LAYERS[1]
    assert metadata["sae_lm"]["hook_point"]["module"] == LAYERS[1]
    pair = next(cached(tmp_path / "cache", reads=[LAYERS[0]], writes=[LAYERS[1]]).batches(16))
    assert isinstance(pair, ActivationBatch)
    with pytest.raises(ConfigError, match=r"no place 'model.layers.3' in this cache; did you mean 'model.layers.2'\?"):
        _ = cached(tmp_path / "cache", reads=["model.layers.3"]).sites


def test_token_ids_and_positions_lie_beside_the_rows(
    make_source: Callable[..., HuggingFaceSource], tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    source = make_source()
    record = write_cache(source, tmp_path / "cache", shard_bytes=20_000)
    shards = [load_file(tmp_path / "cache" / shard["file"]) for shard in record["shards"]]
    windows = list(source.windows("train"))
    assert torch.cat([s["token_ids"] for s in shards]).tolist() == [
        t for w in windows for t in w.tokens[w.kept].tolist()
    ]
    positions = [p for w in windows for row in w.kept for p in row.nonzero().flatten().tolist()]
    assert torch.cat([s["positions"] for s in shards]).tolist() == positions
    leave_out = shards[0]["token_ids"][0].item()
    kept = sum(int((s["token_ids"] != leave_out).sum()) for s in shards)
    rows = torch.cat(plain(cached(tmp_path / "cache", exclude_token_ids=[leave_out]).batches(1)))
    assert len(rows) == kept < record["rows"]


@pytest.mark.parametrize("after", [1, 3])
def test_an_interrupted_cache_is_continued_and_ends_the_same(
    make_source: Callable[..., HuggingFaceSource], tmp_path: Path, after: int
) -> None:
    class Stop(Exception):
        pass

    def stop(shards: int, rows: int) -> None:
        if shards == after:
            raise Stop

    whole = write_cache(make_source(), tmp_path / "whole", shard_bytes=20_000)
    with pytest.raises(Stop):
        write_cache(make_source(), tmp_path / "cut", shard_bytes=20_000, after_shard=stop)
    halfway = cached(tmp_path / "cut")  # what is there can be read
    assert len(plain(halfway.batches(16))) > 0
    assert sum(len(batch) for batch in plain(halfway.batches(1))) == sum(s["rows"] for s in whole["shards"][:after])
    told: list[int] = []
    record = write_cache(make_source(), tmp_path / "cut", shard_bytes=20_000, after_shard=lambda n, _: told.append(n))
    assert told[0] == after + 1
    assert [shard["sha256"] for shard in record["shards"]] == [shard["sha256"] for shard in whole["shards"]]
    assert record["complete"]


def test_a_lost_shard_is_written_again_and_a_damaged_one_is_named(
    make_source: Callable[..., HuggingFaceSource], tmp_path: Path
) -> None:
    record = write_cache(make_source(), tmp_path / "cache", shard_bytes=20_000)
    second = tmp_path / "cache" / "shard-00001.safetensors"
    data = bytearray(second.read_bytes())
    data[-5] ^= 1
    second.write_bytes(data)
    with pytest.raises(
        FormatError, match=r"shard-00001\.safetensors: damaged: its SHA-256 .*delete it and run `sae-core lm cache`"
    ):
        plain(cached(tmp_path / "cache").batches(16))
    second.unlink()
    with pytest.raises(FormatError, match=r"shard-00001\.safetensors: this file is missing"):
        plain(cached(tmp_path / "cache").batches(16))
    again = write_cache(make_source(), tmp_path / "cache", shard_bytes=20_000)
    assert again["shards"] == record["shards"]
    assert same(plain(cached(tmp_path / "cache").batches(16)), plain(make_source().batches(16)))


def test_a_folder_of_something_else_is_left_alone(
    make_source: Callable[..., HuggingFaceSource], tmp_path: Path
) -> None:
    write_cache(make_source(), tmp_path / "cache")
    with pytest.raises(ConfigError, match=r"holds a cache of something else \(config.context_size: 16, not 8\)"):
        write_cache(make_source(context_size=8), tmp_path / "cache")
    with pytest.raises(ConfigError, match=r"tokens.exclude_first: 0, not 2|config.tokens.exclude_first: 0, not 2"):
        write_cache(make_source(tokens={"exclude_first": 2}), tmp_path / "cache")
    write_cache(make_source(seed=5, buffer_rows=400), tmp_path / "cache")  # neither changes what is in it
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is there and holds no cache"):
        write_cache(make_source(), tmp_path / "full")
    for folder, message in (("full", "neither a cache"), ("nowhere", "neither a cache")):
        with pytest.raises(FormatError, match=message):
            _ = cached(tmp_path / folder).sites


def test_the_estimate_is_what_is_written(
    make_source: Callable[..., HuggingFaceSource], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_source(reads=LAYERS)
    planned = estimate(source)
    record = write_cache(source, tmp_path / "cache")
    assert planned.rows == record["rows"]
    assert planned.bytes == pytest.approx(sum(shard["bytes"] for shard in record["shards"]), rel=0.05)
    assert planned.dtype == "float32"
    few = write_cache(source, tmp_path / "few", rows=50)
    assert 50 <= few["rows"] < 50 + 64
    assert few["complete"]
    import shutil
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1, 1, 100))
    with pytest.raises(ConfigError, match=r"kB are needed, and 100 B are free there"):
        write_cache(source, tmp_path / "more")
    assert not (tmp_path / "more").exists()


def test_a_streamed_text_needs_a_number_of_rows(make_source: Callable[..., HuggingFaceSource], tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n')
    source = make_source(text={"kind": "dataset", "path": str(tmp_path), "streaming": True, "held_out": 0.0})
    with pytest.raises(ConfigError, match="say how many rows are wanted"):
        estimate(source)


def test_the_caches_of_sae_lens_are_read(tmp_path: Path) -> None:
    import datasets

    name = "blocks.1.hook_resid_post"
    values = torch.arange(6 * 4 * 3, dtype=torch.float32).view(6, 4, 3)
    tokens = torch.arange(24).view(6, 4)
    features = datasets.Features(
        {
            name: datasets.Array2D(shape=(4, 3), dtype="float32"),
            "token_ids": datasets.Sequence(datasets.Value("int32"), length=4),
        }
    )
    data = datasets.Dataset.from_dict({name: values.numpy(), "token_ids": tokens.tolist()}, features=features)
    data.save_to_disk(tmp_path / "arrow")
    source = cached(tmp_path / "arrow")
    assert dict(source.sites) == {name: 3}
    assert source.metadata()["hook_name"] == name
    rows = torch.cat(plain(source.batches(4)))
    assert sorted(rows.tolist()) == values.view(-1, 3).tolist()
    fewer = torch.cat(plain(cached(tmp_path / "arrow", exclude_token_ids=[0, 5]).batches(2)))
    assert sorted(fewer.tolist()) == [row for n, row in enumerate(values.view(-1, 3).tolist()) if n not in (0, 5)]
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "text")
    with pytest.raises(FormatError, match=r"no column of shape \(positions, width\); its columns: text"):
        _ = cached(tmp_path / "text").sites


@pytest.fixture
def run_file(saved_model: Path, text_file: Path, tmp_path: Path) -> Path:
    run = {
        "output": str(tmp_path / "out"),
        "sae": {"architecture": "topk", "d_sae": 64, "k": 4},
        "source": {
            "name": "huggingface", "model": str(saved_model), "hook": "model.layers.1", "device": "cpu", "context_size": 16,
            "batch_prompts": 4, "buffer_rows": 1024, "text": {"kind": "file", "path": str(text_file), "held_out": 0.2},
        },
        "train": {"total_samples": 1000, "batch_size": 50, "progress_bar": False},
    }  # fmt: skip
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(run))
    return file


def test_cache_then_train_then_eval_from_the_command_line(
    run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "cache"
    assert main(["lm", "cache", str(run_file), str(out), "--dry-run"]) == 0
    estimated = capsys.readouterr().out
    assert "activations of model.layers.1 (32) in float32: " in estimated
    assert not out.exists()
    assert main(["lm", "cache", str(run_file), str(out), "--shard-mb", "0.05"]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith(estimated)
    assert "The cache is complete" in printed.out
    assert "shard 1: " in printed.err

    assert main(["train", str(run_file), "--set", f"output={tmp_path / 'live'}"]) == 0
    source = json.dumps({"name": "activation_cache", "path": str(out)})
    assert main(["train", str(run_file), "--set", f"source={source}"]) == 0
    live, from_cache = SAE.load(tmp_path / "live"), SAE.load(tmp_path / "out")
    assert all(
        torch.equal(a, b) for a, b in zip(live.state_dict().values(), from_cache.state_dict().values(), strict=True)
    )
    assert from_cache.metadata["hook_name"] == "model.layers.1"
    assert main(["eval", str(tmp_path / "out"), "--tokens", "50", "--device", "cpu", "--no-random", "--json"]) == 0

    capsys.readouterr()
    assert main(["lm", "cache", str(run_file), str(out), "--private"]) == 1
    assert "--private belongs to --hub" in capsys.readouterr().err
    assert main(["lm", "cache", str(run_file), str(out), "--set", "source.name=synthetic"]) == 1
    assert "this command is for 'huggingface'" in capsys.readouterr().err


def test_settings_of_a_reader_are_checked(make_source: Callable[..., HuggingFaceSource], tmp_path: Path) -> None:
    write_cache(make_source(), tmp_path / "cache", rows=100)
    with pytest.raises(ConfigError, match="buffer_rows: 70 cannot hold a batch of 16 beside the 64"):
        cached(tmp_path / "cache", buffer_rows=70).batches(16)
    with pytest.raises(ConfigError, match="epochs must be positive"):
        cached(tmp_path / "cache", epochs=0)
    with pytest.raises(ConfigError, match="name the places to read, too"):
        cached(tmp_path / "cache", writes=["a"])
    (tmp_path / "begun").mkdir()
    record = json.loads((tmp_path / "cache" / "cache.json").read_text())
    (tmp_path / "begun" / "cache.json").write_text(json.dumps({**record, "shards": []}))
    with pytest.raises(DataError, match="no whole shard yet"):
        _ = cached(tmp_path / "begun").sites
    (tmp_path / "begun" / "cache.json").write_text(json.dumps({**record, "format": 99}))
    with pytest.raises(FormatError, match="not a cache of activations of format 1"):
        _ = cached(tmp_path / "begun").sites
