"""A cache of activations on disk: written shard by shard as the model runs, and read back as a source.

A cache is a folder: ``cache.json`` says which places of which model on which text it holds, in which precision, and lists the
shards, each with its rows and SHA-256; ``shard-00000.safetensors`` and so on hold one tensor a place, (rows, width) or
(sequences, positions, width), and beside them ``token_ids`` and ``positions`` of the rows. A shard is listed once it is on disk
whole, so a cache can be read while it is written, and writing goes on behind the last whole shard after an interruption:
what of the text was not used up yet is in the shard too.

The boundaries of the batches of windows are kept. A source that reads the cache through the same shuffle buffer gives the
same batches, bit for bit, as one that runs the model.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from sae_core.config import require, unstructure
from sae_core.errors import ConfigError, DataError
from sae_core.format.write import write_atomically
from torch import Tensor

from sae_lm.shards import check_space, differences, file_hash, read_record, write_record
from sae_lm.source import HuggingFaceSource
from sae_lm.tokens import Mark

__all__ = ["CACHE_FILE", "FORMAT", "Estimate", "estimate", "read_cache", "write_cache"]

log = logging.getLogger(__name__)

CACHE_FILE = "cache.json"
FORMAT = 1

# Settings that change neither which rows there are nor what is in them.
_INDIFFERENT = frozenset(
    {
        "device",
        "buffer_rows",
        "buffer_device",
        "prefetch",
        "epochs",
        "on_exhausted",
        "cache_activations",
        "cache_limit_gb",
        "seed",
    }
)


@final
@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a cache will hold: rows, places with their widths, precision, and bytes."""

    rows: int
    sites: Mapping[str, int]
    dtype: str
    bytes: int


def estimate(source: HuggingFaceSource, rows: int | None = None) -> Estimate:
    """What `write_cache` would write. The text is tokenised for it, as far as it takes; of the model one token is run.

    Raises ConfigError for a text whose end is not known, unless `rows` says how many are wanted.
    """
    require(rows is None or rows > 0, f"rows must be positive, not {rows}")
    text = source.config.text
    streamed = text.streaming or any(part.streaming for part in text.mixture)
    require(
        rows is not None or not streamed,
        "a streamed data set has no end that is known here; say how many rows are wanted",
    )
    length = source.sequence_length or 1
    found = 0
    for windows in source.windows("train"):
        found += source.chosen(windows).numel()
        if rows is not None and found >= rows:
            break
    sample = source.by_site(source.one_token, torch.tensor([0]))
    width = sum(part.shape[-1] * part.element_size() for part in sample.values())
    dtypes = sorted({str(part.dtype).removeprefix("torch.") for part in sample.values()})
    extra = 8 if length == 1 else 8 * length
    return Estimate(
        rows=found,
        sites=dict(source.stored_sites),
        dtype=" and ".join(dtypes),
        bytes=found * width + found // length * extra,
    )


def write_cache(
    source: HuggingFaceSource,
    folder: Path,
    *,
    rows: int | None = None,
    planned: Estimate | None = None,
    shard_bytes: float = 256e6,
    after_shard: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Write the activations of one pass over the training text, or the first `rows` of them, into `folder`.

    An unfinished cache there is continued; the result is the same as without the interruption. `planned` is the estimate,
    if it was made before; `after_shard` is told the shards and rows so far. Returns what ``cache.json`` says. Raises
    ConfigError when the folder holds a cache of something else, or when the disk is too full.
    """
    record = _begin(source, folder, rows)
    if record["complete"]:
        return record
    planned = planned or estimate(source, rows)
    check_space(folder, planned.bytes - sum(shard["bytes"] for shard in record["shards"]))
    if planned.rows == 0:
        raise DataError(f"text: {source.config.text.description} gives nothing to be cached")
    folder.mkdir(parents=True, exist_ok=True)
    write_record(folder / CACHE_FILE, record)
    done = sum(shard["rows"] for shard in record["shards"])
    per_row = planned.bytes / planned.rows
    for shard in _shards(source, folder, record, limit=rows, largest=max(1, int(shard_bytes / per_row))):
        number = len(record["shards"])
        path = folder / f"shard-{number:05}.safetensors"
        record["shards"].append(shard.write(path))
        done += shard.rows
        record["rows"] = done
        record["complete"] = shard.is_last
        write_record(folder / CACHE_FILE, record)
        if after_shard is not None:
            after_shard(number + 1, done)
    return record


def _begin(source: HuggingFaceSource, folder: Path, rows: int | None) -> dict[str, Any]:
    """The record of the cache to be written: a new one, or that of a cache of the same that is there."""
    config = {key: value for key, value in unstructure(source.config).items() if key not in _INDIFFERENT}
    record: dict[str, Any] = {
        "format": FORMAT,
        "sites": dict(source.stored_sites),
        "sequence_length": source.sequence_length,
        "config": config,
        "buffer_rows": source.config.buffer_rows,
        "metadata": source.metadata(),
        "limit": rows,
        "rows": 0,
        "shards": [],
        "complete": False,
    }
    if not (folder / CACHE_FILE).exists():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ConfigError(f"{folder}: is there and holds no cache; choose a new folder")
        return record
    there = read_record(folder / CACHE_FILE, "cache of activations", FORMAT)
    same = ("sites", "sequence_length", "config", "limit")
    unlike = [line for key in same for line in differences(there[key], record[key], key)]
    tokens = [part["metadata"]["sae_lm"]["tokens"] for part in (there, record)]
    unlike += differences(tokens[0], tokens[1], "tokens")
    if unlike:
        raise ConfigError(f"{folder}: holds a cache of something else ({'; '.join(unlike[:3])}); choose another folder")
    for number, shard in enumerate(there["shards"]):
        path = folder / shard["file"]
        if not path.is_file() or path.stat().st_size != shard["bytes"]:
            log.warning("%s: missing or cut short; it and the shards behind it are written again", path)
            there.update(shards=there["shards"][:number], complete=False)
            there["rows"] = sum(each["rows"] for each in there["shards"])
            break
    return there


@final
class _Shard:
    """Chunks collected for one file."""

    def __init__(self) -> None:
        self.parts: dict[str, list[Tensor]] = {}
        self.chunks: list[int] = []
        self.rows = 0
        self.is_last = False
        self.mark: Mark | None = None

    def add(self, tensors: Mapping[str, Tensor], count: int, mark: Mark) -> None:
        for name, tensor in tensors.items():
            self.parts.setdefault(name, []).append(tensor.to("cpu"))
        self.chunks.append(len(next(iter(tensors.values()))))
        self.rows += count
        self.mark = mark

    def write(self, path: Path) -> dict[str, Any]:
        """Write the file; what ``cache.json`` says of it."""
        from safetensors.torch import save_file

        assert self.mark is not None
        place = self.mark.state_dict()
        tensors = {name: torch.cat(parts).contiguous() for name, parts in self.parts.items()}
        tensors |= {"rest_ids": place["ids"], "rest_lengths": place["lengths"]}
        write_atomically(path, lambda temporary: save_file(tensors, temporary))
        return {
            "file": path.name, "rows": self.rows, "chunks": self.chunks,
            "bytes": path.stat().st_size, "sha256": file_hash(path),
            "documents": place["documents"], "packing": place["packing"], "position": place["position"],
        }  # fmt: skip


def _shards(
    source: HuggingFaceSource, folder: Path, record: Mapping[str, Any], *, limit: int | None, largest: int
) -> Iterator[_Shard]:
    """Shards of at most `largest` rows (or one batch of windows) from where the record stands, the last one marked."""
    stream = source.windows("train", state=_place(folder, record))
    done = record["rows"]
    shard, waiting = _Shard(), None
    for windows in stream:
        chosen = source.chosen(windows)
        tensors = source.by_site(windows, chosen)
        tokens = {
            "token_ids": windows.tokens,
            "positions": torch.arange(windows.tokens.shape[1]).expand_as(windows.tokens),
        }
        tensors |= {name: value.flatten()[chosen].to(torch.int32) for name, value in tokens.items()}
        if waiting is not None and shard.rows + chosen.numel() > largest:
            yield waiting
            shard, waiting = _Shard(), None
        shard.add(tensors, chosen.numel(), stream.mark())
        waiting = shard
        done += chosen.numel()
        if limit is not None and done >= limit:
            break
    if waiting is None:  # the text ends where the record stands
        shard.is_last = True
        return
    waiting.is_last = True
    yield waiting


def _place(folder: Path, record: Mapping[str, Any]) -> dict[str, Any] | None:
    """The place in the text behind the last shard."""
    from safetensors import safe_open

    if not record["shards"]:
        return None
    last = record["shards"][-1]
    with safe_open(folder / last["file"], framework="pt") as file:
        rest = {name: file.get_tensor(f"rest_{name}") for name in ("ids", "lengths")}
    return {**{key: last.get(key) for key in ("documents", "packing", "position")}, **rest}


def read_cache(folder: Path) -> dict[str, Any]:
    """What ``cache.json`` says. Raises FormatError when there is none, or one without a whole shard yet."""
    record = read_record(folder / CACHE_FILE, "cache of activations", FORMAT)
    if not record["shards"]:
        raise DataError(f"{folder}: this cache has no whole shard yet")
    return record
