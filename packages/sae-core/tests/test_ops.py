"""Every op against its naive dense twin: same entries, same values, same gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_core import SparseCodes, TrainConfig, Trainer, create
from sae_core.codes import DenseCodes, LatentMajor
from sae_core.ops import bags, batch_topk, dispatch, largest, memory, product, select
from sae_core.ops.active import encode_active
from sae_core.ops.bags import entry_dots, latent_bags, row_bags
from sae_core.ops.batch_topk import BatchTopK
from sae_core.ops.decode import decode, decode_and_norms, decode_prefixes
from sae_core.ops.encode import encode_dense, encode_entries
from sae_core.ops.own_rows import with_own_rows
from sae_core.ops.product import EncoderProduct
from sae_core.ops.select import Above, AbsTopK, GroupMax, Selection, TopK
from sae_core.training.trainer import Progress
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

few = settings(max_examples=25, deadline=None)
shapes = st.tuples(st.integers(1, 12), st.integers(1, 5), st.integers(2, 40), st.integers(0, 10_000))


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks, groups and samples of a few entries, so that tiny shapes cross every boundary."""
    monkeypatch.setattr(product, "_BLOCK_ENTRIES", 40 * 3)
    monkeypatch.setattr(select, "_PIECE_BYTES", 40 * 8 * 2)
    monkeypatch.setattr(largest, "_MIN_WIDTH", 9)
    monkeypatch.setattr(largest, "_MAX_DENSITY", 1.0 / 8)
    monkeypatch.setattr(batch_topk, "_PIECE_ENTRIES", 50)
    monkeypatch.setattr(batch_topk, "_SAMPLE_ROWS", 2)


def problem(rows: int, d_in: int, d_sae: int, seed: int, *, levels: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, centre, encoder, b_enc in float64; with `levels`, small integers: values repeat and rows can be zero."""
    g = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        if levels:
            return torch.randint(-levels, levels + 1, size, generator=g).double()
        return torch.randn(size, generator=g, dtype=torch.float64)

    return draw(rows, d_in), draw(d_in), draw(d_in, d_sae).t().contiguous(), draw(d_sae)


@few
@given(shapes, st.sampled_from([1, 2, 5, 40]), st.integers(0, 2))
def test_largest_finds_what_topk_finds(shape: tuple[int, int, int, int], k: int, levels: int) -> None:
    rows, _, width, seed = shape
    x, _, _, _ = problem(rows, 7 * width, 1, seed, levels=levels)
    k = min(k, x.shape[1])
    values, indices = largest.largest(x, k)
    assert torch.equal(values.sort(-1).values, torch.topk(x, k).values.sort(-1).values)
    assert torch.equal(x.gather(1, indices), values)
    assert all(len(set(row)) == k for row in indices.tolist())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_k_largest_of_short_rows_are_the_same_with_ties_and_nan_and_several_threads(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(largest, "_PART_ENTRIES", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    x = torch.randn(50, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[7] = 1.0
    x[8, ::2] = 0.5
    x[9, :3] = float("nan")
    values, indices = largest.first_largest(x, 6)
    expected = torch.topk(x, 6).values
    assert torch.equal(values.sort(-1).values.nan_to_num(9.0), expected.sort(-1).values.nan_to_num(9.0))
    assert torch.equal(x.gather(1, indices).nan_to_num(9.0), values.nan_to_num(9.0))
    assert all(len(set(row)) == 6 for row in indices.tolist())
    if dtype != torch.bfloat16:
        assert sorted(indices[7].tolist()) == list(range(6))


@few
@given(shapes, st.booleans())
def test_above_is_nonzero_of_the_comparison(shape: tuple[int, int, int, int], per_latent: bool) -> None:
    rows, _, width, seed = shape
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=g)
    threshold = torch.randn(width, generator=g) if per_latent else 0.3
    assert torch.equal(largest.above(x, threshold), (x > threshold).flatten().nonzero().squeeze(-1))


def kept(pre: Tensor, rank: Tensor, k: int) -> Tensor:
    """Naive top-k: zeros where an entry does not stay."""
    return torch.zeros_like(pre).scatter(1, rank.topk(k).indices, pre.gather(1, rank.topk(k).indices))


@few
@given(shapes, st.integers(1, 40), st.booleans())
def test_row_selections_keep_what_their_dense_twins_keep(
    shape: tuple[int, int, int, int], k: int, scaled: bool
) -> None:
    rows, _, d_sae, seed = shape
    k = min(k, d_sae)
    x, _, W, b = problem(*shape)
    scale = (
        torch.rand(d_sae, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.1 if scaled else None
    )
    pre = x @ W.t() + b
    factor = 1.0 if scale is None else scale
    assert torch.allclose(TopK(k, scale)(EncoderProduct(x, W, b)).to_dense(), kept(pre, pre * factor, k))
    assert torch.allclose(AbsTopK(k, scale)(EncoderProduct(x, W, b)).to_dense(), kept(pre, (pre * factor).abs(), k))
    above = Above(0.2)(EncoderProduct(x, W, b))
    assert torch.allclose(above.to_dense(), torch.where(pre > 0.2, pre, 0.0))
    assert torch.equal(above.row_offsets().diff(), (pre > 0.2).sum(1))
    groups = next(g for g in range(min(k, d_sae), 0, -1) if d_sae % g == 0)
    best = (pre * factor).view(rows, groups, -1)
    expected = torch.where(best == best.amax(-1, keepdim=True), pre.view(rows, groups, -1), 0.0).view(rows, d_sae)
    assert torch.allclose(GroupMax(groups, scale)(EncoderProduct(x, W, b)).to_dense(), expected)


def batch_twin(pre: Tensor, k: float, scale: Tensor | None) -> Tensor:
    """The values of the int(k * rows) largest positive ranks of the whole batch, sorted."""
    rank = (pre if scale is None else pre * scale).flatten()
    best = rank.sort(descending=True).values[: int(k * pre.shape[0])]
    return best[best > 0]


@few
@given(shapes, st.floats(0, 40), st.booleans(), st.integers(0, 2))
def test_batch_topk_is_exact(shape: tuple[int, int, int, int], k: float, scaled: bool, levels: int) -> None:
    x, _, W, b = problem(*shape, levels=levels)
    scale = (
        torch.rand(shape[2], generator=torch.Generator().manual_seed(shape[3]), dtype=torch.float64) if scaled else None
    )
    codes = BatchTopK(k, scale)(EncoderProduct(x, W, b))
    rank = codes.values if scale is None else codes.values * scale[codes.indices]
    assert torch.allclose(rank.sort(descending=True).values, batch_twin(x @ W.t() + b, k, scale))
    assert torch.allclose(codes.to_dense().flatten()[codes.row_ids() * shape[2] + codes.indices], codes.values)


@pytest.mark.parametrize("row", [0, 1, 7, 63])
@pytest.mark.parametrize("k", [0.25, 1, 4])
def test_batch_topk_is_exact_when_all_mass_is_in_one_row(row: int, k: float) -> None:
    g = torch.Generator().manual_seed(row)
    x = torch.rand(64, 3, generator=g, dtype=torch.float64) * 1e-6
    x[row] = torch.tensor([1e3, 2e3, 3e3])
    W, b = torch.randn(40, 3, generator=g, dtype=torch.float64), torch.zeros(40, dtype=torch.float64)
    codes = BatchTopK(k)(EncoderProduct(x, W, b))
    assert torch.allclose(codes.values.sort(descending=True).values, batch_twin(x @ W.t(), k, None), rtol=1e-9, atol=0)
    assert int(codes.row_offsets().diff().argmax()) == row


@pytest.mark.parametrize("growth", [2.0, 0.5])
def test_batch_topk_is_exact_when_the_first_rows_are_unlike_the_rest(growth: float) -> None:
    x = (growth ** torch.arange(64, dtype=torch.float64)).unsqueeze(1).repeat(1, 2)
    W = torch.linspace(-1, 1, 80, dtype=torch.float64).view(2, 40).t()
    codes = BatchTopK(2)(EncoderProduct(x, W, torch.zeros(40, dtype=torch.float64)))
    assert torch.allclose(codes.values.sort(descending=True).values, batch_twin(x @ W.t(), 2, None), rtol=1e-9, atol=0)


def test_of_equal_values_the_first_in_the_batch_stay() -> None:
    codes = BatchTopK(1.5)(EncoderProduct(torch.ones(4, 1), torch.ones(3, 1), torch.zeros(3)))
    assert codes.row_offsets().tolist() == [0, 3, 6, 6, 6]


selections: list[tuple[str, Selection]] = [
    ("topk", TopK(3)),
    ("all", TopK(11)),
    ("abstopk", AbsTopK(2)),
    ("above", Above(0.1)),
    ("none", Above(1e9)),
    ("batchtopk", BatchTopK(2.5)),
]


@pytest.mark.parametrize(("name", "selection"), selections, ids=[name for name, _ in selections])
@pytest.mark.parametrize(("sparse", "mkl"), [(True, True), (True, False), (False, True)])
def test_sparse_gradients_are_those_of_the_dense_twin(
    name: str, selection: Selection, sparse: bool, mkl: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "_CROSSOVER", 100.0 if sparse else -1.0)
    if not mkl:
        monkeypatch.setattr(bags, "_mkl_sparse_works", lambda: False)
    x, centre, W, b = (t.requires_grad_() for t in problem(7, 4, 11, seed=1))
    W_dec = torch.randn(11, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    leaves = (x, centre, W, b, W_dec)
    codes = encode_entries(x, centre, W, b, selection)
    y = decode(codes.map(torch.relu), W_dec)
    pre = (x - centre) @ W.t() + b
    mask = SparseCodes(
        torch.ones_like(codes.values), codes.indices, codes.leading_shape, 11, codes.offsets, codes.k
    ).to_dense()
    twin = (pre * mask).relu() @ W_dec
    assert torch.allclose(y, twin)
    assert (type(y.grad_fn).__name__ == "_DecodeEntriesBackward") == sparse
    weights = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    for ours, theirs in zip(
        torch.autograd.grad((y * weights).sum(), leaves),
        torch.autograd.grad((twin * weights).sum(), leaves),
        strict=True,
    ):
        assert torch.allclose(ours, theirs, rtol=1e-9)


def test_gradients_equal_finite_differences() -> None:
    x, centre, W, b = (t.requires_grad_() for t in problem(3, 2, 8, seed=4))
    W_dec = torch.randn(8, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(5)).requires_grad_()

    def step(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        codes = encode_entries(*leaves[:4], TopK(3))
        return decode(codes, leaves[4]), decode_prefixes(codes, leaves[4], (2, 5, 8))

    assert torch.autograd.gradcheck(step, (x, centre, W, b, W_dec))


@few
@given(shapes, st.lists(st.integers(1, 40), min_size=1, max_size=4, unique=True))
def test_prefixes_are_decodes_of_the_first_latents(shape: tuple[int, int, int, int], widths: list[int]) -> None:
    x, _, W, b = problem(*shape)
    d_sae = shape[2]
    widths = sorted({min(width, d_sae) for width in widths})
    W_dec = W.clone().requires_grad_()
    codes = encode_entries(x, None, W, b, Above(0.0))
    values = codes.values.detach().requires_grad_()
    codes = codes.with_values(values)
    y = decode_prefixes(codes, W_dec, widths)
    dense = codes.to_dense()
    twin = torch.stack([dense[:, :width] @ W_dec[:width] for width in widths])
    assert torch.allclose(y, twin)
    weights = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for ours, theirs in zip(
        torch.autograd.grad((y * weights).sum(), (values, W_dec), allow_unused=True),
        torch.autograd.grad((twin * weights).sum(), (values, W_dec), allow_unused=True),
        strict=True,
    ):
        assert torch.allclose(ours, theirs)


@few
@given(shapes)
def test_bags_and_dots_are_sparse_products(shape: tuple[int, int, int, int]) -> None:
    x, _, W, b = problem(*shape)
    codes = Above(0.5)(EncoderProduct(x, W, b))
    dense = codes.to_dense()
    order = codes.latent_major()
    assert torch.allclose(row_bags(codes.values, codes.indices, codes.row_offsets(), W), dense @ W)
    assert torch.allclose(latent_bags(codes.values, order, x), dense.t() @ x)
    expected = (x @ W.t()).flatten()[codes.row_ids() * shape[2] + codes.indices]
    assert torch.allclose(entry_dots(x, W, order), expected)


def test_entries_are_sorted_by_latent_and_within_one_by_row() -> None:
    order = LatentMajor.of(torch.tensor([0, 0, 1, 2]), torch.tensor([2, 0, 2, 0]), d_sae=4)
    assert order.latents.tolist() == [0, 0, 2, 2]
    assert order.rows.tolist() == [0, 2, 0, 1]
    assert order.offsets.tolist() == [0, 2, 2, 4, 4]


@pytest.mark.parametrize("density", [0.001, 1.0])
def test_active_latents_are_the_same_in_dense_and_sparse_form(density: float) -> None:
    x, centre, W, b = problem(6, 4, 600, seed=9)
    codes = encode_active(x, centre, W, b, 1.0, density=density)
    assert isinstance(codes, DenseCodes) == (density == 1.0)
    pre = encode_dense(x, centre, W, b)
    assert torch.allclose(
        codes.map(lambda h: torch.where(h > 1.0, h, 0.0)).to_dense(), torch.where(pre > 1.0, pre, 0.0)
    )


class Largest(TorchDispatchMode):
    """Remembers the size in bytes of the largest memory that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(
        self, func: object, types: object, args: tuple[object, ...] = (), kwargs: object = None
    ) -> object:
        out = func(*args, **(kwargs or {}))  # type: ignore[operator]
        for one in out if isinstance(out, tuple | list) else (out,):
            if isinstance(one, Tensor) and one.layout == torch.strided:
                self.bytes = max(self.bytes, one.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "matryoshka_batchtopk", "abstopk"])
def test_a_step_never_holds_a_batch_by_dictionary_matrix(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    d_in, d_sae, rows = 8, 1024, 1024
    monkeypatch.setattr(product, "_BLOCK_ENTRIES", rows * d_sae // 8)
    monkeypatch.setattr(batch_topk, "_PIECE_ENTRIES", rows * d_sae // 16)
    more = {"matryoshka_widths": (128, 1024)} if "matryoshka" in architecture else {}
    sae = create(architecture, d_in=d_in, d_sae=d_sae, k=8, seed=0, **more)
    x = torch.randn(rows, d_in, generator=torch.Generator().manual_seed(0))
    with Largest() as seen:
        sae.training_step(x).loss.backward()
    assert 0 < seen.bytes <= rows * d_sae * 4 // 4


def test_a_gradient_that_was_kept_is_not_written_to_by_later_steps() -> None:
    def train() -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        sae = create("topk", d_in=8, d_sae=64, k=4, seed=0)
        x = torch.randn(512, 8, generator=torch.Generator().manual_seed(0))
        kept: list[tuple[Tensor, Tensor]] = []

        def keep(progress: Progress) -> None:
            kept.extend((p.grad, p.grad.clone()) for p in progress.learner.sae.parameters() if p.grad is not None)

        config = TrainConfig(total_samples=512, batch_size=64, progress_bar=False)
        Trainer(sae, x.split(64), config, callbacks=[keep]).fit()
        return torch.cat([parameter.detach().flatten() for parameter in sae.parameters()]), kept

    (weights, kept), (again, _) = train(), train()
    assert torch.equal(weights, again)
    assert len(kept) == 8 * 4
    assert all(torch.equal(gradient, copy) for gradient, copy in kept)


@pytest.mark.skipif(memory._glibc() is None, reason="only glibc can be told to keep memory")
def test_memory_is_kept_only_inside_however_often_it_is_asked_for() -> None:
    with memory.large_memory_is_kept():
        with memory.large_memory_is_kept():
            assert memory._open == 2
        assert memory._open == 1
    assert memory._open == 0


@pytest.mark.parametrize("dense", [False, True])
def test_norms_and_reconstruction_share_one_gradient(dense: bool) -> None:
    x, _, W, b = problem(5, 3, 10, seed=6)
    W_dec = W.clone()
    W_dec[4] = 0  # a zero row has the norm zero, and no gradient from it
    W_dec.requires_grad_()
    codes = Above(0.0)(EncoderProduct(x, W, b))
    held = DenseCodes(codes.to_dense(), (5,)) if dense else codes
    values = held.values.detach().requires_grad_()
    y, norms = decode_and_norms(held.with_values(values), W_dec)
    twin, twin_norms = held.with_values(values).to_dense() @ W_dec, W_dec.norm(dim=-1)
    assert torch.allclose(y, twin)
    assert torch.allclose(norms, twin_norms)
    weights = torch.arange(10, dtype=torch.float64)
    for ours, theirs in zip(
        torch.autograd.grad(y.square().sum() + (norms * weights).sum(), (values, W_dec)),
        torch.autograd.grad(twin.square().sum() + (twin_norms * weights).sum(), (values, W_dec)),
        strict=True,
    ):
        assert torch.allclose(ours, theirs)


@pytest.mark.parametrize("used", ["both", "whole", "rows"])
@pytest.mark.parametrize("transposed", [False, True])
def test_own_rows_have_the_gradient_that_indexing_has(used: str, transposed: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(7, 5, generator=generator, dtype=torch.float64)
    left, right = (torch.randn(3, n, generator=generator, dtype=torch.float64) for n in (7, 2))
    rows = torch.tensor([5, 1])
    gradients: list[torch.Tensor] = []
    for split in (lambda W: (W, W[rows]), lambda W: with_own_rows(W, rows)):
        leaf = (start.t().contiguous() if transposed else start.clone()).requires_grad_()
        whole, own = split(leaf.t() if transposed else leaf)
        loss = torch.zeros((), dtype=torch.float64)
        if used != "rows":
            loss = loss + (left @ whole).square().sum()
        if used != "whole":
            loss = loss + (right @ own).square().sum()
        loss.backward()
        assert leaf.grad is not None
        gradients.append(leaf.grad)
    torch.testing.assert_close(gradients[1], gradients[0])
