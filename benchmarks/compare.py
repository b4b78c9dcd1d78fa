"""Runs benchmark workers in turn, A B A B, and makes a table of what they did.

Every library is its own process in its own environment. All of a comparison's processes are alive at once, one of them
works at a time, and each round gives every one of them its turn, so that a noisy neighbour or a warm processor meets all
alike. What is reported is the fastest step of each, since noise only ever adds time.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from sae_core.ops.screening import multiplies_bfloat16
from tabulate import tabulate
from workers.protocol import MARK, Spec

WORKERS = Path(__file__).parent / "workers"
SCRIPTS = {
    "sae-core": "sae_core_worker.py",
    "sae-lens": "sae_lens_worker.py",
    "dictionary-learning": "dictionary_learning_worker.py",
    "sparsify": "sparsify_worker.py",
    "product": "product_worker.py",
}

ARCHITECTURES = {"sparsify": ("topk", "groupmax")}
"""Libraries that do not have all architectures; the others are asked."""
IN_FULL = ("topk",)
"""Cases in which this project is also measured with the full product, where the machine would screen it."""


@dataclass
class Contender:
    """One library's process in one comparison, and what it measured."""

    name: str
    python: str
    spec: Spec
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    peak_mib: float = float("nan")
    l0: float = float("nan")
    process: subprocess.Popen[str] | None = None
    unsupported: str | None = None
    workers: Path = WORKERS
    note: str = ""

    @property
    def label(self) -> str:
        return self.name + self.note + (", full product" if self.spec.product == "full" else "")

    @property
    def best(self) -> float:
        return min(self.seconds, default=float("nan"))

    def start(self) -> None:
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(self.spec.threads),
            "PYTHONPATH": str(self.workers),
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HUB_OFFLINE": "1",
            "WANDB_MODE": "disabled",
        }
        self.process = subprocess.Popen(
            [
                self.python,
                "-W",
                "ignore",
                str(self.workers / SCRIPTS[self.name]),
                json.dumps(dataclasses.asdict(self.spec)),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def wait_until_ready(self) -> None:
        reply = self._read()
        self.unsupported = reply.get("unsupported")

    def run(self, times: int, *, memory: bool = False, warm_up: bool = False) -> None:
        assert self.process is not None
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": "memory" if memory else "run", "times": times}) + "\n")
        self.process.stdin.flush()
        reply = self._read()
        if memory:
            self.peak_mib = reply["peak_mib"]
        elif not warm_up:
            self.seconds += reply["seconds"]
            self.cpu_seconds += reply["cpu_seconds"]
        self.l0 = reply["l0"]

    def stop(self) -> None:
        if self.process is not None:
            self.process.communicate()
            self.process = None

    def _read(self) -> dict[str, Any]:
        assert self.process is not None
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(MARK):
                return json.loads(line.removeprefix(MARK))
        _, errors = self.process.communicate()
        raise SystemExit(f"{self.name} ({self.python}) stopped:\n{errors[-3000:]}")


def compare(contenders: Sequence[Contender], rounds: int, steps: int = 1) -> list[Contender]:
    """Time all contenders in turn; those whose library does not have the architecture are left out."""
    try:
        for contender in contenders:
            contender.start()  # all at once: importing is the slow part
        for contender in contenders:
            contender.wait_until_ready()
        present = [contender for contender in contenders if contender.unsupported is None]
        for contender in present:
            contender.run(1, warm_up=True)  # allocates optimiser state and buffers
        for contender in present:
            contender.run(1, memory=True)
        for _ in range(rounds):
            for contender in present:
                contender.run(steps)
        return present
    finally:
        for contender in contenders:
            contender.stop()


def rows_of(title: str, contenders: Sequence[Contender], batch: int) -> list[dict[str, Any]]:
    """Table rows of one comparison: speeds, peak memory, and the speed relative to the fastest peer and the bare product."""
    product = next((c for c in contenders if c.name == "product"), None)
    made: list[dict[str, Any]] = []
    for contender in contenders:
        if contender is product:
            continue
        made.append(
            {
                "what": title,
                "library": contender.label,
                "steps/s": 1 / contender.best,
                "samples/s": batch / contender.best,
                "CPU s": min(contender.cpu_seconds),
                "L0": contender.l0,
                "peak MiB": contender.peak_mib,
                "of product": product.best / contender.best if product else float("nan"),
            }
        )
    peers = [c for c in contenders if c.name not in ("sae-core", "product") or c.note]
    fastest = min((c.best for c in peers), default=float("nan"))
    for row, contender in zip(made, (c for c in contenders if c is not product), strict=True):
        row["vs fastest peer"] = fastest / contender.best
    return made


def table(rows: Sequence[dict[str, Any]], style: str = "github") -> str:
    """The rows as a table."""
    formats = {
        "steps/s": ".2f",
        "samples/s": ".0f",
        "CPU s": ".3f",
        "L0": ".0f",
        "peak MiB": ".0f",
        "of product": ".0%",
    }
    formats |= {"vs fastest peer": ".2f"}
    lines = [
        [
            f"{value:{formats[key]}}" if key in formats and value == value else ("" if value != value else value)
            for key, value in row.items()
        ]
        for row in rows
    ]
    align = ["left" if key in ("what", "library") else "right" for key in (rows[0] if rows else ())]
    return tabulate(lines, headers=list(rows[0]) if rows else [], tablefmt=style, colalign=align, disable_numparse=True)


def machine(threads: int) -> str:
    """One line on what the numbers were measured with."""
    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as cpuinfo:
            model = next(line.split(":", 1)[1].strip() for line in cpuinfo if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    import torch

    return f"{model}, {os.cpu_count()} cores, {threads} threads, {platform.system()}, torch {torch.__version__}"


def common_arguments(description: str) -> argparse.ArgumentParser:
    """The options that both benchmarks share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument(
        "--peer",
        action="append",
        default=[],
        metavar="NAME=PYTHON",
        help=f"a library to compare with and its interpreter; names: {', '.join(n for n in SCRIPTS if n[:3] != 'pro')}",
    )
    parser.add_argument("--d-in", type=int, default=768)
    parser.add_argument("--d-sae", type=int, default=16384)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=3, help="turns of every library")
    parser.add_argument(
        "--steps", type=int, default=1, help="steps of a turn; many for small dictionaries, which live in caches"
    )
    parser.add_argument("--only", action="append", help="just the cases whose name contains this; may be repeated")
    parser.add_argument("--json", type=Path, help="also write all numbers here")
    parser.add_argument(
        "--before",
        type=Path,
        metavar="CHECKOUT",
        help="another checkout of this project, with its .venv, to measure in turn with this one",
    )
    return parser


def peers_of(arguments: argparse.Namespace) -> dict[str, str]:
    """Interpreters by library."""
    peers: dict[str, str] = {}
    for given in arguments.peer:
        name, _, python = given.partition("=")
        if name not in SCRIPTS or name == "product" or not python:
            raise SystemExit(f"--peer {given}: give NAME=PYTHON, NAME one of {', '.join(SCRIPTS)}")
        if not Path(python).is_file():
            raise SystemExit(f"--peer {given}: there is no interpreter {python}")
        peers[name] = python
    return peers


def report(rows: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    """Print the table and write the numbers."""
    print(f"\n{machine(arguments.threads)}")
    shape = f"d_in {arguments.d_in}, d_sae {arguments.d_sae}, k {arguments.k}, batch {arguments.batch}, float32"
    print(f"{shape}; fastest of {arguments.rounds} turns\n")
    print(table(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine(arguments.threads), "rows": rows}, indent=1) + "\n")


def run_cases(
    task: str, cases: Mapping[str, Mapping[str, Any]], peers: Mapping[str, str], arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """The table rows of all cases; each is printed as soon as it is there."""
    rows: list[dict[str, Any]] = []
    for title, case in cases.items():
        if arguments.only and not any(part in title for part in arguments.only):
            continue
        spec = Spec(
            task=task,
            d_in=arguments.d_in,
            d_sae=arguments.d_sae,
            k=arguments.k,
            batch=arguments.batch,
            threads=arguments.threads,
            widths=tuple(arguments.d_sae // part for part in (8, 4, 2, 1)),
            **case,
        )
        contenders = [Contender(name, sys.executable, spec) for name in ("sae-core", "product")]
        if title in IN_FULL and task == "training" and multiplies_bfloat16(torch.device("cpu")):
            contenders.append(Contender("sae-core", sys.executable, dataclasses.replace(spec, product="full")))
        if arguments.before is not None:
            there = arguments.before
            contenders.append(
                Contender(
                    "sae-core",
                    str(there / ".venv/bin/python"),
                    spec,
                    workers=there / "benchmarks/workers",
                    note=f" in {there.name}",
                )
            )
        contenders += [
            Contender(name, python, spec)
            for name, python in peers.items()
            if spec.architecture in ARCHITECTURES.get(name, (spec.architecture,))
        ]
        made = rows_of(title, compare(contenders, arguments.rounds, arguments.steps), spec.batch)
        print(table(made), flush=True)
        rows += made
    return rows
