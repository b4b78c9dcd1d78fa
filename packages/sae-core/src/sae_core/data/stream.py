"""`Stream`: the row of batches that a training run reads, and what of it was looked at ahead.

Training looks at the first batches before it uses them, to start biases and normalisations. What was looked at is kept and
handed out later, so looking changes nothing. A stream can be saved and restored exactly where the source's iterator can
(`Resumable`): the state is the iterator's own and the batches in between.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast, final

import torch
from torch import Tensor

from sae_core.errors import ConfigError, DataError
from sae_core.parallel.ranks import ALONE, Ranks
from sae_core.protocols import ActivationBatch, ActivationSource, GivesParts, Resumable

__all__ = ["Batch", "ListedBatches", "Part", "Stream", "part_of", "rows_of"]

Batch = Tensor | ActivationBatch


@final
class ListedBatches:
    """The batches of a sequence in order; its position can be saved and restored.

    >>> batches = ListedBatches(["a", "b", "c"])
    >>> next(batches), batches.state_dict()
    ('a', {'position': 1, 'batches': 3})
    """

    def __init__(self, batches: Sequence[Any]) -> None:
        self._batches = batches
        self._position = 0

    def __iter__(self) -> ListedBatches:
        return self

    def __next__(self) -> Any:
        if self._position >= len(self._batches):
            raise StopIteration
        self._position += 1
        return self._batches[self._position - 1]

    def state_dict(self) -> dict[str, Any]:
        """How many batches were handed out, and how many there are."""
        return {"position": self._position, "batches": len(self._batches)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on at a saved position. Raises DataError for a sequence of another length."""
        if state["batches"] != len(self._batches):
            raise DataError(f"the source has {len(self._batches)} batches; {state['batches']} when it was saved")
        self._position = state["position"]


@final
@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """What one of several processes has of a batch of `items` rows or sequences."""

    batch: Batch
    items: int


@final
class Stream:
    """Batches of a source, one after the other; where `ranks` are several, this one's part of each.

    `source` is an `ActivationSource`, which is asked for batches of `batch_size`, or any iterable of batches. One that does not
    give parts is read whole by every rank.

    >>> stream = Stream(["a", "b", "c"], batch_size=1)
    >>> stream.peek(lambda batches: len(batches) >= 2)
    ['a', 'b']
    >>> next(stream), next(stream), next(stream), next(stream, None)
    ('a', 'b', 'c', None)
    """

    def __init__(self, source: ActivationSource | Iterable[Batch], batch_size: int, ranks: Ranks = ALONE) -> None:
        self._ranks = ranks
        self._compared = False
        self._parts: Iterator[tuple[Batch, int]] | None = None
        self._batches: Iterator[Batch]
        if ranks.size > 1 and isinstance(source, GivesParts):
            self._parts = iter(source.parts(batch_size, ranks.rank, ranks.size))
            self._batches = cast("Iterator[Batch]", self._parts)  # whose state it has
        elif isinstance(source, ActivationSource):
            self._batches = iter(source.batches(batch_size))
        elif isinstance(source, Sequence) and not isinstance(source, str):
            self._batches = ListedBatches(source)
        elif not isinstance(source, Iterable):
            raise ConfigError(
                f"{type(source).__name__} is neither an activation source, which has `sites` and `batches(batch_size)`, nor "
                "an iterable of batches"
            )
        else:
            self._batches = iter(source)
        self._ahead: deque[Batch | Part] = deque()

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Batch | Part:
        """The next batch, or this rank's part of it, whether it was looked at or not."""
        return self._ahead.popleft() if self._ahead else self._read()

    def _read(self) -> Batch | Part:
        if self._parts is not None:
            return Part(*next(self._parts))
        batch = next(self._batches)
        if self._ranks.size == 1:
            return batch
        part = part_of(batch, self._ranks)
        if not self._compared:
            self._compared = True
            _compare(batch.inputs if isinstance(batch, ActivationBatch) else batch, self._ranks)
        return part

    def put_back(self, batch: Batch | Part) -> None:
        """Hand out `batch`, which was the last one taken, again: it could not be used."""
        self._ahead.appendleft(batch)

    def peek(self, enough: Callable[[Sequence[Batch | Part]], bool]) -> list[Batch | Part]:
        """The next batches, as many as it takes until `enough` of them says so, or all that are left.

        They are handed out again by ``next``.
        """
        seen: list[Batch | Part] = []
        while not enough(seen):
            if len(seen) == len(self._ahead):
                try:
                    self._ahead.append(self._read())
                except StopIteration:
                    break
            seen.append(self._ahead[len(seen)])
        return seen

    @property
    def resumable(self) -> bool:
        """Whether the position can be saved and restored."""
        return isinstance(self._batches, Resumable)

    def state_dict(self) -> dict[str, Any]:
        """The iterator's state and the batches looked at ahead, whole. Raises DataError where the source has no state."""
        if not isinstance(self._batches, Resumable):
            raise DataError(
                f"the source's iterator ({type(self._batches).__name__}) has no state_dict and load_state_dict, so its "
                "position cannot be saved"
            )
        return {"source": self._batches.state_dict(), "ahead": [self._plain(batch) for batch in self._ahead]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on at a saved position; call it before the first batch is taken."""
        if not isinstance(self._batches, Resumable):
            raise DataError(
                f"the source's iterator ({type(self._batches).__name__}) has no load_state_dict, so it cannot go on "
                "where it was saved"
            )
        self._batches.load_state_dict(state["source"])
        ahead = [ActivationBatch(**batch) if isinstance(batch, dict) else batch for batch in state["ahead"]]
        self._ahead = deque(batch if self._ranks.size == 1 else part_of(batch, self._ranks) for batch in ahead)

    def _plain(self, batch: Batch | Part) -> Any:
        """The whole batch as a state holds it."""
        if not isinstance(batch, Part):
            return {"inputs": batch.inputs, "targets": batch.targets} if isinstance(batch, ActivationBatch) else batch
        found, ranks = batch.batch, self._ranks
        if not isinstance(found, ActivationBatch):
            return ranks.whole(found, batch.items)
        targets = None if found.targets is None else ranks.whole(found.targets, batch.items)
        return {"inputs": ranks.whole(found.inputs, batch.items), "targets": targets}


def _compare(inputs: Tensor, ranks: Ranks) -> None:
    """Raise ConfigError where the first row of the first batch is not what it is on the first rank, but for rounding."""
    sample = inputs.reshape(-1, inputs.shape[-1])[0, :64].double().cpu()
    first, *others = ranks.everyone([list(inputs.shape), sample.tolist()])
    expected = torch.tensor(first[1], dtype=torch.float64)
    for rank, (shape, values) in enumerate(others, 1):
        found = torch.tensor(values, dtype=torch.float64)
        tolerance = 0.02 * expected.abs().max()
        if shape != first[0] or not torch.allclose(found, expected, rtol=0.02, atol=float(tolerance), equal_nan=True):
            raise ConfigError(
                f"rank {rank} reads other data than rank 0: its first batch is {tuple(shape)} and begins with "
                f"{values[0]:.4g}, not {tuple(first[0])} and {first[1][0]:.4g}; let all processes read the same data with one "
                "seed"
            )


def part_of(batch: Batch, ranks: Ranks) -> Part:
    """This rank's part of a whole batch. Raises DataError for what is no batch."""
    inputs: object = batch.inputs if isinstance(batch, ActivationBatch) else batch
    if not isinstance(inputs, Tensor) or inputs.dim() < 2:
        raise DataError(f"batches must be tensors (rows, width), found {type(inputs).__name__}")
    if not isinstance(batch, ActivationBatch):
        return Part(ranks.part(inputs), len(inputs))
    targets = None if batch.targets is None else ranks.part(batch.targets)
    return Part(ActivationBatch(ranks.part(inputs), targets), len(inputs))


def rows_of(batch: object, width: int) -> int:
    """Activation vectors in a batch: tokens of sequences count one by one, heads of one position together. Of a part, those of
    the whole batch.
    """
    if isinstance(batch, Part):
        inputs = batch.batch.inputs if isinstance(batch.batch, ActivationBatch) else batch.batch
        return batch.items * (inputs.shape[1:].numel() // width)
    inputs = batch.inputs if isinstance(batch, ActivationBatch) else batch
    return inputs.numel() // width if isinstance(inputs, Tensor) else 0
