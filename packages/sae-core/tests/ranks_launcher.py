"""Starts groups of ranks of `sae-core`, forked from this process, which has imported what they need: one import for all tests.

Reads one JSON object a line: ``{"size": 2, "arguments": [...], "environment": {...}, "folder": "..."}`` starts a group, whose
output is in ``folder/RANK.out`` and ``RANK.err``, and answers with process ids; ``{"wait": [ids]}`` answers with exit codes.
The main thread of the rank that ``hangs`` names sleeps in a step, while all its other threads go on.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from sae_core import TrainConfig, Trainer, create
from sae_core.cli import main
from sae_core.run import execute_all  # noqa: F401 - imported for those that are forked
from sae_core.testing.rank_processes import exit_codes, start_ranks
from sae_core.training.learner import Learner


def warm_up() -> None:
    """Have torch import what it imports when it trains."""
    batches = [torch.randn(8, 4, generator=torch.Generator().manual_seed(0))]
    Trainer(create("topk", d_in=4, d_sae=8, k=2), batches, TrainConfig(total_samples=8, progress_bar=False)).fit()


def started(group: dict[str, Any]) -> list[int]:
    arguments: list[str] = group["arguments"]
    folder = Path(group["folder"])

    def train() -> int:
        if os.environ.get("RANK") == str(group["hangs"]):
            Learner.step = asleep  # type: ignore[method-assign]
        return main(arguments)

    return start_ranks(group["size"], train, output=folder, environment=group["environment"])


def asleep(learner: Learner, batch: Any) -> Any:
    time.sleep(1000)


def serve() -> None:
    torch.set_num_threads(1)
    warm_up()
    for line in sys.stdin:
        asked = json.loads(line)
        if "wait" in asked:
            print(json.dumps(exit_codes(asked["wait"])), flush=True)
        else:
            print(json.dumps(started(asked)), flush=True)


if __name__ == "__main__":
    serve()
