"""What every benchmark worker speaks: one process a library, driven over its standard input by one JSON object a line.

A worker is started with its specification as JSON in its argument, builds its dictionary, says so, and then does what it is
told: ``{"do": "run", "times": n}`` times n steps one by one, ``{"do": "memory"}`` measures the peak of one step. Only one
worker of a comparison is at work at any time. This file runs in every library's own environment: it imports torch and the
standard library only.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

MIB = 2**20
MARK = "reply: "
"""Starts the lines that are meant for the driver; libraries print too."""


@dataclass(frozen=True)
class Spec:
    """What to measure: `task` is training or inference, `density` the fraction of active latents, None at the start.

    With `d_out` it is a transcoder, with several `sites` a crosscoder, with several `layers` a cross-layer transcoder; sites
    and layers divide `d_in`.
    """

    architecture: str
    task: str
    d_in: int
    d_sae: int
    k: int
    batch: int
    threads: int
    density: float | None = None
    product: str = "auto"
    widths: tuple[int, ...] = ()
    dead: int = 0
    d_out: int | None = None
    skip: bool = False
    sites: int = 1
    layers: int = 1


@dataclass
class Job:
    """What a library contributes: a step on a batch, and what was active in the last one."""

    step: Callable[[torch.Tensor], Any]
    l0: Callable[[], float]


def activations(spec: Spec, n: int, seed: int = 0) -> list[torch.Tensor]:
    """Batches (batch, d_in) of a sparse mixture of directions plus noise, of mean norm sqrt(d_in), alike for everyone."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(2 * spec.d_in, spec.d_in, generator=generator)
    batches: list[torch.Tensor] = []
    for _ in range(n):
        on = torch.rand(spec.batch, 2 * spec.d_in, generator=generator) < 0.01
        x = (on * torch.rand(on.shape, generator=generator)) @ directions
        x = x + 0.1 * torch.randn(x.shape, generator=generator)
        batches.append(x * (spec.d_in**0.5 / x.norm(dim=-1).mean()))
    return batches


def quantile_shift(pre: torch.Tensor, density: float) -> float:
    """The number that a fraction `density` of pre-activations exceeds."""
    return float(pre.flatten().kthvalue(max(1, int(pre.numel() * (1 - density)))).values)


def serve(build: Callable[[Spec, torch.Tensor], Job]) -> None:
    """Build the job of the specification in ``sys.argv[1]`` and do what standard input asks until it closes."""
    raw = json.loads(sys.argv[1])
    spec = Spec(**{**raw, "widths": tuple(raw.get("widths", ()))})
    torch.set_num_threads(spec.threads)
    batches = activations(spec, 4)
    gc.collect()
    before = _resident()
    try:
        job = build(spec, batches[0])
    except NotImplementedError as error:
        _reply({"unsupported": str(error)})
        return
    _reply({"ready": True, "torch": torch.__version__})
    done = 0
    for line in sys.stdin:
        asked = json.loads(line)
        seconds: list[float] = []
        cpu_seconds: list[float] = []
        if asked["do"] == "memory":
            _reset_peak()
        for _ in range(asked.get("times", 1)):
            batch = batches[done % len(batches)]
            started, cpu_started = time.perf_counter(), time.process_time()
            job.step(batch)
            seconds.append(time.perf_counter() - started)
            cpu_seconds.append(time.process_time() - cpu_started)
            done += 1
        reply: dict[str, Any] = {"seconds": seconds, "cpu_seconds": cpu_seconds, "l0": job.l0()}
        if asked["do"] == "memory":
            reply["peak_mib"] = (_peak() - before) / MIB
        _reply(reply)


def _reply(what: dict[str, Any]) -> None:
    print(MARK + json.dumps(what), flush=True)


def _status(field: str) -> int:
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith(field):
                return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}: peak memory can be measured on Linux only")


def _resident() -> int:
    return _status("VmRSS")


def _peak() -> int:
    return _status("VmHWM")


def _reset_peak() -> None:
    """Let the kernel forget the process's highest resident size so far."""
    with open("/proc/self/clear_refs", "w") as clear:
        clear.write("5")
