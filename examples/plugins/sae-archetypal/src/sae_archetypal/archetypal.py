"""Archetypal SAE: decoder rows are mixtures of data points, up to a short deviation (Fel et al. 2025, arXiv 2502.12892).

    W_dec = softmax(mixture) points + deviation,   |deviation_i| <= longest_deviation
    f = relu(h) for the k largest of h = (z - b_dec) W_enc + b_enc, else 0
    y = f W_dec + b_dec,   loss = mean over rows of |y - z|^2

The points are samples that training begins with, less their mean. A saved SAE is a TopK dictionary with W_dec worked out.
"""

# R rows, D d_in, F d_sae, P points

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from sae_core.architectures.parts import init_decoder, squared_error
from sae_core.architectures.topk import TopKConfig
from sae_core.codes import Codes
from sae_core.config import option, require
from sae_core.ops.decode import decode
from sae_core.ops.encode import encode_entries
from sae_core.ops.select import TopK
from sae_core.sae import SAE, Axis, Export, Prepared, SAEConfig, StepContext, StepOutput, training_option
from torch import Tensor, nn

__all__ = ["ArchetypalConfig", "ArchetypalSAE"]


@dataclass(frozen=True, kw_only=True)
class ArchetypalConfig(SAEConfig):
    """Config of `ArchetypalSAE`."""

    k: int = option(default=32, help="latents kept in every row")
    points: int = option(default=1024, help="data points that decoder rows are mixtures of")
    longest_deviation: float = training_option(
        default=1.0, help="of a decoder row from its mixture, in normalised units"
    )
    decoder_init_norm: float | None = training_option(default=None, help="always null: the points decide")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(1 <= self.k <= self.d_sae, f"k must lie in [1, d_sae = {self.d_sae}], not {self.k}")
        require(self.points > 0, f"points must be positive, not {self.points}")
        require(self.longest_deviation >= 0, f"longest_deviation must not be negative: {self.longest_deviation}")
        require(
            self.decoder_init_norm is None, "decoder_init_norm must be null: decoder rows start as mixtures of points"
        )


@final
class ArchetypalSAE(SAE[ArchetypalConfig]):
    """TopK whose decoder is a function of data points (arXiv 2502.12892)."""

    architecture: ClassVar[str] = "archetypal"
    config_class: ClassVar[type[SAEConfig]] = ArchetypalConfig
    starts_from_data: ClassVar[bool] = True
    AXES: ClassVar[Mapping[str, Axis]] = {
        **{name: Axis(0) for name in ("encoder", "b_enc", "mixture", "deviation")},
        **{name: Axis(None) for name in ("b_dec", "points")},
    }
    points: Tensor

    def __init__(self, config: ArchetypalConfig) -> None:
        super().__init__(config)
        self.encoder = nn.Parameter(torch.empty(config.d_sae, config.d_in))
        self.b_enc = nn.Parameter(torch.zeros(config.d_sae))
        self.mixture = nn.Parameter(torch.empty(config.d_sae, config.points))
        self.deviation = nn.Parameter(torch.zeros(config.d_sae, config.d_in))
        self.b_dec = nn.Parameter(torch.zeros(config.d_in))
        self.register_buffer("points", torch.empty(config.points, config.d_in))

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        """Random points until there are data; each decoder row begins near one of them."""
        init_decoder(self.points, 1.0, generator)
        self.mixture.copy_(torch.randn(self.mixture.shape, generator=generator, dtype=torch.float64))
        self.mixture[torch.arange(self.d_sae), torch.arange(self.d_sae) % self.config.points] += 8.0
        for tensor in (self.b_enc, self.b_dec, self.deviation):
            tensor.zero_()
        self.project()

    @torch.no_grad()
    def start_from(self, z_RD: Tensor, target_RO: Tensor) -> None:
        """The points are rows of the first samples, at equal distances."""
        rows = len(z_RD)
        require(rows >= self.config.points, f"points: {self.config.points} are wanted of {rows}; raise init_samples")
        self.points.copy_((z_RD - z_RD.mean(0))[torch.arange(self.config.points) * rows // self.config.points])
        self.project()

    @torch.no_grad()
    def project(self) -> None:
        """Make latents the coefficients of projections on single decoder rows."""
        rows = self.decoder()
        self.encoder.copy_(rows / rows.square().sum(-1, keepdim=True))

    @torch.no_grad()
    def start_at(self, centre_O: Tensor) -> None:
        """b_dec starts at the centre of the activations."""
        self.b_dec.copy_(centre_O)

    def decoder(self) -> Tensor:
        """(d_sae, d_in)."""
        return torch.softmax(self.mixture, dim=-1) @ self.points + self.deviation

    def encode_rows(self, prepared: Prepared) -> Codes:
        """The k largest latents of every row."""
        centre = self.b_dec if self.config.apply_b_dec_to_input else None
        return encode_entries(prepared.z, centre, self.encoder, self.b_enc, TopK(self.config.k)).map(torch.relu)

    def decode_rows(self, codes: Codes, prepared: Prepared | None) -> Tensor:
        """Weighted sum of mixtures."""
        return decode(codes, self.decoder()) + self.b_dec

    def objective(self, prepared: Prepared, target: Tensor, context: StepContext) -> StepOutput:
        """Squared error."""
        codes = self.encode_rows(prepared)
        y_RD = self.to_loss_space(self.decode_rows(codes, prepared), prepared)
        mse = squared_error(y_RD, target)
        return StepOutput(mse, {"mse": mse}, codes, y_RD, target)

    @torch.no_grad()
    def after_step(self) -> None:
        """Deviations stay short."""
        longest, lengths = self.config.longest_deviation, self.deviation.norm(dim=-1, keepdim=True)
        self.deviation.mul_(torch.where(lengths > longest, longest / lengths, 1.0))

    def export(self) -> Export:
        """A TopK dictionary, which everybody can read."""
        kept = self.kept_as_factor()
        shared = {
            field: getattr(kept, field) for field in SAEConfig.__dataclass_fields__ if field != "decoder_init_norm"
        }
        config = TopKConfig(**shared, k=kept.k, rescale_acts_by_decoder_norm=False)
        tensors = {"W_enc": self.encoder.t(), "b_enc": self.b_enc, "W_dec": self.decoder(), "b_dec": self.b_dec}
        return Export("topk", config, {name: tensor.detach() for name, tensor in tensors.items()})
