"""What a run will take: the plan beside what a real run then takes, and what cannot fit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from sae_core import planning
from sae_core.cli import main
from sae_core.planning import plan
from sae_core.run import read_run

COMMAND = "import sys; from sae_core.cli import main; code = main(sys.argv[1:]); {after}sys.exit(code)"
PEAK = "print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM'))); "


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    run = {
        "output": str(tmp_path / "out"),
        "sae": {"architecture": "batchtopk", "d_sae": 12288, "k": 16},
        "source": {"name": "synthetic", "num_features": 512, "d_in": 256},
        "train": {"total_samples": 3072, "batch_size": 1024, "init_samples": 2048, "progress_bar": False},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(run))
    return path


def command(*arguments: str, after: str = "") -> str:
    done = subprocess.run(
        [sys.executable, "-c", COMMAND.format(after=after), *arguments], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_a_run_takes_the_memory_and_the_disk_that_its_plan_says(run_file: Path, tmp_path: Path) -> None:
    found = json.loads(command("plan", str(run_file), "--json"))
    assert not (tmp_path / "out").exists()
    measured = 1024 * int(command("train", str(run_file), after=PEAK).split("VmHWM:")[1].split()[0])
    assert found["needed"]["cpu"] == pytest.approx(measured, rel=0.25)
    libraries = next(entry["bytes"] for entry in found["memory"] if entry["what"] == "Python and libraries")
    weights = 4 * 2 * 256 * 12288
    own = {entry["what"]: entry["bytes"] for entry in found["memory"]}
    assert own["weights"] == pytest.approx(weights, rel=0.01)
    assert own["Adam and gradients"] == pytest.approx(3 * weights, rel=0.01)
    assert found["needed"]["cpu"] - libraries == pytest.approx(
        measured - libraries, rel=0.35
    )  # without what all runs take
    disk = sum(path.stat().st_size for path in (tmp_path / "out").rglob("*") if path.is_file())
    kept = sum(size for what, size in found["disk"].items()) - 3 * weights  # room for one more checkpoint
    assert disk <= sum(found["disk"].values())
    assert disk == pytest.approx(kept, rel=0.5)


@pytest.fixture
def small(run_file: Path) -> list[str]:
    return [str(run_file), "--set", "sae.d_sae=64", "--set", "train.init_samples=100", "--set", "train.batch_size=64"]


def test_a_plan_lists_every_dictionary_and_says_that_it_fits(small: list[str], capsys: Any) -> None:
    assert main(["plan", *small, "--set", "grid={k: [4, 8]}"]) == 0
    shown = capsys.readouterr().out
    for said in (
        "k=4: weights",
        "k=8: Adam and gradients",
        "can be had",
        "checkpoints, 2 and the next one",
        "It fits.",
    ):
        assert said in shown
    assert "TIME FOR 3,072 SAMPLES" in shown


def test_a_dictionary_that_cannot_fit_is_refused_without_being_made(run_file: Path, capsys: Any) -> None:
    assert main(["plan", str(run_file), "--set", "sae.d_sae=2000000000"]) == 1
    shown = capsys.readouterr().out
    assert "It cannot run: memory: " in shown
    assert "most of it is Adam and gradients, 11466.4 GiB" in shown


def test_a_disk_that_is_too_full_is_named(small: list[str], run_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(planning.shutil, "disk_usage", lambda _: usage)
    found = plan(read_run(run_file, small[2::2]))
    assert any("disk: " in problem and "choose another output" in problem for problem in found.problems)


def test_what_a_run_would_refuse_its_plan_refuses(run_file: Path, capsys: Any) -> None:
    assert main(["plan", str(run_file), "--set", "sae.kk=3"]) == 1
    assert "kk" in capsys.readouterr().err


def test_processes_that_only_read_have_no_plan(run_file: Path, capsys: Any) -> None:
    assert main(["plan", str(run_file), "--set", "parallel.source=1"]) == 1
    assert "parallel.source: a plan is of processes that read and train" in capsys.readouterr().err


def test_a_plan_of_shared_out_latents_is_that_of_one_slice(
    small: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--set", "sae={architecture: topk, d_sae: 1024, k: 8}", "--set", "train.dead_after_samples=100000"]

    def planned(*more: str) -> dict[str, Any]:
        assert main(["plan", *small, *sizes, "--json", *more]) == 0
        return json.loads(capsys.readouterr().out)

    one, mesh = planned(), planned("--set", "parallel={data: 2, latents: 4}")
    memory = [{entry["what"]: entry["bytes"] for entry in found["memory"]} for found in (one, mesh)]
    assert memory[0]["weights"] == 4 * (2 * 256 * 1024 + 1024 + 256)
    assert memory[1]["weights"] == 4 * (2 * 256 * 256 + 256 + 256)
    assert mesh["disk"] == one["disk"]
    assert mesh["processes"] == 8
    rows, over = 32, 4
    decoded, chosen = 2 * 4 * (over - 1) * rows * 256 // over, 4 * (over - 1) * rows * 8
    received = [size for what, size in mesh["traffic"].items() if "latents elsewhere" in what]
    assert decoded + chosen <= received[0] <= 1.1 * (decoded + chosen)
    assert mesh["traffic"]["gradients"] == memory[1]["weights"]
    assert not one["traffic"]


def test_a_plan_for_several_processes_says_what_each_of_them_receives(run_file: Path) -> None:
    found = json.loads(command("plan", str(run_file), "--json", "--set", "parallel.data=4", "--set", "sae.d_sae=1024"))
    weights = 4 * (2 * 256 * 1024 + 1024 + 256)
    assert found["processes"] == 4
    assert found["traffic"]["gradients"] == 2 * 3 * weights // 4
