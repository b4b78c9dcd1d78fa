"""What experiments share: their settings, one way to train, and a result that prints, and saves itself as JSON and HTML."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, final

import torch
from sae_core import SAE, TrainConfig, Trainer, create
from sae_core.config import require
from sae_core.errors import ConfigError
from sae_core.format.write import write_atomically
from sae_core.training.trainer import Callback
from torch import Tensor
from tqdm import tqdm

from sae_synthetic._random import derived_seed

if TYPE_CHECKING:
    import plotly.graph_objects as go

__all__ = ["Claim", "ExperimentResult", "Runs", "Settings", "mean_and_spread"]

T = TypeVar("T")


@dataclass(frozen=True)
class Settings:
    """How to run an experiment: number of seeds, factor on the training samples, device, whether to show a bar, and how many
    processes share the seeds.
    """

    seeds: int = 1
    scale: float = 1.0
    device: str = "cpu"
    progress: bool = True
    processes: int = 1

    def __post_init__(self) -> None:
        require(self.seeds >= 1, f"seeds must be at least 1, not {self.seeds}")
        require(self.processes >= 1, f"processes must be at least 1, not {self.processes}")
        require(
            self.processes <= self.seeds,
            f"processes: {self.processes} are to share {self.seeds} seed(s), and a seed is the work of one",
        )
        require(0 < self.scale <= 100, f"scale must be in (0, 100], not {self.scale}")
        try:
            torch.empty(0, device=self.device)
        except (
            RuntimeError,
            AssertionError,
        ) as error:  # torch raises either, for a wrong name and for a missing driver
            reason = str(error).splitlines()[0]
            raise ConfigError(f"device: {self.device!r} cannot be used: {reason}") from error

    def samples(self, published: int, batch_size: int) -> int:
        """The training samples at this scale, at least twenty batches."""
        return max(int(published * self.scale), 20 * batch_size)

    def each_seed(self, work: Callable[[Settings, int], T]) -> list[T]:
        """``work(settings, seed)`` of every seed, in order.

        With several processes, seeds are worked on side by side, each process with its share of the cores; then `work` and what
        it gives must be such that they can be pickled, and a script that comes here needs ``if __name__ == "__main__"``.
        """
        if self.processes == 1:
            return [work(self, seed) for seed in range(self.seeds)]
        threads = max(1, torch.get_num_threads() // self.processes)
        with ProcessPoolExecutor(self.processes, get_context("spawn"), torch.set_num_threads, (threads,)) as pool:
            working = [pool.submit(work, replace(self, progress=False), seed) for seed in range(self.seeds)]
            try:
                done = tqdm(as_completed(working), total=self.seeds, unit="seed", ncols=79, disable=not self.progress)
                for future in done:
                    future.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
            return [future.result() for future in working]

    @contextmanager
    def runs(self, total: int) -> Generator[Runs]:
        """A bar over that many trainings."""
        with tqdm(total=total, unit="run", ncols=79, disable=not self.progress) as bar:
            yield Runs(self, bar)


@final
class Runs:
    """Trains SAEs, one after the other or several on one stream, the same way, and counts them."""

    def __init__(self, settings: Settings, bar: Any) -> None:
        self._settings, self._bar = settings, bar
        self.seconds = 0.0

    def train(
        self,
        label: str,
        architecture: str,
        config: Mapping[str, Any],
        batches: Iterable[Tensor],
        seed: int,
        *,
        prepare: Callable[[SAE], None] | None = None,
        callbacks: Sequence[Callback] = (),
        **training: Any,
    ) -> SAE:
        """A new SAE of `config`, changed by `prepare`, trained as `TrainConfig` with `training` says; in eval mode."""
        with self._counted(label, 1):
            sae = self._new(architecture, config, seed)
            if prepare is not None:
                prepare(sae)
            Trainer(sae, batches, _plan(training), callbacks=callbacks).fit()
        return sae.eval()

    def train_together(
        self,
        label: str,
        configs: Mapping[str, Mapping[str, Any]],
        batches: Iterable[Tensor],
        seed: int,
        training: Mapping[str, Mapping[str, Any]],
    ) -> dict[str, SAE]:
        """New SAEs of several architectures, by name, on the same batches, each as its own `training` says; in eval mode.

        Each ends with the bits that `train` gives it. Raises ConfigError if one diverges.
        """
        with self._counted(label, len(configs)):
            saes = {name: self._new(name, config, seed) for name, config in configs.items()}
            trainer = Trainer(saes, batches, {name: _plan(training[name]) for name in saes})
            trainer.fit_all()
            for name, reason in trainer.dropped.items():
                raise ConfigError(f"{label}: {name} diverged: {reason}")
        return {name: sae.eval() for name, sae in saes.items()}

    def _new(self, architecture: str, config: Mapping[str, Any], seed: int) -> SAE:
        weights = derived_seed(seed, "initial weights")
        return create(architecture, seed=weights, device=self._settings.device, **config)

    @contextmanager
    def _counted(self, label: str, runs: int) -> Generator[None]:
        self._bar.set_description_str(label, refresh=True)
        started = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - started
        self._bar.update(runs)


def _plan(training: Mapping[str, Any]) -> TrainConfig:
    return TrainConfig(progress_bar=False, init_b_dec="zeros", **training)


@dataclass(frozen=True)
class Claim:
    """A published finding, and whether this run shows it too."""

    text: str
    holds: bool


@dataclass(kw_only=True)
class ExperimentResult:
    """What an experiment found.

    `rows` under `columns` are the table, with published numbers beside measured ones; `claims` the findings; `data` all
    numbers; `figures` titles and functions that draw.
    """

    name: str
    paper: str
    setting: str
    columns: list[str]
    rows: list[list[str]]
    claims: list[Claim]
    data: dict[str, Any]
    figures: list[tuple[str, Callable[[], go.Figure]]] = field(default_factory=list[Any])
    seconds: float = 0.0

    def save(self, folder: Path, *, report: bool = True) -> list[Path]:
        """Write ``result.json`` and, unless not wanted, ``report.html``; returns their paths."""
        folder.mkdir(parents=True, exist_ok=True)
        content = {
            "name": self.name,
            "paper": self.paper,
            "setting": self.setting,
            "columns": self.columns,
            "rows": self.rows,
            "claims": [vars(claim) for claim in self.claims],
            "data": self.data,
            "seconds": self.seconds,
            "torch": torch.__version__,
        }
        text = json.dumps(content, indent=2) + "\n"
        paths = [folder / "result.json"]
        write_atomically(paths[0], lambda file: _fill(file, text))
        if report:
            paths.append(self._write_report(folder / "report.html"))
        return paths

    def _write_report(self, path: Path) -> Path:
        from sae_synthetic.report import Report

        page = Report(f"{self.name} ({self.paper})")
        page.text(self.setting)
        page.table(self.columns, self.rows)
        page.table(["finding", "seen here"], [[claim.text, "yes" if claim.holds else "no"] for claim in self.claims])
        for title, draw in self.figures:
            page.heading(title)
            page.figure(draw())
        return page.write(path)


def mean_and_spread(values: Sequence[float]) -> str:
    """The mean, and with several values their standard deviation.

    >>> mean_and_spread([0.5, 0.7]), mean_and_spread([0.5])
    ('0.600 ±0.141', '0.500')
    """
    tensor = torch.tensor(list(values), dtype=torch.float64)
    spread = f" ±{float(tensor.std()):.3f}" if len(values) > 1 else ""
    return f"{float(tensor.mean()):.3f}{spread}"


def _fill(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8")
