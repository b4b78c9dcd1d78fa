"""Cases of training on several ranks; as a program, all of them in one process, then on two and four ranks of four others."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import sae_core
import torch
from sae_core import TrainConfig, Trainer, create
from sae_core.codes import SparseCodes
from sae_core.data.tensor_files import TensorFiles, TensorFilesConfig
from sae_core.errors import SaeCoreError
from sae_core.ops.batch_topk import BatchTopK
from sae_core.ops.product import EncoderProduct
from sae_core.ops.screened import Screened
from sae_core.ops.whole_batch import WholeBatch, divided
from sae_core.parallel.ranks import ALONE, Ranks
from sae_core.protocols import ActivationBatch
from sae_core.testing.rank_processes import exit_codes, start_ranks

D, F, ROWS, BATCH = 12, 48, 316, 64  # batches of 64, at the end of a pass 60, at the end of training 2
STEPS, EVERY = 8, 2  # and of these a record
Ranks.packed_below = 256  # the weights, of 576 elements, travel alone as large ones do
TOTAL = (STEPS - 1) * BATCH - 4 + 2

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "topk": {"k": 3},
    "batchtopk": {"k": 3, "normalize_activations": "expected_average_only_in"},
    "matryoshka_batchtopk": {"k": 3, "matryoshka_widths": [12, 48], "use_matryoshka_aux_loss": True},
    "standard": {"l1_coefficient": 0.05, "lp_norm": 0.7, "lp_norm_keeps_scale": True},
    "jumprelu": {"l0_coefficient": 0.05, "normalize_activations": "covariance_whitening"},
    "gated": {"l1_coefficient": 0.05},
    "cross_layer_transcoder": {
        "activation": "batchtopk",
        "k": 3,
        "reads": {"a": 6, "b": 6},
        "writes": {"a": 6, "b": 6},
    },
}
SETTINGS: dict[str, dict[str, Any]] = {
    "jumprelu": {"target_l0": 4.0, "gradient_accumulation_steps": 3},
    "topk": {"resample_dead_every_samples": 200},
}


def rows(seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    sparse = torch.rand(ROWS, 2 * D, generator=generator) * (torch.rand(ROWS, 2 * D, generator=generator) < 0.2)
    return sparse @ torch.randn(2 * D, D, generator=generator) + 0.5


def source(folder: Path, seed: int = 0, **fields: Any) -> TensorFiles:
    path = folder / f"rows-{seed}.npy"
    if not path.exists():  # every process writes the same
        beside = folder / f"rows-{seed}-{os.getpid()}.npy"
        np.save(beside, rows(seed).numpy())
        beside.rename(path)
    return TensorFiles(TensorFilesConfig(paths=[path], epochs=4, **fields))


def trainer(architecture: str, data: Any, ranks: Ranks, **changes: Any) -> Trainer:
    fields: dict[str, Any] = {
        "total_samples": TOTAL, "batch_size": BATCH, "lr": 3e-3, "log_every_steps": EVERY, "init_samples": 150,
        "dead_after_samples": 100, "dead_refresh_steps": 3, "progress_bar": False, **SETTINGS.get(architecture, {}), **changes,
    }  # fmt: skip
    made = dict(ARCHITECTURES[architecture])
    if architecture == "cross_layer_transcoder":
        data = [torch.cat([batch, batch], 1)[:, :D] for batch in data.batches(BATCH)]
        pairs = [ActivationBatch(batch, batch.flip(1)) for batch in data]
        return Trainer(
            create(architecture, d_in=D, d_sae=F, d_out=D, **made), pairs, TrainConfig(**fields), ranks=ranks
        )
    return Trainer(create(architecture, d_in=D, d_sae=F, **made), data, TrainConfig(**fields), ranks=ranks)


def outcome(done: Trainer) -> dict[str, Any]:
    density = done.learner.firing_density()  # none where the data end before the last tenth of the run
    return {
        "history": done.history,
        "weights": {name: tensor.clone() for name, tensor in done.sae.state_dict().items()},
        "density": torch.zeros(0) if density is None else density,
        "silent": done.learner.dead.samples_since_fired.clone(),
    }


def trained(architecture: str) -> Callable[[Ranks, Path], Any]:
    def case(ranks: Ranks, folder: Path) -> Any:
        made = trainer(architecture, source(folder), ranks)
        made.fit()
        return outcome(made)

    return case


class OwnRows:
    """An iterator in which every rank has rows of its own, number after number; the last rank has the fewest."""

    def __init__(self, rank: int, ranks: int) -> None:
        self.rank, self.ranks, self.at = rank, ranks, 0
        self.batches = 9 - rank

    def __iter__(self) -> OwnRows:
        return self

    def __next__(self) -> tuple[torch.Tensor, int]:
        if self.at == self.batches:
            raise StopIteration
        self.at += 1
        return rows(100 * self.rank + self.at)[: BATCH // self.ranks], BATCH

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at, "rank": self.rank}

    def load_places(self, places: Sequence[Mapping[str, Any]]) -> None:
        assert [place["rank"] for place in places] == list(range(self.ranks))
        self.at = places[self.rank]["at"]


class OwnSource:
    """A source whose ranks read each something else."""

    sites: ClassVar[Mapping[str, int]] = {"": D}

    def batches(self, batch_size: int) -> Any:
        raise NotImplementedError

    def parts(self, batch_size: int, rank: int, ranks: int) -> OwnRows:
        return OwnRows(rank, ranks)


def own_rows(ranks: Ranks, folder: Path) -> Any:
    """Ranks that read each something else: to the end of the first one's data, and once more from the fifth step."""
    whole = trainer("topk", OwnSource(), ranks, total_samples=20 * BATCH)
    whole.callbacks.append(lambda progress: progress.trainer.save(folder / "5") and None if whole.steps == 5 else None)
    whole.fit()
    again = Trainer.resume(ranks.told(folder) / "5", OwnSource(), ranks=ranks)
    again.fit()
    return {"whole": outcome(whole), "again": outcome(again)}


def sums_begin_early(ranks: Ranks, folder: Path) -> Any:
    """For every sum of gradients of the second step, whether the encoder's gradient was there when it began."""
    made = trainer("topk", source(folder), ranks)
    found: list[bool] = []
    begin = ranks.begin_to_add

    def begin_to_add(tensor: torch.Tensor) -> Any:
        found.append(made.sae.get_parameter("encoder").grad is not None)
        return begin(tensor)

    made.step(torch.zeros(BATCH, D) + 1)
    ranks.begin_to_add = begin_to_add  # type: ignore[method-assign]
    try:
        made.step(rows()[:BATCH])
    finally:
        ranks.begin_to_add = begin  # type: ignore[method-assign]
    return found


def together(size: int) -> Callable[[Ranks, Path], Any]:
    """What so many ranks read, each something else, as batches of one process."""

    def case(ranks: Ranks, folder: Path) -> Any:
        each = [OwnRows(rank, size) for rank in range(size)]
        batches = [torch.stack([part for part, _ in parts], 1).flatten(0, 1) for parts in zip(*each, strict=False)]
        made = trainer("topk", batches, ranks, total_samples=20 * BATCH)
        made.fit()
        return outcome(made)

    return case


def unread_parts(ranks: Ranks, folder: Path) -> Any:
    """A source that every rank reads whole."""
    made = trainer("topk", list(source(folder).batches(BATCH)), ranks)
    made.fit()
    return outcome(made)


def ties(ranks: Ranks, folder: Path) -> Any:
    """BatchTopK of many shapes, with equal values, rows without any and k that leaves nothing."""
    found: dict[str, torch.Tensor] = {}
    generator = torch.Generator().manual_seed(1)
    for number in range(16):
        count, width = (int(torch.randint(4, 40, (1,), generator=generator)) for _ in range(2))
        x = torch.randn(count, 5, generator=generator)
        W = torch.randn(width, 5, generator=generator)
        if number % 3 == 0:  # many ties
            x, W = x.round(), W.round()
        if number % 4 == 0:
            x[: len(x) // 2] *= 0
        if number % 6 == 5:  # every other rank begins with rows unlike the rest, and guesses too much from them
            x = torch.randn(320, 5, generator=generator)
            x[1:256:2] *= 20
        k = float([0.01, 0.5, 1.7, 4, 30][number % 5])
        scale = torch.rand(width, generator=generator) if number % 2 else None
        with divided(WholeBatch(ranks, len(x))):
            here = ranks.part(x)
            products = {"full": EncoderProduct(here, W, torch.zeros(width))}
            rule = BatchTopK(min(k, width), scale)
            for name, product in products.items():
                found[f"{number} {name}"] = ranks.whole(rule(product).to_dense(), len(x))
            screened = rule.screen(Screened(here, W, torch.zeros(width), scale=scale))
            found[f"{number} screened"] = ranks.whole(screened.to_dense(), len(x))
            dense = here @ W.t()
            row, latent = (dense > 0.3).nonzero(as_tuple=True)
            codes = SparseCodes.of_rows(dense[row, latent], row, latent, width, (len(here),))
            found[f"{number} among"] = ranks.whole(rule.among(codes).to_dense(), len(x))
    return found


def kth_largest(ranks: Ranks, folder: Path) -> Any:
    generator = torch.Generator().manual_seed(2)
    found: list[float] = []
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        values = torch.randn(203, generator=generator).to(dtype)
        values[::7] = values[0].abs()
        for k in (0, 1, 5, 60, 203):
            found.append(float(WholeBatch(ranks, 203).kth_largest(ranks.part(values), k)))
    return found


def stopped_and_resumed(ranks: Ranks, folder: Path) -> Any:
    """A run with checkpoints, and one that goes on from the first of them with the same ranks."""
    data = source(folder)
    whole = trainer("jumprelu", data, ranks)
    whole.callbacks.append(lambda progress: progress.trainer.save(folder / "5") and None if whole.steps == 5 else None)
    whole.fit()
    again = Trainer.resume(ranks.told(folder) / "5", data, ranks=ranks)
    again.fit()
    return {"whole": outcome(whole), "again": outcome(again)}


def goes_on(from_size: int) -> Callable[[Ranks, Path], Any]:
    """A run that goes on from what a run with so many ranks has saved."""

    def case(ranks: Ranks, folder: Path) -> Any:
        made = Trainer.resume(
            folder.parent / f"stopped_and_resumed-{from_size}" / "5", source(folder), ranks=ranks, force=True
        )
        made.fit()
        return outcome(made)

    return case


def other_content(ranks: Ranks, folder: Path) -> Any:
    """Files of one name that hold other rows on rank 1."""
    data = source(folder)
    if ranks.rank == 1:
        data._inputs = source(folder, 1)._inputs
    return said_by(trainer("topk", data, ranks))


def other_version(ranks: Ranks, folder: Path) -> Any:
    """Code of another version on rank 1."""
    right = sae_core.__version__
    if ranks.rank == 1:
        sae_core.__version__ = "0.0.9"  # type: ignore[attr-defined]
    try:
        return said_by(trainer("topk", source(folder), ranks))
    finally:
        sae_core.__version__ = right  # type: ignore[attr-defined]


def said_by(made: Trainer) -> str:
    try:
        made.fit()
    except SaeCoreError as error:
        return f"{made.steps} {error}"
    return "trained"


def refused(change: Callable[[int, dict[str, Any]], None]) -> Callable[[Ranks, Path], Any]:
    def case(ranks: Ranks, folder: Path) -> Any:
        fields: dict[str, Any] = {}
        change(ranks.rank, fields)
        seed = fields.pop("data", 0)
        data: Any = list(source(folder, seed).batches(BATCH)) if fields.pop("listed", False) else source(folder, seed)
        return said_by(trainer("topk", data, ranks, **fields))

    return case


CASES: dict[str, Callable[[Ranks, Path], Any]] = {
    **{f"trained {name}": trained(name) for name in ARCHITECTURES},
    "unread_parts": unread_parts,
    "own_rows": own_rows,
    "sums_begin_early": sums_begin_early,
    "together 2": together(2),
    "together 4": together(4),
    "ties": ties,
    "kth_largest": kth_largest,
    "stopped_and_resumed": stopped_and_resumed,
    "from 1": goes_on(1),
    "from 2": goes_on(2),
    "other lr": refused(lambda rank, fields: fields.update({"lr": 0.1} if rank == 1 else {})),
    "other data": refused(lambda rank, fields: fields.update({"data": 1} if rank == 1 else {})),
    "other content": other_content,
    "other version": other_version,
    "other lists": refused(lambda rank, fields: fields.update({"listed": True, "data": int(rank == 1)})),
}


def run_case(name: str, ranks: Ranks, folder: Path) -> Any:
    place = folder / f"{name}-{ranks.size}"
    place.mkdir(exist_ok=True)
    return CASES[name](ranks, place)


def on_four_ranks(folder: Path) -> None:
    """As one of four processes: all cases on two ranks and on four; what the first two found is in `folder`."""
    from sae_core.parallel.joining import joined

    with joined() as everybody:
        import torch.distributed as dist

        pair = dist.new_group([0, 1])
        found: dict[str, Any] = {}
        for ranks in (Ranks(pair) if everybody.rank < 2 else None, everybody):
            for name in CASES if ranks is not None else ():
                assert ranks is not None
                if name.startswith("together") or (ranks.size == 2 and name == "from 2"):
                    continue
                found[f"{name} {ranks.size}"] = run_case(name, ranks, folder)
            everybody.everyone(None)
        if everybody.rank < 2:
            torch.save(found, folder / f"found-{everybody.rank}.pt")


def in_processes(size: int, what: Callable[[Path], None], folder: Path) -> bool:
    """Whether `what` ended well in so many processes that come from this one."""
    return not any(exit_codes(start_ranks(size, lambda: what(folder))))


def main() -> int:
    """Run the cases in this process, and then in four that come from it and need not import everything again."""
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    several = ("from", "other", "own")
    alone = {f"{name} 1": run_case(name, ALONE, folder) for name in CASES if not name.startswith(several)}
    torch.save(alone, folder / "alone.pt")
    return 0 if in_processes(4, on_four_ranks, folder) else 1


if __name__ == "__main__":
    sys.exit(main())
