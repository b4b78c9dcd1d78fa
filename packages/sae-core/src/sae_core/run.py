"""Run files: one YAML file that says what to train, on what, and where the result goes.

```yaml
seed: 0
output: runs/toy
sae: {architecture: topk, d_sae: 512, k: 8}
source: {name: synthetic, num_features: 256, d_in: 64}
train: {total_samples: 1000000, batch_size: 1024, lr: 0.003}
```

`sae` holds the architecture's fields (d_in comes from the source), or with ``start: FOLDER`` those that differ from a trained
SAE, ours or a training checkpoint of SAELens, whose weights it starts from. `source` and each of `loggers` hold a registered
name and that component's fields, `train` those of `TrainConfig`. Unknown keys are errors everywhere. The output folder receives
the SAE,
``run.yaml`` with every default filled in and paths that mean the same from anywhere, ``log.jsonl`` and checkpoints. It is one
run's alone: see `sae_core.run_folder`. A run that was stopped or killed goes on from its newest whole checkpoint and ends with
the bits that it would have had.
"""

from __future__ import annotations

import dataclasses
import signal
import sys
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError

from sae_core.config import absolute_paths, check_fields, option, require, structure, unstructure
from sae_core.data.wiring import fields_for
from sae_core.errors import ConfigError, FormatError, MissingDependencyError, SaeCoreError, did_you_mean
from sae_core.format.write import write_atomically
from sae_core.latent_ranks import latents_over
from sae_core.members import Member, members_of
from sae_core.parallel.config import ParallelConfig
from sae_core.parallel.joining import agree_on
from sae_core.parallel.ranks import ALONE, Ranks
from sae_core.plugins import get_registry
from sae_core.protocols import ActivationSource, Logger, MeasuresHeldOut, RunFacts
from sae_core.run_folder import (
    CHECKPOINTS,
    COMPARISON,
    INTERRUPTED,
    LOG,
    MEMBERS,
    NEW,
    REPORT,
    RUN_FILE,
    RunFolder,
    locked,
)
from sae_core.sae import SAE, as_device, as_dtype, create
from sae_core.signals import first_signal
from sae_core.training.checkpoint import Checkpoints, Found, read_checkpoint, sent_from_first
from sae_core.training.comparison import write_comparison
from sae_core.training.config import TrainConfig
from sae_core.training.facts import named_architecture
from sae_core.training.feeding import FedSource, fed, feed
from sae_core.training.held_out import HeldOut
from sae_core.training.loggers import JsonlConfig, JsonlLogger
from sae_core.training.trainer import Trainer, TrainResult
from sae_core.yaml_text import parse_yaml, set_by_override, to_yaml

__all__ = [
    "RunConfig",
    "RunStopped",
    "chosen_device",
    "execute",
    "execute_all",
    "members_in",
    "new_sae",
    "open_source",
    "parameter_bytes",
    "read_run",
]


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A run file."""

    source: dict[str, Any] = option(help="name: NAME, and that activation source's fields")
    train: TrainConfig = option(help="how to train")
    output: Path = option(help="folder for the SAE, run.yaml and log.jsonl")
    sae: dict[str, Any] | None = option(
        default=None,
        help="architecture: NAME, and that architecture's fields; or start: FOLDER of a trained SAE, and what differs from it",
    )
    saes: list[dict[str, Any]] = option(
        default_factory=list,
        help="several, trained on one stream: for each what differs from `sae`, with name, seed and train: {...} of its own",
    )
    grid: dict[str, Any] = option(
        default_factory=dict, help="FIELD: [VALUES]; every combination is trained, on one stream"
    )
    seed: int = option(default=0, help="seed of the SAE's initialisation, and of the source unless it has its own")
    device: str = option(
        default="auto",
        help="where the SAE trains, and the source unless it has its own: cpu, cuda, cuda:1, mps; auto: cuda if there is one",
    )
    dtype: str = option(default="float32", help="precision of the SAE's parameters")
    loggers: list[dict[str, Any]] = option(
        default_factory=list, help="further loggers, each name: NAME and that logger's fields"
    )
    parallel: ParallelConfig = option(
        default_factory=ParallelConfig, help="how the processes that torchrun started share the work"
    )
    eval: dict[str, Any] = option(
        default_factory=dict,
        help="every_samples: N, or a fraction of total_samples, and how the source is to measure: numbers on data held out "
        "from training come into the log",
    )

    def __post_init__(self) -> None:
        check_fields(self)
        require(self.sae is not None or len(self.saes) > 0, "missing key 'sae' (or saes: a list of several)")
        members_of(self.sae, self.saes, self.grid, self.train, self.seed)
        for key, component in [("source", self.source), *(("loggers", logger) for logger in self.loggers)]:
            require("name" in component, f"{key}: missing key 'name'")
        if self.eval:
            require("every_samples" in self.eval, "eval: missing key 'every_samples'")
            every: object = self.eval["every_samples"]
            is_count = isinstance(every, int) and not isinstance(every, bool) and every > 0
            require(
                is_count or (isinstance(every, float) and 0 < every < 1),
                f"eval: every_samples is a number of samples, or a fraction of total_samples below 1, not {every!r}",
            )


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
    """`execute_all` for a run of one dictionary. Raises ConfigError for a run of several."""
    require(list(members_in(run)) == [""], "the run trains several dictionaries; use execute_all")
    return execute_all(run, overwrite=overwrite, resume=resume, force=force)[""]


def execute_all(
    run: RunConfig, *, overwrite: bool = False, resume: bool = False, force: bool = False, ranks: Ranks = ALONE
) -> dict[str, TrainResult]:
    """Train as `run` says and save into its output folder; several dictionaries into ``saes/NAME`` there.

    With `resume` a run that is in the folder already goes on from its newest whole checkpoint, and `run` may differ from it
    where that does not change the numbers up to there (see `Trainer.resume`; `force` allows everything). SIGINT, SIGTERM and
    SIGHUP finish the step, write a checkpoint and raise `RunStopped`. What was learnt until then is also saved under
    ``interrupted``, as it is when an error ends the training. Raises FormatError when the output holds another run, unless
    `overwrite`, which keeps the old one until the new one has ended well.

    On several `ranks` each process calls this, and the first one has the folder to itself.
    """
    ranks = agree_on(run.parallel, ranks)
    if ranks.reads_only:
        _read_for_others(run, ranks)
        return {}
    if not ranks.first:
        return _train(run, None, None, force=force, ranks=ranks)
    with locked(run.output.absolute()) as folder:
        found = None
        if resume:
            folder.go_on()
            with latents_over(ranks.latents):
                found = Checkpoints(folder.work / CHECKPOINTS, keep_last=1).newest() if folder.has_checkpoints else None
            if found is None and folder.finished:
                raise FormatError(f"{run.output}: holds a finished SAE without checkpoints, so it cannot go on")
        else:
            folder.for_new_run(overwrite=overwrite)
        return _train(run, folder, found, force=force, ranks=ranks)


def _read_for_others(run: RunConfig, ranks: Ranks) -> None:
    run = dataclasses.replace(run, device=_own_device(run, ranks))
    batch_size = next(iter(members_in(run).values())).train.batch_size
    with first_signal(lambda which: None, quiet=True):  # those that train hear it too, and say when it is enough
        feed(open_source(run), batch_size, ranks)


def _own_device(run: RunConfig, ranks: Ranks) -> str:
    device = chosen_device(run.device)
    require(
        ranks.run.size == 1 or torch.device(device).index is None,  # pyright: ignore[reportUnnecessaryComparison] - torch says int
        f"device: {device} is one for {ranks.run.size} processes; say cuda, and each takes its own",
    )
    return device


def open_source(run: RunConfig) -> ActivationSource:
    """The source of a run whose device has been chosen."""
    return cast("ActivationSource", _component(run.source, "source", seed=run.seed, device=run.device))


def members_in(run: RunConfig) -> dict[str, Member]:
    """The dictionaries that a run asks for, by name."""
    return members_of(run.sae, run.saes, run.grid, run.train, run.seed)


def _train(
    run: RunConfig, folder: RunFolder | None, found: Found | None, *, force: bool, ranks: Ranks
) -> dict[str, TrainResult]:
    """Train on this rank; `folder` is that of the first one, and None on the others."""
    run = dataclasses.replace(run, device=_own_device(run, ranks))
    source = open_source(run) if ranks.run is ranks.world else fed(ranks)
    try:
        results = _train_on(source, run, folder, found, force=force, ranks=ranks)
    except RunStopped:
        _close(source)
        raise
    _close(source)
    return results


def _close(source: ActivationSource) -> None:
    if isinstance(source, FedSource):
        source.close()


def _train_on(
    source: ActivationSource,
    run: RunConfig,
    folder: RunFolder | None,
    found: Found | None,
    *,
    force: bool,
    ranks: Ranks,
) -> dict[str, TrainResult]:
    members = members_in(run)
    state = _state_here(found, ranks)
    initial = {} if state is None else state["initial"]
    with latents_over(ranks.latents):
        saes = {
            name: new_sae(run, _without_start(member, initial.get(name)), name, source)
            for name, member in members.items()
        }
    full = resolved(run, members, saes, source)
    trainer = Trainer(
        saes[""] if list(saes) == [""] else saes,
        source,
        {name: member.train for name, member in members.items()},
        loggers={} if folder is None else _loggers(run, folder, members),
        checkpoints=run.output if folder is None else folder.work / CHECKPOINTS,
        held_out=_held_out(run, source),
        facts={
            name: RunFacts(name=name, sae=sae, config=full, folder=run.output if folder is None else folder.of(name))
            for name, sae in saes.items()
        },
        ranks=ranks,
    )
    if state is not None:
        for message in [] if found is None else found.damaged:
            _say(f"skipped: {message}")
        trainer.load_state_dict(state, force=force)
        if ranks.told(folder is not None and folder.finished) and trainer.finished:
            if folder is not None:
                _say(f"{run.output}: this run has ended already; raise train.total_samples to train further")
            return trainer.results()
        if folder is not None:
            _say(f"going on at {trainer.samples:,} samples")
    trainer.agree()
    if folder is not None:
        with _writing(folder.work):
            if found is None:
                folder.clear()
            else:
                folder.reopen(members)
            _write_yaml(folder.work / RUN_FILE, full)
    if trainer.finished:  # it was killed while it saved what had come out
        results = trainer.results()
    else:
        results = _fit(trainer, folder, run.output)
        trainer.checkpoint()
    if folder is None:
        if ranks.latents is not None and not ranks.rank:  # they write their latents, where the first one says
            for result in results.values():
                if result.dropped is None:
                    result.sae.save(run.output)
        return results
    _report(folder, results, full)
    with _writing(folder.work):
        for name, result in results.items():
            if result.dropped is None:
                result.sae.save(folder.of(name))
        if list(results) != [""]:
            write_comparison(folder.work / COMPARISON, results)
        folder.end()
    return results


def _state_here(found: Found | None, ranks: Ranks) -> dict[str, Any] | None:
    """The state to go on with, on every rank: the first one sends it, unless each reads its own latents of it."""
    if ranks.latents is None:
        return sent_from_first(None if found is None else found.state, ranks)
    folder = ranks.told(None if found is None else found.folder)
    if folder is None or found is not None:
        return None if found is None else found.state
    with latents_over(ranks.latents):
        return read_checkpoint(folder, check=False)  # which the first rank has done


def _held_out(run: RunConfig, source: ActivationSource) -> HeldOut | None:
    """What the run file wants to be measured during training. Raises ConfigError where the source cannot."""
    if not run.eval:
        return None
    settings = dict(run.eval)
    every = cast("int | float", settings.pop("every_samples"))
    require(
        not isinstance(source, FedSource),
        "eval: the processes that train have no source to measure on, other processes read it; leave out eval, or "
        "parallel.source",
    )
    if not isinstance(source, MeasuresHeldOut):
        raise ConfigError(
            f"eval: the source {run.source['name']!r} has nothing to measure on during training; leave out eval"
        )
    return HeldOut(source.held_out(structure(settings, source.held_out_class, where="eval")), every)


def _loggers(run: RunConfig, folder: RunFolder, names: Iterable[str]) -> dict[str, list[Logger]]:
    """For each dictionary its log, and loggers of its own of the kinds that the run file asks for."""
    return {
        name: [
            JsonlLogger(JsonlConfig(path=folder.of(name) / LOG, label=False)),
            *(cast("Logger", _component(logger, "logger")) for logger in run.loggers),
        ]
        for name in names
    }


def _report(folder: RunFolder, results: Mapping[str, TrainResult], config: Mapping[str, Any]) -> None:
    """Write the reports. Where one cannot be written, that is said, and the dictionaries are saved all the same."""
    from sae_core.report.training import write_comparison_report, write_report

    try:
        for name, result in results.items():
            write_report(folder.of(name) / REPORT, result, config, name)
        if list(results) != [""]:
            links = {name: f"{MEMBERS}/{name}/{REPORT}" for name in results}
            write_comparison_report(folder.work / REPORT, results, config, links)
    except MissingDependencyError as error:
        _say(f"no {REPORT}: {error}")
    except Exception as error:  # noqa: BLE001 - days of training are worth more than a page about them
        _say(f"no {REPORT}: {type(error).__name__}: {error}")


@contextmanager
def _writing(folder: Path) -> Generator[None]:
    """A disk that refuses is one clear error."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise FormatError(f"{folder}: cannot be written: {reason}") from error


def _fit(trainer: Trainer, folder: RunFolder | None, output: Path) -> dict[str, TrainResult]:
    """`Trainer.fit_all`, with signals heard and what was learnt kept when it does not end well.

    An error may be one of this rank's alone, and then others do not come to keep their latents.
    """
    heard: list[signal.Signals] = []

    def stop(which: signal.Signals) -> None:
        heard.append(which)
        trainer.stop()

    try:
        with first_signal(stop, quiet=folder is None):
            results = trainer.fit_all()
            if trainer.stopped and not trainer.finished:
                by = [each for each in trainer.ranks.everyone(heard[0] if heard else None) if each is not None]
                if by:
                    raise _stopped(trainer, folder, output, by[0])
            return results
    except RunStopped:
        raise
    except BaseException as error:
        if trainer.steps and folder is not None and trainer.ranks.latents is None:
            error.add_note(_keep(trainer, folder, output))
        raise
    finally:
        trainer.close()


def _stopped(trainer: Trainer, folder: RunFolder | None, output: Path, which: signal.Signals) -> RunStopped:
    if not trainer.steps:
        return RunStopped(f"stopped by {which.name} before the first step", which)
    writes = folder is not None or (trainer.ranks.latents is not None and not trainer.ranks.rank)
    kept = _keep(trainer, folder, output) if writes else ""
    path = trainer.checkpoint()
    return RunStopped(f"stopped by {which.name}; --resume goes on from {path}; {kept}", which)


def _keep(trainer: Trainer, folder: RunFolder | None, output: Path) -> str:
    """Save every dictionary as it is, for a look at it; the message that says where.

    Ranks without `folder` write their latents where the first one says.
    """
    kept: list[Path] = []
    for name, learner in trainer.learners.items():
        try:
            kept.append(learner.sae.save(output if folder is None else folder.of(name) / INTERRUPTED))
        except FormatError as error:  # weights that diverged cannot be saved; why training stopped matters more
            if len(trainer.learners) == 1:
                return f"what was learnt in {trainer.samples} samples cannot be kept: {error}"
    return f"what was learnt in {trainer.samples} samples is saved in {', '.join(map(str, kept))}"


def chosen_device(device: str) -> str:
    """`device`, or for ``auto`` CUDA where there is one and else the CPU. Raises ConfigError for one that is not there."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return str(as_device(device))


def _say(message: str) -> None:
    sys.stderr.write(f"sae-core: {message}\n")


def resolved(
    run: RunConfig, members: Mapping[str, Member], saes: Mapping[str, SAE], source: ActivationSource
) -> dict[str, Any]:
    """The run with every default filled in and paths made absolute, as plain data; a grid is written out."""
    config = getattr(source, "config", None)
    fields = unstructure(absolute_paths(config)) if dataclasses.is_dataclass(config) else {}
    full = {
        name: {"architecture": named_architecture(sae), **unstructure(sae.config), **_start_of(members[name])}
        for name, sae in saes.items()
    }
    plain = {
        **unstructure(absolute_paths(run)),
        "source": {"name": _lasting("source", run.source["name"]), **fields},
        "loggers": [{**unstructure(each), "name": _lasting("logger", each["name"])} for each in run.loggers],
    }
    if list(saes) == [""]:
        return {**plain, "sae": full[""], "seed": members[""].seed}
    several = [
        {"name": name, **full[name], "seed": member.seed, "train": unstructure(member.train)}
        for name, member in members.items()
    ]
    return {**plain, "sae": None, "saes": several, "grid": {}}


def _without_start(member: Member, initial: Mapping[str, Any] | None) -> Member:
    """A dictionary of a run that goes on: its weights are in the checkpoint, and the folder it started from may be gone."""
    if initial is None or "start" not in member.sae:
        return member
    changed = {key: value for key, value in member.sae.items() if key != "start"}
    return dataclasses.replace(member, sae={**initial, **changed})


def _start_of(member: Member) -> dict[str, str]:
    return {"start": str(Path(member.sae["start"]).absolute())} if "start" in member.sae else {}


def _lasting(kind: str, name: str) -> str:
    """The name under which it is found later, or which says what to install."""
    return get_registry().find(kind, name).lasting


def new_sae(run: RunConfig, member: Member, name: str, source: ActivationSource) -> SAE:
    """One of them as it is before training. Raises ConfigError that names it."""
    try:
        if "start" in member.sae:
            return _started(run, member)
        architecture, fields = _fields(member, source)
        return create(architecture, seed=member.seed, device=run.device, dtype=run.dtype, **fields)
    except ConfigError as error:
        raise ConfigError(f"saes: {name}: {error}" if name else str(error)) from None


def parameter_bytes(run: RunConfig, member: Member, source: ActivationSource) -> int | None:
    """Bytes of a dictionary's parameters, without making them; None for one that starts from a folder."""
    if "start" in member.sae:
        return None
    architecture, fields = _fields(member, source)
    sae_class = cast("type[SAE]", get_registry().usable("architecture", architecture))
    with torch.device("meta"):
        shell = sae_class(structure(fields, sae_class.config_class, where=f"architecture {architecture!r}"))
    return sum(p.numel() * p.element_size() for p in shell.to(as_dtype(run.dtype)).parameters())


def _fields(member: Member, source: ActivationSource) -> tuple[str, dict[str, Any]]:
    """The architecture of a dictionary and its fields, widths from the source among them."""
    given = {**member.sae, **_sites_read(member, source)}
    sae_class = cast("type[SAE]", get_registry().usable("architecture", str(given["architecture"])))
    fields: dict[str, Any] = {**fields_for(source, sae_class), **given}
    return fields.pop("architecture"), fields


def _started(run: RunConfig, member: Member) -> SAE:
    """An SAE with the weights, buffers and statistics of the one in the folder `start`; fields may differ where these fit.

    Raises FormatError for a folder that holds no form that training can start from.
    """
    fields = dict(member.sae)
    path = Path(fields.pop("start"))
    found = SAE.load(path, form="training", device=run.device, dtype=run.dtype)
    architecture = named_architecture(found)
    asked = fields.pop("architecture", architecture)
    require(asked == architecture, f"start: {path} holds a {architecture}, not a {asked}")
    config = {**unstructure(found.config), **fields}
    sae = create(architecture, seed=member.seed, device=run.device, dtype=run.dtype, **config)
    have, want = ({key: tuple(t.shape) for key, t in each.state_dict().items()} for each in (found, sae))
    require(have == want, f"start: the tensors of {path} do not fit what {', '.join(fields) or 'its config'} asks for")
    sae.load_state_dict(found.state_dict())
    return sae


def _sites_read(member: Member, source: ActivationSource) -> dict[str, Any]:
    """`reads` with the widths that the source gives, where the run file lists names, and d_in as their sum."""
    reads = member.sae.get("reads")
    if not reads:
        return {}
    if isinstance(reads, list):
        for site in cast("list[str]", reads):
            known = ", ".join(source.sites)
            require(
                site in source.sites,
                f"reads: the source has no site {site!r}{did_you_mean(str(site), source.sites)} (it gives {known})",
            )
        reads = {site: source.sites[site] for site in cast("list[str]", reads)}
    return {"reads": reads, "d_in": member.sae.get("d_in", sum(cast("dict[str, int]", reads).values()))}


def _component(settings: Mapping[str, Any], kind: str, **defaults: Any) -> object:
    """A source or logger by its registered name, built from the rest of its settings; `defaults` where it has such fields."""
    fields = dict(settings)
    component = cast("Any", get_registry().usable(kind, fields.pop("name")))
    config_class = cast("type", component.config_class)
    known = {field.name for field in dataclasses.fields(config_class)}
    fields = {name: value for name, value in defaults.items() if name in known} | fields
    return component(absolute_paths(structure(fields, config_class, where=f"{kind} {settings['name']!r}")))


def _write_yaml(path: Path, data: Mapping[str, Any]) -> None:
    text = to_yaml(data)
    write_atomically(path, lambda temporary: cast("None", temporary.write_text(text, encoding="utf-8")))
