from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_core import SAE, create
from sae_core.errors import ConfigError, FormatError, SaeCoreError, UnknownNameError
from sae_core.format.files import LocalFiles, inside
from safetensors.torch import load_file, save_file

X = torch.randn(7, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder with a good SAE."""
    sae = create("jumprelu", d_in=6, d_sae=12, seed=3, jumprelu_init_threshold=0.05)
    return sae.save(tmp_path / "sae")


def edit_config(folder: Path, **changes: Any) -> None:
    cfg = json.loads((folder / "cfg.json").read_text())
    for key, value in changes.items():
        if value is ...:
            del cfg[key]
        else:
            cfg[key] = value
    (folder / "cfg.json").write_text(json.dumps(cfg))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "sae_weights.safetensors").items()}
    change(tensors)
    save_file(tensors, folder / "sae_weights.safetensors")


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize(
    ("architecture", "fields"),
    [
        ("standard", {"normalize_activations": "layer_norm"}),
        ("standard", {"reshape_activations": "hook_z", "apply_b_dec_to_input": False}),
        ("topk", {"k": 3, "rescale_acts_by_decoder_norm": False}),
        ("jumprelu", {"normalize_activations": "constant_norm_rescale"}),
    ],
)
def test_what_is_saved_loads_as_the_same_function(
    tmp_path: Path, architecture: str, fields: dict[str, Any], dtype: str
) -> None:
    sae = create(architecture, d_in=6, d_sae=12, dtype=dtype, **fields)
    sae.metadata["hook_name"] = "model.layers.3"
    again = SAE.load(sae.save(tmp_path / "sae"))
    torch.testing.assert_close(again(X), sae(X))
    torch.testing.assert_close(again.encode(X), sae.encode(X))
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), sae.parameters(), strict=True))
    assert again.dtype == sae.dtype
    assert again.metadata["hook_name"] == "model.layers.3"
    assert not again.training


@pytest.mark.parametrize("name", ["expected_average_only_in", "covariance_whitening", "constant_scalar_rescale"])
@pytest.mark.parametrize(("architecture", "fields"), [("standard", {}), ("topk", {"k": 3}), ("jumprelu", {})])
@pytest.mark.parametrize("apply_b_dec", [True, False])
def test_saving_folds_a_fixed_normalisation_into_the_weights(
    tmp_path: Path, architecture: str, fields: dict[str, Any], name: str, apply_b_dec: bool
) -> None:
    factor = {"activation_normalization_factor": 3.0} if name == "constant_scalar_rescale" else {}
    sae = create(
        architecture, d_in=6, d_sae=12, dtype="float64", normalize_activations=name,
        apply_b_dec_to_input=apply_b_dec, **fields, **factor,
    )  # fmt: skip
    x = X.double() * 3 + 1
    sae.normalization.fit([x])
    with torch.no_grad():
        sae.b_dec.copy_(torch.arange(6.0) / 3)
        sae.b_enc.copy_(torch.arange(12.0) / 50)
    again = SAE.load(sae.save(tmp_path / "sae"))
    assert again.config.normalize_activations == "none"
    torch.testing.assert_close(again(x), sae(x))
    torch.testing.assert_close(again.encode(x), sae.encode(x))


def test_a_saved_topk_has_decoder_rows_of_unit_norm_and_the_same_outputs(tmp_path: Path) -> None:
    sae = create("topk", d_in=6, d_sae=12, k=3)
    with torch.no_grad():
        sae.W_dec.mul_(torch.linspace(0.5, 4, 12).unsqueeze(-1))
    again = SAE.load(sae.save(tmp_path / "sae"))
    torch.testing.assert_close(again.W_dec.norm(dim=-1), torch.ones(12))
    torch.testing.assert_close(again(X), sae(X))


def test_the_files_are_the_ecosystems(saved: Path) -> None:
    cfg = json.loads((saved / "cfg.json").read_text())
    assert set(cfg) == {
        "d_in", "d_sae", "dtype", "device", "apply_b_dec_to_input", "normalize_activations", "reshape_activations",
        "metadata", "architecture",
    }  # fmt: skip
    shapes = {name: tuple(t.shape) for name, t in load_file(saved / "sae_weights.safetensors").items()}
    assert shapes == {"W_enc": (6, 12), "W_dec": (12, 6), "b_enc": (12,), "b_dec": (6,), "threshold": (12,)}
    assert sorted(p.name for p in saved.iterdir()) == ["cfg.json", "sae_weights.safetensors"]


def test_a_saved_sae_records_who_provides_its_architecture_and_how_it_was_trained(saved: Path) -> None:
    ours = json.loads((saved / "cfg.json").read_text())["metadata"]["sae_core"]
    assert ours["provider"]["distribution"] == "sae-core"
    assert ours["training_config"]["jumprelu_init_threshold"] == 0.05


def test_saving_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    sae = create("topk", d_in=6, d_sae=12, k=3)
    first, second = sae.save(tmp_path / "a"), sae.save(tmp_path / "b")
    for name in ("cfg.json", "sae_weights.safetensors"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_dtype_and_device_arguments_win_over_the_file(saved: Path) -> None:
    sae = SAE.load(saved, dtype="bfloat16")
    assert (sae.W_enc.dtype, sae.threshold.dtype) == (torch.bfloat16, torch.float32)


def damage_truncated(folder: Path) -> None:
    weights = folder / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-40])


def damage_garbage(folder: Path) -> None:
    (folder / "sae_weights.safetensors").write_bytes(b"not tensors at all, but text")


def damage_empty_file(folder: Path) -> None:
    (folder / "sae_weights.safetensors").write_bytes(b"")


def damage_pickle(folder: Path) -> None:
    (folder / "sae_weights.safetensors").write_bytes(pickle.dumps({"W_enc": [1.0]}))


def damage_torch_zip(folder: Path) -> None:
    torch.save({"W_enc": torch.ones(2)}, folder / "sae_weights.safetensors")


def damage_missing_tensor(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.__delitem__("threshold"))


def damage_extra_tensor(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.__setitem__("b_gate", torch.zeros(12)))


def damage_shape(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.__setitem__("W_enc", torch.zeros(12, 6)))


def damage_nan(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors["W_dec"].__setitem__((1, 1), torch.nan))


def damage_integers(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.__setitem__("b_dec", torch.zeros(6, dtype=torch.int64)))


def damage_json(folder: Path) -> None:
    (folder / "cfg.json").write_text("{")


def damage_json_list(folder: Path) -> None:
    (folder / "cfg.json").write_text("[1]")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_truncated, r"sae_weights\.safetensors: damaged"),
        (damage_garbage, r"sae_weights\.safetensors: damaged"),
        (damage_empty_file, r"sae_weights\.safetensors: damaged"),
        (damage_pickle, r"sae_weights\.safetensors: this is a pickle"),
        (damage_torch_zip, r"sae_weights\.safetensors: this is a pickle"),
        (damage_missing_tensor, "missing tensor 'threshold'"),
        (damage_extra_tensor, "unexpected tensor 'b_gate'"),
        (damage_shape, r"tensor 'W_enc' has shape \(12, 6\), but the config asks for \(6, 12\)"),
        (damage_nan, "tensor 'W_dec' holds 1 values that are NaN or infinite"),
        (damage_integers, "tensor 'b_dec' has dtype torch.int64"),
        (damage_json, r"cfg\.json: not valid JSON"),
        (damage_json_list, r"cfg\.json: expected a JSON object, found list"),
        (lambda f: edit_config(f, architecture="cubic"), r"cfg\.json: unknown architecture 'cubic'"),
        (lambda f: edit_config(f, architecture=...), r"cfg\.json: 'architecture' must name one"),
        (lambda f: edit_config(f, apply_bdec_to_input=True), "unknown key 'apply_bdec_to_input'.*did you mean 'apply_b_dec"),
        (lambda f: edit_config(f, d_in="6"), "expected int, found str '6' at d_in"),
        (lambda f: edit_config(f, metadata=[1]), r"cfg\.json: 'metadata' must be an object"),
        (lambda f: (f / "sae_weights.safetensors").unlink(), "no known format .*it holds: cfg.json"),
        (lambda f: (f / "cfg.json").unlink(), "no known format .*it holds: sae_weights.safetensors"),
    ],
)  # fmt: skip
def test_damaged_input_gives_one_error_naming_file_and_key(
    saved: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(saved)
    with pytest.raises(SaeCoreError, match=message) as caught:
        SAE.load(saved)
    assert str(saved) in str(caught.value)


def test_a_folder_that_does_not_exist_names_its_neighbour(saved: Path) -> None:
    with pytest.raises(FormatError, match=r"no such file or folder; did you mean 'sae'"):
        SAE.load(saved.parent / "sea")


def test_an_empty_folder_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"no known format \(looked for: .*sae_lens.*holds: no files"):
        SAE.load(tmp_path)


def test_an_unknown_format_name_lists_the_known(saved: Path) -> None:
    with pytest.raises(UnknownNameError, match="sae_lens"):
        SAE.load(saved, format="sae_lense")


def test_an_architecture_that_is_not_installed_names_the_package_to_install(saved: Path) -> None:
    metadata = json.loads((saved / "cfg.json").read_text())["metadata"]
    metadata["sae_core"]["provider"] = {"distribution": "sae-cubic", "version": "0.3"}
    edit_config(saved, architecture="cubic", metadata=metadata)
    with pytest.raises(UnknownNameError, match=r"provided by sae-cubic 0\.3, which is not installed.*pip install"):
        SAE.load(saved)


@pytest.mark.parametrize("version", ["0.3'; rm -rf ~; '", "$(reboot)", "1\n2", ""])
def test_what_a_file_says_of_its_provider_is_never_part_of_a_command(saved: Path, version: str) -> None:
    metadata = json.loads((saved / "cfg.json").read_text())["metadata"]
    metadata["sae_core"]["provider"] = {"distribution": "sae-cubic", "version": version}
    edit_config(saved, architecture="cubic", metadata=metadata)
    with pytest.raises(
        UnknownNameError, match="which is not installed; look for it where the file came from"
    ) as caught:
        SAE.load(saved)
    assert version == "" or version not in str(caught.value).partition("pip install")[2]


@pytest.mark.parametrize("name", ["/etc/passwd", "../up", "a/../../b", "a\\b", ""])
def test_file_names_stay_inside_their_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(FormatError, match="not a relative path"):
        inside(name)
    with pytest.raises(FormatError):
        LocalFiles(tmp_path).path(name)


def test_a_range_of_a_file_is_read_without_the_rest(saved: Path) -> None:
    whole = (saved / "sae_weights.safetensors").read_bytes()
    assert LocalFiles(saved).read_range("sae_weights.safetensors", 8, 20) == whole[8:20]


def test_an_sae_with_nan_is_not_saved_and_the_old_one_stays(saved: Path) -> None:
    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    sae = create("topk", d_in=6, d_sae=12, k=3)
    with torch.no_grad():
        sae.W_enc[0, 0] = torch.nan
    with pytest.raises(FormatError, match="not saved, tensor 'W_enc' holds NaN"):
        sae.save(saved)
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before


def test_saving_onto_a_file_is_refused_and_the_file_stays(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(FormatError, match="it is a file; give a folder"):
        create("topk", d_in=6, d_sae=12, k=3).save(tmp_path / "notes")
    assert (tmp_path / "notes").read_text() == "mine"


def test_saving_into_a_folder_with_other_files_leaves_those_alone(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text("{}")
    create("topk", d_in=6, d_sae=12, k=3).save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cfg.json", "log.jsonl", "sae_weights.safetensors"]


def test_an_unwritable_place_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    with pytest.raises(FormatError, match=r"cannot be written: .*a file where a folder must be.*; choose another path"):
        create("topk", d_in=6, d_sae=12, k=3).save(tmp_path / "plain" / "sae")
    assert [p.name for p in tmp_path.iterdir()] == ["plain"]


def test_the_scale_of_an_expected_average_file_is_asked_for_not_guessed(saved: Path) -> None:
    edit_config(saved, normalize_activations="expected_average_only_in")
    sae = SAE.load(saved)
    with pytest.raises(ConfigError, match="has none yet"):
        sae(X)
    sae.normalization.set_scale(2.0)
    plain = SAE.load(saved)
    plain.normalization.set_scale(1.0)
    torch.testing.assert_close(sae(X), plain(2 * X) / 2)
