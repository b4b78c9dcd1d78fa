"""Text tokenised once and for all: windows of token ids in parquet files, with the policy they were made by.

A folder of it holds ``pretokenized.json``, which says which text, tokenizer and token policy it comes from and lists the files
with their hashes, and one folder for the text to train on and one for the text held out from it: documents are chosen before
they are cut into windows, so no document is on both sides. Files are listed once they are on disk whole, and an interrupted
run goes on behind the last of them.

Where such a text is used, its policy must be the one asked for: windows that were made otherwise are an error, not a surprise.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from sae_core.config import require, unstructure
from sae_core.errors import ConfigError, DataError, FormatError
from sae_core.format.write import write_atomically

from sae_lm.shards import check_hash, differences, file_hash, read_record, write_record
from sae_lm.tokens import Mark, TokenRules

if TYPE_CHECKING:
    from sae_lm.source import HuggingFaceSource

__all__ = ["PRETOKENIZED_FILE", "check_policy", "pretokenize", "read_pretokenized", "windows_of"]

log = logging.getLogger(__name__)

PRETOKENIZED_FILE = "pretokenized.json"
FORMAT = 1
_PARTS = ("train", "held_out")
# What counts is decided where windows are used; how they were cut is not.
_AT_USE = frozenset(
    {"exclude_bos", "exclude_eos", "exclude_first", "exclude_last", "exclude_special_tokens", "exclude_tokens"}
)
_SAE_LENS_LAYOUT = "6.28.0"  # the version of SAELens whose sae_lens.json this writes


def pretokenize(
    source: HuggingFaceSource,
    folder: Path,
    *,
    rows: int | None = None,
    shuffle: bool = False,
    rows_per_file: int = 65_536,
    after_file: Callable[[str, int], None] | None = None,
) -> dict[str, Any]:
    """Write the windows of the source's text into `folder`, or the first `rows` of each part; no model is loaded.

    `shuffle` puts the windows of each file into a random order, by the source's seed. An unfinished folder is continued,
    with the same result. `after_file` is told the part and its windows so far. Returns what ``pretokenized.json`` says.
    Raises ConfigError when the folder holds something else.
    """
    require(rows is None or rows > 0, f"rows must be positive, not {rows}")
    require(source.config.text.kind != "pretokenized", "text: is pretokenised already")
    record = _begin(source, folder, rows, shuffle, rows_per_file)
    folder.mkdir(parents=True, exist_ok=True)
    write_record(folder / PRETOKENIZED_FILE, record)
    for part in _PARTS:
        if part == "held_out" and not source.config.text.held_out:
            record["parts"][part]["complete"] = True
        if not record["parts"][part]["complete"]:
            (folder / part).mkdir(exist_ok=True)
            _write_part(source, folder, part, record, after_file)
    if not sum(file["rows"] for file in record["parts"]["train"]["files"]):
        raise DataError(f"text: {source.config.text.description} gives no window to train on")
    write_record(folder / PRETOKENIZED_FILE, record)
    write_record(folder / "sae_lens.json", _for_sae_lens(source, record))
    return record


def _begin(
    source: HuggingFaceSource, folder: Path, rows: int | None, shuffle: bool, rows_per_file: int
) -> dict[str, Any]:
    config = source.config
    record: dict[str, Any] = {
        "format": FORMAT,
        "tokenizer": config.tokenizer or config.model,
        "text": unstructure(config.text),
        "context_size": config.context_size,
        "tokens": source.rules.metadata(),
        "limit": rows,
        "shuffled": config.seed if shuffle else None,
        "rows_per_file": rows_per_file,
        "parts": {part: {"files": [], "place": None, "complete": False} for part in _PARTS},
    }
    if not (folder / PRETOKENIZED_FILE).exists():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ConfigError(f"{folder}: is there and holds no pretokenised text; choose a new folder")
        return record
    there = read_record(folder / PRETOKENIZED_FILE, "pretokenised text", FORMAT)
    unlike = [line for key in record if key != "parts" for line in differences(there[key], record[key], key)]
    if unlike:
        raise ConfigError(
            f"{folder}: holds windows that were made otherwise ({'; '.join(unlike[:3])}); choose another folder"
        )
    for part in _PARTS:
        for file in there["parts"][part]["files"]:
            check_hash(folder / file["file"], file["sha256"], "delete the folder and begin anew")
    return there


def _write_part(
    source: HuggingFaceSource,
    folder: Path,
    part: Literal["train", "held_out"],
    record: dict[str, Any],
    after_file: Callable[[str, int], None] | None,
) -> None:
    state = record["parts"][part]
    done = sum(file["rows"] for file in state["files"])
    for windows, mark, is_last in _groups(source, part, state["place"], done, record["limit"], record["rows_per_file"]):
        number = len(state["files"])
        if record["shuffled"] is not None:
            generator = torch.Generator().manual_seed((int(record["shuffled"]) << 20) + number)
            windows = [windows[index] for index in torch.randperm(len(windows), generator=generator).tolist()]
        if windows:
            path = folder / part / f"part-{number:05}.parquet"
            write_atomically(path, lambda temporary, windows=windows: _write_parquet(temporary, windows))
            state["files"].append({"file": f"{part}/{path.name}", "rows": len(windows), "sha256": file_hash(path)})
            done += len(windows)
        state["place"] = {
            "documents": mark.documents, "packing": mark.packing, "pending": mark.pending, "position": mark.position
        }  # fmt: skip
        if is_last:
            state.update(place=None, complete=True)
        write_record(folder / PRETOKENIZED_FILE, record)
        if after_file is not None:
            after_file(part, done)


def _groups(
    source: HuggingFaceSource,
    part: Literal["train", "held_out"],
    place: Mapping[str, Any] | None,
    done: int,
    limit: int | None,
    per_file: int,
) -> Iterator[tuple[list[list[int]], Mark, bool]]:
    """Windows without their padding, a file's worth at a time, each with the place behind them."""
    state = None if place is None else Mark(**place).state_dict()
    at_once = min(256, per_file)
    stream = source.windows(part, rows=at_once, state=state)
    group: list[list[int]] = []
    for windows in stream:
        lengths = windows.attended.sum(1).tolist()
        group += [row[:length] for row, length in zip(windows.tokens.tolist(), lengths, strict=True)]
        if limit is not None and done + len(group) >= limit:
            yield group[: limit - done], stream.mark(), True
            return
        if len(group) + at_once > per_file:
            yield group, stream.mark(), False
            done += len(group)
            group = []
    yield group, stream.mark(), True


def _write_parquet(path: Path, windows: list[list[int]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    column = pa.array(windows, type=pa.list_(pa.int32()))
    pq.write_table(pa.table({"input_ids": column}), path)


def _for_sae_lens(source: HuggingFaceSource, record: Mapping[str, Any]) -> dict[str, Any]:
    """The same facts in the words of SAELens, which reads them beside a data set of the Hub."""
    config, rules, text = source.config, source.rules, source.config.text
    return {
        "sae_lens_version": _SAE_LENS_LAYOUT,
        "tokenizer_name": record["tokenizer"],
        "original_dataset": text.description,
        "original_dataset_name": text.name,
        "original_split": text.split,
        "original_data_files": list(text.data_files),
        "original_column_name": text.column,
        "context_size": config.context_size,
        "shuffled": record["shuffled"] is not None,
        "seed": record["shuffled"],
        "begin_batch_token": "bos" if rules.bos == "window" else None,
        "begin_sequence_token": "bos" if rules.bos == "document" else None,
        "sequence_separator_token": "eos" if rules.eos_id is not None else None,
        "disable_concat_sequences": rules.policy.packing in ("document", "rows"),
    }


def read_pretokenized(folder: Path) -> dict[str, Any]:
    """What ``pretokenized.json`` says. Raises FormatError when there is none, or when the text is not complete."""
    record = read_record(folder / PRETOKENIZED_FILE, "pretokenised text", FORMAT)
    if not all(record["parts"][part]["complete"] for part in _PARTS):
        raise FormatError(
            f"{folder}: pretokenising did not come to its end; run `sae-core lm pretokenize` again, which goes on"
        )
    return record


def windows_of(folder: Path, part: Literal["train", "held_out", "all"]) -> Iterator[list[int]]:
    """The windows of a part in their order; each file's hash is checked when it is opened."""
    record = read_pretokenized(folder)
    parts = _PARTS if part == "all" else (part,)
    return _windows(folder, [file for each in parts for file in record["parts"][each]["files"]])


def _windows(folder: Path, files: list[dict[str, Any]]) -> Iterator[list[int]]:
    import pyarrow.parquet as pq

    for entry in files:
        path = folder / entry["file"]
        check_hash(path, entry["sha256"], "delete the folder and pretokenise anew")
        for batch in pq.ParquetFile(path).iter_batches(batch_size=1024, columns=["input_ids"]):
            yield from batch.column(0).to_pylist()


def check_policy(folder: Path, rules: TokenRules, held_out: float) -> None:
    """Raise ConfigError unless the windows in `folder` were made by `rules` and with this much held out."""
    record = read_pretokenized(folder)

    def of_making(tokens: Mapping[str, Any]) -> dict[str, Any]:
        resolved = {key: value for key, value in tokens["resolved"].items() if key != "excluded_ids"}
        return {**{key: value for key, value in tokens.items() if key not in _AT_USE}, "resolved": resolved}

    unlike = differences(record["context_size"], rules.context_size, "context_size")
    unlike += differences(of_making(record["tokens"]), of_making(rules.metadata()), "tokens")
    unlike += differences(record["text"]["held_out"], held_out, "text.held_out")
    if unlike:
        raise ConfigError(
            f"text: the windows in {str(folder)!r} were made by another policy ({'; '.join(unlike[:4])}); ask for that one, or "
            "pretokenise anew"
        )
