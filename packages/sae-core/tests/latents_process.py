"""Training with latents shared out: as a program, in one process, and in four others that come from it, two times two.

Run files are trained beside the cases, stopped by a signal, and gone on with by as many processes and by others.
"""

from __future__ import annotations

import functools
import json
import os
import runpy
import shutil
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import sae_core.run
import torch
from sae_core.cli import main as command
from sae_core.latent_ranks import latents_over
from sae_core.parallel.ranks import ALONE, Ranks
from sae_core.run import RunStopped, execute_all, read_run
from sae_core.testing.rank_processes import exit_codes, start_ranks
from sae_core.training.trainer import Progress, Trainer

_shared = runpy.run_path(str(Path(__file__).with_name("ranks_process.py")))
source, make = _shared["source"], _shared["trainer"]
BATCH, D_SAE = 64, 48
SIZES: dict[str, Any] = {
    "total_samples": 9 * BATCH - 4 + 1,
    "batch_size": BATCH,
    "log_every_steps": 4,
}  # at the end one row
CASES: dict[str, dict[str, Any]] = {
    "topk": {"grad_clip_norm": 0.5},
    "batchtopk": {},
    "matryoshka_batchtopk": {},
    "standard": {},
    "jumprelu": {},
    "gated": {"grad_clip_norm": 0.5},
}
SILENT = (3, 20, 21, 40)  # latents of TopK that do not fire
STOPPED_AFTER = 5  # one process, between two batches of one step; several agree on it one batch later
RUN: dict[str, Any] = {
    "source": {"name": "tensor_files", "paths": ["rows-0.npy"], "epochs": 4},
    "sae": {"architecture": "batchtopk", "d_sae": D_SAE, "k": 3},
    "train": {
        **SIZES, "gradient_accumulation_steps": 2, "dead_after_samples": 100, "dead_refresh_steps": 3,
        "resample_dead_every_samples": 200, "progress_bar": False,
    },
}  # fmt: skip


def trained(case: str, ranks: Ranks, folder: Path) -> dict[str, Any]:
    with latents_over(ranks.latents):
        made = make(case, source(folder), ranks, **SIZES, **CASES[case])
    here = made.sae.latent_range
    if case == "topk":
        with torch.no_grad():
            made.sae.get_parameter("b_enc")[[latent - here.start for latent in SILENT if latent in here]] = -10.0
    result = made.fit()
    saved = folder / f"{case} {ranks.size}"
    if not ranks.rank:
        made.sae.save(saved)
    return {
        "history": made.history,
        "latents": here,
        "weights": {name: tensor.clone() for name, tensor in made.sae.state_dict().items()},
        "moments": {name: made.learner.moments(name) for name, _ in made.sae.named_parameters()},
        "silent": made.learner.dead.samples_since_fired.clone(),
        "density": result.density,
        "norms": made.sae.direction_norms() if result.norms is None else result.norms,
        "health": result.health,
        "saved": saved,
    }


def run(
    folder: Path, output: str, ranks: Ranks, *, resume: bool = False, stop_on: int | None = None, **parallel: int
) -> str:
    """Train what the run file says; a rank may be stopped by a signal. What the run ends with."""
    path = folder / f"{output}-{ranks.world.rank}.yaml"
    path.write_text(json.dumps({**RUN, "output": str(folder / output), "parallel": parallel}))

    def stop(progress: Progress) -> None:
        if progress.trainer.steps == STOPPED_AFTER and stop_on == ranks.world.rank:
            signal.raise_signal(signal.SIGTERM)

    sae_core.run.Trainer = functools.partial(Trainer, callbacks=[stop])  # pyright: ignore[reportAttributeAccessIssue]
    try:
        execute_all(read_run(path), resume=resume, ranks=ranks)
    except RunStopped as stopped:
        return str(stopped)
    finally:
        sae_core.run.Trainer = Trainer
    return "ended"


def on_four_ranks(folder: Path) -> None:
    from sae_core.parallel.joining import joined

    with joined() as world:
        mesh = world.over(2)
        found: dict[str, Any] = {name: trained(name, mesh, folder) for name in CASES}
        found["grown"] = run(folder, "grown", world, resume=True, latents=4)
        found["stopped"] = run(folder, "stopped", world, stop_on=3, data=2, latents=2)
        if world.rank == 0:
            shutil.copytree(folder / "stopped", folder / "shrunk")
            shutil.copytree(folder / "stopped" / "interrupted", folder / "kept")
        found["resumed"] = run(folder, "stopped", world, resume=True, data=2, latents=2)
        torch.save(found, folder / f"found-{world.rank}.pt")


def trains_both(folder: Path) -> int:
    return command(["train", str(folder / "both.yaml")])


def main() -> int:
    folder = Path(sys.argv[1])
    os.chdir(folder)
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    torch.save({name: trained(name, ALONE, folder) for name in CASES}, folder / "alone.pt")
    for name, parallel in (("one", {}), ("both", {"data": 2, "latents": 2})):
        (folder / f"{name}.yaml").write_text(json.dumps({**RUN, "output": name, "parallel": parallel}))
    assert command(["train", "one.yaml"]) == 0
    assert "--resume" in run(folder, "grown", ALONE, stop_on=0)
    for what in (on_four_ranks, trains_both):
        if any(exit_codes(start_ranks(4, functools.partial(what, folder)))):
            return 1
    return 0 if run(folder, "shrunk", ALONE, resume=True) == "ended" else 1


if __name__ == "__main__":
    sys.exit(main())
