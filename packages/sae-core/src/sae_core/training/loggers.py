"""Where training records go. `JsonlLogger` is the core's own; others are plugins, and none runs unless asked for."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TextIO, final

from sae_core.config import check_fields, option
from sae_core.errors import FormatError
from sae_core.protocols import RunFacts

__all__ = ["JsonlConfig", "JsonlLogger", "LogError"]


class LogError(FormatError):
    """The log that a run keeps cannot be written; the run ends, since nobody could say afterwards what it did."""


@dataclass(frozen=True, kw_only=True)
class JsonlConfig:
    """Config of `JsonlLogger`."""

    path: Path = option(help="file to append to, one JSON object a line")
    label: bool = option(
        default=True,
        help="where a run has several dictionaries, begin each line with sae: NAME, as they share the file",
    )

    def __post_init__(self) -> None:
        check_fields(self)


@final
class JsonlLogger:
    """Appends each record as one line of JSON, flushed at once, so that a killed run keeps what it logged.

    What is not known, or no number, is null. When a run goes on from a checkpoint, lines that came after it are cut off.
    """

    config_class: ClassVar[type] = JsonlConfig
    example: ClassVar[Mapping[str, str]] = {"path": "{folder}/log.jsonl"}

    def __init__(self, config: JsonlConfig) -> None:
        self._path = config.path.absolute()
        self._labels = config.label
        self._label: dict[str, str] = {}
        self._file: TextIO | None = None  # opened by the first record

    def start(self, run: RunFacts) -> None:
        """Remember whose records these are."""
        self._label = {"sae": run.name} if run.name and self._labels else {}

    def log(self, record: Mapping[str, float | int | str | None]) -> None:
        """Append `record`. Raises LogError when the disk refuses."""
        line = (
            json.dumps({**self._label, **{name: _known(value) for name, value in record.items()}}, allow_nan=False)
            + "\n"
        )
        try:
            if self._file is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self._path.open("a", encoding="utf-8")
            self._file.write(line)
            self._file.flush()
        except OSError as error:
            raise LogError(f"{self._path}: the log cannot be written: {error.strerror}") from None

    def close(self) -> None:
        """Close the file; another record would open it again."""
        file, self._file = self._file, None
        if file is not None:
            with suppress(OSError):  # what could not be flushed was reported by `log`
                file.close()

    def state_dict(self) -> dict[str, Any]:
        """The length of the file, which is on the disk when this returns."""
        if self._file is not None:
            os.fsync(self._file.fileno())
        return {"bytes": self._size()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Cut off what was logged after the state was saved. Raises FormatError for a file that is shorter."""
        size = self._size()
        if size < state["bytes"]:
            raise FormatError(
                f"{self._path}: {size} bytes, {state['bytes']} when the checkpoint was written; it is not that run's log"
            )
        if size > state["bytes"]:
            os.truncate(self._path, state["bytes"])

    def _size(self) -> int:
        return self._path.stat().st_size if self._path.exists() else 0


def _known(value: float | int | str | None) -> float | int | str | None:
    """JSON has neither NaN nor infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
