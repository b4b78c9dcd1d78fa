"""`Stream`: the row of batches that a training run reads, and what of it was looked at ahead.

Training looks at the first batches before it uses them, to start biases and normalisations. What was looked at is kept and
handed out later, so looking changes nothing. A stream can be saved and restored exactly where the source's iterator can
(`Resumable`): the state is the iterator's own and the batches in between.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast, final

from torch import Tensor

from sae_core.errors import ConfigError, DataError
from sae_core.protocols import ActivationBatch, ActivationSource, Resumable

__all__ = ["Batch", "ListedBatches", "Stream", "rows_of"]

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
class Stream:
    """Batches of a source, one after the other.

    `source` is an `ActivationSource`, which is asked for batches of `batch_size`, or any iterable of batches.

    >>> stream = Stream(["a", "b", "c"], batch_size=1)
    >>> stream.peek(lambda batches: len(batches) >= 2)
    ['a', 'b']
    >>> next(stream), next(stream), next(stream), next(stream, None)
    ('a', 'b', 'c', None)
    """

    def __init__(self, source: ActivationSource | Iterable[Batch], batch_size: int) -> None:
        if isinstance(source, ActivationSource):
            self._batches: Iterator[Batch] = iter(source.batches(batch_size))
        elif isinstance(source, Sequence) and not isinstance(source, str):
            self._batches = ListedBatches(source)
        elif not isinstance(source, Iterable):
            raise ConfigError(
                f"{type(source).__name__} is neither an activation source, which has `sites` and `batches(batch_size)`, nor "
                "an iterable of batches"
            )
        else:
            self._batches = iter(source)
        self._ahead: deque[Batch] = deque()

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Batch:
        """The next batch, whether it was looked at or not."""
        return self._ahead.popleft() if self._ahead else next(self._batches)

    def put_back(self, batch: Batch) -> None:
        """Hand out `batch`, which was the last one taken, again: it could not be used."""
        self._ahead.appendleft(batch)

    def peek(self, enough: Callable[[Sequence[Batch]], bool]) -> list[Batch]:
        """The next batches, as many as it takes until `enough` of them says so, or all that are left.

        They are handed out again by ``next``.
        """
        seen: list[Batch] = []
        while not enough(seen):
            if len(seen) == len(self._ahead):
                batch = next(self._batches, None)
                if batch is None:
                    break
                self._ahead.append(batch)
            seen.append(self._ahead[len(seen)])
        return seen

    @property
    def resumable(self) -> bool:
        """Whether the position can be saved and restored."""
        return isinstance(self._batches, Resumable)

    def state_dict(self) -> dict[str, Any]:
        """The iterator's state and the batches looked at ahead. Raises DataError where the source has no state."""
        if not isinstance(self._batches, Resumable):
            raise DataError(
                f"the source's iterator ({type(self._batches).__name__}) has no state_dict and load_state_dict, so its "
                "position cannot be saved"
            )
        return {"source": self._batches.state_dict(), "ahead": [_plain(batch) for batch in self._ahead]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on at a saved position; call it before the first batch is taken."""
        if not isinstance(self._batches, Resumable):
            raise DataError(
                f"the source's iterator ({type(self._batches).__name__}) has no load_state_dict, so it cannot go on "
                "where it was saved"
            )
        self._batches.load_state_dict(state["source"])
        self._ahead = deque(ActivationBatch(**batch) if isinstance(batch, dict) else batch for batch in state["ahead"])


def rows_of(batch: object, width: int) -> int:
    """Activation vectors in a batch: tokens of sequences count one by one, heads of one position together."""
    inputs = batch.inputs if isinstance(batch, ActivationBatch) else batch
    return inputs.numel() // width if isinstance(inputs, Tensor) else 0


def _plain(batch: Batch) -> Any:
    if isinstance(batch, ActivationBatch):
        return {"inputs": batch.inputs, "targets": batch.targets}
    return cast("Any", batch)
