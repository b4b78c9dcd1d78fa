"""Ranks that are processes of their own, for tests: forked from one that has imported what they need, which takes no time.

    codes = exit_codes(start_ranks(2, train))  # runs train() as rank 0 and as rank 1

A test runs a program that does so with `run_program`. Ranks find each other as processes that torchrun started do, through
environment variables. The process that forks must have trained with one thread at most: PyTorch's pools of threads do not
survive a fork.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

__all__ = ["exit_codes", "run_program", "start_ranks"]


def run_program(program: Path, *arguments: Path) -> str:
    """What a Python file prints that runs in a process of its own, with one thread and no GPU; it has ten minutes.

    Raises AssertionError with what it says where it fails.
    """
    done = subprocess.run(
        [sys.executable, str(program), *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def start_ranks(
    size: int, what: Callable[[], object], *, output: Path | None = None, environment: Mapping[str, str] | None = None
) -> list[int]:
    """Fork `size` ranks that run `what`, and give their process ids.

    A rank ends with the exit code that `what` returns, 0 for None, or raises; with 1, and a traceback, for another exception.
    What it prints goes to ``RANK.out`` and ``RANK.err`` in the folder `output`, if there is one. `environment` is set besides.
    """
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = str(listening.getsockname()[1])
    shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **(environment or {})}
    started: list[int] = []
    for rank in range(size):
        child = os.fork()
        if not child:
            _run({"RANK": str(rank), "LOCAL_RANK": str(rank), **shared}, what, output, rank)
        started.append(child)
    return started


def exit_codes(ranks: Sequence[int]) -> list[int]:
    """Wait for the ranks with these process ids; minus the number of the signal where one ended it."""
    return [os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]) for rank in ranks]


def _run(environment: Mapping[str, str], what: Callable[[], object], output: Path | None, rank: int) -> None:
    """As the child, which never returns."""
    code = 1
    try:
        for descriptor, name in ((1, "out"), (2, "err")) if output is not None else ():
            assert output is not None
            os.dup2(os.open(output / f"{rank}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.environ.update(environment)
        found = what()
        code = found if isinstance(found, int) else 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except BaseException:  # noqa: BLE001 - a child must not go on as its parent
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
