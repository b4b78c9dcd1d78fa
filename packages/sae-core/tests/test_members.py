"""Run files that train several dictionaries on one stream."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from sae_core import SAE, TrainConfig
from sae_core.cli import main
from sae_core.errors import ConfigError
from sae_core.members import members_of
from sae_core.run import RunStopped, execute, execute_all, read_run
from sae_core.training.trainer import Trainer
from safetensors.torch import save_file

TRAIN = TrainConfig(total_samples=1000, lr=1e-3)


def names(*arguments: Any) -> list[str]:
    return list(members_of(*arguments, TRAIN, 7))


def test_a_list_a_grid_and_both_give_the_dictionaries_they_say() -> None:
    base = {"architecture": "topk", "d_sae": 32}
    found = members_of(base, [{"name": "wide", "d_sae": 64}, {"k": 3, "seed": 1}], {}, TRAIN, 7)
    assert list(found) == ["wide", "2"]
    assert found["wide"].sae == {"architecture": "topk", "d_sae": 64}
    assert (found["wide"].seed, found["2"].seed) == (7, 1)
    grid = {"k": [2, 4], "train.lr": [1e-3, 1e-4]}
    found = members_of(base, [], grid, TRAIN, 7)
    assert list(found) == ["k=2,lr=0.001", "k=2,lr=0.0001", "k=4,lr=0.001", "k=4,lr=0.0001"]
    assert found["k=4,lr=0.0001"].train == TrainConfig(total_samples=1000, lr=1e-4)
    assert names(base, [{"name": "a"}, {"name": "b"}], {"seed": [0, 1]}) == [
        "a,seed=0",
        "a,seed=1",
        "b,seed=0",
        "b,seed=1",
    ]
    assert names(None, [{"architecture": "topk"}], {}) == [""]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (({"architecture": "topk"}, [{"name": "a"}, {"name": "a"}], {}), "two are called 'a'"),
        (({"architecture": "topk"}, [{"name": "../a"}, {}], {}), "cannot be a folder's name"),
        (({"architecture": "topk"}, [], {"k": []}), "grid: k: a list of values"),
        (({"architecture": "topk"}, [], {"k": 3}), "grid: k: a list of values, not 3"),
        (({}, [{"k": 3}, {"k": 4}], {}), "saes: 1: missing key 'architecture'"),
        (({"architecture": "topk"}, [{"train": {"lrr": 1}}, {}], {}), "saes: 1: train: unknown key 'lrr'"),
        (({"architecture": "topk"}, [{"seed": "x"}, {}], {}), "seed must be a whole number, not 'x'"),
        (({"architecture": "topk"}, [{"train": 3}, {}], {}), "train is a group of settings, not 3"),
    ],
)
def test_what_cannot_be_trained_is_refused(arguments: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        members_of(*arguments, TRAIN, 0)


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    rows = torch.randn(800, 8, generator=torch.Generator().manual_seed(0)).relu()
    save_file({"activations": rows}, tmp_path / "rows.safetensors")
    run = {
        "output": str(tmp_path / "out"),
        "sae": {"architecture": "topk", "d_sae": 24},
        "grid": {"k": [2, 4], "seed": [0, 1]},
        "source": {"name": "tensor_files", "paths": [str(tmp_path / "rows.safetensors")], "epochs": 100},
        "train": {"total_samples": 1600, "batch_size": 40, "log_every_steps": 7, "progress_bar": False},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(run))
    return path


def content(folder: Path) -> dict[str, bytes]:
    """What a dictionary's folder holds, but for its report, which names the folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name != "report.html"}


def test_every_dictionary_of_a_grid_is_the_one_that_it_is_alone(
    run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(run_file)]) == 0
    shown = capsys.readouterr().out
    saes = tmp_path / "out" / "saes"
    assert sorted(path.name for path in saes.iterdir()) == [f"k={k},seed={seed}" for k in (2, 4) for seed in (0, 1)]
    for k, seed in ((2, 1), (4, 0)):
        alone = read_run(
            run_file, ["grid={}", f"sae.k={k}", f"output={tmp_path / f'{k}{seed}'}", f"seed={seed}", "source.seed=0"]
        )
        execute(alone)
        mine, theirs = content(saes / f"k={k},seed={seed}"), content(alone.output)
        assert {name: mine[name] for name in mine} == {name: theirs[name] for name in mine}
        assert f"k={k},seed={seed}" in shown
    table = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert [row["l0"] for row in table] == sorted(row["l0"] for row in table)
    best = [row for row in table if row["best"]]
    for row in table:
        beaten = [b for b in best if b["l0"] <= row["l0"] and b["explained_variance"] >= row["explained_variance"]]
        assert beaten, row
    again = read_run(tmp_path / "out" / "run.yaml", [f"output={tmp_path / 'again'}"])
    execute_all(again)
    assert content(tmp_path / "again" / "saes" / "k=2,seed=1") == content(saes / "k=2,seed=1")


def test_a_run_of_several_goes_on_where_it_was_stopped(run_file: Path, tmp_path: Path) -> None:
    whole = read_run(run_file, [f"output={tmp_path / 'whole'}"])
    execute_all(whole)
    step = Trainer._step  # pyright: ignore[reportPrivateUsage]
    with pytest.MonkeyPatch.context() as patch:

        def signalled(self: Any, name: str, batch: Any) -> Any:
            if self.learners["k=4,seed=1"].samples == 600 and name == "k=2,seed=0":
                os.kill(os.getpid(), signal.SIGTERM)
            return step(self, name, batch)

        patch.setattr(Trainer, "_step", signalled)
        with pytest.raises(RunStopped, match="stopped by SIGTERM") as stopped:
            execute_all(read_run(run_file))
    assert stopped.value.signal == signal.SIGTERM
    interrupted = tmp_path / "out" / "saes" / "k=2,seed=0" / "interrupted"
    assert SAE.load(interrupted).metadata["sae_core"]["training_config"]["k"] == 2
    execute_all(read_run(run_file), resume=True)
    assert not interrupted.exists()
    for member in (tmp_path / "out" / "saes").iterdir():
        assert content(member) == content(tmp_path / "whole" / "saes" / member.name)
    assert content(tmp_path / "out")["comparison.json"] == content(tmp_path / "whole")["comparison.json"]


def test_one_that_diverges_is_told_and_the_others_come_out(
    run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(run_file), "--set", "sae.k=2", "--set", "grid={train.lr: [1e-3, 100]}"]) == 0
    shown = capsys.readouterr().out
    assert "dropped: lr=100: step" in shown
    assert SAE.load(tmp_path / "out" / "saes" / "lr=0.001").config.k == 2
    assert not (tmp_path / "out" / "saes" / "lr=100" / "cfg.json").exists()
    with pytest.raises(Exception, match="already holds an SAE"):
        execute_all(read_run(run_file))
    execute_all(read_run(run_file), overwrite=True)
    assert not (tmp_path / "out" / "saes" / "lr=100").exists()


def test_one_and_several_are_told_apart(run_file: Path) -> None:
    with pytest.raises(ConfigError, match="several dictionaries; use execute_all"):
        execute(read_run(run_file))
    with pytest.raises(ConfigError, match="missing key 'sae'"):
        read_run(run_file, ["sae=null"])
    with pytest.raises(ConfigError, match=r"saes: k=2,bad=1: .*unknown key 'bad'"):
        execute_all(read_run(run_file, ["grid={k: [2], bad: [1]}"]))
