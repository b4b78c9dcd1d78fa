"""Records for TensorBoard: curves over samples, the settings as text, norms of the decoder as histograms.

Each dictionary of a run has a folder of its own, so that TensorBoard draws them into one another. A run that goes on takes
back what it logged after the checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, final

from sae_core.config import check_fields, option
from sae_core.errors import ConfigError, MissingDependencyError
from sae_core.protocols import RunFacts
from sae_core.training.log_names import LogNames, shown_as
from sae_core.yaml_text import to_yaml

__all__ = ["TensorBoardConfig", "TensorBoardLogger"]


@dataclass(frozen=True, kw_only=True)
class TensorBoardConfig:
    """Config of `TensorBoardLogger`."""

    folder: Path | None = option(
        default=None,
        help="where to log, with a folder for each of several dictionaries; null: tensorboard, in the output",
    )
    names: LogNames = option(
        default="sae_lens", help="names of the curves: sae_lens as its users know them, or sae_core"
    )

    def __post_init__(self) -> None:
        check_fields(self)


@final
class TensorBoardLogger:
    """Writes records where TensorBoard finds them. Raises MissingDependencyError without the package tensorboard."""

    config_class: ClassVar[type] = TensorBoardConfig
    example: ClassVar[Mapping[str, str]] = {"folder": "{folder}"}

    def __init__(self, config: TensorBoardConfig) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter  # which needs a library that nothing else does
        except ImportError as error:
            raise MissingDependencyError(
                "the logger tensorboard needs a library: pip install 'sae-core[tensorboard]'"
            ) from error
        self._config = config
        self._open: Any = SummaryWriter
        self._writer: Any = None
        self._run: RunFacts | None = None

    def start(self, run: RunFacts) -> None:
        """Open the folder and write the settings. Raises ConfigError where nobody says which folder."""
        if self._config.folder is not None:
            folder = self._config.folder / run.name
        elif run.folder is not None:
            folder = run.folder / "tensorboard"
        else:
            raise ConfigError("tensorboard: this run keeps no folder; give one, folder: PATH")
        self._run = run
        self._writer = self._open(str(folder), purge_step=run.steps + 1 if run.steps else None)
        if not run.steps:
            self._writer.add_text("config", f"```\n{to_yaml(run.config)}```")

    def log(self, record: Mapping[str, float | int | str | None]) -> None:
        """Write one point of each curve; steps are TensorBoard's steps."""
        assert self._run is not None, "start comes first"
        step = int(record.get("step") or 0)
        for name, value in shown_as(record, self._run, self._config.names).items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Write the norms of the decoder rows as a histogram, and close the file."""
        writer, self._writer = self._writer, None
        if writer is not None and self._run is not None:
            writer.add_histogram("weights/W_dec_norms", self._run.sae.direction_norms().float().cpu())
            writer.close()
