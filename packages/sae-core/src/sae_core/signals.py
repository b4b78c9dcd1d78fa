"""Asking a run to end: what the keyboard and batch systems send, taken as a request to finish the step and save.

The first signal calls back; from then on every signal does what it does in any program, so a second one ends the process at
once. A signal that is ignored, as SIGHUP is under ``nohup``, stays ignored.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import FrameType
from typing import Any

__all__ = ["first_signal"]

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")


@contextmanager
def first_signal(then: Callable[[signal.Signals], None], *, quiet: bool = False) -> Generator[None]:
    """Within the block, call `then` for the first of SIGINT, SIGTERM and SIGHUP, and say so unless `quiet`.

    Outside the main thread, do nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: dict[signal.Signals, Any] = {}

    def handle(number: int, frame: FrameType | None) -> None:
        for name in before:
            signal.signal(name, signal.SIG_DFL)
        which = signal.Signals(number)
        if not quiet:
            message = f"\nsae-core: {which.name}: stopping after this step; another signal stops at once\n"
            os.write(2, message.encode())
        then(which)

    for name in _NAMES:
        which = getattr(signal, name, None)  # there is no SIGHUP on Windows
        if which is not None and signal.getsignal(which) is not signal.SIG_IGN:
            before[which] = signal.signal(which, handle)
    try:
        yield
    finally:
        for which, handler in before.items():
            signal.signal(which, handler)
