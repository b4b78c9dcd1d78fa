"""`Stream`: the row of batches that a training run reads, and what of it was looked at ahead.

Training looks at the first batches before it uses them, to start biases and normalisations. What was looked at is kept and
handed out later, so looking changes nothing. A stream can be saved and restored exactly where the source's iterator can
(`Resumable`): the state is the iterator's own and the batches in between.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast, final, runtime_checkable

import torch
from torch import Tensor

from sae_core.errors import ConfigError, DataError, SaeCoreError
from sae_core.parallel.ranks import ALONE, Ranks
from sae_core.protocols import ActivationBatch, ActivationSource, GivesParts, HasOwnPlace, Resumable

__all__ = ["Batch", "ListedBatches", "Part", "Stream", "part_of", "rows_of"]

Batch = Tensor | ActivationBatch
_PLACES = "places"  # of all ranks, where each has its own
_FAILED, _ENDED, _GIVEN = range(3)


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


@runtime_checkable
class AsksAhead(Protocol):
    """An iterator that has asked for a batch, which its state is behind, before it hands it out."""

    def asked_for(self) -> list[Any]:
        """What is on its way; nothing is afterwards."""
        ...


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
    give parts is read whole by every rank. Where every rank reads data of its own, the stream ends for all of them together.

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
            own = isinstance(self._parts, HasOwnPlace)
            return Part(*(_next_of_all(self._parts, self._ranks) if own else next(self._parts)))
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
        return isinstance(self._batches, Resumable | HasOwnPlace)

    def state_dict(self) -> dict[str, Any]:
        """The iterator's state, or on the first rank those of all, and the batches looked at ahead, whole.

        Raises DataError where the source has no state.
        """
        if not isinstance(self._batches, Resumable | HasOwnPlace):
            raise DataError(
                f"the source's iterator ({type(self._batches).__name__}) has no state_dict and load_state_dict, so its "
                "position cannot be saved"
            )
        if isinstance(self._batches, AsksAhead):
            coming = self._batches.asked_for()
            self._ahead.extend(coming if self._parts is None else [Part(*each) for each in coming])
        source = self._batches.state_dict()
        if self._parts is not None and isinstance(self._parts, HasOwnPlace):
            source = {_PLACES: self._ranks.at_first(source)}
        return {"source": source, "ahead": [self._plain(batch) for batch in self._ahead]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on at a saved position; call it before the first batch is taken."""
        saved: Mapping[str, Any] = state["source"]
        if isinstance(self._batches, HasOwnPlace):
            self._batches.load_places(saved[_PLACES] if set(saved) == {_PLACES} else [saved])
        elif isinstance(self._batches, Resumable):
            self._batches.load_state_dict(saved)
        else:
            raise DataError(
                f"the source's iterator ({type(self._batches).__name__}) has no load_state_dict, so it cannot go on "
                "where it was saved"
            )
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


def _next_of_all(parts: Iterator[tuple[Batch, int]], ranks: Ranks) -> tuple[Batch, int]:
    """This rank's next part, if all have one: the stream ends, or fails, for all of them together."""
    found: tuple[Batch, int] | None = None
    failed: SaeCoreError | None = None
    try:
        found = next(parts, None)
    except SaeCoreError as error:
        failed = error
    worst = int(ranks.least(torch.tensor([_FAILED if failed else _ENDED if found is None else _GIVEN])))
    if worst == _FAILED:
        said = ranks.everyone(None if failed is None else str(failed))
        rank, message = next((rank, message) for rank, message in enumerate(said) if message is not None)
        raise failed or DataError(f"rank {rank}: {message}")
    if worst == _ENDED or found is None:
        raise StopIteration
    return found


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
