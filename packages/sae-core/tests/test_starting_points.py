"""Training starts from what was trained before: an SAE of ours, or a training checkpoint of SAELens."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from sae_core import SAE
from sae_core.config import unstructure
from sae_core.errors import SaeCoreError
from sae_core.run import execute, read_run
from sae_core.training.learner import Learner
from safetensors.torch import load_file, save_file

SAE_LENS = Path(__file__).parent / "golden" / "sae_lens_files"
ROWS = torch.randn(600, 8, generator=torch.Generator().manual_seed(0)).relu()


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    save_file({"activations": ROWS}, tmp_path / "rows.safetensors")
    run = {
        "output": str(tmp_path / "out"),
        "sae": {},
        "source": {"name": "tensor_files", "paths": [str(tmp_path / "rows.safetensors")]},
        "train": {"total_samples": 200, "batch_size": 40, "lr": 1e-3, "init_b_dec": "zeros", "progress_bar": False},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(run))
    return path


def first_weights(run: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[SAE, dict[str, torch.Tensor]]:
    """The SAE of a run, and its tensors as they were before the first step."""
    seen: dict[str, torch.Tensor] = {}
    step = Learner.step

    def watched(self: Learner, batch: Any) -> Any:
        if not self.steps:
            seen.update({name: tensor.clone() for name, tensor in self.sae.state_dict().items()})
        return step(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "step", watched)
        sae = execute(run, overwrite=True).sae
    return sae, seen


@pytest.mark.parametrize("version", ["6.28.0", "6.54.12"])
@pytest.mark.parametrize("case", ["standard", "gated", "jumprelu", "topk_rescale", "batchtopk", "matryoshka_batchtopk"])
def test_a_training_checkpoint_of_saelens_is_where_a_run_starts(
    version: str, case: str, run_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = SAE_LENS / version / f"training_{case}"
    written = json.loads((folder / "cfg.json").read_text())
    tensors = load_file(folder / "sae_weights.safetensors")
    sae, first = first_weights(read_run(run_file, [f"sae.start={folder}"]), monkeypatch)
    assert sae.architecture == written["architecture"]
    config = unstructure(sae.config)
    for name in set(written) & set(config) - {"normalize_activations"}:
        assert config[name] == written[name], name
    assert torch.equal(first["encoder"].T, tensors["W_enc"])
    for name in set(tensors) & set(first):
        assert torch.equal(first[name], tensors[name].to(first[name].dtype)), name
    assert not torch.equal(sae.W_dec, first["W_dec"])  # and training goes on


def test_the_scale_of_its_activations_comes_with_a_checkpoint(
    tmp_path: Path, run_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(SAE_LENS / "6.54.12" / "training_standard", folder)
    config = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps({**config, "normalize_activations": "expected_average_only_in"}))
    (folder / "activation_scaler.json").write_text(json.dumps({"scaling_factor": 2.5, "has_whitening": False}))
    assert SAE.load(folder).normalization.uniform_scale == 2.5
    sae, _ = first_weights(read_run(run_file, [f"sae.start={folder}"]), monkeypatch)
    assert sae.normalization.uniform_scale == 2.5


def test_an_sae_of_ours_is_trained_further_with_other_settings_and_resumes(
    run_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ["sae.architecture=batchtopk", "sae.d_sae=24", "sae.k=3", f"output={tmp_path / 'first'}"]
    before = execute(read_run(run_file, settings)).sae
    monkeypatch.chdir(tmp_path)
    run = read_run(run_file, ["sae.start=first", "sae.k=2"])
    sae, first = first_weights(run, monkeypatch)
    assert sae.config.k == 2  # pyright: ignore[reportAttributeAccessIssue]
    for name, tensor in before.state_dict().items():
        assert torch.equal(first[name], tensor), name
    kept = yaml.safe_load((tmp_path / "out" / "run.yaml").read_text())["sae"]
    assert (kept["start"], kept["k"]) == (str(tmp_path / "first"), 2)
    shutil.rmtree(tmp_path / "first")  # its weights are in the checkpoint
    longer = read_run(tmp_path / "out" / "run.yaml", ["train.total_samples=400"])
    assert execute(longer, resume=True).samples == 400


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["sae.start=START", "sae.d_sae=32"], "do not fit what d_sae asks for"),
        (["sae.start=START", "sae.architecture=topk"], "holds a standard, not a topk"),
        (["sae.start=START", "sae.d_seo=32"], "unknown key 'd_seo'"),
        (["sae.start=nowhere"], "nowhere"),
        (["sae.d_sae=32"], "missing key 'architecture' .or start"),
    ],
)
def test_what_does_not_fit_is_one_error_before_anything_is_written(
    settings: list[str], message: str, run_file: Path, tmp_path: Path
) -> None:
    start = SAE_LENS / "6.54.12" / "training_standard"
    with pytest.raises(SaeCoreError, match=message):
        execute(read_run(run_file, [text.replace("START", str(start)) for text in settings]))
    assert not (tmp_path / "out").exists()
