"""`Batches`: chunks of activations, pass after pass, through a shuffle buffer, with a place that can be saved exactly.

A source says how to open a pass over its data: an iterator of numbered chunks, each with a way to save the place behind it.
Between two batches everything that was read and not handed out is in the buffer. So the buffer, the pass's number and the
place behind the last chunk that went into the buffer are all there is to save; chunks that a thread read ahead do not count.

Several processes deal out the chunks: of n processes rank r takes those numbered r, r + n, r + 2n, and so on, into a buffer of
its own, an n-th of the whole one, and gives an n-th of every batch. When a run goes on with another number of processes, what
lies in the buffers is dealt out anew, and of the chunks those that nobody has taken.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, final

import torch
from sae_core.config import require
from sae_core.data.shuffle import ShuffleBuffer, shuffled
from sae_core.errors import DataError
from sae_core.protocols import ActivationBatch
from torch import Tensor

__all__ = ["Batches", "Chunk", "Parts", "Passes", "ahead", "check_buffer"]

log = logging.getLogger(__name__)


class Chunk(NamedTuple):
    """Rows (n, width), their number in the pass, and a function that gives the state of the pass behind them."""

    number: int
    rows: Tensor
    save: Callable[[], Mapping[str, Any]]


@final
@dataclass(frozen=True, kw_only=True)
class Passes:
    """What `Batches` needs to know of a source.

    ``open(place, first, wanted)`` begins a pass at a saved place, where its next chunk is number `first`, or at its start; it
    gives the chunks from number `first` on that are wanted. ``new_buffer(rows, seed)`` makes a buffer; `buffer_rows` and `seed`
    are those of one process. `largest_chunk` is in rows, and a row holds `positions` activations. `empty` is the message when a
    pass gives nothing.
    """

    name: str
    open: Callable[[Mapping[str, Any] | None, int, Callable[[int], bool]], Iterator[Chunk]]
    new_buffer: Callable[[int, int], ShuffleBuffer]
    buffer_rows: int
    seed: int
    hand_out: Callable[[Tensor], Tensor | ActivationBatch]
    largest_chunk: int
    epochs: int
    on_exhausted: Literal["stop", "cycle", "error"]
    empty: str
    positions: int = 1
    keep_bytes: float = 0.0
    prefetch: int = 0


@final
class Batches:
    """An iterator of shuffled batches of `rows` rows, `Resumable`; load a state before the first batch is taken.

    Of several `ranks` this one gives its part of every batch. Raises ConfigError where the buffer is too small.
    """

    def __init__(self, passes: Passes, rows: int, rank: int = 0, ranks: int = 1) -> None:
        check_buffer(passes, rows, ranks)
        self._passes = passes
        self._rank, self._ranks = rank, ranks
        self._batch_rows = len(range(rank, rows, ranks))
        self._epoch = 0
        self._done = 0  # number of the chunk behind the last one that is in the buffer or was handed out
        self._rows = 0
        self._start: Mapping[str, Any] | None = None  # where this pass is to begin
        self._save: Callable[[], Mapping[str, Any]] | None = None  # the place behind the last chunk
        self._dealt: list[dict[str, Any]] = []  # how far other numbers of processes had come
        self._kept: list[tuple[int, Tensor]] | None = None
        self._buffer: ShuffleBuffer | None = None
        self._saved_buffer: Mapping[str, Any] | None = None
        self._left: Tensor | None = None  # rows of other processes' buffers
        self._served: Iterator[Tensor] | None = None
        self._said_that_it_ended = False

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> Tensor | ActivationBatch:
        if self._served is None:
            self._served = self._serve()
        rows = next(self._served, None)
        if rows is None or len(rows) < self._batch_rows:
            self._end()
            raise StopIteration
        return self._passes.hand_out(rows)

    def state_dict(self) -> dict[str, Any]:
        """The pass, the place in it, and the buffer's rows and generator; nested dicts of tensors and JSON values."""
        place = self._start if self._save is None else self._save()
        if self._buffer is not None:
            buffer: Mapping[str, Any] | None = self._buffer.state_dict()
        elif self._left is not None:
            buffer = self._buffer_of_left(self._left).state_dict()
        else:
            buffer = self._saved_buffer
        return {
            "epoch": self._epoch,
            "done": self._done,
            "rows": self._rows,
            "place": None if place is None else dict(place),
            "buffer": None if buffer is None else dict(buffer),
            "dealt": [dict(each) for each in self._dealt],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on exactly where the saved state stood. Raises DataError once a batch was taken."""
        if self._served is not None:
            raise DataError("a saved position can be restored only before the first batch is taken")
        self._epoch, self._done, self._rows = int(state["epoch"]), int(state["done"]), int(state["rows"])
        self._start, self._saved_buffer = state["place"], state["buffer"]
        self._dealt = [dict(each) for each in state["dealt"]]

    def load_places(self, places: Sequence[Mapping[str, Any]]) -> None:
        """Go on from the states of all ranks that there were: exactly with as many, else what they left is dealt out anew."""
        if len(places) == self._ranks:
            self.load_state_dict(places[self._rank])
            return
        at = [[int(place["epoch"]), int(place["done"])] for place in places]
        last = min(places, key=lambda place: (place["epoch"], place["done"]))
        self.load_state_dict({**last, "buffer": None, "dealt": [*last["dealt"], {"ranks": len(places), "at": at}]})
        self._rows = sum(int(place["rows"]) for place in places) // self._ranks
        left = [place["buffer"]["rows"] for place in places if place["buffer"] is not None]
        self._left = torch.cat(left)[self._rank :: self._ranks] if left else None

    def _serve(self) -> Iterator[Tensor]:
        if self._left is not None:
            self._buffer, self._left = self._buffer_of_left(self._left), None
        else:
            self._buffer = self._passes.new_buffer(self._passes.buffer_rows // self._ranks, self._seed)
        if self._saved_buffer is not None:
            self._buffer.load_state_dict(self._saved_buffer)
            self._saved_buffer = None
        return shuffled(
            self._buffer, self._chunks(), batch_size=self._batch_rows, largest_chunk=self._passes.largest_chunk
        )

    def _buffer_of_left(self, left: Tensor) -> ShuffleBuffer:
        buffer = self._passes.new_buffer(self._passes.buffer_rows // self._ranks, self._seed)
        buffer.push(left)
        return buffer

    @property
    def _seed(self) -> int:
        """That of the buffer: each rank's own, and another one for each time that chunks were dealt out anew."""
        if self._ranks == 1 and not self._dealt:
            return self._passes.seed
        text = f"{self._passes.seed} {self._rank} {self._ranks} {self._dealt}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 1

    def _taken(self, epoch: int, number: int) -> bool:
        """Whether a chunk was taken before the chunks were dealt out to as many processes as there are now."""
        return any([epoch, number] < each["at"][number % each["ranks"]] for each in self._dealt)

    def _wanted(self) -> Callable[[int], bool]:
        """Which chunks of this pass are this rank's."""
        epoch = self._epoch
        return lambda number: number % self._ranks == self._rank and not self._taken(epoch, number)

    def _chunks(self) -> Iterator[Tensor]:
        """Rows in the order of the data, pass after pass."""
        passes = self._passes
        for epoch in itertools.count(self._epoch):
            if epoch >= passes.epochs:
                if passes.on_exhausted != "cycle":
                    return
                log.info("%s; going over it again (on_exhausted: cycle)", self._used_up())
            yield from self._pass() if self._kept is None else self._kept_pass(self._kept)
            if self._rows == 0:
                raise DataError(passes.empty if self._ranks == 1 else self._too_little())
            self._epoch, self._done, self._start, self._save = epoch + 1, 0, None, None

    def _pass(self) -> Iterator[Tensor]:
        """Read the data from where they stand; keep the rows if this is a whole pass and they are wanted again."""
        passes = self._passes
        later = self._epoch + 1 < passes.epochs or passes.on_exhausted == "cycle"
        is_whole = self._done == 0 and all(at < [self._epoch, 1] for each in self._dealt for at in each["at"])
        kept: list[tuple[int, Tensor]] | None = [] if passes.keep_bytes and is_whole and later else None
        size = 0
        chunks = passes.open(self._start, self._done, self._wanted())
        for number, chunk, save in ahead(chunks, passes.prefetch) if passes.prefetch else chunks:
            if kept is not None:
                kept.append((number, chunk))
                size += chunk.nbytes
                if size > passes.keep_bytes:
                    kept = None
                    log.warning(
                        "the activation cache grew beyond %g GB; every pass will run the model (cache_limit_gb)",
                        passes.keep_bytes / 1e9,
                    )
            self._save = save
            self._done = number + 1
            self._rows += len(chunk)
            yield chunk
        self._kept = kept

    def _kept_pass(self, kept: list[tuple[int, Tensor]]) -> Iterator[Tensor]:
        for number, chunk in kept:
            self._done = number + 1
            self._rows += len(chunk)
            yield chunk

    def _end(self) -> None:
        """What is said, or raised, when all passes are handed out and another batch is asked for."""
        passes = self._passes
        if self._rows < self._batch_rows:
            raise DataError(f"{self._used_up()}, fewer than {self._one_batch()}")
        if passes.on_exhausted == "error":
            raise DataError(
                f"{self._used_up()}, and more are asked for; raise epochs, or set on_exhausted to cycle or stop"
            )
        if not self._said_that_it_ended:  # who looks ahead is told there is no more, and asks again later
            log.warning("%s; training ends here (on_exhausted: stop)", self._used_up())
        self._said_that_it_ended = True

    def _used_up(self) -> str:
        activations = self._rows * self._passes.positions
        where = "" if self._ranks == 1 else f" on rank {self._rank} of {self._ranks}"
        return f"{self._passes.name} is used up{where} after {self._epoch} pass(es) and {activations:,} activations"

    def _one_batch(self) -> str:
        size = self._batch_rows * self._passes.positions
        return f"one batch of {size}" if self._ranks == 1 else f"{size}, its part of one batch"

    def _too_little(self) -> str:
        return (
            f"{self._passes.name} leaves nothing for rank {self._rank} of {self._ranks} processes, which take turns in running "
            "the model; lower batch_prompts, start fewer processes, or take more data"
        )


@final
class Parts:
    """What this rank gives of each batch of `rows` rows, and that number."""

    def __init__(self, passes: Passes, rows: int, rank: int, ranks: int) -> None:
        self._batches, self._rows = Batches(passes, rows, rank, ranks), rows

    def __iter__(self) -> Parts:
        return self

    def __next__(self) -> tuple[Tensor | ActivationBatch, int]:
        return next(self._batches), self._rows

    def state_dict(self) -> dict[str, Any]:
        """This rank's place."""
        return self._batches.state_dict()

    def load_places(self, places: Sequence[Mapping[str, Any]]) -> None:
        """See `Batches.load_places`."""
        self._batches.load_places(places)


def check_buffer(passes: Passes, rows: int, ranks: int) -> None:
    """Raise ConfigError unless a rank's share of the buffer holds its part of a batch beside the rows that arrive at once."""
    here, at_once, each = -(-rows // ranks), passes.largest_chunk, passes.positions
    share = "" if ranks == 1 else f" over {ranks} processes"
    require(
        passes.buffer_rows // ranks >= at_once + here,
        f"buffer_rows: {passes.buffer_rows * each}{share} cannot hold a batch of {rows * each} beside the {at_once * each} "
        f"activations that arrive at once{'' if ranks == 1 else ' on each'} (batch_prompts x context_size); set it to "
        f"{4 * (at_once + here) * each * ranks} or so",
    )


def ahead(chunks: Iterator[Chunk], depth: int) -> Iterator[Chunk]:
    """The same chunks, read up to `depth` ahead by a thread. What the thread raises is raised here, in its place.

    >>> from torch import tensor
    >>> [int(chunk.rows) for chunk in ahead(iter([Chunk(0, tensor(1), dict), Chunk(1, tensor(2), dict)]), 1)]
    [1, 2]
    """
    ready: queue.Queue[Chunk | BaseException | None] = queue.Queue(depth)
    stopped = threading.Event()

    def hand_over(item: Chunk | BaseException | None) -> bool:
        while not stopped.is_set():
            try:
                ready.put(item, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def read() -> None:
        try:
            for chunk in chunks:
                if not hand_over(chunk):
                    return
        except BaseException as error:  # noqa: BLE001 - raised again in the thread that asked
            hand_over(error)
        else:
            hand_over(None)

    thread = threading.Thread(target=read, name="activations ahead", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
        thread.join()
