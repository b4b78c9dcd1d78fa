"""Settings for all tests of the workspace."""

from __future__ import annotations

import os
import signal
import threading
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from xdist.scheduler import LoadFileScheduling

# A loaded machine is not a failure, and the same examples every time make a failure in CI repeatable here.
settings.register_profile("workspace", deadline=None, derandomize=True, max_examples=30, print_blob=True)
settings.load_profile("workspace")

for switch in ("PLUGINS", "DISABLE_PLUGINS", "STRICT_PLUGINS", "TRACE_PLUGINS", "TRACEBACK", "CATALOGUE"):
    os.environ.pop(f"SAE_CORE_{switch}", None)  # what a developer's shell has switched off is tested all the same

# Started in the background (`&`, nohup), a process ignores these signals, and so would those that tests start and stop.
if threading.current_thread() is threading.main_thread():
    for ignored in (signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(ignored) is signal.SIG_IGN:
            signal.signal(ignored, signal.default_int_handler if ignored == signal.SIGINT else signal.SIG_DFL)

if "PYTEST_XDIST_WORKER" in os.environ:  # one of several processes (`-n auto`): they share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadFileScheduling:
    """Tests of one file run in one process, since they share models and worlds, in the order in which they were collected."""
    from xdist.scheduler import LoadFileScheduling

    config.option.loadscopereorder = False
    return LoadFileScheduling(config, log)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first: one that comes last is waited for by all other processes."""
    slow = {item.path for item in items if item.get_closest_marker("slow") is not None}
    items.sort(key=lambda item: item.path not in slow)
