from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_core.errors import DataError, FormatError
from sae_core.training.checkpoint import Checkpoints, read_checkpoint, write_checkpoint

STATE: dict[str, Any] = {
    "weights": {"W": torch.randn(3, 4), "scale.half": torch.ones(2, dtype=torch.bfloat16)},
    "generator": torch.Generator().manual_seed(3).get_state(),
    "nested": [{"x": torch.tensor(2.5, dtype=torch.float64)}, None, "text", (1, 2)],
    "numbers": {"tiny": 5e-324, "third": 1 / 3, "huge": 2**80, "yes": True, "infinite": float("inf")},
    "empty": torch.zeros(0, 5),
}


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def test_a_state_comes_back_with_every_bit_and_type(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "c", STATE)
    assert same(read_checkpoint(tmp_path / "c"), STATE)
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["checkpoint.json", "tensors.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text().filter(lambda k: k[:1] != "$"), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=12, deadline=None)
@given(st.dictionaries(st.sampled_from(["a", "a.b", "b"]), json_values, min_size=1))
def test_any_plain_state_comes_back(tmp_path_factory: pytest.TempPathFactory, state: dict[str, Any]) -> None:
    folder = tmp_path_factory.mktemp("state") / "c"
    assert same(read_checkpoint(write_checkpoint(folder, state)), state)


def test_tensors_that_share_memory_and_names_that_look_alike_are_kept_apart(tmp_path: Path) -> None:
    whole = torch.arange(12.0).view(3, 4)
    state = {"a.b": whole, "a": {"b": whole.t(), "c": whole[:2]}}
    assert same(read_checkpoint(write_checkpoint(tmp_path / "c", state)), state)


@pytest.mark.parametrize(
    ("state", "message"),
    [({"a": {1: 2}}, "a: keys must be text"), ({"a": [object()]}, r"a\.0 is a object"), ({"$a": 1}, "leading")],
)
def test_what_is_neither_tensor_nor_json_is_refused_and_nothing_is_left(
    tmp_path: Path, state: Any, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        write_checkpoint(tmp_path / "c", state)
    assert list(tmp_path.iterdir()) == []


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["checkpoint.json", "tensors.safetensors"])
@pytest.mark.parametrize("damage", ["flip", "cut", "missing"])
def test_damage_is_named(tmp_path: Path, name: str, damage: str) -> None:
    path = write_checkpoint(tmp_path / "c", STATE) / name
    if damage == "flip":
        flip(path, path.read_bytes().index(b'"third":0.') + 12 if name.endswith("json") else path.stat().st_size - 1)
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-5])
    else:
        path.unlink()
    with pytest.raises(FormatError, match=name):
        read_checkpoint(tmp_path / "c")


def test_another_version_and_foreign_json_are_refused(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "c", STATE) / "checkpoint.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 99}))
    with pytest.raises(FormatError, match="checkpoint version 99, this sae-core reads 1"):
        read_checkpoint(tmp_path / "c")
    path.write_text("[]")
    with pytest.raises(FormatError, match="not a checkpoint"):
        read_checkpoint(tmp_path / "c")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_last_few_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    for samples in (100, 200, 300):
        checkpoints.save(samples, {"samples": samples})
    assert names(tmp_path) == ["000000000200", "000000000300"]
    found = checkpoints.newest()
    assert found is not None
    assert (found.state, found.damaged) == ({"samples": 300}, [])


def test_a_second_one_of_as_many_samples_takes_the_place_of_the_first_alone(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    for samples, value in ((100, 0), (200, 1), (200, 2), (200, 3)):
        checkpoints.save(samples, {"value": value})
    assert len(list(tmp_path.iterdir())) == 2
    found = checkpoints.newest()
    assert found is not None
    assert found.state == {"value": 3}
    assert (tmp_path / f"{100:012d}").is_dir()


def test_a_damaged_newest_one_is_named_and_skipped(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=3)
    for samples in (100, 200):
        checkpoints.save(samples, {"samples": samples})
    (tmp_path / "000000000200" / "tensors.safetensors").unlink()
    found = checkpoints.newest()
    assert found is not None
    assert found.state == {"samples": 100}
    assert len(found.damaged) == 1
    assert "000000000200/tensors.safetensors" in found.damaged[0]
    (tmp_path / "000000000100" / "checkpoint.json").write_text("{")
    with pytest.raises(FormatError, match="no whole checkpoint"):
        checkpoints.newest()


def test_saving_again_at_the_same_place_keeps_a_whole_one_at_every_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    checkpoints.save(100, {"try": 1})
    seen: list[Any] = []
    monkeypatch.setattr(Path, "rename", watched(Path.rename, lambda: seen.append(checkpoints.newest())))
    for attempt in (2, 3):
        checkpoints.save(100, {"try": attempt})
    assert all(found is not None and found.state["try"] in (1, 2, 3) for found in seen)
    newest = checkpoints.newest()
    assert newest is not None
    assert newest.state == {"try": 3}
    assert len(names(tmp_path)) == 1


def watched(function: Any, before: Any) -> Any:
    def wrapper(*args: Any) -> Any:
        before()
        return function(*args)

    return wrapper


def test_checkpoints_of_a_continuation_that_was_given_up_are_removed(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=5)
    for samples in (100, 200, 300):
        checkpoints.save(samples, {"samples": samples})
    checkpoints.save(150, {"samples": 150})
    assert names(tmp_path) == ["000000000100", "000000000150"]


def test_none_at_all_is_none(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path / "missing", keep_last=1).newest() is None
