"""One pass of clipping and Adam equals the two plain ones."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sae_core.training.optimizer import Adam, clipped_step


def parameters(dtype: torch.dtype) -> list[torch.nn.Parameter]:
    g = torch.Generator().manual_seed(1)
    made = (torch.randn(5, 30, generator=g), torch.randn(30, 5, generator=g), torch.randn(30, generator=g))
    return [torch.nn.Parameter(tensor.to(dtype)) for tensor in made]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("max_norm", [None, 1.0, 1e6])
def test_clipped_steps_equal_clipping_then_adam(dtype: torch.dtype, max_norm: float | None) -> None:
    plain, ours = parameters(dtype), parameters(dtype)
    adam = torch.optim.Adam(plain, lr=1e-2)
    fused = torch.optim.Adam(ours, lr=1e-2, fused=True)
    g = torch.Generator().manual_seed(2)
    for step in range(10):
        for a, b in zip(plain, ours, strict=True):
            a.grad = torch.randn(a.shape, generator=g, dtype=dtype) * (0.01 if step < 4 else 1.0)
            b.grad = torch.empty_like(b).copy_(a.grad)
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(plain, max_norm)
        adam.step()
        clipped_step(fused, max_norm)
        for a, b in zip(plain, ours, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-6)


def test_adam_is_that_of_torch() -> None:
    start, gradients = torch.randn(7, 3), torch.randn(5, 7, 3)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    mine, other = Adam([ours], lr=0.1, fused=True), torch.optim.Adam([theirs], lr=0.1, fused=True)
    for gradient in gradients:
        for parameter, optimizer in ((ours, mine), (theirs, other)):
            optimizer.zero_grad()
            parameter.grad = gradient.clone()
            optimizer.step()
    assert torch.equal(ours, theirs)
    other.load_state_dict(mine.state_dict())
    mine.load_state_dict(other.state_dict())
    assert torch.equal(mine.state[ours]["exp_avg_sq"], other.state[theirs]["exp_avg_sq"])


def test_training_leaves_the_compiler_alone(tmp_path: Path) -> None:
    program = (
        "import sys, torch; from sae_core import SAE, Trainer, TrainConfig, create; "
        "config = TrainConfig(total_samples=64, batch_size=32, progress_bar=False); "
        "sae = create('topk', d_in=4, d_sae=8, k=2); Trainer(sae, [torch.randn(32, 4)] * 2, config).fit(); "
        "sae.save(sys.argv[1]); SAE.load(sys.argv[1]); sys.exit('torch._dynamo' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "sae")], check=True)
