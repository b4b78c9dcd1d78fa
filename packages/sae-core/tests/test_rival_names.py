"""A stranger's class under a name of the core stays the stranger's, in files, runs and checkpoints."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from sae_core import SAE, TrainConfig, Trainer, create
from sae_core.errors import ConfigError, UnknownNameError
from sae_core.plugins import ArchitectureSpec, get_registry, reset_registry
from sae_core.run import execute, read_run

X = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
CONFIG = TrainConfig(total_samples=128, batch_size=32, progress_bar=False, log_every_steps=1)


def test_a_checkpoint_goes_on_with_the_class_that_it_is_of(tmp_path: Path, rival: type[SAE[Any]]) -> None:
    batches = list(X.split(32)) * 2
    trainer = Trainer(create("sae-rival:topk", d_in=4, d_sae=8, k=2), batches, CONFIG)
    trainer.step(batches[0])
    trainer.save(tmp_path / "checkpoint")
    assert type(Trainer.resume(tmp_path / "checkpoint", batches).sae) is rival


def test_a_checkpoint_whose_package_has_another_name_is_claimed_and_not_stranded(
    tmp_path: Path, rival: type[SAE[Any]]
) -> None:
    batches = list(X.split(32)) * 2
    whole = Trainer(create("sae-rival:topk", d_in=4, d_sae=8, k=2), batches, CONFIG).fit().sae
    part = Trainer(create("sae-rival:topk", d_in=4, d_sae=8, k=2), batches, CONFIG, checkpoints=tmp_path)
    part.callbacks.append(lambda progress: part.stop() if progress.learner.steps == 2 else None)
    part.fit()
    part.checkpoint()
    reset_registry()
    renamed(rival)
    with pytest.raises(UnknownNameError, match=r"comes with sae-rival[\s\S]*Trainer\.resume\(\.\.\., architecture="):
        Trainer.resume(tmp_path, batches)
    resumed = Trainer.resume(tmp_path, batches, architecture="sae-new:sparse").fit().sae
    assert torch.equal(resumed.W_dec, whole.W_dec)


def test_of_several_dictionaries_only_those_of_the_renamed_package_are_claimed(
    tmp_path: Path, rival: type[SAE[Any]]
) -> None:
    batches = list(X.split(32)) * 2
    saes = {"ours": create("topk", d_in=4, d_sae=8, k=2), "theirs": create("sae-rival:topk", d_in=4, d_sae=8, k=2)}
    Trainer(saes, batches, CONFIG).save(tmp_path / "checkpoint")
    with pytest.raises(ConfigError, match="holds nothing of a package that is gone"):
        Trainer.resume(tmp_path / "checkpoint", batches, architecture="sae-rival:topk")
    reset_registry()
    renamed(rival)
    resumed = Trainer.resume(tmp_path / "checkpoint", batches, architecture="sae-new:sparse")
    assert {name: type(each.sae) is rival for name, each in resumed.learners.items()} == {"ours": False, "theirs": True}


def renamed(rival: type[SAE[Any]]) -> None:
    target = f"{rival.__module__}:{rival.__qualname__}"
    get_registry().register(ArchitectureSpec(name="sparse", target=target, summary="A test"), "sae-new")


def run_file(folder: Path) -> Path:
    import numpy

    numpy.save(folder / "x.npy", X.numpy())
    (folder / "run.yaml").write_text(
        f"source: {{name: tensor_files, paths: ['{folder}/x.npy']}}\n"
        "sae: {architecture: 'sae-rival:topk', d_sae: 8, k: 2}\n"
        f"train: {{total_samples: 32, batch_size: 32, progress_bar: false}}\noutput: '{folder}/out'\ndevice: cpu\n"
    )
    return folder / "run.yaml"


def test_a_run_whose_package_has_another_name_goes_on_when_told_so(tmp_path: Path, rival: type[SAE[Any]]) -> None:
    execute(read_run(run_file(tmp_path)))
    reset_registry()
    renamed(rival)
    more = ["sae.architecture=sae-new:sparse", "train.total_samples=64"]
    result = execute(read_run(tmp_path / "out/run.yaml", more), resume=True)
    assert (result.samples, type(result.sae)) == (64, rival)
    assert "architecture: sae-new:sparse" in (tmp_path / "out/run.yaml").read_text()


def test_the_run_file_of_a_run_names_whose_architecture_it_is(tmp_path: Path, rival: type[SAE[Any]]) -> None:
    execute(read_run(run_file(tmp_path)))
    assert "architecture: sae-rival:topk" in (tmp_path / "out/run.yaml").read_text()
    assert type(SAE.load(tmp_path / "out")) is rival


def test_saelenss_names_are_for_the_cores_architectures_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sae_core.architectures.standard import StandardSAE

    module = ModuleType("a_rivals_standard")
    theirs = type("Theirs", (StandardSAE,), {"__module__": module.__name__, "__qualname__": "Theirs"})
    monkeypatch.setitem(sys.modules, module.__name__, module)
    module.__dict__["Theirs"] = theirs
    get_registry().register(ArchitectureSpec(name="standard", target="a_rivals_standard:Theirs"), "sae-rival")
    try:
        sae = create("sae-rival:standard", d_in=4, d_sae=8, d_out=4)
        assert json.loads((sae.save(tmp_path / "sae") / "cfg.json").read_text())["architecture"] == "standard"
        loaded = SAE.load(tmp_path / "sae")
        assert type(loaded) is theirs
        assert loaded.d_out == 4
    finally:
        reset_registry()
