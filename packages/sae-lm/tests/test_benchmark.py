"""The workers of the language model benchmark do the work that they are timed for; how they are driven is tested elsewhere."""

from __future__ import annotations

import argparse
import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
pytestmark = pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="needs the repository")


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Any:
    pytest.importorskip("tabulate")
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.syspath_prepend(BENCHMARKS / "workers")
    return importlib.import_module


def test_every_worker_handles_the_same_activations_and_ours_trains_on_them(modules: Any, tmp_path: Path) -> None:
    driver = modules("language_model")
    driver.prepare(tmp_path, argparse.Namespace(model=None, context=32, tokens=4_000))
    spec = driver.LMSpec(
        task="activations", model=str(tmp_path / "model"), data=str(tmp_path), layer=1, context=32, prompts=4,
        buffer_rows=512, batch=64, d_sae=32, k=2, threads=1,
    )  # fmt: skip
    training = replace(spec, task="training")
    for worker, one in (("lm_bare_worker", spec), ("lm_sae_core_worker", spec), ("lm_sae_core_worker", training)):
        step = modules(worker).build(one)
        assert [step() for _ in range(3)] == [64, 64, 64]


def test_the_table_sets_every_library_beside_the_bare_pass(modules: Any) -> None:
    driver = modules("language_model")
    made = [
        driver.Contender(name, "python", None, seconds=[seconds, seconds], cpu_seconds=[0.5], peak_mib=peak)
        for name, seconds, peak in (("bare", 0.1, 10.4), ("sae-core", 0.104, 12.0))
    ]
    rows = driver.rows_of("activations", made, 1000)
    assert [row["of bare"] for row in rows] == ["1.000", "1.040"]
    assert [row["wall µs/token"] for row in rows] == ["100.0", "104.0"]
    assert "| sae-core" in driver.table(rows)
    assert driver.rows_of("training", made[1:], 1000)[0]["of bare"] == ""
