"""The conformance kit: our own architectures pass it, and each check fails on an implementation that is wrong its way."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
from sae_core.codes import Codes, DenseCodes, SparseCodes
from sae_core.config import option
from sae_core.errors import ConfigError
from sae_core.folding import fold_normalization
from sae_core.plugins import ArchitectureSpec, Registry, get_registry, reset_registry
from sae_core.plugins.finding import find_own_plugin
from sae_core.plugins.switches import Switches
from sae_core.sae import SAE, Axis, Export, Prepared, SAEConfig, StepContext, StepOutput
from sae_core.testing import CHECKS, Subject, check_architecture, parametrize_with_checks
from torch import Tensor, nn

CONFIGS: dict[str, dict[str, Any]] = {
    "abstopk": {"k": 4},
    "batchtopk": {"k": 4},
    "cross_layer_transcoder": {"reads": {"a": 9, "b": 7}, "writes": {"x": 5, "y": 6}},
    "groupmax": {"k": 4},
    "matryoshka_batchtopk": {"k": 4, "matryoshka_widths": [16, 32, 64]},
    "temporal": {"n_heads": 2, "bottleneck_factor": 4},
    "topk": {"k": 4},
}
LINEAR = (
    "abstopk", "batchtopk", "gated", "groupmax", "jumprelu", "matryoshka_batchtopk", "standard", "topk"
)  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "transcoder": {"d_out": 12},
    "skip_transcoder": {"d_out": 12, "skip": True},
    "crosscoder": {"reads": {"a": 9, "b": 7}},
}
EXCEPTIONS = {
    "temporal": {"check_rows_are_independent": "rows are positions of a sequence and depend on those before them"},
}
OURS = {
    contribution.spec.name: CONFIGS.get(contribution.spec.name, {})
    for contribution in Registry(find_own_plugin, Switches()).contributions("architecture")
}
# What a shape adds to an architecture's config is in the checks that train, save and look at gradients.
OF_SHAPES = (
    "check_shapes", "check_sparse_is_dense", "check_gradients", "check_learns", "check_state_dict", "check_saving_normalised"
)  # fmt: skip


@parametrize_with_checks({name: config for name, config in OURS.items() if name not in EXCEPTIONS})
def test_our_architectures_conform(check: Any) -> None:
    check()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", LINEAR)
def test_architectures_of_the_linear_frame_conform_in_every_shape(name: str, shape: str) -> None:
    subject = Subject(name, OURS[name] | SHAPES[shape])
    for check in CHECKS:
        if check.__name__ in OF_SHAPES:
            check(subject)


@pytest.mark.parametrize("name", sorted(EXCEPTIONS))
def test_architectures_with_exceptions_conform_but_for_those(name: str) -> None:
    results = check_architecture(name, config=OURS[name], expected_failures=EXCEPTIONS[name])
    assert [result for result in results if not result.ok] == []
    assert [result.check for result in results if result.status == "expected_failure"] == list(EXCEPTIONS[name])


def test_a_config_or_an_exception_for_an_architecture_that_is_gone_is_removed_too() -> None:
    assert {*CONFIGS, *EXCEPTIONS} <= OURS.keys()
    assert set(LINEAR) == OURS.keys() - {"cross_layer_transcoder", "matching_pursuit", "temporal"}


# -- a correct implementation, and wrong ones that differ from it in one thing ------------------------------------------


@dataclass(frozen=True, kw_only=True)
class PlainConfig(SAEConfig):
    """Config of `Plain`."""

    penalty: float = option(default=0.01, help="weight of the sparsity penalty")


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
        self.W_enc.copy_(self.W_dec.T)
        self.b_enc.zero_()
        self.b_dec.zero_()

    def latents(self, z: Tensor) -> Tensor:
        centred = z - self.b_dec if self.config.apply_b_dec_to_input else z
        return torch.relu(centred @ self.W_enc + self.b_enc)

    def encode_rows(self, prepared: Prepared) -> Codes:
        return DenseCodes(self.latents(prepared.z), (prepared.z.shape[0],))

    def decode_rows(self, codes: Codes, prepared: Prepared | None) -> Tensor:
        return codes.to_dense() @ self.W_dec + self.b_dec

    def objective(self, prepared: Prepared, target: Tensor, context: StepContext) -> StepOutput:
        codes = self.encode_rows(prepared)
        y = self.to_loss_space(self.decode_rows(codes, prepared), prepared)
        losses = {
            "mse": (y - target).square().sum(-1).mean(),
            "l1": self.config.penalty * (codes.to_dense() * self.W_dec.norm(dim=-1)).sum(-1).mean(),
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


@dataclass(frozen=True, kw_only=True)
class UnexplainedConfig(PlainConfig):
    """Has a field without help."""

    strength: float = 1.0


class Unexplained(Plain):
    """Has a field without help."""

    config_class = UnexplainedConfig


@dataclass(frozen=True, kw_only=True)
class LaxConfig(PlainConfig):
    """Accepts any width."""

    def __post_init__(self) -> None:
        pass


class Lax(Plain):
    """Accepts any width."""

    config_class = LaxConfig


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
        return super().latents(z - z.mean(0) if len(z) else z)


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


class Truncating(Plain):
    """Takes inputs of any width."""

    def prepare(self, x: Tensor) -> Prepared:
        return super().prepare(x[..., : self.d_in].float())


class Float32(Plain):
    """Computes in float32 whatever its parameters are."""

    def decode_rows(self, codes: Codes, prepared: Prepared | None) -> Tensor:
        return codes.to_dense().float() @ self.W_dec.float() + self.b_dec.float()


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
        loss = (out.reconstruction + target).square().sum(-1).mean()
        return replace(out, loss=loss, losses={"mse": loss})


class Noisy(Plain):
    """Adds noise from the global generator in training."""

    def latents(self, z: Tensor) -> Tensor:
        noise = 0.01 * torch.randn(self.d_sae) if self.training else torch.zeros(self.d_sae)
        return super().latents(z) + noise.to(z.dtype)


class HiddenState(Plain):
    """Keeps a threshold where state_dict does not see it."""

    level = 0.0

    def latents(self, z: Tensor) -> Tensor:
        found = super().latents(z)
        if self.training:
            self.level = 0.5 * float(found.detach().mean())
        return found * (found > self.level)


class BadExport(Plain):
    """Forgets a bias when it saves."""

    def export(self) -> Export:
        exported = super().export()
        return replace(exported, tensors={**exported.tensors, "b_enc": torch.zeros(self.d_sae)})


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


WRONG: list[tuple[str, type, str]] = [
    ("check_class", WithoutDoc, "WithoutDoc has no docstring"),
    ("check_class", WithoutName, "is 'somebody_else', registered as 'without_name'"),
    ("check_class", StillAbstract, "does not implement all abstract methods"),
    ("check_class", NoSAE, "not a subclass of sae_core.SAE"),
    ("check_config", Unexplained, "fields without help: strength"),
    ("check_config", Lax, "negative dimension"),
    ("check_seed", GlobalSeed, "used the global random generator"),
    ("check_seed", ForgottenBias, "does not set all of 'b_dec'"),
    ("check_shapes", Squeezing, r"sae\(x\) of \(1, 16\) is \(16,\)"),
    ("check_shapes", EmptyMean, r"encode\(x\) of \(0, 16\) is \(1, 64\)"),
    ("check_sparse_is_dense", SparseIsOther, "differ by up to"),
    ("check_sparse_is_dense", Constant, "two different inputs have the same latents"),
    ("check_rows_are_independent", BatchMean, "in parts and at once: they differ"),
    ("check_repeatable", InPlace, "the input was changed in place"),
    ("check_repeatable", Counting, "'calls' changed in eval mode"),
    ("check_wrong_input", Truncating, "was accepted"),
    ("check_dtypes", Float32, "dtype torch.float32"),
    ("check_gradient_to_input", Detached, "gradient|autograd|does not require grad"),
    ("check_objective", VectorLoss, "it must be a scalar"),
    ("check_objective", HiddenTerm, "the sum of the terms and the loss"),
    ("check_gradients", Unused, "no gradient ever reaches b_lost"),
    ("check_learns", Uphill, "answering with the mean gives"),
    ("check_training_is_deterministic", Noisy, "differs after two equal runs"),
    ("check_state_dict", HiddenState, "after load_state_dict"),
    ("check_save_and_load", BadExport, "after SAE.load"),
    ("check_save_and_load", ChangingExport, "saving changed 'W_dec'"),
    ("check_saving_normalised", Unfolded, "normalize_activations layer_norm: .*after SAE.load"),
    ("check_copies", Shared, "after its copy was changed"),
]


@pytest.fixture(scope="module")
def registered() -> Iterator[None]:
    """Every class of this file, registered by its name in snake case."""
    module = ModuleType("conformance_cases")
    sys.modules["conformance_cases"] = module
    for cls in (Plain, *(cls for _, cls, _ in WRONG)):
        name = "".join(f"_{c.lower()}" if c.isupper() else c for c in cls.__name__).lstrip("_").replace("s_a_e", "sae")
        setattr(module, cls.__name__, cls)
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


@pytest.mark.usefixtures("registered")
def test_a_correct_implementation_passes_every_check() -> None:
    assert [result for result in check_architecture("plain") if not result.ok] == []


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize(("check", "cls", "message"), WRONG, ids=[f"{check}-{cls.__name__}" for check, cls, _ in WRONG])
def test_a_wrong_implementation_fails_its_check(check: str, cls: type, message: str) -> None:
    wanted = next(candidate for candidate in CHECKS if candidate.__name__ == check)
    with pytest.raises((AssertionError, RuntimeError), match=message):
        wanted(Subject(name_of(cls)))


def test_every_check_has_an_implementation_that_fails_it() -> None:
    assert {check for check, _, _ in WRONG} == {check.__name__ for check in CHECKS}


@pytest.mark.usefixtures("registered")
def test_results_tell_failures_expected_failures_and_unexpected_passes_apart() -> None:
    expected = {"check_rows_are_independent": "it looks at the batch", "check_seed": "not true"}
    results = {r.check: r for r in check_architecture("batch_mean", expected_failures=expected)}
    assert results["check_rows_are_independent"].status == "expected_failure"
    assert results["check_rows_are_independent"].reason == "it looks at the batch"
    assert results["check_seed"].status == "unexpected_pass"
    assert not results["check_seed"].ok
    assert results["check_class"].status == "passed"
    plain = {r.check: r for r in check_architecture("batch_mean")}
    assert plain["check_rows_are_independent"].status == "failed"
    assert "differ by up to" in plain["check_rows_are_independent"].reason


def test_an_expected_failure_of_no_check_is_an_error() -> None:
    with pytest.raises(ConfigError, match="no check \\['check_sparse'\\] \\(known: check_class"):
        check_architecture("topk", config={"k": 4}, expected_failures={"check_sparse": "x"})
