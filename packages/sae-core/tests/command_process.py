"""Run in a process of its own by tests that stop or kill it: the command line `ARGV`, both outputs into the file `ERRORS`."""

from __future__ import annotations

import os
from typing import Any

import torch
from sae_core.cli import main

given: dict[str, Any] = globals()
if "ARGV" in given:
    torch.set_num_threads(1)
    with open(given["ERRORS"], "a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os._exit(main(given["ARGV"]))
