"""What the core asks of classes it did not write, and says when they do not keep to it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from sae_core import SAE, TrainConfig, Trainer, create, hookimpl
from sae_core.architectures.linear import LinearConfig, LinearSAE
from sae_core.architectures.parts import times_norms, without_norms
from sae_core.architectures.topk import TopKConfig
from sae_core.codes import Codes, DenseCodes
from sae_core.config import option
from sae_core.errors import ConfigError, FormatError, PluginError, UnknownNameError
from sae_core.plugins import (
    ActivationSourceSpec,
    ArchitectureSpec,
    CatalogueSpec,
    CommandSpec,
    LoaderSpec,
    LoggerSpec,
    Spec,
    get_registry,
    reset_registry,
)
from sae_core.sae import Axis, Export, Prepared, SAEConfig, StepContext, StepOutput, training_option
from torch import Tensor, nn

HERE = __name__


class Ramp(LinearSAE[LinearConfig]):
    """ReLU latents, the shortest there is."""

    architecture: ClassVar[str] = "ramp"
    config_class: ClassVar[type[SAEConfig]] = LinearConfig

    def encode_rows(self, prepared: Prepared) -> Codes:
        return self.pre(prepared, floor=0.0).map(torch.relu)

    def objective(self, prepared: Prepared, target: Tensor, context: StepContext) -> StepOutput:
        codes = self.pre(prepared, context, floor=0.0).map(torch.relu)
        y_RO = self.to_loss_space(self.decode_rows(codes, prepared), prepared)
        loss = (y_RO - target).square().sum(-1).mean()
        return StepOutput(loss, {"mse": loss}, codes, y_RO, target)


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Classes of this file, registered as a notebook does it, and forgotten afterwards."""
    import sys
    from types import ModuleType

    cells = ModuleType("cells_of_a_notebook")
    monkeypatch.setitem(sys.modules, cells.__name__, cells)

    def register(cls: type, kind: type[Spec] = ArchitectureSpec, name: str = "") -> None:
        cells.__dict__[cls.__name__] = cls
        name = name or getattr(cls, "architecture", cls.__name__.lower())
        get_registry().register(kind(name=name, target=f"{cells.__name__}:{cls.__name__}", summary="of a test"))

    yield register
    reset_registry()


def test_a_frame_that_does_not_promise_to_fold_is_refused_by_what_it_says_and_saved_as_it_is(
    registered: Any, tmp_path: Path
) -> None:
    registered(Ramp)
    x = torch.randn(20, 6, generator=torch.Generator().manual_seed(0)) + 1
    sae = create("ramp", d_in=6, d_sae=12, normalize_activations="expected_average_only_in").eval()
    sae.fit_normalization(x)
    for fold in (sae.fold_decoder_norm, sae.fold_normalization):
        with pytest.raises(ConfigError, match=r"ramp.*cannot be folded"):
            fold()
    loaded = SAE.load(sae.save(tmp_path / "sae"))
    assert loaded.config.normalize_activations == "constant_scalar_rescale"
    torch.testing.assert_close(loaded(x), sae(x))
    torch.testing.assert_close(loaded.encode(x), sae.encode(x))


def test_latents_in_units_of_norms_that_the_config_cannot_switch_off_are_not_folded_into_others(
    registered: Any, tmp_path: Path
) -> None:
    """Folding the normalisation as well changes the norms, so that what is loaded would have other latents."""

    class Lengths(Ramp):
        """Reports lengths of contributions, always."""

        architecture: ClassVar[str] = "lengths"
        folds: ClassVar[bool] = True

        def latent_norms(self) -> Tensor:
            return self.decoder_norms()

        def encode_rows(self, prepared: Prepared) -> Codes:
            return times_norms(super().encode_rows(prepared), self.latent_norms())

        def decode_rows(self, codes: Codes, prepared: Prepared | None) -> Tensor:
            return super().decode_rows(without_norms(codes, self.latent_norms()), prepared)

    registered(Lengths)
    x = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    plain = create("lengths", d_in=6, d_sae=12).eval()
    torch.testing.assert_close(SAE.load(plain.save(tmp_path / "plain")).encode(x), plain.encode(x))
    scaled = create("lengths", d_in=6, d_sae=12, normalize_activations="expected_average_only_in").eval()
    scaled.fit_normalization(3 * x)
    with pytest.raises(ConfigError, match=r"lengths: .* set it in unit_norm_config"):
        scaled.save(tmp_path / "scaled")


def test_tensors_that_are_not_declared_or_not_as_declared_are_refused_when_the_sae_is_made() -> None:
    class Undeclared(Ramp):
        def __init__(self, config: LinearConfig) -> None:
            super().__init__(config)
            self.router = nn.Parameter(torch.zeros(config.d_in))

    class WrongAxis(Undeclared):
        AXES: ClassVar[Mapping[str, Axis]] = {**Ramp.AXES, "router": Axis(0)}

    class Forgotten(Ramp):
        AXES: ClassVar[Mapping[str, Axis]] = {**Ramp.AXES, "seen": Axis(None)}

        def __init__(self, config: LinearConfig) -> None:
            super().__init__(config)
            self.register_buffer("seen", torch.zeros(3), persistent=False)

    @dataclass(frozen=True, kw_only=True)
    class NamedBadly(LinearConfig):
        dtype: str = option(default="x", help="a name that files use")

    config = LinearConfig(d_in=6, d_sae=12)
    with pytest.raises(ConfigError, match="tensor 'router' is not declared in AXES"):
        Undeclared(config)
    with pytest.raises(
        ConfigError, match=r"dimension 0 of 'router' counts the d_sae = 12 latents, but its shape is \(6,\)"
    ):
        WrongAxis(config)
    with pytest.raises(ConfigError, match="buffer 'seen' is not persistent"):
        Forgotten(config)
    with pytest.raises(ConfigError, match="config field 'dtype' has a meaning of its own"):
        Ramp(NamedBadly(d_in=6, d_sae=12))


def test_own_tensors_under_any_name_survive_files_whatever_old_files_meant_by_it(
    registered: Any, tmp_path: Path
) -> None:
    class Own(Ramp):
        """Has tensors with names that older files used otherwise, and an integer one."""

        architecture: ClassVar[str] = "own"
        independent_latents: ClassVar[bool] = True
        AXES: ClassVar[Mapping[str, Axis]] = {
            **Ramp.AXES,
            "scaling_factor": Axis(0),
            "log_threshold": Axis(0),
            "topk_threshold": Axis(None),
            "group": Axis(0),
        }

        def __init__(self, config: LinearConfig) -> None:
            super().__init__(config)
            self.scaling_factor = nn.Parameter(torch.zeros(config.d_sae))
            self.log_threshold = nn.Parameter(torch.zeros(config.d_sae))
            self.register_buffer("topk_threshold", torch.zeros(()))
            self.register_buffer("group", torch.zeros(config.d_sae, dtype=torch.long))

        def export(self) -> Export:
            return Export(self.architecture, self.config, self.in_files(self.tensors()))

    registered(Own)
    sae = create("own", d_in=6, d_sae=12).eval()
    with torch.no_grad():
        for name, tensor in sae.tensors().items():
            if name not in Ramp.AXES:
                tensor.copy_(torch.arange(tensor.numel()).view(tensor.shape) + 2)
    loaded = SAE.load(sae.save(tmp_path / "sae"))
    assert loaded.tensors().keys() == sae.tensors().keys()
    for name, tensor in sae.tensors().items():
        assert torch.equal(loaded.tensors()[name], tensor), name
    some = SAE.load(tmp_path / "sae", rows=[7, 2])
    assert some.tensors()["group"].tolist() == [9, 4]
    assert some.tensors()["scaling_factor"].tolist() == [9.0, 4.0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: replace(e, architecture="standard"), "with a LinearConfig, which is not its StandardConfig"),
        (lambda e: replace(e, tensors={"W_dec": e.tensors["W_dec"]}), "without its tensor 'W_enc'|without its tensor"),
        (
            lambda e: replace(e, tensors={**e.tensors, "more": e.tensors["b_dec"]}),
            "a tensor 'more' that is not one of it",
        ),
        (lambda e: replace(e, tensors={**e.tensors, "b_enc": e.tensors["b_dec"]}), r"'b_enc' of shape \(6,\)"),
        (
            lambda e: replace(e, config=replace(e.config, normalize_activations="covariance_whitening")),
            "whose statistics files do not hold",
        ),
    ],
)
def test_an_export_that_could_not_be_loaded_fails_before_the_first_step_and_at_save(
    registered: Any, tmp_path: Path, change: Any, message: str
) -> None:
    class Wrong(Ramp):
        """Exports something else."""

        architecture: ClassVar[str] = "wrong"

        def export(self) -> Export:
            return change(super().export())

    registered(Wrong)
    sae = create("wrong", d_in=6, d_sae=12)
    before = {name: tensor.clone() for name, tensor in sae.tensors().items()}
    with pytest.raises(FormatError, match=message):
        sae.save(tmp_path / "sae")
    assert not (tmp_path / "sae").exists()
    config = TrainConfig(total_samples=8, batch_size=4, init_b_dec="zeros", progress_bar=False)
    with pytest.raises(FormatError, match=message):
        Trainer(sae, [torch.randn(4, 6)] * 2, config).fit()
    assert all(torch.equal(tensor, before[name]) for name, tensor in sae.tensors().items())


def test_a_class_that_is_not_what_its_kind_asks_for_is_one_error_at_its_first_use(registered: Any) -> None:
    class Nothing:
        """Nothing at all."""

    for kind, lacking in (
        (ArchitectureSpec, "not a subclass of sae_core.SAE"),
        (ActivationSourceSpec, "no batches, config_class"),
        (LoaderSpec, "no load, matches"),
        (LoggerSpec, "no close, log, start, config_class"),
        (CatalogueSpec, "no files, lookup, releases, sae_ids"),
        (CommandSpec, "no configure, run"),
    ):
        registered(Nothing, kind, "nothing")
        with pytest.raises(PluginError, match=lacking):
            get_registry().usable(kind.kind, "nothing")


def test_what_a_notebook_saved_says_who_provided_it_and_can_be_claimed(registered: Any, tmp_path: Path) -> None:
    registered(Ramp)
    saved = create("ramp", d_in=6, d_sae=12, seed=3)
    path = saved.save(tmp_path / "sae")
    reset_registry()
    with pytest.raises(UnknownNameError, match="registered by the program that saved this") as raised:
        SAE.load(path)
    assert "pip install" not in str(raised.value)

    class Renamed(Ramp):
        """The same under another name."""

        architecture: ClassVar[str] = "slope"

    registered(Renamed)
    claimed = SAE.load(path, overrides={"architecture": "local:slope"})
    assert isinstance(claimed, Renamed)
    torch.testing.assert_close(claimed.W_enc, saved.W_enc)


def test_the_form_of_a_product_is_refused_where_it_makes_no_difference() -> None:
    config = TrainConfig(total_samples=8, encoder_product="full")
    with pytest.raises(ConfigError, match="encoder_product: full makes no difference to matching_pursuit"):
        Trainer(create("matching_pursuit", d_in=6, d_sae=12), [], config)


def test_an_sae_made_from_its_class_is_initialised_like_one_that_was_created() -> None:
    created = create("topk", d_in=6, d_sae=12, k=3, seed=0)
    made = type(created)(TopKConfig(d_in=6, d_sae=12, k=3))
    for name, tensor in created.tensors().items():
        assert torch.equal(made.tensors()[name], tensor)


def test_the_marker_of_hooks_is_found_where_authors_look_for_it() -> None:
    from sae_core.plugins import hookimpl as same

    assert hookimpl is same


def test_settings_of_training_come_back_whoever_provides_the_architecture(registered: Any, tmp_path: Path) -> None:
    """Under names that SAELens uses too, and that a file leaves out where they are the default."""

    @dataclass(frozen=True, kw_only=True)
    class WeighedConfig(LinearConfig):
        l1_coefficient: float = training_option(default=0.1, help="of the penalty")
        k: int = option(default=7, help="left out of files where it is 7", omit_default=True)

    class Weighed(Ramp):
        """Has a setting of training."""

        architecture: ClassVar[str] = "weighed"
        config_class: ClassVar[type[SAEConfig]] = WeighedConfig

    registered(Weighed)
    config = create("weighed", d_in=6, d_sae=12, l1_coefficient=0.7).config
    path = create("weighed", d_in=6, d_sae=12, l1_coefficient=0.7).save(tmp_path / "sae")
    assert SAE.load(path).config == config
    assert SAE.load(path, form="training").config == config
    reset_registry()
    spec = ArchitectureSpec(name="weighed", target="cells_of_a_notebook:Weighed", summary="of a test")
    get_registry().register(spec, "sae-weighed")  # the notebook has become a package
    assert SAE.load(path).config == config


def test_a_form_of_the_product_that_an_objective_keeps_from_the_ops_is_refused_before_the_first_step(
    registered: Any,
) -> None:
    class Deaf(Ramp):
        """Multiplies by itself."""

        architecture: ClassVar[str] = "deaf"

        def objective(self, prepared: Prepared, target: Tensor, context: StepContext) -> StepOutput:
            codes = DenseCodes(torch.relu(prepared.z @ self.W_enc + self.b_enc), prepared.leading_shape)
            y_RO = self.decode_rows(codes, prepared)
            loss = (y_RO - target).square().sum(-1).mean()
            return StepOutput(loss, {"mse": loss}, codes, y_RO, target)

    registered(Ramp)
    registered(Deaf)
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    config = TrainConfig(total_samples=8, batch_size=8, encoder_product="full", progress_bar=False)
    Trainer(create("ramp", d_in=6, d_sae=12), [x], config).fit()
    deaf = create("deaf", d_in=6, d_sae=12)
    before = deaf.W_dec.clone()
    with pytest.raises(ConfigError, match="encoder_product: full makes no difference to deaf, whose objective"):
        Trainer(deaf, [x], config).fit()
    assert torch.equal(deaf.W_dec, before)


def test_a_training_form_whose_package_has_another_name_can_be_claimed(registered: Any, tmp_path: Path) -> None:
    class Formal(Ramp):
        """Is saved as something else."""

        architecture: ClassVar[str] = "formal"

        def export(self) -> Export:
            from sae_core.architectures.standard import StandardConfig

            return Export("standard", StandardConfig(d_in=6, d_sae=12), self.in_files(self.tensors()))

    registered(Formal)
    saved = create("formal", d_in=6, d_sae=12, seed=3)
    path = saved.save(tmp_path / "sae")
    reset_registry()
    assert SAE.load(path).architecture == "standard"
    with pytest.raises(UnknownNameError, match=r"training_form\.safetensors: unknown architecture[\s\S]*overrides="):
        SAE.load(path, form="training")
    spec = ArchitectureSpec(name="formal", target="cells_of_a_notebook:Formal", summary="of a test")
    get_registry().register(spec, "sae-other")
    claimed = SAE.load(path, form="training", overrides={"architecture": "sae-other:formal"})
    assert type(claimed) is Formal
    assert torch.equal(claimed.encoder, saved.encoder)
    with pytest.raises(ConfigError, match="of overrides only architecture"):
        SAE.load(path, form="training", overrides={"k": 3})
