"""Cross-layer transcoder: latents of layer l read site l and write the sites of l and all later layers.

    h_l = z_l W_enc_l + b_enc_l                          z_l the (normalised) input at layer l
    f   = activation(h)                                  h the pre-activations of all layers side by side
    y_t = sum over l <= t of  f_l W_dec_l,t + b_dec_t    the prediction at layer t

One latent may thus stand for a computation that goes on over many layers, which attribution graphs would otherwise show as a
chain (Ameisen et al. 2025, "Circuit Tracing"; Lindsey et al. 2024, "Sparse Crosscoders"). The encoder is block-diagonal and
the decoder block-triangular; each layer's blocks are parameters of their own, and the blocks of zeros do not exist.

Three activations:

    jumprelu    a learnt threshold for each latent:
                loss = |y - target|^2 + l0_coefficient sum_i tanh(scale f_i n_i)  [+ pre_act_loss_coefficient P]
    topk        the k latents of a row with the largest h n, over all layers or in each layer
    batchtopk   k latents a row on average over the batch, over all layers or in each; saved with a threshold, as jumprelu

The squared error is summed over layers, n_i is the norm of everything that latent i writes, and P lifts dead latents as in
`jumprelu`. The selecting ones keep latents alive by the auxiliary loss of `parts`, each layer for what it writes.
Latents are numbered layer by layer.
"""

# R rows, F latents of a layer, D width read by a layer, O width written

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, final

import torch
from torch import Tensor, nn

from sae_core.architectures.parts import (
    DeadLatents,
    init_decoder,
    squared_error,
    times_norms,
    with_dead,
    without_norms,
)
from sae_core.codes import Codes, DenseCodes, SparseCodes
from sae_core.config import Schedule, ends_of, option, require, value_at
from sae_core.errors import ConfigError
from sae_core.folding import fold_decoder_norm, fold_normalization
from sae_core.ops.batch_topk import BatchTopK
from sae_core.ops.decode import decode
from sae_core.ops.dispatch import prefer_sparse
from sae_core.ops.encode import encode_dense, encode_entries
from sae_core.ops.layered import Given, joined, split, sum_of_tails
from sae_core.ops.select import Above, TopK
from sae_core.ops.ste import jump
from sae_core.ops.whole_batch import smallest_in_batch
from sae_core.sae import SAE, Axis, Export, Prepared, SAEConfig, StepContext, StepOutput, training_option
from sae_core.sites import NormKind, Sites

__all__ = ["CrossLayerTranscoder", "CrossLayerTranscoderConfig"]

_PROBE_ROWS = 32
_OF_JUMPRELU = (
    "l0_coefficient", "jumprelu_init_threshold", "jumprelu_bandwidth", "jumprelu_ste_to_input", "jumprelu_tanh_scale",
    "pre_act_loss_coefficient",
)  # fmt: skip
_OF_SELECTING = ("k", "k_counts", "rescale_acts_by_decoder_norm", "aux_loss_coefficient")
_OF_BATCHTOPK = ("topk_threshold_lr",)
_UNREAD = {
    "jumprelu": (*_OF_SELECTING, *_OF_BATCHTOPK),
    "topk": (*_OF_JUMPRELU, *_OF_BATCHTOPK),
    "batchtopk": _OF_JUMPRELU,
}


@dataclass(frozen=True, kw_only=True)
class CrossLayerTranscoderConfig(SAEConfig):
    """Config of `CrossLayerTranscoder`."""

    apply_b_dec_to_input: bool = option(
        default=False, help="always false: b_dec is an output, so there is nothing of it to subtract from the input"
    )
    d_out: int | None = option(default=None, help="width of all outputs together; null adds up writes")
    reads: dict[str, int] = option(
        default_factory=dict, help="widths of the sites read, by name, in the order of the layers; they add up to d_in"
    )
    writes: dict[str, int] = option(
        default_factory=dict, help="widths of the sites written, by name, one for each site read, in the same order"
    )
    activation: Literal["jumprelu", "topk", "batchtopk"] = option(
        default="jumprelu", help="what decides which latents are active"
    )
    apply_relu: bool = option(
        default=True,
        help="latents below zero become zero; false keeps them where the activation does",
        omit_default=True,
    )
    decoder_norm: NormKind = option(
        default="joint",
        help="norm of what a latent writes, in losses and rankings: of all sites together, or of each summed",
        omit_default=True,
    )
    k: float | Schedule | None = option(
        default=None, help="latents kept in a row (topk) or per row on average (batchtopk); may be a schedule"
    )
    k_counts: Literal["all_layers", "each_layer"] = option(
        default="all_layers", help="whether k counts the latents of all layers, or those of each", omit_default=True
    )
    rescale_acts_by_decoder_norm: bool | None = option(
        default=None,
        help="rank and report latents by pre-activation times decoder norm; null: where the activation ranks",
    )

    l0_coefficient: float | Schedule = training_option(
        default=1.0, help="weight of the sparsity penalty; a schedule from 0 is a warm-up"
    )
    jumprelu_init_threshold: float = training_option(default=0.01, help="threshold at the start")
    jumprelu_bandwidth: float = training_option(
        default=0.05, help="width of the window that gives thresholds a gradient"
    )
    jumprelu_ste_to_input: bool = training_option(
        default=False, help="the borrowed gradient of thresholds goes, negated, to pre-activations too"
    )
    jumprelu_tanh_scale: float = training_option(default=4.0, help="steepness of the penalty's smooth count")
    pre_act_loss_coefficient: float | None = training_option(
        default=None, help="weight of the penalty that lifts dead latents; null is none"
    )
    aux_loss_coefficient: float = training_option(default=1.0, help="weight of the auxiliary loss of dead latents")
    topk_threshold_lr: float = training_option(
        default=0.01, help="weight of one step in the running threshold that eval mode uses"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(not self.apply_b_dec_to_input, "apply_b_dec_to_input must be false: b_dec is an output here")
        require(
            self.reshape_activations == "none", f"reshape_activations must be none, not {self.reshape_activations!r}"
        )
        require(
            self.d_out is not None or bool(self.writes),
            "writes: the sites written are missing; give their widths by name, or d_out where there is one layer",
        )
        if self.d_out is None:
            object.__setattr__(self, "d_out", sum(self.writes.values()))
        assert self.d_out is not None
        read = Sites.of(self.reads, self.d_in, "reads").widths
        written = Sites.of(self.writes, self.d_out, "writes").widths
        require(
            len(read) == len(written),
            f"reads names {len(read)} sites and writes {len(written)}; every layer reads one and has one written",
        )
        require(
            self.d_sae % len(read) == 0,
            f"d_sae = {self.d_sae} latents cannot be shared out evenly among {len(read)} layers",
        )
        if self.rescale_acts_by_decoder_norm is None:
            object.__setattr__(self, "rescale_acts_by_decoder_norm", self.activation != "jumprelu")
        self._check_activation(len(read))

    def _check_activation(self, layers: int) -> None:
        for name in _UNREAD[self.activation]:
            default = False if name == "rescale_acts_by_decoder_norm" else type(self).__dataclass_fields__[name].default
            require(getattr(self, name) == default, f"{name} is not read with activation: {self.activation}; remove it")
        require(self.jumprelu_bandwidth > 0, f"jumprelu_bandwidth must be positive, not {self.jumprelu_bandwidth}")
        require(
            self.jumprelu_init_threshold >= 0,
            f"jumprelu_init_threshold must not be negative: {self.jumprelu_init_threshold}",
        )
        require(self.jumprelu_tanh_scale > 0, f"jumprelu_tanh_scale must be positive, not {self.jumprelu_tanh_scale}")
        require(
            self.aux_loss_coefficient >= 0, f"aux_loss_coefficient must not be negative: {self.aux_loss_coefficient}"
        )
        require(0 < self.topk_threshold_lr <= 1, f"topk_threshold_lr must lie in (0, 1], not {self.topk_threshold_lr}")
        require(self.apply_relu or self.activation != "batchtopk", "apply_relu: batchtopk keeps positive latents alone")
        if self.activation == "jumprelu":
            return
        require(self.k is not None, f"k is needed with activation: {self.activation}")
        among = self.d_sae if self.k_counts == "all_layers" else self.d_sae // layers
        for value in ends_of(self.k or 0):
            whole = self.activation == "batchtopk" or value == int(value)
            require(whole, f"k must be a whole number with activation: topk, not {value}")
            require(0 < value <= among, f"k must lie in (0, {among}], not {value}")


@final
class CrossLayerTranscoder(SAE[CrossLayerTranscoderConfig]):
    """Latents that read one layer and write all later ones (Ameisen et al. 2025)."""

    architecture: ClassVar[str] = "cross_layer_transcoder"
    config_class: ClassVar[type[SAEConfig]] = CrossLayerTranscoderConfig
    has_encoder_product: ClassVar[bool] = True
    example: ClassVar[Mapping[str, Any]] = {"reads": {"a": 9, "b": 7}, "writes": {"x": 5, "y": 6}}
    AXES: ClassVar[Mapping[str, Axis]] = {  # a layer's tensors count that layer's latents, not all
        "encoder.*": Axis(None),
        "b_enc.*": Axis(None),
        "threshold.*": Axis(None, keep_float32=True),
        "W_dec.*": Axis(None),
        "b_dec.*": Axis(None),
        "topk_threshold": Axis(None, keep_float32=True),
        "topk_threshold_weight": Axis(None, keep_float32=True),
    }
    topk_threshold: Tensor | None
    topk_threshold_weight: Tensor | None

    def __init__(self, config: CrossLayerTranscoderConfig) -> None:
        super().__init__(config)
        read, written = list(self.reads.values()), list(self.writes.values())
        self.layers = len(read)
        self.per_layer = config.d_sae // self.layers
        tails = [sum(written[layer:]) for layer in range(self.layers)]
        self.encoder = _parameters([(self.per_layer, width) for width in read])
        self.b_enc = _parameters([(self.per_layer,)] * self.layers)
        self.W_dec = _parameters([(self.per_layer, width) for width in tails])
        self.b_dec = _parameters([(width,) for width in written])
        self.threshold = _parameters([(self.per_layer,)] * self.layers if config.activation == "jumprelu" else [])
        running = config.activation == "batchtopk"
        for name in ("topk_threshold", "topk_threshold_weight"):  # a layer, or all of them, has its own
            shape = (self.layers,) if config.k_counts == "each_layer" else (1,)
            self.register_buffer(name, torch.zeros(shape, dtype=torch.float64) if running else None)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        """Random decoder rows, over all sites that they write of norm `decoder_init_norm`, and encoder rows drawn alike; all
        else zero.
        """
        for weights in (*self.W_dec, *self.encoder):
            init_decoder(weights, self.config.decoder_init_norm, generator)
        for biases in (*self.b_enc, *self.b_dec):
            biases.zero_()
        for threshold in self.threshold:
            threshold.fill_(self.config.jumprelu_init_threshold)
        for running in (self.topk_threshold, self.topk_threshold_weight):
            if running is not None:
                running.zero_()

    # What is read and written.

    @property
    def reads(self) -> Mapping[str, int]:
        """Sites of the input, one a layer."""
        return self.config.reads or {"": self.config.d_in}

    @property
    def writes(self) -> Mapping[str, int]:
        """Sites of the output, one a layer."""
        assert self.config.d_out is not None
        return self.config.writes or {"": self.config.d_out}

    @property
    def reconstructs_input(self) -> bool:
        """Never: it predicts what it writes."""
        return False

    def sites_from(self, layer: int) -> Sites:
        """The sites that the latents of a layer write."""
        return Sites(dict(list(self.writes.items())[layer:]))

    # From rows to codes and back.

    def encode_rows(self, prepared: Prepared) -> Codes:
        """Latents above their thresholds, or the selected ones; in eval mode a threshold stands in for a batch."""
        config = self.config
        if config.activation == "jumprelu":
            floor = torch.cat(list(self.threshold)).detach()
            return self._thresholded(prepared, floor.clamp(min=0) if config.apply_relu else floor, StepContext())
        norms = self.decoder_norms().detach() if config.rescale_acts_by_decoder_norm else None
        if config.activation == "batchtopk" and not self.training:
            expected = StepContext(density=self._k_of_row(1.0) / self.d_sae)
            floor = self._running_threshold().to(self.dtype)
            codes = self._thresholded(prepared, floor if norms is None else floor / norms, expected)
        else:
            codes = self._selected(prepared, StepContext(progress=1.0), norms, list(self.encoder))
        return times_norms(codes, norms)

    def decode_rows(self, codes: Codes, prepared: Prepared | None) -> Tensor:
        """The sum over layers of what their latents write, plus biases."""
        norms = self.decoder_norms().detach() if self.config.rescale_acts_by_decoder_norm else None
        return self._decoded(without_norms(codes, norms), list(self.W_dec))

    def decoder_norms(self) -> Tensor:
        """(d_sae,) norms of all that each latent writes, with gradient."""
        kind = self.config.decoder_norm
        return torch.cat([self.sites_from(layer).norms(W, kind) for layer, W in enumerate(self.W_dec)])

    def _decoded(self, codes: Codes, W_dec: Sequence[Tensor]) -> Tensor:
        parts = zip(split(codes, [self.per_layer] * self.layers), W_dec, strict=True)
        return sum_of_tails([decode(part, W) for part, W in parts]) + torch.cat(list(self.b_dec))

    def _inputs(self, prepared: Prepared) -> list[Tensor]:
        """(rows, width) of what every layer reads."""
        return [z.contiguous() for z in prepared.z.split(list(self.reads.values()), dim=-1)]

    def _above(self, prepared: Prepared, floor: Tensor, context: StepContext) -> Codes:
        """Pre-activations of at least the entries above `floor` (d_sae,); in one form for all layers."""
        layers = list(zip(self._inputs(prepared), self.encoder, self.b_enc, floor.split(self.per_layer), strict=True))
        density, rows = context.density, prepared.z.shape[0]
        if density is None and self.device.type == "cpu" and rows > 4 * _PROBE_ROWS:
            with torch.no_grad():
                found = [(encode_dense(z[:_PROBE_ROWS], None, W, b) > low).float().mean() for z, W, b, low in layers]
                density = float(torch.stack(found).mean())
        if not prefer_sparse(d_sae=self.d_sae, density=density, device=self.device):
            return joined([DenseCodes(encode_dense(z, None, W, b), (rows,)) for z, W, b, _ in layers])
        return joined([encode_entries(z, None, W, b, Above(low)) for z, W, b, low in layers])

    def _thresholded(self, prepared: Prepared, floor: Tensor, context: StepContext) -> Codes:
        codes = self._above(prepared, floor, context)
        return codes.map(lambda h: torch.where(h > codes.per_latent(floor), h, 0.0))

    def _selected(
        self, prepared: Prepared, context: StepContext, norms: Tensor | None, encoder: Sequence[Tensor]
    ) -> SparseCodes:
        """The latents that are kept, ranked by h times `norms`, and in units of h.

        What is kept over all layers is among what each layer alone would keep: so these are found first, without gradient,
        and the choice among them is then computed again as an ordinary selection of each layer.
        """
        inputs, k = self._inputs(prepared), value_at(self.config.k or 0, context.progress)
        scales = [None] * self.layers if norms is None else norms.split(self.per_layer)
        rule = BatchTopK if self.config.activation == "batchtopk" else _rounded_topk
        selections = [rule(k, scale) for scale in scales]
        layers = list(zip(inputs, encoder, self.b_enc, strict=True))
        if self.config.k_counts == "all_layers" and self.layers > 1:
            with torch.no_grad():
                found = [
                    encode_entries(z, None, W, b, selection)
                    for (z, W, b), selection in zip(layers, selections, strict=True)
                ]
                best = rule(k, norms).among(_sparse(joined(found)))
            selections = [Given(_sparse(part)) for part in split(best, [self.per_layer] * self.layers)]
        kept = joined(
            [encode_entries(z, None, W, b, selection) for (z, W, b), selection in zip(layers, selections, strict=True)]
        )
        return _sparse(kept.map(torch.relu) if self.config.apply_relu else kept)

    def _k_of_row(self, progress: float) -> float:
        k = value_at(self.config.k or 0, progress)
        return k if self.config.k_counts == "all_layers" else k * self.layers

    # Training.

    def objective(self, prepared: Prepared, target: Tensor, context: StepContext) -> StepOutput:
        """Squared error summed over layers, plus what keeps latents sparse or alive."""
        if self.config.activation == "jumprelu":
            return self._jumprelu_objective(prepared, target, context)
        return self._selecting_objective(prepared, target, context)

    def _jumprelu_objective(self, prepared: Prepared, target: Tensor, context: StepContext) -> StepOutput:
        config, thresholds = self.config, torch.cat(list(self.threshold))
        pre = self._above(prepared, (thresholds.detach() - config.jumprelu_bandwidth / 2).to(self.dtype), context)
        codes = pre.with_values(
            jump(
                pre.values,
                pre.per_latent(thresholds),
                config.jumprelu_bandwidth,
                to_input=config.jumprelu_ste_to_input,
            )
        )
        y_RO = self._decoded(codes, list(self.W_dec))
        norms = self.decoder_norms()
        weighted = codes.values * codes.per_latent(norms)
        if not config.apply_relu:  # a latent below zero counts as much as one above, or it would be a reward
            weighted = torch.where(pre.values < 0, -weighted, weighted)
        sparsity_R = codes.row_sums(torch.tanh(config.jumprelu_tanh_scale * weighted))
        losses = {
            "mse": squared_error(y_RO, target),
            "l0": value_at(config.l0_coefficient, context.progress) * sparsity_R.mean(),
        }
        if config.pre_act_loss_coefficient is not None and context.dead is not None:
            losses["pre_act"] = config.pre_act_loss_coefficient * self._below_threshold(
                prepared, context.dead, norms.detach()
            )  # constants: a dead latent's decoder row would shrink to escape
        return StepOutput(sum(losses.values(), torch.zeros(())), losses, codes, y_RO, target)

    def _below_threshold(self, prepared: Prepared, dead: Tensor, norms: Tensor) -> Tensor:
        """How far dead latents are below their thresholds, weighted by decoder norms; only they are computed."""
        short: list[Tensor] = []
        for layer, (z, which) in enumerate(zip(self._inputs(prepared), self._by_layer(dead), strict=True)):
            h = encode_dense(z, None, self.encoder[layer][which], self.b_enc[layer][which])
            below = (self.threshold[layer][which].to(h.dtype) - h).relu()
            short.append((below * norms[which + layer * self.per_layer]).sum(-1).mean())
        return torch.stack(short).sum()

    def _selecting_objective(self, prepared: Prepared, target: Tensor, context: StepContext) -> StepOutput:
        config = self.config
        norms = self.decoder_norms().detach() if config.rescale_acts_by_decoder_norm else None
        wanted = context.dead if config.aux_loss_coefficient else None
        by_layer = [None] * self.layers if wanted is None else self._by_layer(wanted)
        main = [with_dead(*layer) for layer in zip(self.encoder, self.b_enc, self.W_dec, by_layer, strict=True)]
        codes = self._selected(prepared, context, norms, [encoder for encoder, _, _ in main])
        y_RO = self._decoded(codes, [W_dec for _, W_dec, _ in main])
        losses = {"mse": squared_error(y_RO, target)}
        dead = [(layer, found) for layer, (_, _, found) in enumerate(main) if found is not None]
        if dead:
            aux = self._auxiliary(prepared, target - y_RO, dead, norms)
            losses["auxiliary_reconstruction"] = config.aux_loss_coefficient * aux
        latents = times_norms(codes, norms)
        loss = sum(losses.values(), torch.zeros(()))
        metrics: dict[str, Tensor] = {}
        if self.topk_threshold is not None:
            self._move_threshold(latents)
            metrics["topk_threshold"] = self.topk_threshold.mean()
        return StepOutput(loss, losses, latents, y_RO, target, metrics)

    def _auxiliary(
        self, prepared: Prepared, residual_RO: Tensor, dead: Sequence[tuple[int, DeadLatents]], norms: Tensor | None
    ) -> Tensor:
        """Aux-k (2406.04093, A.2): in each layer the width / 2 best dead latents; together they predict the residual."""
        inputs = self._inputs(prepared)
        predicted = [residual_RO.new_zeros(residual_RO.shape)]
        n_dead = k_aux = 0
        for layer, found in dead:
            most = max(inputs[layer].shape[-1] // 2, 1)
            n_dead, k_aux = n_dead + found.indices.numel(), k_aux + most
            scale = None if norms is None else norms[found.indices + layer * self.per_layer]
            chosen = TopK(min(most, found.indices.numel()), scale)
            codes = encode_entries(inputs[layer], None, found.encoder, found.b_enc, chosen)
            predicted.append(decode(codes, found.W_dec))
        return min(n_dead / k_aux, 1.0) * squared_error(sum_of_tails(predicted), residual_RO.detach())

    def _by_layer(self, latents: Tensor) -> list[Tensor]:
        """Numbers of latents within their layers, for every layer."""
        layer = latents.div(self.per_layer, rounding_mode="floor")
        return [latents[layer == each] - each * self.per_layer for each in range(self.layers)]

    @property
    def loss_is_mean_over_rows(self) -> bool:
        """With thresholds."""
        return self.config.activation == "jumprelu"

    @torch.no_grad()
    def after_step(self) -> None:
        """Thresholds stay non-negative, unless the config lets latents be below zero."""
        if self.config.apply_relu:
            for threshold in self.threshold:
                threshold.clamp_(min=0)

    @torch.no_grad()
    def start_at(self, centre_O: Tensor) -> None:
        """Biases start at the centre of the targets."""
        for bias, centre in zip(self.b_dec, centre_O.split(list(self.writes.values())), strict=True):
            bias.copy_(centre)

    @torch.no_grad()
    def _move_threshold(self, latents: SparseCodes) -> None:
        """Take the smallest latent that stayed, of each layer or of all, into the running mean; see `batch_selecting`."""
        mean, weight = self.topk_threshold, self.topk_threshold_weight
        if not self.training or mean is None or weight is None:
            return
        size = self.d_sae // mean.numel()
        smallest = torch.full_like(mean, torch.inf)
        smallest.scatter_reduce_(0, latents.indices // size, latents.values.to(mean.dtype), "amin")
        smallest = smallest_in_batch(smallest)
        rate, seen = self.config.topk_threshold_lr, smallest.isfinite()
        before = weight * (1 - rate)
        moved = (before * mean + rate * torch.where(seen, smallest, 0.0)) / (before + rate)
        mean.copy_(torch.where(seen, moved, mean))
        weight.copy_(torch.where(seen, before + rate, weight))

    def _running_threshold(self) -> Tensor:
        """(d_sae,) what stands in for the selection over a batch."""
        assert self.topk_threshold is not None
        return self.topk_threshold.clamp(min=0).repeat_interleave(self.d_sae // self.topk_threshold.numel())

    # Folding and files.

    @torch.no_grad()
    def fold_decoder_norm(self) -> None:
        """Give what each latent writes unit norm; see `SAE.fold_decoder_norm`."""
        if self.config.activation != "jumprelu" and not self.config.rescale_acts_by_decoder_norm:
            raise ConfigError(
                f"{self.architecture}: with rescale_acts_by_decoder_norm: false latents are ranked by their "
                "pre-activations, and folding decoder norms into those would change which are kept"
            )
        self._take(self._without_norms(self.tensors()))
        self.config = dataclasses.replace(self.config, rescale_acts_by_decoder_norm=False)

    @torch.no_grad()
    def fold_normalization(self) -> None:
        """Absorb the fixed normalisations of inputs and targets; see `SAE.fold_normalization`.

        Where latents are ranked by decoder norms, these are folded too: the targets' scales change them.
        """
        if self.normalization.folds:
            config, tensors = self._folded(self.tensors())
            self._take(tensors)
            self.config = config
            self.forget_statistics()

    @torch.no_grad()
    def export(self) -> Export:
        """Normalisations and ranks folded in; BatchTopK as thresholds."""
        config, tensors = self._folded({name: p.detach() for name, p in self.named_parameters()})
        if config.activation == "topk" and isinstance(config.k, Schedule):
            config = dataclasses.replace(config, k=round(config.k.end))
        if config.activation == "batchtopk":
            config = _thresholded_config(config)
            precision = torch.promote_types(self.dtype, torch.float32)
            thresholds = self._running_threshold().to(precision).split(self.per_layer)
            tensors = tensors | {f"threshold.{layer}": threshold for layer, threshold in enumerate(thresholds)}
        return Export(self.architecture, config, tensors)

    def _folded(self, tensors: Mapping[str, Tensor]) -> tuple[CrossLayerTranscoderConfig, dict[str, Tensor]]:
        """Config and tensors without a fixed normalisation, and with norms folded in where latents are ranked by them."""
        config, folded = self.config, dict(tensors)
        if config.rescale_acts_by_decoder_norm:  # before a scale changes the norms
            folded, config = (
                self._without_norms(folded),
                dataclasses.replace(config, rescale_acts_by_decoder_norm=False),
            )
        if self.normalization.folds:
            folded = self._in_model_units(folded)
            config = dataclasses.replace(config, normalize_activations="none", activation_normalization_factor=1.0)
        return config, folded

    def _without_norms(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        folded, norms = dict(tensors), self.decoder_norms().detach().split(self.per_layer)
        for layer in range(self.layers):
            scales = {f"{name}.{layer}": "with_norm" for name in ("encoder", "b_enc", "threshold")}
            folded = fold_decoder_norm(folded, scales | {f"W_dec.{layer}": "against_norm"}, norms[layer])
        return folded

    def _in_model_units(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights for raw inputs and outputs; block by block, so that no map spans several sites."""
        folded = dict(tensors)
        targets, sizes = self.target_normalization, list(self.writes.values())
        for layer in range(self.layers):
            blocks: list[Tensor] = []
            for site, W_dec in enumerate(tensors[f"W_dec.{layer}"].split(sizes[layer:], dim=-1), start=layer):
                block = fold_normalization(
                    {
                        "encoder": tensors[f"encoder.{layer}"],
                        "b_enc": tensors[f"b_enc.{layer}"],
                        "W_dec": W_dec,
                        "b_dec": tensors[f"b_dec.{site}"],
                    },
                    self.normalization.parts[layer].fixed_map() if site == layer else None,
                    targets.parts[site].fixed_map() if targets is not None and targets.folds else None,
                    centred=False,
                    biases={"b_enc": None},
                )
                blocks.append(block["W_dec"])
                if site == layer:
                    folded |= {f"{name}.{layer}": block[name] for name in ("encoder", "b_enc", "b_dec")}
            folded[f"W_dec.{layer}"] = torch.cat(blocks, dim=-1)
        return folded

    def _take(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in self.tensors().items():
            tensor.copy_(tensors[name])


def _parameters(shapes: Sequence[tuple[int, ...]]) -> nn.ParameterList:
    return nn.ParameterList(nn.Parameter(torch.zeros(shape)) for shape in shapes)


def _rounded_topk(k: float, scale: Tensor | None) -> TopK:
    return TopK(round(k), scale)


def _sparse(codes: Codes) -> SparseCodes:
    assert isinstance(codes, SparseCodes)
    return codes


def _thresholded_config(config: CrossLayerTranscoderConfig) -> CrossLayerTranscoderConfig:
    """The same inputs and outputs with thresholds, and nothing that only training needs."""
    fields = [f.name for f in dataclasses.fields(config) if not f.metadata.get("training")]
    kept: dict[str, Any] = {name: getattr(config, name) for name in fields if name not in _OF_SELECTING}
    kept["activation"] = "jumprelu"
    return CrossLayerTranscoderConfig(**kept)
