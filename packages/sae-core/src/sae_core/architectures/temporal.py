"""Temporal: what earlier positions predict is taken out first; only what is new is coded sparsely (2511.01836).

Rows are positions of sequences, (..., L, d_in). With E the encoder (the transposed decoder when tied), lam = 1 / (4 d_in) and
r = z - b_dec at the start, each attention layer predicts codes from the codes of earlier positions and keeps of the residual
what its prediction does not explain:

    c = relu(lam r E),   c' = c shifted by one position (zeros first)
    q = relu(Attention(queries from c, keys and values from c'))            causal
    p = q W_dec,   s = (p . r) / (|p| + 1e-6)^2
    z_pred <- z_pred + s q,   r <- r - s p

What is left is novel:  f = relu(lam r E), the `kval_topk` largest of each position when that is set, and

    y = (f + z_pred) W_dec + b_dec
    loss = mean over rows of |y - z|^2 + l1_coefficient * sum_i f_i n_i

The latents that `encode` returns are the novel ones, f. They do not determine the output, since the prediction depends on the
sequence: ``decode(f)`` is their part alone, ``decode(f, x=x)`` equals ``sae(x)``.
"""

# B sequences, L positions, R = B L rows, D d_in, F d_sae, H heads

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sae_core.architectures.parts import init_decoder, squared_error
from sae_core.codes import Codes
from sae_core.config import Schedule, option, require, value_at
from sae_core.ops.active import encode_active
from sae_core.ops.decode import decode
from sae_core.ops.encode import encode_entries
from sae_core.ops.select import TopK
from sae_core.ops.whole_batch import mean_over_batch
from sae_core.sae import SAE, Axis, Export, Prepared, SAEConfig, StepContext, StepOutput, training_option

__all__ = ["TemporalConfig", "TemporalSAE"]

_EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class TemporalConfig(SAEConfig):
    """Config of `TemporalSAE`."""

    n_heads: int = option(default=8, help="attention heads")
    n_attn_layers: int = option(default=1, help="attention layers, each predicting what those before left over")
    bottleneck_factor: int = option(default=64, help="queries and keys have width d_sae / bottleneck_factor")
    sae_diff_type: Literal["relu", "topk"] = option(default="topk", help="how novel codes are made sparse")
    kval_topk: int | None = option(default=None, help="novel latents kept at each position; null keeps all above zero")
    tied_weights: bool = option(default=True, help="the encoder is the transposed decoder")
    l1_coefficient: float | Schedule = training_option(default=0.0, help="weight of an L1 penalty on the novel latents")
    decoder_init_norm: float | None = training_option(
        default=None, help="norm of the decoder rows at the start; null draws their entries from a standard normal"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("n_heads", "n_attn_layers", "bottleneck_factor"):
            require(getattr(self, name) > 0, f"{name} must be positive, not {getattr(self, name)}")
        require(
            self.d_sae % (self.bottleneck_factor * self.n_heads) == 0,
            f"d_sae = {self.d_sae} must be divisible by bottleneck_factor * n_heads = "
            f"{self.bottleneck_factor * self.n_heads}",
        )
        require(
            self.kval_topk is None or (self.sae_diff_type == "topk" and 1 <= self.kval_topk <= self.d_sae),
            f"kval_topk must lie in [1, d_sae = {self.d_sae}] and belongs to sae_diff_type: topk; found {self.kval_topk} "
            f"with {self.sae_diff_type!r}",
        )
        require(
            self.normalize_activations != "covariance_whitening",
            "normalize_activations: covariance_whitening cannot be folded into a temporal SAE, whose predictions compare "
            "lengths; use another one",
        )
        require(
            self.reshape_activations == "none",
            "reshape_activations must be none: the dimension before the last is the position in the sequence",
        )


@final
class TemporalSAE(SAE[TemporalConfig]):
    """Predicts what it can from earlier positions and codes the rest sparsely (arXiv 2511.01836)."""

    architecture: ClassVar[str] = "temporal"
    config_class: ClassVar[type[SAEConfig]] = TemporalConfig
    example: ClassVar[Mapping[str, Any]] = {"n_heads": 2, "bottleneck_factor": 4, "kval_topk": 8}
    AXES: ClassVar[Mapping[str, Axis]] = {
        "encoder": Axis(0, file="W_enc"),
        "W_dec": Axis(0),
        "b_dec": Axis(None),
        "attn_layers.*": Axis(None),
    }
    reads_sequences: ClassVar[bool] = True
    has_encoder_product: ClassVar[bool] = True
    encoder: nn.Parameter | None

    def __init__(self, config: TemporalConfig) -> None:
        super().__init__(config)
        self.W_dec = nn.Parameter(torch.empty(config.d_sae, config.d_in))
        self.b_dec = nn.Parameter(torch.zeros(config.d_in))
        self.register_parameter(
            "encoder", None if config.tied_weights else nn.Parameter(torch.empty(config.d_sae, config.d_in))
        )
        self.attn_layers = nn.ModuleList(
            _Attention(config.d_sae, config.n_heads, config.bottleneck_factor) for _ in range(config.n_attn_layers)
        )

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        """Random decoder rows (and encoder columns, when not tied), attention rows of fixed norms, b_dec zero."""
        norm = self.config.decoder_init_norm
        for rows in (self.W_dec,) if self.encoder is None else (self.W_dec, self.encoder):
            if norm is None:
                rows.copy_(torch.randn(rows.shape, generator=generator, dtype=torch.float64))
            else:
                init_decoder(rows, norm, generator)
        self.b_dec.zero_()
        for layer in self.attn_layers:
            cast("_Attention", layer).reset_parameters(generator)

    def encode_rows(self, prepared: Prepared) -> Codes:
        """The novel codes; the predicted ones are left in the batch's scratch space for `decode_rows`."""
        return self._split(prepared, None)

    def decode_rows(self, codes: Codes, prepared: Prepared | None) -> Tensor:
        """The novel codes' part and, when the input is known, what its earlier positions predict."""
        y_RD = decode(codes, self.W_dec)
        if prepared is not None:
            if "predicted" not in prepared.scratch:
                self._split(prepared, None)
            y_RD = y_RD + prepared.scratch["predicted"]
        # Tied weights encode z - b_dec only if b_dec is subtracted; otherwise the decoder must not add it either.
        return y_RD if self.config.tied_weights and not self.config.apply_b_dec_to_input else y_RD + self.b_dec

    def objective(self, prepared: Prepared, target: Tensor, context: StepContext) -> StepOutput:
        """Squared error of prediction and novel part together, plus the L1 penalty on the novel latents."""
        codes = self._split(prepared, context.density)
        reconstruction = self.to_loss_space(self.decode_rows(codes, prepared), prepared)
        losses = {"mse": squared_error(reconstruction, target)}
        coefficient = value_at(self.config.l1_coefficient, context.progress)
        if coefficient:
            weighted = codes.values * codes.per_latent(self.W_dec.norm(dim=-1))
            losses["l1"] = coefficient * codes.row_sums(weighted).mean()
        with torch.no_grad():
            predicted, novel = prepared.scratch["predicted"], decode(codes.detach(), self.W_dec)
            sizes = [mean_over_batch(y.reshape(len(novel), -1).square().sum(-1)) for y in (predicted, novel)]
            share = sizes[0] / (sizes[0] + sizes[1]).clamp_min(_EPS / len(novel))
        loss = sum(losses.values(), torch.zeros(()))
        return StepOutput(loss, losses, codes, reconstruction, target, {"predicted_share": share})

    def export(self) -> Export:
        """The parameters; a fitted scale of the input is kept as a constant factor, since predictions compare lengths."""
        tensors = self.tensors()
        if self.encoder is not None:
            tensors["W_enc"] = tensors.pop("encoder").t()
        return Export(self.architecture, self.kept_as_factor(), tensors)

    @torch.no_grad()
    def start_at(self, centre_O: Tensor) -> None:
        """b_dec starts at the centre of the activations."""
        self.b_dec.copy_(centre_O)

    def _split(self, prepared: Prepared, density: float | None) -> Codes:
        """Novel codes of all rows; the prediction in input space goes to ``scratch["predicted"]``."""
        encoder = self.W_dec if self.encoder is None else self.encoder
        lam = 1 / (4 * self.d_in)
        centred = prepared.z - self.b_dec if self.config.apply_b_dec_to_input else prepared.z
        left_BLD = centred.view(*_sequences(prepared.leading_shape), self.d_in)
        predicted_BLD = torch.zeros_like(left_BLD)
        for layer in self.attn_layers:
            codes_BLF = F.relu((lam * left_BLD) @ encoder.t())
            before_BLF = F.pad(codes_BLF[:, :-1], (0, 0, 1, 0))
            p_BLD = F.relu(layer(codes_BLF, before_BLF)) @ self.W_dec
            share_BL1 = (p_BLD * left_BLD).sum(-1, keepdim=True) / (_safe_norm(p_BLD) + _EPS).square()
            predicted_BLD = predicted_BLD + share_BL1 * p_BLD
            left_BLD = left_BLD - share_BL1 * p_BLD
        prepared.scratch["predicted"] = predicted_BLD.reshape(-1, self.d_in)
        left_RD = lam * left_BLD.reshape(-1, self.d_in)
        no_bias = left_RD.new_zeros(self.d_sae)
        k = self.config.kval_topk if self.config.sae_diff_type == "topk" else None
        if k is not None:
            codes = encode_entries(left_RD, None, encoder, no_bias, TopK(k))
            return codes.map(torch.relu)
        codes = encode_active(left_RD, None, encoder, no_bias, 0.0, density=density)
        return codes.map(torch.relu)


@final
class _Linear(nn.Module):
    """``x -> x weight^T + bias`` as in `nn.Linear`, but drawn from a generator of its own."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_out, d_in))
        self.bias = nn.Parameter(torch.zeros(d_out))

    @torch.no_grad()
    def reset_parameters(self, row_norm: float, generator: torch.Generator) -> None:
        """Random rows of this norm and small random biases."""
        init_decoder(self.weight, row_norm, generator)
        bound = 1 / math.sqrt(self.weight.shape[1])
        drawn = torch.rand(self.bias.shape, generator=generator, dtype=torch.float64)
        self.bias.copy_(drawn * (2 * bound) - bound)

    def forward(self, x: Tensor) -> Tensor:
        """(..., d_out) from (..., d_in)."""
        return F.linear(x, self.weight, self.bias)


@final
class _Attention(nn.Module):
    """Causal attention whose values are as wide as the dictionary; names are those of the files."""

    def __init__(self, d_sae: int, n_heads: int, bottleneck_factor: int) -> None:
        super().__init__()
        self.d_sae, self.narrow, self.n_heads = d_sae, d_sae // bottleneck_factor, n_heads
        self.k_ctx = _Linear(d_sae, self.narrow)
        self.q_target = _Linear(d_sae, self.narrow)
        self.v_ctx = _Linear(d_sae, d_sae)
        self.c_proj = _Linear(d_sae, d_sae)

    def reset_parameters(self, generator: torch.Generator) -> None:
        """Random rows of norm 1 / sqrt(width of a head), for the output 1 / sqrt(d_sae)."""
        self.k_ctx.reset_parameters((self.narrow // self.n_heads) ** -0.5, generator)
        self.q_target.reset_parameters((self.narrow // self.n_heads) ** -0.5, generator)
        self.v_ctx.reset_parameters((self.d_sae // self.n_heads) ** -0.5, generator)
        self.c_proj.reset_parameters(self.d_sae**-0.5, generator)

    def forward(self, target_BLF: Tensor, context_BLF: Tensor) -> Tensor:
        """What each position of `target_BLF` gathers from the positions of `context_BLF` up to its own."""
        q, k, v = (
            linear(source).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
            for linear, source in ((self.q_target, target_BLF), (self.k_ctx, context_BLF), (self.v_ctx, context_BLF))
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(mixed.transpose(1, 2).flatten(-2))


def _sequences(leading_shape: tuple[int, ...]) -> tuple[int, int]:
    """Number of sequences and positions in each; rows without a sequence dimension are one position each.

    >>> _sequences((4, 3, 7)), _sequences((7,)), _sequences(())
    ((12, 7), (1, 7), (1, 1))
    """
    return (math.prod(leading_shape[:-1]), leading_shape[-1]) if leading_shape else (1, 1)


def _safe_norm(p_BLD: Tensor) -> Tensor:
    """Lengths (B, L, 1), with the gradient zero instead of NaN where a prediction is zero."""
    squares = p_BLD.square().sum(-1, keepdim=True)
    return torch.where(squares > 0, torch.where(squares > 0, squares, 1.0).sqrt(), 0.0)
