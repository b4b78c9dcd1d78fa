"""The runner: everything that its config says happens, or is refused with the reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_core import SAE, create
from sae_core.config import value_at
from sae_core.errors import ConfigError, FormatError
from sae_synthetic import (
    RUNNER_CONFIG_FILENAME,
    ConstantFiringProbabilityConfig,
    SyntheticModel,
    SyntheticModelConfig,
    SyntheticSAERunner,
    SyntheticSAERunnerConfig,
)

WORLD = SyntheticModelConfig(
    num_features=12,
    hidden_dim=8,
    firing_probability=ConstantFiringProbabilityConfig(0.15),
    std_firing_magnitudes=0.1,
    seed=0,
)
TOPK = {"architecture": "topk", "d_sae": 12, "k": 2}


def _config(**settings: Any) -> SyntheticSAERunnerConfig:
    defaults: dict[str, Any] = {
        "synthetic_model": WORLD,
        "sae": TOPK,
        "training_samples": 4000,
        "batch_size": 100,
        "eval_samples": 500,
        "output_path": None,
    }
    return SyntheticSAERunnerConfig(**{**defaults, **settings})


def test_a_run_writes_everything_that_was_asked_for(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    config = _config(
        output_path=str(tmp_path / "out"),
        checkpoint_path=str(tmp_path / "checkpoints"),
        n_checkpoints=3,
        save_final_checkpoint=True,
        save_synthetic_model=True,
        eval_frequency=20,
        logger={"name": "jsonl", "path": str(log)},
        lr=1e-2,
    )
    result = SyntheticSAERunner(config).run()
    assert result.output_path == tmp_path / "out"
    assert sorted(int(each.name) for each in (tmp_path / "checkpoints").iterdir()) == [1000, 2000, 3000, 4000]
    saved = SAE.load(tmp_path / "out")
    x = result.synthetic_model.sample(20)
    torch.testing.assert_close(saved(x), result.sae(x))
    early, late = (SAE.load(tmp_path / "checkpoints" / name) for name in ("1000", "4000"))
    assert float((early(x) - saved(x)).detach().abs().max()) > 0.01
    assert torch.equal(late(x), saved(x))
    for folder in (tmp_path / "out", tmp_path / "checkpoints" / "1000"):
        written = json.loads((folder / RUNNER_CONFIG_FILENAME).read_text())
        assert SyntheticSAERunnerConfig.from_dict(written) == config
    assert result.final_eval is not None
    assert json.loads((tmp_path / "out" / "eval_stats.json").read_text()) == result.final_eval.to_dict()
    assert result.final_eval.num_samples == 500
    assert list(result.evaluations) == [20, 40]
    assert result.evaluations[40].mcc == result.final_eval.mcc > result.evaluations[20].mcc
    world = SyntheticModel.load_from_disk(tmp_path / "out" / "synthetic_model")
    assert torch.equal(world.feature_dict.feature_vectors, result.synthetic_model.feature_dict.feature_vectors)
    records = [json.loads(line) for line in log.read_text().splitlines()]
    assert [record["step"] for record in records if "synthetic/mcc" in record] == [20, 40]
    assert result.history


def test_a_world_or_an_sae_may_be_given_instead(tmp_path: Path) -> None:
    world, sae = SyntheticModel(WORLD), create("topk", d_in=8, d_sae=5, k=1, seed=3)
    before = sae.W_dec.detach().clone()
    result = SyntheticSAERunner(_config(synthetic_model="nowhere/at-all"), world, sae).run()
    assert result.synthetic_model is world
    assert result.sae is sae
    assert not torch.equal(sae.W_dec, before)
    assert result.output_path is None
    world.save(tmp_path / "world")
    loaded = SyntheticSAERunner(_config(synthetic_model=str(tmp_path / "world")))
    assert torch.equal(loaded.synthetic_model.feature_dict.feature_vectors, world.feature_dict.feature_vectors)


def test_without_a_final_evaluation_there_are_no_scores(tmp_path: Path) -> None:
    result = SyntheticSAERunner(_config(run_final_eval=False, output_path=str(tmp_path / "out"))).run()
    assert result.final_eval is None
    assert result.evaluations == {}
    assert not (tmp_path / "out" / "eval_stats.json").exists()


def test_an_sae_that_is_there_is_kept_unless_it_may_be_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    create("topk", d_in=8, d_sae=3, k=1).save(out)
    with pytest.raises(FormatError, match="already holds an SAE"):
        SyntheticSAERunner(_config(output_path=str(out)))
    assert SAE.load(out).d_sae == 3
    SyntheticSAERunner(_config(output_path=str(out), overwrite=True)).run()
    assert SAE.load(out).d_sae == 12


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr_scheduler_name": "linear"}, "lr_scheduler_name: 'linear' is no schedule; there are constant, cosine"),
        ({"lr_end": 1e-5}, "lr_end: a constant rate ends where it is"),
        ({"n_restart_cycles": 2}, "n_restart_cycles: constant does not start again"),
        (
            {"lr_scheduler_name": "cosineannealingwarmrestarts", "n_restart_cycles": 0},
            "n_restart_cycles must be at least 1",
        ),
        ({"feature_sampling_window": 10}, "feature_sampling_window: no file of firing rates"),
        ({"sae": {"d_sae": 12}}, "sae: expected a mapping with 'architecture'"),
        ({"synthetic_model": 3}, "synthetic_model must be a SyntheticModelConfig or the name"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"n_checkpoints": -1}, "n_checkpoints must not be negative"),
        ({"n_checkpoints": 1, "checkpoint_path": None}, "checkpoint_path: checkpoints are asked for"),
        ({"save_synthetic_model": True}, "save_synthetic_model: there is no output_path"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"lr_decay_steps": 50}, "warm-up 0 and decay 50 leave nothing of 40 steps"),
    ],
)
def test_what_cannot_be_honoured_is_refused_when_the_config_is_made(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _config(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sae": {**TOPK, "d_in": 9}}, "d_in is 9, the world has width 8"),
        ({"sae": {**TOPK, "kk": 9}}, "unknown key 'kk'"),
    ],
)
def test_an_sae_that_does_not_fit_is_refused_before_training(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SyntheticSAERunner(_config(**settings))


def test_a_config_from_a_file_is_read_strictly() -> None:
    plain = _config().to_dict()
    with pytest.raises(ConfigError, match=r"unknown key 'batchsize'.* did you mean 'batch_size'"):
        SyntheticSAERunnerConfig.from_dict({**plain, "batchsize": 1})
    with pytest.raises(ConfigError, match="missing key sae"):
        SyntheticSAERunnerConfig.from_dict({"synthetic_model": plain["synthetic_model"]})


def test_every_field_of_the_config_changes_the_run_or_is_refused() -> None:
    """Beside the fields that the tests above name, these reach the trainer."""
    train = _config(lr=0.1, lr_warm_up_steps=2, lr_decay_steps=3, adam_beta1=0.5, adam_beta2=0.6, dead_feature_window=7)
    found = train.to_train_config()
    rates = [value_at(found.lr, step / 40) for step in (0, 1, 2, 36, 37, 38, 39)]
    assert rates == pytest.approx([0.05, 0.1, 0.1, 0.1, 0.1, 0.1 * 2 / 3, 0.1 / 3])
    cosine = _config(lr=0.1, lr_scheduler_name="cosineannealingwarmrestarts", lr_end=0.02, n_restart_cycles=4)
    rates = [value_at(cosine.to_train_config().lr, step / 40) for step in (0, 5, 10, 15, 35)]
    assert rates == pytest.approx([0.1, 0.06, 0.1, 0.06, 0.06])
    assert [_config(autocast_sae=on).to_train_config().precision for on in (False, True)] == ["full", "bfloat16"]
    assert (found.adam_beta1, found.adam_beta2, found.dead_after_samples) == (0.5, 0.6, 700)
    assert _config(n_batches_for_norm_estimate=4).to_train_config().init_samples == 400
    assert _config().total_training_steps == 40
    rounded = SyntheticSAERunner(_config(autocast_data=True, training_samples=100)).run()
    exact = SyntheticSAERunner(_config(training_samples=100)).run()
    assert not torch.equal(rounded.sae.W_dec, exact.sae.W_dec)
