"""Small data and short training for checks: what every one of them needs, made alike."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sae_core.protocols import ActivationBatch
from sae_core.sae import SAE, StepContext
from sae_core.testing.kit import Subject

__all__ = ["batch_for", "is_finite", "pairs_for", "same", "train", "trained"]

ROWS = 128


def trained(subject: Subject, **changes: Any) -> SAE:
    """An SAE after a few steps of training, in eval mode: thresholds have moved, latents differ."""
    sae: SAE = subject.new(**changes)
    train(sae, steps=6)
    return sae.eval()


def batch_for(sae: SAE, rows: int = ROWS, seed: int = 0) -> Tensor:
    """(rows, d_in) sparse mixtures of random directions, in units of some model: neither centred nor of unit scale."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(2 * sae.d_in, sae.d_in, generator=generator), dim=-1)
    active = torch.rand(rows, 2 * sae.d_in, generator=generator) < 0.1
    amounts = 3 * (1 + torch.rand(rows, 2 * sae.d_in, generator=generator)) * active
    noise = 0.02 * torch.randn(rows, sae.d_in, generator=generator)
    return (amounts @ directions + 0.5 + noise).to(sae.dtype)


def pairs_for(sae: SAE, rows: int = ROWS, seed: int = 0) -> Tensor | ActivationBatch:
    """A training batch: activations, or for a transcoder activations and a nonlinear function of them."""
    x = batch_for(sae, rows, seed)
    if sae.reconstructs_input:
        return x
    mixing = torch.randn(sae.d_in, sae.d_out, generator=torch.Generator().manual_seed(1)) / sae.d_in**0.5
    return ActivationBatch(x, torch.relu(x) @ mixing.to(x.dtype))


def train(sae: SAE, steps: int, lr: float = 3e-3) -> None:
    """Train on one batch with Adam (1412.6980), written out: torch's own imports a compiler, which takes seconds."""
    sae.train()
    batch = pairs_for(sae)
    moments = [(p, torch.zeros_like(p), torch.zeros_like(p)) for p in sae.parameters() if p.requires_grad]
    for step in range(steps):
        sae.zero_grad()
        sae.training_step(batch, StepContext(progress=step / steps)).loss.backward()
        with torch.no_grad():
            for parameter, first, second in moments:
                if parameter.grad is not None:
                    first.lerp_(parameter.grad, 0.1)
                    second.lerp_(parameter.grad.square(), 0.001)
                    debiased = (second / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
                    parameter.sub_(lr / (1 - 0.9 ** (step + 1)) * first / debiased)
            sae.after_step()


def same(a: Tensor, b: Tensor, what: str, tolerance: float = 1e-5) -> None:
    """Fail unless two tensors have one shape and agree to `tolerance` of their scale."""
    assert a.shape == b.shape, f"{what}: shapes {tuple(a.shape)} and {tuple(b.shape)}"
    if a.numel():
        scale = max(1.0, float(b.detach().abs().max()))
        difference = float((a.detach().double() - b.detach().double()).abs().max())
        assert difference <= tolerance * scale, f"{what}: they differ by up to {difference:.2g}"


def is_finite(tensor: Tensor, what: str) -> None:
    """Fail if a tensor holds NaN or infinity."""
    assert bool(tensor.isfinite().all()), f"{what} holds NaN or infinite values"
