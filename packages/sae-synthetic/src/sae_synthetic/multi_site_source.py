"""Activations of several sites at once, or inputs with their targets, for crosscoders and transcoders in a run file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from sae_core import ActivationBatch
from sae_core.config import option
from sae_core.sae import as_device
from torch import Tensor

from sae_synthetic.multi_site import MultiSiteModel, MultiSiteModelConfig
from sae_synthetic.source import SyntheticBatches, SyntheticParts, directions_fingerprint
from sae_synthetic.source_config import WorldSourceConfig, check_world, new_world, saved_world

__all__ = ["MultiSiteBatches", "MultiSiteSource", "MultiSiteSourceConfig"]


@dataclass(frozen=True, kw_only=True)
class MultiSiteSourceConfig(WorldSourceConfig):
    """Config of `MultiSiteSource`: a saved world, or the settings of a new one."""

    sites: dict[str, int] | None = option(default=None, help="widths of the sites that are read, by name")
    targets: dict[str, int] | None = option(default=None, help="widths of the sites that a transcoder predicts")
    exclusive: dict[str, int] | None = option(default=None, help="number of features by site that are only there")
    weak: dict[str, int] | None = option(default=None, help="number of features by site that are weaker there")
    weak_strength: float | None = option(default=None, help="strength of a weak feature; by default 0.2")
    alike: float | None = option(
        default=None, help="cosine of a shared feature's directions at two sites; by default 0"
    )

    def __post_init__(self) -> None:
        check_world(self, ("num_features", "sites"), lambda: _model_config(self))


@final
class MultiSiteSource:
    """Batches of a `MultiSiteModel`, for ``source: {name: synthetic_sites, ...}`` in a run file.

    Without targets a batch is one tensor with all sites side by side; with targets it is an `ActivationBatch`.

    >>> source = MultiSiteSource(MultiSiteSourceConfig(num_features=32, sites={"in": 16}, targets={"out": 8}, seed=3))
    >>> batch = next(source.batches(4))
    >>> batch.inputs.shape, batch.targets.shape, source.sites, source.target_sites
    (torch.Size([4, 16]), torch.Size([4, 8]), {'in': 16}, {'out': 8})
    """

    config_class: ClassVar[type] = MultiSiteSourceConfig
    example: ClassVar[Mapping[str, Any]] = {
        "num_features": 48,
        "sites": {"a": 9, "b": 7},
        "targets": {"c": 8},
        "firing_probability": 0.1,
    }

    def __init__(self, config: MultiSiteSourceConfig) -> None:
        self.config = config
        device = as_device(config.device)
        if config.model is not None:
            self.model = MultiSiteModel.load_from_disk(config.model, device=device)
            self.model.activation_generator = self.model.activation_generator.fork(config.seed)
        else:
            self.model = MultiSiteModel(_model_config(config), device=device)

    @property
    def d_in(self) -> int:
        """Width of the inputs, all sites together."""
        return sum(self.sites.values())

    @property
    def sites(self) -> Mapping[str, int]:
        """Widths of the sites of the inputs."""
        return self.model.sites

    @property
    def target_sites(self) -> Mapping[str, int]:
        """Widths of the sites of the targets; empty where there are none."""
        return self.model.target_sites

    def batches(self, batch_size: int) -> MultiSiteBatches:
        """A row of batches, every time from the first; the last is shorter where `total_samples` ends it."""
        return MultiSiteBatches(self.model, batch_size, self.config.total_samples)

    def parts(self, batch_size: int, rank: int, ranks: int) -> SyntheticParts:
        """The rows of one of several processes; see `SyntheticSource.parts`."""
        return SyntheticParts(
            MultiSiteBatches(self.model, batch_size, self.config.total_samples, rank=rank, ranks=ranks)
        )

    def fingerprint(self) -> str:
        """Of the directions of a saved world; see `SyntheticSource.fingerprint`."""
        return directions_fingerprint(self.config, self.model.reads)

    def metadata(self) -> dict[str, Any]:
        """The world behind the activations."""
        return {"synthetic_model": {"config": self.model.cfg.to_dict(), "path": saved_world(self.config)}}


@final
class MultiSiteBatches(Iterator["Tensor | ActivationBatch"]):
    """One row of batches of a world, with a place of its own; see `SyntheticBatches`."""

    def __init__(
        self,
        model: MultiSiteModel,
        batch_size: int,
        total_samples: int | None = None,
        *,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        generator = model.activation_generator
        self._generator = generator.fork(generator.seed)
        self._writes = model.writes
        self._inputs = SyntheticBatches(model.reads, self._generator, batch_size, total_samples, rank=rank, ranks=ranks)

    def __iter__(self) -> MultiSiteBatches:
        return self

    @property
    def last_size(self) -> int:
        """How many rows the last batch had on all ranks."""
        return self._inputs.last_size

    @torch.no_grad()
    def __next__(self) -> Tensor | ActivationBatch:
        inputs, codes = self._inputs.next_with_codes()
        return inputs if self._writes is None else ActivationBatch(inputs, self._writes(codes))

    def state_dict(self) -> dict[str, Any]:
        """Number of samples given out, and the generator's seed and position."""
        return self._inputs.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken. Raises DataError for anything that it did not write."""
        self._inputs.load_state_dict(state)


def _model_config(config: MultiSiteSourceConfig) -> MultiSiteModelConfig:
    return new_world(config, MultiSiteModelConfig.from_dict, {})
