"""Where a run took place: the machine, and who provided the code."""

from __future__ import annotations

import os
import platform

import torch

from sae_core.ops.process import total_memory

__all__ = ["machine", "plugins"]


def machine() -> list[list[str]]:
    """Rows of a table: system, processors, memory, Python, torch, devices.

    >>> [name for name, _ in machine()][:2]
    ['system', 'processors']
    """
    rows = [["system", platform.platform()], ["processors", f"{os.cpu_count()} ({platform.machine()})"]]
    memory = total_memory()
    if memory is not None:
        rows.append(["memory", f"{memory / 2**30:.1f} GiB"])
    rows += [["Python", platform.python_version()], ["torch", torch.__version__]]
    rows.append(["threads", str(torch.get_num_threads())])
    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        rows.append(["GPUs", names])
    return rows


def plugins() -> list[list[str]]:
    """Rows of a table: plugin, version, state."""
    from sae_core.plugins import get_registry

    return [[plugin.qualified, plugin.version, str(plugin.state)] for plugin in get_registry().plugins()]
