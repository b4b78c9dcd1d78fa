"""Rows of files and data sets, and the documents in them.

The suffix of a file says its format, and ``.gz`` or ``.zst`` behind it that it is compressed; a suffix that says nothing is
asked about. What a row holds in its column is a document: text, a list of token ids, or a conversation. Token ids may
have an ``attention_mask`` beside them, and where it is 0 there is no token.

A cell that is null, or text that is no Unicode (a lone surrogate), is a bad row. Data of millions of rows have a few, so
they are a matter of policy: left out and counted, or an error. A cell of another kind is always an error.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import logging
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeAlias, cast, final, get_args

from sae_core.errors import ConfigError, DataError, did_you_mean

__all__ = ["Chat", "Document", "FileFormat", "Rows", "TokenRow", "content_of", "file_format", "find_files", "read_file"]

log = logging.getLogger(__name__)

FileFormat = Literal["text", "jsonl", "json", "csv", "tsv", "parquet"]

_FORMATS: Mapping[str, FileFormat] = {
    ".txt": "text", ".md": "text", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "tsv",
    ".parquet": "parquet",
}  # fmt: skip
_COMPRESSED = (".gz", ".zst")
_COLUMNS = ("text", "input_ids", "tokens", "messages", "conversations", "conversation")
_MASK = "attention_mask"
_LARGEST_ID = 2**31 - 1


@final
@dataclass(frozen=True, slots=True)
class TokenRow:
    """Token ids of a row without its padding, and how long the row was with it."""

    ids: list[int]
    length: int


@final
@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation, each message with its role and content; the tokenizer's template makes tokens of it."""

    messages: list[dict[str, Any]]


Document: TypeAlias = str | Sequence[int] | TokenRow | Chat


def content_of(document: Document) -> str:
    """What a document is told by: its text, its ids, or its messages as JSON.

    >>> content_of([1, 2]), content_of(TokenRow([1, 2], 4)), content_of("a")
    ('1 2', '1 2', 'a')
    """
    if isinstance(document, str):
        return document
    if isinstance(document, Chat):
        return json.dumps(document.messages, sort_keys=True)
    return " ".join(map(str, document.ids if isinstance(document, TokenRow) else document))


def file_format(path: str | Path) -> FileFormat | None:
    """The format that a file's suffix names, None if it names none.

    >>> file_format("a/b.jsonl.gz"), file_format("b.csv"), file_format("b.bin")
    ('jsonl', 'csv', None)
    """
    path = Path(path)
    inner = path.with_suffix("") if path.suffix in _COMPRESSED else path
    return _FORMATS.get(inner.suffix)


def find_files(pattern: str, asked: FileFormat | None) -> list[tuple[Path, FileFormat]]:
    """The files that a path, folder or glob pattern means, in a fixed order, each with its format.

    In a folder, files whose names begin with a dot or an underscore are passed over. Raises DataError where there are no
    files, ConfigError where a suffix says nothing about the format and none is `asked` for.
    """
    path = Path(pattern).expanduser()
    if path.is_file():
        found = [path]
    elif path.is_dir():
        if (path / "pretokenized.json").is_file():
            raise ConfigError(f"text: {str(path)!r} holds pretokenised windows; set kind: pretokenized")
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            raise ConfigError(f"text: {str(path)!r} is a data set that save_to_disk wrote; set kind: dataset")
        inside = sorted(each for each in path.rglob("*") if each.is_file())
        found = [each for each in inside if not any(part[0] in "._" for part in each.relative_to(path).parts)]
    elif has_magic(pattern):
        found = sorted(Path(each) for each in glob(str(path), recursive=True) if Path(each).is_file())
    else:
        near = did_you_mean(path.name, [each.name for each in path.parent.glob("*")]) if path.parent.is_dir() else ""
        raise DataError(f"text: there is no file {str(path)!r}{near}")
    if not found:
        raise DataError(f"text: no files in {str(path)!r}")
    formats: list[tuple[Path, FileFormat | None]] = [(each, asked or file_format(each)) for each in found]
    unknown = [str(each) for each, kind in formats if kind is None]
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise ConfigError(
            f"text: what is in {unknown[0]!r}{more}? Its suffix says nothing (known: {', '.join(_FORMATS)}, each also .gz and "
            f".zst); set format to one of {', '.join(get_args(FileFormat))}"
            + (", or name the files you mean by a pattern such as 'folder/*.txt'" if path.is_dir() else "")
        )
    return [(each, kind) for each, kind in formats if kind is not None]


@final
class Rows:
    """Takes documents out of rows and keeps count of the bad ones.

    `column` is the asked-for column, None for whichever of the usual names is there.
    """

    def __init__(self, column: str | None, bad_rows: Literal["skip", "error"]) -> None:
        self._asked = column
        self._skip = bad_rows == "skip"
        self.seen = 0
        self.bad: dict[str, int] = {}

    def columns(self, names: Sequence[str], where: str) -> list[str]:
        """The column to read, and ``attention_mask`` if there is one. Raises DataError when there is no such column."""
        if self._asked is not None:
            if self._asked not in names:
                near = did_you_mean(self._asked, names)
                raise DataError(f"text: {where} has no column {self._asked!r}{near} (columns: {', '.join(names)})")
            column = self._asked
        else:
            usual = [name for name in _COLUMNS if name in names]
            if not usual or (usual[0] != "text" and len(usual) > 1):
                what = f"several of them ({', '.join(usual)})" if usual else "no column 'text'"
                near = "" if usual else did_you_mean("text", names)
                raise DataError(f"text: {where} has {what}{near} (columns: {', '.join(names)}); name one with column")
            column = usual[0]
        return [column, _MASK] if _MASK in names and column != _MASK else [column]

    def documents(self, rows: Iterator[tuple[Mapping[str, Any], str]]) -> Iterator[Document]:
        """The documents of `rows`, which come with a word on where each stands."""
        columns: list[str] | None = None
        for row, where in rows:
            if columns is None:
                columns = self.columns(list(row), where)
            column = columns[0]
            if column not in row:
                raise DataError(
                    f"text: {where} has no column {column!r}{did_you_mean(column, row)} (columns: {', '.join(row)})"
                )
            document = self.document(row[column], row.get(_MASK), f"{where}: column {column!r}")
            if document is not None:
                yield document

    def document(self, value: Any, mask: Any, where: str) -> Document | None:
        """What a cell holds, or None for a bad row that is left out."""
        self.seen += 1
        if value is None:
            return self._is_bad("null", where)
        if isinstance(value, str):
            return self._is_bad("no Unicode text (lone surrogates)", where) if _has_surrogates(value) else value
        if isinstance(value, list):
            items = cast("list[Any]", value)
            if all(type(item) is int for item in items):
                return _token_row(cast("list[int]", items), mask, where)
            if all(isinstance(item, Mapping) for item in items):
                chat = _chat(cast("list[Mapping[str, Any]]", items), where)
                broken = any(
                    isinstance(text, str) and _has_surrogates(text) for each in chat.messages for text in each.values()
                )
                return self._is_bad("no Unicode text (lone surrogates)", where) if broken else chat
        raise DataError(f"text: {where} holds {_kind(value)}, not text, a list of token ids or a list of messages")

    def _is_bad(self, what: str, where: str) -> None:
        if not self._skip:
            raise DataError(f"text: {where} holds {what}; mend the row, or leave such rows out with bad_rows: skip")
        if not self.bad:
            log.warning("text: %s holds %s; such rows are left out and counted (bad_rows: skip)", where, what)
        self.bad[what] = self.bad.get(what, 0) + 1

    def report(self, text: str) -> None:
        """Say how many rows were left out, if any."""
        if self.bad:
            counts = ", ".join(f"{count:,} {what}" for what, count in self.bad.items())
            log.warning(
                "text: %s: %s of %s rows were left out: %s",
                text,
                f"{sum(self.bad.values()):,}",
                f"{self.seen:,}",
                counts,
            )


def _has_surrogates(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


def _kind(value: Any) -> str:
    if isinstance(value, list) and value:
        return f"a list of {' and '.join(sorted({type(item).__name__ for item in cast('list[Any]', value)}))}"
    return type(value).__name__


def _token_row(ids: list[int], mask: Any, where: str) -> Document:
    if ids and not 0 <= min(ids) <= max(ids) <= _LARGEST_ID:
        wrong = next(item for item in ids if not 0 <= item <= _LARGEST_ID)
        raise DataError(f"text: {where} holds {wrong}, which is no token id")
    if mask is None:
        return ids
    if (
        not isinstance(mask, list)
        or len(cast("list[Any]", mask)) != len(ids)
        or not set(cast("list[Any]", mask)) <= {0, 1}
    ):
        raise DataError(f"text: {where}: the {_MASK} beside it is not one 0 or 1 for each of the {len(ids)} ids")
    return TokenRow([item for item, attended in zip(ids, cast("list[int]", mask), strict=True) if attended], len(ids))


_ROLES = {"human": "user", "gpt": "assistant"}


def _chat(messages: list[Mapping[str, Any]], where: str) -> Chat:
    """The messages with role and content, whichever of the two usual spellings they come in."""
    found: list[dict[str, Any]] = []
    for message in messages:
        given = {key: value for key, value in message.items() if value is not None}  # tables fill absent keys with null
        if "from" in given and "value" in given and "role" not in given:
            given = {"role": _ROLES.get(given["from"], given["from"]), "content": given["value"]}
        if not isinstance(given.get("role"), str):
            raise DataError(f"text: {where} holds a message without a role (its keys: {', '.join(given) or 'none'})")
        found.append(given)
    return Chat(found)


def read_file(
    path: Path, kind: FileFormat, rows: Rows, *, separator: str | None = None, whole: bool = False
) -> Iterator[Document]:
    """The documents of one file. Raises DataError for anything that is not what its format promises."""
    if kind == "text":
        return _whole_text(path) if whole else _from_text(path, separator)
    return rows.documents(_READERS[kind](path, rows))


def _open(path: Path) -> BinaryIO:
    """The file's bytes, decompressed."""
    if path.suffix == ".gz":
        return cast("BinaryIO", gzip.open(path, "rb"))
    if path.suffix == ".zst":
        import pyarrow as pa  # comes with datasets

        return cast("BinaryIO", io.BufferedReader(pa.input_stream(str(path), compression="zstd")))
    return path.open("rb")


def _guarded(path: Path) -> Callable[[BaseException], DataError]:
    def explain(error: BaseException) -> DataError:
        if isinstance(error, UnicodeDecodeError):
            return DataError(f"text: {str(path)!r} is not UTF-8 text: {error}")
        return DataError(f"text: {str(path)!r} cannot be read: {type(error).__name__}: {error}")

    return explain


_FAULTS = (UnicodeDecodeError, OSError, EOFError, zlib.error)


def _blocks(path: Path) -> Iterator[str]:
    """A text file in blocks, every kind of line end as ``\\n`` and without a byte order mark."""
    explain = _guarded(path)
    try:
        with io.TextIOWrapper(_open(path), encoding="utf-8-sig") as file:
            while block := file.read(1 << 20):
                yield block
    except _FAULTS as error:
        raise explain(error) from None


def _whole_text(path: Path) -> Iterator[str]:
    text = "".join(_blocks(path))
    if text.strip():
        yield text


def _from_text(path: Path, separator: str | None) -> Iterator[str]:
    """Documents of a text file, read in blocks: memory holds the longest document, not the file."""
    mark = "\n\n" if separator is None else separator.replace("\r\n", "\n").replace("\r", "\n")
    rest = ""
    for block in _blocks(path):
        *complete, rest = (rest + block).split(mark)
        yield from (text for text in complete if text.strip())
    if rest.strip():
        yield rest


def _jsonl(path: Path, _: Rows) -> Iterator[tuple[Mapping[str, Any], str]]:
    explain = _guarded(path)
    try:
        with _open(path) as file:
            for number, line in enumerate(file, start=1):
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if text.strip():
                    where = f"{str(path)!r} line {number}"
                    yield _row(_parse(text, where), where), where
    except _FAULTS as error:
        raise explain(error) from None


def _json(path: Path, _: Rows) -> Iterator[tuple[Mapping[str, Any], str]]:
    text = "".join(_blocks(path))
    try:
        data = json.loads(text)
    except ValueError as error:
        hint = "; if it holds an object a line, set format: jsonl" if text.lstrip().startswith("{") else ""
        raise DataError(f"text: {str(path)!r} is not JSON: {error}{hint}") from None
    if not isinstance(data, list):
        raise DataError(f"text: {str(path)!r} holds {type(data).__name__}, not a list of objects with columns")
    for number, item in enumerate(cast("list[Any]", data)):
        where = f"{str(path)!r} item {number}"
        yield _row(item, where), where


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise DataError(f"text: {where} is not JSON: {error}") from None


def _row(row: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(row, dict):
        raise DataError(f"text: {where} holds {type(row).__name__}, not an object with columns")
    return cast("dict[str, Any]", row)


def _table(path: Path, delimiter: str) -> Iterator[tuple[Mapping[str, Any], str]]:
    """Rows of a comma- or tab-separated file whose first line names the columns."""
    explain = _guarded(path)
    csv.field_size_limit(2**31 - 1)  # documents are longer than the module's default of 128 KiB
    try:
        with io.TextIOWrapper(_open(path), encoding="utf-8-sig", newline="") as file:
            lines = csv.reader(file, delimiter=delimiter, strict=True)
            names = next(lines, None)
            if names is None:
                return
            if len(set(names)) < len(names):
                raise DataError(f"text: {str(path)!r} names a column twice in its first line ({', '.join(names)})")
            for cells in lines:
                if not cells:
                    continue
                where = f"{str(path)!r} line {lines.line_num}"
                if len(cells) != len(names):
                    raise DataError(f"text: {where} has {len(cells)} cells for {len(names)} columns")
                yield dict(zip(names, cells, strict=True)), where
    except csv.Error as error:
        raise DataError(f"text: {str(path)!r} is no table of this format: {error}") from None
    except _FAULTS as error:
        raise explain(error) from None


def _csv(path: Path, _: Rows) -> Iterator[tuple[Mapping[str, Any], str]]:
    return _table(path, ",")


def _tsv(path: Path, _: Rows) -> Iterator[tuple[Mapping[str, Any], str]]:
    return _table(path, "\t")


def _parquet(path: Path, rows: Rows) -> Iterator[tuple[Mapping[str, Any], str]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    explain = _guarded(path)
    try:
        if path.suffix in _COMPRESSED:
            with _open(path) as packed:
                file: Any = pq.ParquetFile(pa.BufferReader(packed.read()))
        else:
            file = pq.ParquetFile(path)
        columns = rows.columns(file.schema_arrow.names, repr(str(path)))
        number = 0
        for batch in file.iter_batches(batch_size=256, columns=columns):
            for row in batch.to_pylist():
                yield row, f"{str(path)!r} row {number}"
                number += 1
    except (*_FAULTS, pa.ArrowException) as error:
        raise explain(error) from None


_READERS: Mapping[FileFormat, Callable[[Path, Rows], Iterator[tuple[Mapping[str, Any], str]]]] = {
    "jsonl": _jsonl, "json": _json, "csv": _csv, "tsv": _tsv, "parquet": _parquet,
}  # fmt: skip
