"""Standard: a ReLU dictionary with a sparsity penalty on its latents (Bricken et al. 2023; Conerly et al. 2024).

    h = (z - b_dec) W_enc + b_enc
    f = relu(h)
    y = f W_dec + b_dec
    loss = mean over rows of  |y - z|^2 + l1_coefficient * (sum_i (f_i n_i)^p)^(1/p)

n are the decoder norms, so that shrinking f and growing W_dec gains nothing. p = 1 is the usual L1 penalty; p < 1 is nearer
to counting latents and shrinks the large ones less. Annealing p from 1 down (Karvonen et al. 2024, arXiv 2408.00113) needs
`lp_norm_keeps_scale`: a p-norm grows steeply as p falls, so the penalty is scaled back to the size of the L1 norm.
"""

# R rows, D d_in, F d_sae

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from sae_core.architectures.linear import LinearConfig, LinearSAE
from sae_core.architectures.parts import squared_error
from sae_core.codes import Codes
from sae_core.config import Schedule, ends_of, require, value_at
from sae_core.ops.decode import decode_and_norms
from sae_core.ops.whole_batch import mean_over_batch
from sae_core.sae import Prepared, SAEConfig, StepContext, StepOutput, training_option

__all__ = ["StandardConfig", "StandardSAE"]


@dataclass(frozen=True, kw_only=True)
class StandardConfig(LinearConfig):
    """Config of `StandardSAE`."""

    l1_coefficient: float | Schedule = training_option(
        default=1.0, help="weight of the sparsity penalty; a schedule from 0 is a warm-up"
    )
    lp_norm: float | Schedule = training_option(default=1.0, help="p of the penalty's p-norm; a schedule anneals it")
    lp_norm_keeps_scale: bool = training_option(
        default=False,
        help="scale the p-norm penalty to the size of the L1 norm, so that annealing p leaves it as strong",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for p in ends_of(self.lp_norm):
            require(p > 0, f"lp_norm must be positive, not {p}")
        require(
            not self.lp_norm_keeps_scale or self.lp_norm != 1.0,
            "lp_norm_keeps_scale has no effect with lp_norm 1; remove it or set lp_norm",
        )


@final
class StandardSAE(LinearSAE[StandardConfig]):
    """ReLU latents under an L1 penalty."""

    architecture: ClassVar[str] = "standard"
    config_class: ClassVar[type[SAEConfig]] = StandardConfig
    folds: ClassVar[bool] = True
    sparsity_coefficient: ClassVar[str | None] = "l1_coefficient"
    independent_latents: ClassVar[bool] = True

    def encode_rows(self, prepared: Prepared) -> Codes:
        """relu of the pre-activations."""
        return self.pre(prepared, floor=0.0).map(torch.relu)

    def objective(self, prepared: Prepared, target: Tensor, context: StepContext) -> StepOutput:
        """Squared error plus the p-norm penalty."""
        codes = self.pre(prepared, context, floor=0.0).map(torch.relu)
        y_RO, norms = decode_and_norms(codes, self.W_dec, self.norm_sizes())
        reconstruction = self.to_loss_space(self.with_bias_and_skip(y_RO, prepared), prepared)
        coefficient = value_at(self.config.l1_coefficient, context.progress)
        penalty_R = weighted_p_norms(codes, norms, value_at(self.config.lp_norm, context.progress))
        penalty = penalty_R.mean()
        if self.config.lp_norm_keeps_scale:
            size = mean_over_batch(penalty_R)
            l1 = mean_over_batch(codes.detach().row_dots(norms.detach()))
            penalty = penalty * torch.where(size > 0, l1 / size, 1.0)
        losses = {"mse": squared_error(reconstruction, target), "l1": coefficient * penalty}
        return StepOutput(losses["mse"] + losses["l1"], losses, codes, reconstruction, target)

    @property
    def loss_is_mean_over_rows(self) -> bool:
        """Unless the penalty is scaled by its mean over the batch."""
        return not self.config.lp_norm_keeps_scale


def weighted_p_norms(codes: Codes, weights: Tensor, p: float) -> Tensor:
    """(rows,) p-norms of non-negative codes times `weights` (d_sae,); the gradient at zero is zero.

    Zero entries are left out of the power, whose derivative is infinite there for p < 1.
    """
    if p == 1.0:
        return codes.row_dots(weights)
    values = codes.values * codes.per_latent(weights)
    positive = values > 0
    powers = torch.where(positive, torch.where(positive, values, 1.0) ** p, 0.0)
    sums = codes.row_sums(powers)
    some = sums > 0
    return torch.where(some, torch.where(some, sums, 1.0) ** (1 / p), 0.0)
