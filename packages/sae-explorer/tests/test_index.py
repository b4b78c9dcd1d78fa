"""The index finds what a naive look through the study finds; labels outlive the process that wrote them."""

from __future__ import annotations

import json
import shutil
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from sae_core.errors import ConfigError, FormatError
from sae_explorer.index import INDEX_FILE, Query, build_index, search, words_of
from sae_explorer.labels import LABELS_FILE, Labels
from sae_lm.studies import StudyFolder


def test_latents_are_sorted_and_filtered_by_their_numbers(copied: Path) -> None:
    study = StudyFolder(copied / "study")
    index = build_index(study)
    density, largest = study.latents["density"].tolist(), study.latents["largest"].tolist()
    total, rows = search(index, Query(sort="largest", limit=1000))
    assert total == len(rows) == study.d_sae
    assert [row["latent"] for row in rows] == sorted(range(96), key=lambda n: (-largest[n], n))
    middle = sorted(density)[48]
    wanted = [n for n in range(96) if density[n] >= middle and largest[n] >= 0.2]
    total, rows = search(
        index, Query(sort="latent", descending=False, min_density=middle, min_largest=0.2, limit=5, offset=2)
    )
    assert total == len(wanted)
    assert [row["latent"] for row in rows] == wanted[2:7]
    with pytest.raises(ConfigError, match="sort: 'latent; DROP' is none of"):
        Query(sort="latent; DROP")


def test_a_token_finds_the_latents_that_peak_on_it_whatever_it_looks_like(copied: Path) -> None:
    study = StudyFolder(copied / "study")
    index = build_index(study)
    peaks = {n: [e.texts[e.peak] for e in study.examples(n) if e.band == 0] for n in range(96)}
    checked = 0
    for word in {text for texts in peaks.values() for text in texts if len(text) < 200}:
        expected = {n for n, texts in peaks.items() if texts.count(word) >= 3}  # 5 tokens at most do, and 6 are kept
        total, rows = search(index, Query(text=word, sort="match", limit=1000))
        assert total == len(rows)
        assert expected <= {row["latent"] for row in rows}, word
        checked += bool(expected)
    assert checked >= 8
    _, numbers = search(index, Query(text="#17", sort="match"))
    assert numbers[0]["latent"] == 17
    assert search(index, Query(text="nowhere"))[0] == 0


def test_punctuation_and_odd_queries_find_what_there_is_and_break_nothing(copied: Path) -> None:
    index = build_index(StudyFolder(copied / "study"))
    _, rows = search(index, Query(text=".", sort="match", limit=1000))
    assert rows
    assert all("." in row["tokens"] + row["promotes"] for row in rows)
    for text in ('"', "'; DROP TABLE latents; --", "a OR", "NEAR(", "*", "\\", "%", "_", "\x00", "x" * 200):
        search(index, Query(text=text))
    assert search(index, Query())[0] == 96
    assert words_of("Grüße, 你好!") == ["Grüße", "你好"]


def test_an_index_of_another_study_or_a_broken_one_is_made_anew(copied: Path, world: Path) -> None:
    study = StudyFolder(copied / "study")
    index = build_index(study)
    before = index.stat().st_mtime_ns
    assert build_index(study).stat().st_mtime_ns == before
    index.write_bytes(b"no database")
    assert search(build_index(study), Query())[0] == 96
    shutil.copytree(
        world / "two" / "study", copied / "study", dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.sqlite")
    )
    other = StudyFolder(copied / "study")
    largest = float(other.latents["largest"].max())
    assert search(build_index(other), Query())[1][0]["largest"] == pytest.approx(largest)
    assert [path.name for path in (copied / "study").glob("*sqlite*")] == [INDEX_FILE]


def test_labels_are_kept_when_the_process_is_killed_right_after(copied: Path) -> None:
    path = copied / "study" / LABELS_FILE
    hostile = "<script>alert(1)</script> שלום 👩‍👩‍👧 '; DROP TABLE labels; --"
    code = (
        "import os, signal, sys; from pathlib import Path; from sae_explorer.labels import Labels; "
        "Labels(Path(sys.argv[1]), 96).put(5, sys.argv[2], 'a note'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path), hostile], timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    labels = Labels(path, 96)
    assert labels.get(5) == {"label": hostile, "note": "a note"}
    index = build_index(StudyFolder(copied / "study"))
    for query in (Query(text="DROP TABLE labels"), Query(text="a note"), Query(labelled=True)):
        assert [row["latent"] for row in search(index, query, path)[1] if row["label"]] == [5]
    labels.put(5, "", "")
    assert labels.all() == []


def test_labels_that_cannot_be_are_refused(tmp_path: Path) -> None:
    labels = Labels(tmp_path / "labels.sqlite", 8)
    with pytest.raises(ConfigError, match="there is no latent 8"):
        labels.put(8, "x", "")
    with pytest.raises(ConfigError, match="201 characters are more than 200"):
        labels.put(1, "x" * 201, "")
    labels.put(1, "half \ud800 a pair", "")
    assert labels.get(1)["label"] == "half ? a pair"
    assert json.loads(json.dumps(labels.all()))[0]["latent"] == 1
    (tmp_path / "broken.sqlite").write_bytes(b"x" * 4096)
    with pytest.raises(FormatError, match="move the file away"):
        Labels(tmp_path / "broken.sqlite", 8)
    with sqlite3.connect(labels.path) as database:
        assert database.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    database.close()
