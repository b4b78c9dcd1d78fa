"""`check`: `sae_core.check` with a text of its own, for models whose tokenizer can be found."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sae_core.errors import ConfigError, MissingDependencyError

if TYPE_CHECKING:
    from sae_core.check import CheckReport
    from sae_core.sae import SAE
    from torch import Tensor, nn

__all__ = ["SAMPLE_TEXT", "check"]

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


def check(
    sae: SAE[Any], model: nn.Module, tokens: Tensor | None = None, *, tokenizer: Any = None, **options: Any
) -> CheckReport:
    """Whether `sae` belongs in this place of `model`: `sae_core.check.check`, whose `options` and errors it has.

    Without `tokens` (batch, positions) it takes a few sentences of English and a little code, by `tokenizer`: any callable
    of transformers' kind, by default the one that the model carries (TransformerLens) or was loaded with (transformers).
    """
    from sae_core.check import check as check_tokens

    if tokens is None:
        tokens = _sample(tokenizer or _tokenizer_of(model), bool(sae.metadata.get("prepend_bos", True)))
    return check_tokens(sae, model, tokens, **options)


def _sample(tokenizer: Any, prepend_bos: bool) -> Tensor:
    import torch

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
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise MissingDependencyError(
            "check: reading the model's tokenizer needs transformers (pip install transformers); or give tokens="
        ) from None
    return AutoTokenizer.from_pretrained(name)
