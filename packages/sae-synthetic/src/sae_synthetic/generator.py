"""`ActivationGenerator`: batches of sparse, non-negative feature activations.

A feature fires with its probability (independently, or correlated through a Gaussian copula), only where its parent fires
if there is a hierarchy, and then has the value max(0, mean + std * normal). Modifiers change the result. What travels is
`SparseCodes`; a dense tensor is made only for those who ask for one.
"""

# N features, K entries

from __future__ import annotations

import copy
from typing import Any, final

import torch
from sae_core import SparseCodes
from sae_core.config import require
from sae_core.errors import ConfigError
from torch import Tensor

from sae_synthetic._random import RandomStream, derived_seed
from sae_synthetic.correlation import (
    CorrelationMatrixInput,
    LowRankCorrelationMatrix,
    dtype_of,
    validated_correlation,
)
from sae_synthetic.firing import make_firing
from sae_synthetic.forest import HierarchyNode
from sae_synthetic.forest_modifier import HierarchyModifier
from sae_synthetic.modifiers import ActivationsModifierInput, apply_modifier, as_modifiers, first_hierarchy

__all__ = ["ActivationGenerator"]


@final
class ActivationGenerator:
    """Draws feature activations; `generator.sample(batch)` is (batch, num_features).

    `firing_probabilities` in (0, 1], `std_firing_magnitudes` and `mean_firing_magnitudes` are one number or (num_features,)
    tensors. `modify_activations` is a function of dense activations or several; a hierarchy among them that comes first is
    sampled from directly. `correlation_matrix` is full or low-rank. `seed` None is random; a seed fixes every batch, and
    `state_dict` holds the position. With `use_sparse_tensors`, `sample` returns sparse COO tensors.

    Raises ConfigError that names the argument for probabilities outside (0, 1], negative magnitudes, wrong sizes and
    correlations that are none.

    >>> pairs = ActivationGenerator(3, torch.tensor([1.0, 0.5, 0.5]), mean_firing_magnitudes=2.0, seed=0)
    >>> pairs.sample(2).shape, pairs.sample_codes(1000).l0().float().mean().round().item()
    (torch.Size([2, 3]), 2.0)
    """

    def __init__(
        self,
        num_features: int,
        firing_probabilities: Tensor | float,
        std_firing_magnitudes: Tensor | float = 0.0,
        mean_firing_magnitudes: Tensor | float = 1.0,
        modify_activations: ActivationsModifierInput = None,
        correlation_matrix: CorrelationMatrixInput | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | str = "float32",
        use_sparse_tensors: bool = False,
        seed: int | None = None,
    ) -> None:
        require(
            isinstance(num_features, int) and num_features >= 1,
            f"num_features must be a positive integer, not {num_features!r}",
        )
        self.num_features = num_features
        self.dtype = dtype_of(dtype)
        self.use_sparse_tensors = use_sparse_tensors
        self.firing_probabilities = _per_feature(firing_probabilities, num_features, "firing_probabilities")
        self.std_firing_magnitudes = _per_feature(std_firing_magnitudes, num_features, "std_firing_magnitudes")
        self.mean_firing_magnitudes = _per_feature(mean_firing_magnitudes, num_features, "mean_firing_magnitudes")
        _require_all(
            (self.firing_probabilities > 0) & (self.firing_probabilities <= 1),
            self.firing_probabilities,
            "firing_probabilities must be in (0, 1]",
        )
        for name in ("std_firing_magnitudes", "mean_firing_magnitudes"):
            values: Tensor = getattr(self, name)
            _require_all(values >= 0, values, f"{name} must not be negative")
        self.correlation_matrix = (
            None if correlation_matrix is None else validated_correlation(correlation_matrix, num_features)
        )
        self._modifiers = as_modifiers(modify_activations)
        self._hierarchy = first_hierarchy(self._modifiers)
        for modifier in self._modifiers:
            if isinstance(modifier, HierarchyModifier):
                modifier.require_scalable(self.mean_firing_magnitudes, self.std_firing_magnitudes)
        self._stream = RandomStream(seed)
        self._place(torch.device(device))

    @property
    def device(self) -> torch.device:
        """Where samples are drawn."""
        return self.firing_probabilities.device

    @property
    def seed(self) -> int:
        """The seed in use, also where a random one was asked for."""
        return self._stream.seed

    @property
    def modify_activations(self) -> ActivationsModifierInput:
        """What changes activations after they were drawn: None, one modifier, or several in order."""
        if len(self._modifiers) < 2:
            return self._modifiers[0] if self._modifiers else None
        return tuple(self._modifiers)

    @property
    def hierarchy_roots(self) -> list[HierarchyNode]:
        """The trees that are sampled from; empty without a hierarchy."""
        return [] if self._hierarchy is None else self._hierarchy.roots

    def to(self, device: torch.device | str) -> ActivationGenerator:
        """Move to `device`, in place; the position in the row of batches stays."""
        self._place(torch.device(device))
        return self

    def sample(self, batch_size: int) -> Tensor:
        """(batch_size, num_features) activations; sparse COO if the generator was made so."""
        return self.as_tensor(self.sample_codes(batch_size))

    forward = sample
    __call__ = sample

    def as_tensor(self, codes: SparseCodes) -> Tensor:
        """Dense, or sparse COO if the generator was made so."""
        if not self.use_sparse_tensors:
            return codes.to_dense()
        places = torch.stack([codes.row_ids(), codes.indices])
        return torch.sparse_coo_tensor(places, codes.values, codes.shape, is_coalesced=True, check_invariants=False)

    def sample_codes(self, batch_size: int) -> SparseCodes:
        """`SparseCodes` of shape (batch_size, num_features), features ascending in every row, all values positive."""
        require(batch_size >= 1, f"batch_size must be at least 1, not {batch_size}")
        source = self._stream.next(self.device)
        codes = self._grow(batch_size, source)
        for modifier in self._modifiers[0 if self._hierarchy is None else 1 :]:
            codes = apply_modifier(modifier, codes, self, source)
        return codes if codes.values.dtype == self.dtype else codes.to(self.dtype)

    def fork(self, seed: int | None) -> ActivationGenerator:
        """The same distribution with a row of batches of its own; this generator's position does not move."""
        other = copy.copy(self)
        other._stream = RandomStream(seed)
        return other

    def held_out(self) -> ActivationGenerator:
        """A fork for evaluation: always the same batches for one seed, and none that training sees."""
        return self.fork(derived_seed(self.seed, "held out"))

    def state_dict(self) -> dict[str, Any]:
        """Seed and number of batches drawn."""
        return self._stream.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self._stream.load_state_dict(state)

    def _place(self, device: torch.device) -> None:
        self.firing_probabilities = self.firing_probabilities.to(device)
        self.std_firing_magnitudes = self.std_firing_magnitudes.to(device)
        self.mean_firing_magnitudes = self.mean_firing_magnitudes.to(device)
        if isinstance(self.correlation_matrix, LowRankCorrelationMatrix):
            self.correlation_matrix = LowRankCorrelationMatrix(*(part.to(device) for part in self.correlation_matrix))
        elif self.correlation_matrix is not None:
            self.correlation_matrix = self.correlation_matrix.to(device)
        self._plan = None if self._hierarchy is None else self._hierarchy.plan(self.num_features, device)
        parent_N = torch.full((self.num_features,), -1, device=device) if self._plan is None else self._plan.parent
        self._firing = make_firing(self.firing_probabilities, self.correlation_matrix, parent_N)
        self._is_parent_N = torch.zeros(self.num_features, dtype=torch.bool, device=device)
        self._is_parent_N[parent_N[parent_N >= 0]] = True
        self._constant = not bool(self.std_firing_magnitudes.any())

    def _grow(self, batch_size: int, source: torch.Generator) -> SparseCodes:
        """Fire the features without a parent, then level by level the children of those that fired."""
        draw = self._firing.begin(batch_size, source)
        rows, features = draw.top(batch_size)
        contests, values = rows, self._magnitudes(features, source)
        levels: list[tuple[Tensor, Tensor, Tensor]] = []
        while True:
            keep = values > 0
            if self._plan is not None and self._plan.layers:
                alive = keep.nonzero().squeeze(1)
                keep[alive] = self._plan.keep_one_per_group(contests[alive], features[alive], source)
            if not bool(keep.all()):
                kept = keep.nonzero().squeeze(1)
                rows, features, values = (part.index_select(0, kept) for part in (rows, features, values))
            levels.append((rows, features, values))
            if self._plan is None:
                break
            parents = self._is_parent_N[features].nonzero().squeeze(1)
            if not len(parents):
                break
            contests, children = draw.below(rows[parents], features[parents])
            below = self._magnitudes(children, source)
            above = parents[contests]
            lift = values[above] / self.mean_firing_magnitudes[features[above]]
            below = torch.where(self._plan.scaled[children], below * lift, below)
            rows, features, values = rows[parents][contests], children, below
        return self._assemble(batch_size, levels)

    def _magnitudes(self, features: Tensor, source: torch.Generator) -> Tensor:
        """(K,) values max(0, mean + std * normal) of firing features."""
        means = self.mean_firing_magnitudes.index_select(0, features)
        if self._constant:
            return means
        normal = torch.randn(len(features), generator=source, device=means.device, dtype=means.dtype)
        return torch.addcmul(means, self.std_firing_magnitudes.index_select(0, features), normal).clamp_min_(0)

    def _assemble(self, batch_size: int, levels: list[tuple[Tensor, Tensor, Tensor]]) -> SparseCodes:
        rows, features, values = levels[0] if len(levels) == 1 else (torch.cat(p) for p in zip(*levels, strict=True))
        keys = rows * self.num_features + features
        if bool((keys[1:] < keys[:-1]).any()):
            order = torch.argsort(keys)
            rows, features, values = rows[order], features[order], values[order]
        offsets = torch.zeros(batch_size + 1, dtype=torch.long, device=rows.device)
        torch.cumsum(torch.bincount(rows, minlength=batch_size), 0, out=offsets[1:])
        return SparseCodes(values, features, (batch_size,), self.num_features, offsets=offsets)


def _per_feature(value: Tensor | float, num_features: int, name: str) -> Tensor:
    """(num_features,) float32 from one number or a tensor of that size."""
    if isinstance(value, Tensor):
        if value.shape != (num_features,):
            raise ConfigError(
                f"{name}: shape {tuple(value.shape)} does not fit {num_features} features; give one number or ({num_features},)"
            )
        return value.detach().float()
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ConfigError(f"{name} must be a number or a tensor of ({num_features},), not {value!r}")
    return torch.full((num_features,), float(value))


def _require_all(good: Tensor, values: Tensor, message: str) -> None:
    if not bool(good.all()):
        bad = (~good).nonzero().squeeze(1)
        place = int(bad[0])
        raise ConfigError(f"{message}; found {float(values[place]):.4g} for feature {place} ({len(bad)} such)")
