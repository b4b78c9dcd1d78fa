"""Training with latents shared out: as a program, in one process, then over four others, and over two with half of each batch.

In the end two processes train what a run file says.
"""

from __future__ import annotations

import os
import runpy
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from sae_core.latent_ranks import latents_over
from sae_core.parallel.ranks import ALONE, Ranks

_shared = runpy.run_path(str(Path(__file__).with_name("ranks_process.py")))
source, make, in_processes = _shared["source"], _shared["trainer"], _shared["in_processes"]
CASES: dict[str, dict[str, Any]] = {
    "topk": {"grad_clip_norm": 0.5},
    "batchtopk": {},
    "matryoshka_batchtopk": {},
    "standard": {},
    "jumprelu": {},
    "gated": {"grad_clip_norm": 0.5},
}


def trained(case: str, ranks: Ranks, folder: Path) -> dict[str, Any]:
    with latents_over(ranks.latents):
        made = make(case, source(folder), ranks, resample_dead_every_samples=None, **CASES[case])
    made.fit()
    saved = folder / f"{case} {ranks.size}x{1 if ranks.latents is None else ranks.latents.size}"
    if not ranks.rank:
        made.sae.save(saved)
    return {
        "history": made.history,
        "latents": made.sae.latent_range,
        "weights": {name: tensor.clone() for name, tensor in made.sae.state_dict().items()},
        "silent": made.learner.dead.samples_since_fired.clone(),
        "saved": saved,
    }


def on_four_ranks(folder: Path) -> None:
    from sae_core.parallel.joining import joined

    with joined() as world:
        found = {}
        for over in (4, 2):
            mesh = world.over(over)
            found |= {f"{name} {mesh.size}x{over}": trained(name, mesh, folder) for name in CASES}
        torch.save(found, folder / f"found-{world.rank}.pt")


def run_file(path: Path) -> None:
    from sae_core.cli import main

    assert main(["train", str(path)]) == 0


def main() -> int:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    torch.save({name: trained(name, ALONE, folder) for name in CASES}, folder / "alone.pt")
    run_file(folder / "one.yaml")
    os.environ["MASTER_PORT"] = sys.argv[2]
    ended_well = in_processes(4, on_four_ranks, folder)
    os.environ["MASTER_PORT"] = sys.argv[3]
    return 0 if ended_well and in_processes(2, run_file, folder / "both.yaml") else 1


if __name__ == "__main__":
    sys.exit(main())
