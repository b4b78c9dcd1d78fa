"""The conformance kit for architectures: our own pass it, and each check rejects a mutant that all others let pass.

So a check that is taken out is missed: its mutant would then pass the whole kit.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, ClassVar, cast

import pytest
import torch
from sae_core.architectures.linear import LinearConfig, LinearSAE
from sae_core.architectures.parts import squared_error
from sae_core.codes import Codes, DenseCodes, SparseCodes
from sae_core.config import Schedule, option, value_at
from sae_core.errors import ConfigError
from sae_core.folding import fold_normalization
from sae_core.plugins import ArchitectureSpec, get_registry, reset_registry
from sae_core.sae import SAE, Axis, Export, Prepared, SAEConfig, StepContext, StepOutput
from sae_core.testing import NotApplicable, Subject, checks_of, parametrize_with_checks, run_checks
from sae_core.testing.kit import in_a_folder
from torch import Tensor, nn

CHECKS = {check.__name__: check for check in checks_of("architecture")}
OURS = [
    contribution.qualified
    for contribution in get_registry().contributions("architecture")
    if contribution.distribution == "sae-core"
]


@parametrize_with_checks(OURS)
def test_our_architectures_conform(check: Any) -> None:
    check()


# -- correct implementations, and mutants that differ from them in one thing ---------------------------------------------


@dataclass(frozen=True, kw_only=True)
class PlainConfig(SAEConfig):
    """Config of `Plain`."""

    penalty: float | Schedule = option(default=0.01, help="weight of the sparsity penalty")


class Plain(SAE[PlainConfig]):
    """ReLU latents: a correct architecture, short enough to be wrong in one place at a time."""

    architecture = "plain"
    config_class = PlainConfig
    AXES: ClassVar[dict[str, Axis]] = {
        "W_enc": Axis(1, "with_norm"),
        "b_enc": Axis(0, "with_norm"),
        "W_dec": Axis(0, "against_norm"),
        "b_dec": Axis(None),
    }

    def __init__(self, config: PlainConfig) -> None:
        super().__init__(config)
        self.W_enc = nn.Parameter(torch.empty(config.d_in, config.d_sae))
        self.b_enc = nn.Parameter(torch.empty(config.d_sae))
        self.W_dec = nn.Parameter(torch.empty(config.d_sae, config.d_in))
        self.b_dec = nn.Parameter(torch.empty(config.d_in))

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        self.W_dec.copy_(0.2 * torch.randn(self.W_dec.shape, generator=generator, dtype=torch.float64))
        norm = self.config.decoder_init_norm
        if norm is not None:
            self.W_dec.mul_(8 * norm / self.W_dec.norm(dim=-1, keepdim=True))
        self.W_enc.copy_(self.W_dec.T)
        self.b_enc.zero_()
        self.b_dec.zero_()

    @torch.no_grad()
    def start_at(self, centre_O: Tensor) -> None:
        self.b_dec.copy_(centre_O)

    def latents(self, z: Tensor) -> Tensor:
        centred = z - self.b_dec if self.config.apply_b_dec_to_input else z
        return torch.relu(centred @ self.W_enc + self.b_enc)

    def encode_rows(self, prepared: Prepared) -> Codes:
        return DenseCodes(self.latents(prepared.z), (prepared.z.shape[0],))

    def decode_rows(self, codes: Codes, prepared: Prepared | None) -> Tensor:
        return codes.to_dense() @ self.W_dec + self.b_dec

    def coefficient(self, context: StepContext) -> float:
        return value_at(self.config.penalty, context.progress)

    def objective(self, prepared: Prepared, target: Tensor, context: StepContext) -> StepOutput:
        codes = self.encode_rows(prepared)
        y = self.to_loss_space(self.decode_rows(codes, prepared), prepared)
        losses = {
            "mse": (y - target).square().sum(-1).mean(),
            "l1": self.coefficient(context) * (codes.to_dense() * self.W_dec.norm(dim=-1)).sum(-1).mean(),
        }
        return StepOutput(losses["mse"] + losses["l1"], losses, codes, y, target)

    def export(self) -> Export:
        tensors = {name: parameter.detach() for name, parameter in self.named_parameters()}
        config = self.config
        if self.normalization.folds:
            fixed = self.normalization.fixed_map()
            tensors["encoder"] = tensors.pop("W_enc").t()
            tensors = fold_normalization(
                tensors, fixed, fixed, centred=config.apply_b_dec_to_input, biases={"b_enc": None}
            )
            tensors["W_enc"] = tensors.pop("encoder").t()
            config = replace(config, normalize_activations="none", activation_normalization_factor=1.0)
        return Export(self.architecture, config, tensors)


class Framed(LinearSAE[LinearConfig]):
    """ReLU latents on the linear frame, which has more to promise."""

    architecture: ClassVar[str] = "framed"
    config_class: ClassVar[type[SAEConfig]] = LinearConfig
    folds: ClassVar[bool] = True
    independent_latents: ClassVar[bool] = True

    def encode_rows(self, prepared: Prepared, context: StepContext | None = None) -> Codes:
        return self.pre(prepared, context, floor=0.0).map(torch.relu)

    def objective(self, prepared: Prepared, target: Tensor, context: StepContext) -> StepOutput:
        codes = self.encode_rows(prepared, context)
        y = self.to_loss_space(self.decode_rows(codes, prepared), prepared)
        loss = squared_error(y, target)
        return StepOutput(loss, {"mse": loss}, codes, y, target)

    @property
    def loss_is_mean_over_rows(self) -> bool:
        return True


class WithoutDoc(Plain):
    architecture = "without_doc"


class WithoutName(Plain):
    """Says it is another architecture."""

    architecture = "somebody_else"


class StillAbstract(SAE[PlainConfig]):
    """Implements nothing."""

    architecture = "still_abstract"
    config_class = PlainConfig


class NoSAE:
    """Is no SAE at all."""


class GlobalSeed(Plain):
    """Draws its parameters from the global generator."""

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        super().reset_parameters(generator)
        self.b_enc.copy_(0.01 * torch.randn(self.b_enc.shape))


class ForgottenBias(Plain):
    """Leaves one parameter as it was."""

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        kept = self.b_dec.clone() if bool((self.b_dec == 7.25).all()) else torch.zeros_like(self.b_dec)
        super().reset_parameters(generator)
        self.b_dec.copy_(kept)


class Squeezing(Plain):
    """Drops a leading dimension of one."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).squeeze(0)


class EmptyMean(Plain):
    """Gives NaN for no rows, and so does not keep zero rows."""

    def encode(self, x: Tensor) -> Tensor:
        found = super().encode(x)
        return found if found.numel() else torch.full((1, self.d_sae), torch.nan)


class Interacting(Plain):
    """What a latent writes depends on the others."""

    def decode_rows(self, codes: Codes, prepared: Prepared | None) -> Tensor:
        dense = codes.to_dense()
        return dense @ self.W_dec * (1 + 0.1 * torch.sin(dense.sum(-1, keepdim=True))) + self.b_dec


class SparseIsOther(Plain):
    """Its sparse latents are not its dense ones."""

    def encode_sparse(self, x: Tensor) -> SparseCodes:
        return SparseCodes.from_dense(super().encode(x) * 1.01)


class Constant(Plain):
    """Latents do not depend on the input."""

    def latents(self, z: Tensor) -> Tensor:
        return super().latents(torch.ones_like(z) + 0 * z)


class BatchMean(Plain):
    """Compares each row with the batch."""

    def latents(self, z: Tensor) -> Tensor:
        found = super().latents(z)
        return found * (1 + found.detach().mean()) if len(z) else found


class InPlace(Plain):
    """Changes its input."""

    def latents(self, z: Tensor) -> Tensor:
        z.data.sub_(0.001)
        return super().latents(z)


class Counting(Plain):
    """Changes its own state in eval mode."""

    AXES = Plain.AXES | {"calls": Axis(None)}

    def __init__(self, config: PlainConfig) -> None:
        super().__init__(config)
        self.register_buffer("calls", torch.zeros(()))

    def latents(self, z: Tensor) -> Tensor:
        self.calls += 1
        return super().latents(z)

    def export(self) -> Export:
        exported = super().export()
        return replace(exported, tensors={**exported.tensors, "calls": self.calls.clone()})


class Truncating(Plain):
    """Takes inputs of any width."""

    def prepare(self, x: Tensor) -> Prepared:
        return super().prepare(x[..., : self.d_in].float())


class Detached(Plain):
    """Cuts the gradient to the input."""

    def latents(self, z: Tensor) -> Tensor:
        return super().latents(z.detach())


class VectorLoss(Plain):
    """Returns a loss for each row."""

    def objective(self, prepared: Prepared, target: Tensor, context: StepContext) -> StepOutput:
        out = super().objective(prepared, target, context)
        rows = (out.reconstruction - target).square().sum(-1)
        return replace(out, loss=rows, losses={"mse": rows})


class HiddenTerm(Plain):
    """Optimises something that the log does not show."""

    def objective(self, prepared: Prepared, target: Tensor, context: StepContext) -> StepOutput:
        out = super().objective(prepared, target, context)
        return replace(out, loss=out.loss + self.b_enc.square().sum() + 1)


class Unused(Plain):
    """Has a parameter that nothing uses."""

    AXES = Plain.AXES | {"b_lost": Axis(0)}

    def __init__(self, config: PlainConfig) -> None:
        super().__init__(config)
        self.b_lost = nn.Parameter(torch.zeros(config.d_sae))

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        super().reset_parameters(generator)
        self.b_lost.zero_()


class Uphill(Plain):
    """Trains away from the target."""

    def objective(self, prepared: Prepared, target: Tensor, context: StepContext) -> StepOutput:
        out = super().objective(prepared, target, context)
        losses = {**out.losses, "mse": (out.reconstruction + target).square().sum(-1).mean()}
        return replace(out, loss=losses["mse"] + losses["l1"], losses=losses)


class HiddenState(Plain):
    """Keeps a threshold where state_dict does not see it."""

    level = 0.0

    def latents(self, z: Tensor) -> Tensor:
        found = super().latents(z)
        if self.training:
            self.level = 0.5 * float(found.detach().mean())
        return found * (found > self.level)


class ChangingExport(Plain):
    """Normalises its own decoder when it saves."""

    @torch.no_grad()
    def export(self) -> Export:
        self.W_dec.div_(self.W_dec.norm(dim=-1, keepdim=True))
        return super().export()


class Unfolded(Plain):
    """Saves the weights without the normalisation they belong to."""

    def export(self) -> Export:
        tensors = {name: parameter.detach() for name, parameter in self.named_parameters()}
        return Export(self.architecture, replace(self.config, normalize_activations="none"), tensors)


class Shared(Plain):
    """A copy of it is itself."""

    def __deepcopy__(self, memo: dict[int, Any]) -> SAE:
        return self


@dataclass(frozen=True, kw_only=True)
class UnexplainedConfig(PlainConfig):
    """Has a field without help."""

    strength: float = 1.0


class Unexplained(Plain):
    """Has a field without help."""

    config_class = UnexplainedConfig

    def coefficient(self, context: StepContext) -> float:
        return super().coefficient(context) * cast("UnexplainedConfig", self.config).strength


class IgnoresSchedule(Plain):
    """Takes a schedule and stays at its start."""

    def coefficient(self, context: StepContext) -> float:
        return value_at(self.config.penalty, 0.0)


class IgnoresCentring(Plain):
    """Never subtracts b_dec."""

    def latents(self, z: Tensor) -> Tensor:
        return torch.relu(z @ self.W_enc + self.b_enc)


class IgnoresNorm(Plain):
    """Starts with the norms it likes."""

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        super().reset_parameters(generator)
        self.W_dec.copy_(0.2 * torch.randn(self.W_dec.shape, generator=generator))
        self.W_enc.copy_(self.W_dec.T)


class Twice(Plain):
    """Names latents twice in a row, which costs memory and counts, and shows in no sum."""

    def encode_sparse(self, x: Tensor) -> SparseCodes:
        codes = super().encode_sparse(x)
        twice = torch.stack([torch.zeros_like(codes.values), codes.values], dim=1).flatten()
        return SparseCodes(
            twice, codes.indices.repeat_interleave(2), codes.leading_shape, codes.d_sae, 2 * codes.row_offsets()
        )


class Float32(Plain):
    """Answers in float32 whatever its parameters are."""

    def decode_rows(self, codes: Codes, prepared: Prepared | None) -> Tensor:
        if self.training:
            return super().decode_rows(codes, prepared)
        return codes.to_dense().float() @ self.W_dec.float() + self.b_dec.float()


class SeedKept(Plain):
    """Draws weights of its penalty and keeps them where state_dict does not see them."""

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        super().reset_parameters(generator)
        self.weights = torch.rand(self.d_sae, generator=generator)

    def objective(self, prepared: Prepared, target: Tensor, context: StepContext) -> StepOutput:
        out = super().objective(prepared, target, context)
        more = 0.01 * (out.codes.to_dense() * self.weights.to(self.dtype)).sum(-1).mean()
        return replace(out, loss=out.loss + more, losses={**out.losses, "more": more})


class LambdaInside(Plain):
    """Keeps a function without a name."""

    def __init__(self, config: PlainConfig) -> None:
        super().__init__(config)
        self.activation = lambda h: torch.relu(h)

    def latents(self, z: Tensor) -> Tensor:
        return self.activation(super().latents(z))


class ForgottenLossSpace(Plain):
    """Compares normalised reconstructions with targets in other units."""

    def to_loss_space(self, y_RO: Tensor, prepared: Prepared) -> Tensor:
        return y_RO


class OtherCodes(Plain):
    """Reports other codes than it uses."""

    def objective(self, prepared: Prepared, target: Tensor, context: StepContext) -> StepOutput:
        out = super().objective(prepared, target, context)
        dense = out.codes.to_dense()
        largest = dense >= dense.topk(5, dim=-1).values[:, -1:]
        return replace(out, codes=DenseCodes(dense * largest, (len(dense),)))


class NoisyByGlobalSeed(Plain):
    """Draws from a seed that is the process's."""

    def objective(self, prepared: Prepared, target: Tensor, context: StepContext) -> StepOutput:
        out = super().objective(prepared, target, context)
        drawn = torch.rand((), generator=torch.Generator().manual_seed(torch.initial_seed() % 2**31)).to(self.dtype)
        return replace(out, loss=out.loss * (1 + drawn), losses={n: v * (1 + drawn) for n, v in out.losses.items()})


class Noisy(Plain):
    """Adds noise from the global generator in training."""

    def latents(self, z: Tensor) -> Tensor:
        noise = 0.01 * torch.randn(self.d_sae) if self.training else torch.zeros(self.d_sae)
        return super().latents(z) + noise.to(z.dtype)


class NoMean(Plain):
    """Says that its loss is a mean over rows, and scales the penalty by the batch."""

    @property
    def loss_is_mean_over_rows(self) -> bool:
        return True

    def objective(self, prepared: Prepared, target: Tensor, context: StepContext) -> StepOutput:
        out = super().objective(prepared, target, context)
        losses = {**out.losses, "l1": out.losses["l1"] * (1 + out.codes.to_dense().detach().std())}
        return replace(out, loss=losses["mse"] + losses["l1"], losses=losses)


class OnlySingle(Plain):
    """Uses a constant of single precision in training."""

    def objective(self, prepared: Prepared, target: Tensor, context: StepContext) -> StepOutput:
        out = super().objective(prepared, target, context)
        losses = {**out.losses, "l1": out.losses["l1"] + 0 * (target @ torch.eye(self.d_in)).sum()}
        return replace(out, loss=losses["mse"] + losses["l1"], losses=losses)


class DividesByNorm(Plain):
    """Gives decoder rows unit norm without a floor: a row of zeros becomes NaN."""

    def after_step(self) -> None:
        self.W_dec.div_(self.W_dec.norm(dim=-1, keepdim=True))


class Decaying(Plain):
    """Shrinks at every call."""

    def after_step(self) -> None:
        self.W_dec.mul_(0.999)


class Replacing(Plain):
    """Gives the optimiser's parameter away."""

    def after_step(self) -> None:
        self.W_dec = nn.Parameter(self.W_dec.detach().clamp(-5, 5))


class ChangingNames(Plain):
    """Measures one thing early and another one late."""

    def objective(self, prepared: Prepared, target: Tensor, context: StepContext) -> StepOutput:
        out = super().objective(prepared, target, context)
        return replace(out, metrics={"early" if context.progress < 0.5 else "late": out.loss.detach()})


class VectorMetric(Plain):
    """Measures one thing a latent."""

    def objective(self, prepared: Prepared, target: Tensor, context: StepContext) -> StepOutput:
        out = super().objective(prepared, target, context)
        return replace(out, metrics={"sizes": out.codes.to_dense().detach().mean(0)})


class RemembersItsStart(Plain):
    """Weighs the penalty by the progress at which this process began."""

    began: float | None = None

    def coefficient(self, context: StepContext) -> float:
        if self.began is None:
            self.began = context.progress
        return super().coefficient(context) * (1 + self.began)


class BadExport(Plain):
    """Forgets a bias when it saves, except with a normalisation."""

    def export(self) -> Export:
        exported = super().export()
        if self.config.normalize_activations != "none":
            return exported
        return replace(exported, tensors={**exported.tensors, "b_enc": torch.zeros(self.d_sae)})


class ShiftLost(Plain):
    """Folds a normalisation's scale and forgets its shift."""

    def export(self) -> Export:
        exported = super().export()
        if self.config.normalize_activations != "covariance_whitening":
            return exported
        return replace(exported, tensors={**exported.tensors, "b_dec": self.b_dec.detach()})


class Competing(Plain):
    """Keeps the largest of its latents and says that they are independent."""

    independent_latents: ClassVar[bool] = True

    def latents(self, z: Tensor) -> Tensor:
        found = super().latents(z)
        return found * (found >= found.topk(3, dim=-1).values[..., -1:])


class Misfolded(Framed):
    """Has a threshold in units of latents, and does not say so."""

    AXES: ClassVar[dict[str, Axis]] = {**LinearSAE.AXES, "amount": Axis(0)}

    def __init__(self, config: LinearConfig) -> None:
        super().__init__(config)
        self.amount = nn.Parameter(torch.zeros(config.d_sae))

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        super().reset_parameters(generator)
        self.amount.fill_(0.05)

    def encode_rows(self, prepared: Prepared, context: StepContext | None = None) -> Codes:
        codes = self.pre(prepared, context, floor=0.0)
        return codes.with_values((codes.values - codes.per_latent(self.amount)).relu())


class RestartsAll(Framed):
    """Starts the biases of all latents anew when some are restarted."""

    def restart_latents(self, latents: Tensor, prepared: Prepared, target: Tensor) -> None:
        super().restart_latents(latents, prepared, target)
        self.b_enc.zero_()


class PredictsItsInput(Framed):
    """A transcoder that learns something else than its targets."""

    def objective(self, prepared: Prepared, target: Tensor, context: StepContext) -> StepOutput:
        if self.config.d_out is None or self.config.skip:
            return super().objective(prepared, target, context)
        return super().objective(prepared, prepared.z[:, : self.config.d_out], context)


class SkipLost(Framed):
    """Saves no skip path."""

    def in_inference_form(self, config: Any) -> tuple[Any, dict[str, Tensor]]:
        config, found = super().in_inference_form(config)
        return config, found if "W_skip" not in found else {**found, "W_skip": torch.zeros_like(found["W_skip"])}


class OneSiteOnly(Framed):
    """Of several sites it reads the first."""

    def encode_rows(self, prepared: Prepared, context: StepContext | None = None) -> Codes:
        if len(self.reads) > 1:
            width = next(iter(self.reads.values()))
            prepared = replace(prepared, z=torch.cat([prepared.z[:, :width], 0 * prepared.z[:, width:].detach()], -1))
        return super().encode_rows(prepared, context)


MUTANTS: dict[str, tuple[type, str]] = {
    "check_class": (WithoutDoc, "WithoutDoc has no docstring"),
    "check_config": (Unexplained, "fields without help: strength"),
    "check_config_is_used": (IgnoresSchedule, "penalty: {'from': 0.01.* is accepted and changes nothing"),
    "check_seed": (ForgottenBias, "does not set all of 'b_dec'"),
    "check_shapes": (Squeezing, r"sae\(x\) of \(1, 16\) is \(16,\)"),
    "check_sparse_is_dense": (SparseIsOther, "differ by up to"),
    "check_latents_add_up": (Interacting, "added up, and what all decode to: they differ"),
    "check_latents_are_distinct": (Twice, r"encode_sparse\(x\) name a latent twice"),
    "check_rows_are_independent": (BatchMean, "in parts and at once: they differ"),
    "check_repeatable": (Counting, "'calls' changed in eval mode"),
    "check_wrong_input": (Truncating, "was accepted"),
    "check_dtypes": (Float32, "dtype torch.float32"),
    "check_gradient_to_input": (Detached, "gradient|autograd|does not require grad"),
    "check_state_dict": (SeedKept, "the loss after load_state_dict"),
    "check_copies": (Shared, "after its copy was changed"),
    "check_pickling": (LambdaInside, "lambda"),
    "check_objective": (HiddenTerm, "the sum of the terms and the loss"),
    "check_objective_is_the_forward_pass": (ForgottenLossSpace, "layer_norm: the reconstruction and what its codes"),
    "check_gradients": (Unused, "no gradient ever reaches b_lost"),
    "check_learns": (Uphill, "answering with the mean gives"),
    "check_training_is_deterministic": (NoisyByGlobalSeed, "differs after two equal runs"),
    "check_mean_over_rows": (NoMean, "of a batch and of its blocks"),
    "check_training_precisions": (OnlySingle, "dtype"),
    "check_after_step": (DividesByNorm, "'W_dec' after after_step with a latent of zeros holds NaN"),
    "check_restart": (RestartsAll, "restart_latents changes 'b_enc' of latents that are not restarted"),
    "check_trainer": (ChangingNames, r"records have different names: \['metrics/late'\]"),
    "check_resume": (RemembersItsStart, "of a run that was resumed differs"),
    "check_save_and_load": (BadExport, "after SAE.load"),
    "check_saving_normalised": (ShiftLost, "normalize_activations covariance_whitening: .*after SAE.load"),
    "check_some_latents": (Competing, "loaded alone and among all"),
    "check_folding": (Misfolded, "after fold_decoder_norm"),
    "check_transcoder": (PredictsItsInput, "with d_out=12: "),
    "check_skip": (SkipLost, r"with d_out=12, skip=True: .*after SAE.load"),
    "check_sites": (OneSiteOnly, "with reads=|no latent reads the site 'b'"),
}
"""For each check what it alone rejects."""

ALSO_WRONG: list[tuple[str, type, str]] = [
    ("check_class", WithoutName, "is 'somebody_else', registered as 'without_name'"),
    ("check_class", StillAbstract, "does not implement all abstract methods"),
    ("check_class", NoSAE, "not a subclass of sae_core.SAE"),
    ("check_config_is_used", IgnoresCentring, "apply_b_dec_to_input: False instead of True is accepted"),
    ("check_config_is_used", IgnoresNorm, "decoder_init_norm: .* is accepted and changes nothing"),
    ("check_seed", GlobalSeed, "used the global random generator"),
    ("check_shapes", EmptyMean, r"encode\(x\) of \(0, 16\) is \(1, 64\)"),
    ("check_sparse_is_dense", Constant, "two different inputs have the same latents"),
    ("check_repeatable", InPlace, "the input was changed in place"),
    ("check_state_dict", HiddenState, "after load_state_dict"),
    ("check_objective", VectorLoss, "it must be a scalar"),
    ("check_objective_is_the_forward_pass", OtherCodes, "the codes of the objective and encode_rows in train mode"),
    ("check_training_is_deterministic", Noisy, "differs after two equal runs"),
    ("check_after_step", Decaying, "after a second after_step and after the first"),
    ("check_after_step", Replacing, "after_step replaces 'W_dec'"),
    ("check_trainer", VectorMetric, "reports metrics/sizes as a tensor of shape"),
    ("check_save_and_load", ChangingExport, "saving changed 'W_dec'"),
    ("check_saving_normalised", Unfolded, "normalize_activations layer_norm: .*after SAE.load"),
]


@pytest.fixture(scope="module")
def registered() -> Iterator[None]:
    """Every class of this file, registered by its name in snake case."""
    module = ModuleType("conformance_cases")
    sys.modules["conformance_cases"] = module
    for cls in (Plain, Framed, *(cls for cls, _ in MUTANTS.values()), *(cls for _, cls, _ in ALSO_WRONG)):
        name = "".join(f"_{c.lower()}" if c.isupper() else c for c in cls.__name__).lstrip("_").replace("s_a_e", "sae")
        setattr(module, cls.__name__, cls)
        cls.__module__ = "conformance_cases"  # where pickle looks for it
        if cls not in (WithoutName, NoSAE):
            cls.architecture = name
        spec = ArchitectureSpec(name=name, target=f"conformance_cases:{cls.__name__}", summary="A test case")
        get_registry().register(spec, "cases")
    yield
    reset_registry()
    del sys.modules["conformance_cases"]


def name_of(cls: type) -> str:
    claims = get_registry().contributions("architecture")
    return next(c.spec.name for c in claims if c.spec.target == f"conformance_cases:{cls.__name__}")


def rejected(check: str, cls: type) -> Exception | None:
    """What a check says against a class, or None."""
    try:
        in_a_folder(CHECKS[check], Subject("architecture", name_of(cls)))
    except NotApplicable:
        return None
    except Exception as error:  # noqa: BLE001 - whatever a mutant raises
        return error
    return None


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("cls", [Plain, Framed])
def test_a_correct_implementation_passes_every_check_and_what_it_does_not_promise_is_skipped(cls: type) -> None:
    results = run_checks("architecture", name_of(cls))
    assert [result for result in results if not result.ok] == []
    skipped = {result.check: result.reason for result in results if result.status == "skipped"}
    assert skipped == ({} if cls is Framed else {
        "check_restart": "restarts_latents is False",
        "check_mean_over_rows": "loss_is_mean_over_rows is False",
        "check_some_latents": "latents of plain are not independent",
        "check_transcoder": "d_out=12 is refused",
        "check_skip": "d_out=12, skip=True is refused",
        "check_sites": "reads={'a': 9, 'b': 7} is refused",
    })  # fmt: skip


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("check", MUTANTS)
def test_a_mutant_is_rejected_by_its_check_and_by_no_other(check: str) -> None:
    cls, message = MUTANTS[check]
    error = rejected(check, cls)
    assert error is not None, "the mutant passes"
    assert re.search(message, str(error)), str(error)
    assert {other: str(error) for other in CHECKS if other != check and (error := rejected(other, cls))} == {}


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize(("check", "cls", "message"), ALSO_WRONG, ids=[cls.__name__ for _, cls, _ in ALSO_WRONG])
def test_other_wrong_implementations_are_rejected(check: str, cls: type, message: str) -> None:
    error = rejected(check, cls)
    assert error is not None, "the mutant passes"
    assert re.search(message, str(error)), str(error)


def test_every_check_has_a_mutant() -> None:
    assert MUTANTS.keys() == CHECKS.keys()


@pytest.mark.usefixtures("registered")
def test_results_tell_failures_expected_failures_and_unexpected_passes_apart() -> None:
    expected = {"check_rows_are_independent": "it looks at the batch", "check_seed": "not true"}
    results = {r.check: r for r in run_checks("architecture", "batch_mean", expected_failures=expected)}
    assert results["check_rows_are_independent"].status == "expected_failure"
    assert results["check_rows_are_independent"].reason == "it looks at the batch"
    assert results["check_seed"].status == "unexpected_pass"
    assert not results["check_seed"].ok
    assert results["check_class"].status == "passed"
    assert "differ by up to" in str(rejected("check_rows_are_independent", BatchMean))


def test_an_expected_failure_of_no_check_is_an_error() -> None:
    with pytest.raises(ConfigError, match="no check \\['check_sparse'\\] \\(known: check_class"):
        run_checks("architecture", "topk", expected_failures={"check_sparse": "x"})


def test_where_the_first_check_fails_the_others_have_nothing_to_look_at() -> None:
    first, *others = run_checks("architecture", "topk", config={"k": 4000})
    assert first.status == "failed"
    assert "no instance can be made to look at: architecture 'sae-core:topk': k " in first.reason
    assert {(other.status, other.reason) for other in others} == {("skipped", "check_class failed")}
