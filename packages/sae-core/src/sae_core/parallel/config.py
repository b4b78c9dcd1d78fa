"""`ParallelConfig`: how the processes of a run share its work, as run files say it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sae_core.config import check_fields, option, require

__all__ = ["ParallelConfig"]


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How many processes share a run that `torchrun` started, and how long they wait for each other."""

    data: int | Literal["auto"] = option(
        default="auto", help="processes among which every batch is divided; auto: all that were started"
    )
    latents: int = option(default=1, help="processes over which the latents of every dictionary are shared out")
    source: int = option(
        default=0,
        help="processes, the last ones, that do not train but read the source, run the language model say, and send its "
        "activations to the others; 0: each process reads its own part",
    )
    timeout_seconds: float = option(
        default=50.0,
        help="how long the others wait in a training step for a process that does not come, before they end",
    )

    def __post_init__(self) -> None:
        check_fields(self)
        require(self.data == "auto" or self.data > 0, f"data must be positive or auto, not {self.data}")
        require(self.latents > 0, f"latents must be positive, not {self.latents}")
        require(self.source >= 0, f"source must not be negative, it is {self.source}")
        require(self.timeout_seconds > 0, f"timeout_seconds must be positive, not {self.timeout_seconds}")
