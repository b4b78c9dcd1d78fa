"""`CachedActivations`: activations from a cache on disk, in place of running the model.

It reads the shards one after the other, chunk by chunk, through the same shuffle buffer as the live source: with the same
seed and buffer the batches are the same bits. Each shard's hash is checked when it is first opened. Caches that SAELens
wrote, folders of Arrow files with a column a hook point, are read the same way.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, cast, final

import torch
from sae_core import SAE
from sae_core.config import check_fields, option, require, structure
from sae_core.data.shuffle import ShuffleBuffer
from sae_core.errors import ConfigError, FormatError, did_you_mean
from torch import Tensor

from sae_lm.batches import Batches, Chunk, Parts, Passes
from sae_lm.caching import CACHE_FILE, read_cache
from sae_lm.inputs import explaining_memory
from sae_lm.model import place
from sae_lm.shards import check_hash
from sae_lm.source import HeldOutConfig, HuggingFaceSource, HuggingFaceSourceConfig, pick

__all__ = ["CachedActivations", "CachedActivationsConfig"]

_ROWS_AT_ONCE = 2048  # of a cache that keeps no boundaries of its own


@dataclass(frozen=True, kw_only=True)
class CachedActivationsConfig:
    """Which cache to read, and how to shuffle it."""

    path: Path = option(help="folder that `sae-core lm cache` wrote, or one of SAELens's caches of activations")
    reads: tuple[str, ...] = option(
        default=(), help="places to read, of those in the cache; if not given, as it was made"
    )
    writes: tuple[str, ...] = option(
        default=(), help="places that the dictionary writes to; if not given, as it was made"
    )
    buffer_rows: int | None = option(
        default=None,
        help="activations in the shuffle buffer, which several processes share out; if not given, as many as the source had "
        "that was cached",
    )
    buffer_device: str = option(default="cpu", help="where the buffer is, and with it the batches")
    activation_dtype: Literal["stored", "float32", "bfloat16", "float16"] = option(
        default="stored", help="precision of the activations handed out"
    )
    exclude_token_ids: tuple[int, ...] = option(
        default=(), help="tokens whose rows are left out, where the cache has token ids"
    )
    epochs: int = option(default=1, help="passes over the cache")
    on_exhausted: Literal["stop", "cycle", "error"] = option(
        default="stop", help="when more is asked for than these passes give: end training there, go on, or fail"
    )
    verify: bool = option(default=True, help="check the hash of every shard before it is first read")
    seed: int = option(default=0, help="seed of the shuffling")

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("epochs", "buffer_rows"):
            value = getattr(self, name)
            require(value is None or value > 0, f"{name} must be positive, not {value}")
        require(not self.writes or bool(self.reads), "writes: name the places to read, too, with reads")


class _Store(Protocol):
    """The chunks of a cache: how many, the largest, and each of them by its number."""

    sites: Mapping[str, int]
    reads: list[str]
    writes: list[str]
    sequence_length: int | None
    buffer_rows: int
    chunks: int
    largest: int

    def chunk(self, number: int, names: list[str]) -> tuple[dict[str, Tensor], Tensor | None]:
        """The places asked for, and the token ids of the rows if there are any."""
        ...

    def fingerprint(self) -> str: ...

    def metadata(self) -> dict[str, Any]: ...


@final
class CachedActivations:
    """Activations of a cache, shuffled.

    Batches are as the cached source gave them: (batch_size, width of all `sites`), pairs with targets, or sequences. Raises
    FormatError for a folder that is no cache, or a shard that is damaged.
    """

    config_class: ClassVar[type[CachedActivationsConfig]] = CachedActivationsConfig
    held_out_class: ClassVar[type[HeldOutConfig]] = HeldOutConfig

    def __init__(self, config: CachedActivationsConfig) -> None:
        self.config = config

    @cached_property
    def _store(self) -> _Store:
        folder = self.config.path
        if (folder / CACHE_FILE).is_file():
            return _Shards(folder, verify=self.config.verify)
        if (folder / "state.json").is_file():
            return _ArrowCache(folder)
        raise FormatError(
            f"{folder}: neither a cache of `sae-core lm cache` ({CACHE_FILE}) nor one of SAELens (state.json)"
        )

    def _chosen(self, asked: tuple[str, ...], default: list[str]) -> list[str]:
        names = list(asked) or default
        for name in names:
            if name not in self._store.sites:
                known = ", ".join(self._store.sites)
                near = did_you_mean(name, self._store.sites)
                raise ConfigError(f"{self.config.path}: no place {name!r} in this cache{near} (it holds: {known})")
        return names

    @property
    def sites(self) -> Mapping[str, int]:
        """Width of every place that is read, in the order of the columns."""
        return {name: self._store.sites[name] for name in self._chosen(self.config.reads, self._store.reads)}

    @property
    def target_sites(self) -> Mapping[str, int]:
        """Width of every place that is written to; empty where there are none."""
        default = [] if self.config.reads else self._store.writes
        return {name: self._store.sites[name] for name in self._chosen(self.config.writes, default)}

    @property
    def _stored(self) -> Mapping[str, int]:
        return {**self.sites, **self.target_sites}

    @property
    def d_in(self) -> int:
        """Width of the activations that are read."""
        return sum(self.sites.values())

    @property
    def sequence_length(self) -> int | None:
        """Positions of the sequences that are handed out; None where it is single rows."""
        return self._store.sequence_length

    def batches(self, batch_size: int) -> Batches:
        """Shuffled batches of `batch_size` activations until the passes over the cache are used up; `Resumable`.

        Raises ConfigError when the buffer is too small for a batch.
        """
        return Batches(self._passes, self._batch_rows(batch_size))

    def parts(self, batch_size: int, rank: int, ranks: int) -> Parts:
        """The share of one of several processes: it reads every `ranks`-th chunk."""
        return Parts(self._passes, self._batch_rows(batch_size), rank, ranks)

    def fingerprint(self) -> str:
        """Of what the cache says of its shards, or of the first sequences where it says nothing."""
        return self._store.fingerprint()

    def _batch_rows(self, batch_size: int) -> int:
        positions = self._store.sequence_length or 1
        require(
            batch_size >= positions,
            f"batch_size: {batch_size} positions do not hold one sequence of {positions}; raise it",
        )
        return batch_size // positions

    @property
    def _passes(self) -> Passes:
        config, store = self.config, self._store
        positions = store.sequence_length or 1
        return Passes(
            name=str(config.path),
            open=self._open_pass,
            new_buffer=lambda rows, seed: self._new_buffer(rows, positions, seed),
            buffer_rows=(config.buffer_rows or store.buffer_rows) // positions,
            seed=config.seed,
            hand_out=lambda rows: pick(rows, self._stored, self.sites, self.target_sites, store.sequence_length),
            largest_chunk=store.largest,
            epochs=config.epochs,
            on_exhausted=config.on_exhausted,
            empty=f"{config.path}: the cache gives no row to train on",
            positions=positions,
        )

    def _new_buffer(self, rows: int, positions: int, seed: int) -> ShuffleBuffer:
        sample = self._chunk(0)[:0]
        with explaining_memory(f"a shuffle buffer of {rows * positions:,} activations", "buffer_rows"):
            return ShuffleBuffer(
                rows,
                sample.shape[1],
                seed=seed,
                dtype=sample.dtype,
                device=place(self.config.buffer_device),
            )

    def _open_pass(
        self, place_: Mapping[str, Any] | None, first: int, wanted: Callable[[int], bool]
    ) -> Iterator[Chunk]:
        for number in filter(wanted, range(first, self._store.chunks)):
            behind = {"chunk": number + 1}
            yield Chunk(number, self._chunk(number), behind.copy)

    def _chunk(self, number: int) -> Tensor:
        """(rows, width), or (sequences, positions * width), of one chunk: the places side by side."""
        names = list(self._stored)
        found, tokens = self._store.chunk(number, names)
        joined = torch.cat([found[name] for name in names], dim=-1) if len(names) > 1 else found[names[0]]
        if self.config.exclude_token_ids:
            if tokens is None or joined.dim() == 3:
                raise ConfigError(
                    f"{self.config.path}: exclude_token_ids needs rows with token ids, which this cache has not"
                )
            joined = joined[~torch.isin(tokens, torch.tensor(self.config.exclude_token_ids, dtype=tokens.dtype))]
        if self.config.activation_dtype != "stored":
            joined = joined.to(getattr(torch, self.config.activation_dtype))
        return joined.flatten(1)

    def held_out(self, config: HeldOutConfig) -> Callable[[SAE[Any]], Mapping[str, float]]:
        """As `HuggingFaceSource.held_out`: the model that was cached is loaded for it, and text held out from the cached one.

        Raises ConfigError for a cache that does not say which model and text it is of.
        """
        from sae_lm.held_out import held_out

        return held_out(HuggingFaceSource.from_metadata(self.metadata()), config)

    def metadata(self) -> dict[str, Any]:
        """What the activations are, as the source said whose activations were cached; for the places that are read."""
        facts = self._store.metadata()
        reads, writes = list(self.sites), list(self.target_sites)
        facts["hook_name"] = reads[0] if len(reads) == 1 else None
        facts.pop("hook_name_out", None)
        if writes:
            facts["hook_name_out"] = writes[0] if len(writes) == 1 else None
        ours = facts.get("sae_lm")
        if ours is not None:
            is_second = any(name.startswith("second/") for name in [*reads, *writes])
            source = {**ours["source"], "hook": None, "reads": reads, "writes": writes}
            if not is_second:
                source.update(second_model=None, second_revision=None)
            if len(reads) == 1 and not is_second:
                source.update(hook=reads[0], reads=[])
            facts["sae_lm"] = {
                **ours, "source": source, "hook_point": ours["sites"][reads[0]],
                "sites": {name: ours["sites"][name] for name in dict.fromkeys([*reads, *writes])},
            }  # fmt: skip
        return facts


@final
class _Shards:
    """The chunks of a cache that `write_cache` wrote: those of the shards that were whole when it was opened."""

    def __init__(self, folder: Path, *, verify: bool) -> None:
        record = read_cache(folder)
        config = structure(
            {**record["config"], "buffer_rows": record["buffer_rows"]}, HuggingFaceSourceConfig, where=str(folder)
        )
        self._folder, self._record, self._verify = folder, record, verify
        self._counts: list[list[int]] = [shard["chunks"] for shard in record["shards"]]
        self._ends = list(accumulate(len(counts) for counts in self._counts))
        self.sites: Mapping[str, int] = record["sites"]
        self.reads = [site.name for site in config.read_sites]
        self.writes = [site.name for site in config.write_sites]
        self.sequence_length: int | None = record["sequence_length"]
        self.buffer_rows: int = record["buffer_rows"]
        self.chunks = self._ends[-1]
        positions = config.batch_prompts if self.sequence_length else config.batch_prompts * config.context_size
        self.largest = positions
        self._checked: set[int] = set()
        self._current: tuple[int, Any] | None = None

    def chunk(self, number: int, names: list[str]) -> tuple[dict[str, Tensor], Tensor | None]:
        shard = next(index for index, end in enumerate(self._ends) if number < end)
        inside = number - (self._ends[shard - 1] if shard else 0)
        start = sum(self._counts[shard][:inside])
        rows = slice(start, start + self._counts[shard][inside])
        file = self._open(shard)
        found = {name: file.get_slice(name)[rows] for name in names}
        return found, None if self.sequence_length else file.get_slice("token_ids")[rows]

    def _open(self, shard: int) -> Any:
        from safetensors import SafetensorError, safe_open

        if self._current is not None and self._current[0] == shard:
            return self._current[1]
        entry = self._record["shards"][shard]
        path = self._folder / entry["file"]
        remedy = "delete it and run `sae-core lm cache` again, which goes on from the shard before it"
        if shard not in self._checked:
            if self._verify:
                check_hash(path, entry["sha256"], remedy)
            self._checked.add(shard)
        try:
            file: Any = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise FormatError(f"{path}: cannot be read: {error}; {remedy}") from None
        self._current = (shard, file)
        return file

    def fingerprint(self) -> str:
        fixed = {**self._record, "shards": self._record["shards"][:1]}  # more may be written meanwhile
        return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()[:12]

    def metadata(self) -> dict[str, Any]:
        return dict(self._record["metadata"])


@final
class _ArrowCache:
    """A cache that SAELens wrote: a data set of sequences, a column (positions, width) a hook point."""

    def __init__(self, folder: Path) -> None:
        import datasets

        try:
            data: Any = datasets.load_from_disk(folder)
        except (OSError, ValueError) as error:
            raise FormatError(f"{folder}: not a cache of activations: {error}") from error
        shapes = {name: tuple(feature.shape) for name, feature in data.features.items() if hasattr(feature, "shape")}
        shapes = {name: shape for name, shape in shapes.items() if len(shape) == 2}
        if not shapes:
            raise FormatError(
                f"{folder}: no column of shape (positions, width); its columns: {', '.join(data.features)}"
            )
        lengths = {shape[0] for shape in shapes.values()}
        if len(lengths) > 1:
            raise FormatError(f"{folder}: columns of different lengths: {shapes}")
        self._data = data.with_format("torch")
        self._has_tokens = "token_ids" in data.features
        self.sites: Mapping[str, int] = {name: shape[1] for name, shape in shapes.items()}
        self.reads = list(self.sites)
        self.writes: list[str] = []
        self.sequence_length: int | None = None
        self._at_once = max(1, _ROWS_AT_ONCE // lengths.pop())
        self.largest = self._at_once * next(iter(shapes.values()))[0]
        self.buffer_rows = max(65_536, 4 * self.largest)
        self.chunks = -(-len(data) // self._at_once)

    def chunk(self, number: int, names: list[str]) -> tuple[dict[str, Tensor], Tensor | None]:
        columns = [*names, "token_ids"] if self._has_tokens else names
        rows = self._data.select_columns(columns)[number * self._at_once : (number + 1) * self._at_once]
        found = {name: cast("Tensor", rows[name]).flatten(0, 1) for name in names}
        return found, cast("Tensor", rows["token_ids"]).flatten() if self._has_tokens else None

    def fingerprint(self) -> str:
        found, _ = self.chunk(0, list(self.sites))
        first = b"".join(rows.contiguous().view(torch.uint8).numpy().tobytes() for rows in found.values())
        return f"{len(self._data)} sequences, {hashlib.sha256(first).hexdigest()[:12]}"

    def metadata(self) -> dict[str, Any]:
        return {}
