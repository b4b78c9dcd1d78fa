from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from sae_core.cli import main
from sae_core.config import structure
from sae_core.errors import ConfigError
from sae_core.run import read_run
from sae_lm.migrate import migrate
from sae_lm.source import HuggingFaceSourceConfig

CONFIG: dict[str, Any] = {
    "sae": {"architecture": "standard", "d_in": 768, "d_sae": 1536, "l1_coefficient": 5.0, "l1_warm_up_steps": 100,
            "dtype": "float32", "device": "cuda", "metadata": {}, "use_sparse_activations": True},
    "model_name": "gpt2-small", "model_class_name": "HookedTransformer", "hook_name": "blocks.8.hook_resid_pre",
    "hook_head_index": None, "dataset_path": "some/text", "streaming": True, "context_size": 64, "training_tokens": 1_000_000,
    "train_batch_size_tokens": 2000, "n_batches_in_buffer": 20, "store_batch_size_prompts": 16, "prepend_bos": True,
    "sequence_separator_token": "bos", "seqpos_slice": [2, -1], "exclude_special_tokens": False, "lr": 1e-4,
    "lr_warm_up_steps": 10, "lr_decay_steps": 20, "lr_scheduler_name": "cosineannealing", "dead_feature_window": 50,
    "n_checkpoints": 1, "seed": 7, "output_path": "out", "device": "cpu", "autocast": False, "adam_beta1": 0.9, "verbose": True,
    "model_from_pretrained_kwargs": {"center_writing_weights": True}, "something_new": 3,
    "logger": {"log_to_wandb": True, "wandb_log_frequency": 10, "wandb_project": "toys", "wandb_entity": None},
}  # fmt: skip


def test_a_runner_config_becomes_a_run_file_in_samples_instead_of_steps(tmp_path: Path) -> None:
    found = migrate(CONFIG)
    assert found.run["train"] == {
        "total_samples": 1_000_000, "batch_size": 2000, "lr": 1e-4, "lr_warmup_samples": 20_000, "lr_decay_samples": 40_000,
        "dead_after_samples": 100_000, "checkpoint_every_samples": 500_000, "log_every_steps": 10,
        "adam_beta1": 0.9,
    }  # fmt: skip
    assert found.run["eval"] == {"every_samples": 10 * 100 * 2000, "tokens": 10 * 16 * 64, "batch_prompts": 16}
    assert found.run["sae"] == {
        "architecture": "standard", "d_sae": 1536, "l1_coefficient": {"from": 0.0, "to": 5.0, "over": 0.2},
    }  # fmt: skip
    assert found.run["source"]["tokens"] == {
        "bos": "window", "eos": "none", "exclude_bos": False, "exclude_eos": False, "exclude_first": 2, "exclude_last": 1,
    }  # fmt: skip
    assert found.run["loggers"] == [{"name": "wandb", "project": "toys"}]
    assert (found.run["seed"], found.run["output"], found.run["device"]) == (7, "out", "cpu")
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(found.run))
    run = read_run(path, [])
    source = structure({k: v for k, v in run.source.items() if k != "name"}, HuggingFaceSourceConfig)
    assert (source.model_class, source.hook, source.text.path) == (
        "HookedTransformer",
        "blocks.8.hook_resid_pre",
        "some/text",
    )


def test_what_has_no_equivalent_is_named() -> None:
    assert set(migrate(CONFIG).left_out) == {
        "lr_scheduler_name", "sequence_separator_token", "model_from_pretrained_kwargs", "something_new",
        "sae.use_sparse_activations",
    }  # fmt: skip
    plain = {key: CONFIG[key] for key in ("model_name", "hook_name", "training_tokens")}
    assert migrate({**plain, "sae": {"architecture": "topk", "d_sae": 8, "k": 2}}).left_out.keys() == {
        "sequence_separator_token"
    }
    with pytest.raises(ConfigError, match="has no 'hook_name'"):
        migrate({"sae": {"architecture": "topk"}, "model_name": "x"})


def test_mixed_precision_and_a_starting_point_have_their_equivalents() -> None:
    found = migrate({**CONFIG, "autocast": True, "from_pretrained_path": "checkpoints/abc/1000"})
    assert found.run["train"]["precision"] == "bfloat16"
    assert found.run["sae"]["start"] == "checkpoints/abc/1000"
    assert not {"autocast", "from_pretrained_path"} & set(found.left_out)


def test_migrate_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "runner_cfg.json").write_text(json.dumps(CONFIG))
    assert main(["migrate", str(tmp_path / "runner_cfg.json")]) == 0
    printed = capsys.readouterr()
    assert yaml.safe_load(printed.out)["train"]["total_samples"] == 1_000_000
    assert "not in the run file: something_new: unknown here" in printed.err
    assert main(["migrate", str(tmp_path / "runner_cfg.json"), "--output", str(tmp_path / "run.yaml")]) == 0
    assert yaml.safe_load((tmp_path / "run.yaml").read_text())["seed"] == 7
    assert main(["migrate", str(tmp_path / "nowhere.json")]) == 1
    assert "cannot be read as JSON" in capsys.readouterr().err
