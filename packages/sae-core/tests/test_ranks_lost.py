"""Processes that die, hang, or are started wrongly: the others end soon, with one error that names the rank."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch


def started(arguments: list[str], size: int, **environment: str) -> list[subprocess.Popen[str]]:
    """So many processes of `sae-core` that find each other."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = str(listening.getsockname()[1])
    shared = {
        **os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        "CUDA_VISIBLE_DEVICES": "", **environment,
    }  # fmt: skip
    command = [sys.executable, "-c", "import sys; from sae_core.cli import main; sys.exit(main())", *arguments]
    return [
        subprocess.Popen(
            command, env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(size)
    ]  # fmt: skip


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
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
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(run))
    return path


def until_it_trains(output: Path, processes: list[subprocess.Popen[str]]) -> None:
    deadline = time.monotonic() + 240
    while not any((output / "checkpoints").glob("0*")):
        if time.monotonic() > deadline or any(process.poll() is not None for process in processes):
            for process in processes:
                process.kill()
            pytest.fail(f"it does not train: {[process.communicate() for process in processes]}")
        time.sleep(0.1)


def ended(processes: list[subprocess.Popen[str]], codes: list[int], within: float) -> list[str]:
    """What they said on stderr, after they ended with these codes."""
    deadline = time.monotonic() + within
    try:
        said = [process.communicate(timeout=max(deadline - time.monotonic(), 0.1)) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == codes, said
    assert all(not out for out, _ in said[1:])
    return [err for _, err in said]


def test_a_killed_process_ends_the_others_by_name_and_the_run_goes_on(run_file: Path, tmp_path: Path) -> None:
    processes = started(["train", str(run_file)], 2)
    until_it_trains(tmp_path / "out", processes)
    processes[1].send_signal(signal.SIGKILL)
    first, _ = ended(processes, [1, -signal.SIGKILL], within=120)
    assert "rank 1: has ended or is frozen" in first
    assert first.count("error:") == 1

    again = started(["train", str(run_file), "--resume"], 1)
    until_more = sorted((tmp_path / "out" / "checkpoints").glob("0*"))[-1]
    deadline = time.monotonic() + 240
    while sorted((tmp_path / "out" / "checkpoints").glob("0*"))[-1] == until_more:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    again[0].send_signal(signal.SIGINT)
    (said,) = ended(again, [128 + signal.SIGINT], within=120)
    assert "going on at" in said


def test_a_process_that_hangs_ends_the_others_by_name(run_file: Path, tmp_path: Path) -> None:
    processes = started(["train", str(run_file)], 3)
    until_it_trains(tmp_path / "out", processes)
    processes[2].send_signal(signal.SIGSTOP)
    try:
        said = [process.communicate(timeout=120)[1] for process in processes[:2]]
        assert [process.returncode for process in processes[:2]] == [1, 1], said
    finally:
        for process in processes:
            process.kill()
    assert "rank 2: " in said[0]
    assert "sae-core" not in said[1]  # torch may warn of a store that went with the first process


def test_one_signal_stops_all_and_is_said_once(run_file: Path, tmp_path: Path) -> None:
    processes = started(["train", str(run_file)], 2)
    until_it_trains(tmp_path / "out", processes)
    processes[1].send_signal(signal.SIGTERM)
    first, second = ended(processes, [128 + signal.SIGTERM] * 2, within=120)
    assert "stopped by SIGTERM; --resume goes on from" in first
    assert "sae-core" not in second


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("parallel.data=3", "3 processes are to share the batches, but 2 were started"),
        ("train.batch_size=65", "65 samples cannot be divided evenly among 2 processes"),
        ("device=cuda:0", "device"),
    ],
)
def test_what_cannot_be_is_one_error_of_the_first_process(run_file: Path, change: str, message: str) -> None:
    first, second = ended(started(["train", str(run_file), "--set", change], 2), [1, 1], within=120)
    assert message in first
    assert first.count("error:") == 1
    assert "sae-core" not in second


def test_half_an_environment_is_refused(run_file: Path) -> None:
    (said,) = ended(started(["train", str(run_file)], 1, MASTER_ADDR="", WORLD_SIZE="2"), [1], within=120)
    assert "RANK, WORLD_SIZE, MASTER_PORT but not MASTER_ADDR" in said
