"""The probabilities to give a generator so that its features, hierarchy and all, fire exactly as often as wanted.

A child can fire only where its parent does, so it needs the probability wanted rate / parent's rate. Where m children
exclude each other, child i, when drawn, stays with probability A_i = E[1 / (1 + other drawn children)], so its probability
c_i must solve c_i A_i(c) = q_i with q_i its wanted share. The expectation is the integral over t in [0, 1] of
prod_{j != i} (1 - c_j + c_j t), a polynomial that Gauss's rule integrates exactly; the iteration c <- q / A(c) rises from q
to the least solution.
"""

# N features, M children of one group, T nodes of the quadrature

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from sae_core.config import require
from sae_core.errors import ConfigError
from torch import Tensor

from sae_synthetic.forest import HierarchyNode, validate_forest

__all__ = ["firing_probabilities_for_rates"]

_STEPS = 100_000
_TOLERANCE = 1e-12


def firing_probabilities_for_rates(roots: Sequence[HierarchyNode], rates: Tensor) -> Tensor:
    """(N,) probabilities with which an `ActivationGenerator` with this hierarchy fires at `rates` (N,).

    Values must be positive whenever they fire (no spread below zero), and firing independent. Raises ConfigError for rates
    outside (0, 1], for a child that is wanted more often than its parent, and for children that exclude each other and
    are wanted more often together than their parent.

    >>> pair = HierarchyNode(0, [HierarchyNode(1), HierarchyNode(2)], mutually_exclusive_children=True)
    >>> firing_probabilities_for_rates([pair], torch.tensor([0.5, 0.25, 0.125]))
    tensor([0.5000, 0.6096, 0.3596])
    """
    require(bool(((rates > 0) & (rates <= 1)).all()), "rates must be in (0, 1]")
    validate_forest(roots, len(rates))
    wanted = rates.double().tolist()
    found = list(wanted)
    for root in roots:
        _fill(root, None, wanted, found)
    return torch.tensor(found, dtype=torch.float64).to(rates.dtype)


def _fill(node: HierarchyNode, above: int | None, wanted: list[float], found: list[float]) -> None:
    """Set the probabilities of everything below `node`; `above` is the nearest feature above it."""
    parent = node.feature_index if node.feature_index is not None else above
    chance = 1.0 if parent is None else wanted[parent]
    own = [child.feature_index for child in node.children if child.feature_index is not None]
    shares = [wanted[index] / chance for index in own]
    for index, share in zip(own, shares, strict=True):
        require(
            share <= 1 + _TOLERANCE,
            f"rates: feature {index} is wanted with rate {wanted[index]:.4g}, its parent {parent} only with {chance:.4g}",
        )
    if node.mutually_exclusive_children:
        where = "at the top" if parent is None else f"below feature {parent}"
        require(
            len(own) == len(node.children),
            f"rates: the excluding children {where} include groups; exact probabilities are known only for features",
        )
        require(
            sum(shares) <= 1,
            f"rates: features {own} exclude each other, but are wanted together in {sum(shares):.4g} of the samples in which "
            f"they can fire ({where}); at most 1 is possible",
        )
        shares = _drawn(shares, where)
    for index, share in zip(own, shares, strict=True):
        found[index] = min(share, 1.0)
    for child in node.children:
        _fill(child, parent, wanted, found)


def _drawn(shares: list[float], where: str) -> list[float]:
    """(M,) probabilities c with c_i A_i(c) = shares_i."""
    nodes, weights = np.polynomial.legendre.leggauss(len(shares) // 2 + 1)
    t_T, weights_T = (nodes + 1) / 2, weights / 2
    q_M = np.array(shares)
    c_M = q_M.copy()
    for _ in range(_STEPS):
        factors_MT = 1 - c_M[:, None] * (1 - t_T)
        stays_M = (factors_MT.prod(axis=0) / factors_MT) @ weights_T
        better = q_M / stays_M
        if np.abs(better - c_M).max() <= _TOLERANCE:
            return better.tolist()
        c_M = np.minimum(better, 1.0)
    raise ConfigError(f"rates: no probabilities give the rates wanted of the excluding children {where}")
