"""What a finished training should be told about itself: each sentence is a finding and what to do about it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sae_core.latent_ranks import LatentRanks, count_over_ranks, latents_over
from sae_core.training.learner import Learner

__all__ = ["duplicates", "health"]

_ALIKE, _MANY_ALIKE, _ASKED, _AT_ONCE = 0.95, 0.01, 8192, 256
_MANY_DEAD, _MANY_STILL, _OFTEN, _MANY_OFTEN, _OFF = 0.1, 0.1, 0.5, 0.01, 0.1


def health(learner: Learner) -> list[str]:
    """Findings about dead, dense, duplicate and never trained latents, and about an L0 that was asked for; none when all is
    well.

    Looks at the last record, at how often latents fired over the last tenth of the run, at decoder rows, and at Adam's moments.
    Where latents are shared out over ranks, at those of all, and all call this.
    """
    return [*_dead(learner), *_dense(learner), *_alike(learner), *_still(learner), *_sparsity(learner)]


def _dead(learner: Learner) -> Iterator[str]:
    fraction = learner.history[-1]["dead_fraction"] if learner.history else None
    if fraction is not None and fraction > _MANY_DEAD:
        yield (
            f"{fraction:.0%} of the latents are dead (silent for {learner.dead.after:,} samples): use a smaller dictionary, a "
            "lower lr, a larger weight of the loss that revives dead latents if the architecture has one, or "
            "train.resample_dead_every_samples"
        )


def _dense(learner: Learner) -> Iterator[str]:
    density = learner.firing_density()
    if density is None:
        return
    often = int((density > _OFTEN).sum())
    d_sae = learner.sae.config.d_sae
    if often > _MANY_OFTEN * d_sae:
        yield (
            f"{often} of {d_sae} latents fire on more than half of the samples: ask for more sparsity, or look "
            "whether the activations have a large mean that init_b_dec should take up"
        )


def _alike(learner: Learner) -> Iterator[str]:
    density = learner.firing_density()
    if density is None:
        return
    sae = learner.sae
    fired = (density > 0)[sae.latent_range.start : sae.latent_range.stop]
    share = duplicates(sae.directions(), fired.to(sae.device), sae.ranks)
    if share > _MANY_ALIKE:
        yield (
            f"{share:.0%} of the latents that fire have a twin, another one with a decoder row of cosine {_ALIKE} or more: use "
            "a smaller dictionary, or ask for more sparsity"
        )


@torch.no_grad()
def duplicates(rows_FO: Tensor, among_F: Tensor | None = None, ranks: LatentRanks | None = None) -> float:
    """The share of rows (n, d_out) that have another one at a cosine of 0.95 or more; of many rows, that of 8192 of them.

    With `among_F`, a mask (n,), the others do not count. Each of several `ranks` has some of the rows. 256 rows are looked at
    together, which are then the only ones that are sent.

    >>> duplicates(torch.tensor([[1.0, 0.0], [2.0, 0.1], [0.0, 1.0], [-1.0, 0.0]]))
    0.5
    """
    norms_F = rows_FO.norm(dim=-1).float().clamp_min(1e-12)
    counted = torch.arange(len(rows_FO), device=rows_FO.device) if among_F is None else among_F.nonzero().squeeze(-1)
    rank, counts = (0, [len(counted)]) if ranks is None else (ranks.rank, ranks.everyone(len(counted)))
    if not sum(counts):
        return 0.0
    every = max(1, -(-sum(counts) // _ASKED))
    asked = counted[-sum(counts[:rank]) % every :: every]
    twins = 0
    numbers = [len(asked)] if ranks is None else ranks.everyone(len(asked))
    blocks = [(holder, first) for holder, number in enumerate(numbers) for first in range(0, number, _AT_ONCE)]
    for holder, first in blocks:  # never all cosines at once
        part = asked[first : first + _AT_ONCE] if holder == rank else asked[:0]
        unit = rows_FO.new_zeros(min(_AT_ONCE, numbers[holder] - first), rows_FO.shape[1])
        unit[: len(part)] = rows_FO[part] / norms_F[part].unsqueeze(-1).to(rows_FO.dtype)
        if ranks is not None:
            ranks.add([unit])
        cosines = (unit @ rows_FO.t()).float()
        cosines /= norms_F
        cosines[torch.arange(len(part), device=part.device), part] = -1.0
        if among_F is not None:
            cosines.masked_fill_(~among_F, -1.0)
        nearest = cosines.amax(dim=1)
        twins += int(((nearest if ranks is None else -ranks.least(-nearest)) >= _ALIKE).sum())
    return twins / sum(numbers)


def _still(learner: Learner) -> Iterator[str]:
    sae = learner.sae
    for name, parameter in sae.named_parameters():
        moments = learner.moments(name)
        if parameter.dim() != 1 or sae.latent_dimension(name) != 0 or moments is None:
            continue
        with latents_over(sae.ranks):
            still = count_over_ranks(int((moments == 0).sum()))
        if still > _MANY_STILL * sae.config.d_sae:
            yield (
                f"{still} of {sae.config.d_sae} entries of {name} never got a gradient and are where they started: their "
                "latents never fired, or the window that gives thresholds a gradient is too narrow for these activations"
            )


def _sparsity(learner: Learner) -> Iterator[str]:
    steering, l0 = learner.steering, learner.history[-1]["l0"] if learner.history else None
    if steering is None or l0 is None:
        return
    target = steering.controller.target
    if abs(l0 / target - 1) > _OFF:
        yield (
            f"L0 is {l0:.4g}, and target_l0 asked for {target:.4g}; the sparsity coefficient went from "
            f"{steering.started_at:.4g} to {steering.coefficient:.4g}: train longer, or start nearer to where it went, unless "
            "it kept growing without effect; then start higher or lower lr"
        )
