"""Records for Weights & Biases: one run of theirs for each dictionary, with every setting in its config.

Whether it talks to a server is theirs to say: `mode`, the variable WANDB_MODE, or whether somebody has logged in. A run that
goes on continues theirs. wandb is imported when a run file asks for this logger, and never else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, final

from sae_core.config import check_fields, option
from sae_core.errors import MissingDependencyError
from sae_core.protocols import RunFacts
from sae_core.training.log_names import LogNames, shown_as

__all__ = ["WandbConfig", "WandbLogger"]


@dataclass(frozen=True, kw_only=True)
class WandbConfig:
    """Config of `WandbLogger`."""

    project: str = option(default="sae-core", help="their project")
    entity: str | None = option(default=None, help="their user or team; null: the one that is logged in")
    run_name: str | None = option(
        default=None, help="name of the run, before that of the dictionary where there are several; null: one of theirs"
    )
    group: str | None = option(default=None, help="group of the run")
    tags: list[str] = option(default_factory=list, help="tags of the run")
    mode: Literal["online", "offline", "disabled"] | None = option(
        default=None, help="null: as WANDB_MODE says, else online"
    )
    names: LogNames = option(
        default="sae_lens", help="names of the curves: sae_lens as its users know them, or sae_core"
    )

    def __post_init__(self) -> None:
        check_fields(self)


@final
class WandbLogger:
    """Sends records to Weights & Biases. Raises MissingDependencyError without the package wandb."""

    config_class: ClassVar[type] = WandbConfig
    example: ClassVar[Mapping[str, str]] = {"mode": "disabled"}

    def __init__(self, config: WandbConfig) -> None:
        try:
            import wandb
        except ImportError as error:
            raise MissingDependencyError("the logger wandb needs a library: pip install 'sae-core[wandb]'") from error
        self._wandb: Any = wandb
        self._config = config
        self._id: str | None = None
        self._handle: Any = None
        self._run: RunFacts | None = None

    def start(self, run: RunFacts) -> None:
        """Begin their run, or continue it, with the settings as its config."""
        config = self._config
        parts = [part for part in (config.run_name, run.name) if part]
        self._run = run
        self._handle = self._wandb.init(
            project=config.project,
            entity=config.entity,
            name=" ".join(parts) or None,
            group=config.group,
            tags=config.tags or None,
            mode=config.mode,
            dir=None if run.folder is None else str(run.folder),
            config={**run.config, "architecture": run.sae.architecture},
            id=self._id,
            resume=None if self._id is None else "allow",
            reinit="create_new",  # a run may have several dictionaries, each with one of theirs
        )
        self._id = str(self._handle.id)

    def log(self, record: Mapping[str, float | int | str | None]) -> None:
        """Send one point of each curve; steps are theirs."""
        assert self._run is not None, "start comes first"
        self._handle.log(shown_as(record, self._run, self._config.names), step=int(record.get("step") or 0))

    def close(self) -> None:
        """End their run, with the norms of the decoder rows in its summary."""
        handle, self._handle = self._handle, None
        if handle is not None and self._run is not None:
            # In float64, as float32 has no room for bins between norms that are nearly equal.
            norms = self._run.sae.direction_norms().cpu().double().numpy()
            handle.summary["weights/W_dec_norms"] = self._wandb.Histogram(norms)
            handle.finish()

    def state_dict(self) -> dict[str, Any]:
        """Which of their runs this is."""
        return {"id": self._id}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue that run."""
        self._id = state["id"]
