"""What a training run costs besides its steps, and for how long a checkpoint holds it up.

    python benchmarks/run_overhead.py
    python benchmarks/run_overhead.py --d-in 768 --d-sae 16384 --batch 2048 --architecture standard

A run of the trainer, with a log, on batches that are in memory already. The clock runs inside it: "step" is forward, backward,
clipping, Adam and what the architecture does afterwards; "source" is the time until the next batch is there; "trainer" is all
the rest, checks, sums, counts of latents, records, the progress bar, and is given as a share of the step. A checkpoint is the
whole state, written, hashed and synced to the disk, as during a run; the fastest and the slowest of several.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from compare import machine
from sae_core import TrainConfig, Trainer, create
from sae_core.training import learner
from sae_core.training.loggers import JsonlConfig, JsonlLogger
from sae_core.training.trainer import Progress
from tabulate import tabulate

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "topk": {"k": 32},
    "batchtopk": {"k": 32},
    "standard": {"l1_coefficient": 1.0},
    "jumprelu": {"l0_coefficient": 1.0},
}


class Clock:
    """Seconds by name."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self._device = device

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its time added to that of `name`."""

        def call(*args: Any, **kwargs: Any) -> Any:
            started = self.now()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[name] = self.seconds.get(name, 0.0) + self.now() - started

        return call

    def now(self) -> float:
        """The time, once the device has done what it was given."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


class Memory:
    """A few batches over and over."""

    def __init__(self, batches: list[torch.Tensor], clock: Clock) -> None:
        self._batches = batches
        self._clock = clock
        self._place = 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        return self

    def __next__(self) -> torch.Tensor:
        return self._clock.timed("source", self._next)()

    def _next(self) -> torch.Tensor:
        self._place += 1
        return self._batches[self._place % len(self._batches)]


def measure(options: argparse.Namespace, folder: Path) -> list[list[str]]:
    """Rows of the table for one architecture."""
    device = torch.device(options.device)
    clock = Clock(device)
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(options.batch, options.d_in, generator=generator).to(device) for _ in range(4)]
    sae = create(
        options.architecture,
        d_in=options.d_in,
        d_sae=options.d_sae,
        device=device,
        **ARCHITECTURES[options.architecture],
    )
    learner.forward_and_backward = clock.timed("step", learner.forward_and_backward)
    learner.clipped_step = clock.timed("step", learner.clipped_step)
    sae.after_step = clock.timed("step", sae.after_step)
    began = {"at": 0.0, "ended": 0.0}

    def watch(progress: Progress) -> None:
        if progress.trainer.steps == options.warmup:
            clock.seconds.clear()
            began["at"] = clock.now()
        if progress.trainer.steps == options.warmup + options.steps:
            began["ended"] = clock.now()

    settings = TrainConfig(
        total_samples=(options.warmup + options.steps) * options.batch, batch_size=options.batch, init_b_dec="zeros"
    )
    trainer = Trainer(
        sae,
        Memory(batches, clock),
        settings,
        callbacks=[watch],
        loggers=[JsonlLogger(JsonlConfig(path=folder / "log.jsonl"))],
        checkpoints=folder / "checkpoints",
    )
    trainer.fit()
    total = began["ended"] - began["at"]
    step, source = clock.seconds["step"], clock.seconds["source"]
    rest = total - step - source
    stalls: list[float] = []
    for _ in range(options.checkpoints):
        started = time.perf_counter()
        path = trainer.checkpoint()
        stalls.append(time.perf_counter() - started)
    size = sum(file.stat().st_size for file in path.iterdir())
    return [
        ["step", f"{1e3 * step / options.steps:.2f} ms"],
        ["source", f"{1e3 * source / options.steps:.3f} ms"],
        ["trainer", f"{1e3 * rest / options.steps:.2f} ms"],
        ["trainer / step", f"{rest / step:.2%}"],
        ["checkpoint", f"{min(stalls):.2f} to {max(stalls):.2f} s"],
        ["checkpoint's size", f"{size / 2**20:.0f} MiB"],
    ]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="What a training run costs besides its steps.")
    parser.add_argument("--architecture", choices=sorted(ARCHITECTURES), default="topk")
    parser.add_argument("--d-in", type=int, default=768)
    parser.add_argument("--d-sae", type=int, default=16384)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--warmup", type=int, default=5, help="steps before the clock runs")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--checkpoints", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--folder", type=Path, help="where checkpoints go; a temporary folder by default")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(
        f"{machine(options.threads)}; {options.architecture}, {options.d_in} x {options.d_sae}, batch {options.batch}"
    )
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        print(tabulate(measure(options, Path(folder)), headers=["", "a step, or each"], tablefmt="github"))


if __name__ == "__main__":
    main()
