"""Transcoders: predict one activation from another through sparse latents (Dunefsky et al. 2024, arXiv 2406.11944).

    f = relu(x W_enc + b_enc)
    y = f W_dec + b_dec                       transcoder
    y = f W_dec + b_dec + x W_skip^T          skip_transcoder (Paulo et al. 2025, arXiv 2501.18823)
    loss = mean over rows of  |y - target|^2 + l1_coefficient * sum_i f_i n_i

x is what goes into an MLP, the target what comes out of it, and y lives in the target's units whatever is done to x; the
skip path therefore reads the raw x. n are the decoder norms. The parts that do not depend on the activation function are
shared with the JumpReLU transcoders.
"""

# R rows, D d_in, F d_sae, O d_out

from __future__ import annotations

from abc import ABC
from dataclasses import dataclass
from typing import ClassVar, TypeVar, final

import torch
from torch import Tensor, nn

from sae_core.architectures._parts import export_tensors, init_decoder, squared_error
from sae_core.codes import Codes
from sae_core.config import Schedule, option, require, value_at
from sae_core.errors import ConfigError
from sae_core.folding import decoder_norms
from sae_core.ops.active import encode_active
from sae_core.ops.decode import decode
from sae_core.ops.encode import latent_major_parameter
from sae_core.sae import SAE, Export, Prepared, SAEConfig, StepContext, StepOutput, training_option

__all__ = ["SkipTranscoder", "Transcoder", "TranscoderBase", "TranscoderBaseConfig", "TranscoderConfig"]


@dataclass(frozen=True, kw_only=True)
class TranscoderBaseConfig(SAEConfig):
    """Fields of all transcoders."""

    d_out: int = option(help="width of the outputs")
    apply_b_dec_to_input: bool = option(default=False, help="always false: b_dec belongs to the outputs")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.d_out > 0, f"d_out must be positive, not {self.d_out}")
        require(not self.apply_b_dec_to_input, "apply_b_dec_to_input must be false: a transcoder's b_dec is an output")
        require(
            self.reshape_activations == "none",
            f"reshape_activations must be none for a transcoder, not {self.reshape_activations!r}",
        )


ConfigT = TypeVar("ConfigT", bound=TranscoderBaseConfig, covariant=True)


class TranscoderBase(SAE[ConfigT], ABC):
    """Parameters and decoding of all transcoders; subclasses say whether there is a skip path."""

    reconstructs_input: ClassVar[bool] = False
    has_skip: ClassVar[bool]
    W_skip: nn.Parameter | None

    def __init__(self, config: ConfigT) -> None:
        super().__init__(config)
        self.W_enc = latent_major_parameter(config.d_in, config.d_sae)
        self.b_enc = nn.Parameter(torch.zeros(config.d_sae))
        self.W_dec = nn.Parameter(torch.empty(config.d_sae, config.d_out))
        self.b_dec = nn.Parameter(torch.zeros(config.d_out))
        self.register_parameter(
            "W_skip", nn.Parameter(torch.zeros(config.d_out, config.d_in)) if self.has_skip else None
        )

    @torch.no_grad()
    def reset_linear(self, generator: torch.Generator) -> None:
        """Random decoder rows and, apart from them, random encoder columns, both of norm `decoder_init_norm`; else zero."""
        init_decoder(self.W_dec, self.config.decoder_init_norm, generator)
        init_decoder(self.W_enc.t(), self.config.decoder_init_norm, generator)
        for parameter in (self.b_enc, self.b_dec, self.W_skip):
            if parameter is not None:
                parameter.zero_()

    def decode_rows(self, codes: Codes, prepared: Prepared | None) -> Tensor:
        """Weighted sum of decoder rows, plus the skip path from the raw input."""
        return self.with_bias_and_skip(decode(codes, self.W_dec), prepared)

    def with_bias_and_skip(self, y_RO: Tensor, prepared: Prepared | None) -> Tensor:
        """The output, from what the latents decode to."""
        y_RO = y_RO + self.b_dec
        if self.W_skip is None:
            return y_RO
        if prepared is None:
            raise ConfigError(
                f"{self.architecture}: the skip path needs the input, latents alone do not determine the output; "
                "pass it too: sae.decode(latents, x=x)"
            )
        return torch.addmm(y_RO, prepared.raw, self.W_skip.t())

    def export(self) -> Export:
        """The parameters themselves."""
        return export_tensors(self, self.config)


@dataclass(frozen=True, kw_only=True)
class TranscoderConfig(TranscoderBaseConfig):
    """Config of `Transcoder` and `SkipTranscoder`."""

    l1_coefficient: float | Schedule = training_option(
        default=1.0, help="weight of the L1 penalty; a schedule from 0 is a warm-up"
    )


class _ReLUTranscoder(TranscoderBase[TranscoderConfig], ABC):
    independent_latents: ClassVar[bool] = True

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        """Random encoder and decoder; biases and the skip path zero."""
        self.reset_linear(generator)

    def encode_rows(self, prepared: Prepared) -> Codes:
        """relu of the pre-activations."""
        return self._pre(prepared.z, None, None).map(torch.relu)

    def objective(self, prepared: Prepared, target: Tensor, context: StepContext) -> StepOutput:
        """Squared error against the target plus the L1 penalty."""
        codes = self._pre(prepared.z, context.density, context.product_dtype).map(torch.relu)
        y_RO = self.decode_rows(codes, prepared)
        penalty = codes.row_sums(codes.values * codes.per_latent(decoder_norms(self.W_dec))).mean()
        losses = {
            "mse": squared_error(y_RO, target),
            "l1": value_at(self.config.l1_coefficient, context.progress) * penalty,
        }
        return StepOutput(losses["mse"] + losses["l1"], losses, codes, y_RO, target)

    def _pre(self, z: Tensor, density: float | None, product_dtype: torch.dtype | None) -> Codes:
        return encode_active(z, None, self.W_enc, self.b_enc, 0.0, density=density, product_dtype=product_dtype)


@final
class Transcoder(_ReLUTranscoder):
    """ReLU latents from one activation to another (arXiv 2406.11944)."""

    architecture: ClassVar[str] = "transcoder"
    config_class: ClassVar[type[SAEConfig]] = TranscoderConfig
    has_skip: ClassVar[bool] = False


@final
class SkipTranscoder(_ReLUTranscoder):
    """A transcoder beside an affine map, which takes over what is linear (arXiv 2501.18823)."""

    architecture: ClassVar[str] = "skip_transcoder"
    config_class: ClassVar[type[SAEConfig]] = TranscoderConfig
    has_skip: ClassVar[bool] = True
