"""The bare encoder product, ``x W_enc`` and nothing else: what no dictionary of these shapes can be faster than
that computes all of it in float32."""

from __future__ import annotations

import torch
from protocol import Job, Spec, serve


def build(spec: Spec, x: torch.Tensor) -> Job:
    """One matrix product into a buffer that is there already."""
    W_enc = torch.randn(spec.d_sae, spec.d_in, generator=torch.Generator().manual_seed(0))
    out = torch.empty(spec.batch, spec.d_sae)

    def step(batch: torch.Tensor) -> None:
        torch.mm(batch, W_enc.t(), out=out)

    return Job(step, lambda: float(spec.d_sae))


if __name__ == "__main__":
    serve(build)
