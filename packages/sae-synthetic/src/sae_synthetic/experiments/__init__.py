"""Published experiments on synthetic data, ready to run: ``sae-core synthetic run NAME``.

This module only lists them, and imports nothing heavy; each experiment is a module of its own.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sae_core.errors import ConfigError, UnknownNameError, did_you_mean

if TYPE_CHECKING:
    from sae_synthetic.experiments.result import ExperimentResult, Settings

__all__ = ["PRESETS", "Preset", "get_preset", "run_preset"]


@dataclass(frozen=True, kw_only=True)
class Preset:
    """An experiment: its name, where it was published, roughly how long it takes on two cores, and whether several processes
    can share its seeds.
    """

    name: str
    summary: str
    paper: str
    duration: str
    seeds: int
    target: str
    shares_seeds: bool = False

    def load(self) -> Callable[[Settings], ExperimentResult]:
        """The function that runs it."""
        module, _, function = self.target.partition(":")
        return getattr(importlib.import_module(module), function)

    def settings(
        self,
        seeds: int | None = None,
        scale: float = 1.0,
        device: str = "cpu",
        progress: bool = True,
        processes: int = 1,
    ) -> Settings:
        """How to run it, by default with its own number of seeds. Raises ConfigError for impossible settings."""
        from sae_synthetic.experiments.result import Settings

        if processes != 1 and not self.shares_seeds:
            able = ", ".join(preset.name for preset in PRESETS.values() if preset.shares_seeds)
            raise ConfigError(
                f"processes: {self.name} takes its seeds one after the other; those that share them: {able}"
            )
        return Settings(
            seeds=self.seeds if seeds is None else seeds,
            scale=scale,
            device=device,
            progress=progress,
            processes=processes,
        )


_HERE = "sae_synthetic.experiments"

PRESETS = {
    preset.name: preset
    for preset in (
        Preset(
            name="consistency",
            summary="Do runs that differ only in their seed find the same features?",
            paper="arXiv 2505.20254",
            duration="5 minutes",
            seeds=5,
            target=f"{_HERE}.consistency:run",
        ),
        Preset(
            name="sparse-but-wrong",
            summary="What a wrong L0 does to features that are correlated",
            paper="arXiv 2508.16560",
            duration="5 minutes",
            seeds=1,
            target=f"{_HERE}.sparse_but_wrong:run",
        ),
        Preset(
            name="l0-selection",
            summary="The right L0 without the truth, from one SAE whose L0 falls",
            paper="arXiv 2508.16560",
            duration="3 minutes",
            seeds=1,
            target=f"{_HERE}.l0_selection:run",
        ),
        Preset(
            name="hedging",
            summary="An SAE without room for a child mixes it into its parent",
            paper="arXiv 2505.11756",
            duration="10 seconds",
            seeds=1,
            target=f"{_HERE}.hedging:run",
        ),
        Preset(
            name="absorption",
            summary="Matryoshka's inner weight between absorption and hedging",
            paper="arXiv 2505.11756",
            duration="20 seconds",
            seeds=1,
            target=f"{_HERE}.absorption:run",
        ),
        Preset(
            name="tree",
            summary="Nested against flat SAEs on a tree of excluding children",
            paper="Nabeshima 2024 (LessWrong)",
            duration="3 minutes",
            seeds=1,
            target=f"{_HERE}.tree:run",
        ),
        Preset(
            name="crosscoder",
            summary="Which latents of one model alone are artefacts of the crosscoder",
            paper="arXiv 2504.02922",
            duration="2 minutes",
            seeds=1,
            target=f"{_HERE}.crosscoder:run",
        ),
        Preset(
            name="synthsaebench-mini",
            summary="SynthSAEBench at 1/16 of its size, five architectures",
            paper="arXiv 2602.14687",
            duration="7 minutes",
            seeds=1,
            target=f"{_HERE}.synthsaebench:run_mini",
            shares_seeds=True,
        ),
        Preset(
            name="synthsaebench",
            summary="SynthSAEBench-16k as published, Matryoshka recipes; for a GPU",
            paper="arXiv 2602.14687",
            duration="a day",
            seeds=1,
            target=f"{_HERE}.synthsaebench:run_full",
        ),
    )
}


def get_preset(name: str) -> Preset:
    """The experiment of that name. Raises UnknownNameError that lists what there is."""
    if name not in PRESETS:
        known = ", ".join(PRESETS)
        raise UnknownNameError(f"unknown experiment {name!r}{did_you_mean(name, PRESETS)}; known: {known}")
    return PRESETS[name]


def run_preset(
    name: str,
    seeds: int | None = None,
    scale: float = 1.0,
    device: str = "cpu",
    progress: bool = True,
    processes: int = 1,
) -> ExperimentResult:
    """Run an experiment with that many seeds (by default its own number).

    `scale` multiplies the training samples: 0.1 is a quick look whose numbers are worse. `processes` share the seeds, where the
    preset says that they can (`shares_seeds`). Raises ConfigError for impossible settings.
    """
    preset = get_preset(name)
    return preset.load()(preset.settings(seeds, scale, device, progress, processes))
