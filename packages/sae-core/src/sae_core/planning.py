"""What a run will take, memory, disk and time, before it begins.

Weights, Adam's moments, gradients and files are counted; what a step takes besides, and how long it lasts, is measured on two
steps of every dictionary with random activations of the right shape. So the plan holds for whatever architecture a plugin
brings, on the machine where it is made.

Of a run of several processes, a plan is made for one of them, in this process alone: its part of the batch, its slice of every
dictionary. The other slices are thought to hold what this one holds, so that as many latents of this one are chosen as of
every other one; what they would send is counted.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar, final

import torch
from torch import Tensor

from sae_core.config import require
from sae_core.data.wiring import Wiring
from sae_core.format.exports import exported
from sae_core.latent_ranks import latents_over
from sae_core.ops.memory import large_memory_is_kept
from sae_core.ops.process import available_memory, peak_while, resident_memory
from sae_core.parallel.joining import require_divisible, started_ranks
from sae_core.protocols import (
    ActivationBatch,
    ActivationSource,
    EstimatesCosts,
    GivesParts,
    GivesSequences,
    HasTargets,
    Memory,
)
from sae_core.run import RunConfig, chosen_device, members_in, new_sae, open_source, parameter_bytes
from sae_core.sae import SAE
from sae_core.training.config import TrainConfig
from sae_core.training.learner import Learner

__all__ = ["Plan", "plan"]

T = TypeVar("T")
_REPORT, _RECORD = 5 * 2**20, 400  # bytes of a report, and of a line of the log
_TIMED = 3


@final
@dataclass(kw_only=True)
class Plan:
    """What a run takes, and of several processes what each takes. `traffic` is what a process receives in a step. `seconds` are
    those of all steps and of the source, None where it could not be measured.

    `memory` lists what is held at the same time where it is most; `available` is what each device has for it. `problems` says
    what cannot fit; a plan that ends early, since the source alone does not, lacks the rest.
    """

    memory: list[Memory] = field(default_factory=list[Memory])
    available: dict[str, int] = field(default_factory=dict[str, int])
    disk: list[tuple[str, int]] = field(default_factory=list[tuple[str, int]])
    free_disk: int | None = None
    samples: int = 0
    seconds: dict[str, float] = field(default_factory=dict[str, float])
    problems: list[str] = field(default_factory=list[str])
    processes: int = 1
    traffic: list[tuple[str, int]] = field(default_factory=list[tuple[str, int]])

    def needed(self, device: str) -> int:
        """Bytes on a device."""
        return sum(entry.bytes for entry in self.memory if entry.device == device)


def plan(run: RunConfig) -> Plan:
    """Look at a run, with its source loaded where that fits. Raises what the run itself would raise before it begins."""
    import dataclasses

    require(
        not run.parallel.source,
        "parallel.source: a plan is of processes that read and train; plan with parallel.source=0, and take the memory of the "
        "source and of the dictionary apart",
    )
    run = dataclasses.replace(run, device=chosen_device(run.device))
    members = members_in(run)
    over = run.parallel.latents
    data = max(started_ranks() // over, 1) if run.parallel.data == "auto" else run.parallel.data
    samples = max(member.train.total_samples for member in members.values())
    found = Plan(samples=samples, processes=data * over)
    ranks = _LikeThisOne(over)
    device = torch.device(run.device)
    source = open_source(run)
    loaded = source.to_load() if isinstance(source, EstimatesCosts) else []
    for kind in {"cpu", device.type, *(entry.device for entry in loaded)}:
        available = available_memory(torch.device(kind))
        if available is not None:
            found.available[kind] = available + ((resident_memory() or 0) if kind == "cpu" else 0)
    found.memory = [Memory("Python and libraries", resident_memory() or 0, "cpu"), *loaded]
    if _refused(found):
        return found
    widths = sum(source.sites.values())  # which loads it
    now = resident_memory() or 0
    own = sum(entry.bytes for entry in loaded if entry.device == "cpu")
    found.memory[0] = Memory("Python and libraries", max(now - own, found.memory[0].bytes), "cpu")
    batch_size = next(iter(members.values())).train.batch_size
    require_divisible(batch_size, data)
    if isinstance(source, EstimatesCosts):
        found.memory += source.to_run(batch_size)
    if _refused(found):
        return found
    steps: list[int] = []
    seconds, here_bytes, whole_bytes, latents, exchanged = 0.0, 0, 0, 0, 0
    with latents_over(ranks):
        for name, member in members.items():
            label = f"{name}: " if name else ""
            known = parameter_bytes(run, member, source)
            sae = new_sae(run, member, name, source) if known is None else None
            size = _bytes(sae.parameters()) if sae is not None else known or 0
            found.memory.append(Memory(f"{label}weights", size, device.type))
            found.memory.append(Memory(f"{label}Adam and gradients", 3 * size, device.type))
            if _refused(found):
                return found
            sae = new_sae(run, member, name, source) if sae is None else sae
            forms, whole = _forms(sae), size * over - _bytes(_alike(sae)) * (over - 1)
            found.disk.append((f"{label}the SAE, and its training form where that differs", whole * forms))
            here = dataclasses.replace(member.train, batch_size=member.train.batch_size // data)
            took, beside = _measured(sae, here, source, widths, ranks)
            # what is saved at the end is folded, copied and made contiguous first
            steps.append(max(beside, size * (forms + 1)))
            seconds += took * math.ceil(member.train.total_samples / member.train.batch_size)
            records = member.train.total_samples / member.train.batch_size / member.train.log_every_steps
            found.disk.append((f"{label}log and report", int(_RECORD * records) + _REPORT))
            here_bytes, whole_bytes, latents = here_bytes + size, whole_bytes + whole, latents + sae.d_sae
            exchanged += ranks.received
            del sae
    found.memory.append(Memory("a step, or saving at the end, beside that", max(steps), device.type))
    if data > 1:  # each sends as much: every gradient goes round once to be added up, and once as the sum
        refresh = max(member.train.dead_refresh_steps for member in members.values())
        found.traffic = [
            ("gradients", 2 * (data - 1) * here_bytes // data),
            ("which latents fired, of every refresh a step's part", 2 * 8 * latents // refresh),
        ]
    if over > 1:
        found.traffic.append(
            ("of latents elsewhere, what they decode to and which are chosen, while none is dead", exchanged)
        )
    settings = next(iter(members.values())).train
    buffers = sum(entry.bytes for entry in found.memory if "buffer" in entry.what)
    each = 3 * whole_bytes + buffers
    found.disk.append((f"checkpoints, {settings.keep_last} and the next one", (settings.keep_last + 1) * each))
    own_share = found.samples // data if isinstance(source, GivesParts) else found.samples
    found.seconds = {"steps": seconds, "source": _seconds_per_sample(source, batch_size) * own_share}
    output = next(path for path in (run.output.absolute(), *run.output.absolute().parents) if path.exists())
    found.free_disk = shutil.disk_usage(output).free
    _refused(found)
    if sum(size for _, size in found.disk) > found.free_disk:
        found.problems.append(
            f"disk: {sum(size for _, size in found.disk) / 2**30:.1f} GiB are needed in {output}, "
            f"{found.free_disk / 2**30:.1f} GiB are free: choose another output, a smaller keep_last, or a smaller buffer"
        )
    return found


@final
class _LikeThisOne:
    """The first of `size` ranks, of which the others, that are not there, have what this one has; counts the bytes that it
    would receive.
    """

    def __init__(self, size: int) -> None:
        self.rank, self.size, self.received = 0, size, 0

    def add(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:  # goes round once to be added up, and once as the sum
            self.received += 2 * (self.size - 1) * _bytes([tensor]) // self.size

    def least(self, tensor: Tensor) -> Tensor:
        self.add([tensor])
        return tensor

    def whole(self, part: Tensor, items: int) -> Tensor:
        self.received += (self.size - 1) * _bytes([part])
        return torch.stack([part] * self.size, 1).flatten(0, 1)[:items]

    def everyone(self, value: T) -> list[T]:
        return [value] * self.size


def _alike(sae: SAE) -> list[Tensor]:
    """The parameters that all ranks have whole."""
    return [parameter for name, parameter in sae.named_parameters() if sae.latent_dimension(name) is None]


def _refused(found: Plan) -> bool:
    """Note what does not fit."""
    for device, available in found.available.items():
        if found.needed(device) > available:
            largest = max((entry for entry in found.memory if entry.device == device), key=lambda entry: entry.bytes)
            found.problems.append(
                f"memory: {found.needed(device) / 2**30:.1f} GiB are needed on {device}, {available / 2**30:.1f} GiB can be "
                f"had; most of it is {largest.what}, {largest.bytes / 2**30:.1f} GiB"
            )
    return bool(found.problems)


def _measured(
    sae: SAE, train: TrainConfig, source: ActivationSource, width: int, ranks: _LikeThisOne
) -> tuple[float, int]:
    """Seconds of a step, and the bytes that starting and stepping take beside weights, moments and gradients.

    Leaves with `ranks` what the last step has received.
    """
    import dataclasses

    size = _bytes(sae.parameters())
    few = dataclasses.replace(train, total_samples=max(train.total_samples, 100 * train.batch_size))
    wiring = Wiring.between(sae, source, "")
    took: list[float] = []

    def trained() -> None:
        learner = Learner(sae, few, wiring)
        batches = _random_batches(sae, train.batch_size, source, width)
        if learner.looks_ahead:
            learner.initialise([next(batches) for _ in range(math.ceil(train.init_samples / train.batch_size))])
        for _ in range(_TIMED):
            batch = next(batches)
            ranks.received = 0
            started = time.perf_counter()
            learner.step(batch)
            if sae.device.type == "cuda":
                torch.cuda.synchronize(sae.device)
            took.append(time.perf_counter() - started)

    with large_memory_is_kept():
        _, peak = peak_while(trained, sae.device)
    return min(took), max((peak or 0) - 3 * size, 0)


def _random_batches(sae: SAE, rows: int, source: ActivationSource, width: int) -> Iterator[ActivationBatch]:
    """Batches of the source's shape without the source."""
    generator = torch.Generator().manual_seed(0)
    length = source.sequence_length if isinstance(source, GivesSequences) else None
    shape = (rows,) if length is None else (rows // length, length)

    def random(columns: int) -> Tensor:
        return torch.randn(*shape, columns, generator=generator).to(sae.device)

    while True:
        targets = sum(source.target_sites.values()) if isinstance(source, HasTargets) else 0
        yield ActivationBatch(random(width), random(targets) if targets else None)


def _seconds_per_sample(source: ActivationSource, batch_size: int) -> float:
    if isinstance(source, EstimatesCosts):
        return source.seconds_per_sample()
    batches = iter(source.batches(batch_size))
    if next(batches, None) is None:
        return 0.0
    started = time.perf_counter()
    rows = batch_size * sum(1 for _ in zip(range(_TIMED), batches, strict=False))
    return (time.perf_counter() - started) / max(rows, 1)


def _forms(sae: SAE) -> int:
    from sae_core.format.training_form import needs_training_form

    fitted = sae.normalization.fitted and (sae.target_normalization is None or sae.target_normalization.fitted)
    return 2 if not fitted or needs_training_form(sae, exported(sae)) else 1


def _bytes(tensors: Iterator[Tensor] | Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
