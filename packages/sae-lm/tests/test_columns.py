"""Models that read columns of a data set instead of text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_core import SAE
from sae_core.cli import main
from sae_core.config import structure
from sae_core.errors import ConfigError, DataError
from sae_core.protocols import ActivationBatch, ActivationSource, HasMetadata, HasTargets, Resumable
from sae_core.testing import run_checks
from sae_lm.columns import ColumnsConfig, HuggingFaceColumns
from torch import Tensor, nn

datasets: Any = pytest.importorskip("datasets")
PATCHES = 17  # 4 x 4 and a class token


@pytest.fixture(scope="module")
def vit() -> Any:
    from transformers import ViTConfig, ViTModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ViTModel(
            ViTConfig(
                hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24, image_size=16, patch_size=4
            )
        ).eval()  # fmt: skip


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    values = torch.randn(30, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    features = datasets.Features(
        {"pixel_values": datasets.Array3D((3, 16, 16), "float32"), "label": datasets.Value("int64")}
    )
    datasets.Dataset.from_dict(
        {"pixel_values": values.numpy(), "label": list(range(30))}, features=features
    ).save_to_disk(folder / "set")
    return folder / "set"


def test_it_passes_the_conformance_kit(vit: Any, pictures: Path, tmp_path: Path) -> None:
    vit.save_pretrained(tmp_path / "vit")
    config = {
        "model": str(tmp_path / "vit"), "hook": "layers.1", "inputs": {"pixel_values": "pixel_values"}, "batch_rows": 4,
        "buffer_rows": 200, "data": {"path": str(pictures)}, "held_out": 0.2, "device": "cpu",
    }  # fmt: skip
    assert [
        result for result in run_checks("source", "sae-lm:huggingface_columns", config=config) if not result.ok
    ] == []


@pytest.fixture
def make(vit: Any, pictures: Path) -> Callable[..., HuggingFaceColumns]:
    def source(model: nn.Module | None = None, **changes: Any) -> HuggingFaceColumns:
        settings = {
            "model": "tiny-vit", "hook": "layers.1", "inputs": {"pixel_values": "pixel_values"}, "batch_rows": 4,
            "buffer_rows": 200, "data": {"path": str(pictures)}, "held_out": 0.2, **changes,
        }  # fmt: skip
        return HuggingFaceColumns(structure(settings, ColumnsConfig), model=model or vit)

    return source


def pixels(pictures: Path) -> Tensor:
    return torch.tensor(datasets.load_from_disk(pictures)["pixel_values"][:])


def rows_of(tensors: list[Any]) -> list[tuple[float, ...]]:
    return sorted(tuple(round(value, 4) for value in row) for row in torch.cat(tensors).tolist())


def test_patches_of_pictures_are_the_hidden_states_that_transformers_reports(
    make: Callable[..., HuggingFaceColumns], vit: Any, pictures: Path
) -> None:
    source = make(held_out=0.0, exclude_first=1)
    assert isinstance(source, ActivationSource)
    assert isinstance(source, HasMetadata)
    assert isinstance(source, HasTargets)
    assert source.sites == {"layers.1": 16}
    with torch.no_grad():
        expected = vit(pixels(pictures), output_hidden_states=True).hidden_states[2]
    assert expected.shape == (30, PATCHES, 16)
    batches = list(source.batches(16))
    assert all(isinstance(batch, Tensor) and batch.shape == (16, 16) for batch in batches)
    assert rows_of(batches) == rows_of([expected[:, 1:].flatten(0, 1)])


def test_transcoders_get_pairs_and_several_places_lie_side_by_side(make: Callable[..., HuggingFaceColumns]) -> None:
    source = make(hook=None, reads=["layers.0", "layers.1.mlp:input"], writes=["layers.1.mlp"])
    assert dict(source.sites) == {"layers.0": 16, "layers.1.mlp:input": 16}
    assert dict(source.target_sites) == {"layers.1.mlp": 16}
    batch = next(source.batches(8))
    assert isinstance(batch, ActivationBatch)
    assert batch.targets is not None
    assert (batch.inputs.shape, batch.targets.shape) == ((8, 32), (8, 16))


def test_held_out_rows_are_trained_on_by_nobody(make: Callable[..., HuggingFaceColumns]) -> None:
    source = make(batch_rows=1)
    held_out = rows_of([batch.inputs for batch in source.held_out_batches()])
    trained = rows_of(list(make(batch_rows=1).batches(1)))
    assert 0 < len(held_out) < len(trained)
    assert not set(held_out) & set(trained)
    assert len(held_out) + len(trained) == 30 * PATCHES


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("taken", [0, 3, 20])
def test_batches_go_on_exactly_where_they_were_saved(
    make: Callable[..., HuggingFaceColumns], pictures: Path, tmp_path: Path, taken: int, streaming: bool
) -> None:
    changes: dict[str, Any] = {"epochs": 2}
    if streaming:
        datasets.load_from_disk(pictures).to_parquet(tmp_path / "pictures.parquet")
        changes["data"] = {"path": "parquet", "data_files": [str(tmp_path / "pictures.parquet")], "streaming": True}
    batches = make(**changes).batches(16)
    assert isinstance(batches, Resumable)
    for _ in range(taken):
        next(batches)
    state = batches.state_dict()
    rest = list(batches)
    again = make(**changes).batches(16)
    again.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(again, rest, strict=True))  # pyright: ignore[reportArgumentType]
    assert len(rest) > 20


class Sound(nn.Module):
    """Frames of sound through a convolution: (rows, channels, frames), half as many frames."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv1d(6, 10, 2, stride=2), nn.Identity()

    def forward(self, features: Tensor, attention_mask: Tensor) -> Tensor:
        return self.last(self.conv(features) * attention_mask.unsqueeze(1))


def test_masked_positions_and_channels_that_come_first(make: Callable[..., HuggingFaceColumns], tmp_path: Path) -> None:
    model = Sound().eval()
    features = torch.randn(8, 6, 12, generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(6) < torch.arange(1, 9).clamp_max(6).unsqueeze(1)).long()
    kinds = datasets.Features(
        {"features": datasets.Array2D((6, 12), "float32"), "kept": datasets.Sequence(datasets.Value("int64"))}
    )
    datasets.Dataset.from_dict({"features": features.numpy(), "kept": mask.tolist()}, features=kinds).save_to_disk(
        tmp_path / "sound"
    )
    source = make(
        model, hook="conv", inputs={"features": "features", "attention_mask": "kept"}, mask="kept", channels="first",
        data={"path": str(tmp_path / "sound")}, held_out=0.0, batch_rows=3,
    )  # fmt: skip
    with torch.no_grad():
        expected = model.conv(features).transpose(1, 2)[mask.bool()]
    assert source.d_in == 10
    assert rows_of(list(source.batches(1))) == rows_of([expected])


def test_an_sae_of_pictures_is_trained_and_evaluated_from_the_command_line(
    vit: Any, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vit.save_pretrained(tmp_path / "vit")
    run = {
        "output": str(tmp_path / "out"), "sae": {"architecture": "topk", "d_sae": 64, "k": 8},
        "source": {
            "name": "huggingface_columns", "model": str(tmp_path / "vit"), "hook": "layers.1", "device": "cpu",
            "inputs": {"pixel_values": "pixel_values"}, "data": {"path": str(pictures)}, "held_out": 0.2, "exclude_first": 1,
            "batch_rows": 4, "buffer_rows": 300, "on_exhausted": "cycle",
        },
        "train": {"total_samples": 8192, "batch_size": 128, "lr": 0.003, "progress_bar": False},
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(json.dumps(run))
    assert main(["train", str(tmp_path / "run.yaml")]) == 0
    assert SAE.load(tmp_path / "out").metadata["hook_name"] == "layers.1"
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "out"), "--device", "cpu", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    sae, random = result["candidates"]["sae"], result["candidates"]["random"]
    assert sae["explained_variance"] > random["explained_variance"]
    assert result["data"].endswith("rows held out from training")
    assert result["activations"] % (PATCHES - 1) == 0
    assert main(["eval", str(tmp_path / "out"), "--text", "x.txt"]) == 1
    assert "this one reads columns of a data set" in capsys.readouterr().err
    assert main(["lm", "study", str(tmp_path / "out")]) == 1
    assert "trained on columns of a data set" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"inputs": {"pixel_values": "pixels"}}, DataError, "no column 'pixels'; did you mean 'pixel_values'"),
        ({"inputs": {}}, ConfigError, "name at least one argument"),
        ({"hook": "layers.9"}, ConfigError, r"no module 'layers\.9'"),
        ({"hook": "second/layers.1"}, ConfigError, "there is no second model here"),
        ({"buffer_rows": 70}, ConfigError, "buffer_rows: 70 cannot hold a batch of 8 beside the 68"),
        ({"data": {"path": "./nowhere"}}, DataError, "data: there is no folder"),
        ({"exclude_last": -1}, ConfigError, "exclude_last must not be negative"),
        ({"exclude_first": 99}, DataError, "gives no position to train on"),
        ({"held_out": 1e-9}, DataError, "none of the rows"),
        ({"mask": "label"}, DataError, r"the mask 'label' has shape \(1,\), the activations \(1, 17\)"),
    ],
)
def test_what_cannot_be_done_is_one_clear_error(
    make: Callable[..., HuggingFaceColumns], changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        next(make(**changes).batches(8))


def test_rows_that_are_null_or_of_another_shape_are_named(
    make: Callable[..., HuggingFaceColumns], tmp_path: Path
) -> None:
    rows = [[[0.0] * 4] * 3, [[1.0] * 4] * 3, [[1.0] * 4] * 2, None]
    datasets.Dataset.from_dict({"x": rows}).save_to_disk(tmp_path / "rows")
    changes = {"inputs": {"input": "x"}, "hook": "0", "data": {"path": str(tmp_path / "rows")}, "held_out": 0.0}
    model = nn.Sequential(nn.Linear(4, 5)).eval()
    with pytest.raises(
        DataError, match=r"row 2: column 'x' has shape \(2, 4\), row 0 \(3, 4\); make them alike, or set batch"
    ):
        list(make(model, **changes, batch_rows=3).batches(1))
    with pytest.raises(DataError, match="row 3: column 'x' holds null"):
        list(make(model, **changes, batch_rows=1).batches(1))
