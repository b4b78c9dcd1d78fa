"""JumpReLU: a latent passes unchanged above its own threshold and is zero below (Rajamanoharan et al. 2024, 2407.14435).

    h = (z - b_dec) W_enc + b_enc
    f = relu(h) 1[h > theta]                   with apply_relu: false, h 1[h > theta]: thresholds may lie below zero
    y = f W_dec + b_dec
    loss = mean over rows of  |y - z|^2 + l0_coefficient * S [+ pre_act_loss_coefficient * P]

The sparsity penalty S is one of

    step        L0 = sum_i 1[h_i > theta_i]                  the paper's
    quadratic   (2 / target_l0) (L0 - target_l0)^2           pulls every row towards one L0, as Gemma Scope 2 does
    tanh        sum_i tanh(scale |f_i| n_i)                  a smooth count (Anthropic, January 2025); n are decoder norms

and P = sum_i relu(theta_i - h_i) n*_i over the dead latents i lifts those back to where they get a gradient. n* are constants:
nothing else holds the decoder row of a dead latent, and one that shrinks to nothing would be the cheapest way out of P.

Neither the jump nor the count has a useful gradient in theta, so both borrow one from a window around the threshold; see
`ops.ste`. The threshold is stored as it is, in float32 whatever the precision of the weights: as a logarithm it barely moves
under Adam, and in bfloat16 its steps round away.
"""

# R rows, D d_in, F d_sae

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from torch import Tensor, nn

from sae_core.architectures.linear import LinearConfig, LinearSAE
from sae_core.architectures.parts import squared_error
from sae_core.codes import Codes
from sae_core.config import Schedule, option, require, value_at
from sae_core.latent_ranks import summed_over_ranks
from sae_core.ops.encode import encode_dense
from sae_core.ops.ste import active_count, jump
from sae_core.sae import Axis, Prepared, SAEConfig, StepContext, StepOutput, training_option
from sae_core.sites import Sites

__all__ = ["JumpReLUConfig", "JumpReLUSAE"]


@dataclass(frozen=True, kw_only=True)
class JumpReLUConfig(LinearConfig):
    """Config of `JumpReLUSAE`."""

    apply_relu: bool = option(
        default=True,
        help="latents below zero are inactive whatever their threshold; false lets thresholds lie below zero",
        omit_default=True,
    )

    l0_coefficient: float | Schedule = training_option(
        default=1.0, help="weight of the L0 penalty; a schedule from 0 is a warm-up"
    )
    jumprelu_init_threshold: float = training_option(default=0.01, help="threshold at the start")
    jumprelu_bandwidth: float = training_option(
        default=0.05, help="width of the window that gives thresholds a gradient"
    )
    jumprelu_ste_to_input: bool = training_option(
        default=False, help="the borrowed gradient of thresholds goes, negated, to pre-activations too"
    )
    jumprelu_sparsity_loss_mode: Literal["step", "tanh", "quadratic"] = training_option(
        default="step", help="sparsity penalty: L0, a smooth count, or the distance of L0 from target_l0"
    )
    jumprelu_tanh_scale: float = training_option(default=4.0, help="steepness of the smooth count of mode tanh")
    target_l0: float | None = training_option(default=None, help="the L0 that mode quadratic aims at")
    pre_act_loss_coefficient: float | None = training_option(
        default=None, help="weight of the penalty that lifts dead latents; null is none"
    )
    freeze_decoder_in_pre_act: bool = training_option(
        default=True,
        help="the penalty that lifts dead latents does not train their decoder rows, which would shrink; false as in SAELens",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.jumprelu_bandwidth > 0, f"jumprelu_bandwidth must be positive, not {self.jumprelu_bandwidth}")
        require(
            self.jumprelu_init_threshold >= 0,
            f"jumprelu_init_threshold must not be negative: {self.jumprelu_init_threshold}",
        )
        mode = self.jumprelu_sparsity_loss_mode
        require(
            mode == "tanh" or self.jumprelu_tanh_scale == 4.0,
            f"jumprelu_tanh_scale is read only with jumprelu_sparsity_loss_mode: tanh, not with {mode!r}",
        )
        require(self.jumprelu_tanh_scale > 0, f"jumprelu_tanh_scale must be positive, not {self.jumprelu_tanh_scale}")
        require(
            (mode == "quadratic") == (self.target_l0 is not None),
            f"target_l0 belongs to jumprelu_sparsity_loss_mode: quadratic; found target_l0 {self.target_l0} with {mode!r}",
        )
        require(
            self.target_l0 is None or 0 < self.target_l0 <= self.d_sae,
            f"target_l0 must lie in (0, d_sae = {self.d_sae}], not {self.target_l0}",
        )
        require(
            self.freeze_decoder_in_pre_act or self.pre_act_loss_coefficient is not None,
            "freeze_decoder_in_pre_act: there is no such penalty; remove it or set pre_act_loss_coefficient",
        )


@final
class JumpReLUSAE(LinearSAE[JumpReLUConfig]):
    """Latents with a learnt threshold under an L0 penalty (arXiv 2407.14435)."""

    architecture: ClassVar[str] = "jumprelu"
    config_class: ClassVar[type[SAEConfig]] = JumpReLUConfig
    AXES: ClassVar[Mapping[str, Axis]] = {**LinearSAE.AXES, "threshold": Axis(0, "with_norm", keep_float32=True)}
    folds: ClassVar[bool] = True
    sparsity_coefficient: ClassVar[str | None] = "l0_coefficient"
    independent_latents: ClassVar[bool] = True

    def __init__(self, config: JumpReLUConfig) -> None:
        super().__init__(config)
        self.threshold = nn.Parameter(torch.zeros(self.d_sae))

    @property
    def starts(self) -> Mapping[str, float]:
        """One threshold for all latents."""
        return {"threshold": self.config.jumprelu_init_threshold}

    def encode_rows(self, prepared: Prepared) -> Codes:
        """Pre-activations above the threshold, and above zero unless the config lets them be below."""
        floor = self.threshold.detach()
        floor = floor.clamp(min=0) if self.config.apply_relu else floor
        codes = self.pre(prepared, floor=floor)
        return codes.map(lambda h: torch.where(h > codes.per_latent(floor), h, 0.0))

    def objective(self, prepared: Prepared, target: Tensor, context: StepContext) -> StepOutput:
        """Squared error plus the sparsity penalty, with straight-through gradients for the thresholds."""
        config = self.config
        window = (self.threshold.detach() - config.jumprelu_bandwidth / 2).to(self.dtype)
        pre = self.pre(prepared, context, floor=window)
        threshold = pre.per_latent(self.threshold)
        codes = pre.with_values(
            jump(pre.values, threshold, config.jumprelu_bandwidth, to_input=config.jumprelu_ste_to_input)
        )
        reconstruction = self.to_loss_space(self.decode_rows(codes, prepared), prepared)
        coefficient = value_at(config.l0_coefficient, context.progress)
        losses = {
            "mse": squared_error(reconstruction, target),
            "l0": coefficient * self._sparsity(pre, codes, threshold).mean(),
        }
        if config.pre_act_loss_coefficient is not None and context.dead is not None:
            losses["pre_act"] = config.pre_act_loss_coefficient * self._below_threshold(prepared.z, context.dead)
        loss = sum(losses.values(), torch.zeros(()))
        return StepOutput(loss, losses, codes, reconstruction, target)

    @torch.no_grad()
    def after_step(self) -> None:
        """Thresholds stay non-negative, unless the config lets latents be below zero."""
        if self.config.apply_relu:
            self.threshold.clamp_(min=0)

    @property
    def loss_is_mean_over_rows(self) -> bool:
        """Always."""
        return True

    def _sparsity(self, pre: Codes, codes: Codes, threshold: Tensor) -> Tensor:
        """(rows,) the penalty of every row."""
        config = self.config
        if config.jumprelu_sparsity_loss_mode == "tanh":
            weighted = codes.values * codes.per_latent(self.decoder_norms())
            if not config.apply_relu:  # a latent below zero counts as much as one above, or it would be a reward
                weighted = torch.where(pre.values < 0, -weighted, weighted)
            return codes.row_sums(torch.tanh(config.jumprelu_tanh_scale * weighted))
        counts = active_count(pre.values, threshold, config.jumprelu_bandwidth, to_input=config.jumprelu_ste_to_input)
        l0_R = pre.row_sums(counts)
        if config.target_l0 is None:
            return l0_R
        return (2 / config.target_l0) * (l0_R - config.target_l0).square()

    def _below_threshold(self, z_RD: Tensor, dead: Tensor) -> Tensor:
        """How far dead latents are below their thresholds, weighted by decoder norms; only they are computed."""
        h_RF = encode_dense(z_RD, self.centre(), self.encoder[dead], self.get_parameter("b_enc")[dead])
        short_RF = (self.threshold[dead].to(h_RF.dtype) - h_RF).relu()
        norms = Sites(self.writes).norms(self.W_dec[dead], self.config.decoder_norm)
        weighted_RF = short_RF * (norms.detach() if self.config.freeze_decoder_in_pre_act else norms)
        return summed_over_ranks(weighted_RF.sum(-1)).mean()
