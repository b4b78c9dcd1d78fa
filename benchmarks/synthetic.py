"""Synthetic data: time of one batch of hidden activations beside SAELens, in turns A B A B.

    python benchmarks/synthetic.py --peer sae-lens=ENV/bin/python

SAELens runs in both of its modes, with sparse and with dense feature activations. Peak memory is what the process's resident
size grew by over all its batches.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compare import WORKERS, machine
from tabulate import tabulate
from workers.protocol import MARK

CASES: dict[str, dict[str, Any]] = {
    "independent, 16,384 features": {"features": 16_384},
    "independent, 65,536 features": {"features": 65_536, "dense": False},
    "low-rank correlation, 16,384": {"features": 16_384, "correlation": "low-rank"},
    "full correlation, 2,048": {"features": 2048, "correlation": "full"},
    "hierarchy, 4,096": {"features": 4096, "hierarchy": True},
    "hierarchy, 16,384": {"features": 16_384, "hierarchy": True},
    "hierarchy and low-rank, 16,384": {"features": 16_384, "hierarchy": True, "correlation": "low-rank"},
    "orthogonalise, 4,096 x 512, a step": {"features": 4096, "d": 512, "task": "orthogonalise", "dense": False},
    "orthogonalise, 65,536 x 1,024, a step": {"features": 65_536, "d": 1024, "task": "orthogonalise", "alone": True},
}
DEFAULTS = {"task": "sample", "correlation": None, "hierarchy": False}
PATIENCE = 2.0
"""A contender whose batch takes more seconds than this has one batch a turn."""


@dataclass
class Process:
    """A library at work on one case."""

    label: str
    python: str
    spec: dict[str, Any]
    seconds: list[float] = field(default_factory=list)
    slow: bool = False
    l0: float = float("nan")
    grown_mib: float = float("nan")

    def __enter__(self) -> Process:
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.spec["threads"]), "CUDA_VISIBLE_DEVICES": ""}
        self.process = subprocess.Popen(
            [self.python, "-W", "ignore", str(WORKERS / "synthetic_worker.py"), json.dumps(self.spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**environment, "PYTHONPATH": str(WORKERS)},
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate()

    def ask(self, times: int, *, counts: bool = True) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"times": times}) + "\n")
        self.process.stdin.flush()
        answer = self.read()
        self.l0, self.grown_mib = answer["l0"], answer["grown_mib"]
        self.seconds += answer["seconds"] if counts else []
        self.slow = max(answer["seconds"]) > PATIENCE

    def read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(MARK):
                return json.loads(line.removeprefix(MARK))
        raise SystemExit(f"{self.label} ({self.python}) stopped; run its worker by hand to see why:\n{self.spec}")


def measure(processes: list[Process], rounds: int, batches: int) -> None:
    """Start all, and let them take turns."""
    with ExitStack() as alive:
        for process in processes:
            alive.enter_context(process)
        turns(processes, rounds, batches)


def turns(processes: list[Process], rounds: int, batches: int) -> None:
    """Warm every process up, then ask one after the other."""
    for process in processes:
        process.read()
    for process in processes:
        process.ask(1, counts=False)
    for _ in range(rounds):
        for process in processes:
            process.ask(1 if process.slow else batches)


def main() -> None:
    """Run the cases and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", metavar="sae-lens=PYTHON", help="the interpreter of an environment with SAELens")
    parser.add_argument("--d", type=int, default=768, help="width of the activations")
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--l0", type=float, default=25.0, help="mean number of firing features before a hierarchy")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3, help="turns of every library")
    parser.add_argument("--batches", type=int, default=5, help="batches in a turn")
    parser.add_argument("--only", action="append", help="just the cases whose name contains this; may be repeated")
    parser.add_argument("--json", type=Path, help="also write all numbers here")
    arguments = parser.parse_args()
    name, _, python = (arguments.peer or "").partition("=")
    if arguments.peer and (name != "sae-lens" or not Path(python).is_file()):
        parser.error(f"--peer {arguments.peer}: give sae-lens=PYTHON with an interpreter that exists")
    rows: list[dict[str, Any]] = []
    for title, case in CASES.items():
        if arguments.only and not any(part in title for part in arguments.only):
            continue
        common = {key: getattr(arguments, key) for key in ("d", "batch", "l0", "threads")}
        spec = {**common, **DEFAULTS, **{k: v for k, v in case.items() if k not in ("dense", "alone")}}
        processes = [Process("sae-synthetic", sys.executable, {**spec, "library": "sae-core", "sparse": True})]
        if python and not case.get("alone"):
            modes = [True, False] if case.get("dense", True) else [True]
            processes += [
                Process(
                    f"sae-lens, {'sparse' if sparse else 'dense'}" if spec["task"] == "sample" else "sae-lens",
                    python,
                    {**spec, "library": "sae-lens", "sparse": sparse},
                )
                for sparse in modes
            ]
        measure(processes, arguments.rounds, arguments.batches)
        own = min(processes[0].seconds)
        for process in processes:
            rows.append(
                {
                    "what": title if process is processes[0] else "",
                    "library": process.label,
                    "ms": 1000 * min(process.seconds),
                    "median ms": 1000 * sorted(process.seconds)[len(process.seconds) // 2],
                    "L0": process.l0,
                    "grown MiB": process.grown_mib,
                    "times ours": min(process.seconds) / own,
                }
            )
        print(table(rows[-len(processes) :]), flush=True)
    print(f"\n{machine(arguments.threads)}")
    print(
        f"batch {arguments.batch}, width {arguments.d}, mean L0 {arguments.l0:g}; fastest of {arguments.rounds} turns\n"
    )
    print(table(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine(arguments.threads), "rows": rows}, indent=1) + "\n")


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a table."""
    formats = {"ms": ".1f", "median ms": ".1f", "L0": ".1f", "grown MiB": ".0f", "times ours": ".1f"}
    lines = [
        ["" if value != value else f"{value:{formats[key]}}" if key in formats else value for key, value in row.items()]
        for row in rows
    ]
    align = ["left", "left", *["right"] * len(formats)]
    return tabulate(lines, headers=list(rows[0]), tablefmt="github", colalign=align, disable_numparse=True)


if __name__ == "__main__":
    main()
