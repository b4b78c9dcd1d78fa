"""The benchmark scripts run on tiny shapes, without other libraries, and give a complete table."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc"),
]


@pytest.mark.parametrize(("script", "case"), [("training.py", "matryoshka"), ("inference.py", "jumprelu")])
def test_a_benchmark_gives_speed_memory_and_ratios(script: str, case: str, tmp_path: Path) -> None:
    shape = ["--d-in", "16", "--d-sae", "64", "--k", "4", "--batch", "32", "--threads", "1", "--rounds", "1"]
    run = subprocess.run(
        [sys.executable, str(BENCHMARKS / script), *shape, "--only", case, "--json", str(tmp_path / "out.json")],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    (row,) = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert row["library"] == "sae-core"
    assert row["samples/s"] > 0
    assert row["peak MiB"] >= 0
    assert row["of product"] > 0
    assert "| sae-core" in run.stdout


def test_the_crossover_is_measured_for_every_density() -> None:
    shape = ["--d-in", "8", "--d-sae", "64", "--batch", "256", "--rounds", "1", "--threads", "1"]
    run = subprocess.run(
        [sys.executable, str(BENCHMARKS / "crossover.py"), *shape], capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    assert len([line for line in run.stdout.splitlines() if line.startswith("|")]) == 2 + 5
    assert "dense / sparse" in run.stdout


def test_a_peer_that_is_not_there_is_named() -> None:
    command = [sys.executable, str(BENCHMARKS / "training.py"), "--peer", "sae-lens=/no/such/python"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 1
    assert "there is no interpreter /no/such/python" in run.stderr


def test_what_a_run_costs_besides_its_steps_is_measured() -> None:
    shape = ["--d-in", "8", "--d-sae", "64", "--batch", "32", "--steps", "5", "--checkpoints", "1", "--threads", "1"]
    run = subprocess.run(
        [sys.executable, str(BENCHMARKS / "run_overhead.py"), *shape], capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    rows = {cells[1].strip(): cells[2].strip() for line in run.stdout.splitlines() if len(cells := line.split("|")) > 3}
    assert float(rows["step"].removesuffix(" ms")) > 0
    assert float(rows["trainer / step"].removesuffix("%")) > 0
    assert rows["checkpoint's size"].endswith("MiB")
