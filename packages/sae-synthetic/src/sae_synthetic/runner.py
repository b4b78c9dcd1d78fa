"""A whole run in one object: make or load a world, train an SAE on it, score it against the truth, write it all down.

`SyntheticSAERunnerConfig` has the names of SAELens's class. What sae-core's trainer cannot do is refused with the reason when
the config is made; nothing is passed over in silence. For runs that shall be resumed exactly, or that train several SAEs on
one stream, write a run file with ``source: {name: synthetic, ...}``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, cast, final

from sae_core import SAE, TrainConfig, Trainer, create
from sae_core.config import option, require, structure
from sae_core.errors import ConfigError, FormatError, did_you_mean
from sae_core.format.write import write_atomically
from sae_core.plugins import get_registry
from sae_core.protocols import Logger, RunFacts
from sae_core.training.schedules import sae_lens_learning_rate
from sae_core.training.trainer import Progress, Record

from sae_synthetic.evaluation import SyntheticDataEvalResult, eval_sae_on_synthetic_data
from sae_synthetic.model import SyntheticModel, SyntheticModelConfig
from sae_synthetic.registry import settings_of
from sae_synthetic.source import SyntheticActivationIterator
from sae_synthetic.training import due_steps

__all__ = [
    "RUNNER_CONFIG_FILENAME",
    "SyntheticSAERunner",
    "SyntheticSAERunnerConfig",
    "SyntheticSAERunnerResult",
]

RUNNER_CONFIG_FILENAME = "runner_config.json"
_EVAL_FILENAME = "eval_stats.json"
_MODEL_FOLDER = "synthetic_model"
_SCHEDULES = ("constant", "cosineannealing", "cosineannealingwarmrestarts")


@final
@dataclass(frozen=True)
class SyntheticSAERunnerConfig:
    """Config of `SyntheticSAERunner`.

    `synthetic_model` is a config, a folder, or ``owner/name`` or ``owner/name:folder`` on the Hub. `sae` holds
    ``architecture`` and that architecture's fields; d_in comes from the world. `logger` is one or several loggers as run files
    name them, such as ``{"name": "jsonl", "path": "log.jsonl"}``. Raises ConfigError by field.

    >>> config = SyntheticSAERunnerConfig(
    ...     SyntheticModelConfig(num_features=32, hidden_dim=16, seed=0), {"architecture": "topk", "d_sae": 32, "k": 3}
    ... )
    >>> SyntheticSAERunnerConfig.from_dict(config.to_dict()) == config
    True
    """

    synthetic_model: SyntheticModelConfig | str = option(help="the world: a config, a folder, or owner/name[:folder]")
    sae: dict[str, Any] = option(help="architecture: NAME, and that architecture's fields; seed is that of its start")
    training_samples: int = option(default=100_000_000, help="samples to train on")
    batch_size: int = option(default=1024, help="samples in a step")
    lr: float = option(default=3e-4, help="peak learning rate")
    lr_warm_up_steps: int = option(default=0, help="steps over which the learning rate rises from 0")
    lr_decay_steps: int = option(default=0, help="steps at the end over which it falls to 0")
    lr_scheduler_name: str = option(
        default="constant", help="between warm-up and decay: constant, cosineannealing, or cosineannealingwarmrestarts"
    )
    lr_end: float | None = option(default=None, help="where a cosine ends; null is a tenth of lr")
    adam_beta1: float = option(default=0.9, help="Adam's decay of the gradient mean")
    adam_beta2: float = option(default=0.999, help="Adam's decay of the squared-gradient mean")
    n_restart_cycles: int = option(default=1, help="cosines of cosineannealingwarmrestarts; 1 for the others")
    device: str = option(default="cpu", help="where samples are made and the SAE trains")
    autocast_sae: bool = option(default=False, help="train in mixed precision, dense products in bfloat16")
    autocast_data: bool = option(default=False, help="sum features in bfloat16")
    n_checkpoints: int = option(default=0, help="SAEs saved on the way, evenly spaced, before the end")
    checkpoint_path: str | None = option(default="checkpoints", help="folder for them; each is named by its samples")
    save_final_checkpoint: bool = option(default=False, help="one more at the end")
    output_path: str | None = option(default="output", help="folder for SAE, config, scores; null writes nothing")
    save_synthetic_model: bool = option(default=False, help="write the world into the output folder too")
    eval_frequency: int = option(default=0, help="steps between evaluations; 0 for none")
    eval_samples: int = option(default=500_000, help="held-out samples of an evaluation")
    run_final_eval: bool = option(default=True, help="evaluate at the end")
    dead_feature_window: int = option(default=1000, help="steps without firing after which a latent is dead")
    feature_sampling_window: int = option(default=2000, help="no other than the default: no firing rates are written")
    n_batches_for_norm_estimate: int = option(
        default=16, help="batches looked at before training for the input normalisation and b_dec; they are then used"
    )
    logger: dict[str, Any] | list[dict[str, Any]] = option(
        default_factory=list, help="loggers, each name: NAME and that logger's fields"
    )
    overwrite: bool = option(default=False, help="replace an SAE that the output folder holds")

    def __post_init__(self) -> None:
        require(
            isinstance(self.synthetic_model, SyntheticModelConfig | str),
            f"synthetic_model must be a SyntheticModelConfig or the name of a model, not {type(self.synthetic_model).__name__}",
        )
        require(
            isinstance(self.sae, Mapping) and "architecture" in self.sae,
            "sae: expected a mapping with 'architecture' and that architecture's fields, such as "
            "{'architecture': 'topk', 'd_sae': 512, 'k': 8}",
        )
        require(
            self.lr_scheduler_name in _SCHEDULES,
            f"lr_scheduler_name: {self.lr_scheduler_name!r} is no schedule; there are {', '.join(_SCHEDULES)}",
        )
        require(
            self.lr_end is None or self.lr_scheduler_name != "constant",
            "lr_end: a constant rate ends where it is; choose another lr_scheduler_name",
        )
        require(
            self.n_restart_cycles == 1 or self.lr_scheduler_name == "cosineannealingwarmrestarts",
            f"n_restart_cycles: {self.lr_scheduler_name} does not start again",
        )
        for name in (
            "training_samples",
            "batch_size",
            "eval_samples",
            "dead_feature_window",
            "n_batches_for_norm_estimate",
            "n_restart_cycles",
        ):
            value = getattr(self, name)
            require(value >= 1, f"{name} must be at least 1, not {value}")
        for name in ("n_checkpoints", "eval_frequency", "lr_warm_up_steps", "lr_decay_steps"):
            value = getattr(self, name)
            require(value >= 0, f"{name} must not be negative, found {value}")
        require(
            self.feature_sampling_window == 2000,
            "feature_sampling_window: no file of firing rates is written; sae-core's records hold L0 and dead latents",
        )
        wants_checkpoints = self.n_checkpoints or self.save_final_checkpoint
        require(
            not wants_checkpoints or self.checkpoint_path is not None,
            "checkpoint_path: checkpoints are asked for, but there is no folder for them",
        )
        require(
            not self.save_synthetic_model or self.output_path is not None,
            "save_synthetic_model: there is no output_path to write it to",
        )
        self.to_train_config()

    @property
    def total_training_steps(self) -> int:
        """Full batches in the samples."""
        return self.training_samples // self.batch_size

    def to_train_config(self) -> TrainConfig:
        """The trainer's settings."""
        size = self.batch_size
        rate = sae_lens_learning_rate(
            cast("Any", self.lr_scheduler_name),
            self.lr,
            steps=-(-self.training_samples // size),
            warm_up_steps=self.lr_warm_up_steps,
            decay_steps=self.lr_decay_steps,
            lr_end=self.lr_end,
            num_cycles=self.n_restart_cycles,
        )
        return TrainConfig(
            total_samples=self.training_samples,
            batch_size=size,
            lr=rate,
            adam_beta1=self.adam_beta1,
            adam_beta2=self.adam_beta2,
            dead_after_samples=self.dead_feature_window * size,
            init_samples=self.n_batches_for_norm_estimate * size,
            precision="bfloat16" if self.autocast_sae else "full",
        )

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON values."""
        world = self.synthetic_model
        plain = world.to_dict() if isinstance(world, SyntheticModelConfig) else world
        return {**settings_of(self), "synthetic_model": plain}

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> SyntheticSAERunnerConfig:
        """The config that `to_dict` wrote. Raises ConfigError for unknown and missing keys."""
        known = [each.name for each in fields(cls)]
        for key in d:
            if key not in known:
                raise ConfigError(
                    f"runner: unknown key {key!r}{did_you_mean(str(key), known)} (known: {', '.join(known)})"
                )
        missing = [key for key in ("synthetic_model", "sae") if key not in d]
        require(not missing, f"runner: missing key {', '.join(missing)}")
        settings: dict[str, Any] = dict(d)
        if isinstance(settings["synthetic_model"], Mapping):
            settings["synthetic_model"] = SyntheticModelConfig.from_dict(settings["synthetic_model"])
        return cls(**settings)


@dataclass(frozen=True)
class SyntheticSAERunnerResult:
    """`final_eval` and `output_path` are None where they were not asked for.

    `history` holds the trainer's records, `evaluations` the scores on the way by step.
    """

    sae: SAE
    synthetic_model: SyntheticModel
    final_eval: SyntheticDataEvalResult | None
    output_path: Path | None
    history: list[Record] = field(default_factory=list[Record])
    evaluations: dict[int, SyntheticDataEvalResult] = field(default_factory=dict[int, SyntheticDataEvalResult])


@final
class SyntheticSAERunner:
    """Trains one SAE on one world as `cfg` says.

    `override_synthetic_model` and `override_sae` are taken in place of those of the config. Raises ConfigError when widths do
    not fit, FormatError when the output folder holds an SAE already and `cfg.overwrite` does not allow it.
    """

    def __init__(
        self,
        cfg: SyntheticSAERunnerConfig,
        override_synthetic_model: SyntheticModel | None = None,
        override_sae: SAE | None = None,
    ) -> None:
        self.cfg = cfg
        output = None if cfg.output_path is None else Path(cfg.output_path)
        if output is not None and not cfg.overwrite and (output / "cfg.json").exists():
            raise FormatError(f"{output}: already holds an SAE; choose another output_path, or overwrite=True")
        self.synthetic_model = override_synthetic_model or SyntheticModel.load_from_source(
            cfg.synthetic_model, device=cfg.device
        )
        self.synthetic_model.to(cfg.device)
        width = self.synthetic_model.d_in
        if override_sae is None:
            settings: dict[str, Any] = {"d_in": width, "device": cfg.device, **cfg.sae}
            require(settings["d_in"] == width, f"sae: d_in is {settings['d_in']}, the world has width {width}")
            override_sae = create(settings.pop("architecture"), **settings)
        require(override_sae.d_in == width, f"the SAE has d_in {override_sae.d_in}, the world has width {width}")
        self.sae = override_sae.to(cfg.device)

    def run(self) -> SyntheticSAERunnerResult:
        """Train, evaluate, save."""
        cfg, world = self.cfg, self.synthetic_model
        evaluations: dict[int, SyntheticDataEvalResult] = {}
        loggers = self._loggers()
        folder = None if cfg.output_path is None else Path(cfg.output_path)
        facts = {"": RunFacts(sae=self.sae, config=cfg.to_dict(), folder=folder)}
        steps = -(-cfg.training_samples // cfg.batch_size)
        due = due_steps(steps, cfg.n_checkpoints + 1) - {steps}
        if cfg.save_final_checkpoint:
            due.add(steps)

        def look(progress: Progress) -> None:
            trainer = progress.trainer
            if cfg.eval_frequency and trainer.steps % cfg.eval_frequency == 0:
                scores = self._scores()
                evaluations[trainer.steps] = scores
                trainer.log({"step": trainer.steps, "samples": trainer.samples, **scores.to_log_dict("synthetic/")})
            if trainer.steps in due:
                folder = Path(cast("str", cfg.checkpoint_path)) / str(trainer.samples)
                self.sae.save(folder)
                self._write_config(folder)

        source = SyntheticActivationIterator(
            world.feature_dict, world.activation_generator, cfg.batch_size, autocast=cfg.autocast_data
        )
        result = Trainer(self.sae, source, cfg.to_train_config(), callbacks=[look], loggers=loggers, facts=facts).fit()
        final = self._scores() if cfg.run_final_eval else None
        output = None if cfg.output_path is None else Path(cfg.output_path)
        if output is not None:
            self.sae.save(output)
            if cfg.save_synthetic_model:
                world.save(output / _MODEL_FOLDER)
            if final is not None:
                _write_json(output / _EVAL_FILENAME, final.to_dict())
            self._write_config(output)
        return SyntheticSAERunnerResult(self.sae, world, final, output, result.history, evaluations)

    def _scores(self) -> SyntheticDataEvalResult:
        world = self.synthetic_model
        return eval_sae_on_synthetic_data(
            self.sae, world.feature_dict, world.activation_generator, self.cfg.eval_samples, self.cfg.batch_size
        )

    def _loggers(self) -> list[Logger]:
        wanted: Sequence[dict[str, Any]] = [self.cfg.logger] if isinstance(self.cfg.logger, dict) else self.cfg.logger
        made: list[Logger] = []
        for settings in wanted:
            others = dict(settings)
            require("name" in others, "logger: missing key 'name'")
            kind = cast("Any", get_registry().usable("logger", others.pop("name")))
            made.append(kind(structure(others, kind.config_class, where=f"logger {settings['name']!r}")))
        return made

    def _write_config(self, folder: Path) -> None:
        _write_json(folder / RUNNER_CONFIG_FILENAME, self.cfg.to_dict())


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    text = json.dumps(data, indent=2) + "\n"
    write_atomically(path, lambda file: cast("None", file.write_text(text, encoding="utf-8")))
