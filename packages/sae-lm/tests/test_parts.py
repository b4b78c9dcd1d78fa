"""What several processes read of one stream: disjoint parts that together are all of it, however many there are later."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_core.config import structure
from sae_core.errors import ConfigError, DataError
from sae_core.protocols import ActivationSource, GivesParts
from sae_lm.cached import CachedActivations, CachedActivationsConfig
from sae_lm.caching import write_cache
from sae_lm.source import HuggingFaceSource, HuggingFaceSourceConfig
from torch import Tensor

BATCH = 8


@pytest.fixture
def make_source(llama: Any, tokenizer: Any, tmp_path: Path) -> Callable[..., HuggingFaceSource]:
    file = tmp_path / "text.txt"
    file.write_text("\n\n".join(f"Document {i}: {'word ' * (i * i % 11)}and {i * i}." for i in range(40)))

    def make(**changes: Any) -> HuggingFaceSource:
        settings: dict[str, Any] = {
            "model": "tiny-llama", "hook": "model.layers.1", "context_size": 16, "batch_prompts": 2, "buffer_rows": 120,
            "text": {"kind": "file", "path": str(file), "held_out": 0.1}, **changes,
        }  # fmt: skip
        return HuggingFaceSource(structure(settings, HuggingFaceSourceConfig), model=llama, tokenizer=tokenizer)

    return make


class Group:
    """The processes of a run, one after the other: batches until one of them has no more."""

    def __init__(self, source: ActivationSource, ranks: int, places: list[Any] | None = None) -> None:
        assert isinstance(source, GivesParts)
        self.iterators: list[Any] = (
            [source.parts(BATCH, rank, ranks) for rank in range(ranks)] if ranks > 1 else [source.batches(BATCH)]
        )
        for iterator in self.iterators if places is not None else ():
            iterator.load_places(places)

    def take(self, batches: int | None = None) -> list[list[Tensor]]:
        """What each rank gives of each batch."""
        found: list[list[Tensor]] = []
        while batches is None or len(found) < batches:
            parts = [next(iterator, None) for iterator in self.iterators]
            if None in parts:
                break
            found.append([part[0] if isinstance(part, tuple) else part for part in parts])
        return found

    def places(self) -> list[Any]:
        return [iterator.state_dict() for iterator in self.iterators]


def counted(batches: list[list[Tensor]]) -> Counter[tuple[float, ...]]:
    return Counter(tuple(row) for batch in batches for part in batch for row in part.tolist())


def all_of(source: HuggingFaceSource) -> Counter[tuple[float, ...]]:
    return counted([[source.activations(windows)] for windows in source.windows("train")])


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_model_runs_once_on_every_window_whoever_runs_it(
    make_source: Callable[..., HuggingFaceSource], monkeypatch: pytest.MonkeyPatch, ranks: int
) -> None:
    expected = all_of(make_source())
    source, runs = make_source(), Counter[bytes]()
    original = source.activations

    def activations(windows: Any) -> Tensor:
        runs[windows.tokens.numpy().tobytes()] += 1
        return original(windows)

    monkeypatch.setattr(source, "activations", activations)
    batches = Group(source, ranks).take()
    assert all(len(part) == len(range(rank, BATCH, ranks)) for batch in batches for rank, part in enumerate(batch))
    given = counted(batches)
    assert given <= expected
    assert given.total() > 0.8 * expected.total()  # the first rank that has no more ends it
    assert runs <= Counter(windows.tokens.numpy().tobytes() for windows in source.windows("train"))


@pytest.mark.parametrize(
    ("before", "after", "settings"),
    [(2, 2, {}), (1, 2, {}), (2, 1, {"prefetch": 1}), (3, 2, {"cache_activations": True}), (2, 2, {"prefetch": 1})],
)
def test_what_was_left_is_dealt_out_anew(
    make_source: Callable[..., HuggingFaceSource], before: int, after: int, settings: dict[str, Any]
) -> None:
    expected = all_of(make_source())
    twice = Counter({row: 2 * count for row, count in expected.items()})
    group = Group(make_source(epochs=2, **settings), before)
    per_pass = expected.total() // BATCH
    given = counted(group.take(per_pass - 2))  # ranks stand at both sides of the end of the first pass
    places = group.places()
    rest = Group(make_source(epochs=2, **settings), after, places).take()
    if before == after:
        again = group.take()
        assert len(again) == len(rest) > 0
        assert all(torch.equal(a, b) for x, y in zip(again, rest, strict=True) for a, b in zip(x, y, strict=True))
    given += counted(rest)
    assert given <= twice, "something is given more often than it is there"
    assert given.total() > 0.8 * twice.total()


def test_a_run_that_was_dealt_out_anew_can_be_dealt_out_once_more(
    make_source: Callable[..., HuggingFaceSource],
) -> None:
    expected = all_of(make_source())
    given, places = Counter[tuple[float, ...]](), None
    for ranks in (2, 3, 1, 2):
        group = Group(make_source(), ranks, places)
        given += counted(group.take(3))
        places = group.places()
    given += counted(Group(make_source(), 2, places).take())
    assert given <= expected
    assert given.total() > 0.8 * expected.total()


def test_ranks_shuffle_each_in_its_own_way_and_the_same_way_every_time(
    make_source: Callable[..., HuggingFaceSource],
) -> None:
    first, again = (Group(make_source(), 2).take(4) for _ in range(2))
    assert all(torch.equal(a, b) for x, y in zip(first, again, strict=True) for a, b in zip(x, y, strict=True))
    other = Group(make_source(seed=1), 2).take(1)
    assert not torch.equal(first[0][0], other[0][0])


def test_a_cache_is_dealt_out_and_gives_what_the_model_gives(
    make_source: Callable[..., HuggingFaceSource], tmp_path: Path
) -> None:
    source = make_source()
    write_cache(source, tmp_path / "cache")
    cached = CachedActivations(structure({"path": str(tmp_path / "cache")}, CachedActivationsConfig))
    live, stored = Group(source, 2).take(), Group(cached, 2).take()
    assert len(live) == len(stored) > 10
    assert all(torch.equal(a, b) for x, y in zip(live, stored, strict=True) for a, b in zip(x, y, strict=True))


def test_sequences_are_dealt_out_whole(make_source: Callable[..., HuggingFaceSource]) -> None:
    source = make_source(sequences=True, buffer_rows=400, context_size=8)
    parts = source.parts(21 * 3, 0, 2), source.parts(21 * 3, 1, 2)
    for first, second in islice(zip(*parts, strict=False), 2):
        assert (first[0].shape, first[1]) == ((5, 7, 32), 9)
        assert (second[0].shape, second[1]) == ((4, 7, 32), 9)


def test_too_little_for_so_many_processes_is_an_error(make_source: Callable[..., HuggingFaceSource]) -> None:
    with pytest.raises(
        ConfigError, match=r"buffer_rows: 120 over 8 processes cannot hold .* on each .* set it to 1056"
    ):
        make_source().parts(BATCH, 0, 8)
    few = make_source(batch_prompts=64, buffer_rows=40_000, context_size=64)
    with pytest.raises(DataError, match="leaves nothing for rank 5 of 8 processes"):
        next(few.parts(BATCH, 5, 8))


def test_a_fingerprint_tells_texts_and_models_apart(
    make_source: Callable[..., HuggingFaceSource], tmp_path: Path, tokenizer: Any
) -> None:
    (tmp_path / "other.txt").write_text("Other words.\n\nAnd more of them, for windows.")
    first, again, other = (
        make_source(),
        make_source(seed=5),
        make_source(text={"kind": "file", "path": str(tmp_path / "other.txt"), "held_out": 0.0}),
    )
    from transformers import LlamaForCausalLM

    changed = LlamaForCausalLM(first.language_model.model.config)
    model = HuggingFaceSource(first.config, model=changed, tokenizer=tokenizer)
    assert first.fingerprint() == again.fingerprint()
    assert len({first.fingerprint(), other.fingerprint(), model.fingerprint()}) == 3
