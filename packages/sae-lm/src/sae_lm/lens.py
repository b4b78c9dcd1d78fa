"""What latents say in the model's own vocabulary: the logit lens, and direct logit attribution.

A latent adds a direction to the residual stream. Behind the last block the stream goes through a final norm and the
unembedding, and what the direction adds to the logits there, past everything in between, is the logit lens: the tokens that a
latent promotes, and those that it suppresses. Direct logit attribution is the same for one text: how much each active latent
at a position adds to the logit of a token there, with the norm's scale as it was. The parts add up to what the place as a
whole adds.

The final norm is found by running the model, and measured: a norm maps x to w ⊙ (x - mean) / scale + b, or the same without
the mean, and two probes tell w, b and which it is, whatever the family calls its parameters.
"""

# n latents, W width of the stream, V vocabulary, T tokens kept

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from sae_core import SAE
from sae_core.codes import SparseCodes
from sae_core.config import require
from sae_core.errors import ConfigError, DataError
from torch import Tensor, nn

from sae_lm.hooks import HookPoint, capture
from sae_lm.inputs import model_inputs
from sae_lm.places import route_of
from sae_lm.splicing import evaluating
from sae_lm.tokens import Windows

__all__ = ["DirectAttribution", "Lens", "LogitLens", "direct_logit_attribution", "directions", "logit_lens"]

_LOGITS_AT_ONCE = 1 << 25


@torch.no_grad()
def directions(sae: SAE[Any], latents: Tensor) -> Tensor:
    """(n, d_out) what each latent (n,) adds to the output for a value of one, whatever kind of dictionary it is.

    Where the input's own scale matters (a normalisation that differs from row to row), the directions are right and their
    common length is that for an input of unit variance.

    >>> from sae_core import create
    >>> sae = create("standard", d_in=3, d_sae=5)
    >>> bool(torch.allclose(directions(sae, torch.tensor([4])), sae.W_dec[4:], atol=1e-6))
    True
    """
    indices = latents.to(sae.device).view(-1, 1)
    ones = torch.ones(indices.shape, device=sae.device, dtype=sae.dtype)
    one, none = (SparseCodes.regular(values, indices, sae.d_sae) for values in (ones, torch.zeros_like(ones)))
    with evaluating(sae):
        try:
            return (sae.decode(one) - sae.decode(none)).float()
        except ConfigError:  # the output depends on the input too; its share is the same in both
            row = torch.randn(sae.d_in, generator=torch.Generator().manual_seed(0)).to(sae.device, sae.dtype)
            x = row.expand(len(indices), -1)
            return (sae.decode(one, x=x) - sae.decode(none, x=x)).float()


@final
@dataclass(frozen=True, eq=False)
class Lens:
    """The way from the residual stream to logits: ``logits = ((x - mean) / scale ⊙ weight + bias) @ unembed.T + …``.

    `weight` and `bias` (width,) are the final norm's, `centred` says whether it takes the mean away, `unembed` is (vocabulary,
    width). `norm` is the module's path, None where the model has no final norm.
    """

    weight: Tensor
    bias: Tensor
    centred: bool
    unembed: Tensor
    norm: str | None

    @classmethod
    @torch.no_grad()
    def of(cls, model: nn.Module) -> Lens:
        """Find and measure them. Raises ConfigError for a model that does not unembed."""
        name, unembed = _unembedding(model)
        device = next(model.parameters()).device
        args, kwargs = _probe(model, device)
        last = capture(model, [f"{name}:input"], *args, **kwargs)[f"{name}:input"]
        path = _norm_before(model, last, name)
        width = unembed.shape[1]
        if path is None:
            return cls(torch.ones(width, device=device), torch.zeros(width, device=device), False, unembed, None)
        weight, bias, centred = _measured(model.get_submodule(path), width, last.dtype, device)
        return cls(weight, bias, centred, unembed, path)

    def logits(self, added: Tensor) -> Tensor:
        """(n, vocabulary) what vectors (n, width) add to the logits, up to the norm's scale, which depends on the text."""
        if self.centred:
            added = added - added.mean(-1, keepdim=True)
        return (added.to(self.weight) * self.weight).to(self.unembed.dtype) @ self.unembed.T

    def scale(self, x: Tensor) -> Tensor:
        """(…,) what the norm divides the rows of its input by, up to its epsilon."""
        if self.norm is None:
            return torch.ones(x.shape[:-1], device=x.device)
        x = x.float()
        return (x - x.mean(-1, keepdim=True) if self.centred else x).square().mean(-1).sqrt()


@final
@dataclass(frozen=True, eq=False)
class LogitLens:
    """For each latent asked for, the tokens (n, k) that it promotes and suppresses most, and what it adds to their logits."""

    promoted: Tensor
    promoted_logits: Tensor
    suppressed: Tensor
    suppressed_logits: Tensor


@torch.no_grad()
def logit_lens(
    sae: SAE[Any], lens: Lens | nn.Module, latents: Sequence[int] | Tensor | None = None, *, k: int = 10
) -> LogitLens:
    """The `k` tokens that each latent promotes and suppresses most; None asks for all latents, a block at a time.

    Raises ConfigError when the dictionary does not write to the residual stream, as its width tells.
    """
    lens = lens if isinstance(lens, Lens) else Lens.of(lens)
    chosen = torch.arange(sae.d_sae) if latents is None else torch.as_tensor(latents)
    width, vocabulary = lens.unembed.shape[1], lens.unembed.shape[0]
    if sae.d_out != width:
        raise ConfigError(
            f"logit lens: the dictionary writes {sae.d_out} columns, the residual stream has {width}; only dictionaries that "
            "write to it have a logit lens"
        )
    require(0 < k <= vocabulary, f"logit lens: k must lie in [1, {vocabulary}], not {k}")
    parts: list[tuple[Tensor, ...]] = []
    for block in chosen.split(max(1, _LOGITS_AT_ONCE // vocabulary)):
        logits = lens.logits(directions(sae, block).to(lens.weight.device)).float()
        most, least = logits.topk(k), logits.topk(k, largest=False)
        parts.append((most.indices.cpu(), most.values.cpu(), least.indices.cpu(), least.values.cpu()))
    return LogitLens(*(torch.cat(column) for column in zip(*parts, strict=True)))


@final
@dataclass(frozen=True, eq=False)
class DirectAttribution:
    """What one position adds to a logit, in parts: `latents` holds each active latent's share in place of its value,
    (sequences,) rows; `bias`, `error` and `total` are (sequences,). The latents, the bias and the error add up to the total.
    """

    latents: SparseCodes
    bias: Tensor
    error: Tensor
    total: Tensor


@torch.no_grad()
def direct_logit_attribution(
    model: nn.Module,
    sae: SAE[Any],
    tokens: Tensor,
    target: int | tuple[int, int] | Tensor,
    *,
    position: int = -1,
    at: str | None = None,
    lens: Lens | None = None,
) -> DirectAttribution:
    """How much each active latent at `position` of each sequence adds directly to the logit of `target` there.

    `target` is a token; two, for the difference of their logits; or a vector (width,) to project on behind the norm. The
    norm's scale is that of the text as it is. Raises ConfigError when the dictionary does not write to the residual stream.
    """
    from sae_lm.attribution import shares_of

    lens = lens or Lens.of(model)
    route = route_of(sae, model, at)
    if sae.d_out != lens.unembed.shape[1] or len(route.writes) != 1:
        raise ConfigError("direct logit attribution: the dictionary does not write to the residual stream")
    points = [*(place.point for place in (*route.reads, *route.writes))]
    if lens.norm is not None:
        points.append(HookPoint(lens.norm, "input"))
    device = next(model.parameters()).device
    found = capture(model, list(dict.fromkeys(points)), tokens.to(device))
    x = torch.cat([place.read(found[str(place.point)]).to(sae.device) for place in route.reads], dim=-1)
    y = route.writes[0].read(found[str(route.writes[0].point)])
    stream = y if lens.norm is None else found[f"{lens.norm}:input"]
    if stream.shape[:-1] != y.shape[:-1]:
        raise DataError(f"direct logit attribution: the stream has {tuple(stream.shape)}, the place {tuple(y.shape)}")
    towards = lens.unembed.float()
    if isinstance(target, Tensor):
        vector = target.float().to(towards.device)
    elif isinstance(target, int):
        vector = towards[target]
    else:
        vector = towards[target[0]] - towards[target[1]]
    vector = vector * lens.weight.float()
    if lens.centred:
        vector = vector - vector.mean()
    gradient = vector / lens.scale(stream).unsqueeze(-1).float()
    shares, constant = shares_of(sae, x, gradient.to(sae.device))
    latents, bias, error = shares.at(position), constant[:, position], None
    total = (y.float() * gradient)[:, position].sum(-1)
    error = total - bias.to(total.device) - latents.row_sums().to(total.device)
    return DirectAttribution(latents, bias.to(total.device), error, total)


def _unembedding(model: nn.Module) -> tuple[str, Tensor]:
    """The unembedding's path and its matrix (vocabulary, width)."""
    getter: Any = getattr(model, "get_output_embeddings", None)
    module: Any = getter() if callable(getter) else None
    if isinstance(module, nn.Module) and isinstance(weight := getattr(module, "weight", None), Tensor):
        return next(name for name, one in model.named_modules() if one is module), weight.detach()
    module = dict(model.named_children()).get("unembed")
    if module is not None and isinstance(weight := getattr(module, "W_U", None), Tensor):
        return "unembed", weight.detach().T
    raise ConfigError(f"logit lens: {type(model).__name__} has no unembedding; only language models have a logit lens")


def _probe(model: nn.Module, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments that run the model on a few tokens; not on the first, which pads in some models and embeds to zero."""
    tokens = torch.tensor([[1, 2, 3]])
    everything = torch.ones_like(tokens, dtype=torch.bool)
    return model_inputs(model, Windows(tokens, everything, everything), device)


def _norm_before(model: nn.Module, last: Tensor, unembedding: str) -> str | None:
    """The path of the first module to end with `last` as its output, other than modules that pass it through."""
    found: list[str] = []

    def watch(name: str) -> Any:
        def see(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if found or not isinstance(output, Tensor) or output.shape != last.shape:
                return
            before = args[0] if args and isinstance(args[0], Tensor) else None
            # Modules that pass a tensor on, as hook points do, end with it too; the norm is the one that made it.
            if before is None or before.shape != output.shape:
                return
            if torch.equal(output, last) and not torch.equal(before, output):
                found.append(name)

        return see

    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    try:
        args, kwargs = _probe(model, last.device)
        capture(model, [f"{unembedding}:input"], *args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    if found and "norm" not in type(model.get_submodule(found[0])).__name__.lower() + found[0].lower():
        is_norm = _scales(model.get_submodule(found[0]), last)
        return found[0] if is_norm else None
    return found[0] if found else None


def _scales(module: nn.Module, like: Tensor) -> bool:
    """Whether a module gives the same for an input and for twice it, as norms do."""
    x = torch.randn(like.shape[-1], generator=torch.Generator().manual_seed(0)).to(like) * 100
    return torch.allclose(module(x.view(1, 1, -1)), module(2 * x.view(1, 1, -1)), rtol=1e-2, atol=1e-3)


def _measured(norm: nn.Module, width: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, bool]:
    """Weight, bias and whether the mean is taken away, by what the norm makes of a few inputs.

    The inputs are large, so that the norm's epsilon is nothing beside them.
    """
    probes = 100 * torch.randn(8, width, generator=torch.Generator().manual_seed(0)).to(device)
    given = probes.view(1, 8, width).to(dtype)
    plus, minus, moved = (norm(x).view(8, width).float() for x in (given, -given, given + 1000))
    centred = bool((plus - moved).abs().max() < 0.05 * plus.abs().max())
    exact = given.view(8, width).float()
    base = exact - exact.mean(-1, keepdim=True) if centred else exact
    base = base / base.square().mean(-1, keepdim=True).sqrt()
    weight = ((plus - minus) / 2 * base).sum(0) / base.square().sum(0)
    return weight, (plus + minus).mean(0) / 2, centred
