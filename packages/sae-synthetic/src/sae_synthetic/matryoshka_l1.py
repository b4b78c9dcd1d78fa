"""Matryoshka with an L1 penalty: nested ReLU dictionaries whose inner losses have a weight (2505.11756, section on balance).

    f = relu((z - b_dec) W_enc + b_enc)
    y_w = f[:w] W_dec[:w] + b_dec                                    the dictionary of the first w latents
    loss = L(all) + inner_weight * sum over inner widths w of L(w),   L(w) = mean |y_w - z|^2 + l1 * sum_{i<w} f_i n_i

n are decoder norms. With `inner_weight` 0 this is the standard SAE, and children absorb their parents. With `detach_inner`,
the limit of a large weight, inner latents learn from their own level alone, and parents hedge: they take in a part of
their children. In between the two cancel. With `random_widths` the inner widths are drawn anew for every batch, so that every
latent is the end of some dictionary and their order is learnt whole (Nabeshima 2024). With `sort_latents` the dictionaries nest
by what latents contribute to a batch, largest first, and not by their numbers: a latent that has found a parent then counts
as one, wherever it began. Saved, it is a standard SAE, for nesting is a matter of training only.
"""

# R rows, D d_in, F d_sae

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any, ClassVar, final

import torch
from sae_core.architectures.linear import LinearConfig, LinearSAE
from sae_core.architectures.standard import StandardConfig
from sae_core.codes import Codes
from sae_core.config import Schedule, require, value_at
from sae_core.sae import Export, Prepared, SAEConfig, StepContext, StepOutput, training_option
from torch import Tensor

from sae_synthetic._random import derived_seed, generator_for

__all__ = ["MatryoshkaL1Config", "MatryoshkaL1SAE", "drawn_widths"]


@dataclass(frozen=True, kw_only=True)
class MatryoshkaL1Config(LinearConfig):
    """Config of `MatryoshkaL1SAE`."""

    l1_coefficient: float | Schedule = training_option(default=1.0, help="weight of the sparsity penalty")
    matryoshka_widths: tuple[int, ...] = training_option(
        default=(), help="inner widths, increasing and below d_sae; none is the standard SAE"
    )
    random_widths: int = training_option(
        default=0, help="inner widths drawn anew for every batch, small ones more often; none is fixed then"
    )
    sort_latents: bool = training_option(
        default=False, help="nest by mean squared contribution to the batch, largest first, instead of by number"
    )
    inner_weight: float = training_option(default=1.0, help="weight of the losses of the inner widths")
    detach_inner: bool = training_option(
        default=False, help="latents of inner levels learn from their own level's loss alone"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        widths = self.matryoshka_widths
        require(all(a < b for a, b in pairwise(widths)), f"matryoshka_widths must increase, not {list(widths)}")
        require(
            all(0 < width < self.d_sae for width in widths),
            f"matryoshka_widths must lie in (0, d_sae = {self.d_sae}), not {list(widths)}",
        )
        require(
            0 <= self.random_widths < self.d_sae,
            f"random_widths must lie in [0, d_sae = {self.d_sae}), not {self.random_widths}",
        )
        require(
            not (self.random_widths and widths),
            "random_widths: matryoshka_widths are fixed ones; give one or the other",
        )
        require(
            not self.sort_latents or bool(self.random_widths or widths),
            "sort_latents: there is no inner width, so nothing nests; give random_widths or matryoshka_widths",
        )
        require(self.inner_weight >= 0, f"inner_weight must not be negative, found {self.inner_weight}")


@final
class MatryoshkaL1SAE(LinearSAE[MatryoshkaL1Config]):
    """Nested ReLU dictionaries under an L1 penalty."""

    architecture: ClassVar[str] = "matryoshka_l1"
    config_class: ClassVar[type[SAEConfig]] = MatryoshkaL1Config
    example: ClassVar[Mapping[str, Any]] = {"matryoshka_widths": [16, 32]}
    has_encoder_product: ClassVar[bool] = False  # its product is dense: the penalties read every latent

    folds: ClassVar[bool] = True
    independent_latents: ClassVar[bool] = True

    def encode_rows(self, prepared: Prepared) -> Codes:
        """relu of the pre-activations."""
        return self.pre(prepared, floor=0.0).map(torch.relu)

    def objective(self, prepared: Prepared, target: Tensor, context: StepContext) -> StepOutput:
        """The loss of the whole dictionary and, weighted, of every inner width."""
        config = self.config
        codes = self.encode_rows(prepared)
        f_RF, W_dec = codes.to_dense(), self.W_dec
        weighted_RF = f_RF * self.decoder_norms()
        if config.sort_latents:
            order_F = weighted_RF.detach().square().sum(dim=0).argsort(descending=True, stable=True)
            f_RF, weighted_RF, W_dec = f_RF[:, order_F], weighted_RF[:, order_F], W_dec[order_F]
        coefficient = value_at(config.l1_coefficient, context.progress)
        widths = config.matryoshka_widths
        if config.random_widths:
            widths = drawn_widths(config.random_widths, config.d_sae, context.progress)
        bounds = [0, *widths, config.d_sae]
        losses: dict[str, Tensor] = {}
        y_RD, penalty = self.with_bias_and_skip(torch.zeros_like(target), prepared), f_RF.new_zeros(())
        for start, stop in pairwise(bounds):
            if config.detach_inner and start:
                y_RD, penalty = y_RD.detach(), penalty.detach()
            y_RD = y_RD + f_RF[:, start:stop] @ W_dec[start:stop]
            penalty = penalty + weighted_RF[:, start:stop].sum(dim=1).mean()
            error = (self.to_loss_space(y_RD, prepared) - target).square().sum(dim=1).mean()
            if stop == config.d_sae:
                losses |= {"mse": error, "l1": coefficient * penalty}
            elif config.inner_weight:
                losses[f"inner_{stop}"] = config.inner_weight * (error + coefficient * penalty)
        total = sum(losses.values(), f_RF.new_zeros(()))
        return StepOutput(total, losses, codes, self.to_loss_space(y_RD, prepared), target)

    def export(self) -> Export:
        """A standard SAE with the same parameters."""
        folded, tensors = self.in_inference_form(self.config)
        shared = {field.name: getattr(folded, field.name) for field in fields(LinearConfig)}
        return Export("standard", StandardConfig(**shared), tensors)


def drawn_widths(number: int, d_sae: int, progress: float) -> tuple[int, ...]:
    """`number` different widths in [1, d_sae), increasing; width w is drawn with weight sqrt(w) - sqrt(w - 1).

    Those are the weights of the code that goes with Nabeshima 2024. The draw follows from `progress`, the fraction of training
    done, so a run that is resumed draws what it would have drawn.

    >>> drawn_widths(4, 64, 0.25) == drawn_widths(4, 64, 0.25) != drawn_widths(4, 64, 0.26)
    True
    """
    source = generator_for(derived_seed(int(progress * 2**53), "nested widths"))
    roots = torch.arange(d_sae, dtype=torch.float64).sqrt()
    drawn = torch.multinomial(roots.diff(), number, generator=source) + 1
    return tuple(sorted(drawn.tolist()))
