"""Matrices that are scaled as they are written are those that folding makes, and tensors as any other to whoever looks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from sae_core import create
from sae_core.format.stream import crc32, write_tensors
from sae_core.scaled_rows import ScaledRows, scaling_put_off
from safetensors.torch import load_file
from torch import Tensor


@pytest.mark.parametrize("operation", [torch.mul, torch.div])
@pytest.mark.parametrize("turned", [False, True])
def test_operations_see_the_scaled_matrix(operation: object, turned: bool) -> None:
    rows, numbers = torch.randn(5, 3), torch.rand(5) + 0.5
    wanted = operation(rows, numbers[:, None])  # pyright: ignore[reportCallIssue]
    scaled = ScaledRows.of(rows, numbers, operation)  # pyright: ignore[reportArgumentType]
    if turned:
        wanted, scaled = wanted.t(), scaled.t()
    assert (scaled.shape, scaled.dtype, scaled.device) == (wanted.shape, wanted.dtype, wanted.device)
    assert len(scaled) == len(wanted)
    for look in (
        lambda t: t + 1,
        lambda t: t.double(),
        lambda t: t[1],
        lambda t: t.clone(),
        lambda t: torch.stack([t, t]),
        lambda t: t.detach().t().t() * 2,
        lambda t: torch.from_numpy(t.numpy().copy()),
        lambda t: torch.tensor(t.tolist()),
    ):
        seen = look(scaled)
        assert type(seen) is Tensor
        torch.testing.assert_close(seen, look(wanted), rtol=0, atol=0)
    assert repr(scaled) == repr(wanted)


def test_scaling_is_put_off_where_it_is_asked_for_and_exact() -> None:
    sae = create("topk", d_in=70, d_sae=1300, k=4)
    with scaling_put_off():
        later = sae.export().tensors
    now = sae.export().tensors
    assert [type(later[name]) for name in ("W_dec", "W_enc", "b_dec")] == [ScaledRows, ScaledRows, Tensor]
    assert all(type(tensor) is Tensor for tensor in now.values())
    for name, tensor in now.items():
        assert torch.equal(tensor, later[name])


@pytest.mark.parametrize("shape", [(1, 1), (3, 5000), (5000, 3), (1400, 770), (0, 4)])
def test_a_file_holds_what_was_put_off(tmp_path: Path, shape: tuple[int, int]) -> None:
    rows, numbers = torch.randn(shape), torch.rand(shape[0]) + 0.5
    lazy = {
        "divided": ScaledRows.of(rows, numbers, torch.div),
        "turned": ScaledRows.of(rows, numbers, torch.mul, turned=True),
    }
    sums: dict[str, str] = {}

    def said(found: object) -> str:
        sums.update(found)  # pyright: ignore[reportArgumentType, reportCallIssue]
        return "{}"

    seen: dict[str, int] = dict.fromkeys(lazy, 0)

    def look(name: str, part: Tensor) -> None:
        seen[name] += part.numel()

    write_tensors(tmp_path / "file.safetensors", lazy, said, look)
    read = load_file(tmp_path / "file.safetensors")
    assert torch.equal(read["divided"], rows / numbers[:, None])
    assert torch.equal(read["turned"], (rows * numbers[:, None]).t())
    assert sums == {name: crc32(tensor.contiguous()) for name, tensor in read.items()}
    assert seen == dict.fromkeys(lazy, rows.numel())
