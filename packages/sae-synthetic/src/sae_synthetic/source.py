"""Activation sources over a synthetic world, for `Trainer` and for run files.

Batch i of a seed is always the same, so a run can stop and go on exactly. The position belongs to the row of batches that
`batches` opens, not to the source, and is a few integers: what somebody has read ahead moves nobody else's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, final

import torch
from sae_core import ActivationBatch, SparseCodes
from sae_core.config import option, require
from sae_core.errors import DataError
from sae_core.sae import as_device
from torch import Tensor

from sae_synthetic.features import FeatureDictionary, decode_codes
from sae_synthetic.generator import ActivationGenerator
from sae_synthetic.model import SyntheticModel, SyntheticModelConfig
from sae_synthetic.source_config import WorldSourceConfig, check_world, new_world, saved_world

__all__ = [
    "SyntheticActivationIterator",
    "SyntheticBatches",
    "SyntheticParts",
    "SyntheticSource",
    "SyntheticSourceConfig",
]


@final
class SyntheticActivationIterator:
    """Endless batches of hidden activations (batch_size, hidden_dim) of a dictionary and a generator.

    It is an iterator, and a source for `sae_core.Trainer`, which asks for its own batch size. With `autocast`, the features
    are summed in bfloat16.

    >>> world = SyntheticActivationIterator(FeatureDictionary(4, 8, seed=0), ActivationGenerator(4, 0.5, seed=0), 16)
    >>> next(world).shape, world.d_in
    (torch.Size([16, 8]), 8)
    """

    def __init__(
        self,
        feature_dict: FeatureDictionary,
        activations_generator: ActivationGenerator,
        batch_size: int,
        autocast: bool = False,
    ) -> None:
        require(batch_size >= 1, f"batch_size must be at least 1, not {batch_size}")
        require(
            feature_dict.num_features == activations_generator.num_features,
            f"the dictionary has {feature_dict.num_features} features, the generator {activations_generator.num_features}",
        )
        self.feature_dict = feature_dict
        self.activations_generator = activations_generator
        self.batch_size = batch_size
        self.autocast = autocast

    @property
    def d_in(self) -> int:
        """Width of the activations."""
        return self.feature_dict.hidden_dim

    @property
    def sites(self) -> Mapping[str, int]:
        """The one unnamed site."""
        return {"": self.d_in}

    def batches(self, batch_size: int) -> SyntheticBatches:
        """Batches of that size, for ever; they continue the generator, whoever else draws from it."""
        return SyntheticBatches(self.feature_dict, self.activations_generator, batch_size, autocast=self.autocast)

    @torch.no_grad()
    def sample_with_codes(self, batch_size: int) -> tuple[Tensor, SparseCodes]:
        """(batch_size, hidden_dim) activations, and the features behind them."""
        codes = self.activations_generator.sample_codes(batch_size)
        return _hidden(self.feature_dict, codes, self.autocast), codes

    def next_batch(self) -> Tensor:
        """The next batch."""
        return self.sample_with_codes(self.batch_size)[0]

    def __iter__(self) -> SyntheticActivationIterator:
        return self

    def __next__(self) -> Tensor:
        return self.next_batch()

    def state_dict(self) -> dict[str, Any]:
        """The generator's position."""
        return self.activations_generator.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue at a saved position."""
        self.activations_generator.load_state_dict(dict(state))


@final
class SyntheticBatches(Iterator[Tensor]):
    """One row of batches (batch_size, hidden_dim); `state_dict` holds the place in it.

    `total_samples` ends it, with a shorter last batch; None never does. `autocast` sums features in bfloat16. Of several
    `ranks` this one sums up the rows that are its own, of the batches that one process has; `last_size` is how many rows the
    last batch had on all ranks. Raises ConfigError for sizes below 1.

    >>> row = SyntheticBatches(FeatureDictionary(4, 8, seed=0), ActivationGenerator(4, 0.5, seed=0), 16, total_samples=24)
    >>> [len(batch) for batch in row], row.state_dict()["samples"]
    ([16, 8], 24)
    """

    def __init__(
        self,
        feature_dict: FeatureDictionary,
        generator: ActivationGenerator,
        batch_size: int,
        total_samples: int | None = None,
        *,
        autocast: bool = False,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        require(batch_size >= 1, f"batch_size must be at least 1, not {batch_size}")
        require(total_samples is None or total_samples >= 1, f"total_samples must be at least 1, not {total_samples}")
        self._features, self._generator = feature_dict, generator
        self._batch_size, self._total = batch_size, total_samples
        self._autocast = autocast
        self._rank, self._ranks = rank, ranks
        self._samples = 0
        self.last_size = 0

    def __iter__(self) -> SyntheticBatches:
        return self

    def __next__(self) -> Tensor:
        return self.next_with_codes()[0]

    @torch.no_grad()
    def next_with_codes(self) -> tuple[Tensor, SparseCodes]:
        """The next batch, and the features behind it. Raises StopIteration at the end."""
        size = self._batch_size if self._total is None else min(self._batch_size, self._total - self._samples)
        if size <= 0:
            raise StopIteration
        codes = _rows_of_rank(self._generator.sample_codes(size), self._rank, self._ranks)
        batch = _hidden(self._features, codes, self._autocast)
        self._samples += size
        self.last_size = size
        return batch, codes

    def state_dict(self) -> dict[str, Any]:
        """Number of samples given out, and the generator's seed and position."""
        return {"samples": self._samples, "generator": self._generator.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken. Raises DataError for anything that it did not write."""
        samples, generator = state.get("samples"), state.get("generator")
        if set(state) != {"samples", "generator"} or not isinstance(generator, Mapping):
            raise DataError(f"synthetic batches: a state has the keys 'samples' and 'generator', found {sorted(state)}")
        if not isinstance(samples, int) or isinstance(samples, bool) or samples < 0:
            raise DataError(f"synthetic batches: state 'samples' must be a non-negative integer, not {samples!r}")
        self._generator.load_state_dict(dict(generator))
        self._samples = samples


class _Batches(Protocol):
    @property
    def last_size(self) -> int: ...

    def __next__(self) -> Tensor | ActivationBatch: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


@final
class SyntheticParts(Iterator["tuple[Tensor | ActivationBatch, int]"]):
    """One of several processes' rows of each of the `batches`, which are made for it, and how many rows the whole one has."""

    def __init__(self, batches: _Batches) -> None:
        self._batches = batches

    def __iter__(self) -> SyntheticParts:
        return self

    def __next__(self) -> tuple[Tensor | ActivationBatch, int]:
        return next(self._batches), self._batches.last_size

    def state_dict(self) -> dict[str, Any]:
        """The place, which is the same for all of them."""
        return self._batches.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self._batches.load_state_dict(state)


def _rows_of_rank(codes: SparseCodes, rank: int, ranks: int) -> SparseCodes:
    """Rows rank, rank + ranks, and so on."""
    if ranks == 1:
        return codes
    row_E = codes.row_ids()
    here_E = row_E % ranks == rank
    row_E = row_E[here_E].div(ranks, rounding_mode="floor")
    rows = len(range(rank, codes.rows, ranks))
    return SparseCodes.of_rows(codes.values[here_E], row_E, codes.indices[here_E], codes.d_sae, (rows,))


def _hidden(features: FeatureDictionary, codes: SparseCodes, autocast: bool) -> Tensor:
    """(rows, hidden_dim) activations; summed in bfloat16 and given in the bias's precision where `autocast` says so."""
    if not autocast:
        return features(codes)
    return decode_codes(codes.to(torch.bfloat16), features.feature_vectors.bfloat16()) + features.bias


@dataclass(frozen=True, kw_only=True)
class SyntheticSourceConfig(WorldSourceConfig):
    """Config of `SyntheticSource`: a saved model, or the settings of a new one."""

    d_in: int | None = option(default=None, help="width of the activations")

    def __post_init__(self) -> None:
        check_world(self, ("num_features", "d_in"), lambda: _model_config(self))


@final
class SyntheticSource:
    """Hidden activations of a `SyntheticModel`, for ``source: {name: synthetic, ...}`` in a run file.

    A new model is made from `seed` as `SyntheticModelConfig` describes, and with ``orthogonalization`` left out its
    features are random directions. `total_samples` None never ends.

    >>> source = SyntheticSource(SyntheticSourceConfig(num_features=32, d_in=16, firing_probability=0.1, seed=3))
    >>> next(source.batches(4)).shape
    torch.Size([4, 16])
    """

    config_class: ClassVar[type] = SyntheticSourceConfig
    example: ClassVar[Mapping[str, Any]] = {"num_features": 48, "d_in": 16, "firing_probability": 0.1}

    def __init__(self, config: SyntheticSourceConfig) -> None:
        self.config = config
        device = as_device(config.device)
        if config.model is not None:
            self.model = SyntheticModel.load_from_disk(config.model, device=device)
            self.model.activation_generator = self.model.activation_generator.fork(config.seed)
        else:
            self.model = SyntheticModel(_model_config(config), device=device)

    @property
    def d_in(self) -> int:
        """Width of the activations."""
        return self.model.d_in

    @property
    def sites(self) -> Mapping[str, int]:
        """The one unnamed site."""
        return {"": self.d_in}

    def batches(self, batch_size: int) -> SyntheticBatches:
        """Batches (batch_size, d_in), every time from the first; the last is shorter where `total_samples` ends it."""
        return self._row(batch_size, 0, 1)

    def parts(self, batch_size: int, rank: int, ranks: int) -> SyntheticParts:
        """The rows of one of several processes; which features fire is drawn by all, the activations are its own."""
        return SyntheticParts(self._row(batch_size, rank, ranks))

    def _row(self, batch_size: int, rank: int, ranks: int) -> SyntheticBatches:
        generator = self.model.activation_generator
        row = generator.fork(generator.seed)  # its position is its own
        total = self.config.total_samples
        return SyntheticBatches(self.model.feature_dict, row, batch_size, total, rank=rank, ranks=ranks)

    def fingerprint(self) -> str:
        """Of the directions of a saved model, which may be another one in a file of the same name."""
        return directions_fingerprint(self.config, self.model.feature_dict)

    def metadata(self) -> dict[str, Any]:
        """The model behind the activations."""
        return {"synthetic_model": {"config": self.model.cfg.to_dict(), "path": saved_world(self.config)}}


def directions_fingerprint(config: WorldSourceConfig, features: FeatureDictionary) -> str:
    """A few letters for the directions of a saved model; a new one is known by its settings."""
    if config.model is None:
        return "new"
    some = features.feature_vectors[:16].detach().cpu().contiguous()
    return hashlib.sha256(some.view(torch.uint8).numpy().tobytes()).hexdigest()[:12]


def _model_config(config: SyntheticSourceConfig) -> SyntheticModelConfig:
    return new_world(config, SyntheticModelConfig.from_dict, {"d_in": "hidden_dim"})
