"""Folding: absorbing decoder norms and fixed normalisations into the weights, without changing what a dictionary computes.

Plain functions on tensors by name, as exact as float64 and cast back. They know the linear frame's encoder (d_sae, d_in),
W_dec (d_sae, d_out), b_dec and W_skip, and what a class declares of the others; whether folding leaves an architecture's
latents alone is for the architecture to say (`LinearSAE.folds`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from sae_core.normalization import AffineMap
from sae_core.ops.memory import fresh_like
from sae_core.scaled_rows import ScaledRows, scaling_is_put_off

__all__ = ["fold_decoder_norm", "fold_normalization"]

_BLOCK_ROWS = 256


def fold_decoder_norm(tensors: Mapping[str, Tensor], scales: Mapping[str, str], norms: Tensor) -> dict[str, Tensor]:
    """Decoder rows divided by `norms` (d_sae,), and all that `scales` calls with_norm multiplied by them.

    Latents are multiplied by the norms; reconstructions are unchanged. A zero row stays zero and its latent falls silent.

    >>> tensors = {"encoder": torch.ones(1, 2), "W_dec": torch.tensor([[3.0, 4.0]])}
    >>> folded = fold_decoder_norm(tensors, {"encoder": "with_norm", "W_dec": "against_norm"}, torch.tensor([5.0]))
    >>> folded["encoder"].tolist(), round(folded["W_dec"].sum().item(), 4)
    ([[5.0, 5.0]], 1.4)
    """
    divisors = torch.where(norms > 0, norms, 1.0)
    folded = dict(tensors)
    for name, how in scales.items():
        if name in tensors and how != "no":
            with_norm = how == "with_norm"
            folded[name] = _by_row(
                torch.mul if with_norm else torch.div, tensors[name], norms if with_norm else divisors
            )
    return folded


def fold_normalization(
    tensors: Mapping[str, Tensor],
    inputs: AffineMap | None,
    outputs: AffineMap | None,
    *,
    centred: bool,
    biases: Mapping[str, Tensor | None],
) -> dict[str, Tensor]:
    """Weights that do on raw activations what `tensors` do on those normalised by `inputs`, with targets by `outputs`.

    With ``z = (x - m) M`` for the inputs, the encoder E becomes ``E M^T``; if b_dec is not subtracted from the input
    (`centred`), the `biases` lose ``m M E^T``, each times its gain (d_sae,) or 1 where that is None. With N for the outputs,
    W_dec becomes ``W_dec N^-1``, b_dec ``b_dec N^-1 + n`` and W_skip, which reads raw inputs, ``N^-T W_skip``. Latents are
    unchanged.
    """
    folded = dict(tensors)
    device = tensors["W_dec"].device
    if inputs is not None:
        matrix, shift = inputs.matrix.to(device), inputs.shift.to(device)
        encoder = _right(tensors["encoder"].double(), matrix.t() if matrix.dim() == 2 else matrix)
        folded["encoder"] = encoder
        for name, gain in biases.items() if not centred else ():
            moved = encoder @ shift
            folded[name] = tensors[name].double() - (moved if gain is None else moved * gain.double())
    if outputs is not None:
        inverse = outputs.inverse.to(device)
        folded["W_dec"] = _right(tensors["W_dec"].double(), inverse)
        folded["b_dec"] = _right(tensors["b_dec"].double(), inverse) + outputs.shift.to(device)
        if "W_skip" in tensors:
            folded["W_skip"] = _right(tensors["W_skip"].double().t(), inverse).t()
    return _cast_like(folded, tensors)


def _right(tensor: Tensor, matrix: Tensor) -> Tensor:
    """``tensor @ matrix``, the matrix as a whole or as its diagonal."""
    return tensor @ matrix if matrix.dim() == 2 else tensor * matrix


def _by_row(operation: Callable[..., Tensor], tensor: Tensor, numbers: Tensor) -> Tensor:
    """`operation` on each row and its number, exactly, then rounded once.

    One product or quotient of two float32 numbers comes out of float32 arithmetic as float64 would round it; all else goes
    through float64 block by block, so that no whole matrix of it comes to be.
    """
    per_row = (-1, *(1 for _ in tensor.shape[1:]))
    exact_in_float32 = tensor.dtype == numbers.dtype == torch.float32
    if exact_in_float32 and tensor.dim() == 2 and tensor.device.type == "cpu" and scaling_is_put_off():
        return ScaledRows.of(tensor, numbers, operation)
    made = fresh_like(tensor)
    if exact_in_float32:
        return operation(tensor, numbers.view(per_row), out=made)
    room = torch.empty(tensor[:_BLOCK_ROWS].shape, dtype=torch.float64, device=tensor.device)
    for block, rows, part in zip(*(t.split(_BLOCK_ROWS) for t in (made, tensor, numbers.double())), strict=True):
        exact = room[: len(rows)].copy_(rows)
        block.copy_(operation(exact, part.view(per_row), out=exact))
    return made


def _cast_like(folded: Mapping[str, Tensor], originals: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to(originals[name].dtype) for name, tensor in folded.items()}
