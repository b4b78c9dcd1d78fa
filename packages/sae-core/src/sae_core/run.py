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
``run.yaml`` with every default filled in and paths that mean the same from anywhere, ``log.jsonl`` and checkpoints. It is one
run's alone: see `sae_core.run_folder`. A run that was stopped or killed goes on from its newest whole checkpoint and ends with
the bits that it would have had.
"""

from __future__ import annotations

import dataclasses
import signal
import sys
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError

from sae_core.config import option, require, structure, unstructure
from sae_core.data.wiring import fields_for
from sae_core.errors import ConfigError, FormatError, SaeCoreError
from sae_core.format.write import write_atomically
from sae_core.plugins import get_registry
from sae_core.protocols import ActivationSource, Logger
from sae_core.run_folder import CHECKPOINTS, INTERRUPTED, LOG, NEW, RUN_FILE, RunFolder, locked
from sae_core.sae import SAE, as_device, create
from sae_core.signals import first_signal
from sae_core.training.checkpoint import Checkpoints, Found
from sae_core.training.config import TrainConfig
from sae_core.training.facts import absolute_paths
from sae_core.training.loggers import JsonlConfig, JsonlLogger
from sae_core.training.trainer import Trainer, TrainResult
from sae_core.yaml_text import parse_yaml, set_by_override, to_yaml

__all__ = ["RunConfig", "RunStopped", "execute", "read_run"]


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A run file."""

    sae: dict[str, Any] = option(help="architecture: NAME, and that architecture's fields")
    source: dict[str, Any] = option(help="name: NAME, and that activation source's fields")
    train: TrainConfig = option(help="how to train")
    output: Path = option(help="folder for the SAE, run.yaml and log.jsonl")
    seed: int = option(default=0, help="seed of the SAE's initialisation, and of the source unless it has its own")
    device: str = option(
        default="auto",
        help="where the SAE trains, and the source unless it has its own: cpu, cuda, cuda:1, mps; auto: cuda if there is one",
    )
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


def kept_run_file(output: Path) -> Path:
    """The run file that a run keeps in its output folder. Raises FormatError when there is none."""
    for folder in (output / NEW, output):
        if (folder / RUN_FILE).exists():
            return folder / RUN_FILE
    raise FormatError(f"{output}: no run to go on with, it holds no {RUN_FILE}")


class RunStopped(SaeCoreError):
    """A run ended because of a signal, with its state saved; `signal` is which."""

    def __init__(self, message: str, which: signal.Signals) -> None:
        super().__init__(message)
        self.signal = which


def execute(run: RunConfig, *, overwrite: bool = False, resume: bool = False, force: bool = False) -> TrainResult:
    """Train as `run` says and save into its output folder.

    With `resume` a run that is in the folder already goes on from its newest whole checkpoint, and `run` may differ from it
    where that does not change the numbers up to there (see `Trainer.resume`; `force` allows everything). SIGINT, SIGTERM and
    SIGHUP finish the step, write a checkpoint and raise `RunStopped`. What was learnt until then is also saved under
    ``interrupted``, as it is when an error ends the training. Raises FormatError when the output holds another run, unless
    `overwrite`, which keeps the old one until the new one has ended well.
    """
    with locked(run.output.absolute()) as folder:
        found = None
        if resume:
            folder.go_on()
            found = Checkpoints(folder.work / CHECKPOINTS, keep_last=1).newest() if folder.has_checkpoints else None
            if found is None and folder.finished:
                raise FormatError(f"{run.output}: holds a finished SAE without checkpoints, so it cannot go on")
        else:
            folder.for_new_run(overwrite=overwrite)
        return _train(run, folder, found, force=force)


def _train(run: RunConfig, folder: RunFolder, found: Found | None, *, force: bool) -> TrainResult:
    run = dataclasses.replace(run, device=chosen_device(run.device))
    source = cast("ActivationSource", _component(run.source, "source", seed=run.seed, device=run.device))
    sae = _new_sae(run, source)
    loggers: list[Logger] = [JsonlLogger(JsonlConfig(path=folder.work / LOG))]
    loggers += [cast("Logger", _component(logger, "logger")) for logger in run.loggers]
    trainer = Trainer(sae, source, run.train, loggers=loggers, checkpoints=folder.work / CHECKPOINTS)
    if found is not None:
        for message in found.damaged:
            _say(f"skipped: {message}")
        trainer.load_state_dict(found.state, force=force)
        if folder.finished and trainer.finished:
            _say(f"{run.output}: this run has ended already; raise train.total_samples to train further")
            return trainer.result()
        _say(f"going on at {trainer.samples:,} samples")
    with _writing(folder.work):
        if found is None:
            folder.clear()
        else:
            folder.reopen()
        _write_yaml(folder.work / RUN_FILE, resolved(run, sae, source))
    if trainer.finished:  # it was killed while it saved what had come out
        result = trainer.result()
    else:
        result = _fit(trainer, folder)
        trainer.checkpoint()
    with _writing(folder.work):
        result.sae.save(folder.work)
        folder.end()
    return result


@contextmanager
def _writing(folder: Path) -> Generator[None]:
    """A disk that refuses is one clear error."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise FormatError(f"{folder}: cannot be written: {reason}") from error


def _fit(trainer: Trainer, folder: RunFolder) -> TrainResult:
    """`Trainer.fit`, with signals heard and what was learnt kept when it does not end well."""
    heard: list[signal.Signals] = []

    def stop(which: signal.Signals) -> None:
        heard.append(which)
        trainer.stop()

    try:
        with first_signal(stop):
            result = trainer.fit()
            if heard and not trainer.finished:
                raise _stopped(trainer, folder, heard[0])
            return result
    except RunStopped:
        raise
    except BaseException as error:
        if trainer.steps:
            error.add_note(_keep(trainer.sae, folder.work / INTERRUPTED, trainer.samples))
        raise
    finally:
        trainer.close()


def _stopped(trainer: Trainer, folder: RunFolder, which: signal.Signals) -> RunStopped:
    if not trainer.steps:
        return RunStopped(f"stopped by {which.name} before the first step", which)
    kept = _keep(trainer.sae, folder.work / INTERRUPTED, trainer.samples)
    path = trainer.checkpoint()
    return RunStopped(f"stopped by {which.name}; --resume goes on from {path}; {kept}", which)


def chosen_device(device: str) -> str:
    """`device`, or for ``auto`` CUDA where there is one and else the CPU. Raises ConfigError for one that is not there."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return str(as_device(device))


def _say(message: str) -> None:
    sys.stderr.write(f"sae-core: {message}\n")


def resolved(run: RunConfig, sae: SAE, source: ActivationSource) -> dict[str, Any]:
    """The run with every default filled in and paths made absolute, as plain data."""
    config = getattr(source, "config", None)
    fields = unstructure(absolute_paths(config)) if dataclasses.is_dataclass(config) else {}
    return {
        **unstructure(absolute_paths(run)),
        "sae": {"architecture": run.sae["architecture"], **unstructure(sae.config)},
        "source": {"name": run.source["name"], **fields},
    }


def _keep(sae: SAE, folder: Path, samples: int) -> str:
    try:
        return f"what was learnt in {samples} samples is saved in {sae.save(folder)}"
    except FormatError as error:  # weights that diverged cannot be saved; why training stopped matters more
        return f"what was learnt in {samples} samples cannot be kept: {error}"


def _new_sae(run: RunConfig, source: ActivationSource) -> SAE:
    sae_class = cast("type[SAE]", get_registry().resolve("architecture", str(run.sae["architecture"])))
    fields: dict[str, Any] = {**fields_for(source, sae_class), **run.sae}
    return create(fields.pop("architecture"), seed=run.seed, device=run.device, dtype=run.dtype, **fields)


def _component(settings: Mapping[str, Any], kind: str, **defaults: Any) -> object:
    """A source or logger by its registered name, built from the rest of its settings; `defaults` where it has such fields."""
    fields = dict(settings)
    component = cast("Any", get_registry().resolve(kind, fields.pop("name")))
    config_class = cast("type", component.config_class)
    known = {field.name for field in dataclasses.fields(config_class)}
    fields = {name: value for name, value in defaults.items() if name in known} | fields
    return component(structure(fields, config_class, where=f"{kind} {settings['name']!r}"))


def _write_yaml(path: Path, data: Mapping[str, Any]) -> None:
    text = to_yaml(data)
    write_atomically(path, lambda temporary: cast("None", temporary.write_text(text, encoding="utf-8")))
