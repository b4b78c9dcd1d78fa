"""Processes that only read the source, the language model say, and send what it gives to those that train.

The last ranks of a run read, the others train. A process that trains has a `FedSource`, which knows of the source what it was
told, and asks for a batch while it trains on the one before: reading and training go on at the same time. Whoever reads
divides every batch as the processes that train do, so that each gets its own rows and nothing else travels. Those that read
share the stream among themselves, see `sae_core.protocols.GivesParts`; so it is the stream that so many processes have which
both read and train, and one that reads gives the batches of one process.

What is asked, by the first process that trains, is one of four numbers: a batch, the place in the stream, to go to one, or
the end.
"""

# T processes that train, S that read

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, final

import torch
from torch import Tensor

from sae_core.data.stream import Part, Stream
from sae_core.errors import ConfigError, DataError, SaeCoreError
from sae_core.parallel.ranks import Ranks
from sae_core.protocols import ActivationBatch, ActivationSource, GivesSequences, HasMetadata, HasTargets
from sae_core.training.facts import differences, source_facts

__all__ = ["FedSource", "fed", "feed"]

_BATCH, _PLACE, _GO, _END = range(4)
_DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Items of the whole batch; of a row: positions, width, width of targets; dtype; on a GPU; what happened.
_HEADER: Final = 7
_GIVEN, _ENDED, _FAILED = range(3)


@dataclass(frozen=True, slots=True)
class _Facts:
    """What processes that train know of a source that they do not have."""

    config: Any
    facts: dict[str, Any]
    sites: dict[str, int]
    target_sites: dict[str, int]
    sequence_length: int | None
    metadata: dict[str, Any]


def feed(source: ActivationSource, batch_size: int, ranks: Ranks) -> None:
    """As one of the `ranks` that read: give those that train what they ask for, until they say that it is enough."""
    run = ranks.run
    training = run.size - ranks.size
    parts = _met(run, _facts_of(source), None)
    with run.in_step(False):  # whoever waits to be asked is not late
        _give(source, batch_size, ranks, training, training // parts)


def fed(ranks: Ranks) -> FedSource:
    """As one of the `ranks` that train: the source that the others read."""
    run = ranks.run
    return FedSource(_met(run, None, ranks.size), ranks, run.size - ranks.world.size)


def _met(run: Ranks, facts: _Facts | None, parts: int | None) -> Any:
    """What the other kind of process says: the facts of the source, or how many share every batch."""
    told = run.everyone((facts, parts))
    given = [(rank, facts) for rank, (facts, _) in enumerate(told) if facts is not None]
    (_, first), *others = given
    for rank, other in others:
        lines = list(differences(first.facts, other.facts, "source"))
        if lines:
            raise ConfigError(f"rank {rank} reads something else than rank {given[0][0]}: {'; '.join(lines[:5])}")
    return first if facts is None else next(parts for _, parts in told if parts is not None)


def _give(source: ActivationSource, batch_size: int, ranks: Ranks, training: int, latents: int) -> None:
    run = ranks.run
    stream = Stream(source, batch_size, ranks)
    while True:
        asked = int(run.receive(torch.zeros(1, dtype=torch.long), 0))
        if asked == _END:
            return
        if asked == _GO:
            stream = Stream(source, batch_size, ranks)
            stream.load_state_dict({"source": run.receive_object(0), "ahead": []})
        elif asked == _PLACE:
            found = stream.state_dict()["source"] if stream.resumable else None
            for rank in range(latents if ranks.rank == 0 else 0):  # those that write checkpoints together
                run.send_object(found, rank)
        else:
            with run.in_step():
                given = _next(stream)
            for rank in range(training):
                _send(given, ranks, rank, rank // latents, training // latents)


def _next(stream: Stream) -> Part | SaeCoreError | None:
    """The next part; what goes wrong is known to those that train when they want the batch, and not before."""
    try:
        batch = next(stream, None)
    except SaeCoreError as error:
        return error
    if batch is None or isinstance(batch, Part):
        return batch
    inputs = batch.inputs if isinstance(batch, ActivationBatch) else batch
    return Part(batch, len(inputs))


def _send(given: Part | SaeCoreError | None, ranks: Ranks, rank: int, part: int, parts: int) -> None:
    """To `rank`, which has part number `part` of `parts`, what this one of the `ranks` that read has of it."""
    run = ranks.run
    header = torch.zeros(_HEADER, dtype=torch.long)
    if not isinstance(given, Part):
        header[-1] = _ENDED if given is None else _FAILED
        run.send(header, rank)
        if given is not None:
            run.send_object(str(given), rank)
        return
    batch = given.batch if isinstance(given.batch, ActivationBatch) else ActivationBatch(given.batch)
    inputs, targets = batch.inputs, batch.targets
    header[:6] = torch.tensor(
        [
            given.items,
            0 if inputs.dim() == 2 else inputs.shape[1],
            inputs.shape[-1],
            0 if targets is None else targets.shape[-1],
            _DTYPES.index(inputs.dtype),
            inputs.is_cuda,
        ]
    )
    run.send(header, rank)
    here = torch.arange(ranks.rank, given.items, ranks.size)
    mine = (here % parts == part).nonzero().squeeze(1)
    for tensor in (inputs, targets):
        if tensor is not None:
            run.send(tensor[mine.to(tensor.device)].contiguous(), rank)


@final
class FedSource:
    """A source that other processes read, as those see it that train. `parts` and `batches` may be opened once at a time."""

    def __init__(self, facts: _Facts, ranks: Ranks, readers: int) -> None:
        self._facts = facts
        self._ranks, self._readers = ranks, readers
        self._batches: FedBatches | None = None
        self.config = facts.config

    @property
    def facts(self) -> dict[str, Any]:
        """Those of the source itself; see `sae_core.training.facts.source_facts`."""
        return self._facts.facts

    @property
    def sites(self) -> Mapping[str, int]:
        """Those of the source."""
        return self._facts.sites

    @property
    def target_sites(self) -> Mapping[str, int]:
        """Those of the source; empty where it has none."""
        return self._facts.target_sites

    @property
    def sequence_length(self) -> int | None:
        """That of the source."""
        return self._facts.sequence_length

    def metadata(self) -> Mapping[str, Any]:
        """What the source says of itself."""
        return self._facts.metadata

    def batches(self, batch_size: int) -> FedBatches:
        """Whole batches, of the size that those that read were told."""
        return self._opened(whole=True)

    def parts(self, batch_size: int, rank: int, ranks: int) -> FedBatches:
        """This rank's rows of every batch."""
        return self._opened(whole=False)

    def _opened(self, *, whole: bool) -> FedBatches:
        if self._batches is not None:
            raise ConfigError("what other processes read is one stream, which is open already")
        self._batches = FedBatches(self._ranks, self._readers, whole=whole)
        return self._batches

    def close(self) -> None:
        """Tell those that read that it is enough."""
        batches = self._opened(whole=True) if self._batches is None else self._batches
        batches.close()


@final
class FedBatches(Iterator[Any]):
    """What other processes send: batches where `whole`, else parts with the number of items of the whole batch."""

    def __init__(self, ranks: Ranks, readers: int, *, whole: bool) -> None:
        self._ranks, self._readers, self._whole = ranks, readers, whole
        self._is_asked = False  # for a batch
        self._end: SaeCoreError | StopIteration | None = None

    def __iter__(self) -> FedBatches:
        return self

    def __next__(self) -> Any:
        if self._end is None and not self._is_asked:
            self._ask(_BATCH)
        found = self._receive()
        if found is None:
            assert self._end is not None
            raise self._end
        self._ask(_BATCH)  # while this one is trained on
        return self._handed(found)

    def asked_for(self) -> list[Any]:
        """The batch that was asked for and has not been handed out, if there is one; after it nothing is on its way."""
        found = self._receive() if self._is_asked else None
        return [] if found is None else [self._handed(found)]

    def state_dict(self) -> dict[str, Any]:
        """Where checkpoints are written the place behind what was asked for; `asked_for` gives what is not handed out."""
        self._ask(_PLACE)
        if self._ranks.rank:
            return {}
        found = self._ranks.run.receive_object(self._first_reader)
        if found is None:
            raise DataError("the source's iterator has no state_dict, so its position cannot be saved")
        return found

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Have those that read go on at a saved place."""
        self._ask(_GO)
        if self._ranks.first:
            for reader in range(self._readers):
                self._ranks.run.send_object(dict(state), self._first_reader + reader)

    def close(self) -> None:
        """Take what is still on its way, and say that it is enough."""
        self.asked_for()
        self._ask(_END)

    @property
    def _first_reader(self) -> int:
        return self._ranks.run.size - self._readers

    def _ask(self, what: int) -> None:
        self._is_asked = what == _BATCH
        if self._ranks.first:
            for reader in range(self._readers):
                self._ranks.run.send(torch.tensor([what]), self._first_reader + reader)

    def _handed(self, found: Part) -> Any:
        return found.batch if self._whole else (found.batch, found.items)

    def _receive(self) -> Part | None:
        """What was asked for, put together; None at the end of the data, or where the source has failed."""
        if self._end is not None:
            return None
        self._is_asked = False
        run, at, parts = self._ranks.run, self._ranks.rank, self._ranks.size
        pieces: list[tuple[Tensor, Tensor, Tensor | None]] = []
        items = 0
        for reader in range(self._readers):
            rank = self._first_reader + reader
            header = run.receive(torch.zeros(_HEADER, dtype=torch.long), rank).tolist()
            if header[-1] == _FAILED:
                self._end = DataError(f"rank {rank}: {run.receive_object(rank)}")
            elif header[-1] == _ENDED:
                self._end = StopIteration()
            else:
                items, positions, width, target_width, dtype, on_gpu, _ = header
                device = f"cuda:{torch.cuda.current_device()}" if on_gpu else "cpu"
                mine = torch.arange(at, items, parts)
                place = (mine % self._readers == reader).nonzero().squeeze(1).to(device)
                shape = (len(place), positions) if positions else (len(place),)
                inputs, targets = (
                    run.receive(torch.empty(*shape, each, dtype=_DTYPES[dtype], device=device), rank) if each else None
                    for each in (width, target_width)
                )
                assert inputs is not None
                pieces.append((place, inputs, targets))
        if self._end is not None:
            return None
        inputs = _put_together([(place, inputs) for place, inputs, _ in pieces])
        targets = [(place, targets) for place, _, targets in pieces if targets is not None]
        return Part(ActivationBatch(inputs, _put_together(targets)) if targets else inputs, items)


def _put_together(pieces: list[tuple[Tensor, Tensor]]) -> Tensor:
    """One tensor of rows and the places where they belong."""
    if len(pieces) == 1:
        return pieces[0][1]
    rows = pieces[0][1]
    whole = rows.new_empty(sum(len(place) for place, _ in pieces), *rows.shape[1:])
    for place, rows in pieces:
        whole[place] = rows
    return whole


def _facts_of(source: ActivationSource) -> _Facts:
    return _Facts(
        config=getattr(source, "config", None),
        facts=source_facts(source),
        sites=dict(source.sites),
        target_sites=dict(source.target_sites) if isinstance(source, HasTargets) else {},
        sequence_length=source.sequence_length if isinstance(source, GivesSequences) else None,
        metadata=dict(source.metadata()) if isinstance(source, HasMetadata) else {},
    )
