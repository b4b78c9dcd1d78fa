"""What training several dictionaries on one stream costs, beside training one.

    python benchmarks/members.py
    python benchmarks/members.py --architecture jumprelu --shape 64x256x1024 --members 1 2 4 8

Members of one stream differ in their seed. For every shape trainers with 1, 2, 4 and 8 members take turns of a few steps,
and the fastest turn of each counts; the last column is the cost beside that of the trainer with one. A share of a step is
arithmetic: the products, which a step of the stacked dictionaries would have as well.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from typing import Any

import torch
from compare import machine
from sae_core import TrainConfig, Trainer, create
from sae_core.ops.memory import large_memory_is_kept
from sae_core.training.trainer import Progress
from tabulate import tabulate

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "topk": {"k": 16},
    "batchtopk": {"k": 16},
    "standard": {"l1_coefficient": 1.0},
    "jumprelu": {"l0_coefficient": 1.0},
}


class Turns:
    """A trainer that does a few steps whenever it is its turn."""

    def __init__(self, members: int, shape: tuple[int, int, int], options: argparse.Namespace) -> None:
        d_in, d_sae, self.rows = shape
        fields = ARCHITECTURES[options.architecture]
        self.saes = {
            str(seed): create(options.architecture, d_in=d_in, d_sae=d_sae, seed=seed, **fields)
            for seed in range(members)
        }
        generator = torch.Generator().manual_seed(0)
        self._batches = [torch.randn(self.rows, d_in, generator=generator) for _ in range(4)]
        self._steps = options.steps
        self.best = float("inf")
        config = TrainConfig(
            total_samples=10**12, batch_size=self.rows, init_b_dec="zeros", progress_bar=False, lr=1e-5
        )
        self.trainer = Trainer(self.saes, self._stream(), config, callbacks=[self._count])
        self._left = 0

    def turn(self, *, counts: bool) -> None:
        """Some steps of all members."""
        self._left = self._steps * len(self.saes)
        started = time.perf_counter()
        self.trainer.fit_all()
        if counts:
            self.best = min(self.best, (time.perf_counter() - started) / self._steps)

    def _count(self, progress: Progress) -> None:
        self._left -= 1
        if not self._left:
            progress.trainer.stop()

    def _stream(self) -> Iterator[torch.Tensor]:
        while True:
            yield from self._batches


def products(shape: tuple[int, int, int], repeats: int = 20) -> float:
    """Seconds for the five matrix products of a dense step."""
    d_in, d_sae, rows = shape
    x, h, W = torch.randn(rows, d_in), torch.randn(rows, d_sae), torch.randn(d_sae, d_in)
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        for _ in range(2):
            torch.mm(x, W.t())
            torch.mm(h.t(), x)
        torch.mm(h, W)
        best = min(best, time.perf_counter() - started)
    return best


def measure(shape: tuple[int, int, int], options: argparse.Namespace) -> list[list[str]]:
    """Rows of the table for one shape."""
    trainers = [Turns(members, shape, options) for members in options.members]
    with large_memory_is_kept():
        for trainer in trainers:
            trainer.turn(counts=False)
        for _ in range(options.rounds):
            for trainer in trainers:
                trainer.turn(counts=True)
        bare = products(shape)
    one = trainers[0].best / len(trainers[0].saes)
    name = " x ".join(map(str, shape))
    return [
        [
            name,
            str(len(trainer.saes)),
            f"{1e3 * trainer.best:.2f}",
            f"{1e3 * bare * len(trainer.saes):.2f}",
            f"{trainer.best / one:.2f}",
        ]
        for trainer in trainers
    ]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="What several dictionaries on one stream cost.")
    parser.add_argument("--architecture", choices=sorted(ARCHITECTURES), default="topk")
    parser.add_argument(
        "--shape",
        action="append",
        metavar="D_INxD_SAExBATCH",
        help="may be repeated; by default a small and a larger one",
    )
    parser.add_argument("--members", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--steps", type=int, default=10, help="steps of a turn")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{machine(options.threads)}; {options.architecture}\n")
    headers = ["d_in x d_sae x batch", "members", "ms a step of all", "ms of products", "in steps of one"]
    for text in options.shape or ["64x256x1024", "512x4096x1024"]:
        d_in, d_sae, rows = map(int, text.split("x"))
        rows_of_table = measure((d_in, d_sae, rows), options)
        print(tabulate(rows_of_table, headers=headers, tablefmt="github", disable_numparse=True), flush=True)


if __name__ == "__main__":
    main()
