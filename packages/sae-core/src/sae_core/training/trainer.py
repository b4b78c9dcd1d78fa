"""The trainer: batches in, optimiser steps, records out; the same loop for every architecture.

One stream of batches feeds one or several dictionaries, each with a `Learner` of its own, so that none of them is touched by
the others: every one ends with the bits that it gets alone. A step is forward, backward, gradient clipping and fused Adam,
and nothing in it waits for the device. What is measured accumulates there and crosses to the host every `log_every_steps`
steps. The set of dead latents is refreshed every `dead_refresh_steps` steps for the same reason.

A batch with NaN or infinite values, of the wrong width or dtype, ends the run with an error that says which; the SAE keeps
everything it had learnt before that batch. All randomness belongs to the source and to `create(seed=…)`, so two runs of
one seed give the same bits on one machine's CPU, and so does a run that was killed and went on from a checkpoint.
"""

from __future__ import annotations

import dataclasses
import sys
import time
import warnings
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast, final

import torch
from torch import Tensor

from sae_core.config import require, structure, unstructure
from sae_core.data.stream import Batch, Part, Stream, rows_of
from sae_core.data.wiring import Wiring
from sae_core.errors import ConfigError, DataError, FormatError, UnknownNameError
from sae_core.format.exports import exported
from sae_core.latent_ranks import LatentRanks, all_latents, latents_over
from sae_core.ops.memory import large_memory_is_kept
from sae_core.parallel.joining import require_divisible
from sae_core.parallel.ranks import ALONE, Ranks
from sae_core.plugins import PluginWarning
from sae_core.protocols import ActivationSource, HasMetadata, Logger, Resumable, RunFacts
from sae_core.sae import SAE, create
from sae_core.training.agreement import check_that_ranks_agree
from sae_core.training.checkpoint import Checkpoints, read_checkpoint, write_checkpoint
from sae_core.training.config import TrainConfig, samples_of
from sae_core.training.facts import (
    claimed,
    config_facts,
    differences,
    named_architecture,
    orphaned,
    source_facts,
    version_facts,
)
from sae_core.training.health import health
from sae_core.training.held_out import HeldOut
from sae_core.training.learner import DivergedError, Learner, Record
from sae_core.training.loggers import LogError
from sae_core.training.row_blocks import StepResult

__all__ = ["Callback", "Progress", "Record", "TrainResult", "Trainer"]

Source = ActivationSource | Iterable[Batch]
Loggers = Sequence[Logger] | Mapping[str, Sequence[Logger]]


@dataclass(frozen=True, slots=True)
class Progress:
    """What a callback sees after each step of a dictionary; reading `result` waits for the device."""

    trainer: Trainer
    learner: Learner
    result: StepResult
    record: Record | None
    """The record of this step's flush, or None between flushes."""
    name: str = ""
    """Which dictionary, where several are trained."""


Callback = Callable[[Progress], None]


@dataclass(slots=True)
class TrainResult:
    """A run as far as it went: the SAE in eval mode, the records in order, and how much was seen.

    `dropped` says why a dictionary among several was given up, and is None for all others.
    """

    sae: SAE
    history: list[Record] = field(default_factory=list[Record])
    samples: int = 0
    seconds: float = 0.0
    dropped: str | None = None
    health: list[str] = field(default_factory=list[str])
    """What is not well, and what to do about it."""
    density: Tensor | None = None
    """(d_sae,) the fraction of samples on which each latent fired over the last tenth of the run; None before it."""
    norms: Tensor | None = None
    """(d_sae,) the norms of the latents' `directions`, where latents are shared out over ranks; else the SAE knows them."""


@final
class Trainer:
    """Trains one SAE, or several by name, on one source.

    `source` may be any ActivationSource or an iterable of batches, tensors (batch, d_in) or `ActivationBatch`. `config` is
    one for all or one for each name; settings that belong to the stream (batch_size and the checkpoint policy) must agree.
    `callbacks` are called after every step with a `Progress`; `loggers` receive every record, a list for each name where there
    are several SAEs. `checkpoints` is a folder; without one, none are written but by `save`. `held_out` measures on other data
    now and then, and its numbers come into the records. `facts` are what loggers are told, by name; None: the settings of SAE
    and training. On several `ranks` (`sae_core.parallel.joining.joined`) each process makes the same trainer and calls the same
    methods; every batch is divided among them, and the first one logs and writes.

    >>> batches = [torch.randn(64, 8, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    >>> saes = {f"k={k}": create("topk", d_in=8, d_sae=16, k=k) for k in (1, 2)}
    >>> config = TrainConfig(total_samples=256, batch_size=64, progress_bar=False)
    >>> [result.samples for result in Trainer(saes, batches, config).fit_all().values()]
    [256, 256]
    """

    def __init__(
        self,
        saes: SAE | Mapping[str, SAE],
        source: Source,
        config: TrainConfig | Mapping[str, TrainConfig],
        callbacks: Sequence[Callback] = (),
        loggers: Loggers = (),
        *,
        checkpoints: str | Path | None = None,
        held_out: HeldOut | None = None,
        facts: Mapping[str, RunFacts] | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        named = {"": saes} if isinstance(saes, SAE) else dict(saes)
        require(len(named) > 0, "there is no SAE to train")
        configs = {name: config if isinstance(config, TrainConfig) else _of_name(config, name) for name in named}
        self._shared = _shared_settings(configs)
        require_divisible(self._shared.batch_size, ranks.size)
        self.ranks = ranks
        first = next(iter(named.values()))
        require(
            all(sae.ranks is first.ranks for sae in named.values()),
            "several SAEs are trained, and their latents are shared out over different processes; make all of them in one "
            "latents_over",
        )
        wirings = {
            name: Wiring.between(sae, source, _quoted(name)) if isinstance(source, ActivationSource) else None
            for name, sae in named.items()
        }
        self.source = source
        self.callbacks = list(callbacks)
        require(
            len(named) == 1 or isinstance(loggers, Mapping) or not loggers,
            "loggers: several SAEs are trained, and a logger receives the records of one; give a list for each name",
        )
        self.loggers = {
            name: list(_of_name(loggers, name) if isinstance(loggers, Mapping) else loggers) if ranks.first else []
            for name in named
        }
        self._run_facts = facts
        self._told = False
        self.learners = {name: Learner(sae, configs[name], wirings[name], ranks) for name, sae in named.items()}
        self.dropped: dict[str, str] = {}
        self._initial = {
            name: {"architecture": named_architecture(sae), **unstructure(sae.config)} for name, sae in named.items()
        }
        require(
            checkpoints is not None or self._shared.checkpoint_every_samples is None,
            "checkpoint_every_samples: give the folder for checkpoints, Trainer(..., checkpoints=...)",
        )
        self._held_out = held_out
        self._checkpoints = None if checkpoints is None else Checkpoints(Path(checkpoints), self._shared.keep_last)
        self._saved_at = (0, time.monotonic())
        self._stream: Stream | None = None
        self._ended = False
        self._stop = False
        self._asked_to_stop = False
        self._agreed = False

    # One dictionary.

    @property
    def learner(self) -> Learner:
        """The only learner. Raises ConfigError where there are several."""
        return self.learners[self._only()]

    @property
    def sae(self) -> SAE:
        """The only SAE."""
        return self.learner.sae

    @property
    def config(self) -> TrainConfig:
        """The only SAE's settings."""
        return self.learner.config

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The only SAE's optimiser."""
        return self.learner.optimizer

    @property
    def history(self) -> list[Record]:
        """The only SAE's records."""
        return self.learner.history

    # How far training is.

    @property
    def samples(self) -> int:
        """Samples that the furthest dictionary was trained on."""
        return max(learner.samples for learner in self.learners.values())

    @property
    def steps(self) -> int:
        """Steps of the furthest dictionary."""
        return max(learner.steps for learner in self.learners.values())

    @property
    def stream(self) -> Stream:
        """The row of batches, opened when it is first needed."""
        if self._stream is None:
            self._stream = Stream(self.source, self._shared.batch_size, self.ranks)
        return self._stream

    @property
    def stopped(self) -> bool:
        """Whether the last `fit` ended because of `stop`."""
        return self._stop

    @property
    def finished(self) -> bool:
        """Whether every dictionary has been trained on its `total_samples`, or was dropped."""
        return not self._active()

    # Training.

    def fit(self) -> TrainResult:
        """Train until `total_samples` or the end of the data, whichever is first; or until `stop`.

        Raises DataError for a bad batch or an empty source; the SAE then holds what it had learnt before.
        """
        name = self._only()
        return self.fit_all()[name]

    def result(self) -> TrainResult:
        """What has come out so far, of the only SAE."""
        return self.results()[self._only()]

    def results(self, seconds: float = 0.0) -> dict[str, TrainResult]:
        """What has come out so far, by name; where latents are shared out over ranks, all ask for it."""
        return {
            name: TrainResult(
                each.sae.eval(),
                each.history,
                each.samples,
                seconds,
                self.dropped.get(name),
                health(each),
                each.firing_density(),
                None if each.sae.ranks is None else all_latents(each.sae.direction_norms(), each.sae.ranks),
            )
            for name, each in self.learners.items()
        }

    def fit_all(self) -> dict[str, TrainResult]:
        """`fit` for every dictionary, by name. One that diverges among several is dropped, and the others go on."""
        if self._ended:
            raise ConfigError(
                f"this trainer has ended after {self.samples} samples; Trainer.resume goes on from a checkpoint, and a new "
                "Trainer trains the SAE further on new batches"
            )
        if not self._active():
            raise ConfigError(f"there is nothing left to train: {self.samples} samples are done; raise total_samples")
        started = time.perf_counter()
        self._stop = self._asked_to_stop = False
        try:
            with large_memory_is_kept(), self._progress_bar() as bar:
                self.agree()
                self._start_loggers()
                self._initialise(bar)
                self._check_that_they_can_be_saved()
                with self.ranks.in_step():
                    self._loop(bar)
            if not self._stop:  # a run that goes on later has no record here
                for name in self.learners:
                    self._flush(name)
        finally:
            self._end()
        if not self.steps and not self._stop:
            raise DataError("the source gave no batch: there is nothing to train on")
        if not self._stop:
            for name in self.learners:
                self._record_provenance(name)
        return self.results(time.perf_counter() - started)

    def close(self) -> None:
        """Close the loggers; `fit` does so when it has ended, unless it was stopped and may go on."""
        for name, some in self.loggers.items():
            for logger in list(some):
                with self._forgiving(name, logger):
                    logger.close()

    def log(self, record: Mapping[str, float | int | str | None], name: str = "") -> None:
        """Give one more record to the loggers of a dictionary. What one of them raises is reported, and it is left out."""
        self._start_loggers()
        for logger in list(self.loggers[name]):
            with self._forgiving(name, logger):
                logger.log(record)

    def agree(self) -> None:
        """Raise ConfigError, on several ranks, where one of them would not train the same as the first; `fit` does so, too."""
        if not self._agreed:
            facts = {**self._facts(), "train": self._of_each(lambda each: unstructure(each.config))}
            check_that_ranks_agree(self.ranks, facts, self._initial, [each.sae for each in self.learners.values()])
        self._agreed = True

    def stop(self) -> None:
        """Have `fit` end after the step that is running; may be called from a callback or a signal handler.

        On several ranks it is enough when one of them is asked.
        """
        self._asked_to_stop = True
        if self.ranks.world.size == 1:
            self._stop = True

    def step(self, batch: Batch) -> StepResult:
        """One optimiser step of the only SAE on one batch, in train mode, cut to what is left of `total_samples`."""
        learner = self.learner
        if learner.finished:
            raise ConfigError(f"total_samples: {learner.config.total_samples} samples have been trained on already")
        return self._step(self._only(), batch)

    # Saving.

    def save(self, folder: str | Path) -> Path:
        """Write the whole state as the folder `folder`, from which `resume` goes on with the same bits.

        Where the source's iterator cannot be saved, its place is left out, and `resume` refuses unless forced. Of several ranks
        the first one writes, or those that share out the latents together; what they write does not depend on how many there
        are.
        """
        state = self.state_dict()
        return Path(folder) if self.ranks.rank else write_checkpoint(Path(folder), state, self._over)

    def checkpoint(self) -> Path:
        """Write one more checkpoint into the folder for checkpoints. Raises ConfigError when there is none."""
        if self._checkpoints is None:
            raise ConfigError("no folder for checkpoints: Trainer(..., checkpoints=...)")
        with self.ranks.in_step(False):
            state = self.state_dict()
            path = self._checkpoints.folder
            if not self.ranks.rank:
                path = self._checkpoints.save(self.samples, state, self._over)
        self._saved_at = (self.samples, time.monotonic())
        return path

    def state_dict(self) -> dict[str, Any]:
        """All learners, the stream's place, resumable loggers, and the facts that must be the same when training goes on."""
        for learner in self.learners.values():
            learner.settle()
        loggers = {
            name: [
                {"class": type(logger).__qualname__, "state": logger.state_dict()}
                for logger in each
                if isinstance(logger, Resumable)
            ]
            for name, each in self.loggers.items()
        }
        return {
            "learners": {name: learner.state_dict() for name, learner in self.learners.items()},
            "configs": {name: unstructure(learner.config) for name, learner in self.learners.items()},
            "initial": self._initial,
            "dropped": self.dropped,
            "stream": self.stream.state_dict() if self.stream.resumable else None,
            "loggers": loggers,
            "facts": self._facts(),
        }

    @classmethod
    def resume(
        cls,
        folder: str | Path,
        source: Source,
        config: TrainConfig | Mapping[str, TrainConfig] | None = None,
        callbacks: Sequence[Callback] = (),
        loggers: Loggers = (),
        *,
        checkpoints: str | Path | None = None,
        held_out: HeldOut | None = None,
        device: str | torch.device = "cpu",
        architecture: str | None = None,
        force: bool = False,
        ranks: Ranks = ALONE,
    ) -> Trainer:
        """A trainer that goes on where the checkpoint `folder` was written, or the newest whole one inside it.

        In the second case further checkpoints go there too. `source` must be what it was, opened anew. `config` None is the
        saved one; a new one may differ in `MAY_CHANGE`. Loggers that can be resumed continue where theirs stood.
        `architecture` is what provides those dictionaries now whose package has another name. There may be other `ranks` than
        there were. Raises ConfigError that names every difference that would change the numbers, unless `force`; FormatError
        for damaged checkpoints.
        """
        folder = Path(folder)
        with latents_over(ranks.latents):
            if (folder / "checkpoint.json").exists():
                state = read_checkpoint(folder)
            else:
                found = Checkpoints(folder, keep_last=1).newest()
                if found is None:
                    raise FormatError(f"{folder}: no checkpoint there")
                state, checkpoints = found.state, checkpoints or folder
        saved = {name: structure(c, TrainConfig, where="checkpoint") for name, c in state["configs"].items()}
        if architecture is not None:
            gone = orphaned(state)
            require(len(gone) > 0, f"architecture: {folder} holds nothing of a package that is gone; leave it out")
            state = claimed(state, dict.fromkeys(gone, architecture))
        try:
            with latents_over(ranks.latents):
                saes = {
                    name: create(device=device, dtype=learner["dtype"], **state["initial"][name])
                    for name, learner in state["learners"].items()
                }
        except UnknownNameError as error:
            raise UnknownNameError(
                f"{folder}: {error}\nif another package provides it now, say so: "
                "Trainer.resume(..., architecture='distribution:name')"
            ) from None
        one = saes[""] if list(saes) == [""] else saes
        trainer = cls(
            one, source, config or saved, callbacks, loggers, checkpoints=checkpoints, held_out=held_out, ranks=ranks
        )
        trainer.load_state_dict(state, force=force)
        return trainer

    def load_state_dict(self, state: Mapping[str, Any], *, force: bool = False) -> None:
        """Go on with a saved state; call it before the first step. Raises ConfigError as `resume` does.

        Where nobody provides a saved dictionary's architecture any more, the one of this trainer's counts as the same.
        """
        if self.steps or self._ended:
            raise ConfigError("a state is loaded into a new trainer, before its first step")
        if list(state["learners"]) != list(self.learners):
            raise ConfigError(
                f"the checkpoint holds the SAEs {list(state['learners'])}, this trainer {list(self.learners)}"
            )
        if gone := orphaned(state):  # whoever made these dictionaries says what provides them now
            state = claimed(state, {name: self._initial[name]["architecture"] for name in gone})
        found = [
            *(
                line
                for name in self.learners
                for line in differences(state["initial"][name], self._initial[name], _joined("sae", name))
            ),
            *differences(state["facts"], self._facts(), ""),
        ]
        if state["stream"] is None:
            found.append("the source's place was not saved, as its iterator has no state_dict and load_state_dict")
        elif not self.stream.resumable:
            found.append("the source's iterator has no load_state_dict")
        if found and not force:
            raise ConfigError(
                "going on would not give the numbers of the run that was saved: " + "; ".join(found) + ". "
                "Restore what differs, or force it"
            )
        for name, learner in self.learners.items():
            learner.load_state_dict(state["learners"][name])
        self._initial = dict(state["initial"])
        self.dropped = dict(state["dropped"])
        if state["stream"] is not None and self.stream.resumable:
            self.stream.load_state_dict(state["stream"])
        for name, each in self.loggers.items():
            _restore_loggers(each, state["loggers"].get(name, []))
        self._saved_at = (self.samples, time.monotonic())

    # Parts of the loop.

    @property
    def _over(self) -> LatentRanks | None:
        """The ranks that latents are shared out over."""
        return next(iter(self.learners.values())).sae.ranks

    def _only(self) -> str:
        if len(self.learners) != 1:
            raise ConfigError(f"several SAEs are trained: {', '.join(self.learners)}; use fit_all and learners[name]")
        return next(iter(self.learners))

    def _active(self) -> list[str]:
        return [name for name, each in self.learners.items() if not each.finished and name not in self.dropped]

    def _initialise(self, bar: Any) -> None:
        waiting = [each for each in self.learners.values() if each.steps == 0 and each.looks_ahead]
        if not waiting:
            return
        most = max(each.config.init_samples for each in waiting)
        width = sum(self.source.sites.values()) if isinstance(self.source, ActivationSource) else waiting[0].sae.d_in

        def enough(batches: Sequence[Batch | Part]) -> bool:
            rows = sum(rows_of(batch, width) for batch in batches)
            if self._stop:
                return True
            bar.set_postfix_str(f"looking at the first samples, {rows:,} of {most:,}", refresh=False)
            bar.update(0)  # shows it, but not more often than a bar is shown
            return rows >= most

        first = self.stream.peek(enough)
        if self._stop:  # before all of it was seen
            return
        bar.set_postfix_str("starting b_dec and the normalisation", refresh=True)
        for learner in waiting:
            learner.initialise(first)
        bar.set_postfix_str("")

    def _check_that_they_can_be_saved(self) -> None:
        """Export every dictionary once: an export that cannot be loaded is known before training, not after days of it."""
        for learner in self.learners.values():
            if learner.steps == 0 and learner.ready:
                exported(learner.sae)

    def _loop(self, bar: Any) -> None:
        while (active := self._active()) and not self._stop:
            batch = next(self.stream, None)
            if batch is None:
                return
            before = self.samples
            due = self._is_asked_for()
            try:
                for name in active:
                    self._step(name, batch)
            except DataError:
                if self.samples == before:
                    self.stream.put_back(batch)
                raise
            if self._samples_are_due() or (due and self.steps):
                self.checkpoint()
            bar.update(self.samples - before)
            self._show(bar)

    def _step(self, name: str, batch: Batch | Part) -> StepResult:
        learner = self.learners[name]
        self._start_loggers()
        result = learner.step(batch)
        due = learner.steps % learner.config.log_every_steps == 0 or learner.finished
        record = self._flush(name) if due else None
        for callback in self.callbacks:
            callback(Progress(self, learner, result, record, name))
        return result

    def _flush(self, name: str) -> Record | None:
        if name in self.dropped:
            return None
        try:
            record = self.learners[name].flush()
        except DivergedError as error:
            if len(self.learners) - len(self.dropped) == 1:
                raise
            self.dropped[name] = str(error)
            return None
        if record is not None:
            if self._held_out is not None:
                with self.ranks.in_step(False):
                    if not self.ranks.rank:  # with all that share out the latents
                        self._held_out(self.learners[name], record)
                    record.update(self.ranks.told(record))
            self.log(record, name)
        return record

    def _start_loggers(self) -> None:
        """Tell every logger once what run this is."""
        if self._told:
            return
        self._told = True
        for name, some in self.loggers.items():
            facts = self._facts_for_loggers(name)
            for logger in list(some):
                with self._forgiving(name, logger):
                    logger.start(facts)

    def _facts_for_loggers(self, name: str) -> RunFacts:
        learner = self.learners[name]
        if self._run_facts is not None:
            return dataclasses.replace(_of_name(self._run_facts, name), steps=learner.steps)
        config = {"sae": self._initial[name], "train": unstructure(learner.config)}
        return RunFacts(sae=learner.sae, name=name, config=config, steps=learner.steps)

    @contextmanager
    def _forgiving(self, name: str, logger: Logger) -> Generator[None]:
        """A logger that fails is reported once and left out; where our own log cannot be written, the run ends."""
        try:
            yield
        except LogError:
            raise
        except Exception as error:  # noqa: BLE001 - it may be anything, and days of training are worth more
            if logger in self.loggers[name]:
                self.loggers[name].remove(logger)
            what = f"{type(logger).__module__}.{type(logger).__qualname__}"
            warnings.warn(
                f"the logger {what} failed and is left out from here on: {type(error).__name__}: {error}",
                PluginWarning,
                stacklevel=2,
            )

    def _is_asked_for(self) -> bool:
        """Whether the clock asks for a checkpoint; and what one rank was asked, to stop, counts for all."""
        minutes = self._shared.checkpoint_every_minutes
        due = (
            self._checkpoints is not None
            and minutes is not None
            and time.monotonic() - self._saved_at[1] >= 60 * minutes
        )
        if self.ranks.world.size == 1:
            return due
        asked = torch.tensor([self._asked_to_stop, due and self.ranks.first], dtype=torch.int32)
        self._stop, due = map(bool, self.ranks.world.most(asked).tolist())
        return due

    def _samples_are_due(self) -> bool:
        every = self._shared.checkpoint_every_samples
        if self._checkpoints is None or every is None:
            return False
        size = max(samples_of(every, self._shared.total_samples), 1)
        return self.samples // size > self._saved_at[0] // size

    def _end(self) -> None:
        self._ended = not self._stop
        for learner in self.learners.values():
            learner.sae.eval()
        if self._ended:
            self.close()

    def _facts(self) -> dict[str, Any]:
        return {
            "source": source_facts(self.source),
            "train": self._of_each(lambda each: config_facts(each.config)),
            "precision": self._of_each(lambda each: f"{each.sae.dtype} on {each.sae.device.type}"),
            "versions": self._of_each(lambda each: version_facts(each.sae)),
        }

    def _of_each(self, fact: Callable[[Learner], Any]) -> Any:
        if list(self.learners) == [""]:
            return fact(self.learners[""])
        return {name: fact(each) for name, each in self.learners.items()}

    def _progress_bar(self) -> Any:
        from tqdm.auto import tqdm

        return tqdm(
            total=max(each.config.total_samples for each in self.learners.values()),
            initial=self.samples,
            unit="sample",
            unit_scale=True,
            disable=not (self._shared.progress_bar and self.ranks.first),
            dynamic_ncols=True,
            mininterval=0.1 if sys.stderr.isatty() else 10,  # a log file wants a line now and then
        )

    def _show(self, bar: Any) -> None:
        learner = next(iter(self.learners.values()))
        if learner.history and learner.steps % learner.config.log_every_steps == 0:
            last = learner.history[-1]
            shown = {"L0": (last["l0"], ".1f"), "EV": (last["explained_variance"], ".3f")}
            bar.set_postfix_str(
                " ".join(f"{name} {value:{form}}" for name, (value, form) in shown.items() if value is not None),
                refresh=False,
            )

    def _record_provenance(self, name: str) -> None:
        """Keep with the SAE what it was trained on and how."""
        learner = self.learners[name]
        if isinstance(self.source, HasMetadata):
            learner.sae.metadata.update(self.source.metadata())
        ours = learner.sae.metadata.setdefault("sae_core", {})
        ours["training"] = {
            "samples": learner.samples,
            "steps": learner.steps,
            "train_config": unstructure(learner.config),
        }
        if learner.history:
            last = learner.history[-1]
            ours["training"]["final"] = {
                key: last[key] for key in ("loss", "explained_variance", "l0", "dead_fraction") if last[key] is not None
            }


def _of_name(by_name: Mapping[str, Any], name: str) -> Any:
    if name not in by_name:
        raise ConfigError(f"nothing is given for the SAE {name!r}, only for {', '.join(map(repr, by_name))}")
    return by_name[name]


def _shared_settings(configs: Mapping[str, TrainConfig]) -> TrainConfig:
    """Any of them, after checking that they agree where they share the stream."""
    first, *others = configs.values()
    for field_name in ("batch_size", "checkpoint_every_samples", "checkpoint_every_minutes", "keep_last"):
        values = {getattr(config, field_name) for config in (first, *others)}
        require(len(values) == 1, f"{field_name}: SAEs on one stream share it, found {sorted(map(str, values))}")
    return first


def _quoted(name: str) -> str:
    return f"SAE {name!r}: " if name else ""


def _joined(what: str, name: str) -> str:
    return f"{what}.{name}" if name else what


def _restore_loggers(loggers: Sequence[Logger], saved: Sequence[Mapping[str, Any]]) -> None:
    """Give every logger that can be resumed the state of the first one of its class that is left."""
    left = list(saved)
    for logger in loggers:
        state = next((each for each in left if each["class"] == type(logger).__qualname__), None)
        if state is not None and isinstance(logger, Resumable):
            left.remove(cast("Any", state))
            logger.load_state_dict(state["state"])
