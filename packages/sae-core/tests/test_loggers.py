"""Loggers: what they are told, what TensorBoard and Weights & Biases then have, read back with their own libraries."""

from __future__ import annotations

import builtins
import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from sae_core import TrainConfig, Trainer, create
from sae_core.errors import ConfigError, MissingDependencyError
from sae_core.plugins import PluginWarning, get_registry
from sae_core.protocols import RunFacts
from sae_core.run import execute_all, read_run
from sae_core.training.loggers import JsonlConfig, JsonlLogger
from sae_core.training.tensorboard_logger import TensorBoardConfig, TensorBoardLogger
from safetensors.torch import save_file

ROWS = torch.randn(1500, 8, generator=torch.Generator().manual_seed(0)).relu()


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    save_file({"activations": ROWS}, tmp_path / "rows.safetensors")
    run = {
        "output": str(tmp_path / "out"),
        "sae": {"architecture": "standard", "d_sae": 16, "l1_coefficient": 0.1},
        "source": {"name": "tensor_files", "paths": [str(tmp_path / "rows.safetensors")]},
        "train": {
            "total_samples": 400, "batch_size": 40, "log_every_steps": 5, "dead_after_samples": 100, "progress_bar": False,
        },
    }  # fmt: skip
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(run))
    return path


class Recording:
    """Remembers everything."""

    def __init__(self, fails: str = "") -> None:
        self.calls: list[Any] = []
        self._fails = fails

    def start(self, run: RunFacts) -> None:
        self._note("start", run)

    def log(self, record: Mapping[str, Any]) -> None:
        self._note("log", dict(record))

    def close(self) -> None:
        self._note("close", None)

    def _note(self, what: str, given: Any) -> None:
        self.calls.append((what, given))
        if what == self._fails:
            raise ConfigError("no connection")


def settings(**changes: Any) -> TrainConfig:
    return TrainConfig(
        **{"total_samples": 400, "batch_size": 40, "log_every_steps": 5, "progress_bar": False, **changes}
    )


def test_a_logger_is_told_the_run_then_gets_its_records_then_is_closed() -> None:
    logger, sae = Recording(), create("topk", d_in=8, d_sae=16, k=2)
    history = Trainer(sae, list(ROWS.split(40)), settings(), loggers=[logger]).fit().history
    (start, run), *logged, end = logger.calls
    assert (start, end) == ("start", ("close", None))
    assert run.sae is sae
    assert (run.name, run.folder, run.steps) == ("", None, 0)
    assert run.config["sae"]["k"] == 2
    assert run.config["train"]["batch_size"] == 40
    assert logged == [("log", record) for record in history]


@pytest.mark.parametrize("fails", ["start", "log", "close"])
def test_a_logger_that_fails_anywhere_is_reported_once_and_the_others_go_on(fails: str) -> None:
    broken, other = Recording(fails), Recording()
    trainer = Trainer(create("topk", d_in=8, d_sae=16, k=2), list(ROWS.split(40)), settings(), loggers=[broken, other])
    with pytest.warns(PluginWarning, match="Recording failed and is left out.*no connection") as caught:
        assert trainer.fit().samples == 400
    assert len(caught) == 1
    assert [what for what, _ in other.calls] == ["start", "log", "log", "close"]
    assert broken.calls[-1][0] == fails


def test_one_logger_for_several_dictionaries_is_refused() -> None:
    saes = {name: create("topk", d_in=8, d_sae=16, k=2) for name in "ab"}
    with pytest.raises(ConfigError, match="a logger receives the records of one"):
        Trainer(saes, list(ROWS.split(40)), settings(), loggers=[Recording()])


def test_lines_of_several_dictionaries_in_one_file_say_whose_they_are(run_file: Path, tmp_path: Path) -> None:
    more = [f"loggers=[{{name: jsonl, path: {tmp_path / 'all.jsonl'}}}]", "grid={d_sae: [16, 24]}"]
    results = execute_all(read_run(run_file, more))
    lines = [json.loads(line) for line in (tmp_path / "all.jsonl").read_text().splitlines()]
    for name, result in results.items():
        assert [line for line in lines if line["sae"] == name] == [{"sae": name, **each} for each in result.history]
    own = (tmp_path / "out" / "saes" / "d_sae=16" / "log.jsonl").read_text().splitlines()
    assert json.loads(own[0]) == results["d_sae=16"].history[0]


@pytest.mark.filterwarnings("default")  # tensorboard's reader is not free of them
def test_tensorboard_shows_the_records_under_the_names_of_saelens(run_file: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    results = execute_all(read_run(run_file, ["loggers=[{name: tensorboard}]", "grid={d_sae: [16, 24]}"]))
    for name, result in results.items():
        found = EventAccumulator(str(tmp_path / "out" / "saes" / name / "tensorboard")).Reload()
        last = result.history[-1]
        expected = {
            "details/n_training_samples": 400,
            "details/current_learning_rate": last["lr"],
            "losses/overall_loss": last["loss"],
            "losses/mse_loss": last["loss/mse"],
            "losses/l1_loss": last["loss/l1"],
            "metrics/l0": last["l0"],
            "metrics/explained_variance": last["explained_variance"],
            "sparsity/dead_features": round((last["dead_fraction"] or 0.0) * result.sae.d_sae),
        }
        assert set(found.Tags()["scalars"]) == set(expected)
        for tag, value in expected.items():
            event = found.Scalars(tag)[-1]
            assert (event.step, event.value) == (10, pytest.approx(value, rel=1e-6))
        assert found.Histograms("weights/W_dec_norms")[0].histogram_value.num == result.sae.d_sae
        assert "l1_coefficient: 0.1" in found.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()


@pytest.mark.filterwarnings("default")
def test_tensorboard_forgets_what_a_resumed_run_does_again(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def told(steps: int) -> RunFacts:
        return RunFacts(sae=create("topk", d_in=8, d_sae=16, k=2), folder=tmp_path, steps=steps)

    for start, values in ((0, {5: 1.0, 10: 2.0, 15: 3.0}), (10, {15: 4.0})):
        logger = TensorBoardLogger(TensorBoardConfig(names="sae_core"))
        logger.start(told(start))
        for step, value in values.items():
            logger.log({"step": step, "samples": 40 * step, "loss": value, "l0": None})
        logger.close()
    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in found.Scalars("loss")] == [(5, 1.0), (10, 2.0), (15, 4.0)]


def wandb_records(folder: Path) -> Iterator[Any]:
    """What an offline run of wandb wrote: its messages, in pieces with a header (checksum, size, kind), in blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    content, at, message = path.read_bytes(), 7, b""
    assert content.startswith(b":W&B")
    while at < len(content):
        if 32768 - at % 32768 < 7:  # no room for a header: the next block
            at += 32768 - at % 32768
            continue
        size, kind = struct.unpack_from("<HB", content, at + 4)
        message += content[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last piece
            record = wandb_internal_pb2.Record()
            record.ParseFromString(message)
            yield record
            message = b""


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # wandb's own
def test_weights_and_biases_gets_one_run_for_each_dictionary(run_file: Path, tmp_path: Path) -> None:
    results = execute_all(
        read_run(run_file, ["loggers=[{name: wandb, mode: offline, tags: [toy]}]", "grid={d_sae: [16, 24]}"])
    )
    ids: set[str] = set()
    for name, result in results.items():
        records = list(wandb_records(tmp_path / "out" / "saes" / name))
        (run,) = [record.run for record in records if record.HasField("run")]
        assert (run.display_name, run.project, list(run.tags)) == (name, "sae-core", ["toy"])
        config = {item.key: json.loads(item.value_json) for item in run.config.update}
        assert config["architecture"] == "standard"
        assert config["source"]["name"] == "tensor_files"
        ids.add(run.run_id)
        history = [
            {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            for record in records
            if record.HasField("history")
        ]
        assert [each["_step"] for each in history] == [5, 10]
        assert [each["losses/l1_loss"] for each in history] == [each["loss/l1"] for each in result.history]
    assert len(ids) == 2


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_without_the_library_a_run_is_refused_before_it_begins(
    name: str, run_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(wanted: str, *rest: Any) -> Any:
        if name in wanted and not wanted.startswith("sae_core"):
            raise ImportError(wanted)
        return real(wanted, *rest)

    get_registry().resolve("logger", name)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingDependencyError, match=rf"pip install 'sae-core\[{name}\]'"):
        execute_all(read_run(run_file, [f"loggers=[{{name: {name}}}]"]))
    assert not (tmp_path / "out").exists()


def test_a_run_whose_own_log_cannot_be_written_ends(tmp_path: Path) -> None:
    from sae_core.training.loggers import LogError

    (tmp_path / "file").write_text("")
    logger = JsonlLogger(JsonlConfig(path=tmp_path / "file" / "log.jsonl"))
    with pytest.raises(LogError, match="the log cannot be written"):
        Trainer(create("topk", d_in=8, d_sae=16, k=2), list(ROWS.split(40)), settings(), loggers=[logger]).fit()
