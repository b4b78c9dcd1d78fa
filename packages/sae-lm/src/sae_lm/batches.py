"""`Batches`: chunks of activations, pass after pass, through a shuffle buffer, with a place that can be saved exactly.

A source says how to open a pass over its data: an iterator of chunks, each with a way to save the place behind it. Between
two batches everything that was read and not handed out is in the buffer. So the buffer, the pass's number and the place
behind the last chunk that went into the buffer are all there is to save; chunks that a thread read ahead do not count.
"""

from __future__ import annotations

import itertools
import logging
import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, final

from sae_core.config import require
from sae_core.data.shuffle import ShuffleBuffer, shuffled
from sae_core.errors import DataError
from sae_core.protocols import ActivationBatch
from torch import Tensor

__all__ = ["Batches", "Chunk", "Passes", "ahead", "check_buffer"]

log = logging.getLogger(__name__)

Chunk: TypeAlias = tuple[Tensor, Callable[[], Mapping[str, Any]]]
"""Rows (n, width), and a function that gives the state of the pass behind them."""


@final
@dataclass(frozen=True, kw_only=True)
class Passes:
    """What `Batches` needs to know of a source.

    `open` begins a pass: at a saved state, or at its start without the first `skip` chunks. `largest_chunk` is in rows, and
    a row holds `positions` activations. `empty` is the message when a pass gives nothing.
    """

    name: str
    open: Callable[[Mapping[str, Any] | None, int], Iterator[Chunk]]
    new_buffer: Callable[[], ShuffleBuffer]
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
    """An iterator of shuffled batches of `rows` rows, `Resumable`; load a state before the first batch is taken."""

    def __init__(self, passes: Passes, rows: int) -> None:
        self._passes = passes
        self._batch_rows = rows
        self._epoch = 0
        self._done = 0  # chunks of this pass that are in the buffer or were handed out
        self._rows = 0
        self._start: Mapping[str, Any] | None = None  # where this pass is to begin
        self._save: Callable[[], Mapping[str, Any]] | None = None  # the place behind the last chunk
        self._kept: list[Tensor] | None = None
        self._buffer: ShuffleBuffer | None = None
        self._saved_buffer: Mapping[str, Any] | None = None
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
        else:
            buffer = self._saved_buffer
        return {
            "epoch": self._epoch,
            "done": self._done,
            "rows": self._rows,
            "place": None if place is None else dict(place),
            "buffer": None if buffer is None else dict(buffer),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on exactly where the saved state stood. Raises DataError once a batch was taken."""
        if self._served is not None:
            raise DataError("a saved position can be restored only before the first batch is taken")
        self._epoch, self._done, self._rows = int(state["epoch"]), int(state["done"]), int(state["rows"])
        self._start, self._saved_buffer = state["place"], state["buffer"]

    def _serve(self) -> Iterator[Tensor]:
        self._buffer = self._passes.new_buffer()
        if self._saved_buffer is not None:
            self._buffer.load_state_dict(self._saved_buffer)
            self._saved_buffer = None
        return shuffled(
            self._buffer, self._chunks(), batch_size=self._batch_rows, largest_chunk=self._passes.largest_chunk
        )

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
                raise DataError(passes.empty)
            self._epoch, self._done, self._start, self._save = epoch + 1, 0, None, None

    def _pass(self) -> Iterator[Tensor]:
        """Read the data from where they stand; keep the rows if this is a whole pass and they are wanted again."""
        passes = self._passes
        later = self._epoch + 1 < passes.epochs or passes.on_exhausted == "cycle"
        kept: list[Tensor] | None = [] if passes.keep_bytes and self._done == 0 and later else None
        size = 0
        chunks = passes.open(self._start, 0 if self._start is not None else self._done)
        for chunk, save in ahead(chunks, passes.prefetch) if passes.prefetch else chunks:
            if kept is not None:
                kept.append(chunk)
                size += chunk.nbytes
                if size > passes.keep_bytes:
                    kept = None
                    log.warning(
                        "the activation cache grew beyond %g GB; every pass will run the model (cache_limit_gb)",
                        passes.keep_bytes / 1e9,
                    )
            self._save = save
            self._done += 1
            self._rows += len(chunk)
            yield chunk
        self._kept = kept

    def _kept_pass(self, kept: list[Tensor]) -> Iterator[Tensor]:
        for chunk in kept:
            self._done += 1
            self._rows += len(chunk)
            yield chunk

    def _end(self) -> None:
        """What is said, or raised, when all passes are handed out and another batch is asked for."""
        passes = self._passes
        if self._rows < self._batch_rows:
            raise DataError(f"{self._used_up()}, fewer than one batch of {self._batch_rows * passes.positions}")
        if passes.on_exhausted == "error":
            raise DataError(
                f"{self._used_up()}, and more are asked for; raise epochs, or set on_exhausted to cycle or stop"
            )
        if not self._said_that_it_ended:  # who looks ahead is told there is no more, and asks again later
            log.warning("%s; training ends here (on_exhausted: stop)", self._used_up())
        self._said_that_it_ended = True

    def _used_up(self) -> str:
        activations = self._rows * self._passes.positions
        return f"{self._passes.name} is used up after {self._epoch} pass(es) and {activations:,} activations"


def check_buffer(buffer_rows: int, batch_rows: int, at_once: int, unit: str = "activations") -> None:
    """Raise ConfigError unless a buffer of `buffer_rows` holds a batch beside the rows that arrive at once."""
    require(
        buffer_rows >= at_once + batch_rows,
        f"buffer_rows: {buffer_rows} cannot hold a batch of {batch_rows} beside the {at_once} {unit} that "
        f"arrive at once (batch_prompts x context_size); set it to {4 * (at_once + batch_rows)} or so",
    )


def ahead(chunks: Iterator[Chunk], depth: int) -> Iterator[Chunk]:
    """The same chunks, read up to `depth` ahead by a thread. What the thread raises is raised here, in its place.

    >>> from torch import tensor
    >>> [int(rows) for rows, _ in ahead(iter([(tensor(1), dict), (tensor(2), dict)]), 1)]
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
