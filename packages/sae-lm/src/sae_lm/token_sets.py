"""Which latents promote a given set of tokens? Enrichment of token sets, for all latents and sets at once.

Sort the vocabulary by what a latent adds to each token's logit and walk down the list: a token of the set is a step up by
1 / (tokens in the set), any other a step down by 1 / (all others). The farthest that the walk gets from zero is the set's
enrichment, near 1 if all its tokens stand at the top and near -1 if they stand at the bottom (Subramanian et al. 2005, as used
for tokens by Lin and Bloom 2023). Only the ranks of the set's own tokens decide where the walk turns, so no walk is walked.
"""

# n latents, V vocabulary, S tokens of a set

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from sae_core import SAE
from sae_core.errors import DataError
from torch import Tensor, nn

from sae_lm.lens import Lens, directions

__all__ = ["enrichment", "enrichment_of_latents", "matching_tokens", "tokens_by_first_letter"]

_LOGITS_AT_ONCE = 1 << 24


def enrichment(scores: Tensor, sets: Mapping[str, Iterable[int]]) -> dict[str, Tensor]:
    """The enrichment (n,) of each set of token ids in each row of `scores` (n, vocabulary), in [-1, 1].

    Raises DataError for a set that is empty, holds the whole vocabulary, or has an id beyond it.

    >>> scores = torch.tensor([[4.0, 3.0, 2.0, 1.0], [1.0, 3.0, 4.0, 2.0]])
    >>> {name: value.tolist() for name, value in enrichment(scores, {"first": [0, 1]}).items()}
    {'first': [1.0, -0.5]}
    """
    vocabulary = scores.shape[-1]
    ids = {name: _checked(name, tokens, vocabulary).to(scores.device) for name, tokens in sets.items()}
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices
    ranks = torch.empty_like(order).scatter_(1, order, torch.arange(vocabulary, device=order.device).expand_as(order))
    return {name: _walked(ranks[:, chosen].sort(dim=-1).values, vocabulary) for name, chosen in ids.items()}


@torch.no_grad()
def enrichment_of_latents(
    sae: SAE[Any],
    lens: Lens | nn.Module,
    sets: Mapping[str, Iterable[int]],
    latents: Sequence[int] | Tensor | None = None,
) -> dict[str, Tensor]:
    """The enrichment (n,) of each set in what each latent adds to the logits; None asks for all latents, a block at a time."""
    lens = lens if isinstance(lens, Lens) else Lens.of(lens)
    chosen = torch.arange(sae.d_sae) if latents is None else torch.as_tensor(latents)
    known = {name: list(tokens) for name, tokens in sets.items()}
    parts: dict[str, list[Tensor]] = {name: [] for name in known}
    for block in chosen.split(max(1, _LOGITS_AT_ONCE // lens.unembed.shape[0])):
        logits = lens.logits(directions(sae, block).to(lens.weight.device)).float()
        for name, values in enrichment(logits, known).items():
            parts[name].append(values.cpu())
    return {name: torch.cat(values) for name, values in parts.items()}


def matching_tokens(tokenizer: Any, pattern: str) -> list[int]:
    """Ids of the tokens whose text matches the regular expression as a whole; the text as it stands in a sentence, with its
    leading space."""
    expression = re.compile(pattern)
    return [token for token, text in _texts(tokenizer) if expression.fullmatch(text)]


def tokens_by_first_letter(tokenizer: Any) -> dict[str, list[int]]:
    """Sets of the tokens that begin a word with each letter of the Latin alphabet, upper and lower case together."""
    sets: dict[str, list[int]] = {}
    for token, text in _texts(tokenizer):
        if text.startswith(" ") and len(text) > 1 and text[1].isascii() and text[1].isalpha():
            sets.setdefault(text[1].lower(), []).append(token)
    return dict(sorted(sets.items()))


def _texts(tokenizer: Any) -> Iterable[tuple[int, str]]:
    for token in sorted(tokenizer.get_vocab().values()):
        # Decoded behind another token, since some tokenizers drop a leading space at the start.
        both, alone = tokenizer.decode([token, token]), tokenizer.decode([token])
        yield token, both[len(alone) :] if both.startswith(alone) and len(both) > len(alone) else alone


def _checked(name: str, tokens: Iterable[int], vocabulary: int) -> Tensor:
    chosen = torch.tensor(sorted({int(token) for token in tokens}), dtype=torch.long)
    if not 0 < len(chosen) < vocabulary:
        raise DataError(
            f"enrichment: the set {name!r} must hold some but not all of {vocabulary} tokens, not {len(chosen)}"
        )
    if int(chosen[0]) < 0 or int(chosen[-1]) >= vocabulary:
        raise DataError(f"enrichment: the set {name!r} has a token beyond the {vocabulary} of the vocabulary")
    return chosen


def _walked(ranks_nS: Tensor, vocabulary: int) -> Tensor:
    """The extreme of the walk, from the sorted ranks of the set's tokens: it turns down after a hit, and up before one."""
    size = ranks_nS.shape[1]
    hits = torch.arange(1, size + 1, device=ranks_nS.device, dtype=torch.float64)
    misses = (ranks_nS.double() - (hits - 1)) / (vocabulary - size)
    above, below = (hits / size - misses).amax(-1), ((hits - 1) / size - misses).amin(-1)
    return torch.where(above >= -below, above, below).float()
