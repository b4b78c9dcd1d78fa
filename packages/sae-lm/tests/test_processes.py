"""A run on a language model by several processes: one that runs the model and one that trains are as good as one for both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from sae_core import SAE
from sae_core.testing.rank_processes import run_program

pytestmark = pytest.mark.slow

PROGRAM = Path(__file__).with_name("lm_process.py")


@pytest.fixture(scope="module")
def folder(saved_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs of the program have left what came out."""
    place = tmp_path_factory.mktemp("processes")
    run_program(PROGRAM, saved_model, place)
    return place


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def same_bits(one: Path, two: Path) -> None:
    names = {path.name for path in one.iterdir()}
    assert {"sae_weights.safetensors", "log.jsonl"} <= names == {path.name for path in two.iterdir()}
    assert (one / "sae_weights.safetensors").read_bytes() == (two / "sae_weights.safetensors").read_bytes()
    assert records(one) == records(two)


def test_a_process_for_the_model_and_one_for_the_dictionary_give_the_bits_of_one_for_both(folder: Path) -> None:
    same_bits(folder / "one", folder / "fed")
    assert json.loads((folder / "one/cfg.json").read_text()) == json.loads((folder / "fed/cfg.json").read_text())


def close_records(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    for record, wanted in zip(found, expected, strict=True):
        assert record.keys() == wanted.keys()
        for key, value in wanted.items():
            assert record[key] == (None if value is None else pytest.approx(value, rel=1e-5, abs=1e-5)), key


def close(one: Path, two: Path) -> None:
    close_records(records(one), records(two))
    weights, expected = SAE.load(one).state_dict(), SAE.load(two).state_dict()
    for name, tensor in weights.items():
        assert (tensor - expected[name]).abs().max() < 1e-5, name


def test_two_processes_that_train_share_the_batches_of_one_that_runs_the_model(folder: Path) -> None:
    close(folder / "fed three", folder / "one")
    close(folder / "fed latents", folder / "one")


def test_two_that_run_the_model_for_one_give_what_two_have_that_do_both(folder: Path) -> None:
    measured = [
        {key: value for key, value in record.items() if not key.startswith("held_out")}
        for record in records(folder / "two")
    ]
    assert records(folder / "two readers") != records(folder / "one")
    close_records(records(folder / "two readers"), measured)


def test_two_processes_with_a_model_each_go_on_with_the_same_bits_and_measure_held_out_text(folder: Path) -> None:
    same_bits(folder / "two", folder / "two again")
    measured = [record["samples"] for record in records(folder / "two") if "held_out.ce_recovered" in record]
    assert measured == [512, 1024, 1280]


def test_eight_processes_that_share_out_batches_and_latents_train_and_measure_what_two_do(folder: Path) -> None:
    close(folder / "eight", folder / "two")


def test_sequences_are_trained_on_by_two_processes(folder: Path) -> None:
    last = records(folder / "temporal")[-1]
    assert last["samples"] % 31 == 0  # of windows of 32 without the BOS
    assert 1280 <= last["samples"] < 1280 + 31


def test_the_others_are_silent(folder: Path) -> None:
    for said in folder.glob("* said/*"):
        assert said.name.startswith("0.") or said.read_text() == "", said
