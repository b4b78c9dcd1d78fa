"""`GradientSums`: the gradients of all ranks added up, the large ones while the backward pass still computes others.

A backward pass gives the decoder's gradient before it begins with the encoder's. As soon as a large gradient is whole its sum
over the ranks is under way, in the background; the small ones travel together at the end. Every rank adds them up in one
order, that of the parameters from the last to the first, since which of them come when, and whether they come at all, may
differ between ranks. Each is the sum that `Ranks.add` gives, bit for bit.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import final

import torch
from torch import Tensor, nn

from sae_core.parallel.ranks import Ranks, Sum

__all__ = ["GradientSums"]


@final
class GradientSums:
    """Adds up the gradients of `parameters`, the same list on every rank."""

    def __init__(self, parameters: Sequence[nn.Parameter], ranks: Ranks) -> None:
        wanted = [parameter for parameter in parameters if parameter.requires_grad]
        self._ranks = ranks
        self._alone = [parameter for parameter in reversed(wanted) if ranks.travels_alone(parameter)]
        self._together = [parameter for parameter in wanted if not ranks.travels_alone(parameter)]
        self._whole: set[nn.Parameter] = set()  # those whose gradient is there
        self._begun: list[Sum] = []

    @contextmanager
    def during_backward(self) -> Generator[None]:
        """Within the block, in which the last backward pass before a step runs, gradients that are whole are sent."""
        several = self._ranks.size > 1
        hooks = [each.register_post_accumulate_grad_hook(self._has_come) for each in self._alone if several]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def finish(self) -> None:
        """Every rank gets the sum of all ranks' gradients."""
        if self._ranks.size == 1:
            return
        self._whole.update(self._alone)
        self._send()
        self._ranks.add([_gradient(parameter) for parameter in self._together])
        for each in self._begun:
            each.wait()
        self._begun = []
        self._whole.clear()

    def _has_come(self, parameter: nn.Parameter) -> None:
        self._whole.add(parameter)
        self._send()

    def _send(self) -> None:
        """Begin with what is whole, but with none before those that come before it."""
        while len(self._begun) < len(self._alone) and self._alone[len(self._begun)] in self._whole:
            self._begun.append(self._ranks.begin_to_add(_gradient(self._alone[len(self._begun)])))


def _gradient(parameter: nn.Parameter) -> Tensor:
    """The gradient, contiguous; zero where this rank has none, as another one may have it."""
    found = parameter.grad
    if found is None or not found.is_contiguous():
        found = torch.zeros_like(parameter) if found is None else found.contiguous()
        parameter.grad = found
    return found
