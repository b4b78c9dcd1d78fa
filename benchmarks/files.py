"""What saving and loading a dictionary cost beside the bytes themselves.

    python benchmarks/files.py
    python benchmarks/files.py --d-in 768 --d-sae 16384 --architecture topk --rounds 15

`save`, into a new folder and over an SAE that is there, is put beside writing as many bytes and one fsync (and taking the
place of a file that is there); `SAE.load` beside copying what the safetensors library maps and looking through it for NaN. Both
take turns, and each is given by its median; the disk has nothing else to write when a turn begins, and files that are read are
in the system's cache. Peak memory of a load is that of a process of its own, above what it had before.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from compare import machine
from sae_core import SAE, create
from safetensors.torch import load_file
from tabulate import tabulate

ARCHITECTURES: dict[str, dict[str, Any]] = {"topk": {"k": 32}, "batchtopk": {"k": 32}, "standard": {}, "jumprelu": {}}
WEIGHTS = "sae_weights.safetensors"
AIMS = {"save, new folder": "1.5", "save, over another": "1.5", "load": "1.3", "load, mmap=False": ""}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="What saving and loading cost beside the bytes themselves.")
    parser.add_argument("--architecture", choices=sorted(ARCHITECTURES), action="append")
    parser.add_argument("--d-in", type=int, default=768)
    parser.add_argument("--d-sae", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--folder", type=Path, help="where the files go; a temporary folder by default")
    parser.add_argument("--peak-of", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak_of is not None:
        print(peak_of_loading(options.peak_of))
        return
    print(f"{machine(options.threads)}; {options.d_in} x {options.d_sae}, medians of {options.rounds} rounds")
    rows: list[list[str]] = []
    for name in options.architecture or ["topk", "standard"]:
        sae = create(name, d_in=options.d_in, d_sae=options.d_sae, **ARCHITECTURES[name])
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            rows += measure(name, sae, Path(folder), options.rounds)
    headers = ["architecture", "", "ms", "the bytes alone, ms", "ratio", "aim"]
    print(tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True))


def measure(name: str, sae: SAE[Any], folder: Path, rounds: int) -> list[list[str]]:
    """Rows of the table for one dictionary."""
    sae.save(folder / "there")
    data = (folder / "there" / WEIGHTS).read_bytes()
    jobs: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "save, new folder": (lambda: sae.save(folder / "new"), lambda: write(folder / "bytes", data)),
        "save, over another": (lambda: sae.save(folder / "there"), lambda: replace(folder / "old", data)),
        "load": (lambda: SAE.load(folder / "there"), lambda: read(folder / "there")),
        "load, mmap=False": (lambda: SAE.load(folder / "there", mmap=False), lambda: read(folder / "there")),
    }
    seconds: dict[str, tuple[list[float], list[float]]] = {what: ([], []) for what in jobs}
    for what, pair in jobs.items():
        for _ in range(rounds):
            for job, times in zip(pair, seconds[what], strict=True):
                shutil.rmtree(folder / "new", ignore_errors=True)
                (folder / "bytes").unlink(missing_ok=True)
                os.sync()  # the disk has nothing else to write
                started = time.perf_counter()
                job()
                times.append(time.perf_counter() - started)
    rows: list[list[str]] = []
    for what, (ours, bare) in seconds.items():
        mine, theirs = statistics.median(ours), statistics.median(bare)
        rows.append([name, what, f"{1e3 * mine:.0f}", f"{1e3 * theirs:.0f}", f"{mine / theirs:.2f}", AIMS[what]])
    call = [sys.executable, __file__, "--peak-of", str(folder / "there")]
    peak = float(subprocess.run(call, check=True, capture_output=True, text=True).stdout)
    return [*rows, [name, "load, peak memory of the file's size", "", "", f"{peak:.2f}", "1.2"]]


def write(path: Path, data: bytes) -> None:
    """The bytes, synced."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> dict[str, torch.Tensor]:
    """The tensors, in memory, looked through for NaN and infinity."""
    tensors = {name: tensor.clone() for name, tensor in load_file(path / WEIGHTS).items()}
    assert all(bool(tensor.sum().isfinite()) for tensor in tensors.values())
    return tensors


def replace(path: Path, data: bytes) -> None:
    """The bytes, synced, in the place of others."""
    beside = path.with_suffix(".new")
    write(beside, data)
    beside.replace(path)


def peak_of_loading(path: Path) -> float:
    """The most memory that loading takes, above what the process had, over the size of the file."""
    SAE.load(small_one())  # what is imported at the first load is not the load's
    before = peak_bytes()
    kept = SAE.load(path)
    after = peak_bytes()
    del kept
    return (after - before) / (path / WEIGHTS).stat().st_size


def peak_bytes() -> int:
    """The most memory that this process has had, in bytes, from Linux's /proc."""
    text = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith("VmHWM")) * 1024


def small_one() -> Path:
    """A dictionary of a few kilobytes, in a folder of its own."""
    path = Path(tempfile.mkdtemp()) / "small"
    create("standard", d_in=4, d_sae=8).save(path)
    return path


if __name__ == "__main__":
    main()
