"""What every logger promises: it takes the records that a run gives, may be closed at any time, and does not end the run."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping
from typing import cast

import torch

from sae_core.protocols import Logger, Resumable, RunFacts
from sae_core.sae import create
from sae_core.testing.kit import Check, NotApplicable, Subject, check_class, check_options
from sae_core.training.checkpoint import read_checkpoint, write_checkpoint
from sae_core.training.config import TrainConfig
from sae_core.training.trainer import Progress, Trainer

__all__ = [
    "CHECKS",
    "check_close",
    "check_records",
    "check_resumes",
    "check_run",
    "check_several_dictionaries",
    "check_values_that_are_no_numbers",
]

_Record = Mapping[str, float | int | str | None]


def check_records(subject: Subject) -> None:
    """`log` takes flat mappings of numbers, text and None, with the same names every time, and leaves them as they are.

    The first value under a name may be None, and a number later.
    """
    logger = _started(subject)
    for step in range(1, 4):
        record = _record(step)
        kept = dict(record)
        logger.log(record)
        assert dict(record) == kept, "log() changes the record that it is given"
    logger.close()


def check_values_that_are_no_numbers(subject: Subject) -> None:
    """NaN and infinity do not break it: what is measured may have no value, and the log should say so."""
    logger = _started(subject)
    logger.log(_record(1))
    logger.log({**_record(2), "loss": math.nan, "explained_variance": -math.inf})
    logger.log(_record(3))
    logger.close()


def check_close(subject: Subject) -> None:
    """`close` may come twice, and before any record, or `start`."""
    unused = _logger(subject)
    unused.close()
    unused.close()
    used = _started(subject)
    used.log(_record(1))
    used.close()
    used.close()


def check_run(subject: Subject) -> None:
    """The Trainer uses it from the first record to the last, without leaving it out for a failure.

    A logger that raises is left out and the run goes on; here that is a failure, named.
    """
    sae = create("standard", d_in=8, d_sae=16)
    batches = [torch.randn(16, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(6)]
    config = TrainConfig(total_samples=96, batch_size=16, log_every_steps=2, dead_after_samples=32, progress_bar=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Trainer(sae, batches, config, loggers=[_logger(subject)]).fit()
    said = [str(warning.message) for warning in caught]
    assert not said, said[0]


def check_several_dictionaries(subject: Subject) -> None:
    """A run of several dictionaries has a logger of the same config for each, told apart by `start`; their records may differ.

    Whatever they share, a file say, takes the records of both in turn. `start` gets the SAE in training and what was set, and
    leaves both as they are.
    """
    one, two = _logger(subject), _logger(subject)
    settings = {
        "sae": {"architecture": "standard", "d_in": 8, "l1": {"from": 0, "to": 1}},
        "output": "runs/x",
        "seed": None,
    }
    for logger, name in ((one, "k=16"), (two, "gated")):
        facts = RunFacts(sae=create("standard", d_in=8, d_sae=16), name=name, config=settings, folder=subject.folder)
        before = json.dumps(settings)
        logger.start(facts)
        assert json.dumps(settings) == before, "start() changes the config that it is told"
    one.log(_record(1))
    two.log({**_record(1), "loss/gate": 0.25})
    one.log(_record(2))
    two.log({**_record(2), "loss/gate": 0.5})
    for logger in (one, two):
        logger.close()


def check_resumes(subject: Subject) -> None:
    """With `state_dict` and `load_state_dict`, a run that goes on from a checkpoint continues the log where it was."""
    logger = _logger(subject)
    if not isinstance(logger, Resumable):
        raise NotApplicable("it has no state_dict and load_state_dict")
    batches = [torch.randn(16, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(6)]
    config = TrainConfig(total_samples=96, batch_size=16, log_every_steps=1, init_b_dec="zeros", progress_bar=False)

    def stop(progress: Progress) -> None:
        if progress.trainer.steps == 3:
            progress.trainer.stop()

    trainer = Trainer(create("standard", d_in=8, d_sae=16), batches, config, callbacks=[stop], loggers=[logger])
    trainer.fit()
    state = read_checkpoint(write_checkpoint(subject.folder / "state", {"logger": logger.state_dict()}))["logger"]
    folder = trainer.save(subject.folder / "checkpoint")
    trainer.close()
    again = _logger(subject)
    assert isinstance(again, Resumable)
    again.load_state_dict(state)
    again.close()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Trainer.resume(folder, batches, loggers=[_logger(subject)]).fit()


def _logger(subject: Subject) -> Logger:
    return cast("Logger", subject.new())


def _started(subject: Subject) -> Logger:
    logger = _logger(subject)
    logger.start(RunFacts(sae=create("standard", d_in=8, d_sae=16), folder=subject.folder))
    return logger


def _record(step: int) -> _Record:
    return {
        "step": step,
        "samples": 64 * step,
        "lr": 3e-4,
        "loss": 1.5 / step,
        "loss/mse": 1.25 / step,
        "metrics/threshold": None if step == 1 else 0.5,
        "l0": 12.5,
        "explained_variance": 0.75,
        "dead_fraction": None,
    }


CHECKS: tuple[Check, ...] = (
    check_class,
    check_options,
    check_records,
    check_values_that_are_no_numbers,
    check_close,
    check_run,
    check_several_dictionaries,
    check_resumes,
)
