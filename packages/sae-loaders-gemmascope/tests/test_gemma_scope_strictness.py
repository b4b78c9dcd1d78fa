"""Gemma Scope's files, damaged in each way: refused with the name of what is wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from sae_core import SAE
from sae_core.errors import ConfigError, FormatError
from sae_core.format.files import LocalFiles
from sae_core.format.read import read_sae
from sae_core.plugins import get_registry
from sae_core.protocols import Loader
from safetensors.torch import load_file, save_file
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden/foreign"
pytestmark = pytest.mark.filterwarnings("ignore:.*decoders added up:UserWarning")


class Specimen:
    """A copy of a golden case, in a folder called like its repository."""

    def __init__(self, name: str, tmp_path: Path) -> None:
        self.case = json.loads((GOLDEN / name / "case.json").read_text())
        self.root = tmp_path / self.case["repository"]
        shutil.copytree(GOLDEN / name / "files", self.root)
        self.source = LocalFiles(self.root)
        self.weights = next(path for path in self.root.rglob("*") if path.suffix in (".npz", ".safetensors"))

    def load(self, **facts: Any) -> SAE:
        return read_sae(self.source, self.case["path"], format=self.case["loader"], overrides=facts or None)

    def loader(self) -> Loader:
        return cast("Loader", get_registry().resolve("loader", self.case["loader"])())

    def tensors(self) -> dict[str, Tensor]:
        if self.weights.suffix == ".safetensors":
            return {name: tensor.clone() for name, tensor in load_file(self.weights).items()}
        with np.load(self.weights) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}

    def write(self, tensors: dict[str, Tensor]) -> None:
        if self.weights.suffix == ".safetensors":
            save_file(tensors, self.weights)
        else:
            cast("Any", np.savez)(self.weights, **{name: tensor.numpy() for name, tensor in tensors.items()})


@pytest.fixture(params=sorted(folder.name for folder in GOLDEN.iterdir()))
def specimen(request: pytest.FixtureRequest, tmp_path: Path) -> Specimen:
    return Specimen(request.param, tmp_path)


def outputs(sae: SAE) -> tuple[Tensor, Tensor]:
    x = torch.randn(5, sae.d_in, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return sae.encode(x), sae(x)


def test_missing_extra_and_misshapen_tensors_are_refused_by_name(specimen: Specimen):
    whole = specimen.tensors()
    for name, tensor in whole.items():
        for damaged in (
            {other: value for other, value in whole.items() if other != name},
            whole | {name: torch.repeat_interleave(tensor, 2, dim=1 if "enc" in name and tensor.dim() > 1 else 0)},
        ):
            specimen.write(damaged)
            with pytest.raises(FormatError) as refusal:
                specimen.load()
            assert "shape" in str(refusal.value) or name in str(refusal.value)
    specimen.write(whole | {"surprise": torch.ones(2)})
    with pytest.raises(FormatError, match="surprise"):
        specimen.load()


def test_values_that_are_not_finite_and_truncated_files_are_refused(specimen: Specimen):
    data = specimen.weights.read_bytes()
    for length in (0, len(data) // 2, len(data) - 1):
        specimen.weights.write_bytes(data[:length])
        with pytest.raises(FormatError):
            specimen.load()
    specimen.weights.write_bytes(data)
    tensors = specimen.tensors()
    tensors["threshold"][4] = float("inf")
    specimen.write(tensors)
    with pytest.raises(FormatError, match=r"'threshold' holds 1 values that are NaN or infinite"):
        specimen.load()


def test_rows_loads_some_latents_with_the_values_they_have_among_all(specimen: Specimen):
    whole, rows = specimen.load(), [7, 0, 2]
    some = read_sae(specimen.source, specimen.case["path"], format=specimen.case["loader"], rows=rows)
    torch.testing.assert_close(outputs(some)[0], outputs(whole)[0][:, rows], rtol=0, atol=1e-6)
    assert torch.equal(some.W_dec, whole.W_dec[rows])


class Counting:
    """A source that counts the bytes of weights that were asked for, and refuses to hand out the whole file."""

    def __init__(self, specimen: Specimen) -> None:
        self._files = specimen.source
        self._weights = specimen.weights.relative_to(specimen.root).as_posix()
        self.ranges = 0

    @property
    def location(self) -> str:
        return self._files.location

    def files(self) -> Sequence[str]:
        return self._files.files()

    def exists(self, name: str) -> bool:
        return self._files.exists(name)

    def path(self, name: str) -> Path:
        assert name != self._weights, "the config alone must not fetch the weights"
        return self._files.path(name)

    def read_range(self, name: str, start: int, stop: int) -> bytes:
        self.ranges += stop - start
        return self._files.read_range(name, start, stop)


def test_the_config_alone_comes_from_a_few_kilobytes(specimen: Specimen):
    whole = specimen.loader().load(specimen.source, specimen.case["path"])
    source = Counting(specimen)
    alone = specimen.loader().load(source, specimen.case["path"], weights=False)
    assert (alone.architecture, alone.config, alone.metadata) == (whole.architecture, whole.config, whole.metadata)
    assert alone.tensors == {}
    assert source.ranges < 6000


@pytest.fixture
def gemma_2(tmp_path: Path) -> Specimen:
    return Specimen("gemma_2", tmp_path)


@pytest.fixture
def gemma_3(tmp_path: Path) -> Specimen:
    return Specimen("gemma_3", tmp_path)


def test_a_compressed_archive_loads_too(gemma_2: Specimen):
    expected, whole = outputs(gemma_2.load()), gemma_2.tensors()
    cast("Any", np.savez_compressed)(gemma_2.weights, **{name: tensor.numpy() for name, tensor in whole.items()})
    assert all(map(torch.equal, outputs(gemma_2.load()), expected))
    config = gemma_2.loader().load(gemma_2.source, gemma_2.case["path"], weights=False).config
    assert config["d_sae"] == 24


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda W: np.array([{"a": 1}, None], dtype=object), "never unpickled"),
        (np.asfortranarray, "Fortran order"),
        (lambda W: W.astype(">f4"), "unsupported dtype"),
        (lambda W: W.astype("complex64"), "unsupported dtype"),
        (lambda W: W.astype("int32"), "int32"),
    ],
)
def test_arrays_that_are_not_plain_floats_are_refused(
    gemma_2: Specimen, spoil: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]], said: str
):
    arrays = {name: tensor.numpy() for name, tensor in gemma_2.tensors().items()}
    name = "w_dec" if "w_dec" in arrays else "W_dec"
    cast("Any", np.savez)(gemma_2.weights, **(arrays | {name: spoil(arrays[name])}))
    with pytest.raises(FormatError, match=said):
        gemma_2.load()


@pytest.mark.parametrize("name", ["moved", "embedding/width_4k/average_l0_6", "layer_0", "my-transcoder", "embedding"])
def test_a_folder_of_any_name_outside_the_published_repository_needs_the_callers_word(
    gemma_2: Specimen, tmp_path: Path, name: str
):
    target = tmp_path / name / "params.npz"
    target.parent.mkdir(parents=True)
    shutil.copy(gemma_2.weights, target)
    with pytest.raises(
        FormatError, match=r"several formats fit: .*gemma_2, .*gemma_2_transcoder; name one with format="
    ):
        SAE.load(target.parent)
    with pytest.raises(FormatError, match="fact embedding"):
        SAE.load(target.parent, format="gemma_2")
    plain = SAE.load(target.parent, format="gemma_2", overrides={"embedding": False})
    assert all(map(torch.equal, outputs(plain), outputs(gemma_2.load())))
    embedding = SAE.load(target.parent, format="gemma_2", overrides={"embedding": True})
    torch.testing.assert_close(embedding.W_dec, plain.W_dec * 8**0.5)
    assert "dataset_path" not in plain.metadata
    with pytest.raises(ConfigError, match="'embedding' is 'yes', expected bool"):
        SAE.load(target.parent, format="gemma_2", overrides={"embedding": "yes"})


@pytest.mark.parametrize("place", ["{0}@abc", "models--google--{0}/snapshots/0a1b"])
def test_the_published_names_count_on_the_hub_and_in_its_cache(tmp_path: Path, place: str):
    case = Specimen("gemma_2_embedding", tmp_path / "original")
    target = tmp_path / place.format("gemma-scope-2b-pt-res") / case.case["path"] / "params.npz"
    target.parent.mkdir(parents=True)
    shutil.copy(case.weights, target)
    assert all(map(torch.equal, outputs(SAE.load(target.parent)), outputs(case.load())))


def test_names_follow_from_the_repository_and_the_path(gemma_2: Specimen):
    metadata = gemma_2.load().metadata
    assert metadata["model_name"] == "google/gemma-2-2b"
    assert metadata["hook_name"] == "blocks.3.hook_resid_post"
    assert metadata["hf_hook_name"] == "model.layers.3"
    assert gemma_2.load(hook_name="mine").metadata["hook_name"] == "mine"


def edit_config(specimen: Specimen, **changes: Any) -> None:
    path = next(specimen.root.rglob("config.json"))
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"frobnicate": 1}, r"unknown key 'frobnicate' \(known: affine_connection, architecture"),
        ({"architecture": "topk"}, "only 'jump_relu' can be loaded"),
        ({"width": 25}, "shape"),
        ({"type": "crosscoder"}, "crosscoders of Gemma Scope 2"),
    ],
)
def test_configs_of_gemma_scope_2_that_do_not_fit_are_refused(gemma_3: Specimen, changes: dict[str, Any], said: str):
    edit_config(gemma_3, **changes)
    with pytest.raises(FormatError, match=said):
        gemma_3.load()


def test_an_affine_connection_that_is_announced_must_be_there_and_the_other_way_round(tmp_path: Path):
    plain = Specimen("gemma_3_transcoder", tmp_path / "plain")
    edit_config(plain, affine_connection=True)
    with pytest.raises(FormatError, match="no affine_skip_connection here"):
        plain.load()
    affine = Specimen("gemma_3_affine", tmp_path / "affine")
    edit_config(affine, affine_connection=False)
    with pytest.raises(FormatError, match="there is an affine_skip_connection"):
        affine.load()


@pytest.mark.parametrize("name", ["moved", "transcoder/layer_5", "attn_out", "clt_affine"])
def test_a_folder_without_config_of_any_name_needs_the_callers_word(gemma_3: Specimen, tmp_path: Path, name: str):
    target = tmp_path / name / "params.safetensors"
    target.parent.mkdir(parents=True)
    shutil.copy(gemma_3.weights, target)
    with pytest.raises(FormatError, match="its kind is unknown; load with the fact site"):
        SAE.load(target.parent)
    told = SAE.load(target.parent, overrides={"site": "resid_post"})
    assert told.architecture == "jumprelu"
    assert all(map(torch.equal, outputs(told), outputs(gemma_3.load())))
    with pytest.raises(ConfigError, match="the fact site is 'here'; known: resid_post"):
        SAE.load(target.parent, overrides={"site": "here"})


def test_hook_points_of_gemma_scope_2_are_spelt_as_check_reads_them(gemma_3: Specimen):
    assert gemma_3.load().metadata["hf_hook_name"] == "model.layers.13"
    edit_config(gemma_3, hf_hook_point_in="model.layers.4.self_attn.o_proj.input")
    attention = gemma_3.load()
    assert attention.metadata["hf_hook_name"] == "model.layers.4.self_attn.o_proj:input"
    assert attention.metadata["hook_name"] == "blocks.4.attn.hook_z"
    assert attention.config.reshape_activations == "hook_z"
