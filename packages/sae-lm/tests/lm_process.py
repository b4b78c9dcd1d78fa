"""Runs on a language model by one, two, three and eight processes, all forked from this one: `lm_process.py MODEL FOLDER`."""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from sae_core.cli import main
from sae_core.run import execute_all, read_run
from sae_core.testing.rank_processes import exit_codes, start_ranks

TEMPORAL = "{architecture: temporal, d_sae: 64, kval_topk: 4, n_heads: 2, bottleneck_factor: 2}"
RUNS: dict[str, tuple[int, list[str]]] = {
    "one": (1, []),
    "fed": (2, ["parallel.source=1"]),
    "fed three": (3, ["parallel.source=1"]),
    "fed latents": (3, ["parallel={source: 1, latents: 2}"]),
    "two": (2, ["eval={every_samples: 512, tokens: 200}"]),
    "two again": (2, ["eval={every_samples: 512, tokens: 200}"]),
    "two readers": (3, ["parallel.source=2"]),
    "eight": (8, ["parallel={data: 2, latents: 4}", "eval={every_samples: 512, tokens: 200}"]),
    "temporal": (2, [f"sae={TEMPORAL}", "source.sequences=true"]),
}


def run_file(model: str, folder: Path, name: str) -> Path:
    text = folder / "text.txt"
    text.write_text("\n\n".join(f"Document {i}: {'word ' * (i * i % 7)}and {i * i} or {i**3}." for i in range(120)))
    run: dict[str, Any] = {
        "output": str(folder / name),
        "sae": {"architecture": "batchtopk", "d_sae": 64, "k": 8},
        "source": {
            "name": "huggingface", "model": model, "hook": "model.layers.1", "device": "cpu",
            "context_size": 32, "batch_prompts": 4, "buffer_rows": 512, "on_exhausted": "cycle",
            "text": {"kind": "file", "path": str(text), "held_out": 0.2},
        },
        "train": {
            "total_samples": 1280, "batch_size": 128, "lr": 0.003, "progress_bar": False, "log_every_steps": 2,
            "checkpoint_every_samples": 512, "init_samples": 256,
        },
    }  # fmt: skip
    file = folder / f"{name}.yaml"
    file.write_text(json.dumps(run))
    return file


def as_if_killed(whole: Path, folder: Path) -> None:
    """A run as it was behind its first checkpoint."""
    shutil.copytree(whole, folder)
    for path in folder.iterdir():
        if path.is_file() and path.name not in ("run.yaml", "log.jsonl"):
            path.unlink()
    for checkpoint in sorted((folder / "checkpoints").iterdir())[1:]:
        shutil.rmtree(checkpoint)


def main_of_program() -> int:
    model, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    execute_all(read_run(run_file(model, folder, "one")))  # imports what all of them need
    for name, (size, changes) in RUNS.items():
        if size == 1:
            continue
        file = run_file(model, folder, name)
        arguments = ["train", str(file), *(word for change in changes for word in ("--set", change))]
        said = folder / f"{name} said"
        said.mkdir()
        if "again" in name:
            as_if_killed(folder / "two", folder / name)
            arguments.append("--resume")
        codes = exit_codes(start_ranks(size, lambda arguments=arguments: main(arguments), output=said))
        if any(codes):
            sys.stderr.write(f"{name}: {codes}\n" + "".join(file.read_text() for file in sorted(said.iterdir())))
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main_of_program())
