"""What every activation source promises: batches of its widths, the same ones every time, and what else it says it can."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor

from sae_core.architectures.standard import StandardSAE
from sae_core.data.wiring import fields_for
from sae_core.protocols import (
    ActivationBatch,
    ActivationSource,
    GivesParts,
    GivesSequences,
    HasMetadata,
    HasOwnPlace,
    HasTargets,
    Resumable,
)
from sae_core.sae import create
from sae_core.testing.kit import Check, NotApplicable, Subject, check_class, check_options
from sae_core.testing.small import is_finite
from sae_core.training.checkpoint import read_checkpoint, write_checkpoint
from sae_core.training.config import TrainConfig
from sae_core.training.trainer import Trainer

__all__ = [
    "CHECKS",
    "check_batches",
    "check_metadata",
    "check_parts",
    "check_restarts",
    "check_resumes",
    "check_seed",
    "check_sequences",
    "check_trains",
]

_MOST = 6  # batches looked at; a source may never end


def check_batches(subject: Subject) -> None:
    """Batches are finite floating point of the widths that `sites` says, whole ones of the size asked for, all of one dtype.

    Without sequences a batch is (rows, width) with at most `batch_size` rows, fewer only at an end. With targets it is an
    `ActivationBatch` whose targets have as many rows and the width of `target_sites`.
    """
    source, size = _source(subject), _size(subject)
    _check_sites(source)
    batches = list(islice(source.batches(size), _MOST))
    assert batches, "batches() gives no batch"
    width, out = sum(source.sites.values()), sum(_target_sites(source).values())
    dtypes: set[torch.dtype] = set()
    for number, batch in enumerate(batches):
        where = f"batch {number}"
        parts = [("inputs", _inputs(batch), width)]
        targets = batch.targets if isinstance(batch, ActivationBatch) else None
        assert (targets is not None) == bool(out), (
            f"{where}: targets do not fit target_sites {dict(_target_sites(source))}"
        )
        if targets is not None:
            parts.append(("targets", targets, out))
            assert targets.shape[:-1] == _inputs(batch).shape[:-1], f"{where}: inputs and targets have other rows"
        for what, tensor, wanted in parts:
            assert isinstance(tensor, Tensor), f"{where}: {what} are {type(tensor).__name__}, not a tensor"
            assert tensor.shape[-1] == wanted, (
                f"{where}: {what} of shape {tuple(tensor.shape)}, but sites add up to {wanted}"
            )
            assert tensor.is_floating_point(), f"{where}: {what} have dtype {tensor.dtype}; floating point is needed"
            assert not tensor.requires_grad, f"{where}: {what} require a gradient, so every batch keeps a graph alive"
            is_finite(tensor, f"{where}: {what}")
        dtypes.add(_inputs(batch).dtype)
        rows = _inputs(batch).numel() // width
        assert 0 < rows <= size, f"{where}: {rows} rows, where {size} were asked for"
        if _length(source) is None:
            assert _inputs(batch).dim() == 2, f"{where}: shape {tuple(_inputs(batch).shape)} is not (rows, width)"
    assert len(dtypes) == 1, f"batches of several dtypes: {', '.join(sorted(map(str, dtypes)))}"
    rows = [_inputs(batch).numel() // width for batch in batches]
    assert max(rows) > size // 2, f"no batch has half of the {size} rows asked for; the largest has {max(rows)}"
    assert len(batches) == 1 or not _equal(batches[0], batches[1]), "the first two batches are the same"


def check_restarts(subject: Subject) -> None:
    """Each call of `batches` starts from the beginning, and two rows of batches do not disturb each other.

    The position belongs to the iterator, not to the source.
    """
    source, size = _source(subject), _size(subject)
    first = list(islice(source.batches(size), 3))
    one, two = source.batches(size), source.batches(size)
    for number, expected in enumerate(first):
        assert _equal(next(one), expected), f"a second row of batches differs from the first one at batch {number}"
        assert _equal(next(two), expected), f"two rows of batches, taken in turn, differ at batch {number}"


def check_seed(subject: Subject) -> None:
    """Two sources of one config give the same batches whatever the global random generators hold, and leave those alone.

    If the config has a field `seed`, another seed gives other batches.
    """
    size = _size(subject)
    runs: list[list[Any]] = []
    for seed in (1, 2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            before = torch.get_rng_state()
            runs.append(list(islice(_source(subject).batches(size), 3)))
            assert torch.equal(before, torch.get_rng_state()), "making batches uses torch's global random generator"
    for number, (one, two) in enumerate(zip(*runs, strict=True)):
        assert _equal(one, two), f"two sources of one config differ at batch {number}"
    if "seed" in {field.name for field in dataclasses.fields(cast("Any", subject.cls).config_class)}:
        other = next(cast("ActivationSource", subject.new(seed=subject.settings.get("seed", 0) + 1)).batches(size))
        assert not _equal(other, runs[0][0]), "another seed gives the same batches"


def check_resumes(subject: Subject) -> None:
    """If the iterator has `state_dict` and `load_state_dict`, it goes on exactly where it was, from a file too.

    The state is tensors and JSON values, and a copy: it must not change while the iterator goes on.
    """
    source, size = _source(subject), _size(subject)
    batches = source.batches(size)
    if not isinstance(batches, Resumable):
        raise NotApplicable("the iterator of batches has no state_dict and load_state_dict")
    start = copy.deepcopy(batches.state_dict())
    beginning = next(batches)
    state = batches.state_dict()
    rest = list(islice(batches, 2))
    if not rest:
        raise NotApplicable("the source ends after one batch")
    saved = read_checkpoint(write_checkpoint(subject.folder / "state", {"stream": state}))["stream"]
    for what, its, expected in (("at the start", start, [beginning, *rest]), ("after a batch", saved, rest)):
        again = _source(subject).batches(size)
        assert isinstance(again, Resumable)
        again.load_state_dict(its)
        for number, batch in enumerate(expected):
            assert _equal(next(again), batch), f"a state taken {what} gives another batch {number} when it is loaded"


def check_parts(subject: Subject) -> None:
    """If it `GivesParts`, processes get their rows of the batches, or each data of its own, and go on where they were.

    Where the iterator `HasOwnPlace`, no row is given twice, also when one process goes on from the places of two.
    """
    source, size = _source(subject), _size(subject)
    if not isinstance(source, GivesParts):
        raise NotApplicable("it has no parts()")
    both = [cast("GivesParts", _source(subject)).parts(size, rank, 2) for rank in range(2)]
    given = [list(islice(iterator, 3)) for iterator in both]
    own = isinstance(both[0], HasOwnPlace)
    for number, parts in enumerate(zip(*given, strict=False)):
        (_, items), (_, other) = parts
        assert items == other, f"batch {number} has {items} rows on rank 0, {other} on rank 1"
        for rank, (part, _) in enumerate(parts):
            rows, wanted = len(_inputs(part)), len(range(rank, items, 2))
            assert rows == wanted, f"batch {number}: rank {rank} has {rows} of {items} rows, not {wanted}"
    if not own:
        for number, whole in enumerate(islice(_source(subject).batches(size), min(map(len, given)))):
            for rank in range(2):
                same = all(
                    torch.allclose(part, expected[rank::2], rtol=1e-5, atol=1e-6)
                    for part, expected in zip(_tensors(given[rank][number][0]), _tensors(whole), strict=True)
                )
                assert same, f"batch {number}: rank {rank} has not the rows {rank}::2 of the batch"
        return
    places = [cast("HasOwnPlace", iterator).state_dict() for iterator in both]
    again = cast("GivesParts", _source(subject)).parts(size, 1, 2)
    assert isinstance(again, HasOwnPlace)
    again.load_places(copy.deepcopy(places))
    expected, found = next(both[1], None), next(again, None)
    assert (expected is None) == (found is None), "a rank that goes on ends elsewhere"
    if expected is not None and found is not None:
        assert _equal(expected[0], found[0]), "a rank that goes on gives another batch"
    alone = _source(subject).batches(size)
    assert isinstance(alone, HasOwnPlace), "`batches` cannot go on from the places of several ranks, with load_places"
    alone.load_places(copy.deepcopy(places))
    seen = [row for parts in given for part, _ in parts for row in _rows(part)]
    seen += [row for batch in islice(alone, 2) for row in _rows(batch)]
    pool = Counter(row for batch in islice(_source(subject).batches(size), 200) for row in _rows(batch))
    twice = [row for row, times in Counter(seen).items() if times > max(pool[row], 1)]
    assert not twice, f"{len(twice)} of {len(seen)} rows are given more often than they are there"


def check_sequences(subject: Subject) -> None:
    """With a `sequence_length`, batches are whole sequences: (sequences, sequence_length, width)."""
    source = _source(subject)
    length = _length(source)
    if length is None:
        raise NotApplicable("it gives rows, not sequences")
    width, size = sum(source.sites.values()), _size(subject)
    for number, batch in enumerate(islice(source.batches(size), _MOST)):
        shape = tuple(_inputs(batch).shape)
        assert shape[1:] == (length, width), f"batch {number} has shape {shape}, not (sequences, {length}, {width})"
        assert shape[0] * length <= size, (
            f"batch {number} has {shape[0] * length} positions, where {size} were asked for"
        )


def check_metadata(subject: Subject) -> None:
    """If it has `metadata`, they are plain data that JSON can hold, since they are kept with the SAE."""
    source = _source(subject)
    if not isinstance(source, HasMetadata):
        raise NotApplicable("it has no metadata()")
    facts = source.metadata()
    try:
        json.dumps(dict(facts), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise AssertionError(f"metadata() cannot be written as JSON: {error}") from None


def check_trains(subject: Subject) -> None:
    """The Trainer takes it as it is: a standard SAE, crosscoder or transcoder of its sites takes a few steps on it.

    The checkpoint of a run holds the source's `config`, if it has one, as plain data: a dataclass of numbers, text, paths.
    """
    source, size = _source(subject), _size(subject)
    sae = create("standard", d_sae=32, **fields_for(source, StandardSAE))
    config = TrainConfig(
        total_samples=3 * size, batch_size=size, init_samples=size, log_every_steps=1, progress_bar=False
    )
    trainer = Trainer(sae, source, config)
    result = trainer.fit()
    assert result.samples > 0, "nothing was trained on"
    trainer.save(subject.folder / "checkpoint")


def _check_sites(source: ActivationSource) -> None:
    assert isinstance(source, ActivationSource), f"{type(source).__name__} lacks sites or batches"
    described = [("sites", source.sites)]
    if isinstance(source, HasTargets):
        described.append(("target_sites", source.target_sites))
    assert source.sites, "sites is empty"
    for what, sites in described:
        for name, width in sites.items():
            assert isinstance(name, str), f"{what}: the name {name!r} is no text"
            assert isinstance(width, int), f"{what}: {name!r} has the width {width!r}"
            assert width > 0, f"{what}: {name!r} has the width {width!r}"


def _source(subject: Subject) -> ActivationSource:
    return cast("ActivationSource", subject.new())


def _size(subject: Subject) -> int:
    """A batch size: small, and at least two sequences."""
    return max(32, 2 * (_length(_source(subject)) or 0))


def _length(source: ActivationSource) -> int | None:
    return source.sequence_length if isinstance(source, GivesSequences) else None


def _target_sites(source: ActivationSource) -> dict[str, int]:
    return dict(source.target_sites) if isinstance(source, HasTargets) else {}


def _inputs(batch: Any) -> Tensor:
    return batch.inputs if isinstance(batch, ActivationBatch) else batch


def _rows(batch: Any) -> list[bytes]:
    """Its rows, or sequences, as something that can be compared."""
    return [row.contiguous().cpu().view(torch.uint8).numpy().tobytes() for row in _inputs(batch)]


def _tensors(batch: Any) -> Iterator[Tensor]:
    yield _inputs(batch)
    if isinstance(batch, ActivationBatch) and batch.targets is not None:
        yield batch.targets


def _equal(one: Any, two: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(_tensors(one), _tensors(two), strict=True))


CHECKS: tuple[Check, ...] = (
    check_class,
    check_options,
    check_batches,
    check_restarts,
    check_seed,
    check_resumes,
    check_parts,
    check_sequences,
    check_metadata,
    check_trains,
)
