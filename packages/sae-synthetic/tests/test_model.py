"""A synthetic world as one object: what its seed decides, and that a saved one comes back as it was, here and in SAELens."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_core.errors import ConfigError, FormatError
from sae_synthetic import (
    ActivationGenerator,
    FeatureDictionary,
    FoldedNormalMagnitudeConfig,
    HierarchyConfig,
    LinearMagnitudeConfig,
    LowRankCorrelationConfig,
    OrthogonalizationConfig,
    SyntheticModel,
    SyntheticModelConfig,
    ZipfianFiringProbabilityConfig,
)
from safetensors.torch import load_file, save_file
from torch import Tensor


def _everything(seed: int | None = 7, **changes: Any) -> SyntheticModelConfig:
    settings: dict[str, Any] = {
        "num_features": 40,
        "hidden_dim": 16,
        "firing_probability": ZipfianFiringProbabilityConfig(0.5, 0.4, 0.01),
        "hierarchy": HierarchyConfig(4, (2, 3), 2, 0.5, scale_children_by_parent=True),
        "orthogonalization": OrthogonalizationConfig(num_steps=5),
        "correlation": LowRankCorrelationConfig(rank=3),
        "std_firing_magnitudes": FoldedNormalMagnitudeConfig(0.5, 0.5),
        "mean_firing_magnitudes": LinearMagnitudeConfig(5.0, 4.0),
        "bias": 0.5,
        "seed": seed,
    }
    return SyntheticModelConfig(**{**settings, **changes})


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    SyntheticModel(_everything()).save(tmp_path / "model")
    return tmp_path / "model"


def test_a_model_saved_by_sae_lens_opens_and_is_what_its_config_makes_here(golden_folder: Path) -> None:
    folder = golden_folder / "sae_lens_model"
    opened = SyntheticModel.load_from_disk(folder)
    stored = load_file(folder / "synthetic_model.safetensors")
    assert torch.equal(opened.feature_dict.feature_vectors.detach(), stored["feature_vectors"])
    assert torch.equal(opened.feature_dict.bias.detach(), stored["bias"])
    assert opened.feature_dict.bias.requires_grad  # as in a model that is made: its bias is not False
    assert torch.equal(opened.activation_generator.firing_probabilities, stored["firing_probabilities"])
    made = SyntheticModel(opened.cfg)
    for name in ("firing_probabilities", "mean_firing_magnitudes", "std_firing_magnitudes"):
        torch.testing.assert_close(
            getattr(made.activation_generator, name), getattr(opened.activation_generator, name), rtol=1e-5, atol=1e-6
        )
    torch.testing.assert_close(
        made.feature_dict.feature_vectors, opened.feature_dict.feature_vectors, atol=1e-5, rtol=0
    )
    assert made.correlation_matrix is not None
    assert torch.equal(made.correlation_matrix.correlation_factor, stored["correlation_factor"])
    assert made.hierarchy is not None
    assert made.hierarchy.to_dict() == json.loads((folder / "hierarchy.json").read_text())
    assert opened.cfg.to_dict() == json.loads((folder / "synthetic_model_config.json").read_text())


def test_a_model_saved_here_has_the_files_keys_and_tensors_of_sae_lens(golden_folder: Path, saved: Path) -> None:
    theirs = golden_folder / "sae_lens_model"
    assert {path.name for path in saved.iterdir()} == {path.name for path in theirs.iterdir()}

    def keys(folder: Path, name: str) -> Any:
        def shape(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: shape(inner) for key, inner in value.items()}
            return [shape(value[0])] if isinstance(value, list) and value and isinstance(value[0], dict) else None

        return shape(json.loads((folder / name).read_text()))

    assert keys(saved, "synthetic_model_config.json") == keys(theirs, "synthetic_model_config.json")
    root = json.loads((saved / "hierarchy.json").read_text())["roots"][0]
    assert root.keys() == json.loads((theirs / "hierarchy.json").read_text())["roots"][0].keys()
    ours, wanted = (load_file(folder / "synthetic_model.safetensors") for folder in (saved, theirs))
    assert {name: ours[name].shape for name in wanted} == {name: value.shape for name, value in wanted.items()}
    assert set(ours) - set(wanted) == {"mean_firing_magnitudes", "std_firing_magnitudes"}


@pytest.mark.slow
def test_sae_lens_opens_a_model_saved_here_and_samples_the_same_world(golden_folder: Path, tmp_path: Path) -> None:
    python = os.environ.get("SAE_CORE_ORACLE_SAE_LENS")
    if not python:
        pytest.skip("SAE_CORE_ORACLE_SAE_LENS names no interpreter that has sae-lens")
    models = [SyntheticModel(_everything()), SyntheticModel(_everything(hierarchy=None, correlation=None))]
    for place, model in enumerate(models):
        model.save(tmp_path / str(place))
    script = golden_folder / "check_ours_opens_in_sae_lens.py"
    done = subprocess.run(
        [python, str(script), str(tmp_path / "0"), str(tmp_path / "1")], capture_output=True, text=True, check=True
    )
    for line, model in zip(done.stdout.splitlines(), models, strict=True):
        found, generator = json.loads(line), model.activation_generator
        assert found["config"] == model.cfg.to_dict()
        assert found["vectors"] == pytest.approx(float(model.feature_dict.feature_vectors.detach().sum()), abs=1e-4)
        assert found["probabilities"] == pytest.approx(generator.firing_probabilities.tolist())
        assert found["means"] == pytest.approx(generator.mean_firing_magnitudes.tolist())
        assert found["stds"] == pytest.approx(generator.std_firing_magnitudes.tolist())
        assert found["rebuilt"] < 1e-5
        rates = generator.sample_codes(20_000).firing_counts() / 20_000
        error = (rates - torch.tensor(found["rates"])).abs() / (2 * rates.clamp_min(1e-3) / 20_000).sqrt()
        assert float(error.max()) < 4.5


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"hierarchy": None, "correlation": None},
        {"dtype": "bfloat16"},
        {"std_firing_magnitudes": 0.0, "bias": False, "orthogonalization": None},
    ],
)
def test_a_seeded_model_saved_and_opened_samples_the_same_batches(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = SyntheticModel(_everything(**changes))
    model.save(tmp_path)
    opened = SyntheticModel.load_from_disk(tmp_path)
    assert opened.cfg == model.cfg
    for size in (20, 7):
        hidden, features = model.sample_with_features(size)
        again, the_same = opened.sample_with_features(size)
        assert torch.equal(hidden, again)
        assert torch.equal(features, the_same)
    assert bool((features > 0).any())


def test_a_config_made_twice_samples_the_same_and_another_seed_does_not() -> None:
    one, same, other = (SyntheticModel(_everything(seed)).sample(30) for seed in (7, 7, 8))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_without_a_seed_all_is_random_but_a_saved_model_keeps_its_parts(tmp_path: Path) -> None:
    model, other = SyntheticModel(_everything(None)), SyntheticModel(_everything(None))
    assert not torch.equal(model.feature_dict.feature_vectors, other.feature_dict.feature_vectors)
    assert not torch.equal(model.sample(30), other.sample(30))
    model.save(tmp_path)
    opened = SyntheticModel.load_from_disk(tmp_path)
    assert torch.equal(opened.feature_dict.feature_vectors, model.feature_dict.feature_vectors)
    for name in ("firing_probabilities", "mean_firing_magnitudes", "std_firing_magnitudes"):
        assert torch.equal(getattr(opened.activation_generator, name), getattr(model.activation_generator, name))
    assert not torch.equal(opened.sample(30), SyntheticModel.load_from_disk(tmp_path).sample(30))


def test_moves_between_devices_and_dtypes_keep_the_row_of_batches() -> None:
    stay, move = SyntheticModel(_everything()), SyntheticModel(_everything())
    for model in (stay, move):
        model.sample(10)
    wanted = stay.sample_with_codes(10)[1].to_dense()
    moved = move.to("cpu", torch.float64)
    hidden, codes = moved.sample_with_codes(10)
    assert hidden.dtype == codes.values.dtype == torch.float64
    torch.testing.assert_close(codes.to_dense(), wanted.double())


@pytest.mark.gpu
def test_a_gpu_and_back_keeps_the_row_of_batches() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    stay, move = SyntheticModel(_everything()), SyntheticModel(_everything()).to("cuda")
    stay.sample(10)
    assert move.sample(10).is_cuda
    torch.testing.assert_close(stay.sample(10), move.to("cpu").sample(10))


def test_a_position_continues_exactly_in_another_object(saved: Path) -> None:
    model = SyntheticModel.load_from_disk(saved)
    model.sample(10)
    state = json.loads(json.dumps(model.state_dict()))
    wanted = model.sample(10)
    other = SyntheticModel.load_from_disk(saved)
    other.load_state_dict(state)
    assert torch.equal(other.sample(10), wanted)


def test_hidden_activations_are_the_features_decoded() -> None:
    model = SyntheticModel(_everything())
    hidden, features = model.sample_with_features(50)
    wanted = features @ model.feature_dict.feature_vectors.detach() + model.feature_dict.bias.detach()
    torch.testing.assert_close(hidden, wanted, atol=1e-5, rtol=1e-5)
    assert not hidden.requires_grad
    model.use_sparse_tensors = True
    assert model.sample_with_features(5)[1].is_sparse
    assert model(5).shape == (5, 16)


def test_parts_that_are_given_are_taken() -> None:
    config = SyntheticModelConfig(num_features=3, hidden_dim=4, seed=0)
    features = FeatureDictionary(3, 4, initializer=None, seed=5)
    generator = ActivationGenerator(3, 1.0, seed=5)
    model = SyntheticModel(config, features, generator)
    torch.testing.assert_close(model.sample(1)[0], features.feature_vectors.detach().sum(0))
    with pytest.raises(ConfigError, match="generator has 4 features, the config 3"):
        SyntheticModel(config, features, ActivationGenerator(4, 0.5))
    with pytest.raises(ConfigError, match="feature_dict has width 5, the config 4"):
        SyntheticModel(config, FeatureDictionary(3, 5, initializer=None))


def test_the_seed_of_a_correlation_is_its_own() -> None:
    def factor(seed: int | None) -> Tensor:
        model = SyntheticModel(_everything(correlation=LowRankCorrelationConfig(rank=3, seed=seed)))
        assert model.correlation_matrix is not None
        return model.correlation_matrix.correlation_factor

    assert torch.equal(factor(None), factor(11))  # the model's seed 7 + 4
    assert not torch.equal(factor(None), factor(5))


def test_saving_again_leaves_nothing_of_the_old_model(saved: Path) -> None:
    plain = SyntheticModel(_everything(hierarchy=None, correlation=None))
    plain.save(saved)
    opened = SyntheticModel.load_from_disk(saved)
    assert opened.hierarchy is None
    assert torch.equal(opened.sample(20), plain.sample(20))


def test_a_source_is_a_config_a_folder_or_a_repository(saved: Path) -> None:
    wanted = SyntheticModel.load_from_disk(saved).sample(5)
    assert torch.equal(SyntheticModel.load_from_source(str(saved)).sample(5), wanted)
    assert torch.equal(SyntheticModel.load_from_source(_everything()).sample(5), wanted)
    with pytest.raises(FormatError, match="neither a folder nor a repository"):
        SyntheticModel.load_from_source("no-such-folder")


def _tensors(folder: Path, **changes: Tensor | None) -> None:
    path = folder / "synthetic_model.safetensors"
    tensors = {**load_file(path), **changes}
    save_file({name: value for name, value in tensors.items() if value is not None}, path)


def _config(folder: Path, **changes: Any) -> None:
    path = folder / "synthetic_model_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: shutil.rmtree(f), "synthetic_model_config.json: cannot read it"),
        (lambda f: (f / "synthetic_model_config.json").write_text("{"), "synthetic_model_config.json: not JSON"),
        (lambda f: (f / "synthetic_model_config.json").write_text("[]"), "expected a JSON object, found list"),
        (lambda f: (f / "synthetic_model.safetensors").unlink(), r"synthetic_model.safetensors: there is no such file"),
        (lambda f: (f / "hierarchy.json").unlink(), "the config has a hierarchy, but hierarchy.json is missing"),
        (lambda f: (f / "hierarchy.json").write_text('{"roots": [{"feature_index": 99}]}'), "only 40 features"),
        (lambda f: _config(f, num_featuers=3), "unknown key 'num_featuers'.*num_features"),
        (lambda f: _config(f, num_features=41), r"'feature_vectors' has shape \(40, 16\), the config asks for \(41"),
        (lambda f: _config(f, dtype="int8"), "dtype must be one of"),
        (lambda f: _tensors(f, bias=None), "the tensor 'bias' is missing"),
        (lambda f: _tensors(f, bais=torch.ones(1)), "unknown tensor 'bais'"),
        (lambda f: _tensors(f, bias=torch.full((16,), float("nan"))), "'bias' has values that are not finite"),
        (
            lambda f: _tensors(f, firing_probabilities=torch.full((40,), 1.5)),
            r"firing_probabilities must be in \(0, 1\]",
        ),
        (lambda f: _tensors(f, correlation_diag=torch.full((40,), 2.0)), "the diagonal of F F"),
    ],
)
def test_a_spoilt_folder_is_refused_by_file_and_key(saved: Path, spoil: Any, message: str) -> None:
    spoil(saved)
    with pytest.raises(FormatError, match=message):
        SyntheticModel.load_from_disk(saved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_features": 0}, "num_features must be a positive integer"),
        ({"hidden_dim": True}, "hidden_dim must be a positive integer"),
        ({"firing_probability": 0.1}, "firing_probability must be FiringProbabilityConfig, not float"),
        ({"hierarchy": {"total_root_nodes": 3}}, "hierarchy must be HierarchyConfig or NoneType, not dict"),
        ({"mean_firing_magnitudes": -1.0}, "mean_firing_magnitudes must not be negative"),
        ({"bias": "yes"}, "bias must be"),
        ({"dtype": "float8"}, "dtype must be one of"),
        ({"seed": -1}, "seed must be a non-negative integer"),
    ],
)
def test_an_impossible_config_is_refused_by_field(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _everything(**changes)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OrthogonalizationConfig(num_steps=-1), "num_steps must be at least 0"),
        (lambda: OrthogonalizationConfig(lr=0), "lr must be positive"),
        (lambda: OrthogonalizationConfig.from_dict({"step": 1}), "step"),
        (lambda: LowRankCorrelationConfig(rank=0), "rank must be at least 1"),
        (lambda: LowRankCorrelationConfig(correlation_scale=-1), "correlation_scale must not be negative"),
        (lambda: SyntheticModelConfig.from_dict({"num_features": 3}), "missing key hidden_dim"),
    ],
)
def test_impossible_parts_of_a_config_are_refused_by_field(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_a_file_without_magnitudes_and_seed_says_that_they_are_new(tmp_path: Path) -> None:
    SyntheticModel(_everything(None)).save(tmp_path)
    _tensors(tmp_path, mean_firing_magnitudes=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SyntheticModel.load_from_disk(tmp_path)  # means follow from the config alone
    _tensors(tmp_path, std_firing_magnitudes=None)
    with pytest.warns(UserWarning, match="no seed and its file holds no magnitudes"):
        SyntheticModel.load_from_disk(tmp_path)
