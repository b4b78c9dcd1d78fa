"""Joining the other processes of a run that `torchrun`, or anything else that sets its environment variables, started.

    with joined() as ranks:
        trainer = Trainer(sae, source, config, ranks=ranks)
        trainer.fit()

Where the environment names no rank, that is one process alone. What goes wrong on one rank ends all of them with exit code 1,
and the first one says what it was: in a process that is not the first, an error inside the block is left for the others to
report and ends it quietly.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Generator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Final

from sae_core.config import require
from sae_core.errors import ConfigError, SaeCoreError
from sae_core.parallel.config import ParallelConfig
from sae_core.parallel.ranks import ALONE, RankError, Ranks
from sae_core.parallel.watch import Watch

__all__ = ["agree_on", "is_first", "joined", "require_divisible", "started_ranks"]

_VARIABLES: Final = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_JOINING: Final = timedelta(seconds=120)


def started_ranks() -> int:
    """How many processes the environment says were started, 1 without torchrun. Raises ConfigError where it says half of it.

    >>> started_ranks()
    1
    """
    given = {name: os.environ[name] for name in _VARIABLES if os.environ.get(name)}
    if "RANK" not in given and "WORLD_SIZE" not in given:
        return 1
    if missing := [name for name in _VARIABLES if name not in given]:
        raise ConfigError(
            f"the environment names {', '.join(given)} but not {', '.join(missing)}, so the processes of this run cannot find "
            "each other; start them with torchrun, or set all of these"
        )
    try:
        rank, size = int(given["RANK"]), int(given["WORLD_SIZE"])
    except ValueError:
        raise ConfigError(f"RANK={given['RANK']} and WORLD_SIZE={given['WORLD_SIZE']} must be whole numbers") from None
    require(0 <= rank < size, f"RANK={rank} must lie in [0, WORLD_SIZE = {size})")
    return size


def is_first() -> bool:
    """Whether this process is the one that prints."""
    return os.environ.get("RANK", "0") in ("", "0")


@contextmanager
def joined() -> Generator[Ranks]:
    """The ranks of this run. Raises ConfigError for an environment that cannot be; RankError when others do not come."""
    if started_ranks() == 1:
        yield ALONE
        return
    ranks, watch = _join()
    if not ranks.first:
        logging.disable(logging.WARNING)  # the first rank says it, or an error does
    try:
        yield ranks
        ranks.everyone(None)  # nobody ends before all have: what still fails elsewhere fails here too
    except BaseException as error:
        if not isinstance(error, RankError):
            watch.post(f"{type(error).__name__}: {error}" if not isinstance(error, SaeCoreError) else str(error))
        _leave()
        watch.end(wait_for_first=True)
        if isinstance(error, Exception) and not ranks.first:
            raise SystemExit(1) from error
        raise
    watch.end()
    _leave()


def require_divisible(batch_size: int, processes: int) -> None:
    """Raise ConfigError where a batch cannot be divided evenly."""
    require(
        batch_size % processes == 0,
        f"batch_size: {batch_size} samples cannot be divided evenly among {processes} processes; choose a multiple of "
        f"{processes}, or start another number of processes",
    )


def agree_on(parallel: ParallelConfig, ranks: Ranks) -> Ranks:
    """Take the settings of a run file. Raises ConfigError where other processes were started than it asks for."""
    latents, reading = parallel.latents, parallel.source
    were = "was" if ranks.size == 1 else "were"
    beside = f" beside the {reading} of source" if reading else ""
    require(
        ranks.size > reading,
        f"parallel.source: {reading} processes are to read the source and others to train, but {ranks.size} {were} started; "
        "start more, or lower source",
    )
    training = ranks.size - reading
    data, wanted = training // latents, 1 if parallel.data == "auto" else parallel.data
    start = f"torchrun --nproc-per-node {latents * wanted + reading}"
    require(
        training % latents == 0,
        f"parallel.latents: {latents} processes are to share out the latents, but {training} {were} started{beside}; use "
        f"{start}, or a multiple",
    )
    require(
        parallel.data in ("auto", data),
        f"parallel.data: {parallel.data} processes are to share the batches, but {training} {were} started{beside}"
        f"{f' for latents: {latents}' if latents > 1 else ''}; use {start}, or data: auto",
    )
    ranks.set_timeout(parallel.timeout_seconds)
    return ranks.apart(reading).over(latents)


def _join() -> tuple[Ranks, Watch]:
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    rank, size, local = (int(os.environ.get(name, "0")) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    with_cuda = torch.cuda.is_available()
    if with_cuda:
        require(
            local < torch.cuda.device_count(),
            f"LOCAL_RANK={local}, but this machine has {torch.cuda.device_count()} GPUs; start no more processes than GPUs, or "
            "hide the GPUs (CUDA_VISIBLE_DEVICES=) to train on CPUs",
        )
        torch.cuda.set_device(local)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own, about its own
        if not dist.is_initialized():
            try:
                dist.init_process_group("cpu:gloo,cuda:nccl" if with_cuda else "gloo", timeout=_JOINING)
            except (RuntimeError, ValueError) as error:
                raise RankError(
                    f"rank {rank} of {size} did not find the others at {os.environ['MASTER_ADDR']}:"
                    f"{os.environ['MASTER_PORT']}: {error}"
                ) from None
        mesh = init_device_mesh("cuda" if with_cuda else "cpu", (size,), mesh_dim_names=("data",))
    group = mesh.get_group("data")
    again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    client = dist.TCPStore(host, port, is_master=False, timeout=_JOINING)  # pyright: ignore[reportPrivateImportUsage]
    watch = Watch(dist.PrefixStore(f"sae-core {again}", client), rank, size)  # pyright: ignore[reportPrivateImportUsage]
    ranks = Ranks(group, watch)
    ranks.everyone(None)  # connections are made here, while everybody is known to come
    ranks.wait_long()
    return ranks, watch


def _leave() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        with suppress(RuntimeError):
            dist.destroy_process_group()
