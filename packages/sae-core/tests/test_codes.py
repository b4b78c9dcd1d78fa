"""Sparse and dense codes answer the same questions with the same numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sae_core.codes import Codes, DenseCodes, LatentMajor, SparseCodes
from sae_core.errors import ShapeError
from torch import Tensor

# Three rows over four latents: the first has two entries, the second none, the third an entry whose value is zero.
VALUES = torch.tensor([2.0, -1.0, 0.0, 5.0])
INDICES = torch.tensor([3, 0, 1, 3])
OFFSETS = torch.tensor([0, 2, 2, 4])
DENSE = torch.tensor([[-1.0, 0.0, 0.0, 2.0], [0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 5.0]])


def ragged() -> SparseCodes:
    return SparseCodes(VALUES, INDICES, (3,), 4, offsets=OFFSETS)


@st.composite
def dense_rows(draw: st.DrawFn) -> Tensor:
    """(rows, d_sae) with many zeros, rows and all of it possibly empty."""
    rows, d_sae = draw(st.integers(0, 5)), draw(st.integers(1, 7))
    cell = st.sampled_from([0.0, 0.0, 0.0, 1.0, -2.0, 3.5])
    cells = draw(st.lists(cell, min_size=rows * d_sae, max_size=rows * d_sae))
    return torch.tensor(cells, dtype=torch.float64).view(rows, d_sae)


def test_ragged_codes_by_hand() -> None:
    codes = ragged()
    assert codes.to_dense().equal(DENSE)
    assert codes.row_ids().tolist() == [0, 0, 2, 2]
    assert codes.l0().tolist() == [2, 0, 1]  # the entry that holds zero does not count
    assert codes.firing_counts().tolist() == [1, 0, 0, 2]
    assert codes.fired().tolist() == [True, False, False, True]
    assert codes.row_sums().tolist() == [1.0, 0.0, 5.0]
    assert codes.per_latent(torch.tensor([10.0, 11.0, 12.0, 13.0])).tolist() == [13.0, 10.0, 11.0, 13.0]


def test_regular_codes_by_hand() -> None:
    codes = SparseCodes.regular(torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([[4, 0], [1, 2]]), d_sae=5)
    assert codes.row_offsets().tolist() == [0, 2, 4]
    assert codes.row_ids().tolist() == [0, 0, 1, 1]
    assert codes.to_dense().tolist() == [[2, 0, 0, 0, 1], [0, 3, 0, 0, 0]]
    assert codes.l0().tolist() == [2, 1]
    assert codes.row_sums(torch.tensor([1.0, 1.0, 10.0, 100.0])).tolist() == [2.0, 110.0]


def test_latent_major_order_by_hand() -> None:
    major = ragged().latent_major()
    assert major.latents.tolist() == [0, 1, 3, 3]
    assert major.rows.tolist() == [0, 2, 0, 2]  # entries of one latent stay in the order of their rows
    assert major.order.tolist() == [1, 2, 0, 3]
    assert major.offsets.tolist() == [0, 1, 2, 2, 4]


def test_codes_of_the_same_entries_share_one_sorting() -> None:
    codes = ragged()
    doubled, reshaped = codes.map(lambda values: 2 * values), codes.reshape(3, 1)
    assert doubled.latent_major() is codes.latent_major()
    assert reshaped.latent_major() is codes.latent_major()
    assert doubled.to_dense().equal(2 * DENSE)
    assert reshaped.to_dense().shape == (3, 1, 4)


@given(dense_rows())
def test_sparse_and_dense_codes_agree(dense: Tensor) -> None:
    sparse, full = SparseCodes.from_dense(dense), DenseCodes(dense, (dense.shape[0],))
    both: tuple[Codes, Codes] = (sparse, full)
    for codes in both:
        assert codes.shape == dense.shape
        assert codes.to_dense().equal(dense)
        assert codes.l0().equal((dense != 0).sum(-1))
        assert codes.fired().equal((dense != 0).any(0))
        assert codes.firing_counts().equal((dense != 0).sum(0))
        assert codes.row_sums().equal(dense.sum(-1))
    parameter = torch.arange(dense.shape[1], dtype=torch.float64)
    weighted = [codes.with_values(codes.values * codes.per_latent(parameter)).to_dense() for codes in both]
    assert weighted[0].equal(weighted[1])
    assert full.to_sparse().to_dense().equal(dense)


@given(dense_rows())
def test_latent_major_entries_are_the_transposed_ones(dense: Tensor) -> None:
    codes = SparseCodes.from_dense(dense)
    major = codes.latent_major()
    transposed = torch.zeros(dense.shape[1], dense.shape[0], dtype=dense.dtype)
    transposed[major.latents, major.rows] = codes.values[major.order]
    assert transposed.equal(dense.T)
    assert major.offsets.diff().tolist() == (dense != 0).sum(0).tolist()


@pytest.mark.parametrize("d_sae", [7, 2**15 - 1, 2**15, 70_000])
def test_sorting_by_latent_is_right_on_both_sides_of_the_short_keys(d_sae: int) -> None:
    generator = torch.Generator().manual_seed(d_sae)
    indices = torch.randint(d_sae, (500,), generator=generator)
    indices[:2] = d_sae - 1
    major = LatentMajor.of(torch.arange(500), indices, d_sae)
    assert major.latents.equal(indices.sort(stable=True).values)
    assert major.rows.equal(indices.sort(stable=True).indices)
    assert int(major.offsets[-1]) == 500
    assert major.offsets.numel() == d_sae + 1


def test_the_dense_form_passes_gradients_to_the_values() -> None:
    values = VALUES.clone().requires_grad_()
    (ragged().with_values(values).to_dense() * torch.arange(12.0).view(3, 4)).sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [3.0, 0.0, 9.0, 11.0]


def test_codes_move_between_precisions_and_keep_their_places() -> None:
    moved = ragged().to(torch.float64)
    assert moved.values.dtype == torch.float64
    assert moved.to_dense().equal(DENSE.double())
    assert not ragged().with_values(VALUES.clone().requires_grad_()).detach().values.requires_grad


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"values": VALUES[:3]}, "of one length"),
        ({"values": VALUES.view(2, 2), "indices": INDICES.view(2, 2)}, "one-dimensional"),
        ({"offsets": None}, "either offsets"),
        ({"k": 2}, "either offsets"),
        ({"offsets": None, "k": 2}, "4 entries are not 3 rows of k = 2"),
        ({"offsets": OFFSETS[:3]}, r"offsets \(3,\) for 3 rows"),
    ],
)
def test_pieces_that_do_not_fit_together_are_refused(arguments: dict[str, Any], message: str) -> None:
    given = {"values": VALUES, "indices": INDICES, "leading_shape": (3,), "d_sae": 4, "offsets": OFFSETS, **arguments}
    with pytest.raises(ShapeError, match=message):
        SparseCodes(**given)


def test_rows_cannot_take_a_shape_of_another_size() -> None:
    with pytest.raises(ShapeError, match="3 rows cannot take"):
        ragged().reshape(2, 2)
