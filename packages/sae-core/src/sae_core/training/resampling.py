"""Dead latents start anew at inputs that the dictionary reconstructs badly (Bricken et al. 2023, "Towards Monosemanticity").

Every dead latent gets a row of the batch, drawn with a probability that goes with the square of the row's loss. It reads the
row's direction, with a fifth of the mean encoder norm of the others, writes it, and its bias and its moments in Adam are zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sae_core.latent_ranks import latents_over
from sae_core.ops.whole_batch import ALL_HERE, WholeBatch
from sae_core.protocols import ActivationBatch
from sae_core.sae import SAE
from sae_core.training.row_blocks import StepResult

__all__ = ["forget_moments", "resample"]


@torch.no_grad()
def resample(
    sae: SAE,
    latents: Tensor,
    batch: ActivationBatch,
    result: StepResult,
    seed: int,
    together: WholeBatch = ALL_HERE,
) -> None:
    """Restart `latents` (n,) at rows of `batch`, of which `result` is a step's result; `seed` decides the draw.

    `together` says of which batch these rows are a part; each of its rows may be drawn. Where latents are shared out over
    ranks, each gives its own, maybe none: rows are drawn for those of all ranks, as one process would.
    """
    counts = [len(latents)] if sae.ranks is None else sae.ranks.everyone(len(latents))
    before = 0 if sae.ranks is None else sum(counts[: sae.ranks.rank])
    loss_R = (result.reconstruction - result.target).float().square().sum(-1)
    weights_R = together.all_rows(loss_R).square().cpu()
    if not bool(weights_R.sum() > 0):  # reconstructed perfectly: any row is as good as another
        weights_R = torch.ones_like(weights_R)
    weights_R = weights_R / weights_R.max()
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.multinomial(weights_R, sum(counts), replacement=True, generator=generator)
    rows_N = drawn[before : before + len(latents)].to(sae.device)
    width = batch.inputs.shape[-1] if batch.inputs.shape[-1] == sae.d_in else sae.d_in  # heads side by side
    chosen = together.chosen(batch.inputs.reshape(-1, width), rows_N)
    with latents_over(sae.ranks):
        sae.restart_latents(latents, sae.prepare(chosen), together.chosen(result.target, rows_N))
    sae.after_step()


@torch.no_grad()
def forget_moments(optimizer: torch.optim.Optimizer, sae: SAE, latents: Tensor) -> None:
    """Adam's averages start anew for everything that belongs to these latents."""
    for name, parameter in sae.named_parameters():
        axis = sae.axis(name).latent
        if axis is None:
            continue
        for moment in optimizer.state.get(parameter, {}).values():
            if isinstance(moment, Tensor) and moment.shape == parameter.shape:
                moment.index_fill_(axis, latents, 0)
