"""Starts groups of ranks of `sae-core`, forked from this process, which has imported what they need: one import for all tests.

Reads one JSON object a line: ``{"size": 2, "arguments": [...], "environment": {...}, "folder": "..."}`` starts a group, whose
output is in ``folder/RANK.out`` and ``RANK.err``, and answers with process ids; ``{"wait": [ids]}`` answers with exit codes.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from sae_core import TrainConfig, Trainer, create
from sae_core.cli import main
from sae_core.run import execute_all  # noqa: F401 - imported for those that are forked


def warm_up() -> None:
    """Have torch import what it imports when it trains."""
    batches = [torch.randn(8, 4, generator=torch.Generator().manual_seed(0))]
    Trainer(create("topk", d_in=4, d_sae=8, k=2), batches, TrainConfig(total_samples=8, progress_bar=False)).fit()


def start(group: dict[str, Any], rank: int) -> int:
    """Fork one rank; its process id."""
    child = os.fork()
    if child:
        return child
    folder = Path(group["folder"])
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{rank}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    for which in (signal.SIGINT, signal.SIGTERM):
        signal.signal(which, signal.default_int_handler if which == signal.SIGINT else signal.SIG_DFL)
    os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank), **group["environment"]})
    code = 1
    try:
        code = main(group["arguments"])
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except BaseException:  # noqa: BLE001 - a child must not go on as its parent
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def serve() -> None:
    torch.set_num_threads(1)
    warm_up()
    for line in sys.stdin:
        asked = json.loads(line)
        if "wait" in asked:
            answer = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in asked["wait"]]
        else:
            answer = [start(asked, rank) for rank in range(asked["size"])]
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve()
