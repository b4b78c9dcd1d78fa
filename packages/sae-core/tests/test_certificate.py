"""A screened product selects what float32 selects: the bound holds, and the selections heed it, whatever the rows are."""

# R rows, D d_in, F d_sae

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_core import SparseCodes, TrainConfig, Trainer, create
from sae_core.ops import certificate, certified, screening
from sae_core.ops.batch_topk import BatchTopK
from sae_core.ops.certificate import Latents, Rounding, Rows, norms_above, rounded_up
from sae_core.ops.encode import encode_entries
from sae_core.ops.product import EncoderProduct
from sae_core.ops.screened import Screened
from sae_core.ops.screening import encoder_products, is_screened, multiplies_bfloat16, tallied
from sae_core.ops.select import Above, AbsTopK, CertifiedSelection, GroupMax, TopK
from torch import Tensor

CPU = torch.device("cpu")


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


KINDS = ["random", "duplicated", "outliers", "zero rows", "tied", "worst rounding", "far away", "with dead latents"]


def problem(
    kind: str, seed: int, scale: float = 1.0, width: int = 24, d_sae: int = 320
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, weights and biases that are hard in one way."""
    x, W, b = draw(seed, 7, width), draw(seed + 1, d_sae, width), 0.1 * draw(seed + 2, d_sae)
    if kind == "duplicated":
        W, b = W[: d_sae // 80].repeat(80, 1), b[: d_sae // 80].repeat(80)
        W = W * (1 + 2.0**-22 * draw(seed + 3, d_sae, 1).sign())
    elif kind == "outliers":
        x[:, 0], x[0] = 1000.0, 100 * x[0]
        W[::5] *= 30
    elif kind == "zero rows":
        x[::2], b = 0.0, b.round()
    elif kind == "tied":
        x, W, b = x.round(), W.round(), b.round()
    elif kind == "worst rounding":  # each number just below the middle between two of bfloat16, all errors of one sign
        x, W = (1 + 2.0**-8 - 2.0**-20) * torch.ones_like(x), (1 + 2.0**-8 - 2.0**-20) * torch.ones_like(W)
        W[::2], b = W[::2].bfloat16().float(), torch.zeros_like(b)
        W = W * (1 + 2.0**-13 * draw(seed, d_sae, 1).abs())
    elif kind == "far away":
        x = x * 1e-3 + 10 * draw(seed + 4, 1, width)
    elif kind == "with dead latents":
        W[::3], b[::3] = 0.0, -10.0
    return x * scale, W, b * scale


def real_ranks(x: Tensor, W: Tensor, b: Tensor, scale: Tensor | None, threshold: float = 0.0) -> Tensor:
    pre = x.double() @ W.double().t() + b.double()
    return (pre if scale is None else pre * scale.double()) - threshold


def bounds_of(product: Screened) -> Tensor:
    proposed = product.bounds(slice(0, product.rows))
    return product.rounding.above(proposed).double() + product.certified.tiny.double().unsqueeze(1)


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(KINDS),
    st.integers(0, 10**6),
    st.integers(-120, 90),
    st.booleans(),
    st.sampled_from([0.0, 0.7, -3.0]),
)
def test_the_product_is_an_upper_bound_and_twice_its_error_below_it_a_lower_one(
    kind: str, seed: int, exponent: int, scaled: bool, threshold: float
) -> None:
    x, W, b = problem(kind, seed, 2.0**exponent)
    scale = draw(seed + 5, 320).abs() if scaled else None
    product = Screened(x, W, b, scale=scale, threshold=threshold)
    rank = real_ranks(x, W, b, scale, threshold)
    pre = EncoderProduct(x, W, b).of_rows(torch.arange(7))
    single = (pre if scale is None else pre * scale).double() - threshold
    usable, upper = product.certified.usable, bounds_of(product)
    assert bool(usable.any()) or exponent > 60
    for found in (rank, single):
        assert bool((found <= upper)[usable].all())
    row, latent = torch.arange(7)[:, None].expand(7, 320), torch.arange(320).expand(7, 320)
    lower = product.rounding.beneath(product.bounds(slice(0, 7))).double() - 2 * product.errors(row, latent).double()
    assert bool((single >= lower - product.certified.tiny.double().unsqueeze(1))[usable].all())


def selections(d_sae: int, seed: int) -> dict[str, CertifiedSelection]:
    scale = draw(seed, d_sae).abs() + 0.1
    return {
        "topk": TopK(5),
        "scaled topk": TopK(5, scale),
        "all": TopK(d_sae),
        "abstopk": AbsTopK(4, scale),
        "groupmax": GroupMax(8, scale),
        "above a number": Above(1.5),
        "above numbers": Above(3 * scale - 1),
        "batchtopk": BatchTopK(3.5),
        "scaled batchtopk": BatchTopK(6, scale),
    }


def assert_selected(
    codes: SparseCodes, selection: CertifiedSelection, x: Tensor, W: Tensor, b: Tensor, unit: float
) -> None:
    """What a full product gives, but that values closer than float32 resolves may stand for each other."""
    full = selection(EncoderProduct(x, W, b))
    scale = selection.scale

    def ranks(found: SparseCodes) -> Tensor:
        values = found.values if scale is None else found.values * scale[found.indices]
        return values.abs() if isinstance(selection, AbsTopK) else values

    pre = (x.double() @ W.double().t() + b.double())[codes.row_ids(), codes.indices]
    size = (x.double().norm(dim=1).max() * W.double().norm(dim=1).max() + b.abs().max()) * (
        1 if scale is None else max(1.0, float(scale.max()))
    )
    close = unit * float(size) + 1e-30
    assert float((codes.values - pre).abs().max() if len(pre) else 0.0) <= close
    entries = codes.row_ids() * codes.d_sae + codes.indices
    assert len(entries.unique()) == len(entries)
    if isinstance(selection, Above):
        mine, theirs = set(entries.tolist()), set((full.row_ids() * full.d_sae + full.indices).tolist())
        threshold = torch.as_tensor(selection.threshold).expand(codes.d_sae)
        real = x.double() @ W.double().t() + b.double() - threshold
        assert all(abs(float(real.flatten()[entry])) <= close for entry in mine ^ theirs)
        return
    assert len(codes.values) == len(full.values)
    if isinstance(selection, BatchTopK):
        torch.testing.assert_close(ranks(codes).sort().values, ranks(full).sort().values, rtol=0, atol=close)
        return
    k = len(codes.values) // codes.rows
    mine_RK, theirs_RK = (ranks(found).view(-1, k).sort(1).values for found in (codes, full))
    torch.testing.assert_close(mine_RK, theirs_RK, rtol=0, atol=close)


@settings(max_examples=50, deadline=None)
@given(
    st.sampled_from(KINDS), st.sampled_from(sorted(selections(320, 0))), st.integers(0, 10**6), st.integers(-130, 100)
)
def test_a_screened_product_selects_what_a_full_one_selects(kind: str, name: str, seed: int, exponent: int) -> None:
    x, W, b = problem(kind, seed, 2.0**exponent if name not in ("above a number", "above numbers") else 1.0)
    selection = selections(320, seed)[name]
    with encoder_products("screened"), tallied() as tally:
        codes = encode_entries(x, None, W, b, selection)
    assert tally.rows == 7
    assert_selected(codes, selection, x, W, b, 2.0**-18)


@pytest.mark.parametrize("name", sorted(selections(320, 0)))
def test_no_rows_and_rows_that_are_not_finite_are_selected_as_in_full(name: str) -> None:
    x, W, b = problem("random", 3)
    selection = selections(320, 3)[name]
    with encoder_products("screened"):
        assert encode_entries(x[:0], None, W, b, selection).shape == (0, 320)
    x[2], x[4] = 3e37, torch.inf  # squares overflow, and products
    with encoder_products("screened"), tallied() as tally:
        codes = encode_entries(x, None, W, b, selection)
    full = selection(EncoderProduct(x, W, b))
    assert tally.full >= 2
    if isinstance(selection, BatchTopK):
        return  # infinite values are among the best; which of them is nobody's business
    row_of, theirs = codes.row_ids(), full.row_ids()
    for row in range(7):
        mine, other = set(codes.indices[row_of == row].tolist()), set(full.indices[theirs == row].tolist())
        assert mine == other or row == 4


def test_rows_of_copies_are_uncertain_and_computed_in_full() -> None:
    x, W, b = problem("duplicated", 11)
    with encoder_products("screened"), tallied() as tally:
        codes = encode_entries(x, None, W, b, TopK(5))
    assert tally.full == 7
    best = EncoderProduct(x, W, b).of_rows(torch.arange(7)).topk(5).values
    assert torch.equal(codes.values.view(7, 5).sort(1, descending=True).values, best)


def test_candidates_are_few_and_all_rows_certain_where_latents_are_far_apart() -> None:
    x, W = draw(0, 256, 256), torch.nn.functional.normalize(draw(1, 4096, 256), dim=1)
    for selection, most in ((TopK(16), 40), (BatchTopK(16), 48), (GroupMax(16), 81), (Above(2.5), 45)):
        with encoder_products("screened"), tallied() as tally:
            encode_entries(x, None, W, torch.zeros(4096), selection)
        assert tally.full == 0
        assert tally.candidates <= most * 256
        assert float(tally.share(CPU)) == 0


def test_a_guess_that_was_too_high_is_made_good_in_a_second_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    x, W, b = problem("random", 5)
    passes: list[Tensor] = []
    proposed = certified.proposed_above

    def counted(product: Screened, floor: Tensor, most: int | None = None) -> certified.Proposed:
        passes.append(floor)
        return proposed(product, floor, most)

    monkeypatch.setattr("sae_core.ops.batch_topk.proposed_above", counted)
    x[0] *= 20  # the rows that are looked at first do not speak for the others
    monkeypatch.setattr("sae_core.ops.batch_topk._SAMPLE_ROWS", 1)
    with encoder_products("screened"):
        codes = encode_entries(x, None, W, b, BatchTopK(30))
    assert len(passes) == 2
    assert passes[1] < passes[0]
    assert_selected(codes, BatchTopK(30), x, W, b, 2.0**-18)


# Each term of the bound is needed: without it some row is given a bound that is no bound.


def unbound(x: Tensor, W: Tensor, b: Tensor, threshold: float | None = None) -> bool:
    product = Screened(x, W, b, threshold=threshold)
    return bool((real_ranks(x, W, b, None, threshold or 0.0) > bounds_of(product)).any())


def along_residuals() -> tuple[Tensor, Tensor, Tensor]:
    """Weights that bfloat16 holds exactly, along what rows lose: |c - c^| |w| is all that covers it."""
    x = 1 + 2.0**-8 * (1 - 2.0**-10) * torch.ones(2, 64)
    return x, torch.ones(3, 64), torch.full((3,), -64.0)


WEAKER: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], tuple[Tensor, Tensor, Tensor]]] = {}


def weakening(example: tuple[Tensor, Tensor, Tensor]) -> Callable[..., Any]:
    def note(weaken: Callable[[pytest.MonkeyPatch], None]) -> Callable[[pytest.MonkeyPatch], None]:
        WEAKER[weaken.__name__] = (weaken, example)
        return weaken

    return note


@weakening(along_residuals())
def what_rows_lose(patch: pytest.MonkeyPatch) -> None:
    of = Rows.of
    patch.setattr(Rows, "of", lambda c, low, latents: (found := of(c, low, latents))._replace(a=0.5 * found.a))


@weakening((torch.ones(2, 64), along_residuals()[0][:1].repeat(3, 1), torch.full((3,), -64.0)))
def what_weights_lose(patch: pytest.MonkeyPatch) -> None:
    of = Rows.of
    patch.setattr(Rows, "of", lambda c, low, latents: (found := of(c, low, latents))._replace(n=0.5 * found.n))


@weakening((torch.ones(2, 1), -torch.ones(3, 1), torch.full((3,), 1 + 2.0**-8 - 2.0**-16)))
def what_biases_lose(patch: pytest.MonkeyPatch) -> None:
    of = Latents.of

    def weaker(*args: Any) -> Latents:
        found = of(*args)
        found.low[:, -5] = 0  # b2
        return found

    patch.setattr(Latents, "of", weaker)


@weakening((torch.full((1, 1), 1.0), torch.full((1, 1), 0.9), torch.full((1,), 256.0)))
def what_the_result_loses(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Rounding, "_slack", lambda self, times: 0.0)


@pytest.mark.parametrize("name", sorted(WEAKER))
def test_without_any_term_there_is_a_row_whose_bound_is_none(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weaken, (x, W, b) = WEAKER[name]
    assert not unbound(x, W, b)
    weaken(monkeypatch)
    assert unbound(x, W, b)


def test_a_selection_without_what_weights_lose_is_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The best latent is below 200 others in bfloat16, and is found by its bound alone."""
    x, W, b = torch.ones(3, 64), torch.ones(320, 64), torch.zeros(320)
    W[7] = 1 + 2.0**-8 * (1 - 2.0**-10)
    b[:200], b[7] = 0.1, 0.0

    def kept() -> list[int]:
        with encoder_products("screened"):
            return encode_entries(x, None, W, b, TopK(1)).indices.tolist()

    assert kept() == [7, 7, 7]
    what_weights_lose(monkeypatch)
    monkeypatch.setattr(Rounding, "_slack", lambda self, times: 0.0)
    of = Latents.of
    monkeypatch.setattr(Latents, "of", lambda *args: dataclasses.replace(of(*args), spread=torch.zeros(320)))
    monkeypatch.setattr(
        Rows, "of", lambda c, low, latents: Rows(*(torch.zeros(3),) * 3, torch.ones(3, dtype=torch.bool))
    )
    assert kept() != [7, 7, 7]


@given(st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=1, max_size=9))
def test_norms_and_numbers_are_rounded_up_and_never_down(numbers: list[float]) -> None:
    x = torch.tensor([numbers])
    assert norms_above(x).double().item() >= x.double().norm().item()
    assert bool((rounded_up(x).double() >= x.double()).all() | (x.abs() < certificate._SMALLEST).any())  # pyright: ignore[reportPrivateUsage]


# Who decides.


def test_hardware_decides_and_form_and_precision_are_heeded(monkeypatch: pytest.MonkeyPatch) -> None:
    large: dict[str, Any] = {"rows": 2048, "d_sae": 16384, "d_in": 768, "device": CPU}
    monkeypatch.setattr(screening, "_processor_multiplies_bfloat16", lambda: False)
    assert not is_screened(**large, dtype=torch.float32)
    monkeypatch.setattr(screening, "_processor_multiplies_bfloat16", lambda: True)
    assert is_screened(**large, dtype=torch.float32)
    assert is_screened(**large, dtype=torch.float32, wanted=32)
    assert not is_screened(**large, dtype=torch.float32, wanted=4096)  # too many to compute them one by one
    assert not is_screened(**large, dtype=torch.float64)
    assert not is_screened(**large, dtype=torch.bfloat16)
    assert not is_screened(**{**large, "rows": 4}, dtype=torch.float32)
    with encoder_products("full"):
        assert not is_screened(**large, dtype=torch.float32)
    with encoder_products("screened"):
        assert is_screened(**{**large, "rows": 4}, dtype=torch.float32)
    assert not multiplies_bfloat16(torch.device("meta"))


def test_steps_say_how_many_rows_were_computed_in_full_where_products_are_screened() -> None:
    def record(**changes: Any) -> dict[str, Any]:
        sae = create("topk", d_in=8, d_sae=64, k=4)
        config = TrainConfig(total_samples=64, batch_size=16, log_every_steps=2, progress_bar=False, **changes)
        return dict(Trainer(sae, list(draw(0, 64, 8).split(16)), config).fit().history[0])

    assert record(precision="bfloat16")["metrics/uncertain_rows"] == 0
    assert "metrics/uncertain_rows" not in record(precision="bfloat16", encoder_product="full")
    assert record(encoder_product="full")["loss"] == pytest.approx(record(precision="bfloat16")["loss"], rel=1e-4)
