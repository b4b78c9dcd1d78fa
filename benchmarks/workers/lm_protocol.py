"""What workers of the language model benchmark speak: the protocol of `protocol`, with a job that works through batches.

A job's step handles one batch of activations, read from the model. Buffers make some steps long and others short, so what is
reported for a turn is the mean over its steps. Imports torch and the standard library only.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class LMSpec:
    """What to measure: `task` is activations or training, on the folders of a model and of data sets ``rows`` and ``text``."""

    task: str
    model: str
    data: str
    layer: int
    context: int
    prompts: int
    buffer_rows: int
    batch: int
    d_sae: int
    k: int
    threads: int
    product: str = "full"

    @property
    def hook(self) -> str:
        """The residual stream after the layer."""
        return f"model.layers.{self.layer}"


def serve(build: Callable[[LMSpec], Callable[[], int]]) -> None:
    """Build the job of the specification in ``sys.argv[1]`` and do what standard input asks until it closes.

    A step returns how many activations it handled.
    """
    from protocol import MIB, _peak, _reply, _reset_peak, _resident  # beside this file, where workers look

    spec = LMSpec(**json.loads(sys.argv[1]))
    torch.set_num_threads(spec.threads)
    before = _resident()
    step = build(spec)
    _reply({"ready": True, "torch": torch.__version__})
    for line in sys.stdin:
        asked = json.loads(line)
        if asked["do"] == "memory":
            _reset_peak()
        done, started, cpu_started = 0, time.perf_counter(), time.process_time()
        for _ in range(asked.get("times", 1)):
            done += step()
        per_batch = spec.batch / done
        reply: dict[str, Any] = {
            "seconds": [(time.perf_counter() - started) * per_batch],
            "cpu_seconds": [(time.process_time() - cpu_started) * per_batch],
            "l0": float(done),
        }
        if asked["do"] == "memory":
            reply["peak_mib"] = (_peak() - before) / MIB
        _reply(reply)
