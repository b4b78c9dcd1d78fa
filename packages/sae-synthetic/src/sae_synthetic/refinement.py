"""Better codes from the same dictionary: refine what an SAE's encoder found, at inference, for any SAE that is loaded.

An encoder is one matrix product, so a latent whose direction is not orthogonal to that of an active one sees a part of it, and
may fire for it or stay silent because of it: the amortisation gap (arXiv 2411.13117). Two steps narrow it without training.

`lista_step` looks at what the codes leave unexplained: with the residual r = z - y(f) of a row, and d_j the directions,

    f'_j = f_j + step * (r . d_j) / |d_j|^2,      then the K largest |d_j| f'_j of the row are kept, K as many as before

one step of iterative hard thresholding, the untrained form of LISTA (Gregor and LeCun 2010). `prune_codes` then asks of every
active latent what the error would be without it, |r + f_j d_j|^2, and drops those that hardly matter (leave-one-out).

Both work in the space the decoder writes to, and on dictionaries that reconstruct their input: of a transcoder's target
nothing is known at inference.
"""

# R rows, E entries, F latents, O d_out

from __future__ import annotations

import torch
from sae_core import SAE, SparseCodes
from sae_core.config import require
from sae_core.errors import ConfigError, ShapeError
from sae_core.sae import Prepared
from torch import Tensor

__all__ = ["lista_step", "prune_codes", "refined_codes"]

_ENTRIES_AT_ONCE = 1 << 14


@torch.no_grad()
def refined_codes(
    sae: SAE, x: Tensor, *, steps: int = 1, step: float = 0.3, least: float = 0.1, codes: SparseCodes | None = None
) -> SparseCodes:
    """Codes (..., d_sae) of `x` (..., d_in) after `steps` LISTA steps and, where `least` is positive, leave-one-out pruning.

    `codes` replaces what the encoder finds. Raises ConfigError for settings without meaning, and for transcoders.

    >>> from sae_core import create
    >>> sae = create("topk", d_in=2, d_sae=3, k=1, apply_b_dec_to_input=False)
    >>> _ = sae.W_dec.data.copy_(torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]]))
    >>> _ = sae.encoder.data.copy_(torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.5]]))  # the last is seen too well
    >>> x = torch.tensor([[0.6, 0.8]])
    >>> sae.encode_sparse(x).indices.tolist(), refined_codes(sae, x, step=0.5).indices.tolist()
    ([2], [1])
    """
    require(steps >= 0, f"refined_codes: steps must not be negative, found {steps}")
    found = sae.encode_sparse(x) if codes is None else codes
    for _ in range(steps):
        found = lista_step(sae, x, found, step=step)
    return prune_codes(sae, x, found, least=least) if least else found


@torch.no_grad()
def lista_step(sae: SAE, x: Tensor, codes: SparseCodes, *, step: float = 0.3) -> SparseCodes:
    """`codes` after one step against the residual: each row keeps as many entries as it had active ones.

    Latents do not become negative unless some of `codes` are. Raises ConfigError unless `step` is in (0, 1].
    """
    require(0 < step <= 1, f"lista_step: step must be in (0, 1], not {step}")
    prepared, flat = _checked(sae, x, codes)
    directions_FO = sae.directions()
    norms_F = directions_FO.norm(dim=1).clamp_min(torch.finfo(sae.dtype).tiny)
    f_RF = flat.to_dense()
    signed = bool((flat.values < 0).any())
    along_RF = _residual(sae, prepared, flat) @ directions_FO.T
    f_RF = f_RF + step * along_RF / norms_F.square()
    rank_RF = (f_RF.abs() if signed else f_RF.clamp_min(0)) * norms_F
    k_R = flat.l0()
    most = int(k_R.max()) if flat.rows else 0
    top = rank_RF.topk(most, dim=1)
    kept = (torch.arange(most, device=k_R.device) < k_R[:, None]) & (top.values > 0)
    dense_RF = torch.zeros_like(f_RF)
    chosen = top.indices[kept]
    rows = torch.arange(flat.rows, device=k_R.device)[:, None].expand_as(kept)[kept]
    dense_RF[rows, chosen] = f_RF[rows, chosen]
    return SparseCodes.from_dense(dense_RF).reshape(*codes.leading_shape)


@torch.no_grad()
def prune_codes(sae: SAE, x: Tensor, codes: SparseCodes, *, least: float = 0.1) -> SparseCodes:
    """`codes` without the entries whose absence raises the row's squared error by less than `least` of its mean entry's size.

    An entry stays where |r + f_j d_j|^2 - |r|^2 >= least * m, with m the row's mean of |f_i d_i|^2. All entries of a row are
    judged with all others present. Raises ConfigError unless `least` is in (0, 1].
    """
    require(0 < least <= 1, f"prune_codes: least must be in (0, 1], not {least}")
    prepared, flat = _checked(sae, x, codes)
    residual_RO = _residual(sae, prepared, flat)
    rows_E, active_E = flat.row_ids(), flat.values != 0
    along_E = torch.cat(
        [
            (residual_RO[rows] * sae.directions(latents)).sum(dim=1)
            for rows, latents in zip(rows_E.split(_ENTRIES_AT_ONCE), flat.indices.split(_ENTRIES_AT_ONCE), strict=True)
        ]
    )
    power_E = (flat.values * sae.direction_norms()[flat.indices]).square()
    gain_E = 2 * flat.values * along_E + power_E
    mean_R = torch.zeros(flat.rows, dtype=power_E.dtype, device=power_E.device).index_add(0, rows_E, power_E)
    mean_R = mean_R / flat.l0().clamp_min(1)
    kept = active_E & (gain_E >= least * mean_R[rows_E])
    offsets = torch.zeros(flat.rows + 1, dtype=torch.long, device=flat.device)
    offsets[1:] = torch.bincount(rows_E[kept], minlength=flat.rows).cumsum(0)
    return SparseCodes(flat.values[kept], flat.indices[kept], codes.leading_shape, codes.d_sae, offsets=offsets)


def _checked(sae: SAE, x: Tensor, codes: SparseCodes) -> tuple[Prepared, SparseCodes]:
    if not sae.reconstructs_input:
        raise ConfigError(
            "refinement: a transcoder's target is not known at inference, so nothing tells what is left of it"
        )
    prepared = sae.prepare(x)
    if codes.rows != len(prepared.z) or codes.d_sae != sae.d_sae:
        raise ShapeError(f"refinement: codes {codes.shape} do not fit ({len(prepared.z)} rows, {sae.d_sae} latents)")
    return prepared, codes.reshape(codes.rows)


def _residual(sae: SAE, prepared: Prepared, codes: SparseCodes) -> Tensor:
    """(R, O) what the codes leave of the normalised rows."""
    return prepared.z - sae.decode_rows(codes, prepared)
