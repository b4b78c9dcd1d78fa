"""What every architecture promises, as checks that anyone can run on theirs.

`check_architecture` runs them all and returns what happened; `parametrize_with_checks` makes a pytest test of each. The
architecture is reached by its registered name, so what is checked is what users get, entry point and all. A check that
must fail for a good reason is named by the caller together with the reason; if it then passes, that is reported too.

Each check is small and its docstring says what usually is the matter when it fails. New versions of sae-core may bring new
checks: pin sae-core in your tests if that is unwelcome.
"""

from __future__ import annotations

import copy
import inspect
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, final

import torch
from torch import Tensor

from sae_core.codes import SparseCodes
from sae_core.config import describe_fields, structure, unstructure
from sae_core.errors import ConfigError, ShapeError
from sae_core.plugins import get_registry
from sae_core.protocols import ActivationBatch
from sae_core.sae import SAE, StepContext, StepOutput, create

if TYPE_CHECKING:
    import pytest

__all__ = ["CHECKS", "CheckResult", "Subject", "check_architecture", "parametrize_with_checks"]

ROWS = 256


@dataclass(frozen=True, slots=True)
class CheckResult:
    """What became of one check; `reason` is empty when it simply passed."""

    check: str
    status: Literal["passed", "failed", "expected_failure", "unexpected_pass"]
    reason: str = ""

    @property
    def ok(self) -> bool:
        """Whether the architecture did what is expected of it."""
        return self.status in ("passed", "expected_failure")


@final
@dataclass(frozen=True)
class Subject:
    """The architecture under test: its name, and the config that small instances of it are made with."""

    name: str
    config: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def new(self, *, seed: int = 0, **changes: Any) -> SAE:
        """A fresh SAE."""
        config: dict[str, Any] = {"d_in": 16, "d_sae": 64, **self.config, **changes}
        return create(self.name, seed=seed, **config)

    def trained(self, **changes: Any) -> SAE:
        """An SAE after a few steps of training, in eval mode: thresholds have moved, latents differ."""
        sae = self.new(**changes)
        train(sae, steps=12)
        return sae.eval()


def check_architecture(
    name: str, *, config: Mapping[str, Any] | None = None, expected_failures: Mapping[str, str] | None = None
) -> list[CheckResult]:
    """Run every check on a registered architecture.

    `config` holds fields that small instances need (with ``d_in=16, d_sae=64`` unless it says otherwise),
    `expected_failures` the checks that do not apply and why. Raises ConfigError if it names a check that does not exist.

    >>> results = check_architecture("topk", config={"k": 4})
    >>> [result for result in results if not result.ok]
    []
    """
    expected = _expected(expected_failures)
    return [_run(check, Subject(name, config or {}), expected.get(check.__name__, "")) for check in CHECKS]


def parametrize_with_checks(
    architectures: Mapping[str, Mapping[str, Any]] | Iterable[str],
    *,
    expected_failures: Mapping[str, str] | None = None,
) -> pytest.MarkDecorator:
    """A pytest decorator: the test is called once a check and architecture, with a callable `check`.

    `architectures` are names, or names with the config that small instances need. Expected failures are marked
    ``xfail(strict=True)`` with their reason. ::

        @parametrize_with_checks({"cubic": {"power": 3}})
        def test_conformance(check):
            check()
    """
    import pytest

    expected = _expected(expected_failures)
    configs = architectures if isinstance(architectures, Mapping) else {name: {} for name in architectures}
    return pytest.mark.parametrize(
        "check",
        [
            pytest.param(
                partial(check, Subject(name, config)),
                id=f"{name}-{check.__name__}",
                marks=[pytest.mark.xfail(reason=expected[check.__name__], strict=True, raises=AssertionError)]
                if check.__name__ in expected
                else [],
            )
            for name, config in configs.items()
            for check in CHECKS
        ],
    )


def _expected(failures: Mapping[str, str] | None) -> Mapping[str, str]:
    unknown = sorted(set(failures or {}) - {check.__name__ for check in CHECKS})
    if unknown:
        raise ConfigError(f"expected_failures: no check {unknown} (known: {', '.join(c.__name__ for c in CHECKS)})")
    return failures or {}


def _run(check: Callable[[Subject], None], subject: Subject, expected: str) -> CheckResult:
    try:
        check(subject)
    except Exception as error:  # noqa: BLE001 - whatever an architecture raises is a result to report
        reason = str(error) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"
        if expected:
            return CheckResult(check.__name__, "expected_failure", expected)
        return CheckResult(check.__name__, "failed", reason)
    if expected:
        return CheckResult(check.__name__, "unexpected_pass", f"expected to fail: {expected}")
    return CheckResult(check.__name__, "passed")


# -- data and training ------------------------------------------------------------------------------------------------


def batch_for(sae: SAE, rows: int = ROWS, seed: int = 0) -> Tensor:
    """(rows, d_in) sparse mixtures of random directions, in units of some model: neither centred nor of unit scale."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(2 * sae.d_in, sae.d_in, generator=generator), dim=-1)
    active = torch.rand(rows, 2 * sae.d_in, generator=generator) < 0.1
    amounts = 3 * (1 + torch.rand(rows, 2 * sae.d_in, generator=generator)) * active
    noise = 0.02 * torch.randn(rows, sae.d_in, generator=generator)
    return (amounts @ directions + 0.5 + noise).to(sae.dtype)


def pairs_for(sae: SAE, rows: int = ROWS, seed: int = 0) -> Tensor | ActivationBatch:
    """A training batch: activations, or for a transcoder activations and a nonlinear function of them."""
    x = batch_for(sae, rows, seed)
    if sae.reconstructs_input:
        return x
    mixing = torch.randn(sae.d_in, sae.d_out, generator=torch.Generator().manual_seed(1)) / sae.d_in**0.5
    return ActivationBatch(x, torch.relu(x) @ mixing.to(x.dtype))


def train(sae: SAE, steps: int, lr: float = 3e-3) -> None:
    """Train on one batch with Adam (1412.6980), written out: torch's own imports a compiler, which takes seconds."""
    sae.train()
    batch = pairs_for(sae)
    moments = [(p, torch.zeros_like(p), torch.zeros_like(p)) for p in sae.parameters() if p.requires_grad]
    for step in range(steps):
        sae.zero_grad()
        sae.training_step(batch, StepContext(progress=step / steps)).loss.backward()
        with torch.no_grad():
            for parameter, first, second in moments:
                if parameter.grad is not None:
                    first.lerp_(parameter.grad, 0.1)
                    second.lerp_(parameter.grad.square(), 0.001)
                    debiased = (second / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
                    parameter.sub_(lr / (1 - 0.9 ** (step + 1)) * first / debiased)
            sae.after_step()


def same(a: Tensor, b: Tensor, what: str, tolerance: float = 1e-5) -> None:
    """Fail unless two tensors have one shape and agree to `tolerance` of their scale."""
    assert a.shape == b.shape, f"{what}: shapes {tuple(a.shape)} and {tuple(b.shape)}"
    if a.numel():
        scale = max(1.0, float(b.detach().abs().max()))
        difference = float((a.detach().double() - b.detach().double()).abs().max())
        assert difference <= tolerance * scale, f"{what}: they differ by up to {difference:.2g}"


def is_finite(tensor: Tensor, what: str) -> None:
    """Fail if a tensor holds NaN or infinity."""
    assert bool(tensor.isfinite().all()), f"{what} holds NaN or infinite values"


# -- the checks -------------------------------------------------------------------------------------------------------


def check_class(subject: Subject) -> None:
    """The name leads to a documented SAE class that knows its name and its config.

    `architecture` must be the bare registered name: it is what cfg.json says and what `SAE.load` looks up.
    """
    contribution = get_registry().find("architecture", subject.name)
    sae_class = get_registry().resolve("architecture", subject.name)
    assert issubclass(sae_class, SAE), f"{sae_class.__name__} is not a subclass of sae_core.SAE"
    assert not inspect.isabstract(sae_class), f"{sae_class.__name__} does not implement all abstract methods of SAE"
    assert "architecture" in vars(sae_class), f"{sae_class.__name__} does not set `architecture` itself"
    assert sae_class.architecture == contribution.spec.name, (
        f"{sae_class.__name__}.architecture is {sae_class.architecture!r}, registered as {contribution.spec.name!r}"
    )
    assert vars(sae_class).get("__doc__"), f"{sae_class.__name__} has no docstring"
    assert contribution.spec.summary, "the spec has no summary, so `sae-core list` shows an empty line"


def check_config(subject: Subject) -> None:
    """The config is a frozen dataclass that refuses what it does not know, survives a round trip, and explains itself.

    Make every field with `sae_core.config.option(help=...)` and check values in ``__post_init__`` with `require`.
    """
    config = subject.new().config
    config_class = type(config)
    assert cast("Any", config_class).__dataclass_params__.frozen, f"{config_class.__name__} is not frozen"
    assert structure(unstructure(config), config_class) == config, "structure(unstructure(config)) is another config"
    unexplained = [described.name for described in describe_fields(config_class) if not described.help]
    assert not unexplained, f"fields without help: {', '.join(unexplained)}"
    wrongs: list[dict[str, Any]] = [{"d_in": 0}, {"d_sae": -1}, {"d_in": "16"}, {"no_such_field": 1}]
    for wrong in wrongs:
        try:
            subject.new(**wrong)
        except ConfigError:
            continue
        raise AssertionError(f"the config {wrong} was accepted")


def check_seed(subject: Subject) -> None:
    """Parameters depend on the seed alone.

    `reset_parameters` must draw from its generator and from nothing else, and set every parameter: nothing may be left
    as `torch.empty` made it.
    """
    before = torch.get_rng_state()
    one, again, other = subject.new(seed=1), subject.new(seed=1), subject.new(seed=2)
    assert torch.equal(before, torch.get_rng_state()), "making an SAE used the global random generator"
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), f"{name!r} differs between two SAEs of one seed"
        is_finite(tensor, f"{name!r} of a new SAE")
    assert any(not torch.equal(t, other.state_dict()[n]) for n, t in one.state_dict().items()), "seeds 1 and 2 agree"
    marked = subject.new()
    for parameter in marked.parameters():
        torch.nn.init.constant_(parameter, 7.25)
    marked.reset_parameters(torch.Generator().manual_seed(1))
    for name, parameter in marked.named_parameters():
        assert torch.equal(parameter, one.get_parameter(name)), f"reset_parameters does not set all of {name!r}"


def check_shapes(subject: Subject) -> None:
    """Any leading shape goes in, and latents and outputs keep it; zero rows are rows too."""
    sae = subject.trained()
    for leading in ((), (1,), (5,), (2, 3), (0,)):
        x = batch_for(sae, torch.Size(leading).numel()).view(*leading, sae.d_in)
        for what, compute, width in (
            ("encode(x)", sae.encode, sae.d_sae),
            ("encode_sparse(x).to_dense()", lambda x: sae.encode_sparse(x).to_dense(), sae.d_sae),
            ("decode(encode(x), x)", lambda x: sae.decode(sae.encode(x), x), sae.d_out),
            ("sae(x)", sae, sae.d_out),
        ):
            tensor, expected = compute(x), (*leading, width)
            assert tensor.shape == expected, f"{what} of {tuple(x.shape)} is {tuple(tensor.shape)}, not {expected}"
            is_finite(tensor, what)


def check_sparse_is_dense(subject: Subject) -> None:
    """`encode_sparse` and `encode` say the same, and `decode` takes both.

    Latents should depend on the input, and not all of them should be active everywhere.
    """
    sae = subject.trained()
    x = batch_for(sae, 32)
    dense, sparse = sae.encode(x), sae.encode_sparse(x)
    assert isinstance(sparse, SparseCodes), f"encode_sparse gave {type(sparse).__name__}"
    same(sparse.to_dense(), dense, "encode_sparse(x).to_dense() and encode(x)")
    same(sae.decode(sparse, x), sae.decode(dense, x), "decode of sparse and of dense latents")
    same(sae.decode(dense, x), sae(x), "decode(encode(x), x) and sae(x)")
    assert bool((dense != 0).any()), "no latent is active on any input"
    assert not torch.equal(dense[0], dense[1]), "two different inputs have the same latents"


def check_rows_are_independent(subject: Subject) -> None:
    """In eval mode what a row becomes does not depend on the rows beside it.

    Whatever selects over the batch in training must use something fixed, like a threshold, in eval mode.
    """
    sae = subject.trained()
    x = batch_for(sae, 24)
    together = sae(x)
    same(torch.cat([sae(part) for part in x.split(7)]), together, "sae(x) in parts and at once")
    same(torch.stack([sae(row) for row in x]), together, "sae(x) row by row and at once")
    same(sae(x.view(4, 6, -1)).flatten(0, 1), together, "sae(x) with and without a leading shape")
    same(sae(x.flip(0)).flip(0), together, "sae(x) with the rows in another order")


def check_repeatable(subject: Subject) -> None:
    """In eval mode the same input gives the same output, and neither the input nor the SAE is changed by it."""
    sae = subject.trained()
    x = batch_for(sae, 16)
    kept, state = x.clone(), copy.deepcopy(sae.state_dict())
    first = sae(x)
    sae.decode(sae.encode(x), x)
    sae.encode_sparse(x)
    assert torch.equal(x, kept), "the input was changed in place"
    assert torch.equal(first, sae(x)), "the same input gave two outputs"
    for name, tensor in sae.state_dict().items():
        assert torch.equal(tensor, state[name]), f"{name!r} changed in eval mode"


def check_wrong_input(subject: Subject) -> None:
    """An input of the wrong width or type is refused with a ShapeError."""
    sae = subject.new()
    for wrong in (torch.zeros(3, sae.d_in + 1), torch.zeros(3, sae.d_in, dtype=torch.long)):
        try:
            sae(wrong)
        except ShapeError:
            continue
        raise AssertionError(f"an input of shape {tuple(wrong.shape)} and dtype {wrong.dtype} was accepted")


def check_dtypes(subject: Subject) -> None:
    """Outputs have the dtype of the parameters, and inputs of another precision are cast.

    Buffers and constants made inside the forward pass must take the dtype of the parameters.
    """
    for dtype in (torch.float64, torch.bfloat16):
        sae = subject.trained().to(dtype)
        x = batch_for(sae, 8)
        for what, tensor in (("encode(x)", sae.encode(x)), ("sae(x)", sae(x)), ("sae(x.half())", sae(x.half()))):
            assert tensor.dtype == dtype, f"{what} of a {dtype} SAE has dtype {tensor.dtype}"
            is_finite(tensor, f"{what} of a {dtype} SAE")


def check_gradient_to_input(subject: Subject) -> None:
    """Gradients reach the input, as attribution and splicing into a model need."""
    sae = subject.trained()
    x = batch_for(sae, 8).requires_grad_()
    sae(x).square().sum().backward()
    assert x.grad is not None, "the output does not depend on the input as far as autograd knows"
    is_finite(x.grad, "the gradient of the input")
    assert bool((x.grad != 0).any()), "the gradient of the input is zero"


def check_objective(subject: Subject) -> None:
    """The training step gives a finite scalar loss, its terms, codes and reconstructions of the right shapes."""
    sae = subject.new().train()
    batch = pairs_for(sae, 32)
    out = sae.training_step(batch, StepContext(progress=0.5))
    assert isinstance(out, StepOutput), f"training_step gave {type(out).__name__}, not StepOutput"
    assert out.loss.shape == (), f"the loss has shape {tuple(out.loss.shape)}; it must be a scalar"
    is_finite(out.loss, "the loss")
    assert out.losses, "losses is empty: name the terms of the loss, for the log"
    same(sum(out.losses.values(), torch.zeros(())), out.loss, "the sum of the terms and the loss")
    rows = batch.inputs.shape[0] if isinstance(batch, ActivationBatch) else batch.shape[0]
    assert out.codes.shape == (rows, sae.d_sae), f"codes have shape {out.codes.shape}, not {(rows, sae.d_sae)}"
    for what, tensor in (("reconstruction", out.reconstruction), ("target", out.target)):
        assert tensor.shape == (rows, sae.d_out), f"the {what} has shape {tuple(tensor.shape)}, not {(rows, sae.d_out)}"
    sae.training_step(batch, StepContext(progress=0.5, dead=torch.arange(sae.d_sae // 2), density=0.01))
    sae.training_step(batch)


def check_gradients(subject: Subject) -> None:
    """Every parameter gets a finite gradient from the training step, and on some batch one that is not zero.

    A parameter that is not trained should be a buffer.
    """
    sae = subject.new().train()
    context = StepContext(progress=0.5, dead=torch.arange(sae.d_sae // 2))
    moved = {name: False for name, parameter in sae.named_parameters() if parameter.requires_grad}
    for seed in range(3):
        sae.zero_grad()
        sae.training_step(pairs_for(sae, seed=seed), context).loss.backward()
        for name, parameter in sae.named_parameters():
            if parameter.grad is not None:
                is_finite(parameter.grad, f"the gradient of {name!r}")
                moved[name] |= bool((parameter.grad != 0).any())
    still = [name for name, has_moved in moved.items() if not has_moved]
    assert not still, f"no gradient ever reaches {', '.join(still)}"


def check_learns(subject: Subject) -> None:
    """Sixty steps of Adam on one batch bring the squared error well below that of answering with the mean."""
    sae = subject.new()
    train(sae, steps=60)
    with torch.no_grad():
        out = sae.training_step(pairs_for(sae), StepContext(progress=1.0))
    error = (out.reconstruction - out.target).square().sum(-1).mean()
    trivial = (out.target - out.target.mean(0)).square().sum(-1).mean()
    assert float(error) < 0.7 * float(trivial), (
        f"the squared error is {float(error):.3g}; answering with the mean gives {float(trivial):.3g}"
    )


def check_training_is_deterministic(subject: Subject) -> None:
    """Two runs of one seed end with the same bits, so nothing draws from a global generator."""
    ends: list[dict[str, Tensor]] = []
    for global_seed in (1, 2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(global_seed)
            sae = subject.new()
            train(sae, steps=5)
            ends.append(sae.state_dict())
    for name, tensor in ends[0].items():
        assert torch.equal(tensor, ends[1][name]), f"{name!r} differs after two equal runs"


def check_state_dict(subject: Subject) -> None:
    """A state_dict holds all there is: another instance that loads it does the same, in training too."""
    sae, other = subject.trained(), subject.new(seed=5)
    other.load_state_dict(sae.state_dict())
    x = batch_for(sae, 16)
    same(other.eval()(x), sae(x), "sae(x) after load_state_dict", 0.0)
    sae.train()
    other.train()
    first, second = sae.training_step(pairs_for(sae)).loss, other.training_step(pairs_for(sae)).loss
    same(second, first, "the loss after load_state_dict", 0.0)


def check_save_and_load(subject: Subject) -> None:
    """What is saved is what was there: `SAE.load` gives the same latents and outputs.

    `export` must name every tensor that the forward pass needs, and must not change the SAE that it exports.
    """
    _check_saved(subject.trained(), "")


def check_saving_normalised(subject: Subject) -> None:
    """The same with input normalisations, or they are refused when the SAE is made.

    `export` must fold normalisations that are fixed maps into the weights (`sae_core.folding.fold_normalization`).
    """
    for name in ("layer_norm", "expected_average_only_in"):
        try:
            sae = subject.new(normalize_activations=name)
        except ConfigError:
            continue
        sae.fit_normalization(pairs_for(sae))
        train(sae, steps=12)
        _check_saved(sae.eval(), f"normalize_activations {name}: ")


def _check_saved(sae: SAE, where: str) -> None:
    x = batch_for(sae, 32)
    state = copy.deepcopy(sae.state_dict())
    with tempfile.TemporaryDirectory() as folder:
        loaded = SAE.load(sae.save(Path(folder, "saved")))
        for name, tensor in sae.state_dict().items():
            assert torch.equal(tensor, state[name]), f"{where}saving changed {name!r}"
        same(loaded.encode(x), sae.encode(x), f"{where}encode(x) after SAE.load", 1e-4)
        same(loaded(x), sae(x), f"{where}sae(x) after SAE.load", 1e-4)
        again = SAE.load(loaded.save(Path(folder, "again")))
        same(again(x), loaded(x), f"{where}sae(x) after saving what was loaded", 1e-5)


def check_copies(subject: Subject) -> None:
    """`copy.deepcopy` gives an independent SAE that does the same, as averaging weights and sweeps need."""
    sae = subject.trained()
    x = batch_for(sae, 8)
    expected = sae(x)
    copied = copy.deepcopy(sae)
    same(copied(x), expected, "the output of a copy", 0.0)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    same(sae(x), expected, "the output of the original after its copy was changed", 0.0)


CHECKS: tuple[Callable[[Subject], None], ...] = (
    check_class,
    check_config,
    check_seed,
    check_shapes,
    check_sparse_is_dense,
    check_rows_are_independent,
    check_repeatable,
    check_wrong_input,
    check_dtypes,
    check_gradient_to_input,
    check_objective,
    check_gradients,
    check_learns,
    check_training_is_deterministic,
    check_state_dict,
    check_save_and_load,
    check_saving_normalised,
    check_copies,
)
