"""Does this SAE belong in this place of this model? A few tokens tell.

The wrong base model, layer, hook point or scale gives latents and reconstructions that look like numbers and mean nothing.
What gives it away is the explained variance: near or below zero where a dictionary in its place has most of the variance.
`check` runs the model on given tokens, reads the activations at the SAE's hook point, and fails when it is absurd.

It works with any `nn.Module`: a hook point is a module's path (``model.layers.20`` for its output, ``model.layers.20:input``
for its input). In a TransformerLens model, hook points are modules themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from sae_core.errors import ConfigError, DataError, SaeCoreError, did_you_mean
from sae_core.metrics import ExplainedVariance

if TYPE_CHECKING:
    from sae_core.sae import SAE

__all__ = ["CheckError", "CheckReport", "check"]

_WRITTEN = frozenset({"hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out"})


class CheckError(SaeCoreError):
    """An SAE explains next to nothing of the activations it was put on; `report` has the numbers."""

    def __init__(self, message: str, report: CheckReport) -> None:
        super().__init__(message)
        self.report = report


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckReport:
    """What was measured, over how many positions, and where; and what was published with the SAE, if anything."""

    explained_variance: float
    l0: float
    positions: int
    hook: str
    hook_out: str
    published_explained_variance: float | None
    published_l0: float | None


def check(
    sae: SAE[Any],
    model: nn.Module,
    tokens: Tensor,
    *,
    hook: str | None = None,
    hook_out: str | None = None,
    min_explained_variance: float = 0.1,
    ignore_first: int = 1,
) -> CheckReport:
    """Run `model` on `tokens` (batch, positions) and compare the SAE's outputs with the activations.

    The hook points are those of the SAE's metadata unless `hook` (and `hook_out` for a transcoder) are given. The first
    `ignore_first` positions of each row are left out, since the one after BOS dwarfs all others in many models. The bound
    `min_explained_variance` is lowered to 0.3 below a published figure.

    Raises CheckError below that bound, for an average L0 of zero, and for one more than ten times off the published one;
    ConfigError when the model has no such module.
    """
    if tokens.dim() != 2 or tokens.shape[1] <= ignore_first:
        raise DataError(
            f"check: tokens must be (batch, positions) with more than {ignore_first} positions, not {tuple(tokens.shape)}"
        )
    path, transformer_lens = _hook_point(model, sae.metadata, hook, "")
    path_out = path
    if not sae.reconstructs_input:
        path_out, _ = _hook_point(model, sae.metadata, hook_out, "_out")
    x, y = _activations(model, tokens, path, path_out)
    if not transformer_lens:
        x = _as_trained(x, sae.metadata, sae.metadata.get("hook_name"))
        y = _as_trained(y, sae.metadata, sae.metadata.get("hook_name" if path_out == path else "hook_name_out"))
    with torch.no_grad():  # whole rows go in, since some dictionaries look at earlier positions too
        x, y = (a.to(sae.device) for a in (x, y))
        reconstruction = sae(x).reshape(*tokens.shape, -1)[:, ignore_first:]
        target = y.reshape(*tokens.shape, -1)[:, ignore_first:]
        l0 = sae.encode_sparse(x).l0().reshape(tokens.shape)[:, ignore_first:]
    explained = ExplainedVariance()
    explained.update(target.float(), reconstruction.float(), None)

    report = CheckReport(
        explained_variance=explained.compute()["explained_variance"],
        l0=l0.float().mean().item(),
        positions=l0.numel(),
        hook=path,
        hook_out=path_out,
        published_explained_variance=_number(sae.metadata, "variance_explained"),
        published_l0=_number(sae.metadata, "l0"),
    )
    if problem := _problem(report, min_explained_variance):
        raise CheckError(f"{problem}\n{_advice(sae, report)}", report)
    return report


def _problem(report: CheckReport, bound: float) -> str | None:
    if report.published_explained_variance is not None:
        bound = min(bound, report.published_explained_variance - 0.3)
    over = f"over {report.positions} positions at {report.hook}"
    if not report.explained_variance >= bound:  # NaN too
        return f"explained variance {report.explained_variance:.3f} {over}; at least {bound:.2f} was expected"
    if report.l0 == 0:
        return f"no latent fires {over}"
    if report.published_l0 and not 0.1 <= report.l0 / report.published_l0 <= 10:
        return f"{report.l0:.1f} latents fire on average {over}; published is {report.published_l0:g}"
    return None


def _advice(sae: SAE[Any], report: CheckReport) -> str:
    facts = sae.metadata.get("sae_core", {})
    model = facts.get("base_model") or sae.metadata.get("model_name") or "a model it does not name"
    place = sae.metadata.get("hook_name") or sae.metadata.get("hf_hook_name") or report.hook
    revision = f" at revision {facts['base_model_revision']}" if facts.get("base_model_revision") else ""
    return (
        f"this SAE is for {model}{revision}, {place}: is this that model, unchanged, and are the tokens its own? "
        "If the model processes weights or activations, it must do so as in training"
    )


def _hook_point(model: nn.Module, metadata: Mapping[str, Any], given: str | None, end: str) -> tuple[str, bool]:
    """The first of the known paths that the model has, and whether it is a TransformerLens hook point."""
    modules = dict(model.named_modules())
    named = metadata.get(f"hook_name{end}"), metadata.get(f"hf_hook_name{end}")
    wanted = [given] if given else [name for name in named if isinstance(name, str)]
    if not wanted:
        argument = f"hook{end}"
        raise ConfigError(f"check: the SAE's metadata name no hook point; give {argument}='path.of.a.module[:input]'")
    for path in wanted:
        for spelling in _spellings(path):
            if spelling.partition(":")[0] in modules:
                return spelling, spelling == metadata.get(f"hook_name{end}")
        name, colon, side = path.partition(":")
        inside = [module for module in modules if module.endswith(f".{name}")]
        if len(inside) == 1:  # a path inside the base model, as sparsify writes it: layers.3 for model.layers.3
            return f"{inside[0]}{colon}{side}", False
    missing = wanted[-1].partition(":")[0]
    raise ConfigError(
        f"check: {type(model).__name__} has no module {' or '.join(wanted)}{did_you_mean(missing, modules)}"
    )


def _spellings(path: str) -> list[str]:
    """The path, and the same place where the language model is the whole, or a part of a larger model."""
    inner = path.removeprefix("model.").removeprefix("language_model.")
    return [path, *(p for p in (f"model.{inner}", f"model.language_model.{inner}", inner) if path.startswith("model."))]


def _activations(model: nn.Module, tokens: Tensor, *paths: str) -> list[Tensor]:
    """The activations at each path, in one forward pass, detached."""
    found: dict[str, Tensor] = {}

    def keep(path: str, value: object) -> None:
        if path not in found:
            found[path] = _first_tensor(value, path).detach().clone()

    def before(path: str) -> Any:
        return lambda _module, args, kwargs: keep(path, (*args, *kwargs.values()))

    def after(path: str) -> Any:
        return lambda _module, _args, output: keep(path, output)

    with ExitStack() as hooks, torch.no_grad():
        for path in dict.fromkeys(paths):
            name, _, side = path.partition(":")
            module = model.get_submodule(name)
            if side == "input":
                handle = module.register_forward_pre_hook(before(path), with_kwargs=True)
            else:
                handle = module.register_forward_hook(after(path))
            hooks.callback(handle.remove)
        model(tokens.to(next(model.parameters()).device))
    for path in paths:
        if path not in found:
            raise DataError(f"check: the module at {path} did not run")
        if found[path].shape[: tokens.dim()] != tokens.shape:
            raise DataError(
                f"check: activations at {path} have shape {tuple(found[path].shape)}, tokens {tuple(tokens.shape)}"
            )
    return [found[path] for path in paths]


def _first_tensor(value: object, path: str) -> Tensor:
    if isinstance(value, Tensor):
        return value
    parts = cast("Mapping[str, object]", value).values() if isinstance(value, Mapping) else value
    for part in cast("tuple[object, ...]", parts) if isinstance(parts, tuple | list) else tuple(cast("Any", parts)):
        if isinstance(part, Tensor) and part.is_floating_point():
            return part
    raise DataError(f"check: the module at {path} passes no tensor")


def _as_trained(x: Tensor, metadata: Mapping[str, Any], hook_name: str | None) -> Tensor:
    """`x` as the model had it that the SAE was trained on.

    TransformerLens centres the weights that write to GPT-2's residual stream (``center_writing_weights``), and what they
    write has mean zero over features. All parts of the model read it through a LayerNorm, so nothing else changes, and
    subtracting the mean gives the same.
    """
    centered = (metadata.get("model_from_pretrained_kwargs") or {}).get("center_writing_weights")
    if centered and (hook_name or "").rpartition(".")[2] in _WRITTEN:
        return x - x.mean(-1, keepdim=True)
    return x


def _number(metadata: Mapping[str, Any], key: str) -> float | None:
    value = metadata.get(key)
    return float(value) if isinstance(value, int | float) else None
