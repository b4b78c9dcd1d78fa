"""How documents become rows of tokens, and which positions count.

A `TokenPolicy` is what a user writes: how documents are packed, where BOS and EOS stand, what is left out of training
and metrics. `resolve` fixes it for one tokenizer and window length, as `TokenRules`: from then on there are ids, not
wishes, and it is these that are stored with an SAE. `WindowStream` applies the rules to a stream of documents and gives
`Windows`: token ids, which of them are no padding, and the one mask that training and metrics share.

Documents that are token ids already may be whole windows, as a pretokenising step writes them; such rows stay as they are.
Where the policy puts in a BOS or EOS itself, one that a document brings at that place is taken off first, so that none is
doubled and none lands in the middle of a window.

Special tokens are placed by the policy alone; the tokenizer is asked to add none. Whether a tokenizer has a BOS, EOS or
padding token is a question of its id being None: id 0 is a token like any other.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, Protocol, cast, final, runtime_checkable

import torch
from sae_core.config import check_fields, option, require, unstructure
from sae_core.errors import ConfigError, DataError, did_you_mean
from torch import Tensor

from sae_lm.reading import Chat, Document, TokenRow

__all__ = ["Mark", "TokenPolicy", "TokenRules", "WindowStream", "Windows", "preview", "resolve"]

log = logging.getLogger(__name__)

Packing = Literal["concatenate", "document", "rows"]

DOCUMENTS_AT_ONCE = 64
"""Documents given to the tokenizer in one call: enough to keep its threads busy, few enough to start soon."""


@dataclass(frozen=True, kw_only=True)
class TokenPolicy:
    """How documents become windows of tokens, and which tokens are left out of training and metrics.

    Padding is always left out.
    """

    packing: Literal["auto", "concatenate", "document", "rows"] = option(
        default="auto",
        help="concatenate: all documents in one stream, cut into full windows; document: every window holds one document; "
        "rows: documents are token ids and each is a window as it is; auto: rows where they are token ids of the context's "
        "length with the BOS that is asked for, else concatenate",
    )
    bos: Literal["auto", "window", "document", "none"] = option(
        default="auto",
        help="a BOS token at the start of every window, of every document, or nowhere; "
        "auto: of every window if the tokenizer has one",
    )
    eos: Literal["auto", "document", "none"] = option(
        default="auto",
        help="an EOS token after every document, or none; auto: after every document if the tokenizer has one",
    )
    overflow: Literal["split", "truncate"] = option(
        default="split",
        help="packing: document or rows - what is longer than a window goes on in the next one, or is cut off",
    )
    incomplete: Literal["pad", "drop"] = option(
        default="pad", help="packing: concatenate - the last, incomplete window is padded or dropped"
    )
    bos_token: str | int | None = option(default=None, help="another token in the role of BOS: its text or its id")
    eos_token: str | int | None = option(default=None, help="another token in the role of EOS: its text or its id")
    pad_token: str | int | None = option(default=None, help="another token in the role of padding: its text or its id")
    exclude_bos: bool = option(default=True, help="leave BOS tokens out of training and metrics, wherever they stand")
    exclude_eos: bool = option(default=True, help="leave EOS tokens out of training and metrics, wherever they stand")
    exclude_first: int = option(
        default=0, help="leave out this many positions at the start of every window, beside what is left out by token"
    )
    exclude_last: int = option(
        default=0, help="leave out this many positions at the end of every window, padding not counted"
    )
    exclude_special_tokens: bool | tuple[str, ...] = option(
        default=False,
        help="leave out special tokens beside BOS and EOS: true for all that the tokenizer has, or their roles by name, "
        "[sep, cls, unk, mask, ...]",
    )
    exclude_tokens: tuple[str | int, ...] = option(
        default=(), help="more tokens to leave out of training and metrics: texts or ids"
    )

    def __post_init__(self) -> None:
        check_fields(self)
        for field in ("exclude_first", "exclude_last"):
            require(getattr(self, field) >= 0, f"tokens: {field!r} must not be negative, it is {getattr(self, field)}")
        concatenates = self.packing in ("auto", "concatenate")
        require(not concatenates or self.overflow == "split", "tokens: 'overflow' belongs to packing: document or rows")
        if self.packing == "rows":
            asked = [role for role in ("bos", "eos") if getattr(self, role) not in ("auto", "none")]
            require(not asked, f"tokens: packing: rows puts in no tokens; leave out {' and '.join(asked)}")
        require(concatenates or self.incomplete == "pad", "tokens: 'incomplete' belongs to packing: concatenate")
        require(self.bos != "none" or self.bos_token is None or self.exclude_bos, _unused("bos"))
        require(self.eos != "none" or self.eos_token is None or self.exclude_eos, _unused("eos"))


def _unused(role: str) -> str:
    return f"tokens: '{role}_token' is given, but {role}: none and exclude_{role}: false leave no use for it"


@final
@dataclass(frozen=True, kw_only=True)
class TokenRules:
    """A `TokenPolicy` fixed for one tokenizer: ids instead of wishes.

    `bos_id` and `eos_id` are the tokens put in, None where none is; `excluded_ids` are left out wherever they stand.
    """

    policy: TokenPolicy
    context_size: int
    bos: Literal["window", "document", "none"]
    bos_id: int | None
    eos_id: int | None
    pad_id: int
    excluded_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        taken = 1 if self.bos == "window" else 0
        require(
            self.context_size > taken + self.policy.exclude_first + self.policy.exclude_last,
            f"context_size: windows of {self.context_size} tokens leave no position for text",
        )

    def kept(self, tokens_RC: Tensor, attended_RC: Tensor) -> Tensor:
        """(rows, window) bool: the positions that count, for training and for every metric alike."""
        kept_RC = attended_RC.clone()
        if self.excluded_ids:
            kept_RC &= ~torch.isin(tokens_RC, torch.tensor(self.excluded_ids))
        kept_RC[:, : self.policy.exclude_first] = False
        if self.policy.exclude_last:
            ends_R = attended_RC.sum(1, keepdim=True) - self.policy.exclude_last
            kept_RC &= torch.arange(kept_RC.shape[1]) < ends_R
        return kept_RC

    def metadata(self) -> dict[str, Any]:
        """The policy and what it came to, as JSON values."""
        resolved = {name: getattr(self, name) for name in ("bos", "bos_id", "eos_id", "pad_id")}
        return {**unstructure(self.policy), "resolved": {**resolved, "excluded_ids": list(self.excluded_ids)}}


@final
@dataclass(frozen=True, slots=True, eq=False)
class Windows:
    """Rows of tokens, all on the CPU: `tokens` (rows, window) ids; `attended`, False on padding; `kept`, what counts."""

    tokens: Tensor
    attended: Tensor
    kept: Tensor

    def __len__(self) -> int:
        return self.tokens.shape[0]


def resolve(policy: TokenPolicy, tokenizer: Any | None, context_size: int) -> TokenRules:
    """Fix `policy` for `tokenizer`, or for documents that are token ids already if that is None.

    Raises ConfigError when the policy asks for a token that the tokenizer does not have.

    >>> rules = resolve(TokenPolicy(bos_token=0), None, context_size=8)
    >>> rules.bos, rules.bos_id, rules.eos_id, rules.excluded_ids
    ('window', 0, None, (0,))
    """
    require(context_size > 0, f"context_size must be positive, not {context_size}")
    bos_id = _role(policy.bos_token, tokenizer, "bos_token", ("bos_token_id", "cls_token_id"))
    eos_id = _role(policy.eos_token, tokenizer, "eos_token", ("eos_token_id", "sep_token_id"))
    pad_id = _role(policy.pad_token, tokenizer, "pad_token", ("pad_token_id",))

    for role, asked, found in (("bos", policy.bos, bos_id), ("eos", policy.eos, eos_id)):
        if asked in ("window", "document") and found is None:
            raise ConfigError(
                f"tokens: {role}: {asked} needs a {role.upper()} token and the tokenizer has none; "
                f"name one with {role}_token, or set {role}: none"
            )
    bos = policy.bos if policy.bos != "auto" else ("none" if bos_id is None or policy.packing == "rows" else "window")
    excluded = {_token_id(token, tokenizer, "exclude_tokens") for token in policy.exclude_tokens}
    excluded |= _special(policy.exclude_special_tokens, tokenizer)
    excluded |= {bos_id} if policy.exclude_bos and bos_id is not None else set[int]()
    excluded |= {eos_id} if policy.exclude_eos and eos_id is not None else set[int]()
    return TokenRules(
        policy=policy,
        context_size=context_size,
        bos=bos,
        bos_id=None if bos == "none" else bos_id,
        eos_id=None if policy.eos == "none" or policy.packing == "rows" else eos_id,
        # Padding is masked by position, so any id of the vocabulary will do where there is no token for it.
        pad_id=next((token for token in (pad_id, eos_id, bos_id) if token is not None), 0),
        excluded_ids=tuple(sorted(excluded)),
    )


def _role(asked: str | int | None, tokenizer: Any | None, field: str, attributes: Sequence[str]) -> int | None:
    if asked is not None:
        return _token_id(asked, tokenizer, field)
    if tokenizer is None:
        return None
    return next((found for name in attributes if (found := getattr(tokenizer, name, None)) is not None), None)


def _special(asked: bool | tuple[str, ...], tokenizer: Any | None) -> set[int]:
    """Ids of all special tokens, or of those in the roles asked for."""
    if not asked:
        return set()
    if tokenizer is None:
        raise ConfigError(
            "tokens: exclude_special_tokens needs a tokenizer that knows them; name ids in exclude_tokens"
        )
    if asked is True:
        return set(tokenizer.all_special_ids)
    known: dict[str, Any] = {role: getattr(tokenizer, f"{role}_token_id", None) for role in asked}
    missing = [role for role, found in known.items() if not isinstance(found, int)]
    if missing:
        roles = [name.removesuffix("_token") for name in tokenizer.special_tokens_map if name.endswith("_token")]
        raise ConfigError(
            f"tokens: exclude_special_tokens: the tokenizer has no {missing[0]!r} token{did_you_mean(missing[0], roles)} "
            f"(it has: {', '.join(roles) or 'none'})"
        )
    return set(known.values())


def _token_id(token: str | int, tokenizer: Any | None, field: str) -> int:
    if isinstance(token, int):
        size = None if tokenizer is None else len(tokenizer)
        require(token >= 0, f"tokens: {field}: {token} is no token id")
        require(size is None or token < size, f"tokens: {field}: id {token} is beyond the tokenizer's {size} tokens")
        return token
    if tokenizer is None:
        raise ConfigError(f"tokens: {field}: {token!r} must be a token id, since there is no tokenizer")
    vocabulary: Mapping[str, int] = tokenizer.get_vocab()
    if token not in vocabulary:
        special = [str(known) for known in tokenizer.all_special_tokens]
        known = ", ".join(special) or "none"
        hint = did_you_mean(token, special)
        raise ConfigError(f"tokens: {field}: the tokenizer has no token {token!r}{hint} (special tokens: {known})")
    return vocabulary[token]


@final
@dataclass(frozen=True, slots=True)
class Mark:
    """A place in a `WindowStream`: documents taken, how they are packed, and their tokens that no window has held yet.

    `position` is where in the data set the documents stand, if they know.
    """

    documents: int
    packing: Packing | None
    pending: list[list[int]]
    position: int | None = None

    def state_dict(self) -> dict[str, Any]:
        """The place as tensors and JSON values."""
        return {
            "documents": self.documents,
            "packing": self.packing,
            "position": self.position,
            "ids": torch.tensor([token for row in self.pending for token in row], dtype=torch.int32),
            "lengths": torch.tensor([len(row) for row in self.pending], dtype=torch.int32),
        }


@runtime_checkable
class _KnowsPosition(Protocol):
    """Documents that can be gone on with at a row of their data set."""

    @property
    def position(self) -> int | None: ...


@final
class WindowStream:
    """Windows of a stream of documents, `rows` at a time (fewer at the end), as `rules` say.

    Windows are `rules.context_size` long; where each holds one document or row, they are as long as the longest one beside
    them. Documents without tokens are passed over. `state_dict` holds how many documents were taken and the tokens not yet
    given out: a new stream over the same documents goes on from there without tokenising anything twice. Where it has a
    ``position``, the new stream is to be given the documents from that row on. `packing` overrules
    the policy's, for documents that are known to be windows by these rules.

    >>> rules = resolve(TokenPolicy(bos_token=9), None, context_size=3)
    >>> for windows in WindowStream([[1, 2, 3], [], [4]], rules, rows=2):
    ...     windows.tokens.tolist(), windows.kept.tolist()
    ([[9, 1, 2], [9, 3, 4]], [[False, True, True], [False, True, True]])
    """

    def __init__(
        self,
        documents: Iterable[Document],
        rules: TokenRules,
        *,
        rows: int,
        tokenizer: Any | None = None,
        state: Mapping[str, Any] | None = None,
        packing: Packing | None = None,
    ) -> None:
        require(rows > 0, f"rows must be positive, not {rows}")
        self._rules = rules
        self._rows = rows
        self._tokenizer = tokenizer
        self._taken = 0 if state is None else int(state["documents"])
        self._source = iter(documents)
        is_there = state is not None and state.get("position") is not None
        self._documents = islice(self._source, 0 if is_there else self._taken, None)
        asked = rules.policy.packing
        self._packing: Packing | None = packing or (None if asked == "auto" else asked)
        if state is not None and state["packing"] is not None:
            self._packing = state["packing"]
        self._pending = _pending(self._packing or "concatenate", rules)
        if state is not None:
            self._pending.restore([part.tolist() for part in state["ids"].split(state["lengths"].tolist())])

    def __iter__(self) -> Iterator[Windows]:
        return self

    def __next__(self) -> Windows:
        while self._pending.ready() < self._rows:
            batch = list(islice(self._documents, DOCUMENTS_AT_ONCE))
            if not batch:
                return self._last()
            if self._packing is None:
                self._packing = _packing_of(batch, self._rules)
                self._pending = _pending(self._packing, self._rules)
            self._taken += len(batch)
            for ids in self._encode(batch):
                if ids:
                    self._pending.add(ids)
        return self._windows(self._pending.cut(self._rows))

    def mark(self) -> Mark:
        """Where the stream stands; a copy that stays right when the stream moves on."""
        position = self._source.position if isinstance(self._source, _KnowsPosition) else None
        return Mark(self._taken, self._packing, self._pending.save(), position)

    def state_dict(self) -> dict[str, Any]:
        """Documents taken, and the tokens of them that no window has held yet."""
        return self.mark().state_dict()

    def _last(self) -> Windows:
        rows = self._pending.cut(self._rows, last=True)
        if not rows:
            raise StopIteration
        return self._windows(rows)

    def _encode(self, documents: list[Document]) -> list[list[int]]:
        """Token ids of every document, without the special tokens that the policy puts in itself."""
        texts = [_as_text(document, self._tokenizer) for document in documents]
        strings = [text for text in texts if text is not None]
        if strings and self._tokenizer is None:
            raise DataError("text: documents are text and there is no tokenizer to turn them into token ids")
        if strings and self._packing == "rows":
            raise DataError("text: packing: rows is for documents that are token ids, and here is text")
        encoded = iter(_tokenized(strings, self._tokenizer))
        found: list[list[int]] = []
        for document, text in zip(documents, texts, strict=True):
            ids = next(encoded) if text is not None else _ids_of(document)
            is_plain = isinstance(document, str) or self._packing == "rows"
            found.append(list(ids) if is_plain else _without_ends(ids, self._rules))
        return found

    def _windows(self, rows: list[list[int]]) -> Windows:
        length = self._rules.context_size if isinstance(self._pending, _Stream) else max(map(len, rows))
        tokens_RC = torch.tensor([row + [self._rules.pad_id] * (length - len(row)) for row in rows])
        lengths_R = torch.tensor([len(row) for row in rows])
        attended_RC = torch.arange(length) < lengths_R.unsqueeze(1)
        return Windows(tokens_RC, attended_RC, self._rules.kept(tokens_RC, attended_RC))


def _pending(packing: Packing, rules: TokenRules) -> _Stream | _Queue:
    if packing == "concatenate":
        return _Stream(rules)
    return _Queue(rules, as_they_are=packing == "rows")


def _packing_of(documents: list[Document], rules: TokenRules) -> Packing:
    """What packing: auto comes to, judged by the first documents; said where it may surprise."""
    rows = [document for document in documents if not isinstance(document, str | Chat)]
    if len(rows) < len(documents):
        return "concatenate"
    size = rules.context_size
    whole = all((row.length if isinstance(row, TokenRow) else len(row)) == size for row in rows)
    begun = [_ids_of(row)[:1] == [rules.bos_id] for row in rows]
    if whole and (rules.bos_id is None or all(begun)):
        log.info("text: rows of token ids have the context's length of %d and stay whole, as they are", size)
        return "rows"
    if whole or any(begun):
        why = "do not begin with the BOS that is asked for" if whole else f"are not as long as the context, {size}"
        log.warning(
            "text: rows of token ids %s: they are joined end to end and cut into new windows%s; set packing: rows to keep "
            "each as it is",
            why,
            ", and the BOS at the start of each is taken off" if any(begun) else "",
        )
    return "concatenate"


def _as_text(document: Document, tokenizer: Any | None) -> str | None:
    """The text of a document or conversation; None for token ids."""
    if isinstance(document, str):
        return document
    if not isinstance(document, Chat):
        return None
    if tokenizer is None or not getattr(tokenizer, "chat_template", None):
        raise ConfigError("text: documents are conversations, and there is no tokenizer with a chat template for them")
    from jinja2 import TemplateError  # what templates raise with; comes with transformers

    try:
        return tokenizer.apply_chat_template(document.messages, tokenize=False)
    except (TemplateError, KeyError, TypeError, ValueError) as error:
        roles = ", ".join(str(message["role"]) for message in document.messages)
        raise DataError(f"text: the chat template refuses a conversation (roles: {roles}): {error}") from error


def _tokenized(texts: list[str], tokenizer: Any | None) -> list[list[int]]:
    if not texts or tokenizer is None:
        return []
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


def _ids_of(document: Document) -> Sequence[int]:
    return document.ids if isinstance(document, TokenRow) else cast("Sequence[int]", document)


def _without_ends(ids: Sequence[int], rules: TokenRules) -> list[int]:
    """The ids without a BOS at the start and an EOS at the end, where the policy puts these in itself."""
    start = 1 if rules.bos_id is not None and ids and ids[0] == rules.bos_id else 0
    stop = len(ids) - (1 if rules.eos_id is not None and len(ids) > start and ids[-1] == rules.eos_id else 0)
    return list(ids[start:stop])


@final
class _Stream:
    """All documents end to end; windows are cut from the front."""

    def __init__(self, rules: TokenRules) -> None:
        self._window_head = [rules.bos_id] if rules.bos == "window" and rules.bos_id is not None else []
        self._document_head = [rules.bos_id] if rules.bos == "document" and rules.bos_id is not None else []
        self._document_tail = [] if rules.eos_id is None else [rules.eos_id]
        self._capacity = rules.context_size - len(self._window_head)
        self._pad_last = rules.policy.incomplete == "pad"
        self._ids: list[int] = []
        self._start = 0  # ids before it are given out; they are dropped when they are most of the list

    def add(self, ids: Sequence[int]) -> None:
        self._ids += [*self._document_head, *ids, *self._document_tail]

    def ready(self) -> int:
        return (len(self._ids) - self._start) // self._capacity

    def cut(self, rows: int, *, last: bool = False) -> list[list[int]]:
        cut: list[list[int]] = []
        while len(cut) < rows and (self.ready() or (last and self._pad_last and self._start < len(self._ids))):
            stop = self._start + self._capacity
            cut.append(self._window_head + self._ids[self._start : stop])
            self._start = min(stop, len(self._ids))
        if self._start > len(self._ids) // 2:
            del self._ids[: self._start]
            self._start = 0
        return cut

    def save(self) -> list[list[int]]:
        return [self._ids[self._start :]]

    def restore(self, saved: list[list[int]]) -> None:
        self._ids = list(saved[0]) if saved else []


@final
class _Queue:
    """Every document by itself, in as many windows as it needs; rows of token ids without a token more."""

    def __init__(self, rules: TokenRules, *, as_they_are: bool) -> None:
        self._rules = rules
        self._as_they_are = as_they_are
        self._bos = [] if rules.bos_id is None else [rules.bos_id]
        self._eos = [] if rules.eos_id is None else [rules.eos_id]
        self._waiting: deque[list[int]] = deque()

    def add(self, ids: Sequence[int]) -> None:
        size = self._rules.context_size
        if self._as_they_are:
            windows = [list(ids[start : start + size]) for start in range(0, len(ids), size)]
        elif self._rules.bos != "window":
            whole = [*self._bos, *ids, *self._eos]
            windows = [whole[start : start + size] for start in range(0, len(whole), size)]
        else:
            whole = [*ids, *self._eos]
            windows = [self._bos + whole[start : start + size - 1] for start in range(0, len(whole), size - 1)]
        self._waiting += windows[:1] if self._rules.policy.overflow == "truncate" else windows

    def ready(self) -> int:
        return len(self._waiting)

    def cut(self, rows: int, *, last: bool = False) -> list[list[int]]:
        return [self._waiting.popleft() for _ in range(min(rows, len(self._waiting)))]

    def save(self) -> list[list[int]]:
        return list(self._waiting)

    def restore(self, saved: list[list[int]]) -> None:
        self._waiting = deque(list(row) for row in saved)


def preview(windows: Windows, tokenizer: Any | None = None, *, rows: int = 2) -> str:
    """The first rows as text, every token that does not count in square brackets; ids where there is no tokenizer.

    >>> rules = resolve(TokenPolicy(bos_token=9), None, context_size=5)
    >>> print(preview(next(WindowStream([[1, 2, 9, 3], [4, 5]], rules, rows=3)), rows=3))
    window 0: 5 tokens, 3 count
      [9] 1 2 [9] 3
    window 1: 3 tokens, 2 count, 2 of padding
      [9] 4 5 [padding: 2]
    """
    shown: list[str] = []
    for row in range(min(rows, len(windows))):
        tokens, attended, kept = windows.tokens[row], windows.attended[row], windows.kept[row]
        length = int(attended.sum())
        padding = len(tokens) - length
        line = "" if tokenizer is None else "  "
        for token, counts in zip(tokens[:length].tolist(), kept[:length].tolist(), strict=True):
            text = f" {token}" if tokenizer is None else tokenizer.decode([token]).replace("\n", "⏎")
            line += text if counts else f" [{text.strip()}]" if tokenizer is None else f"[{text}]"
        head = f"window {row}: {length} tokens, {int(kept.sum())} count"
        shown.append(head + (f", {padding} of padding" if padding else ""))
        shown.append((f" {line}" if tokenizer is None else line) + (f" [padding: {padding}]" if padding else ""))
    return "\n".join(shown)
