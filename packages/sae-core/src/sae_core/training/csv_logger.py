"""Training records as a table that any spreadsheet opens.

A record has the keys of its dictionary: the same ones from the first on, as far as an architecture names its terms from the
start. One that does not, or several dictionaries that share a file, bring keys that were not there before. A CSV file has
its columns in its first line, so that then the file is written anew with the columns that it has come to need.
"""

from __future__ import annotations

import csv
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TextIO, final

from sae_core.config import check_fields, option
from sae_core.errors import FormatError
from sae_core.protocols import RunFacts

__all__ = ["CsvConfig", "CsvLogger"]


@dataclass(frozen=True, kw_only=True)
class CsvConfig:
    """Config of `CsvLogger`."""

    path: Path = option(help="file to append to, a line a record; cells are empty for what is not known")
    label: bool = option(
        default=True, help="where a run has several dictionaries, a first column sae: NAME, as they share the file"
    )

    def __post_init__(self) -> None:
        check_fields(self)


@final
class CsvLogger:
    """Appends each record as a line of a CSV file, flushed at once; columns are added as records bring them.

    When a run goes on from a checkpoint, lines that came after it are cut off. Raises FormatError when the disk refuses, or
    for a file that is there and is no such table.
    """

    config_class: ClassVar[type] = CsvConfig
    example: ClassVar[Mapping[str, str]] = {"path": "{folder}/log.csv"}

    def __init__(self, config: CsvConfig) -> None:
        self._path = config.path.absolute()
        self._labels = config.label
        self._label: dict[str, str] = {}

    def start(self, run: RunFacts) -> None:
        """Remember whose records these are."""
        self._label = {"sae": run.name} if run.name and self._labels else {}

    def log(self, record: Mapping[str, float | int | str | None]) -> None:
        """Append `record`."""
        record = {**self._label, **record}
        columns = self._columns()  # asked each time: another dictionary's logger may have written to the same file
        wanted = [*columns, *(key for key in record if key not in columns)]
        try:
            if wanted != columns:
                self._write(wanted, [*self._read()[1], dict(record)])
            else:
                with self._path.open("a", encoding="utf-8", newline="") as file:
                    csv.writer(file).writerow(_cells(record, columns))
        except OSError as error:
            raise FormatError(f"{self._path}: the log cannot be written: {error.strerror}") from None

    def close(self) -> None:
        """Nothing is left open."""

    def state_dict(self) -> dict[str, Any]:
        """How many records there are."""
        return {"records": len(self._read()[1])}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Cut off what was logged after the state was saved. Raises FormatError for a file that has less."""
        columns, rows = self._read()
        if len(rows) < state["records"]:
            raise FormatError(
                f"{self._path}: {len(rows)} records, {state['records']} when the checkpoint was written; it is not that run's "
                "log"
            )
        if len(rows) > state["records"]:
            self._write(columns, rows[: state["records"]])

    def _columns(self) -> list[str]:
        if not self._path.exists():
            return []
        with self._reading() as file:
            return next(csv.reader(file), [])

    def _read(self) -> tuple[list[str], list[dict[str, Any]]]:
        if not self._path.exists():
            return [], []
        with self._reading() as file:
            columns, *rows = list(csv.reader(file)) or [[]]
        if any(len(row) > len(columns) for row in rows):
            raise FormatError(
                f"{self._path}: there is a line with more cells than columns; it is not a log of this kind"
            )
        return columns, [dict(zip(columns, row, strict=False)) for row in rows]

    @contextmanager
    def _reading(self) -> Generator[TextIO]:
        try:
            with self._path.open(encoding="utf-8", newline="") as file:
                yield file
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise FormatError(f"{self._path}: cannot be read as a log: {error}") from None

    def _write(self, columns: list[str], rows: list[dict[str, Any]]) -> None:
        from sae_core.format.write import write_atomically

        def write(temporary: Path) -> None:
            with temporary.open("w", encoding="utf-8", newline="") as file:
                csv.writer(file).writerows([columns, *(_cells(row, columns) for row in rows)])

        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self._path, write)


def _cells(record: Mapping[str, Any], columns: list[str]) -> list[Any]:
    return ["" if record.get(column) is None else record[column] for column in columns]
