"""One's own labels and notes on latents: an SQLite file beside the study, complete on the disk when a call returns."""

from __future__ import annotations

import sqlite3
from collections.abc import Generator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, final

from sae_core.config import require
from sae_core.errors import FormatError

__all__ = ["LABELS_FILE", "Labels"]

LABELS_FILE = "labels.sqlite"
_LONGEST_LABEL, _LONGEST_NOTE = 200, 10_000


@final
class Labels:
    """Labels and notes of one dictionary's latents. Safe to use from several threads and processes.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     labels = Labels(Path(folder) / "labels.sqlite", d_sae=8)
    ...     labels.put(3, "cats", "also kittens")
    ...     labels.get(3)["label"], [each["latent"] for each in labels.all()]
    ('cats', [3])
    """

    def __init__(self, path: Path, d_sae: int) -> None:
        self.path, self.d_sae = path, d_sae
        with self._open() as database:
            database.execute("PRAGMA journal_mode=WAL")
            database.execute(
                "CREATE TABLE IF NOT EXISTS labels (latent INTEGER PRIMARY KEY, label TEXT NOT NULL, note TEXT NOT NULL, "
                "changed TEXT NOT NULL)"
            )

    def put(self, latent: int, label: str, note: str) -> None:
        """Set both; two empty texts remove what was there. Raises ConfigError for a latent that is not there or long texts."""
        require(0 <= latent < self.d_sae, f"label: there is no latent {latent}; the dictionary has {self.d_sae}")
        require(len(label) <= _LONGEST_LABEL, f"label: {len(label)} characters are more than {_LONGEST_LABEL}")
        require(len(note) <= _LONGEST_NOTE, f"note: {len(note)} characters are more than {_LONGEST_NOTE}")
        # A lone half of a surrogate pair is no text that can be stored.
        label, note = (text.encode("utf-8", "replace").decode() for text in (label, note))
        with self._open() as database:
            if not label and not note:
                database.execute("DELETE FROM labels WHERE latent = ?", (latent,))
            else:
                changed = datetime.now(UTC).isoformat(timespec="seconds")
                database.execute("INSERT OR REPLACE INTO labels VALUES (?, ?, ?, ?)", (latent, label, note, changed))

    def get(self, latent: int) -> dict[str, Any]:
        """Label and note, both empty where there is none."""
        with self._open() as database:
            found = database.execute("SELECT label, note FROM labels WHERE latent = ?", (latent,)).fetchone()
        return {"label": found[0], "note": found[1]} if found else {"label": "", "note": ""}

    def all(self) -> list[dict[str, Any]]:
        """Every latent with a label or a note, by number: latent, label, note, changed (ISO 8601, UTC)."""
        with self._open() as database:
            rows = database.execute("SELECT latent, label, note, changed FROM labels ORDER BY latent").fetchall()
        return [dict(zip(("latent", "label", "note", "changed"), row, strict=True)) for row in rows]

    @contextmanager
    def _open(self) -> Generator[sqlite3.Connection]:
        try:
            with closing(sqlite3.connect(self.path, timeout=30)) as database:
                database.execute("PRAGMA synchronous=FULL")
                with database:
                    yield database
        except sqlite3.DatabaseError as error:
            raise FormatError(
                f"{self.path}: labels cannot be read or written: {error}; move the file away to start anew"
            ) from None
