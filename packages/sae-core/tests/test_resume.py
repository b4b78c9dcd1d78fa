"""A run that stops anywhere and goes on from a checkpoint is, bit for bit, the run that did not stop."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sae_core import ActivationBatch, TrainConfig, Trainer, create
from sae_core.config import structure
from sae_core.data.tensor_files import TensorFiles, TensorFilesConfig
from sae_core.errors import ConfigError, DataError, FormatError
from sae_core.training.checkpoint import read_checkpoint, write_checkpoint
from sae_core.training.loggers import JsonlConfig, JsonlLogger

D_IN, D_SAE, SIZE, STEPS = 8, 24, 40, 30
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "topk": {"k": {"from": 5, "to": 2, "over": 0.6}, "normalize_activations": "expected_average_only_in"},
    "batchtopk": {"k": 3},
    "matryoshka_batchtopk": {"k": 3, "matryoshka_widths": [6, 12], "normalize_activations": "covariance_whitening"},
    "jumprelu": {"l0_coefficient": 0.01, "pre_act_loss_coefficient": 0.001},
    "gated": {"l1_coefficient": 0.1},
    "standard": {"l1_coefficient": 0.05, "normalize_activations": "layer_norm"},
    "matching_pursuit": {"max_iterations": 3},
    "temporal": {"kval_topk": 3, "n_heads": 2, "bottleneck_factor": 2},
}


def data(steps: int = STEPS, width: int = D_IN, seed: int = 1) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(SIZE, width, generator=random).relu() for _ in range(steps)]


def config(**changes: Any) -> TrainConfig:
    settings: dict[str, Any] = {
        "total_samples": SIZE * STEPS, "batch_size": SIZE, "lr": 3e-3, "log_every_steps": 7, "init_samples": 100,
        "dead_after_samples": 2 * SIZE, "dead_refresh_steps": 4, "lr_warmup_samples": 0.2, "lr_decay_samples": 200,
        "progress_bar": False, **changes,
    }  # fmt: skip
    return TrainConfig(**settings)


def dictionary(architecture: str = "topk", seed: int = 3) -> Any:
    return create(architecture, d_in=D_IN, d_sae=D_SAE, seed=seed, **ARCHITECTURES[architecture])


def until(step: int) -> Any:
    def callback(progress: Any) -> None:
        if progress.trainer.steps == step:
            progress.trainer.stop()

    return callback


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_goes_on_with_the_same_bits_wherever_it_stopped(architecture: str, tmp_path: Path) -> None:
    sequences = dictionary(architecture).reads_sequences

    def batches() -> list[torch.Tensor]:
        return [rows.unflatten(0, (-1, 5)) if sequences else rows for rows in data()]

    whole = Trainer(dictionary(architecture), batches(), config())
    whole.fit()
    assert any(record["dead_fraction"] is not None for record in whole.history)
    for step in (1, 13, 14, STEPS):
        first = Trainer(dictionary(architecture), batches(), config(), [until(step)])
        first.fit()
        assert (first.steps, first.stopped) == (step, True)
        resumed = Trainer.resume(first.save(tmp_path / str(step)), batches())
        if step < STEPS:
            result = resumed.fit()
            assert result.history == whole.history
            assert same(resumed.state_dict(), whole.state_dict())
            assert same(result.sae.metadata, whole.sae.metadata)
        assert not resumed.sae.training or step == STEPS


def test_pairs_of_a_transcoder_stay_pairs_over_a_resume(tmp_path: Path) -> None:
    def pairs() -> list[ActivationBatch]:
        return [ActivationBatch(x, x.sin()[:, :5]) for x in data()]

    def transcoder() -> Any:
        return create("topk", d_in=D_IN, d_out=5, skip=True, d_sae=D_SAE, k=3, seed=1)

    whole = Trainer(transcoder(), pairs(), config())
    whole.fit()
    first = Trainer(transcoder(), pairs(), config(), [until(11)])
    first.fit()
    resumed = Trainer.resume(first.save(tmp_path / "c"), pairs())
    resumed.fit()
    assert same(resumed.state_dict(), whole.state_dict())


STATE_PARTS = ["optimizer", "window", "silent_samples", "dead", "samples", "steps"]


def half_silent() -> Any:
    sae = dictionary()
    with torch.no_grad():
        sae.b_enc[12:] = -1.0
    return sae


@pytest.mark.parametrize("part", [*STATE_PARTS, "stream.source", "stream.ahead"])
def test_every_part_of_the_state_is_needed(part: str, tmp_path: Path) -> None:
    whole = Trainer(half_silent(), data(), config())
    whole.fit()
    first = Trainer(half_silent(), data(), config(), [until(2 if part == "stream.ahead" else 13)])
    first.fit()
    state = copy.deepcopy(read_checkpoint(first.save(tmp_path / "c")))
    fresh = Trainer(half_silent(), data(), config()).state_dict()
    if part.startswith("stream."):
        key = part.removeprefix("stream.")
        assert not same(state["stream"][key], fresh["stream"][key])
        state["stream"][key] = fresh["stream"][key]
    else:
        assert not same(state["learners"][""][part], fresh["learners"][""][part])
        state["learners"][""][part] = fresh["learners"][""][part]
    resumed = Trainer.resume(write_checkpoint(tmp_path / "d", state), data())
    resumed.fit()
    assert not same(resumed.state_dict()["learners"], whole.state_dict()["learners"])


def tensor_files(tmp_path: Path, **changes: Any) -> TensorFiles:
    path = tmp_path / "rows.npy"
    if not path.exists():
        np.save(path, torch.cat(data(10)).numpy())
    return TensorFiles(structure({"paths": [str(path)], "epochs": 4, "seed": 5, **changes}, TensorFilesConfig))


@pytest.mark.parametrize("shuffle", [True, False])
def test_rows_of_files_go_on_in_the_order_they_had(tmp_path: Path, shuffle: bool) -> None:
    source = tensor_files(tmp_path, shuffle=shuffle)
    whole = list(source.batches(70))
    for stop in range(len(whole) + 1):
        before = source.batches(70)
        for _ in range(stop):
            next(before)
        after = source.batches(70)
        after.load_state_dict(before.state_dict())
        assert same(list(after), whole[stop:])
        assert list(before) is not None


def test_a_run_on_files_goes_on_with_the_same_log(tmp_path: Path) -> None:
    def trainer(name: str, *callbacks: Any) -> Trainer:
        loggers = [JsonlLogger(JsonlConfig(path=tmp_path / name))]
        return Trainer(dictionary("batchtopk"), tensor_files(tmp_path), config(), callbacks, loggers)

    whole = trainer("whole.jsonl")
    whole.fit()
    first = trainer("log.jsonl", until(13))
    first.fit()
    folder = first.save(tmp_path / "c")
    first.callbacks.clear()
    first.fit()  # what this logs after the checkpoint was taken is cut off again
    loggers = [JsonlLogger(JsonlConfig(path=tmp_path / "log.jsonl"))]
    resumed = Trainer.resume(folder, tensor_files(tmp_path), loggers=loggers)
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 1
    resumed.fit()
    assert (tmp_path / "log.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert same(resumed.state_dict(), whole.state_dict())


def test_a_log_that_is_shorter_than_at_the_checkpoint_is_another_runs_log(tmp_path: Path) -> None:
    first = Trainer(
        dictionary(), data(), config(), [until(13)], [JsonlLogger(JsonlConfig(path=tmp_path / "log.jsonl"))]
    )
    first.fit()
    folder = first.save(tmp_path / "c")
    first.loggers[""][0].close()
    (tmp_path / "log.jsonl").write_text("")
    with pytest.raises(FormatError, match="it is not that run's log"):
        Trainer.resume(folder, data(), loggers=[JsonlLogger(JsonlConfig(path=tmp_path / "log.jsonl"))])


def saved(tmp_path: Path, source: Any = None) -> Path:
    trainer = Trainer(dictionary(), data() if source is None else source, config(), [until(5)])
    trainer.fit()
    return trainer.save(tmp_path / "c")


def test_another_source_another_config_and_other_versions_are_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = saved(tmp_path, tensor_files(tmp_path))
    with pytest.raises(ConfigError, match=r"source\.config\.seed was 5, is now 6"):
        Trainer.resume(files, tensor_files(tmp_path, seed=6))
    with pytest.raises(ConfigError, match=r"source\.class was '.*TensorFiles', is now 'builtins.list'"):
        Trainer.resume(files, data())
    with pytest.raises(ConfigError, match=r"adam_beta1 was 0\.9, is now 0\.5.*force"):
        Trainer.resume(files, tensor_files(tmp_path), config(adam_beta1=0.5))
    monkeypatch.setattr("sae_core.__version__", "99.0")
    with pytest.raises(ConfigError, match=r"sae-core was '0\.1\.0', is now '99\.0'"):
        Trainer.resume(files, tensor_files(tmp_path))
    assert Trainer.resume(files, tensor_files(tmp_path), force=True).samples == 5 * SIZE


def test_what_may_change_may_change(tmp_path: Path) -> None:
    path = saved(tmp_path)
    longer = config(total_samples=SIZE * STEPS * 2, lr=1e-3, log_every_steps=3, keep_last=9, lr_decay_samples=0)
    resumed = Trainer.resume(path, data(), longer)
    assert resumed.fit().samples == SIZE * STEPS
    assert resumed.optimizer.param_groups[0]["lr"] == 1e-3


def test_another_dictionary_is_refused(tmp_path: Path) -> None:
    state = read_checkpoint(saved(tmp_path))
    other = Trainer(create("topk", d_in=D_IN, d_sae=D_SAE, k=4, seed=3), data(), config())
    with pytest.raises(ConfigError, match=r"sae\.k was .*, is now 4"):
        other.load_state_dict(state)
    named = Trainer({"a": dictionary()}, data(), config())
    with pytest.raises(ConfigError, match="holds the SAEs"):
        named.load_state_dict(state)


def test_a_source_without_a_place_can_be_trained_on_but_is_not_resumed_unless_forced(tmp_path: Path) -> None:
    def generator() -> Iterator[torch.Tensor]:
        yield from data()

    path = saved(tmp_path, generator())
    with pytest.raises(ConfigError, match=r"the source's place was not saved.*force"):
        Trainer.resume(path, generator())
    assert Trainer.resume(path, generator(), force=True).fit().samples == STEPS * SIZE


def test_a_sequence_of_another_length_is_another_source(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"source\.batches was 30, is now 29"):
        Trainer.resume(saved(tmp_path), data()[:-1])


def test_files_that_grew_are_another_source(tmp_path: Path) -> None:
    path = saved(tmp_path, tensor_files(tmp_path))
    np.save(tmp_path / "rows.npy", torch.cat(data(11)).numpy())
    with pytest.raises(ConfigError, match=r"fingerprint was '400 rows.*is now '440 rows"):
        Trainer.resume(path, tensor_files(tmp_path))
    with pytest.raises(DataError, match="hold 440 rows; 400 when"):
        Trainer.resume(path, tensor_files(tmp_path), force=True)


def test_checkpoints_are_written_as_often_as_asked_and_change_nothing(tmp_path: Path) -> None:
    whole = Trainer(dictionary(), data(), config())
    whole.fit()
    folder = tmp_path / "checkpoints"
    every = config(checkpoint_every_samples=0.2, keep_last=3)
    Trainer(dictionary(), data(), every, checkpoints=folder).fit()
    assert sorted(path.name for path in folder.iterdir()) == [f"{SIZE * step:012d}" for step in (18, 24, 30)]
    (folder / f"{SIZE * 30:012d}" / "tensors.safetensors").write_bytes(b"damaged")
    resumed = Trainer.resume(folder, data())
    assert resumed.samples == SIZE * 24
    resumed.fit()
    assert same(resumed.sae.state_dict(), whole.sae.state_dict())
    assert resumed.history == whole.history


def test_checkpoints_by_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 10**6, 61))
    monkeypatch.setattr("sae_core.training.trainer.time.monotonic", lambda: next(clock))
    trainer = Trainer(dictionary(), data(), config(checkpoint_every_minutes=1.0), checkpoints=tmp_path)
    trainer.fit()
    assert len(list(tmp_path.iterdir())) == 2


def test_a_checkpoint_policy_without_a_folder_is_refused() -> None:
    with pytest.raises(ConfigError, match="checkpoint_every_samples: give the folder"):
        Trainer(dictionary(), data(), config(checkpoint_every_samples=100))
    with pytest.raises(ConfigError, match="no folder for checkpoints"):
        Trainer(dictionary(), data(), config()).checkpoint()


def test_there_is_nothing_to_resume_in_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="no checkpoint there"):
        Trainer.resume(tmp_path, data())
