"""The Triton kernels against dense twins: on a GPU where there is one, and everywhere else in Triton's interpreter.

The interpreter has to be asked for before a kernel is defined, so one test runs this file again in a process of its own
that has asked, where `kernels` is on the CPU. Interpreting says that the kernels compute the right thing; that they are
valid for a GPU's compiler is checked by compiling them, which needs no GPU either.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from sae_core import SparseCodes
from sae_core.codes import LatentMajor
from sae_core.ops import bags, device, dispatch
from sae_core.ops.decode import decode, decode_and_norms, decode_prefixes
from sae_core.ops.encode import encode_entries
from sae_core.ops.screening import encoder_products
from sae_core.ops.select import Above, Selection, TopK
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
on_cuda = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
)
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs Triton, which torch brings along on Linux"
)

DOTS, ROWS, LATENTS = "entry_dots", "row_bags", "latent_bags"


class Recorder:
    """Kernels that remember which of them were called."""

    def __init__(self, kernels: device.Kernels, where: str) -> None:
        self.kernels, self.device, self.calls = kernels, where, list[str]()

    def row_bags(self, values: Tensor, indices: Tensor, offsets: Tensor, W: Tensor) -> Tensor:
        self.calls.append(ROWS)
        return self.kernels.row_bags(values, indices, offsets, W)

    def latent_bags(self, weights: Tensor, order: LatentMajor, source: Tensor) -> Tensor:
        self.calls.append(LATENTS)
        return self.kernels.latent_bags(weights, order, source)

    def entry_dots(self, a: Tensor, b: Tensor, order: LatentMajor) -> Tensor:
        self.calls.append(DOTS)
        return self.kernels.entry_dots(a, b, order)


@pytest.fixture(params=["cpu" if INTERPRETED else on_cuda])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """The kernels, injected for the device that can run them here, together with that device."""
    pytest.importorskip("triton", reason="needs Triton")
    from sae_core.ops import triton_kernels

    recorder = Recorder(triton_kernels, request.param)
    monkeypatch.setitem(device.finders, request.param, lambda _device: recorder)
    monkeypatch.setattr(dispatch, "_ENTRY", 0)  # rows as narrow as those of these tests would be multiplied
    return recorder


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def irregular(rows: int, d_sae: int, where: str) -> SparseCodes:
    """Codes with an empty row (if there are two), a latent without entries (likewise), and an entry that is zero."""
    dense = draw(rows + d_sae, rows, d_sae)
    dense[dense < 0.2] = 0
    dense[:, 0], dense[0, -1] = 1.0, 2.0
    dense[1:2], dense[:, 1:2] = 0, 0
    codes = SparseCodes.from_dense(dense.to(where))
    codes.values[0] = 0
    return codes


def close(ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> bool:
    """Equal up to the error of sums in float32, and one rounding to `dtype`."""
    return torch.allclose(ours.double(), theirs, rtol=torch.finfo(dtype).eps, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("rows", "d_sae", "width"), [(1, 1, 1), (4, 25, 7), (9, 3, 128), (3, 9, 131)], ids=lambda size: str(size)
)
def test_kernels_are_sparse_products(rows: int, d_sae: int, width: int, dtype: torch.dtype, kernels: Recorder) -> None:
    codes = irregular(rows, d_sae, kernels.device)
    W, source = (draw(seed, size, width).to(kernels.device, dtype) for seed, size in ((1, d_sae), (2, rows)))
    order, dense = codes.latent_major(), codes.to_dense().double()
    for _ in range(2):
        decoded = bags.row_bags(codes.values, codes.indices, codes.row_offsets(), W)
        assert decoded.dtype == dtype
        assert close(decoded, dense @ W.double(), dtype)
        gradient = bags.latent_bags(codes.values, order, source)
        assert gradient.dtype == dtype
        assert close(gradient, dense.t() @ source.double(), dtype)
        dots = bags.entry_dots(source, W, order)
        assert dots.dtype == dtype
        assert close(dots, (source.double() @ W.double().t())[codes.row_ids(), codes.indices], dtype)
    assert kernels.calls == [ROWS, LATENTS, DOTS] * 2


def test_kernels_take_matrices_in_any_layout(kernels: Recorder) -> None:
    codes = irregular(4, 6, kernels.device)
    W, source = draw(1, 5, 6).to(kernels.device).t(), draw(2, 1, 5).to(kernels.device).expand(4, 5)
    dense, order = codes.to_dense(), codes.latent_major()
    assert torch.allclose(bags.row_bags(codes.values, codes.indices, codes.row_offsets(), W), dense @ W, atol=1e-5)
    assert torch.allclose(bags.latent_bags(codes.values, order, source), dense.t() @ source, atol=1e-5)
    assert torch.allclose(
        bags.entry_dots(source, W, order), (source @ W.t())[codes.row_ids(), codes.indices], atol=1e-5
    )
    assert len(kernels.calls) == 3


FORMS: dict[str, tuple[Callable[[SparseCodes, Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "decode": (decode, lambda f, W: f @ W),
    "decode_and_norms": (
        lambda codes, W: torch.cat([part.flatten() for part in decode_and_norms(codes, W)]),
        lambda f, W: torch.cat([(f @ W).flatten(), W.norm(dim=-1)]),
    ),
    "decode_prefixes": (
        lambda codes, W: decode_prefixes(codes, W, (8, 40)),
        lambda f, W: torch.stack([f[:, :8] @ W[:8], f @ W]),
    ),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("selection", [TopK(3), Above(6.0)], ids=["topk", "above"])
def test_a_step_and_its_gradients_go_through_the_kernels(selection: Selection, form: str, kernels: Recorder) -> None:
    shapes = [(5, 6), (6,), (40, 6), (40,), (40, 6)]
    leaves = [draw(seed, *shape).to(kernels.device).requires_grad_() for seed, shape in enumerate(shapes)]
    x, centre, encoder, b_enc, W_dec = leaves
    ours, twin = FORMS[form]
    codes = encode_entries(x, centre, encoder, b_enc, selection)
    kept = codes.with_values(torch.ones_like(codes.values)).to_dense()
    y, expected = ours(codes, W_dec), twin(((x - centre) @ encoder.t() + b_enc) * kept, W_dec)
    assert torch.allclose(y, expected, atol=1e-4)
    weights = draw(9, *y.shape).to(kernels.device)
    for gradient, theirs in zip(
        torch.autograd.grad((y * weights).sum(), leaves),
        torch.autograd.grad((expected * weights).sum(), leaves),
        strict=True,
    ):
        assert torch.allclose(gradient, theirs, rtol=1e-4, atol=1e-4)
    # Decoded rows; the gradients of values, decoder and encoder; and, as x asks for one, that of x.
    assert sorted(kernels.calls) == [DOTS, LATENTS, LATENTS, ROWS, ROWS]


def test_candidates_of_a_bfloat16_product_are_recomputed_by_the_kernels(kernels: Recorder) -> None:
    x, W, b = (draw(seed, *shape).to(kernels.device) for seed, shape in enumerate([(4, 6), (40, 6), (40,)]))
    with encoder_products("screened"):
        codes = encode_entries(x, None, W, b, TopK(3))
    expected = (x @ W.t() + b).gather(1, codes.indices.view(4, 3))
    assert torch.allclose(codes.values.view(4, 3), expected, atol=1e-5)
    assert kernels.calls == [DOTS]


def test_float64_is_left_to_torch(kernels: Recorder) -> None:
    codes = irregular(3, 9, kernels.device).to(torch.float64)
    W = draw(1, 9, 4).to(kernels.device, torch.float64)
    y = bags.row_bags(codes.values, codes.indices, codes.row_offsets(), W)
    assert torch.allclose(y, codes.to_dense() @ W, rtol=1e-12)
    assert kernels.calls == []


@pytest.mark.parametrize("where", [on_cuda])
def test_sorting_entries_by_latent_never_waits_for_a_gpu(where: str) -> None:
    codes = SparseCodes.regular(draw(0, 5, 4).to(where), draw(1, 5, 20).topk(4).indices.to(where), 20)
    torch.cuda.set_sync_debug_mode("error")
    try:
        order = codes.latent_major()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert order.latents.tolist() == sorted(codes.indices.tolist())


if not INTERPRETED:

    @needs_triton
    def test_kernels_compute_the_same_in_tritons_interpreter() -> None:
        ran = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
            env={**os.environ, "TRITON_INTERPRET": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert ran.returncode == 0, ran.stdout + ran.stderr
        passed = re.search(r"(\d+) passed", ran.stdout)
        assert passed is not None, ran.stdout
        assert int(passed[1]) >= 20, ran.stdout

    @needs_triton
    @pytest.mark.parametrize(("capability", "matrix"), [(80, "*fp32"), (90, "*bf16")])
    def test_kernels_compile_for_a_gpu(
        capability: int, matrix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from sae_core.ops import triton_kernels
        from triton import compile
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # nothing compiled earlier counts
        longs = ("indices_E", "offsets_B", "order_E", "rows_E", "latents_E")
        types = dict.fromkeys(longs, "*i64") | dict.fromkeys(("entries", "width"), "i32") | {"weights_E": "*fp32"}
        blocks = {"BLOCK_E": triton_kernels._BLOCK_E, "BLOCK_D": triton_kernels._BLOCK_D}
        for kernel in (triton_kernels._bags_kernel, triton_kernels._dots_kernel):
            signature = {name: "constexpr" if name in blocks else types.get(name, matrix) for name in kernel.arg_names}
            compiled = compile(
                ASTSource(kernel, signature, blocks),
                target=GPUTarget("cuda", capability, 32),
                options={"enable_fp_fusion": True},
            )
            assert f".target sm_{capability}" in compiled.asm["ptx"]
            assert "atom" not in compiled.asm["ptx"]

    @needs_triton
    def test_where_triton_cannot_run_torch_is_used_and_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
        device._triton.cache_clear()
        monkeypatch.setitem(device.finders, "cpu", device._triton)  # for a CPU, Triton really cannot compile
        codes, W = irregular(3, 9, "cpu"), draw(1, 9, 4)
        with pytest.warns(RuntimeWarning, match="Triton cannot compile kernels for cpu .* torch's own operations"):
            y = bags.row_bags(codes.values, codes.indices, codes.row_offsets(), W)
        assert torch.allclose(y, codes.to_dense() @ W)
        assert bags.latent_bags(codes.values, codes.latent_major(), draw(2, 3, 4)).shape == (9, 4)

    def test_a_step_on_a_cpu_imports_no_kernels() -> None:
        program = (
            "import sys, torch; from sae_core.ops.decode import decode; from sae_core import SparseCodes; "
            "decode(SparseCodes.from_dense(torch.eye(20)), torch.eye(20)); "
            "sys.exit('sae_core.ops.triton_kernels' in sys.modules)"
        )
        subprocess.run([sys.executable, "-c", program], check=True)
