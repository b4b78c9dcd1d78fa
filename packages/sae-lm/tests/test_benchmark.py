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
