"""Run files: one YAML file that says what to train, on what, and where the result goes.

```yaml
seed: 0
output: runs/toy
sae: {architecture: topk, d_sae: 512, k: 8}
source: {name: synthetic, num_features: 256, d_in: 64}
train: {total_samples: 1000000, batch_size: 1024, lr: 0.003}
```

`sae` holds the architecture's fields (d_in comes from the source), `source` and each of `loggers` a registered name and that
component's fields, `train` those of `TrainConfig`. Unknown keys are errors everywhere. The output folder receives the SAE,
``run.yaml`` with every default filled in, and ``log.jsonl``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from sae_core.config import option, require, structure, unstructure
from sae_core.errors import ConfigError, FormatError
from sae_core.format.files import CONFIG_FILE
from sae_core.format.write import write_atomically
from sae_core.plugins import get_registry
from sae_core.protocols import ActivationSource, Logger
from sae_core.sae import SAE, create
from sae_core.training.config import TrainConfig
from sae_core.training.loggers import JsonlConfig, JsonlLogger
from sae_core.training.trainer import Trainer, TrainResult
from sae_core.yaml_text import parse_yaml, set_by_override, to_yaml

__all__ = ["RunConfig", "execute", "read_run"]


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A run file."""

    sae: dict[str, Any] = option(help="architecture: NAME, and that architecture's fields")
    source: dict[str, Any] = option(help="name: NAME, and that activation source's fields")
    train: TrainConfig = option(help="how to train")
    output: Path = option(help="folder for the SAE, run.yaml and log.jsonl")
    seed: int = option(default=0, help="seed of the SAE's initialisation, and of the source unless it has its own")
    device: str = option(default="cpu", help="where the SAE trains: cpu, cuda, cuda:1, mps")
    dtype: str = option(default="float32", help="precision of the SAE's parameters")
    loggers: list[dict[str, Any]] = option(
        default_factory=list, help="further loggers, each name: NAME and that logger's fields"
    )

    def __post_init__(self) -> None:
        require("architecture" in self.sae, "sae: missing key 'architecture'")
        for key, component in [("source", self.source), *(("loggers", logger) for logger in self.loggers)]:
            require("name" in component, f"{key}: missing key 'name'")


def read_run(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run file; `overrides` are ``key=value`` with dots for nested keys, values in YAML.

    Raises ConfigError for anything unknown or of the wrong type, FormatError when the file is not YAML.
    """
    path = Path(path)
    try:
        data = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FormatError(f"{path}: cannot read the run file: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise FormatError(f"{path}: not UTF-8 text: {error}") from None
    except ConfigError as error:
        raise FormatError(f"{path}: {error}") from None
    if not isinstance(data, dict):
        raise FormatError(f"{path}: a run file is a mapping with the keys sae, source, train and output")
    run = cast("dict[str, Any]", data)
    for override in overrides:
        set_by_override(run, override)
    return structure(run, RunConfig, where=str(path))


def execute(run: RunConfig, *, overwrite: bool = False) -> TrainResult:
    """Train as `run` says and save into its output folder.

    When training stops early, by an error or the keyboard, what was learnt until then is saved under ``interrupted`` and the
    error goes on. Raises FormatError when the output already holds an SAE, unless `overwrite`.
    """
    if (run.output / CONFIG_FILE).exists() and not overwrite:
        raise FormatError(f"{run.output}: already holds an SAE; choose another output or pass --overwrite")
    source = _component(run.source, "source", seed=run.seed)
    loggers = [cast("Logger", _component(logger, "logger")) for logger in run.loggers]
    sae = _new_sae(run, cast("ActivationSource", source))
    run.output.mkdir(parents=True, exist_ok=True)
    _write_yaml(run.output / "run.yaml", resolved(run, sae, cast("ActivationSource", source)))
    loggers.append(JsonlLogger(JsonlConfig(path=run.output / "log.jsonl")))
    trainer = Trainer(sae, cast("ActivationSource", source), run.train, loggers=loggers)
    try:
        result = trainer.fit()
    except BaseException as error:
        if trainer.steps:
            error.add_note(_keep(sae, run.output / "interrupted", trainer.samples))
        raise
    result.sae.save(run.output)
    return result


def resolved(run: RunConfig, sae: SAE, source: ActivationSource) -> dict[str, Any]:
    """The run with every default filled in, as plain data."""
    config = getattr(source, "config", None)
    return {
        **unstructure(run),
        "sae": {"architecture": run.sae["architecture"], **unstructure(sae.config)},
        "source": {"name": run.source["name"], **(unstructure(config) if dataclasses.is_dataclass(config) else {})},
    }


def _keep(sae: SAE, folder: Path, samples: int) -> str:
    try:
        return f"what was learnt in {samples} samples is saved in {sae.save(folder)}"
    except FormatError as error:  # weights that diverged cannot be saved; why training stopped matters more
        return f"what was learnt in {samples} samples cannot be kept: {error}"


def _new_sae(run: RunConfig, source: ActivationSource) -> SAE:
    fields: dict[str, Any] = {"d_in": source.d_in, **run.sae}
    if fields["d_in"] != source.d_in:
        raise ConfigError(f"sae: d_in is {fields['d_in']}, but the source gives activations of width {source.d_in}")
    return create(fields.pop("architecture"), seed=run.seed, device=run.device, dtype=run.dtype, **fields)


def _component(settings: Mapping[str, Any], kind: str, seed: int | None = None) -> object:
    """A source or logger by its registered name, built from the rest of its settings."""
    fields = dict(settings)
    component = cast("Any", get_registry().resolve(kind, fields.pop("name")))
    config_class = cast("type", component.config_class)
    if seed is not None and "seed" in {field.name for field in dataclasses.fields(config_class)}:
        fields.setdefault("seed", seed)
    return component(structure(fields, config_class, where=f"{kind} {settings['name']!r}"))


def _write_yaml(path: Path, data: Mapping[str, Any]) -> None:
    text = to_yaml(data)
    write_atomically(path, lambda temporary: cast("None", temporary.write_text(text, encoding="utf-8")))
