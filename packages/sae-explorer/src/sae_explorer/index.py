"""All latents of a study in one SQLite file, so that pages of tens of thousands are searched, sorted and filtered at once.

The file lies beside the study's own and is made anew when the study is another one. A row holds a latent's numbers, the tokens
at which its top examples peak and those that it promotes; a full-text index (FTS5) holds the same words and the text around the
peaks. Studies are read a block of latents at a time, so memory does not depend on their size.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from sae_core.config import require
from sae_core.durable import umask
from sae_core.errors import ConfigError, FormatError
from sae_lm.studies import StudyFolder

__all__ = ["COLUMNS", "INDEX_FILE", "SORTS", "Query", "build_index", "fires_on", "search", "words_of"]

INDEX_FILE = "explorer.sqlite"
_VERSION = "2"
_BLOCK = 1024
_CONTEXTS = 3
_TOKENS = 6

SORTS = ("match", "latent", "density", "largest", "mean")
"""What latents can be sorted by; "match" is by how well they fit the words that are searched for."""

COLUMNS = ("latent", "density", "count", "largest", "mean", "tokens", "promotes", "label", "note")
"""What `search` says of a latent."""

_SCHEMA = """
CREATE TABLE about (key TEXT PRIMARY KEY, value TEXT);
CREATE TABLE latents (latent INTEGER PRIMARY KEY, density REAL, count INTEGER, largest REAL, mean REAL, tokens TEXT,
    promotes TEXT);
CREATE VIRTUAL TABLE words USING fts5(tokens, promotes, context, content='', prefix='2 3',
    tokenize="unicode61 remove_diacritics 2 categories 'L* N* M* S* Co'");
"""


@final
@dataclass(frozen=True, kw_only=True)
class Query:
    """Which latents, in which order, and which part of the list."""

    text: str = ""
    sort: str = "largest"
    descending: bool = True
    min_density: float = 0.0
    max_density: float = 1.0
    min_largest: float = 0.0
    labelled: bool = False
    offset: int = 0
    limit: int = 100

    def __post_init__(self) -> None:
        require(self.sort in SORTS, f"sort: {self.sort!r} is none of {', '.join(SORTS)}")
        require(0 <= self.offset < 1 << 62, f"offset: {self.offset} is no place in a list")
        require(0 < self.limit <= 1000, f"limit: {self.limit} must lie in [1, 1000]")
        require(len(self.text) <= 200, f"search: {len(self.text)} characters are more than 200")


def words_of(text: str) -> list[str]:
    """The words of a text as the full-text index sees them: runs of letters, digits, marks and symbols.

    >>> words_of('the "cat", (1+1)')
    ['the', 'cat', '1+1']
    """
    import unicodedata

    seen = [c if unicodedata.category(c)[0] in "LNMS" or unicodedata.category(c) == "Co" else " " for c in text]
    return "".join(seen).split()


def build_index(study: StudyFolder) -> Path:
    """The study's index file, made if there is none for this very study. Raises ConfigError where it cannot be written."""
    path = study.path / INDEX_FILE
    fingerprint = hashlib.sha256((study.path / "index.json").read_bytes()).hexdigest()
    if _is_current(path, fingerprint):
        return path
    try:
        handle, temporary = tempfile.mkstemp(dir=study.path, prefix=f".{INDEX_FILE}-")
    except OSError as error:
        raise ConfigError(
            f"{study.path}: the index for searching cannot be written beside the study ({error.strerror}); copy the study to "
            "where you may write and name it with --study"
        ) from None
    os.close(handle)
    try:
        with closing(sqlite3.connect(temporary)) as database:
            database.executescript(_SCHEMA)
            for numbers, words in _rows(study):
                database.executemany("INSERT INTO latents VALUES (?, ?, ?, ?, ?, ?, ?)", numbers)
                database.executemany("INSERT INTO words (rowid, tokens, promotes, context) VALUES (?, ?, ?, ?)", words)
            for column, others in (("density", "largest"), ("largest", "density"), ("mean", "density, largest")):
                database.execute(f"CREATE INDEX by_{column} ON latents ({column}, {others})")
            database.executemany("INSERT INTO about VALUES (?, ?)", [("study", fingerprint), ("version", _VERSION)])
            database.commit()
        Path(temporary).chmod(0o666 & ~umask())
        Path(temporary).replace(path)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return path


def search(index: Path, query: Query, labels: Path | None = None) -> tuple[int, list[dict[str, Any]]]:
    """How many latents fit, and the asked part of them: numbers, tokens and promoted tokens, label and note of each."""
    with closing(sqlite3.connect(f"{index.absolute().as_uri()}?mode=ro", uri=True)) as database:
        if labels is not None and labels.exists():
            database.execute("ATTACH ? AS own", (labels.absolute().as_uri() + "?mode=ro",))
        else:
            database.execute("ATTACH ':memory:' AS own")
            database.execute("CREATE TABLE own.labels (latent INTEGER PRIMARY KEY, label TEXT, note TEXT)")
        database.execute("PRAGMA temp_store = MEMORY")
        hits, given = _hits(query.text)
        if hits:
            database.execute(f"CREATE TEMP TABLE hits AS {hits}", given)
        # Only what restricts: without a condition, the count and an order are read off an index.
        bounds = [
            ("l.density >= ?", query.min_density, query.min_density > 0),
            ("l.density <= ?", query.max_density, query.max_density < 1),
            ("l.largest >= ?", query.min_largest, query.min_largest > 0),
        ]
        conditions = [condition for condition, _, restricts in bounds if restricts]
        values = [value for _, value, restricts in bounds if restricts]
        if query.labelled:
            conditions.append("l.latent IN (SELECT latent FROM own.labels)")
        body = (
            f"FROM {'hits JOIN latents l USING (latent)' if hits else 'latents l'}"
            + (f" WHERE {' AND '.join(conditions)}" if conditions else "")
        )  # fmt: skip
        (total,) = database.execute(f"SELECT count(*) {body}", values).fetchone()
        sort = query.sort if query.sort != "match" else ("rank" if hits else "largest")
        down = query.descending if query.sort != "match" else not hits
        order = f"ORDER BY {'hits.rank' if sort == 'rank' else f'l.{sort}'} {'DESC' if down else 'ASC'}, l.latent"
        found = database.execute(
            "SELECT l.latent, l.density, l.count, l.largest, l.mean, l.tokens, l.promotes, coalesce(n.label, ''), "
            "coalesce(n.note, '') FROM latents l LEFT JOIN own.labels n ON n.latent = l.latent JOIN "
            f"(SELECT l.latent, row_number() OVER ({order}) AS place {body} {order} LIMIT ? OFFSET ?) chosen "
            "ON chosen.latent = l.latent ORDER BY chosen.place",
            [*values, query.limit, query.offset],
        )
        return int(total), [dict(zip(COLUMNS, row, strict=True)) for row in found]


def _hits(text: str) -> tuple[str, list[Any]]:
    """A query of the latents that fit the words, with their ranks, and the values for it; nothing where there are no words."""
    text = text.strip()
    if not text:
        return "", []
    like = "%" + text.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_") + "%"
    parts = ["SELECT latent, -1e3 AS rank FROM own.labels WHERE label LIKE ? ESCAPE '\\' OR note LIKE ? ESCAPE '\\'"]
    values: list[Any] = [like, like]
    if words := words_of(text):
        match = " ".join(f'"{word}"*' for word in words)
        parts.append("SELECT rowid, bm25(words, 10.0, 3.0, 1.0) FROM words WHERE words MATCH ?")
        values.append(match)
    else:  # punctuation alone, of which the full-text index has nothing
        parts.append("SELECT latent, 0.0 FROM latents WHERE tokens LIKE ? ESCAPE '\\' OR promotes LIKE ? ESCAPE '\\'")
        values += [like, like]
    if text.lstrip("#").isascii() and text.lstrip("#").isdigit() and len(text) < 12:
        parts.append("SELECT ?, -1e6")
        values.append(int(text.lstrip("#")))
    union = " UNION ALL ".join(parts)
    return f"SELECT latent, min(rank) AS rank FROM ({union}) GROUP BY latent", values


def _is_current(path: Path, fingerprint: str) -> bool:
    if not path.exists():
        return False
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as database:
            about = dict(database.execute("SELECT key, value FROM about").fetchall())
    except sqlite3.DatabaseError:
        return False
    return about == {"study": fingerprint, "version": _VERSION}


def _rows(study: StudyFolder) -> Iterator[tuple[list[tuple[Any, ...]], list[tuple[Any, ...]]]]:
    """Blocks of rows for the two tables."""
    from safetensors import SafetensorError, safe_open

    latents, tokens = study.latents, study.tokens
    try:
        with (
            safe_open(study.path / "examples.safetensors", "pt") as examples,
            safe_open(study.path / "windows.safetensors", "pt") as windows,
        ):
            texts = windows.get_tensor("tokens")
            top = int(study.index["study"]["top"])
            length = int(examples.get_slice("snippet").get_shape()[-1])
            for start in range(0, study.d_sae, _BLOCK):
                end = min(start + _BLOCK, study.d_sae)
                window, position, first = (
                    examples.get_slice(name)[start:end, :top] for name in ("window", "position", "snippet_start")
                )
                numbers: list[tuple[Any, ...]] = []
                words: list[tuple[Any, ...]] = []
                stats = [latents[n][start:end].tolist() for n in ("density", "count", "largest", "mean_active")]
                promoted = latents["promoted_tokens"][start:end].tolist() if "promoted_tokens" in latents else []
                found, at, begin = window.tolist(), position.tolist(), first.tolist()
                for row in range(end - start):
                    slots = [slot for slot, number in enumerate(found[row]) if number >= 0]
                    peaks = Counter(int(texts[found[row][s], at[row][s]]) for s in slots)
                    own = [_named(tokens, token) for token, _ in peaks.most_common(_TOKENS)]
                    lens = [_named(tokens, token) for token in promoted[row][:_TOKENS]] if promoted else []
                    around = [
                        "".join(tokens.get(t, "") for t in texts[found[row][s], begin[row][s] :][:length].tolist())
                        for s in slots[:_CONTEXTS]
                    ]
                    latent = start + row
                    numbers.append((latent, *(column[row] for column in stats), _line(own), _line(lens)))
                    words.append((latent, " ".join(own), " ".join(lens), " ".join(around)[:4000]))
                yield numbers, words
    except (OSError, SafetensorError, KeyError) as error:
        raise FormatError(f"{study.path}: the study cannot be read: {error}") from None


def _named(tokens: Mapping[int, str], token: int) -> str:
    """A token as it is searched for: without the spaces around it."""
    text = tokens.get(token, "")
    return (text.strip() or repr(text)[1:-1])[:400]


def _line(names: Sequence[str]) -> str:
    """Tokens in one line of a list."""
    return " ".join(name if len(name) <= 40 else name[:40] + "…" for name in names)


def fires_on(index: Path, latents: Sequence[int]) -> dict[int, str]:
    """What some latents fire on: the tokens at which their top examples peak."""
    found: dict[int, str] = {}
    with closing(sqlite3.connect(f"{index.absolute().as_uri()}?mode=ro", uri=True)) as database:
        for start in range(0, len(latents), 500):
            part = list(latents[start : start + 500])
            marks = ",".join("?" * len(part))
            found |= dict(
                database.execute(f"SELECT latent, tokens FROM latents WHERE latent IN ({marks})", part).fetchall()
            )
    return found
