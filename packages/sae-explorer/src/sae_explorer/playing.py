"""The model behind the page: which latents fire on a text, and what it says when one of them is changed.

A generation runs the untouched text and the changed one as two rows of one batch; the dictionary is spliced in with its error
term and only in the second row, so the first is what the model always says. The model is held for one step at a time: texts are
looked at while something is generated.
"""

# L positions of a text

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, final

import torch
from sae_core.codes import SparseCodes
from sae_core.config import require
from sae_core.errors import ConfigError, DataError
from sae_lm.attribution import attribute
from sae_lm.hooks import capture
from sae_lm.inputs import model_inputs, positions_of
from sae_lm.latents import Edit, ablate, clamp, steer
from sae_lm.model import next_token_logits
from sae_lm.source import HuggingFaceSource
from sae_lm.splicing import Splice, spliced
from sae_lm.tokens import Windows
from torch import Tensor
from torch.nn.functional import cross_entropy

from sae_explorer.reading import Studied, finite, shortened

__all__ = ["Change", "Model"]

LONGEST_TEXT = 4000
MOST_TOKENS = 512
MOST_NEW_TOKENS = 200
_PER_TOKEN = 50


@final
@dataclass(frozen=True, kw_only=True)
class Change:
    """What is done to one latent at every position that counts: `amount` added, set, or the latent removed."""

    latent: int
    how: Literal["add", "set", "remove"] = "add"
    amount: float = 0.0

    def edit(self) -> Edit:
        """As an edit of latents. Raises ConfigError for another `how` or an amount that is no number."""
        require(-1e9 < self.amount < 1e9, f"amount: {self.amount} is out of range")
        if self.how == "add":
            return steer(self.latent, self.amount)
        if self.how == "set":
            return clamp(self.latent, self.amount)
        require(self.how == "remove", f"how: {self.how!r} is none of add, set, remove")
        return ablate(self.latent)


@final
class Model:
    """A language model with its tokenizer, and dictionaries of it by name, each at the place where it was studied."""

    def __init__(self, source: HuggingFaceSource, studied: Mapping[str, Studied]) -> None:
        tokenizer: Any = source.tokenizer
        if tokenizer is None:
            raise ConfigError("explore: the model has no tokenizer; name one with --set tokenizer=NAME")
        self.model, self.tokenizer, self.rules = source.language_model.model, tokenizer, source.rules
        self.device, self._lock = source.language_model.device, threading.Lock()
        self._saes = {name: (one.sae, str(one.study.index["place"])) for name, one in studied.items()}
        self.longest = min(MOST_TOKENS, positions_of(self.model) or MOST_TOKENS)

    def tokens(self, text: str, *, room: int = 0) -> list[int]:
        """Ids of a text, with BOS where the dictionaries had one. Raises DataError for one that is empty or too long."""
        if len(text) > LONGEST_TEXT:
            raise DataError(f"the text has {len(text):,} characters; at most {LONGEST_TEXT:,} are taken")
        text = text.encode("utf-8", "replace").decode()
        ids = [int(i) for i in self.tokenizer(text, add_special_tokens=False)["input_ids"]]
        if not ids:
            raise DataError("the text is empty")
        ids = ([] if self.rules.bos_id is None else [self.rules.bos_id]) + ids
        if len(ids) + room > self.longest:
            raise DataError(f"the text has {len(ids)} tokens; {self.longest - room} are the most that fit")
        return ids

    def fires(self, name: str, text: str) -> dict[str, Any]:
        """Tokens of a text, and for each the latents that fire there, strongest first: number, activation, effect.

        The effect is the latent's share, to first order, in the log-probability of the text's tokens after it; None where the
        model predicts no text. `counts` says which positions count.
        """
        sae, at = self._saes[name]
        start = time.perf_counter()
        ids = self.tokens(text)
        windows = self._windows(torch.tensor([ids]))
        args, kwargs = model_inputs(self.model, windows, self.device)
        with self._lock:
            explained = len(ids) > 1 and self._predicts_text
            if explained:

                def said(output: Any) -> Tensor:
                    logits = next_token_logits(self.model, output, windows.tokens)
                    assert logits is not None
                    chosen = windows.tokens[:, 1:].to(logits.device)
                    return -cross_entropy(logits[0, :-1].float(), chosen[0], reduction="sum")

                found = attribute(self.model, {at: sae}, said, *args, **kwargs)[at]
                codes, effects = found.codes, found.latents.values
            else:
                with torch.no_grad(), spliced(self.model, {name: Splice(sae, at=at)}, error_term=True) as seen:
                    capture(self.model, [place.point for place in seen.routes[name].reads], *args, **kwargs)
                codes, effects = seen.latents[name], None
        return {
            "tokens": [shortened(str(self.tokenizer.decode([token]))) for token in ids],
            "counts": windows.kept[0].tolist(),
            "fired": _per_position(codes, effects),
            "effects": explained,
            "seconds": time.perf_counter() - start,
        }

    def generate(
        self,
        name: str,
        text: str,
        change: Change,
        *,
        tokens: int = 40,
        temperature: float = 0.0,
        seed: int = 0,
        stop: threading.Event | None = None,
    ) -> Generator[dict[str, str]]:
        """What follows the text, `plain` and `edited`, after every new token; ends when `stop` is set.

        At temperature 0 the likeliest token is taken, otherwise both rows are drawn with the same random numbers. Raises
        DataError for a text that is empty or too long, ConfigError for an impossible change, and for models that predict
        no text.
        """
        require(0 < tokens <= MOST_NEW_TOKENS, f"tokens: {tokens} must lie in [1, {MOST_NEW_TOKENS}]")
        require(0 <= temperature <= 10, f"temperature: {temperature} must lie in [0, 10]")
        sae, at = self._saes[name]
        require(0 <= change.latent < sae.d_sae, f"there is no latent {change.latent}; the dictionary has {sae.d_sae:,}")
        edit = change.edit()
        ids = self.tokens(text, room=tokens)
        seen = torch.tensor([ids, ids])
        where = torch.zeros(2, len(ids) + tokens, dtype=torch.bool)
        where[1] = True
        where[1, : len(ids)] = self._windows(seen).kept[1]
        cached = not sae.reads_sequences and len(sae.reads) == 1
        cache: Any = None
        done = [False, False]
        ends = {getattr(self.tokenizer, "eos_token_id", None)} - {None}
        generator = torch.Generator().manual_seed(seed)
        for _ in range(tokens):
            if stop is not None and stop.is_set():
                return
            given = seen if cache is None else seen[:, -1:]
            with self._lock, torch.no_grad(), spliced(
                self.model, {name: Splice(sae, at=at, edit=edit)}, error_term=True, where=where
            ):  # fmt: skip
                logits, cache = self._step(given, cache, cached)
            chosen = _choose(logits, temperature, generator)
            for row in (0, 1):
                done[row] |= int(chosen[row]) in ends
            seen = torch.cat([seen, chosen.unsqueeze(1)], dim=1)
            yield {
                "plain": self._text(seen[0, len(ids) :].tolist(), ends),
                "edited": self._text(seen[1, len(ids) :].tolist(), ends),
            }
            if all(done):
                return

    @cached_property
    def _predicts_text(self) -> bool:
        """Whether there are logits of a next token; a pass over one token says it."""
        token = torch.tensor([self.tokens("a")[:1]])
        args, kwargs = model_inputs(self.model, self._windows(token), self.device)
        with torch.no_grad():
            return next_token_logits(self.model, self.model(*args, **kwargs), token) is not None

    def _step(self, given: Tensor, cache: Any, cached: bool) -> tuple[Tensor, Any]:
        """(2, vocabulary) logits behind the last position, and the key-value cache if the model has one."""
        given = given.to(self.device)
        args, kwargs = model_inputs(self.model, self._windows(given.cpu()), self.device)
        if cached and "use_cache" in kwargs:
            kwargs |= {"use_cache": True} | ({} if cache is None else {"past_key_values": cache})
        output = self.model(*args, **kwargs)
        logits = next_token_logits(self.model, output, given)
        if logits is None:
            raise ConfigError("this model predicts no next token, so nothing can be generated")
        kept = getattr(output, "past_key_values", None) if cached and "use_cache" in kwargs else None
        return logits[:, -1].float().cpu(), kept

    def _windows(self, tokens: Tensor) -> Windows:
        attended = torch.ones_like(tokens, dtype=torch.bool)
        return Windows(tokens, attended, self.rules.kept(tokens, attended))

    def _text(self, ids: list[int], ends: set[Any]) -> str:
        end = next((n for n, token in enumerate(ids) if token in ends), len(ids))
        return str(self.tokenizer.decode(ids[:end])).removesuffix("\ufffd")


@contextmanager
def counted(slots: threading.Semaphore) -> Generator[bool]:
    """One of several slots within the context; False when there is none."""
    free = slots.acquire(blocking=False)
    try:
        yield free
    finally:
        if free:
            slots.release()


def _per_position(codes: SparseCodes, effects: Tensor | None) -> list[list[list[Any]]]:
    """For each position of one sequence its strongest latents; `effects` are (entries,), as the codes' values."""
    found: list[list[list[Any]]] = []
    shares = torch.full_like(codes.values, torch.nan) if effects is None else effects
    for values, latents, own in zip(
        *(t.split(codes.row_offsets().diff().tolist()) for t in (codes.values.float(), codes.indices, shares)),
        strict=True,
    ):
        strongest = values.abs().topk(min(_PER_TOKEN, len(values))).indices
        columns = zip(latents[strongest].tolist(), values[strongest].tolist(), own[strongest].tolist(), strict=True)
        found.append([[latent, finite(value), finite(share)] for latent, value, share in columns if value])
    return found


def _choose(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """(2,) next tokens."""
    if not bool(torch.isfinite(logits).all()):
        raise DataError("the model's logits are not finite any more; change the latent by less")
    if temperature == 0:
        return logits.argmax(-1)
    noise = (
        -torch.empty(logits.shape[-1]).exponential_(generator=generator).log()
    )  # the Gumbel trick, the same for both
    return (logits / temperature + noise).argmax(-1)
