"""`Dictionary`: what every SAE, transcoder and crosscoder is, whatever its architecture.

It is an `nn.Module` with a strict config. This base class does what has nothing to do with one architecture: it checks
the input, flattens leading dimensions and attention heads, normalises, and undoes all that on the way out, so that
``sae(x)`` takes and returns the model's own units. An architecture adds five things: parameters, how they start, how
normalised rows become codes, how codes become rows, and the training objective. Most architectures derive from
`sae_core.architectures.linear.LinearSAE`, which has all of these but the third and the last.

What generic code needs to know of an architecture's tensors, the class declares in `AXES`: which of a tensor's dimensions
counts latents, how it moves when decoder rows are rescaled, which precision it keeps, what it is called in files. A tensor
that is not declared is an error as soon as an instance is made.

Device and dtype are never config: they are those of the parameters, and ``sae.to(...)`` means what it means in PyTorch.
"""

# R rows (leading shape flattened), D d_in, F d_sae, O d_out

from __future__ import annotations

import dataclasses
from abc import ABCMeta, abstractmethod
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Generic, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from typing_extensions import TypeVar

from sae_core.codes import Codes, DenseCodes, SparseCodes
from sae_core.config import check_fields, option, require
from sae_core.errors import ConfigError, DataError, ShapeError
from sae_core.latent_ranks import current_ranks, latents_here, latents_over
from sae_core.normalization import Normalization, NormalizationName, Units
from sae_core.protocols import ActivationBatch
from sae_core.sites import Sites

__all__ = [
    "Axis",
    "Dictionary",
    "Export",
    "Prepared",
    "SAEConfig",
    "StepContext",
    "StepOutput",
    "as_device",
    "as_dtype",
    "training_option",
]


_DIRECTIONS_AT_ONCE = 2048
_PRECISIONS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_STATISTICS = ("normalization.", "target_normalization.")
RESERVED_FIELDS = ("architecture", "device", "dtype", "metadata", "sae_lens_version")


def training_option(*, default: Any, help: str) -> Any:
    """A config field that only training reads; saved SAEs keep it in their metadata, not among the inference fields."""
    made = option(default=default, help=help)
    return field(default=default, metadata={**made.metadata, "training": True})


class Axis(NamedTuple):
    """What generic code may know of a parameter or buffer.

    `latent` is the dimension with one entry a latent, or None. `scales` says what becomes of it when the decoder row of
    each latent is divided by its norm n: with_norm, it is multiplied by n; against_norm, it is divided; no, it stays.
    `keep_float32` keeps it in float32 or better when the SAE is cast to half precision. `file` is the name of a matrix that
    files hold transposed; None: files hold it as it is, under its own name.
    """

    latent: int | None
    scales: Literal["with_norm", "against_norm", "no"] = "no"
    keep_float32: bool = False
    file: str | None = None


@dataclass(frozen=True, kw_only=True)
class SAEConfig:
    """Fields that every architecture has."""

    d_in: int = option(help="width of the activations")
    d_sae: int = option(help="width of the dictionary, the number of latents")
    apply_b_dec_to_input: bool = option(default=True, help="subtract b_dec from the (normalised) input before encoding")
    normalize_activations: NormalizationName = option(default="none", help="input normalisation, undone on the output")
    reshape_activations: Literal["none", "hook_z"] = option(
        default="none", help="hook_z: inputs are (..., n_heads, d_head) and heads are concatenated"
    )
    activation_normalization_factor: float = option(
        default=1.0, help="factor of normalize_activations: constant_scalar_rescale", omit_default=True
    )
    decoder_init_norm: float | None = training_option(
        default=0.1, help="norm of the decoder rows at the start; None leaves their random norms"
    )

    def __post_init__(self) -> None:
        check_fields(self)
        require(self.d_in > 0, f"d_in must be positive, not {self.d_in}")
        require(self.d_sae > 0, f"d_sae must be positive, not {self.d_sae}")
        require(
            self.activation_normalization_factor == 1.0 or self.normalize_activations == "constant_scalar_rescale",
            "activation_normalization_factor is read only with normalize_activations: constant_scalar_rescale, "
            f"not with {self.normalize_activations!r}",
        )
        require(
            self.activation_normalization_factor > 0,
            f"activation_normalization_factor must be positive, not {self.activation_normalization_factor}",
        )
        require(
            self.decoder_init_norm is None or self.decoder_init_norm > 0,
            f"decoder_init_norm must be positive or null, not {self.decoder_init_norm}",
        )


ConfigT_co = TypeVar("ConfigT_co", bound=SAEConfig, default=SAEConfig, covariant=True)


@dataclass(frozen=True, slots=True, eq=False)
class StepContext:
    """What an objective may know besides the batch.

    `progress` is the fraction of training done, for schedules; `dead` holds the indices (n_dead,) of latents that have not
    fired for a while, or None; `density` is the recent mean fraction of active latents, or None at the start, from which
    the ops choose their form. Where latents are shared out over ranks, `dead` may be empty, and `dead_elsewhere` counts those
    of the other ranks.
    """

    progress: float = 0.0
    dead: Tensor | None = None
    density: float | None = None
    dead_elsewhere: int = 0

    @property
    def n_dead(self) -> int:
        """Number of dead latents, on all ranks."""
        return self.dead_elsewhere + (0 if self.dead is None else self.dead.numel())


@dataclass(frozen=True, slots=True, eq=False)
class StepOutput:
    """What an objective returns.

    `loss` is the scalar to minimise, `losses` its terms (after their coefficients), `metrics` further scalars on the device.
    `reconstruction` and `target` are (rows, d_out), in the space in which the loss compares them.
    """

    loss: Tensor
    losses: Mapping[str, Tensor]
    codes: Codes
    reconstruction: Tensor
    target: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """A checked batch: `z` (rows, d_in) normalised, `units` the way back, `raw` the same rows in the model's units.

    `leading_shape` is the batch's shape without the feature dimension; `heads` is (n_heads, d_head) when heads were joined.
    In `scratch` an architecture's encoder leaves what its decoder needs of the same rows.
    """

    z: Tensor
    units: Units
    raw: Tensor
    leading_shape: tuple[int, ...]
    heads: tuple[int, int] | None
    scratch: dict[str, Tensor] = field(default_factory=dict[str, Tensor])


@dataclass(frozen=True, slots=True, eq=False)
class Export:
    """The inference form of an SAE: an architecture's name, its config, and tensors by name."""

    architecture: str
    config: SAEConfig
    tensors: Mapping[str, Tensor]


_initialises: ContextVar[bool] = ContextVar("new SAEs initialise themselves", default=True)


@contextmanager
def caller_initialises() -> Generator[None]:
    token = _initialises.set(False)
    try:
        yield
    finally:
        _initialises.reset(token)


class _Complete(ABCMeta):
    """Instances are complete when their constructor returns: every tensor declared, and initialised (from seed 0)."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        sae = cast("Dictionary", super().__call__(*args, **kwargs))
        sae._check_declarations()  # pyright: ignore[reportPrivateUsage]
        if _initialises.get() and sae.device.type != "meta":
            sae.reset_parameters(torch.Generator().manual_seed(0))
        return sae


class Dictionary(nn.Module, Generic[ConfigT_co], metaclass=_Complete):
    """A dictionary: encodes activations into latents, and latents into activations.

    Shapes: `x` (..., d_in), latents (..., d_sae), reconstructions (..., d_out), where d_out is d_in except for transcoders;
    with ``reshape_activations: hook_z`` also (..., n_heads, d_head). Any leading shape gives what its flattened form gives.
    Raises ShapeError for another width, device or a dtype that is not floating point, DataError for inputs with NaN or
    infinite values; floating inputs of another precision are cast to the parameters'.

    A class says of itself: `AXES`, its parameters and buffers by name (a pattern like ``layers.*`` names several);
    `sparsity_coefficient`, the config field that weighs sparsity against reconstruction, for ``target_l0`` to steer;
    `independent_latents`, a latent's value does not depend on the other latents, so that some of them can be loaded alone;
    `reads_sequences`, the dimension before the last is the position in a sequence, and rows cannot be shuffled;
    `starts_from_data`, `start_from` wants to see the first samples;
    `has_encoder_product`, the large product of training goes through the ops (`encode_entries`, `encode_active`);
    `restarts_latents`, it implements the method `restart_latents`;
    `shares_out_latents`, its latents can be shared out over ranks (`sae_core.latent_ranks`): it makes its tensors for `d_sae`
    latents, those of this rank, and whatever looks across all latents goes through the ops and `codes`;
    `example`, the fields that a small instance (16 wide, 64 latents) needs besides, for the checks of `sae_core.testing`.
    """

    architecture: ClassVar[str]
    config_class: ClassVar[type[SAEConfig]]
    AXES: ClassVar[Mapping[str, Axis]]
    sparsity_coefficient: ClassVar[str | None] = None
    independent_latents: ClassVar[bool] = False
    reads_sequences: ClassVar[bool] = False
    starts_from_data: ClassVar[bool] = False
    has_encoder_product: ClassVar[bool] = False
    restarts_latents: ClassVar[bool] = False
    shares_out_latents: ClassVar[bool] = False
    example: ClassVar[Mapping[str, Any]] = {}
    config: ConfigT_co

    def __init__(self, config: ConfigT_co) -> None:
        super().__init__()
        self.config = config
        self.ranks = current_ranks()
        self.latent_range = latents_here(config.d_sae, self.ranks)
        if self.ranks is not None and not self.shares_out_latents:
            raise ConfigError(
                f"{self.architecture}: latents of this architecture cannot be shared out over ranks; keep them on one"
            )
        self.metadata: dict[str, Any] = {}
        self.forget_statistics()

    def forget_statistics(self) -> None:
        """Start the normalisations afresh, as the config has them and without statistics from data."""
        config, like = self.config, next(self.parameters(), torch.empty(0))
        name, factor = config.normalize_activations, config.activation_normalization_factor
        self.normalization = Normalization(name, Sites(self.reads), factor).to(like.device)
        self.target_normalization: Normalization | None = None
        if not self.reconstructs_input:  # what is predicted has no statistics of its own at inference, only learnt ones
            learns = self.normalization.learns
            self.target_normalization = Normalization(name if learns else "none", Sites(self.writes)).to(like.device)

    # What an architecture adds.

    @abstractmethod
    def reset_parameters(self, generator: torch.Generator) -> None:
        """Initialise all parameters."""

    @abstractmethod
    def encode_rows(self, prepared: Prepared) -> Codes:
        """Codes of normalised rows; in train mode what training uses, in eval mode independent of the rest of the batch."""

    @abstractmethod
    def decode_rows(self, codes: Codes, prepared: Prepared | None) -> Tensor:
        """(rows, d_out) in normalised space; `prepared` is None when only latents are known."""

    @abstractmethod
    def objective(self, prepared: Prepared, target: Tensor, context: StepContext) -> StepOutput:
        """The training loss for rows and their target (rows, d_out) in loss space."""

    @abstractmethod
    def export(self) -> Export:
        """The inference form, without anything only training needs: files hold neither statistics of a normalisation nor
        schedules. A fixed normalisation is folded, or kept as a constant factor (`kept_as_factor`).
        """

    @property
    def loss_is_mean_over_rows(self) -> bool:
        """Whether loss, its terms and metrics of a batch are the means of those of its rows, each taken alone."""
        return False

    def after_step(self) -> None:
        """Called by the trainer after each optimiser step, without gradient: restore constraints on parameters."""

    @property
    def reads(self) -> Mapping[str, int]:
        """Sites of the input with their widths, in the order of its columns."""
        return {"": self.config.d_in}

    @property
    def writes(self) -> Mapping[str, int]:
        """Sites of the output with their widths, in the order of its columns."""
        return self.reads

    @property
    def reconstructs_input(self) -> bool:
        """Whether the output is to be the input, or (a transcoder) something else that comes with it in training."""
        return True

    def start_from(self, z_RD: Tensor, target_RO: Tensor) -> None:
        """Called before the first step, where `starts_from_data`, with the normalised inputs (rows, d_in) and what is to be
        reconstructed (rows, d_out) that training begins with; `start_at` comes afterwards.
        """

    def start_at(self, centre_O: Tensor) -> None:
        """Called before the first step with a central point (d_out,) of the normalised targets: start biases there."""

    def restart_latents(self, latents: Tensor, prepared: Prepared, target: Tensor) -> None:
        """Point latents (n,) at rows, one each: `prepared` inputs and their `target` (n, d_out); all else of them starts anew.

        Encoder rows get a fifth of the mean norm of the others', decoder rows the mean norm of the others' (Bricken et al.
        2023). Where latents are shared out over ranks, each restarts its own, and all call this within `latents_over`. Raises
        ConfigError for architectures without `restarts_latents`.
        """
        raise ConfigError(f"{self.architecture}: latents of this architecture cannot be pointed at a row and restarted")

    @torch.no_grad()
    def directions(self, latents: Tensor | None = None) -> Tensor:
        """(n, d_out): the direction in which each of these latents (n,), without them of all, moves the normalised output.

        Its length is for the architecture to say, and no more than a scale: here it is what a unit of the latent adds; the
        linear frame gives the rows of W_dec, also where latents are reported in units of those rows' norms.
        """
        latents = torch.arange(self.d_sae, device=self.device) if latents is None else latents.to(self.device)
        ones = torch.ones(len(latents), 1, dtype=self.dtype, device=self.device)
        return self.decode_rows(SparseCodes.regular(ones, latents.unsqueeze(-1), self.d_sae), None) - self.offset()

    def direction_norms(self) -> Tensor:
        """(d_sae,) norms of the latents' `directions`, of which only some are in memory at a time."""
        everything = torch.arange(self.d_sae, device=self.device)
        return torch.cat([self.directions(latents).norm(dim=-1) for latents in everything.split(_DIRECTIONS_AT_ONCE)])

    @torch.no_grad()
    def offset(self) -> Tensor:
        """(d_out,): the normalised output when no latent is active."""
        none = torch.zeros(1, self.d_sae, dtype=self.dtype, device=self.device)
        return self.decode_rows(DenseCodes(none, (1,)), None)[0]

    # What all of them do.

    @property
    def d_in(self) -> int:
        """Width of the inputs."""
        return self.config.d_in

    @property
    def d_sae(self) -> int:
        """Number of latents that are here: the width of the dictionary, or this rank's part of it."""
        return len(self.latent_range)

    @property
    def d_out(self) -> int:
        """Width of the outputs."""
        return sum(self.writes.values())

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self._weights.device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the parameters, those aside that keep a better one."""
        return self._weights.dtype

    @property
    def _weights(self) -> Tensor:
        for name, parameter in self.named_parameters():
            if not self.axis(name).keep_float32:
                return parameter
        raise ConfigError(f"{self.architecture}: there are no parameters")

    @classmethod
    def axis(cls, name: str) -> Axis:
        """What the class declares of the parameter or buffer `name`; KeyError for one that it does not."""
        if name in cls.AXES:
            return cls.AXES[name]
        return next(axis for pattern, axis in cls.AXES.items() if "*" in pattern and fnmatchcase(name, pattern))

    @classmethod
    def declares(cls, name: str) -> bool:
        """Whether `name` is that of a declared tensor, here or in files."""
        return any(axis.file == name or fnmatchcase(name, pattern) for pattern, axis in cls.AXES.items())

    @classmethod
    def axis_in_files(cls, name: str) -> Axis:
        """What the class declares of the tensor that files call `name`, as it lies there."""
        for axis in cls.AXES.values():
            if axis.file == name:
                return axis._replace(latent=None if axis.latent is None else 1 - axis.latent)
        return cls.axis(name)

    @classmethod
    def latent_dimension(cls, name: str) -> int | None:
        """Which dimension of the entry `name` of a ``state_dict`` counts latents; None where none does."""
        return None if name.startswith(_STATISTICS) else cls.axis(name).latent

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers by name, detached, without the statistics of normalisations."""
        return {name: tensor for name, tensor in self.state_dict().items() if not name.startswith(_STATISTICS)}

    def _check_declarations(self) -> None:
        """Raise ConfigError for what would be saved and could not be loaded again."""
        names = {field.name for field in dataclasses.fields(self.config)}
        if taken := sorted(names & set(RESERVED_FIELDS)):
            raise ConfigError(
                f"{self.architecture}: config field {taken[0]!r} has a meaning of its own in files; rename it"
            )
        buffers = {name for name, _ in self.named_buffers() if not name.startswith(_STATISTICS)}
        if lost := sorted(buffers - set(self.state_dict())):
            raise ConfigError(
                f"{self.architecture}: buffer {lost[0]!r} is not persistent, so it would be lost on saving; register it with "
                "persistent=True, or compute it when it is needed"
            )
        declared: Mapping[str, Axis] | None = getattr(self, "AXES", None)
        if declared is None:
            raise ConfigError(f"{self.architecture}: the class declares no AXES; name its parameters and buffers there")
        for name, tensor in self.tensors().items():
            if not any(fnmatchcase(name, pattern) for pattern in declared):
                raise ConfigError(
                    f"{self.architecture}: tensor {name!r} is not declared in AXES ({', '.join(declared)})"
                )
            latent = self.axis(name).latent
            if latent is not None and (tensor.dim() <= latent or tensor.shape[latent] != self.d_sae):
                raise ConfigError(
                    f"{self.architecture}: AXES says that dimension {latent} of {name!r} counts the d_sae = {self.d_sae} "
                    f"latents, but its shape is {tuple(tensor.shape)}"
                )

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        kept = {name: tensor.data for name, tensor in self._named_tensors() if self.axis(name).keep_float32}
        super()._apply(fn, recurse)
        for name, tensor in self._named_tensors():
            # sae.to(bfloat16) is about the weights: thresholds and running means that round to eight bits stop moving.
            if name in kept and tensor.dtype in (torch.float16, torch.bfloat16):
                running_mean = not isinstance(tensor, nn.Parameter)
                tensor.data = kept[name].to(tensor.device, kept[name].dtype if running_mean else torch.float32)
        return self

    def _named_tensors(self) -> list[tuple[str, Tensor]]:
        both = (*self.named_parameters(), *self.named_buffers())
        return [(name, tensor) for name, tensor in both if not name.startswith(_STATISTICS)]

    def forward(self, x: Tensor) -> Tensor:
        """The reconstruction of `x` (for transcoders: the prediction), in the model's units."""
        with latents_over(self.ranks):
            prepared = self.prepare(x)
            y_RO = self.decode_rows(self.encode_rows(prepared), prepared)
            return self._restore(y_RO, prepared)

    def encode(self, x: Tensor) -> Tensor:
        """Latent activations (..., d_sae)."""
        with latents_over(self.ranks):
            prepared = self.prepare(x)
            return self.encode_rows(prepared).to_dense().view(*prepared.leading_shape, self.d_sae)

    def encode_sparse(self, x: Tensor) -> SparseCodes:
        """Latent activations as sparse codes."""
        with latents_over(self.ranks):
            prepared = self.prepare(x)
            codes = self.encode_rows(prepared)
        return (codes.to_sparse() if isinstance(codes, DenseCodes) else codes).reshape(*prepared.leading_shape)

    def decode(self, latents: Tensor | SparseCodes, x: Tensor | None = None) -> Tensor:
        """Reconstruct from latents, dense (..., d_sae) or sparse.

        `x`, the input that was encoded, is needed where latents alone do not determine the output: with a normalisation
        that differs from row to row, and for architectures with a skip connection. Raises ConfigError when it is missing.
        """
        if isinstance(latents, Tensor):
            self._check(latents, self.d_sae, "latents")
            leading = tuple(latents.shape[:-1])
            values_RF = latents.reshape(-1, self.d_sae).to(self.dtype)
            codes: Codes = DenseCodes(values_RF, (values_RF.shape[0],))
        else:
            if latents.d_sae != self.d_sae:
                raise ShapeError(f"decode: codes of a dictionary of {latents.d_sae} latents, this one has {self.d_sae}")
            leading, codes = latents.leading_shape, latents.reshape(latents.rows)
        prepared = None if x is None else self.prepare(x)
        if prepared is not None and prepared.leading_shape != leading:
            raise ShapeError(
                f"{self.architecture}: latents of leading shape {leading}, but x has {prepared.leading_shape}; pass the input "
                "that was encoded"
            )
        with latents_over(self.ranks):
            y_RO = self.decode_rows(codes, prepared)
        if prepared is not None:
            return self._restore(y_RO, prepared)
        normalization = self.normalization if self.target_normalization is None else self.target_normalization
        return normalization.restore(y_RO).view(*leading, self.d_out)

    def training_step(self, batch: Tensor | ActivationBatch, context: StepContext | None = None) -> StepOutput:
        """The objective on a batch of activations; `.loss` is ready for ``backward()``."""
        inputs, targets = (batch.inputs, batch.targets) if isinstance(batch, ActivationBatch) else (batch, None)
        prepared = self.prepare(inputs)
        if prepared.z.shape[0] == 0:
            raise ShapeError(f"{self.architecture}: a batch of shape {tuple(inputs.shape)} has no row to train on")
        with latents_over(self.ranks):
            return self.objective(prepared, self.target_rows(prepared, targets), context or StepContext())

    def target_rows(self, prepared: Prepared, targets: Tensor | None) -> Tensor:
        """What reconstructions are compared with, (rows, d_out): the target or the input itself, normalised where that is a
        fixed map. Raises ShapeError when a transcoder gets no targets, or when there is not one for every input.
        """
        if targets is not None:
            self._check(targets, self.d_out, "targets")
            if tuple(targets.shape[:-1]) != prepared.leading_shape:  # one row would be taken as the target of all
                raise ShapeError(
                    f"{self.architecture}: targets of leading shape {tuple(targets.shape[:-1])}, but inputs of "
                    f"{prepared.leading_shape}; every input has a target"
                )
            raw = targets.reshape(-1, self.d_out).to(self.dtype)
            if self.target_normalization is not None:
                return self.target_normalization(raw)[0]
            return raw if self.normalization.per_row else self.normalization(raw)[0]
        if self.target_normalization is None:
            return prepared.raw if self.normalization.per_row else prepared.z
        raise ShapeError(
            f"{self.architecture} with d_out trains on pairs; give ActivationBatch(inputs, targets) with targets "
            f"(..., {self.d_out})"
        )

    def fit_normalization(self, batch: Tensor | ActivationBatch) -> None:
        """Learn the statistics of the normalisations, of inputs and of targets, from activations; where they need none, or
        have them already, nothing happens.
        """
        inputs, targets = (batch.inputs, batch.targets) if isinstance(batch, ActivationBatch) else (batch, None)
        if not self.normalization.fitted:
            self.normalization.fit([inputs])
        if self.target_normalization is not None and not self.target_normalization.fitted:
            if targets is None:
                raise ShapeError(f"{self.architecture}: targets (..., {self.d_out}) are needed to normalise them")
            self.target_normalization.fit([targets])

    def to_loss_space(self, y_RO: Tensor, prepared: Prepared) -> Tensor:
        """Normalised reconstructions in the space of the target: model units for the per-row normalisations."""
        return prepared.units.undo(y_RO) if self.normalization.per_row and self.target_normalization is None else y_RO

    def prepare(self, x: Tensor) -> Prepared:
        """Check, cast, flatten and normalise an input."""
        heads = None
        if self.config.reshape_activations == "hook_z" and x.dim() >= 2 and x.shape[-1] != self.d_in:
            heads = (x.shape[-2], x.shape[-1])
            if heads[0] * heads[1] == self.d_in:
                x = x.flatten(-2)
        self._check(x, self.d_in, "input")
        raw = x.reshape(-1, self.d_in).to(self.dtype)
        self._check_finite(raw)
        z, units = self.normalization(raw)
        return Prepared(z, units, raw, tuple(x.shape[:-1]), heads)

    def fold_decoder_norm(self) -> None:
        """In place: decoder rows of unit norm, with everything else scaled to match.

        Reconstructions stay the same. Latents are multiplied by the old norms, except where they are reported in those
        units already. Raises ConfigError for architectures that do not fold, and where folding would change which latents
        fire.
        """
        raise ConfigError(
            f"{self.architecture}: decoder norms cannot be folded into the other tensors of this architecture"
        )

    def fold_normalization(self) -> None:
        """In place: absorb a normalisation that is a fixed map (scaling, whitening) into the weights.

        Reconstructions and latents stay the same; ``normalize_activations`` becomes none. Does nothing where there is none,
        or one that differs from row to row. Raises ConfigError for architectures that do not fold.
        """
        if self.normalization.folds:
            raise ConfigError(
                f"{self.architecture}: {self.config.normalize_activations} cannot be folded into the weights of this "
                "architecture; it stays part of the SAE, saved ones included"
            )

    def kept_as_factor(self) -> ConfigT_co:
        """The config for an export that does not fold: a fixed normalisation as a constant factor of the input.

        Raises ConfigError where that is no single factor, or the SAE is a transcoder whose targets have one too.
        """
        if not self.normalization.folds:
            return self.config
        scale = self.normalization.uniform_scale
        if scale is None or (self.target_normalization is not None and self.target_normalization.folds):
            raise ConfigError(
                f"{self.architecture}: normalize_activations: {self.config.normalize_activations!r} is not one factor and "
                "cannot be kept in a file without folding, which this architecture does not do; use another one"
            )
        changes: dict[str, Any] = {
            "normalize_activations": "constant_scalar_rescale",
            "activation_normalization_factor": scale,
        }
        return dataclasses.replace(self.config, **changes)

    def _restore(self, y_RO: Tensor, prepared: Prepared) -> Tensor:
        if self.target_normalization is not None:
            return self.target_normalization.restore(y_RO).view(*prepared.leading_shape, self.d_out)
        y = prepared.units.undo(y_RO).view(*prepared.leading_shape, self.d_out)
        return y.unflatten(-1, prepared.heads) if prepared.heads is not None else y

    def _check(self, x: Tensor, width: int, what: str) -> None:
        if not isinstance(x, Tensor):
            raise ShapeError(f"{self.architecture}: {what} must be a tensor, not {type(x).__name__}")
        if x.layout != torch.strided:
            raise ShapeError(
                f"{self.architecture}: {what} has layout {x.layout}; pass it dense, as .to_dense() gives it"
            )
        if x.dim() == 0 or x.shape[-1] != width:
            raise ShapeError(
                f"{self.architecture}: {what} of shape {tuple(x.shape)}, but the last dimension must be {width}"
            )
        if not x.is_floating_point():
            raise ShapeError(f"{self.architecture}: {what} has dtype {x.dtype}; floating point is needed")
        if x.device != self.device:
            raise ShapeError(
                f"{self.architecture}: {what} is on {x.device}, the SAE on {self.device}; move one with .to(...)"
            )

    def _check_finite(self, x_RD: Tensor) -> None:
        """A NaN is above no threshold, so most architectures would make an unsuspicious zero of it.

        Asking waits for the device; a training step on a GPU does not, since the trainer has looked at the batch before.
        """
        if x_RD.is_meta or (self.training and x_RD.is_cuda):
            return
        if bool(torch.isfinite(x_RD.sum(dtype=torch.float64))):  # one pass; a single bad value makes the sum bad
            return
        finite_R = torch.isfinite(x_RD).all(-1)
        if not bool(finite_R.all()):
            bad = (~finite_R).nonzero().squeeze(-1)
            raise DataError(
                f"{self.architecture}: {bad.numel()} of {x_RD.shape[0]} input rows hold NaN or infinite values in "
                f"{self.dtype}, the first is row {int(bad[0])}"
            )

    def extra_repr(self) -> str:
        """The config's fields, for ``print(sae)``."""
        from dataclasses import fields

        return ", ".join(f"{f.name}={getattr(self.config, f.name)!r}" for f in fields(self.config))


def as_device(device: torch.device | str) -> torch.device:
    """A device from itself or its name. Raises ConfigError for one that cannot be used here.

    >>> as_device("cpu")
    device(type='cpu')
    """
    try:
        torch.empty(0, device=device)
        return torch.device(device)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"device {str(device)!r} cannot be used here: {reason}") from None


def as_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """A floating point torch dtype from itself or its name, with or without ``torch.``.

    >>> as_dtype("bfloat16")
    torch.bfloat16
    """
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if found not in _PRECISIONS:
        raise ConfigError(f"dtype {dtype!r} is not a floating point type: float32, float64, float16 or bfloat16")
    return found
