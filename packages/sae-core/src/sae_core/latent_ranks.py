"""A dictionary whose latents are shared out over processes: each rank holds a slice, and is a smaller dictionary of its own.

    with latents_over(ranks):
        sae = create("topk", d_in=768, d_sae=2**20, k=32)    # this rank's part of the latents: sae.d_sae of them
        codes = sae.encode_sparse(x)                         # of which these are active, among the k of all ranks

Rank r of n holds the latents from r d_sae / n on; every rank sees the same rows. What belongs to a latent (its weights, bias,
threshold, moments) is on one rank, everything else (b_dec, a skip path, running thresholds) on all of them, alike. Where a
formula looks across all latents the ops ask here, and no architecture needs to know:

    selection     each rank proposes its own best, the ranks of these are exchanged     (`sae_core.ops.merging`)
    decode        every rank decodes its latents, and the sum over ranks is the output    forward: sum, backward: identity
    row sums      of penalties and of L0, alike
    b_dec, x      read by the latents of all ranks, so that their gradients are sums      forward: identity, backward: sum

So every rank comes to the same loss, and has the whole gradient of all that it holds. Nothing of shape (rows, d_sae) and no
weight ever leaves its rank.
"""

# R rows, F latents of this rank, O width of the output

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor

from sae_core.errors import ConfigError

__all__ = [
    "LatentRanks",
    "all_latents",
    "count_over_ranks",
    "current_ranks",
    "gathered",
    "latents_here",
    "latents_over",
    "mean_over_latents",
    "read_by_all_ranks",
    "summed_over_ranks",
]

T = TypeVar("T")


class LatentRanks(Protocol):
    """The processes that hold a dictionary's latents, this one being number `rank` of `size`.

    The methods are collectives: all ranks call them, in the same order.
    """

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def add(self, tensors: Iterable[Tensor], /) -> None:
        """Replace every tensor by its sum over the ranks."""
        ...

    def least(self, tensor: Tensor, /) -> Tensor:
        """`tensor`, replaced by its smallest values over the ranks."""
        ...

    def whole(self, part: Tensor, items: int, /) -> Tensor:
        """(items, ...): the parts (items / size, ...) of all ranks, item i being that of rank i modulo size."""
        ...

    def everyone(self, value: T, /) -> list[T]:
        """Every rank's value."""
        ...


_ranks: ContextVar[LatentRanks | None] = ContextVar("ranks that latents are shared out over", default=None)


@contextmanager
def latents_over(ranks: LatentRanks | None) -> Generator[None]:
    """Dictionaries that are made or loaded inside have their latents on these ranks; None, or one rank: here.

    Dictionaries know their ranks, and ops inside their methods act accordingly.
    """
    token = _ranks.set(None if ranks is None or ranks.size == 1 else ranks)
    try:
        yield
    finally:
        _ranks.reset(token)


def current_ranks() -> LatentRanks | None:
    """The ranks that latents are shared out over; None where all of them are here. To be asked in the forward pass."""
    return _ranks.get()


def latents_here(d_sae: int, ranks: LatentRanks | None) -> range:
    """Which of `d_sae` latents are here. Raises ConfigError where they cannot be shared out evenly.

    >>> latents_here(8, None)
    range(0, 8)
    """
    if ranks is None:
        return range(d_sae)
    if d_sae % ranks.size:
        raise ConfigError(
            f"d_sae = {d_sae} latents cannot be shared out evenly over {ranks.size} ranks; choose a d_sae that is a multiple"
        )
    width = d_sae // ranks.size
    return range(ranks.rank * width, (ranks.rank + 1) * width)


def gathered(tensor: Tensor, ranks: LatentRanks) -> Tensor:
    """(size, ...): a tensor of one shape from every rank, in their order."""
    flat = tensor.detach().reshape(-1)
    found = ranks.whole(flat, flat.numel() * ranks.size)
    return found.view(-1, ranks.size).t().reshape(ranks.size, *tensor.shape)


def all_latents(number_F: Tensor, ranks: LatentRanks | None) -> Tensor:
    """(d_sae,): a number of every latent, from what each rank has of its own.

    >>> all_latents(torch.ones(2), None).tolist()
    [1.0, 1.0]
    """
    return number_F if ranks is None else gathered(number_F, ranks).flatten()


def mean_over_latents(number_F: Tensor, among_F: Tensor) -> Tensor:
    """The mean of a number of every latent among those for which `among_F` holds, of all ranks; of all where it holds for none.

    >>> mean_over_latents(torch.tensor([1.0, 3.0]), torch.tensor([False, True]))
    tensor(3.)
    """
    ranks = current_ranks()
    if ranks is None:
        return number_F[among_F].mean() if bool(among_F.any()) else number_F.mean()
    counted_F = among_F.to(number_F.dtype)
    sums = torch.stack([(number_F * counted_F).sum(), counted_F.sum(), number_F.sum()])
    ranks.add([sums])
    among, count, everything = sums
    return among / count if bool(count > 0) else everything / (len(number_F) * ranks.size)


def count_over_ranks(number: int) -> int:
    """The sum of a number that the host knows; on one rank the number itself."""
    ranks = current_ranks()
    return number if ranks is None else sum(ranks.everyone(number))


def summed_over_ranks(partial: Tensor) -> Tensor:
    """The sum over ranks of what each has computed from its latents, in the same memory; the gradient reaches each unchanged.

    >>> summed_over_ranks(torch.ones(2)).tolist()
    [1.0, 1.0]
    """
    ranks = current_ranks()
    return partial if ranks is None else cast("Tensor", _Summed.apply(partial, ranks))


def read_by_all_ranks(whole: Tensor) -> Tensor:
    """`whole`, to be used where only this rank's latents read it: its gradient becomes the sum over ranks."""
    ranks = current_ranks()
    if ranks is None or not (whole.requires_grad and torch.is_grad_enabled()):
        return whole
    return cast("Tensor", _ReadByAll.apply(whole, ranks))


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, partial: Tensor, ranks: LatentRanks) -> Tensor:
        ranks.add([partial])
        return partial.view_as(partial)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        return cast("Tensor", grads[0]), None


class _ReadByAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, whole: Tensor, ranks: LatentRanks) -> Tensor:
        ctx.ranks = ranks
        return whole.view_as(whole)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        total = cast("Tensor", grads[0]).clone(memory_format=torch.contiguous_format)
        cast("LatentRanks", ctx.ranks).add([total])
        return total, None
