"""Real processes that share out the latents of a dictionary train what one trains, and save the same."""

from __future__ import annotations

import json
import os
import runpy
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_core import SAE

PROGRAM = Path(__file__).with_name("latents_process.py")
CASES: dict[str, Any] = runpy.run_path(str(PROGRAM))["CASES"]
MESHES = ("1x4", "2x2")


def free_port() -> str:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return str(listening.getsockname()[1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the processes left what they found."""
    place = tmp_path_factory.mktemp("latents")
    train = {"total_samples": 640, "batch_size": 64, "log_every_steps": 5, "progress_bar": False}
    run: dict[str, Any] = {
        "source": {"name": "tensor_files", "paths": ["rows-0.npy"], "epochs": 4},
        "sae": {"architecture": "batchtopk", "d_sae": 48, "k": 3},
        "train": {**train, "checkpoint_every_minutes": None},
        "output": "one",
    }
    (place / "one.yaml").write_text(json.dumps(run))
    (place / "both.yaml").write_text(json.dumps({**run, "output": "both", "parallel": {"data": 1, "latents": 2}}))
    shared = {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, str(PROGRAM), str(place), free_port(), free_port()],
        env={**os.environ, **shared},
        cwd=place,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    (place / "said").write_text(done.stdout)
    return place


def loaded(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=False)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("case", CASES)
def test_processes_that_share_out_latents_train_and_save_what_one_does(folder: Path, case: str, mesh: str) -> None:
    alone = loaded(folder / "alone.pt")[case]
    everyone = [loaded(folder / f"found-{rank}.pt")[f"{case} {mesh}"] for rank in range(4)]
    for rank in everyone:
        assert len(rank["history"]) == len(alone["history"]) > 3
        for record, wanted in zip(rank["history"], alone["history"], strict=True):
            assert record == pytest.approx(wanted, rel=1e-5, abs=1e-5)
        part = slice(rank["latents"].start, rank["latents"].stop)
        assert len(rank["latents"]) == 48 // int(mesh[-1])
        assert torch.equal(rank["silent"], alone["silent"][part])
        for name, tensor in rank["weights"].items():
            whole = alone["weights"][name]
            wanted = whole[part] if tensor.shape != whole.shape else whole
            assert torch.allclose(tensor, wanted, rtol=1e-5, atol=1e-5), name
    alike(SAE.load(everyone[0]["saved"]), SAE.load(alone["saved"]))


def test_a_run_file_shares_out_the_latents_and_the_first_process_speaks(folder: Path) -> None:
    alike(SAE.load(folder / "both"), SAE.load(folder / "one"))
    one, both = (
        [json.loads(line) for line in (folder / name / "log.jsonl").read_text().splitlines()]
        for name in ("one", "both")
    )
    for record, wanted in zip(both, one, strict=True):
        assert {name: value for name, value in record.items() if value is None} == dict.fromkeys(
            name for name, value in wanted.items() if value is None
        )
        numbers = {name: value for name, value in wanted.items() if value is not None}
        assert {name: record[name] for name in numbers} == pytest.approx(numbers, rel=1e-5, abs=1e-5)
    said = (folder / "said").read_text()
    assert said.count("both") == said.count("one") > 0


def alike(found: SAE, wanted: SAE) -> None:
    for name, tensor in wanted.state_dict().items():
        assert torch.allclose(found.state_dict()[name], tensor, rtol=1e-5, atol=1e-5), name
