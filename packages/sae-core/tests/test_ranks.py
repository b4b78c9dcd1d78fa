"""Two and four processes train what one trains: same records, same weights, same selections, whatever is asked of the batch.

All cases of `ranks_process` run in one process, and in one group of four.
"""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_core.testing.rank_processes import run_program

pytestmark = pytest.mark.slow

PROGRAM = Path(__file__).with_name("ranks_process.py")
ARCHITECTURES = runpy.run_path(str(PROGRAM))["ARCHITECTURES"]
SIZES = (2, 4)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the first two of four processes found, and with each what one process found."""
    folder = tmp_path_factory.mktemp("ranks")
    run_program(PROGRAM, folder)
    alone, *both = (torch.load(folder / f"{name}.pt", weights_only=False) for name in ("alone", "found-0", "found-1"))
    return [{**each, **alone} for each in both]


def close(a: Any, b: Any, tolerance: float) -> None:
    if isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            close(a[key], b[key], tolerance)
    elif isinstance(a, list):
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            close(one, other, tolerance)
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    else:
        assert a == pytest.approx(b, rel=tolerance, abs=tolerance)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", [*(f"trained {name}" for name in ARCHITECTURES), "unread_parts"])
def test_several_processes_train_what_one_trains(found: list[dict[str, Any]], case: str, size: int) -> None:
    records = found[0][f"{case} 1"]["history"]
    assert len(records) == 4
    assert case != "trained topk" or any(record["resampled"] for record in records)
    close(found[0][f"{case} {size}"], found[0][f"{case} 1"], 1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_where_ranks_read_each_something_else_the_batch_is_all_of_it(found: list[dict[str, Any]], size: int) -> None:
    expected = found[0][f"together {size} 1"]
    assert expected["history"][-1]["step"] == 10 - size  # the last rank has the fewest
    for each in found:
        close(each[f"own_rows {size}"]["whole"], expected, 1e-5)
        close(each[f"own_rows {size}"]["again"], each[f"own_rows {size}"]["whole"], 0.0)


def test_the_decoders_gradient_travels_while_the_encoders_is_computed(found: list[dict[str, Any]]) -> None:
    assert found[0]["sums_begin_early 2"] == [False, True]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", [f"trained {name}" for name in ARCHITECTURES])
def test_every_process_ends_with_the_same_bits(found: list[dict[str, Any]], case: str, size: int) -> None:
    close(found[0][f"{case} {size}"], found[1][f"{case} {size}"], 0.0)


@pytest.mark.parametrize("size", SIZES)
def test_a_selection_over_the_batch_is_that_of_all_processes_with_ties(found: list[dict[str, Any]], size: int) -> None:
    for name, alone in found[0]["ties 1"].items():
        together = found[0][f"ties {size}"][name]
        assert torch.equal(together != 0, alone != 0), name
        torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
    assert any(bool(each.any()) for each in found[0]["ties 1"].values())


@pytest.mark.parametrize("size", SIZES)
def test_the_kth_largest_of_all_processes_is_found_without_sending_the_numbers(
    found: list[dict[str, Any]], size: int
) -> None:
    assert found[1][f"kth_largest {size}"] == found[0]["kth_largest 1"]


@pytest.mark.parametrize("size", SIZES)
def test_a_run_that_goes_on_with_as_many_processes_has_the_same_bits(found: list[dict[str, Any]], size: int) -> None:
    for each in found:
        close(each[f"stopped_and_resumed {size}"]["again"], each[f"stopped_and_resumed {size}"]["whole"], 0.0)


@pytest.mark.parametrize(("before", "after"), [(1, 2), (1, 4), (2, 4)])
def test_a_run_goes_on_with_another_number_of_processes(found: list[dict[str, Any]], before: int, after: int) -> None:
    close(found[0][f"from {before} {after}"], found[0]["stopped_and_resumed 1"]["whole"], 1e-5)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("other lr", "train.lr"),
        ("other data", "source"),
        ("other content", "source.fingerprint"),
        ("other version", "versions.sae-core"),
        ("other lists", "reads other data than rank 0"),
    ],
)
def test_a_process_with_something_else_ends_all_before_the_first_step(
    found: list[dict[str, Any]], size: int, case: str, message: str
) -> None:
    for each in found:
        said = each[f"{case} {size}"]
        assert said.startswith("0 ")
        assert "rank 1" in said
        assert message in said
