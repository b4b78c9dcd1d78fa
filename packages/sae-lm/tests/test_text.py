from __future__ import annotations

import csv
import gzip
import io
import json
import logging
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sae_core.config import structure
from sae_core.errors import ConfigError, DataError
from sae_lm.reading import Chat, TokenRow
from sae_lm.stdlib_text import stdlib_docstrings
from sae_lm.text import TextConfig, documents, is_held_out, require_held_out

pytestmark = pytest.mark.slow


def test_the_embedded_text_is_large_deterministic_free_of_copies_and_not_imported() -> None:
    modules = stdlib_docstrings()
    assert 1_000_000 < sum(map(len, modules)) < 3_000_000
    assert len(modules) > 300
    dedent = textwrap.dedent.__doc__
    assert dedent is not None
    assert sum(dedent.strip().splitlines()[0] in module for module in modules) == 1
    assert stdlib_docstrings.__wrapped__() == modules
    assert not {"antigravity", "this", "turtledemo"} & set(sys.modules)  # parsed, not imported


def test_training_text_and_held_out_text_share_nothing_and_lose_nothing() -> None:
    config = TextConfig(held_out=0.1)
    train, held_out = list(documents(config, "train")), list(documents(config, "held_out"))
    everything = list(documents(config, "all"))
    assert not set(train) & set(held_out)
    assert sorted(map(str, train + held_out)) == sorted(map(str, everything))
    assert 0.05 < len(held_out) / len(everything) < 0.15


@given(st.text(), st.floats(0, 0.5), st.floats(0, 0.5))
def test_a_larger_fraction_holds_out_a_superset(text: str, fraction: float, more: float) -> None:
    assert not is_held_out(text, 0.0)
    if is_held_out(text, fraction):
        assert is_held_out(text, fraction + more)


def test_which_side_a_document_is_on_never_changes_between_versions() -> None:
    # Evaluation of a saved SAE relies on it: a change of the rule would leak training text.
    assert [is_held_out(text, 0.3) for text in ("a", "b", "c", "", "sparse")] == [True, False, True, False, False]
    assert [is_held_out(ids, 0.3) for ids in ([1, 2], [1, 3], [7])] == [True, False, False]


def test_a_text_file_is_cut_at_empty_lines_or_at_the_given_separator(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("one\nline\n\ntwo\n\n\n\n  \n\nthree é", encoding="utf-8")
    assert list(documents(TextConfig(kind="file", path=str(file)))) == ["one\nline", "two", "three é"]
    lines = documents(TextConfig(kind="file", path=str(file), separator="\n"))
    assert list(lines) == ["one", "line", "two", "three é"]


def test_a_separator_across_the_edge_of_a_block_is_still_one(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    first = "a" * ((1 << 20) - 1)
    file.write_text(f"{first}\n\nsecond")
    assert list(documents(TextConfig(kind="file", path=str(file)))) == [first, "second"]


def test_a_jsonl_file_gives_text_or_token_ids_from_a_column(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "x", "ids": [1, 2]}\n\n{"text": "y", "ids": []}\n')
    assert list(documents(TextConfig(kind="file", path=str(file)))) == ["x", "y"]
    assert list(documents(TextConfig(kind="file", path=str(file), column="ids"))) == [[1, 2], []]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{oops", r"line 2 is not JSON"),
        ("[1]", r"line 2 holds list, not an object"),
        ('{"txt": "a"}', r"line 2 has no column 'text'; did you mean 'txt'\? \(columns: txt\)"),
        ('{"text": 5}', r"line 2: column 'text' holds int"),
        ('{"text": [1, true]}', r"line 2: column 'text' holds a list of bool and int, not text"),
        ('{"text": [1, -100]}', r"line 2: column 'text' holds -100, which is no token id"),
        ('{"text": [1, 4294967296]}', r"line 2: column 'text' holds 4294967296, which is no token id"),
        (
            '{"text": [1, 2], "attention_mask": [1]}',
            r"line 2: .*attention_mask beside it is not one 0 or 1 for each of the 2",
        ),
        ('{"text": [{"content": "x"}]}', r"line 2: .* message without a role \(its keys: content\)"),
    ],
)
def test_a_bad_jsonl_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(DataError, match=message):
        list(documents(TextConfig(kind="file", path=str(file))))


def test_a_missing_file_and_a_file_that_is_no_text_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no file .*none\.txt"):
        documents(TextConfig(kind="file", path=str(tmp_path / "none.txt")))
    (tmp_path / "data.txt").write_bytes(b"\x1f\x8b\xff\xfe")
    with pytest.raises(DataError, match=r"data\.txt' is not UTF-8"):
        list(documents(TextConfig(kind="file", path=str(tmp_path / "data.txt"))))


@pytest.fixture
def saved_data_set(tmp_path: Path) -> dict[str, Path]:
    import datasets

    data = datasets.Dataset.from_dict({"body": ["p", "q", "r"], "ids": [[1], [2, 3], []]})
    single, several = tmp_path / "single", tmp_path / "several"
    data.save_to_disk(single)
    datasets.DatasetDict({"train": data, "validation": data.select([2])}).save_to_disk(several)
    return {"single": single, "several": several}


def test_a_saved_data_set_is_read_with_or_without_splits(saved_data_set: dict[str, Path]) -> None:
    def read(which: str, **settings: Any) -> list[Any]:
        return list(documents(TextConfig(kind="dataset", path=str(saved_data_set[which]), **settings)))

    assert read("single", column="body") == ["p", "q", "r"]
    assert read("single", column="ids") == [[1], [2, 3], []]
    assert read("several", column="body") == ["p", "q", "r"]
    assert read("several", column="body", split="validation") == ["r"]
    with pytest.raises(DataError, match=r"no split 'test' \(known: train, validation\)"):
        read("several", column="body", split="test")
    with pytest.raises(DataError, match=r"no column 'text'.*\(columns: body, ids\)"):
        read("single")
    with pytest.raises(ConfigError, match="holds one data set and no splits"):
        read("single", column="body", split="train")
    with pytest.raises(ConfigError, match="'streaming' does not apply"):
        read("single", column="body", streaming=True)


def test_a_data_set_of_local_files_can_be_streamed(tmp_path: Path) -> None:
    (tmp_path / "part.jsonl").write_text("".join(json.dumps({"text": f"t{i}"}) + "\n" for i in range(5)))
    config = TextConfig(kind="dataset", path=str(tmp_path), streaming=True)
    assert list(documents(config)) == [f"t{i}" for i in range(5)]


def test_a_data_set_that_does_not_exist_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"data set '.*empty' cannot be opened"):
        list(documents(TextConfig(kind="dataset", path=str(tmp_path / "empty"))))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"path": "x.txt"}, "'path' needs kind"),
        ({"kind": "file"}, "kind 'file' needs a 'path'"),
        ({"kind": "dataset"}, "kind 'dataset' needs a 'path'"),
        ({"kind": "file", "path": "x.txt", "split": "train", "streaming": True}, "'split', 'streaming' belong to"),
        ({"kind": "file", "path": "x.txt", "column": "a"}, "'column' belongs to"),
        ({"kind": "file", "path": "x.jsonl", "separator": "\n"}, "'separator' belongs to"),
        ({"kind": "file", "path": "x.txt", "separator": ""}, "'separator' is empty"),
        ({"held_out": 1.0}, "fraction in"),
        ({"kind": "web"}, "web"),
        ({"format": "csv"}, "'format' belongs to kind: file"),
        ({"kind": "file", "path": "x.csv", "whole_files": True}, "'whole_files' belongs to"),
        ({"kind": "file", "path": "x.txt", "whole_files": True, "separator": "|"}, "exclude each other"),
        ({"kind": "file", "path": "x.txt", "data_files": ["a"]}, "'data_files' belong to kind: dataset"),
        ({"kind": "mixture"}, "belong together"),
        ({"mixture": [{}]}, "belong together"),
        ({"kind": "mixture", "mixture": [{"weight": 0.0}]}, "'weight' must be positive"),
        ({"kind": "mixture", "mixture": [{"held_out": 0.5}]}, "say it once"),
        ({"kind": "mixture", "mixture": [{"kind": "mixture", "mixture": [{}]}]}, "cannot be mixture"),
        ({"until": "last"}, "'until' belongs to kind: mixture"),
        ({"heldout": 0.1}, "did you mean 'held_out'"),
    ],
)
def test_every_field_is_used_or_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        structure(settings, TextConfig)


ROWS = [{"text": "one,\n two", "n": 1}, {"text": "t\tthree é", "n": 2}]


def encoded(kind: str, rows: list[dict[str, Any]] = ROWS) -> bytes:
    """The rows as a file of this kind."""
    if kind == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        sink = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows), sink)
        return sink.getvalue()
    if kind in ("csv", "tsv"):
        text = io.StringIO(newline="")
        writer = csv.writer(text, delimiter="," if kind == "csv" else "\t")
        writer.writerow(rows[0])
        writer.writerows(row.values() for row in rows)
        return text.getvalue().encode()
    if kind == "json":
        return json.dumps(rows).encode()
    if kind == "jsonl":
        return "".join(json.dumps(row) + "\n" for row in rows).encode()
    return "\n\n".join(row["text"] for row in rows).encode()


def packed(data: bytes, suffix: str) -> bytes:
    if suffix == ".gz":
        return gzip.compress(data[:10]) + gzip.compress(data[10:])  # two members, as parallel tools write
    if suffix == ".zst":
        import pyarrow as pa

        return pa.compress(data, codec="zstd", asbytes=True)
    return data


def read(path: Path | str, **settings: Any) -> list[Any]:
    return list(documents(TextConfig(kind="file", path=str(path), **settings)))


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kind", ["txt", "md", "jsonl", "ndjson", "json", "csv", "tsv", "parquet"])
def test_the_suffix_says_what_a_file_is(tmp_path: Path, kind: str, suffix: str) -> None:
    file = tmp_path / f"rows.{kind}{suffix}"
    file.write_bytes(packed(encoded({"ndjson": "jsonl"}.get(kind, kind)), suffix))
    assert read(file) == [row["text"] for row in ROWS]
    assert read(tmp_path) == read(file)
    assert read(tmp_path / f"*.{kind}{suffix}") == read(file)
    if kind not in ("txt", "md"):
        with pytest.raises(DataError, match=r"column 'n' holds int|column 'txt'; did you mean 'text'"):
            read(file, column="txt")


def test_a_suffix_that_says_nothing_is_asked_about(tmp_path: Path) -> None:
    (tmp_path / "rows.log").write_bytes(encoded("jsonl"))
    with pytest.raises(
        ConfigError, match=r"what is in '.*rows\.log'\? Its suffix says nothing .*; set format to one of text, "
    ):
        read(tmp_path / "rows.log")
    assert read(tmp_path / "rows.log", format="jsonl") == [row["text"] for row in ROWS]
    (tmp_path / "README.md").write_text("read me")
    (tmp_path / ".hidden.bin").write_text("")
    (tmp_path / "_SUCCESS").write_text("")
    with pytest.raises(ConfigError, match=r"rows\.log.*name the files you mean by a pattern"):
        read(tmp_path)
    (tmp_path / "rows.log").unlink()
    assert read(tmp_path) == ["read me"]
    with pytest.raises(DataError, match="no files in"):
        read(tmp_path / "*.csv")
    with pytest.raises(DataError, match=r"no file '.*READM\.md'; did you mean 'README\.md'"):
        read(tmp_path / "READM.md")


def test_a_folder_is_read_in_a_fixed_order_and_each_file_by_its_own_suffix(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x.txt").write_text("fourth\n\nfifth")
    (tmp_path / "a.jsonl").write_text('{"text": "first"}\n')
    (tmp_path / "b" / "a.csv").write_text("text\nsecond\nthird\n")
    assert read(tmp_path) == ["first", "second", "third", "fourth", "fifth"]
    assert read(tmp_path / "**" / "*.txt") == ["fourth", "fifth"]
    assert read(tmp_path / "**" / "*.txt", whole_files=True) == ["fourth\n\nfifth"]
    with pytest.raises(ConfigError, match="'column' belongs to files with columns"):
        read(tmp_path, column="text")
    with pytest.raises(ConfigError, match="'separator' belongs to text files; there is none"):
        read(tmp_path / "*", separator="|")


def test_byte_order_marks_and_line_ends_of_windows_are_no_text(tmp_path: Path) -> None:
    bom = b"\xef\xbb\xbf"
    (tmp_path / "a.txt").write_bytes(bom + b"one\r\nline\r\n\r\ntwo")
    assert read(tmp_path / "a.txt") == ["one\nline", "two"]
    assert read(tmp_path / "a.txt", separator="\r\n\r\n") == ["one\nline", "two"]
    (tmp_path / "a.jsonl").write_bytes(bom + b'{"text": "x"}\r\n{"text": "y"}\r\n')
    (tmp_path / "a.csv").write_bytes(bom + b'text,n\r\n"x\r\nz",1\r\n')
    (tmp_path / "a.json").write_bytes(bom + b'[{"text": "x"}]')
    assert [read(tmp_path / f"a.{kind}") for kind in ("jsonl", "csv", "json")] == [["x", "y"], ["x\r\nz"], ["x"]]


def test_a_long_cell_of_a_table_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text\n" + "a" * 300_000 + "\n")
    assert [len(text) for text in read(tmp_path / "a.csv")] == [300_000]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"text,n\nx\n", r"line 2 has 1 cells for 2 columns"),
        ("a.csv", b"text,text\nx,y\n", r"names a column twice"),
        ("a.tsv", b'text\n"x\n', r"no table of this format: unexpected end of data"),
        (
            "a.json",
            b'{"text": "x"}\n{"text": "y"}\n',
            r"is not JSON: .*if it holds an object a line, set format: jsonl",
        ),
        ("a.json", b'{"text": "x"}', r"holds dict, not a list of objects"),
        ("a.json", b'["x"]', r"item 0 holds str, not an object"),
        ("a.parquet", b"PAR1 no", r"a\.parquet' cannot be read"),
        ("a.txt.gz", b"no gzip", r"a\.txt\.gz' cannot be read: BadGzipFile"),
        ("a.txt.gz", gzip.compress(b"some text" * 9, mtime=0)[:-12], r"a\.txt\.gz' cannot be read: EOFError"),
        ("a.txt.zst", b"no zstd", r"a\.txt\.zst' cannot be read"),
        ("a.txt", "text".encode("utf-16"), r"a\.txt' is not UTF-8 text"),
    ],
)
def test_a_damaged_file_is_one_clear_error(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(tmp_path / name)


def test_null_rows_and_broken_unicode_are_left_out_with_their_number_or_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = '{"text": "a"}\n{"text": null}\n{"text": "\\ud800"}\n{"text": null}\n{"text": "b"}\n'
    (tmp_path / "a.jsonl").write_text(rows)
    with caplog.at_level(logging.WARNING):
        assert read(tmp_path / "a.jsonl") == ["a", "b"]
    assert "line 2: column 'text' holds null; such rows are left out" in caplog.text
    assert "3 of 5 rows were left out: 2 null, 1 no Unicode text (lone surrogates)" in caplog.text
    with pytest.raises(DataError, match=r"line 2: column 'text' holds null; mend the row, or .* bad_rows: skip"):
        read(tmp_path / "a.jsonl", bad_rows="error")


def test_an_attention_mask_beside_token_ids_is_obeyed(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"input_ids": [5, 6, 0, 0], "attention_mask": [1, 1, 0, 0]}\n')
    assert read(tmp_path / "a.jsonl") == [TokenRow([5, 6], 4)]


def test_conversations_are_read_in_both_spellings(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"messages": [{"role": "user", "content": "hi", "name": null}]}\n')
    (tmp_path / "b.jsonl").write_text('{"conversations": [{"from": "gpt", "value": "yo"}]}\n')
    assert read(tmp_path) == [
        Chat([{"role": "user", "content": "hi"}]), Chat([{"role": "assistant", "content": "yo"}])
    ]  # fmt: skip


def test_the_column_need_not_be_named_where_there_is_one_that_will_do(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"input_ids": [1], "tokens": [2]}\n')
    with pytest.raises(DataError, match=r"has several of them \(input_ids, tokens\).*name one with column"):
        read(tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl").write_text('{"tokens": [2], "text": "t"}\n')
    assert read(tmp_path / "a.jsonl") == ["t"]


@pytest.mark.parametrize("form", [None, "torch", "numpy", "arrow"])
def test_a_saved_data_set_is_read_the_same_whatever_its_format(tmp_path: Path, form: str | None) -> None:
    import datasets

    columns = {"input_ids": [[1, 2], [3, 4]], "attention_mask": [[1, 1], [1, 0]], "other": [None, 1.5]}
    datasets.Dataset.from_dict(columns).with_format(form).save_to_disk(tmp_path / "saved")
    found = list(documents(TextConfig(kind="dataset", path=str(tmp_path / "saved"))))
    assert found == [TokenRow([1, 2], 2), TokenRow([3], 2)]
    assert all(type(token) is int for row in found for token in row.ids)
    with pytest.raises(ConfigError, match="set kind: dataset"):
        read(tmp_path / "saved")


def test_a_data_set_folder_that_is_not_there_is_no_question_for_the_hub(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no folder '.*nowhere'"):
        documents(TextConfig(kind="dataset", path=str(tmp_path / "nowhere")))


@pytest.fixture
def mixture(tmp_path: Path) -> Any:
    for name, count in (("a", 9), ("b", 40)):
        (tmp_path / f"{name}.txt").write_text("\n\n".join(f"{name}{i}" for i in range(count)))

    def make(**settings: Any) -> TextConfig:
        parts = [
            {"kind": "file", "path": str(tmp_path / f"{name}.txt"), "weight": weight}
            for name, weight in (("a", 1), ("b", 2))
        ]
        return structure({"kind": "mixture", "mixture": parts, "held_out": 0.0, **settings}, TextConfig)

    return make


def test_a_mixture_keeps_its_weights_at_every_moment(mixture: Any) -> None:
    found = [str(text) for text in documents(mixture())]
    assert found[:6] == ["b0", "a0", "b1", "b2", "a1", "b3"]
    for stop in range(1, len(found)):
        firsts = sum(text[0] == "a" for text in found[:stop])
        assert abs(firsts - stop / 3) <= 1
    assert sum(text[0] == "a" for text in found) == 9  # it ends with the first text that is used up
    assert mixture().description.startswith("1 /")
    rest = list(documents(mixture(until="last")))
    assert sorted(map(str, rest)) == sorted([f"a{i}" for i in range(9)] + [f"b{i}" for i in range(40)])


def test_a_mixture_holds_out_the_same_documents_as_its_parts(mixture: Any) -> None:
    config = mixture(held_out=0.3, until="last")
    train, held_out = set(documents(config, "train")), set(documents(config, "held_out"))
    assert held_out == {text for text in train | held_out if is_held_out(text, 0.3)}
    assert not train & held_out


def test_a_held_out_part_without_a_document_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("b\n\nempty")
    config = TextConfig(kind="file", path=str(tmp_path / "a.txt"), held_out=0.05)
    with pytest.raises(
        DataError, match=r"none of the 2 documents of .* falls into the 0\.05 held out .*set held_out: 0"
    ):
        require_held_out(config)
    require_held_out(TextConfig(kind="file", path=str(tmp_path / "a.txt"), held_out=0.0))
