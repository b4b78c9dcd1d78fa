"""Documents to run a model on, from local files, a `datasets` data set, or Python's own standard library.

`documents` yields them one at a time and in a fixed order. Part of them is held out for evaluation, chosen by a hash of
each document's content: the choice needs no bookkeeping, is the same in every run and on every machine, and puts copies
of a document on the same side, so that nothing evaluated was trained on.

A document is a string; in a column that is tokenised already, token ids; or a conversation. Several texts may be mixed:
whichever is furthest behind its weight gives the next document, so the order is fixed there too.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast, final

from sae_core.config import check_fields, option, require
from sae_core.errors import DataError

from sae_lm.pretokenized import windows_of
from sae_lm.reading import Document, FileFormat, Rows, content_of, file_format, find_files, read_file
from sae_lm.stdlib_text import stdlib_docstrings

__all__ = [
    "DatasetConfig",
    "Documents",
    "Part",
    "TextConfig",
    "documents",
    "is_held_out",
    "open_dataset",
    "require_held_out",
    "skipped",
]

log = logging.getLogger(__name__)

Part = Literal["train", "held_out", "all"]

_DATASET_ONLY = ("name", "split", "streaming", "revision", "data_files", "data_dir")


@dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """A data set of the datasets library."""

    path: str = option(help="the data set's Hub name, or a folder that save_to_disk wrote", may_be_path=True)
    name: str | None = option(default=None, help="the data set's configuration")
    split: str | None = option(default=None, help="the data set's split; train if not given")
    streaming: bool = option(default=False, help="read the data set over the network as it is needed")
    revision: str | None = option(default=None, help="branch, tag or commit of a Hub data set")
    data_files: tuple[str, ...] = option(
        default=(), help="files of the data set to read, by name or pattern", may_be_path=True
    )
    data_dir: str | None = option(default=None, help="folder inside the data set to read")

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Where documents come from."""

    kind: Literal["stdlib", "file", "dataset", "mixture", "pretokenized"] = option(
        default="stdlib",
        help="stdlib: docstrings of Python's standard library, a document a module; file: local files; "
        "dataset: a data set of the datasets library; mixture: several of these by weight; pretokenized: windows that "
        "`sae-core lm pretokenize` wrote",
    )
    path: str | None = option(
        default=None,
        help="a file, a folder or a glob pattern; or the data set's Hub name, or a folder that save_to_disk wrote",
        may_be_path=True,
    )
    format: FileFormat | None = option(
        default=None,
        help="kind: file - what the files are; by default their suffix says it (.txt .md .jsonl .json .csv .tsv .parquet, "
        "each also .gz or .zst)",
    )
    name: str | None = option(default=None, help="the data set's configuration, e.g. wikitext-2-raw-v1")
    split: str | None = option(default=None, help="the data set's split; train if not given")
    streaming: bool = option(default=False, help="read the data set over the network as it is needed")
    revision: str | None = option(default=None, help="branch, tag or commit of a Hub data set")
    data_files: tuple[str, ...] = option(
        default=(), help="files of the data set to read, by name or pattern", may_be_path=True
    )
    data_dir: str | None = option(default=None, help="folder inside the data set to read")
    column: str | None = option(
        default=None,
        help="column that holds text, lists of token ids or lists of chat messages; by default text, or the one of "
        "input_ids, tokens, messages, conversations that is there",
    )
    separator: str | None = option(
        default=None, help="what lies between the documents of a text file; an empty line if not given"
    )
    whole_files: bool = option(default=False, help="every text file is one document")
    bad_rows: Literal["skip", "error"] = option(
        default="skip",
        help="rows whose cell is null or no Unicode text: leave them out and count them, or fail at the first",
    )
    mixture: tuple[TextConfig, ...] = option(default=(), help="kind: mixture - the texts, each with its weight")
    weight: float | None = option(default=None, help="in a mixture: this text's share of the documents; 1 if not given")
    until: Literal["first", "last"] | None = option(
        default=None,
        help="kind: mixture - a pass ends when the first of the texts is used up (if not given), or goes on with the rest "
        "until the last one is",
    )
    held_out: float = option(default=0.05, help="fraction of the documents kept for evaluation, chosen by hash")

    def __post_init__(self) -> None:
        check_fields(self)
        require(0 <= self.held_out < 1, f"text: 'held_out' is a fraction in [0, 1), not {self.held_out}")
        if self.kind in ("stdlib", "mixture"):
            require(self.path is None, "text: 'path' needs kind: file or kind: dataset")
        else:
            require(bool(self.path), f"text: kind {self.kind!r} needs a 'path'")
        if self.kind != "dataset":
            given = [field for field in _DATASET_ONLY if getattr(self, field)]
            require(not given, f"text: {', '.join(map(repr, given))} belong to kind: dataset, not to kind: {self.kind}")
        require(self.kind == "file" or self.format is None, "text: 'format' belongs to kind: file")
        kind = (self.format or file_format(self.path or "")) if self.kind == "file" else None
        has_columns = self.kind == "dataset" or (self.kind == "file" and kind != "text")
        require(has_columns or self.column is None, "text: 'column' belongs to data sets and files with columns")
        is_plain = self.kind == "file" and kind in ("text", None)
        require(is_plain or self.separator is None, "text: 'separator' belongs to text files")
        require(is_plain or not self.whole_files, "text: 'whole_files' belongs to text files")
        require(self.separator != "", "text: 'separator' is empty")
        require(
            self.separator is None or not self.whole_files, "text: 'separator' and 'whole_files' exclude each other"
        )
        self._check_mixture()

    def _check_mixture(self) -> None:
        is_mixture = self.kind == "mixture"
        require(is_mixture == bool(self.mixture), "text: kind: mixture and 'mixture', a list of texts, belong together")
        require(is_mixture or self.until is None, "text: 'until' belongs to kind: mixture")
        require(self.weight is None or self.weight > 0, f"text: 'weight' must be positive, not {self.weight}")
        default = type(self).__dataclass_fields__["held_out"].default
        for number, text in enumerate(self.mixture):
            require(text.kind not in ("mixture", "pretokenized"), f"text: mixture[{number}] cannot be {text.kind}")
            require(
                text.held_out in (default, self.held_out),
                f"text: mixture[{number}] has a 'held_out' of its own; say it once, beside 'mixture'",
            )

    @property
    def description(self) -> str:
        """A name for people and for ``dataset_path``."""
        if self.mixture:
            return " + ".join(f"{text.weight or 1:g} {text.description}" for text in self.mixture)
        return self.path if self.path is not None else "python-stdlib-docstrings"


@final
class Documents:
    """Documents in a fixed order. Those of a data set know their `position`, the row behind the last one.

    `documents` goes there without reading what is before it. Elsewhere it is None.
    """

    def __init__(self, every: Iterator[Document], rows: RowCount | None = None) -> None:
        self._every, self._rows = every, rows

    def __iter__(self) -> Documents:
        return self

    def __next__(self) -> Document:
        return next(self._every)

    @property
    def position(self) -> int | None:
        """Rows of the data set that were read, those before the start included."""
        return None if self._rows is None else self._rows.count


@final
class RowCount:
    """Counts what is taken of an iterator."""

    def __init__(self, rows: Iterator[Any], count: int) -> None:
        self._rows, self.count = rows, count

    def __iter__(self) -> RowCount:
        return self

    def __next__(self) -> Any:
        row = next(self._rows)
        self.count += 1
        return row


def documents(config: TextConfig, part: Part = "all", *, start: int | None = None) -> Documents:
    """The documents of one part, in a fixed order; of a data set from the row `start` on, the `position` of other documents.

    Raises DataError for a file or data set that is missing or cannot be read as the config says, ConfigError for files
    whose format is not known.

    >>> held_out, kept = (list(documents(TextConfig(), part)) for part in ("held_out", "train"))
    >>> 0 < len(held_out) < len(kept), set(held_out) & set(kept)
    (True, set())
    """
    if config.kind == "mixture":
        texts = [replace(text, weight=None, held_out=config.held_out) for text in config.mixture]
        weights = [text.weight or 1.0 for text in config.mixture]
        return Documents(_mixed([documents(text, part) for text in texts], weights, to_the_last=config.until == "last"))
    if config.kind == "pretokenized":
        return Documents(windows_of(Path(cast("str", config.path)).expanduser(), part))
    count = None
    if config.kind == "stdlib":
        every: Iterator[Document] = iter(stdlib_docstrings())
    else:
        rows = Rows(config.column, config.bad_rows)
        if config.kind == "dataset":
            found, count = _from_dataset(config, rows, start or 0)
        else:
            found = _from_files(config, rows)
        every = _reported(found, rows, config)
    if part != "all":
        chosen = every
        every = (each for each in chosen if is_held_out(each, config.held_out) == (part == "held_out"))
    return Documents(every, count)


def is_held_out(document: Document, fraction: float) -> bool:
    """Whether a document is among the `fraction` kept for evaluation; a matter of its content alone.

    >>> [is_held_out(text, 0.5) for text in ("a", "b", "c", "a")]
    [True, False, True, True]
    """
    digest = hashlib.blake2b(content_of(document).encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def require_held_out(config: TextConfig) -> None:
    """Raise DataError when the text has documents and its held-out part, if there is to be one, has none."""
    if not config.held_out or next(documents(config, "held_out"), None) is not None:
        return
    total = sum(1 for _ in documents(config, "train"))
    if total:
        raise DataError(
            f"text: none of the {total:,} documents of {config.description} falls into the {config.held_out:g} held out for "
            "evaluation; raise held_out, cut the text into more documents, or set held_out: 0 to keep none"
        )


def _mixed(texts: Sequence[Iterator[Document]], weights: list[float], *, to_the_last: bool) -> Iterator[Document]:
    """Documents of several texts: the next one is always of the text that is furthest behind its weight."""
    taken = [0] * len(texts)
    left = list(range(len(texts)))
    while left:
        number = min(left, key=lambda each: (taken[each] + 1) / weights[each])
        document = next(texts[number], None)
        if document is not None:
            taken[number] += 1
            yield document
        elif to_the_last:
            left.remove(number)
        else:
            return


def _reported(every: Iterator[Document], rows: Rows, config: TextConfig) -> Iterator[Document]:
    yield from every
    rows.report(config.description)


def _from_files(config: TextConfig, rows: Rows) -> Iterator[Document]:
    files = find_files(cast("str", config.path), config.format)
    plain = [str(path) for path, kind in files if kind == "text"]
    require(
        config.column is None or not plain, f"text: 'column' belongs to files with columns; {plain[:1]} is plain text"
    )
    for field in ("separator", "whole_files"):
        require(not getattr(config, field) or bool(plain), f"text: {field!r} belongs to text files; there is none")
    return (
        document
        for path, kind in files
        for document in read_file(path, kind, rows, separator=config.separator, whole=config.whole_files)
    )


def _from_dataset(config: TextConfig, rows: Rows, start: int) -> tuple[Iterator[Document], RowCount]:
    fields = {field: getattr(config, field) for field in DatasetConfig.__dataclass_fields__}
    data = open_dataset(DatasetConfig(**fields), "text")
    where = f"data set {config.path!r}"
    # Rows as plain Python values, whatever form the data set was saved in, and only the columns that are read.
    data = data.with_format(None)
    if data.column_names is not None:
        data = data.select_columns(rows.columns(data.column_names, where))
    data = skipped(data, start)
    count = RowCount(iter(data), start)
    return rows.documents((row, f"{where} row {number}") for number, row in enumerate(count, start)), count


def skipped(data: Any, rows: int) -> Any:
    """A data set without its first rows, which are not read where that can be avoided."""
    if not rows:
        return data
    return data.select(range(rows, len(data))) if hasattr(data, "select") else data.skip(rows)


def open_dataset(config: DatasetConfig, key: str) -> Any:
    """The data set that a config names under `key`.

    Raises DataError when it cannot be opened, ConfigError for settings that do not apply to it.
    """
    import datasets
    from datasets.exceptions import DatasetsError

    path = config.path
    folder = Path(path).expanduser()
    is_saved = any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))
    if is_saved:
        for field in ("name", "streaming", "revision", "data_files", "data_dir"):
            require(not getattr(config, field), f"{key}: {field!r} does not apply to a folder that save_to_disk wrote")
    elif not folder.exists() and (path.startswith((".", "~")) or folder.is_absolute()):
        raise DataError(f"{key}: there is no folder {str(folder)!r}")
    try:
        if not is_saved:
            split = config.split or "train"
            more: Mapping[str, Any] = {"data_files": list(config.data_files)} if config.data_files else {}
            return datasets.load_dataset(
                str(folder) if folder.is_dir() else path, config.name, split=split, streaming=config.streaming,
                revision=config.revision, data_dir=config.data_dir, **more,
            )  # fmt: skip
        loaded = datasets.load_from_disk(folder)
    except (OSError, ValueError, DatasetsError) as error:
        hint = "; fetch it once while online, or name a local folder" if isinstance(error, ConnectionError) else ""
        raise DataError(f"{key}: data set {path!r} cannot be opened: {type(error).__name__}: {error}{hint}") from error
    if isinstance(loaded, datasets.Dataset):
        require(config.split is None, f"{key}: the folder {path!r} holds one data set and no splits; leave out 'split'")
        return loaded
    split = config.split or "train"
    if split not in loaded:
        known = ", ".join(map(str, loaded))
        raise DataError(f"{key}: data set {path!r} has no split {split!r} (known: {known})")
    return loaded[split]
