"""Does this SAE belong in this place of this model? A few tokens tell.

The wrong base model, layer, hook point or scale gives latents and reconstructions that look like numbers and mean nothing.
What gives it away is the explained variance: near or below zero where a dictionary in its place has most of the variance.
`check` runs the model on a few tokens, reads the activations at the SAE's place, and fails when it is absurd. It works with
any `nn.Module`, and finds the place as `spliced` does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from sae_core import SAE
from sae_core.errors import ConfigError, DataError, SaeCoreError
from sae_core.metrics import ExplainedVariance
from torch import Tensor, nn

from sae_lm.hooks import capture
from sae_lm.places import Place, route_of
from sae_lm.splicing import evaluating

__all__ = ["SAMPLE_TEXT", "CheckError", "CheckReport", "check"]

SAMPLE_TEXT = """\
The old harbour of Marrow Point lies behind a long wall of grey stone. In 1846 a storm took the northern half of it away,
and for eleven years the fishing boats were moored in the river instead. When the wall was built again, the engineers used
iron clamps between the blocks; most of them are still there, red with rust, and children count them on their way to school.

Light bends when it passes from air into glass, because it travels more slowly there. The angle depends on its colour: blue
is bent more than red, which is why a prism spreads a white beam into a band. If n is the refractive index, then
sin(a) = n * sin(b), where a and b are measured from the line that stands upright on the surface.

"Did you bring the key?" she asked. He searched his pockets, first the left one, then the right, and shook his head. They
looked at each other, and at the locked door, and at the window above it that somebody had left open.

def mean(values):
    total = 0.0
    for value in values:
        total += value
    return total / len(values)
"""


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
    place: str
    published_explained_variance: float | None
    published_l0: float | None


@torch.no_grad()
def check(
    sae: SAE[Any],
    model: nn.Module,
    tokens: Tensor | None = None,
    *,
    tokenizer: Any = None,
    at: str | None = None,
    min_explained_variance: float = 0.1,
    ignore_first: int = 1,
) -> CheckReport:
    """Run `model` on `tokens` (sequences, positions) and compare the SAE's outputs with the activations.

    Without `tokens` it takes a few sentences of English and a little code, by `tokenizer`: any callable of transformers'
    kind, by default the one that the model carries (TransformerLens) or was loaded with (transformers). The place is that of
    the SAE's metadata unless `at` says, written as `Route` is. The first `ignore_first` positions of each sequence are left
    out, since the one after BOS dwarfs all others in many models. The bound `min_explained_variance` is lowered to 0.3 below
    a published figure.

    Raises CheckError below that bound, for an average L0 of zero, and for one more than ten times off the published one;
    ConfigError when the model has no such place.
    """
    if tokens is None:
        tokens = _sample(tokenizer or _tokenizer_of(model), bool(sae.metadata.get("prepend_bos", True)))
    if tokens.dim() != 2 or tokens.shape[1] <= ignore_first:
        raise DataError(
            f"check: tokens must be (sequences, positions) with more than {ignore_first} positions, not {tuple(tokens.shape)}"
        )
    route = route_of(sae, model, at)
    places = dict.fromkeys([*route.reads, *route.writes])
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    found = capture(model, list(dict.fromkeys(place.point for place in places)), tokens.to(device))

    def rows(chosen: tuple[Place, ...]) -> Tensor:
        parts = [place.read(found[str(place.point)]).to(sae.device).float() for place in chosen]
        joined = torch.cat(parts, dim=-1)
        if joined.shape[:-1] != tokens.shape and joined.shape[:-1].numel() != tokens.numel():
            raise DataError(f"check: activations at {route} are {tuple(joined.shape)}, tokens {tuple(tokens.shape)}")
        return joined.reshape(*tokens.shape, -1)

    x, y = rows(route.reads), rows(route.writes)
    with evaluating(sae):  # whole sequences go in, since some dictionaries look at earlier positions too
        reconstruction = sae(x).reshape(*tokens.shape, -1)[:, ignore_first:]
        l0 = sae.encode_sparse(x).l0().reshape(tokens.shape)[:, ignore_first:]
    explained = ExplainedVariance()
    explained.update(y[:, ignore_first:], reconstruction.float(), None)
    report = CheckReport(
        explained_variance=explained.compute()["explained_variance"],
        l0=l0.float().mean().item(),
        positions=l0.numel(),
        place=str(route),
        published_explained_variance=_number(sae.metadata, "variance_explained"),
        published_l0=_number(sae.metadata, "l0"),
    )
    if problem := _problem(report, min_explained_variance):
        raise CheckError(f"{problem}\n{_advice(sae, report)}", report)
    return report


def _problem(report: CheckReport, bound: float) -> str | None:
    if report.published_explained_variance is not None:
        bound = min(bound, report.published_explained_variance - 0.3)
    over = f"over {report.positions} positions at {report.place}"
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
    place = sae.metadata.get("hook_name") or sae.metadata.get("hf_hook_name") or report.place
    revision = f" at revision {facts['base_model_revision']}" if facts.get("base_model_revision") else ""
    return (
        f"this SAE is for {model}{revision}, {place}: is this that model, unchanged, and are the tokens its own? "
        "If the model processes weights or activations, it must do so as in training"
    )


def _number(metadata: Mapping[str, Any], key: str) -> float | None:
    value = metadata.get(key)
    return float(value) if isinstance(value, int | float) else None


def _sample(tokenizer: Any, prepend_bos: bool) -> Tensor:
    ids: list[int] = list(tokenizer(SAMPLE_TEXT)["input_ids"])
    bos = getattr(tokenizer, "bos_token_id", None)
    if prepend_bos and bos is not None and ids[0] != bos:
        ids.insert(0, bos)
    return torch.tensor([ids])


def _tokenizer_of(model: nn.Module) -> Any:
    own = getattr(model, "tokenizer", None)
    if own is not None:
        return own
    name = getattr(getattr(model, "config", None), "name_or_path", "")
    if not name:
        raise ConfigError("check: this model does not say which tokenizer it has; give tokens= or tokenizer=")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(name)
