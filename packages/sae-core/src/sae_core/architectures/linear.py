"""The linear frame: one linear map into latents, some sparsifier, one linear map out of them.

    h = (z - b_dec) W_enc + b_enc            b_dec only where `apply_b_dec_to_input`
    f = sparsifier(h)
    y = f W_dec + b_dec  [+ x W_skip^T]      the skip path reads the raw input

What differs between architectures is the sparsifier and the loss. What is read and written is not their business: without
`d_out` the output is to be the input (an SAE); with it, something else that comes with the input (a transcoder, Dunefsky et
al. 2024, 2406.11944), beside an affine path with `skip` (Paulo et al. 2025, 2501.18823); with several sites to read and to
write it is a crosscoder (Lindsey et al. 2024). An architecture derived from `LinearSAE` is a config, `encode_rows` and
`objective`, and is all of these at once.

The encoder is stored latent-major and contiguous, as `encoder` (d_sae, d_in); `W_enc` is its transposed view, and files hold
that, under the field's name.
"""

# R rows, D d_in, F d_sae, O d_out

from __future__ import annotations

import dataclasses
from abc import ABC
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from sae_core.architectures.parts import init_decoder
from sae_core.codes import Codes, SparseCodes
from sae_core.config import option, require
from sae_core.errors import ConfigError
from sae_core.folding import fold_decoder_norm, fold_normalization
from sae_core.latent_ranks import mean_over_latents
from sae_core.ops.active import encode_active
from sae_core.ops.decode import decode
from sae_core.ops.encode import encode_entries
from sae_core.ops.select import Selection
from sae_core.sae import SAE, Axis, Export, Prepared, SAEConfig, StepContext
from sae_core.sites import NormKind, Sites

__all__ = ["LinearConfig", "LinearSAE"]


@dataclass(frozen=True, kw_only=True)
class LinearConfig(SAEConfig):
    """Fields of every architecture of the linear frame."""

    apply_b_dec_to_input: bool | None = option(  # pyright: ignore[reportIncompatibleVariableOverride] - None becomes a bool
        default=None,
        help="subtract b_dec from the (normalised) input before encoding; null: yes, except where d_out is set",
    )
    d_out: int | None = option(
        default=None, help="width of the outputs of a transcoder; null reconstructs the input", omit_default=True
    )
    skip: bool = option(
        default=False, help="an affine path from the raw input to the output; needs d_out", omit_default=True
    )
    reads: dict[str, int] = option(
        default_factory=dict, help="widths of the sites read, by name; they add up to d_in", omit_default=True
    )
    writes: dict[str, int] = option(
        default_factory=dict, help="widths of the sites written; they add up to d_out", omit_default=True
    )
    decoder_norm: NormKind = option(
        default="sum_of_sites",
        help="norm of a decoder row over several sites, where a loss or a ranking uses it: that of each summed, or joint",
        omit_default=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.d_out is None or self.d_out > 0, f"d_out must be positive or null, not {self.d_out}")
        transcodes = self.d_out is not None
        if self.apply_b_dec_to_input is None:
            object.__setattr__(self, "apply_b_dec_to_input", not transcodes)
        require(
            not (transcodes and self.apply_b_dec_to_input),
            "apply_b_dec_to_input must be false with d_out: a transcoder's b_dec is an output",
        )
        require(
            not transcodes or self.reshape_activations == "none",
            f"reshape_activations must be none with d_out, not {self.reshape_activations!r}",
        )
        require(
            transcodes or not self.skip,
            "skip: an affine path from input to output needs d_out; without it, remove skip",
        )
        require(
            transcodes or self.writes in ({}, self.reads),
            "writes: without d_out the sites read are the sites written; remove writes, or set d_out",
        )
        Sites.of(self.reads, self.d_in, "reads")
        written = Sites.of(self.writes or ({} if transcodes else self.reads), self.d_out or self.d_in, "writes")
        require(
            self.decoder_norm == "sum_of_sites" or len(written.widths) > 1,
            f"decoder_norm: {self.decoder_norm!r} makes no difference with one site; remove it, or name several in "
            "reads or writes",
        )


_RESTART = 0.2  # of the mean encoder norm: a latent that is to come alive should not upset the others
C = TypeVar("C", bound=LinearConfig, covariant=True)


class LinearSAE(SAE[C], ABC):
    """Tensors, initialisation, encoding products, decoding, folding and export of the linear frame.

    A subclass adds `encode_rows` and `objective`, and further tensors if it has any, declared in `AXES`. Biases of the
    latents are named in `biases`; the first is the one that `pre` adds.

    `folds` is a promise: the input is read by `pre` alone, and if decoder rows shrink by n while what `AXES` calls
    with_norm grows by n, nothing changes but the size of latents. Without it folding is refused.
    """

    AXES: ClassVar[Mapping[str, Axis]] = {
        "encoder": Axis(0, "with_norm", file="W_enc"),
        "b_enc": Axis(0, "with_norm"),
        "W_dec": Axis(0, "against_norm"),
        "b_dec": Axis(None),
        "W_skip": Axis(None),
    }
    biases: ClassVar[tuple[str, ...]] = ("b_enc",)
    folds: ClassVar[bool] = False
    has_encoder_product: ClassVar[bool] = True
    restarts_latents: ClassVar[bool] = True
    shares_out_latents: ClassVar[bool] = True
    W_skip: nn.Parameter | None

    def __init__(self, config: C) -> None:
        super().__init__(config)
        self.encoder = nn.Parameter(torch.empty(self.d_sae, config.d_in))
        for name in self.biases:
            self.register_parameter(name, nn.Parameter(torch.zeros(self.d_sae)))
        self.W_dec = nn.Parameter(torch.empty(self.d_sae, self.d_out))
        self.b_dec = nn.Parameter(torch.zeros(self.d_out))
        self.register_parameter("W_skip", nn.Parameter(torch.zeros(self.d_out, config.d_in)) if config.skip else None)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        """Random decoder rows of norm `decoder_init_norm`; the encoder is their copy, or for a transcoder drawn alike; all
        else as in `starts`, or zero.
        """
        init_decoder(self.W_dec, self.config.decoder_init_norm, generator)
        if self.reconstructs_input:
            self.encoder.copy_(self.W_dec)
        else:
            init_decoder(self.encoder, self.config.decoder_init_norm, generator)
        for name, tensor in self._named_tensors():
            if name not in ("W_dec", "encoder"):
                tensor.fill_(self.starts.get(name, 0.0))

    @property
    def starts(self) -> Mapping[str, float]:
        """Where parameters of one number a latent start, those that do not start at zero."""
        return {}

    @torch.no_grad()
    def restart_latents(self, latents: Tensor, prepared: Prepared, target: Tensor) -> None:
        """See `SAE.restart_latents`: what of row i its bias does not explain is what latent i reads and writes now."""
        others = torch.ones(self.d_sae, dtype=torch.bool, device=latents.device).index_fill_(0, latents, False)
        centre = self.centre()
        read_ND = prepared.z if centre is None else prepared.z - centre
        written_NO = (prepared.z if self.reconstructs_input else target) - self.b_dec
        for weights, rows, factor in ((self.encoder, read_ND, _RESTART), (self.W_dec, written_NO, 1.0)):
            size = factor * mean_over_latents(weights.norm(dim=-1), others)
            weights[latents] = size * torch.nn.functional.normalize(rows, dim=-1)
        for name, parameter in self.named_parameters():
            if self.axis(name).latent == 0 and parameter.dim() == 1:
                parameter[latents] = self.starts.get(name, 0.0)

    # What is read and written.

    @property
    def W_enc(self) -> Tensor:
        """The encoder as the field writes it: a view (d_in, d_sae)."""
        return self.encoder.t()

    @property
    def reads(self) -> Mapping[str, int]:
        """Sites of the input."""
        return self.config.reads or {"": self.config.d_in}

    @property
    def writes(self) -> Mapping[str, int]:
        """Sites of the output."""
        if self.config.d_out is None:
            return self.reads
        return self.config.writes or {"": self.config.d_out}

    @property
    def reconstructs_input(self) -> bool:
        """Whether there is no `d_out`."""
        return self.config.d_out is None

    # The pieces that `encode_rows` and `objective` are made of.

    def pre(
        self,
        prepared: Prepared,
        context: StepContext | None = None,
        *,
        floor: Tensor | float | None = None,
        select: Selection | None = None,
        encoder: Tensor | None = None,
    ) -> Codes:
        """Pre-activations h: those entries that `select` keeps, or at least all above `floor`, a number or (d_sae,).

        `context` is that of the training step, for the form of the codes; `encoder` stands in for the parameter, as
        `parts.with_dead` asks.
        """
        context = context or StepContext()
        weights = self.encoder if encoder is None else encoder
        bias = self.get_parameter(self.biases[0])
        if select is not None:
            return encode_entries(prepared.z, self.centre(), weights, bias, select)
        if floor is None:
            raise TypeError("pre: say which entries are wanted, by floor= or select=")
        return encode_active(prepared.z, self.centre(), weights, bias, floor, density=context.density)

    def select(
        self,
        prepared: Prepared,
        selection: Selection,
        context: StepContext | None = None,
        encoder: Tensor | None = None,
    ) -> SparseCodes:
        """`pre` with a selection, whose codes are always sparse."""
        codes = self.pre(prepared, context, select=selection, encoder=encoder)
        assert isinstance(codes, SparseCodes)
        return codes

    def centre(self) -> Tensor | None:
        """What is subtracted from the input, or None."""
        return self.b_dec if self.config.apply_b_dec_to_input else None

    def decoder_norms(self) -> Tensor:
        """(d_sae,) norms of the decoder rows, with gradient."""
        return Sites(self.writes).norms(self.W_dec, self.config.decoder_norm)

    def norm_sizes(self) -> list[int]:
        """Widths of the parts of a decoder row whose norms add up to `decoder_norms`."""
        return [self.d_out] if self.config.decoder_norm == "joint" else list(self.writes.values())

    def latent_norms(self) -> Tensor | None:
        """(d_sae,) decoder norms in units of which latents are ranked and reported, or None where they are h's own.

        Saving folds them into the encoder, and `unit_norm_config` says so: made of its config, this is None.
        """
        return None

    def decode_rows(self, codes: Codes, prepared: Prepared | None) -> Tensor:
        """Weighted sum of decoder rows, plus bias and skip path."""
        return self.with_bias_and_skip(decode(codes, self.W_dec), prepared)

    def with_bias_and_skip(self, y_RO: Tensor, prepared: Prepared | None) -> Tensor:
        """The normalised output, from what the latents decode to."""
        y_RO = y_RO + self.b_dec
        if self.W_skip is None:
            return y_RO
        if prepared is None:
            raise ConfigError(
                f"{self.architecture}: the skip path needs the input, latents alone do not determine the output; "
                "pass it too: sae.decode(latents, x=x)"
            )
        return torch.addmm(y_RO, prepared.raw, self.W_skip.t())

    def residual(self, prepared: Prepared, target: Tensor, y_RO: Tensor) -> Tensor:
        """What the normalised output `y_RO` leaves over of the normalised target."""
        return (prepared.z if self.reconstructs_input else target) - y_RO

    def directions(self, latents: Tensor | None = None) -> Tensor:
        """The decoder's rows (n, d_out) of these latents, without them of all."""
        return self.W_dec.detach() if latents is None else self.W_dec.detach()[latents.to(self.device)]

    def offset(self) -> Tensor:
        """b_dec, beside the skip path."""
        return self.b_dec.detach()

    @torch.no_grad()
    def start_at(self, centre_O: Tensor) -> None:
        """b_dec starts at the centre of the targets."""
        self.b_dec.copy_(centre_O)

    # Folding and files.

    @property
    def input_gains(self) -> Mapping[str, Tensor | None]:
        """The biases that a shift of the input moves, each with what multiplies the shift, (d_sae,) or None for 1."""
        return {self.biases[0]: None}

    @torch.no_grad()
    def fold_decoder_norm(self) -> None:
        """Give decoder rows unit norm; see `SAE.fold_decoder_norm`."""
        if not self.folds:
            return super().fold_decoder_norm()
        config = self.unit_norm_config(self.config)
        self._take(self._without_norms(self.tensors(), self.decoder_norms()))
        self.config = config
        return None

    @torch.no_grad()
    def fold_normalization(self) -> None:
        """Absorb the fixed normalisations of inputs and targets; see `SAE.fold_normalization`."""
        if not self.normalization.folds:
            return None
        if not self.folds:
            return super().fold_normalization()
        norms = self.latent_norms()
        config = self._folded_config(self.config, norms)
        self._take(self._folded(self.tensors(), norms))
        self.config = config
        self.forget_statistics()
        return None

    def export(self) -> Export:
        """The parameters and their config, with what folds folded in."""
        return Export(self.architecture, *self.in_inference_form(self.config))

    def in_inference_form(self, config: Any) -> tuple[Any, dict[str, Tensor]]:
        """`config` and the parameters as files have them, with what folds folded in: normalisations, and the decoder norms in
        units of which latents are reported, so that readers need not rescale.
        """
        parameters = {name: parameter.detach() for name, parameter in self.named_parameters()}
        if not self.folds:
            kept = self.kept_as_factor()
            factor = {
                name: getattr(kept, name) for name in ("normalize_activations", "activation_normalization_factor")
            }
            return dataclasses.replace(config, **factor), self.in_files(parameters)
        norms = self.latent_norms()
        return self._folded_config(config, norms), self.in_files(self._folded(parameters, norms))

    def in_files(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors under the names and in the layout that files have."""
        axes = {name: self.axis(name) for name in tensors}
        return {axes[name].file or name: t.t() if axes[name].file else t for name, t in tensors.items()}

    def unit_norm_config(self, config: Any) -> Any:
        """`config` when decoder norms have been folded; ConfigError where folding them would change which latents fire."""
        return config

    def _folded_config(self, config: Any, norms: Tensor | None) -> Any:
        """`config` when `_folded` has folded all that it folds."""
        if norms is not None:
            unit = self.unit_norm_config(config)
            if unit == config and self.normalization.folds:
                raise ConfigError(
                    f"{self.architecture}: latents are in units of decoder norms, which folding the normalisation changes, and "
                    "the config does not say when norms have been folded; give it a field that latent_norms() heeds, and "
                    "set it in unit_norm_config"
                )
            config = unit
        if self.normalization.folds:
            config = dataclasses.replace(config, normalize_activations="none", activation_normalization_factor=1.0)
        return config

    def _without_norms(self, tensors: Mapping[str, Tensor], norms: Tensor) -> dict[str, Tensor]:
        scales = {name: self.axis(name).scales for name in tensors}
        return fold_decoder_norm(tensors, scales, norms.detach())

    def _folded(self, tensors: Mapping[str, Tensor], norms: Tensor | None) -> dict[str, Tensor]:
        if norms is not None:  # before a scale changes the norms that latents are ranked by
            tensors = self._without_norms(tensors, norms)
        if not self.normalization.folds:
            return dict(tensors)
        inputs = self.normalization.fixed_map()
        outputs = inputs
        if self.target_normalization is not None:
            outputs = self.target_normalization.fixed_map() if self.target_normalization.folds else None
        centred = bool(self.config.apply_b_dec_to_input)
        return fold_normalization(tensors, inputs, outputs, centred=centred, biases=self.input_gains)

    def _take(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in self._named_tensors():
            tensor.copy_(tensors[name])
