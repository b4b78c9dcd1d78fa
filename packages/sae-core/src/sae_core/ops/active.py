"""Codes of architectures whose sparsity is an outcome, not a number: all latents above a threshold.

Half of the latents may be active at the start of training and one in a hundred later. `encode_active` returns dense codes
in the first case and sparse ones in the second; the values are pre-activations either way.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sae_core.codes import Codes, DenseCodes
from sae_core.ops.dispatch import prefer_sparse
from sae_core.ops.encode import encode_dense, encode_entries
from sae_core.ops.screening import ask
from sae_core.ops.select import Above

__all__ = ["encode_active"]

_PROBE_ROWS = 32


def encode_active(
    x_RD: Tensor,
    centre_D: Tensor | None,
    W_FD: Tensor,
    b_F: Tensor,
    threshold: Tensor | float,
    *,
    density: float | None = None,
) -> Codes:
    """Pre-activations of at least the entries strictly above `threshold`, a number or (d_sae,).

    Dense codes hold all pre-activations, sparse ones just those above. `density` is the expected fraction of active
    latents; without it the first rows are looked at.
    """
    ask()  # dense codes do not care, which this step's may be and the next one's not
    if density is None and x_RD.device.type == "cpu" and x_RD.shape[0] > 4 * _PROBE_ROWS:
        with torch.no_grad():
            probe = encode_dense(x_RD[:_PROBE_ROWS], centre_D, W_FD, b_F) > threshold
            density = float(probe.float().mean())
    if prefer_sparse(d_sae=W_FD.shape[0], density=density, device=x_RD.device):
        return encode_entries(x_RD, centre_D, W_FD, b_F, Above(threshold))
    return DenseCodes(encode_dense(x_RD, centre_D, W_FD, b_F), (x_RD.shape[0],))
