"""Runs of every kind, killed at random moments, while they write a checkpoint and while they save at the end.

Each ends, bit for bit, as the run that was left alone: weights, config, metadata and log. Two runs and a few moments are enough
every time; SAE_CORE_ALL_KILLS=1 goes through all of them, on synthetic data and in a tiny language model, twenty times each,
which takes long.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import runpy
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import yaml

COMMAND = Path(__file__).parents[1] / "packages" / "sae-core" / "tests" / "command_process.py"
SYNTHETIC = {
    "name": "synthetic",
    "num_features": 40,
    "d_in": 12,
    "firing_probability": 0.1,
    "std_firing_magnitudes": 0.2,
}
SITES = {"num_features": 40, "firing_probability": 0.1, "std_firing_magnitudes": 0.2, "sites": {"a": 8, "b": 6}}
ON_SYNTHETIC: dict[str, dict[str, Any]] = {
    "topk": {"k": {"from": 6, "to": 3, "over": 0.5}},
    "batchtopk": {"k": 3, "normalize_activations": "expected_average_only_in"},
    "matryoshka_batchtopk": {"k": 3, "matryoshka_widths": [8, 16]},
    "jumprelu": {"l0_coefficient": 0.01, "pre_act_loss_coefficient": 0.001},
    "gated": {"l1_coefficient": 0.1},
    "standard": {"l1_coefficient": 0.05, "normalize_activations": "covariance_whitening"},
}
SKIP = {"architecture": "topk", "k": 3, "skip": True}
CROSS = {"architecture": "batchtopk", "k": 3}
RUNS: dict[str, dict[str, Any]] = {
    **{name: {"sae": {"architecture": name, **fields}, "source": SYNTHETIC} for name, fields in ON_SYNTHETIC.items()},
    "skip transcoder": {"sae": SKIP, "source": {"name": "synthetic_sites", **SITES, "targets": {"c": 10}}},
    "crosscoder": {"sae": CROSS, "source": {"name": "synthetic_sites", **SITES}},
}
IN_A_MODEL: dict[str, dict[str, Any]] = {
    **{name: {"sae": {"architecture": name, **fields}, "source": {}} for name, fields in ON_SYNTHETIC.items()},
    "temporal": {
        "sae": {"architecture": "temporal", "n_heads": 2, "bottleneck_factor": 4, "kval_topk": 3},
        "source": {"sequences": True},
    },
    "skip transcoder": {
        "sae": SKIP,
        "source": {"hook": None, "reads": ["model.layers.0.mlp:input"], "writes": ["model.layers.0.mlp"]},
    },
    "crosscoder": {"sae": CROSS, "source": {"hook": None, "reads": ["model.layers.0", "model.layers.1"]}},
}


@pytest.fixture(scope="module")
def processes() -> Any:
    """Where processes with everything imported are forked from."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [
            "sae_core.run",
            "sae_core.cli",
            "sae_core.report.training",
            "torch._dynamo",
            "tqdm.auto",
            "sae_synthetic.source",
            "sae_lm.evaluation",
            "transformers.models.llama.modeling_llama",
        ]
    )
    return context


def start(processes: Any, *argv: str | Path, errors: Path) -> BaseProcess:
    given = {"ARGV": [str(part) for part in argv], "ERRORS": str(errors)}
    process = processes.Process(target=runpy.run_path, args=(str(COMMAND), given))
    process.start()
    return process


def ended(process: BaseProcess) -> int | None:
    process.join(400)
    return process.exitcode


def wait_for(condition: Callable[[], Any], process: BaseProcess) -> None:
    deadline = time.monotonic() + 400
    while not condition() and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.0002)


def left(folder: Path) -> dict[str, bytes]:
    """What a finished run leaves, besides checkpoints, and the run file and the report, which name its folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "checkpoints" not in path.parts and path.name not in ("run.yaml", "report.html")
    }


def writing_a_checkpoint(out: Path) -> bool:
    folder = out / "checkpoints"
    return folder.is_dir() and any(path.name.startswith(".") for path in folder.iterdir())


def saving_at_the_end(out: Path) -> bool:
    return out.is_dir() and any("sae_weights" in path.name for path in out.iterdir())


def records(out: Path) -> int:
    log = out / "log.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


def killed_and_resumed(processes: Any, run: dict[str, Any], tmp_path: Path, moments: list[str]) -> dict[str, int]:
    """Run it whole; run it again, killing it at these moments; compare; say how many kills hit."""
    out, errors, file = tmp_path / "out", tmp_path / "errors", tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({**run, "output": str(out)}))
    whole = start(processes, "train", file, "--set", f"output={tmp_path / 'whole'}", errors=errors)
    assert ended(whole) == 0, errors.read_text()
    chance = random.Random(1)
    hits = dict.fromkeys(moments, 0)
    for moment in moments:
        process = start(processes, "train", file, "--resume", errors=errors)
        if moment == "checkpoint":
            wait_for(lambda: writing_a_checkpoint(out), process)
        elif moment == "end":
            wait_for(lambda: saving_at_the_end(out), process)
        else:
            # By progress, not by the clock, so that the last moments hit as well.
            more = records(out) + chance.randint(0, 4)
            wait_for(lambda more=more: records(out) >= more, process)
            time.sleep(chance.uniform(0, 0.02))
        process.kill()
        hits[moment] += ended(process) == -signal.SIGKILL
    assert ended(start(processes, "train", file, "--resume", errors=errors)) == 0, errors.read_text()
    assert left(out) == left(tmp_path / "whole")
    return hits


ALL = os.environ.get("SAE_CORE_ALL_KILLS") == "1"
MOMENTS = ["anywhere", "checkpoint", "anywhere", "anywhere"] * 4 + ["anywhere", "anywhere", "end", "end"]


def survives(processes: Any, run: dict[str, Any], train: dict[str, Any], tmp_path: Path) -> None:
    common = {
        "batch_size": 40, "lr": 0.003, "log_every_steps": 7, "dead_after_samples": 400, "init_samples": 300,
        "progress_bar": False,
    }  # fmt: skip
    moments = MOMENTS if ALL else ["anywhere", "checkpoint", "end"]
    run = {**run, "sae": {"d_sae": 32, **run["sae"]}, "train": {**common, **train}}
    hits = killed_and_resumed(processes, run, tmp_path, moments)
    print(f"{sum(hits.values())} of {len(moments)} kills hit: {hits}")
    assert sum(hits.values()) >= len(moments) - (0 if ALL else 2)  # a short run may end before anybody looks


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS if ALL else ["jumprelu"])
def test_runs_on_synthetic_data(name: str, processes: Any, tmp_path: Path) -> None:
    survives(processes, RUNS[name], {"total_samples": 16_000, "checkpoint_every_samples": 1000}, tmp_path)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The source of a run: a tiny Llama with its tokenizer, and a text."""
    folder = tmp_path_factory.mktemp("model")
    made = runpy.run_path(str(Path(__file__).parents[1] / "packages" / "sae-lm" / "tests" / "conftest.py"))
    made["build_llama"](hidden_size=16, intermediate_size=32, num_hidden_layers=2).save_pretrained(folder)
    roles = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    made["build_tokenizer"](*roles.values(), **roles).save_pretrained(folder)
    (folder / "text.txt").write_text("\n\n".join(f"Document {i}: {'word ' * (i % 7)}and {i * i}." for i in range(400)))
    return {
        "name": "huggingface", "model": str(folder), "hook": "model.layers.0", "device": "cpu", "context_size": 24,
        "batch_prompts": 4, "buffer_rows": 512, "on_exhausted": "cycle",
        "text": {"kind": "file", "path": str(folder / "text.txt"), "held_out": 0.1},
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_A_MODEL if ALL else ["temporal"])
def test_runs_in_a_language_model(name: str, model: dict[str, Any], processes: Any, tmp_path: Path) -> None:
    run = IN_A_MODEL[name]
    source = {key: value for key, value in {**model, **run["source"]}.items() if value is not None}
    evaluation = {"every_samples": 0.3, "tokens": 100}
    train = {"total_samples": 12_000 if ALL else 4000, "checkpoint_every_samples": 400}  # enough for all kills to hit
    survives(processes, {"sae": run["sae"], "source": source, "eval": evaluation}, train, tmp_path)
