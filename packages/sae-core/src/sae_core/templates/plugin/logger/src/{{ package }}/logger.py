"""The {{ name }} logger. As rendered it appends a line of text for every record; make it write to where you look.

A logger runs only when a run asks for it by name, one for each dictionary of the run. Records have the same names from the first
one on, and None for what is not known. A logger that raises is reported and left out; the run goes on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TextIO, final

from sae_core.config import option
from sae_core.protocols import RunFacts


@dataclass(frozen=True, kw_only=True)
class {{ config_name }}:
    """Config of `{{ class_name }}`."""

    path: Path = option(help="file to append to")


@final
class {{ class_name }}:
    """One sentence that `sae-core show {{ name }}` prints."""

    config_class: ClassVar[type] = {{ config_name }}
    example: ClassVar[Mapping[str, Any]] = {"path": "{folder}/log.txt"}  # for the checks

    def __init__(self, config: {{ config_name }}) -> None:
        self._path = config.path
        self._file: TextIO | None = None  # opened by the first record
        self._of = ""

    def start(self, run: RunFacts) -> None:
        """Called once, before the first record: whose records these are, what was set, the SAE in training, its folder."""
        self._of = f"{run.name}: " if run.name else ""

    def log(self, record: Mapping[str, float | int | str | None]) -> None:
        """Write one record."""
        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("a", encoding="utf-8")
        self._file.write(self._of + " ".join(f"{name}={value}" for name, value in record.items()) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Called at the end, perhaps twice, perhaps before any record."""
        file, self._file = self._file, None
        if file is not None:
            file.close()
