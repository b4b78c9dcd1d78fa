"""`Ranks`: the processes that train one dictionary together, and everything that they say to each other.

Every batch is divided: rank r of n trains on its rows r, r + n, r + 2n, and so on, so that a batch which is cut short stays
balanced. Each process holds the whole dictionary, and what depends on data is added up over the processes before it is used,
so that all of them take the same step. Collectives are those of `torch.distributed`, on NCCL for CUDA tensors and on gloo for
others. One process alone is `ALONE`, for which everything here gives back what it is given.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast, final

import torch
from torch import Tensor

from sae_core.errors import SaeCoreError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup, Work

    from sae_core.parallel.watch import Watch

__all__ = ["ALONE", "RankError", "Ranks", "Sum"]

T = TypeVar("T")
_EXCHANGE = timedelta(hours=24)  # ranks that do not come are found sooner, and by name


class RankError(SaeCoreError):
    """Another process of the run failed, or does not answer."""


@final
class Ranks:
    """The processes of `group`, of which this one is number `rank` of `size`; without a group, this process alone.

    Every method is a collective: all ranks call it, in the same order. It raises RankError, which names the rank, when one of
    them has gone.

    >>> ALONE.rank, ALONE.size, ALONE.first
    (0, 1, True)
    >>> ALONE.whole(torch.tensor([[1.0], [2.0]]), items=2).tolist()
    [[1.0], [2.0]]
    """

    packed_below: ClassVar[int] = 2**20
    """Tensors of fewer elements travel together."""

    def __init__(
        self,
        group: ProcessGroup | None = None,
        watch: Watch | None = None,
        world: Ranks | None = None,
        latents: Ranks | None = None,
    ) -> None:
        self._group, self._watch = group, watch
        self.world, self.latents = self if world is None else world, latents
        self.run: Ranks = self if world is None else world.run  # those that only read the source included
        self.reads_only = False
        self.rank = 0 if group is None else group.rank()
        self.size = 1 if group is None else group.size()

    @property
    def first(self) -> bool:
        """Whether this is the rank that prints and writes."""
        return self.world.rank == 0

    def over(self, latents: int) -> Ranks:
        """These ranks as a mesh of `size` / `latents` parts of a batch times `latents` slices of every dictionary.

        What is divided is then told among the ranks that have the same latents; `latents` are those that have the same rows.
        Whatever concerns the run as a whole is told among all of them, `world`.
        """
        if latents == 1:
            return self
        from torch.distributed.device_mesh import DeviceMesh

        device = "cuda" if torch.cuda.is_available() else "cpu"
        training = torch.arange(self.run.size - self.size if self.reads_only else self.size)
        mesh = DeviceMesh(device, training.view(-1, latents), mesh_dim_names=("data", "latents"))
        if self.reads_only:  # groups are made by all
            return self
        over_latents = Ranks(mesh.get_group("latents"), self._watch)
        made = Ranks(mesh.get_group("data"), self._watch, self, over_latents)
        for each in (over_latents, made):
            each.whole(torch.zeros(1, device=device), each.size)  # connects while everybody is known to come
            each.wait_long()
        return made

    def apart(self, reading: int) -> Ranks:
        """Those of these ranks that train, the first ones; or for one of the last `reading` ranks those that read."""
        if not reading:
            return self
        import torch.distributed as dist

        training = self.size - reading
        groups = [dist.new_group(range(training)), dist.new_group(range(training, self.size))]
        made = Ranks(cast("ProcessGroup", groups[self.rank >= training]), self._watch)
        made.run, made.reads_only = self, self.rank >= training
        made.everyone(None)  # connections are made while everybody is known to come
        made.wait_long()
        return made

    def wait_long(self) -> None:
        """Leave it to the watch to find out who does not come."""
        import torch.distributed as dist

        if self._group is not None:
            dist.set_timeout(_EXCHANGE, self._group)

    # Division of batches.

    def part(self, whole: Tensor) -> Tensor:
        """This rank's items (dimension 0) of a whole batch."""
        return whole if self.size == 1 else whole[self.rank :: self.size].contiguous()

    def items(self, total: int) -> int:
        """How many of `total` items are this rank's."""
        return len(range(self.rank, total, self.size))

    def whole(self, part: Tensor, items: int) -> Tensor:
        """The whole batch of so many items, from every rank's part of it."""
        if self.size == 1:
            return part[:items]
        most = -(-items // self.size)
        padded = part.new_zeros(most, *part.shape[1:])
        padded[: len(part)] = part[:most]
        found = [torch.empty_like(padded) for _ in range(self.size)]
        self._gather(found, padded)
        return torch.stack(found, 1).flatten(0, 1)[:items]

    # Numbers.

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Replace every tensor by its sum over the ranks."""
        if self.size > 1:
            import torch.distributed as dist

            self._reduce(list(tensors), dist.ReduceOp.SUM)

    def travels_alone(self, tensor: Tensor) -> bool:
        """Whether a tensor is so large that `add` would not pack it together with others."""
        return tensor.numel() >= self.packed_below and tensor.is_contiguous()

    def begin_to_add(self, tensor: Tensor) -> Sum:
        """Begin to replace a contiguous tensor by its sum over the ranks; it is theirs until ``wait`` has been called."""
        if self.size == 1:
            return Sum(self, None)
        import torch.distributed as dist

        with self.waiting():
            return Sum(self, dist.all_reduce(tensor, group=self._group, async_op=True))

    def least(self, tensor: Tensor) -> Tensor:
        """`tensor`, replaced by its smallest values over the ranks."""
        if self.size > 1:
            import torch.distributed as dist

            self._reduce([tensor], dist.ReduceOp.MIN)
        return tensor

    def most(self, tensor: Tensor) -> Tensor:
        """`tensor`, replaced by its largest values over the ranks."""
        if self.size > 1:
            import torch.distributed as dist

            self._reduce([tensor], dist.ReduceOp.MAX)
        return tensor

    def everywhere(self, holds: Tensor) -> bool:
        """Whether a condition, a tensor of one truth value, holds on every rank. Waits for the device."""
        return bool(holds) if self.size == 1 else bool(self.least(holds.reshape(1).int()))

    def concatenated(self, values: Tensor) -> Tensor:
        """The values (n,) of all ranks, of which each may have another number."""
        if self.size == 1:
            return values
        counts = torch.zeros(self.size, dtype=torch.long, device=values.device)
        counts[self.rank] = len(values)
        self.add([counts])
        lengths = cast("list[int]", counts.tolist())
        padded = values.new_zeros(max(lengths))
        padded[: len(values)] = values
        found = [torch.empty_like(padded) for _ in lengths]
        self._gather(found, padded)
        return torch.cat([part[:length] for part, length in zip(found, lengths, strict=True)])

    # Objects.

    def told(self, value: T) -> T:
        """The first rank's value, in the whole world."""
        if self.world is not self:
            return self.world.told(value)
        if self.size == 1:
            return value
        import torch.distributed as dist

        values = [value]
        with self.waiting():
            dist.broadcast_object_list(values, group=self._group, group_src=0, device=torch.device("cpu"))
        return values[0]

    def everyone(self, value: T) -> list[T]:
        """Every rank's value, in the whole world."""
        if self.world is not self:
            return self.world.everyone(value)
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.size
        with self.waiting(), torch.device("cpu"):
            dist.all_gather_object(values, value, group=self._group)
        return values

    def at_first(self, value: T) -> list[T]:
        """On the first of these ranks every rank's value, on the others nothing; tensors in it come to lie on the CPU."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] | None = [None] * self.size if self.rank == 0 else None
        with self.waiting(), torch.device("cpu"):
            dist.gather_object(_on_cpu(value), values, group=self._group, group_dst=0)
        return values or []

    def send(self, tensor: Tensor, rank: int) -> None:
        """Send a contiguous tensor to `rank`, which has to `receive` it."""
        import torch.distributed as dist

        with self.waiting():
            dist.send(tensor, group=self._group, group_dst=rank)

    def receive(self, into: Tensor, rank: int) -> Tensor:
        """`into`, filled with what `rank` sends."""
        import torch.distributed as dist

        with self.waiting():
            dist.recv(into, group=self._group, group_src=rank)
        return into

    def send_object(self, value: object, rank: int) -> None:
        """Send what can be pickled to `rank`, which has to `receive_object`."""
        import torch.distributed as dist

        with self.waiting():
            dist.send_object_list([_on_cpu(value)], group=self._group, group_dst=rank, device=torch.device("cpu"))

    def receive_object(self, rank: int) -> Any:
        """What `rank` sends with `send_object`."""
        import torch.distributed as dist

        found: list[Any] = [None]
        with self.waiting():
            dist.recv_object_list(found, group=self._group, group_src=rank, device=torch.device("cpu"))
        return found[0]

    def sent(self, tensors: Sequence[Tensor]) -> None:
        """Replace every tensor by the first rank's, in the whole world."""
        if self.world is not self:
            self.world.sent(tensors)
            return
        if self.size == 1:
            return
        import torch.distributed as dist

        with self.waiting():
            for tensor in tensors:
                dist.broadcast(tensor, group=self._group, group_src=0)

    # How long others are waited for.

    @contextmanager
    def in_step(self, ongoing: bool = True) -> Generator[None]:
        """Within the block a rank that stays behind is named; with False, everybody may take long."""
        watch = self._watch
        if watch is None:
            yield
            return
        before, watch.expected = watch.expected, ongoing
        try:
            yield
        finally:
            watch.expected = before

    def set_timeout(self, seconds: float) -> None:
        """How long a rank that does not come is waited for in a training step."""
        if self._watch is not None:
            self._watch.timeout = seconds

    @contextmanager
    def waiting(self) -> Generator[None]:
        """A peer that is lost is one clear error."""
        watch = self._watch
        if watch is not None:
            watch.enter()
        try:
            yield
        except RuntimeError as error:
            if watch is None:
                raise RankError(f"rank {self.rank}: another rank of the run has gone: {error}") from None
            raise RankError(watch.verdict(str(error))) from None
        finally:
            if watch is not None:
                watch.leave()

    def _gather(self, into: list[Tensor], part: Tensor) -> None:
        import torch.distributed as dist

        as_bytes = [each.view(torch.uint8) if each.dim() else each for each in (*into, part)]
        with self.waiting():
            dist.all_gather(as_bytes[:-1], as_bytes[-1], group=self._group)

    def _reduce(self, tensors: Sequence[Tensor], how: Any) -> None:
        import torch.distributed as dist

        small: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        sent: list[tuple[Tensor, list[Tensor]]] = []
        for tensor in tensors:
            if self.travels_alone(tensor):
                sent.append((tensor, []))
            else:
                small.setdefault((tensor.dtype, tensor.device), []).append(tensor)
        sent += [(torch.cat([each.reshape(-1) for each in some]), some) for some in small.values()]
        with self.waiting():
            for work in [dist.all_reduce(tensor, how, group=self._group, async_op=True) for tensor, _ in sent]:
                work.wait()
        for joined, some in sent:
            sizes = [each.numel() for each in some]
            for each, values in zip(some, joined.reshape(-1).split(sizes) if some else (), strict=True):
                each.copy_(values.view_as(each))


@final
class Sum:
    """A sum over `ranks` that is under way."""

    def __init__(self, ranks: Ranks, work: Work | None) -> None:
        self._ranks, self._work = ranks, work

    def wait(self) -> None:
        """Until it is there; on a GPU, for what the GPU does next."""
        if self._work is not None:
            with self._ranks.waiting():
                self._work.wait()


def _on_cpu(value: Any) -> Any:
    """`value` with the tensors in its lists and dictionaries on the CPU."""
    if isinstance(value, Tensor):
        return value.cpu()
    if isinstance(value, dict):
        return {key: _on_cpu(each) for key, each in cast("dict[str, Any]", value).items()}
    return [_on_cpu(each) for each in cast("list[Any]", value)] if isinstance(value, list) else value


ALONE = Ranks()
"""One process."""
