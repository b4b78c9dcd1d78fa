"""A CSV log has a column for everything that any record says, whenever it was first said."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from sae_core import TrainConfig, Trainer, create
from sae_core.errors import FormatError
from sae_core.plugins import get_registry
from sae_core.training.csv_logger import CsvConfig, CsvLogger


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def logger(path: Path) -> CsvLogger:
    made = get_registry().usable("logger", "csv")(CsvConfig(path=path))
    assert isinstance(made, CsvLogger)
    return made


def test_a_key_that_comes_late_becomes_a_column_and_earlier_cells_are_empty(tmp_path: Path) -> None:
    log = logger(tmp_path / "logs/log.csv")
    log.log({"step": 1, "loss": 0.5, "note": 'a "quoted", text'})
    log.log({"step": 2, "loss": None, "metrics/new": 3.0})
    log.log({"loss": 0.25, "step": 3})
    assert rows(tmp_path / "logs/log.csv") == [
        {"step": "1", "loss": "0.5", "note": 'a "quoted", text', "metrics/new": ""},
        {"step": "2", "loss": "", "note": "", "metrics/new": "3.0"},
        {"step": "3", "loss": "0.25", "note": "", "metrics/new": ""},
    ]
    assert [path.name for path in (tmp_path / "logs").iterdir()] == ["log.csv"]


def test_dictionaries_of_different_architectures_share_one_log(tmp_path: Path) -> None:
    saes = {"a": create("topk", d_in=4, d_sae=8, k=2), "b": create("standard", d_in=4, d_sae=8)}
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    config = TrainConfig(total_samples=64, batch_size=32, log_every_steps=1, progress_bar=False)
    Trainer(saes, list(x.split(32)), config, loggers={name: [logger(tmp_path / "log.csv")] for name in saes}).fit_all()
    found = rows(tmp_path / "log.csv")
    assert [row["sae"] for row in found] == ["a", "b", "a", "b"]
    assert [row["samples"] for row in found] == ["32", "32", "64", "64"]
    assert [row["loss/l1"] != "" for row in found] == [False, True, False, True]


def test_a_run_that_goes_on_cuts_off_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    log = logger(tmp_path / "log.csv")
    log.log({"step": 1})
    state = log.state_dict()
    log.log({"step": 2, "late": 1})
    again = logger(tmp_path / "log.csv")
    again.load_state_dict(state)
    again.log({"step": 2})
    assert rows(tmp_path / "log.csv") == [{"step": "1", "late": ""}, {"step": "2", "late": ""}]
    with pytest.raises(FormatError, match="2 records, 9 when the checkpoint was written"):
        again.load_state_dict({"records": 9})


def test_a_file_that_is_no_log_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.csv").write_text("one\ntwo,three\n")
    with pytest.raises(FormatError, match="not a log of this kind"):
        logger(tmp_path / "notes.csv").log({"step": 1})
    assert (tmp_path / "notes.csv").read_text() == "one\ntwo,three\n"
