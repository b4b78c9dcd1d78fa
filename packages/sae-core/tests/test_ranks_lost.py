"""Processes that die, hang, or are started wrongly: the others end soon, with one error that names the rank."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

_PATIENCE = 240  # of the tests, on a machine that does other things


class Launcher:
    """A process that forks ranks; see `ranks_launcher`."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("ranks_launcher.py"))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        )  # fmt: skip

    def ask(self, question: dict[str, Any]) -> list[int]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


class Group:
    """Ranks of ``sae-core train``."""

    def __init__(
        self,
        launcher: Launcher,
        folder: Path,
        size: int,
        *arguments: str,
        hangs: int | None = None,
        **environment: str,
    ) -> None:
        self.launcher, self.folder = launcher, folder
        given = ["train", str(folder / "run.yaml"), *arguments]
        self.ranks = launcher.ask(
            {
                "size": size,
                "arguments": given,
                "environment": environment,
                "folder": str(folder),
                "hangs": hangs,
            }
        )

    def checkpoints(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "out" / "checkpoints").glob("0*"))

    def until_it_saves(self) -> None:
        before, deadline = self.checkpoints(), time.monotonic() + _PATIENCE
        while self.checkpoints() == before:
            if time.monotonic() > deadline or self.said(0):
                for rank in self.ranks:
                    os.kill(rank, signal.SIGKILL)
                pytest.fail(f"it does not train: {self.said(0)}")
            time.sleep(0.1)

    def said(self, rank: int) -> str:
        return (self.folder / f"{rank}.err").read_text() if (self.folder / f"{rank}.err").exists() else ""

    def codes(self, *but: int) -> list[int]:
        """Exit codes of all ranks but these, which have a minute."""
        ranks = [rank for number, rank in enumerate(self.ranks) if number not in but]
        late = threading.Timer(_PATIENCE, lambda: [os.kill(rank, signal.SIGKILL) for rank in ranks])
        late.start()
        try:
            return self.launcher.ask({"wait": ranks})
        finally:
            late.cancel()


@pytest.fixture(scope="module")
def launcher() -> Iterator[Launcher]:
    launched = Launcher()
    yield launched
    launched.process.communicate(timeout=60)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    np.save(tmp_path / "rows.npy", torch.randn(4000, 8, generator=torch.Generator().manual_seed(0)).numpy())
    run = {
        "output": str(tmp_path / "out"),
        "sae": {"architecture": "topk", "d_sae": 32, "k": 2},
        "source": {"name": "tensor_files", "paths": [str(tmp_path / "rows.npy")], "epochs": 100_000},
        "train": {
            "total_samples": 200_000_000, "batch_size": 96, "log_every_steps": 20, "checkpoint_every_samples": 9600,
            "progress_bar": False,
        },
        "parallel": {"timeout_seconds": 6},
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(json.dumps(run))
    return tmp_path


def test_a_killed_rank_ends_the_others_by_name_and_the_run_goes_on_with_fewer(launcher: Launcher, folder: Path) -> None:
    group = Group(launcher, folder, 2)
    group.until_it_saves()
    os.kill(group.ranks[1], signal.SIGKILL)
    assert group.codes() == [1, -signal.SIGKILL], group.said(0)
    assert "rank 1: has ended or is frozen" in group.said(0)
    assert group.said(0).count("error:") == 1

    (folder / "0.err").unlink()
    again = Group(launcher, folder, 1, "--resume")
    deadline = time.monotonic() + _PATIENCE
    while "going on at" not in again.said(0):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    os.kill(again.ranks[0], signal.SIGINT)
    again.codes()


def test_a_rank_that_hangs_ends_the_others_by_name(launcher: Launcher, folder: Path) -> None:
    group = Group(launcher, folder, 3)
    group.until_it_saves()
    os.kill(group.ranks[2], signal.SIGSTOP)
    assert group.codes(2) == [1, 1]
    os.kill(group.ranks[2], signal.SIGKILL)
    group.codes(0, 1)
    assert "error: rank 2: " in group.said(0)
    assert "sae-core" not in group.said(1)  # torch may warn of a store that went with the first process


def test_a_rank_that_lives_and_does_not_come_is_said_to_hang(launcher: Launcher, folder: Path) -> None:
    group = Group(launcher, folder, 2, "--set", "parallel.timeout_seconds=3", hangs=1)
    assert group.codes(1) == [1]
    os.kill(group.ranks[1], signal.SIGKILL)  # where its own watch has not ended it before
    group.codes(0)
    assert "error: rank 1: hangs: the others have waited for it" in group.said(0)


def test_two_processes_leave_the_folder_that_one_leaves(launcher: Launcher, folder: Path) -> None:
    few = ("--set", "train.total_samples=19200", "--set", "train.lr=0.001")
    for size in (1, 2):
        group = Group(launcher, folder, size, *few, "--set", f"output={folder / f'out-{size}'}")
        assert group.codes() == [0] * size, group.said(0)
    one, two = (folder / f"out-{size}" for size in (1, 2))
    left = [sorted(str(path.relative_to(each)) for path in each.rglob("*")) for each in (one, two)]
    assert left[0] == left[1]
    assert any(name.startswith("checkpoints/0") for name in left[0])
    assert (one / "run.yaml").read_text() == (two / "run.yaml").read_text().replace("out-2", "out-1")
    config = [json.loads((each / "cfg.json").read_text()) for each in (one, two)]
    facts = [each["metadata"].pop("sae_core") for each in config]
    assert config[0] == config[1]
    assert facts[0].keys() == facts[1].keys()
    finals = [each["training"].pop("final") for each in facts]
    assert facts[0]["training"] == facts[1]["training"]
    assert finals[0] == pytest.approx(finals[1], rel=1e-5)
    for name in ("sae_weights.safetensors", "log.jsonl"):
        found = [each / name for each in (one, two)]
        if name.endswith("l"):
            for lines in zip(*(path.read_text().splitlines() for path in found), strict=True):
                record, wanted = map(json.loads, lines)
                for key, value in wanted.items():
                    assert record[key] == (None if value is None else pytest.approx(value, rel=1e-4, abs=1e-4)), key
        else:
            tensors, expected = (load_file(path) for path in found)
            assert tensors.keys() == expected.keys()
            assert all((tensors[key] - expected[key]).abs().max() < 1e-5 for key in tensors)


def test_one_signal_stops_all_ranks_and_is_said_once(launcher: Launcher, folder: Path) -> None:
    group = Group(launcher, folder, 2)
    group.until_it_saves()
    os.kill(group.ranks[1], signal.SIGTERM)
    assert group.codes() == [128 + signal.SIGTERM] * 2, group.said(0)
    assert "stopped by SIGTERM; --resume goes on from" in group.said(0)
    assert "sae-core" not in group.said(1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("parallel.data=3", "3 processes are to share the batches, but 2 were started"),
        ("train.batch_size=65", "65 samples cannot be divided evenly among 2 processes"),
        ("device=cuda:0", "device"),
        ("device=cuda", "cuda"),
        ("parallel.latents=3", "parallel.latents: 3 processes are to share out the latents, but 2 were started"),
        ("parallel.source=2", "parallel.source: 2 processes are to read the source and others to train, but 2"),
    ],
)
def test_what_cannot_be_is_one_error_of_the_first_rank(
    launcher: Launcher, folder: Path, change: str, message: str
) -> None:
    group = Group(launcher, folder, 2, "--set", change)
    assert group.codes() == [1, 1]
    assert message in group.said(0)
    assert group.said(0).count("error:") == 1
    assert "sae-core" not in group.said(1)


def test_half_an_environment_is_refused(launcher: Launcher, folder: Path) -> None:
    group = Group(launcher, folder, 1, MASTER_ADDR="", WORLD_SIZE="2")
    assert group.codes() == [1]
    assert "RANK, WORLD_SIZE, MASTER_PORT but not MASTER_ADDR" in group.said(0)
