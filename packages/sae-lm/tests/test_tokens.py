from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_core.config import structure, unstructure
from sae_core.errors import ConfigError, DataError
from sae_lm.reading import Chat, TokenRow
from sae_lm.tokens import TokenPolicy, TokenRules, Windows, WindowStream, preview, resolve

BOS, EOS, PAD = 100, 101, 102
DOCUMENTS = st.lists(st.lists(st.integers(0, 99), max_size=25), max_size=12)


def rules_for(context_size: int, **policy: Any) -> TokenRules:
    named = {"packing": "concatenate", "bos_token": BOS, "eos_token": EOS, "pad_token": PAD, **policy}
    return resolve(TokenPolicy(**named), None, context_size)


def stream(documents: list[list[int]], rules: TokenRules, rows: int = 3) -> list[Windows]:
    return list(WindowStream(documents, rules, rows=rows))


def rows_of(batches: list[Windows]) -> Iterator[list[int]]:
    """Every window's tokens without padding."""
    for windows in batches:
        for tokens, attended in zip(windows.tokens, windows.attended, strict=True):
            yield tokens[attended].tolist()


@settings(deadline=None)
@given(documents=DOCUMENTS, size=st.integers(2, 9), rows=st.integers(1, 4), eos=st.sampled_from(["document", "none"]))
def test_concatenated_documents_appear_whole_once_and_in_order(
    documents: list[list[int]], size: int, rows: int, eos: Any
) -> None:
    batches = stream(documents, rules_for(size, eos=eos), rows)
    assert all(len(windows) == rows for windows in batches[:-1])
    windows = list(rows_of(batches))
    assert all(len(window) == size for window in windows[:-1])
    assert all(window[0] == BOS and BOS not in window[1:] for window in windows)
    text = [token for window in windows for token in window[1:]]
    expected = [
        token for document in documents if document for token in [*document, *([EOS] if eos == "document" else [])]
    ]
    assert text == expected


@settings(deadline=None)
@given(documents=DOCUMENTS, size=st.integers(1, 9))
def test_bos_in_the_middle_comes_only_when_asked_for_and_then_before_every_document(
    documents: list[list[int]], size: int
) -> None:
    asked = [token for row in rows_of(stream(documents, rules_for(size, bos="document", eos="none"))) for token in row]
    assert asked == [token for document in documents if document for token in [BOS, *document]]
    none = [token for row in rows_of(stream(documents, rules_for(size, bos="none", eos="none"))) for token in row]
    assert none == [token for document in documents for token in document]


@settings(deadline=None)
@given(
    documents=DOCUMENTS,
    size=st.integers(2, 9),
    bos=st.sampled_from(["window", "document", "none"]),
    eos=st.sampled_from(["document", "none"]),
)
def test_windows_of_single_documents_hold_each_document_whole_and_no_other(
    documents: list[list[int]], size: int, bos: Any, eos: Any
) -> None:
    # Documents are told apart by giving each its own thousand.
    documents = [[token + 1000 * (number + 1) for token in document] for number, document in enumerate(documents)]
    rows = list(rows_of(stream(documents, rules_for(size, packing="document", bos=bos, eos=eos))))
    assert all(0 < len(row) <= size for row in rows)
    assert all(len({token // 1000 for token in row if token >= 1000}) <= 1 for row in rows)
    assert [token for row in rows for token in row if token >= 1000] == [t for d in documents for t in d]
    filled = [document for document in documents if document]
    assert sum(row.count(EOS) for row in rows) == (len(filled) if eos == "document" else 0)
    heads = {"window": len(rows), "document": len(filled), "none": 0}[bos]
    assert sum(row[0] == BOS for row in rows) == sum(row.count(BOS) for row in rows) == heads


@settings(deadline=None)
@given(documents=DOCUMENTS, size=st.integers(3, 9))
def test_truncating_gives_one_window_a_document(documents: list[list[int]], size: int) -> None:
    rows = list(rows_of(stream(documents, rules_for(size, packing="document", overflow="truncate"))))
    assert rows == [[BOS, *document, EOS][:size] for document in documents if document]


@settings(deadline=None)
@given(
    documents=DOCUMENTS,
    size=st.integers(3, 9),
    first=st.integers(0, 1),
    packing=st.sampled_from(["concatenate", "document"]),
)
def test_the_mask_leaves_out_bos_eos_padding_and_what_is_named_and_nothing_else(
    documents: list[list[int]], size: int, first: int, packing: Any
) -> None:
    rules = rules_for(size, packing=packing, exclude_first=first, exclude_tokens=(7,))
    for windows in stream(documents, rules):
        for row in range(len(windows)):
            for position in range(windows.tokens.shape[1]):
                token, attended = windows.tokens[row, position], windows.attended[row, position]
                wanted = bool(attended) and int(token) not in (BOS, EOS, 7) and position >= first
                assert windows.kept[row, position] == wanted
                assert bool(attended) == (int(token) != PAD)


def test_the_tokens_left_out_are_a_choice() -> None:
    documents = [[1, BOS, 2], [3]]
    everything = stream(documents, rules_for(8, exclude_bos=False, exclude_eos=False))[0]
    assert everything.tokens.tolist() == [[BOS, 1, BOS, 2, EOS, 3, EOS, PAD]]
    assert everything.kept.tolist() == [[True] * 7 + [False]]
    default = stream(documents, rules_for(8))[0]
    assert default.kept.tolist() == [[False, True, False, True, False, True, False, False]]


def test_padding_is_masked_by_position_even_where_its_id_is_that_of_eos() -> None:
    windows = stream([[1]], rules_for(4, bos="none", pad_token=EOS, exclude_eos=False))[0]
    assert windows.tokens.tolist() == [[1, EOS, EOS, EOS]]
    assert windows.kept.tolist() == [[True, True, False, False]]


def test_an_incomplete_last_window_can_be_dropped() -> None:
    rows = list(rows_of(stream([[1, 2, 3, 4, 5]], rules_for(3, bos="none", eos="none", incomplete="drop"))))
    assert rows == [[1, 2, 3]]


@settings(deadline=None, max_examples=40)
@given(
    documents=DOCUMENTS,
    stop=st.integers(0, 6),
    size=st.integers(2, 5),
    packing=st.sampled_from(["concatenate", "document"]),
)
def test_a_restored_stream_goes_on_exactly_without_taking_a_document_twice(
    documents: list[list[int]], stop: int, size: int, packing: Any
) -> None:
    rules = rules_for(size, packing=packing)
    whole = WindowStream(documents, rules, rows=2)
    for _ in range(stop):
        if next(whole, None) is None:
            return
    state = whole.state_dict()
    rest = list(rows_of(list(whole)))
    resumed = WindowStream(documents, rules, rows=2, state=state)
    assert list(rows_of(list(resumed))) == rest


def test_a_very_long_document_is_cut_in_time_proportional_to_its_length() -> None:
    import time

    def seconds(tokens: int) -> float:
        times: list[float] = []
        for _ in range(3):
            start = time.perf_counter()
            for _ in WindowStream([list(range(tokens))], rules_for(64), rows=8):
                pass
            times.append(time.perf_counter() - start)
        return min(times)

    assert seconds(800_000) < 40 * seconds(100_000)  # 8 times the work; cutting from the front would be 64 times


def test_bos_id_zero_is_a_token_like_any_other(tokenizer: Any) -> None:
    assert tokenizer.bos_token_id == 0
    rules = resolve(TokenPolicy(), tokenizer, 6)
    assert (rules.bos, rules.bos_id, rules.eos_id, rules.pad_id, rules.excluded_ids) == ("window", 0, 1, 2, (0, 1))
    windows = next(WindowStream(["ab", "", "c"], rules, rows=2, tokenizer=tokenizer))
    assert tokenizer.decode(windows.tokens[0]) == "<s>ab</s>c</s>"
    assert windows.kept.tolist() == [[False, True, True, False, True, False]]


def test_tokenizers_without_special_tokens_work(make_tokenizer: Callable[..., Any]) -> None:
    bare = make_tokenizer()
    assert bare.bos_token_id is bare.eos_token_id is bare.pad_token_id is None
    rules = resolve(TokenPolicy(), bare, 4)
    assert (rules.bos, rules.bos_id, rules.eos_id, rules.excluded_ids) == ("none", None, None, ())
    first, last = WindowStream(["abcde"], rules, rows=1, tokenizer=bare)
    assert bare.decode(first.tokens[0]) == "abcd"
    assert first.kept.all()
    assert last.kept.tolist() == [[True, False, False, False]]


def test_asking_a_tokenizer_for_what_it_lacks_is_an_error_that_says_what_to_do(
    make_tokenizer: Callable[..., Any],
) -> None:
    bare = make_tokenizer("<mark>", "<mask>")
    with pytest.raises(ConfigError, match="needs a BOS token and the tokenizer has none; name one with bos_token"):
        resolve(TokenPolicy(bos="window"), bare, 4)
    with pytest.raises(ConfigError, match="or set eos: none"):
        resolve(TokenPolicy(eos="document"), bare, 4)
    with pytest.raises(ConfigError, match="no token '<bos>'"):
        resolve(TokenPolicy(bos_token="<bos>"), bare, 4)
    with pytest.raises(ConfigError, match="id 258 is beyond the tokenizer's 258 tokens"):
        resolve(TokenPolicy(bos_token=258), bare, 4)
    with pytest.raises(ConfigError, match="must be a token id, since there is no tokenizer"):
        resolve(TokenPolicy(exclude_tokens=("x",)), None, 4)
    with pytest.raises(ConfigError, match="leave no position for text"):
        resolve(TokenPolicy(bos_token="<mark>"), bare, 1)
    named = resolve(TokenPolicy(bos_token="<mark>", eos="none", exclude_tokens=("<mask>", "a")), bare, 4)
    assert (named.bos, named.bos_id, named.eos_id) == ("window", 0, None)
    assert named.excluded_ids == (0, 1, bare.convert_tokens_to_ids("a"))


def test_an_encoder_tokenizer_puts_cls_and_sep_around_each_document(make_tokenizer: Callable[..., Any]) -> None:
    bert = make_tokenizer("[CLS]", "[SEP]", "[PAD]", cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]")
    rules = resolve(TokenPolicy(packing="document"), bert, 8)
    windows = next(WindowStream(["ab", "c"], rules, rows=2, tokenizer=bert))
    assert [bert.decode(row) for row in windows.tokens] == ["[CLS]ab[SEP]", "[CLS]c[SEP][PAD]"]


def test_the_tokenizer_adds_nothing_of_its_own(make_tokenizer: Callable[..., Any]) -> None:
    from tokenizers.processors import TemplateProcessing

    eager = make_tokenizer("<s>", bos_token="<s>")
    eager.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    assert eager("ab")["input_ids"][0] == 0
    windows = next(WindowStream(["ab"], resolve(TokenPolicy(bos="none"), eager, 4), rows=1, tokenizer=eager))
    assert windows.tokens[0, :2].tolist() == eager("ab", add_special_tokens=False)["input_ids"]


def test_text_without_a_tokenizer_and_mixed_documents_are_refused(tokenizer: Any) -> None:
    with pytest.raises(DataError, match="there is no tokenizer"):
        next(WindowStream(["text"], rules_for(4), rows=1))
    rules = resolve(TokenPolicy(packing="rows"), tokenizer, 4)
    with pytest.raises(DataError, match="packing: rows is for documents that are token ids"):
        next(WindowStream([[1], "text"], rules, rows=1, tokenizer=tokenizer))


def test_whole_rows_with_their_bos_stay_whole(caplog: pytest.LogCaptureFixture) -> None:
    documents: list[Any] = [[BOS, n, BOS, n + 1] for n in range(80)]  # a separator in mid-row is the row's own
    batches = stream(documents, rules_for(4, packing="auto"))
    assert list(rows_of(batches)) == documents
    assert torch.equal(torch.cat([windows.kept for windows in batches])[0], torch.tensor([False, True, False, True]))
    assert caplog.text == ""
    named = list(rows_of(stream(documents, rules_for(4, packing="rows"))))
    assert named == documents


@pytest.mark.parametrize(
    ("documents", "said"),
    [
        ([[1, 2, 3, 4], [5, 6, 7, 8]], "do not begin with the BOS that is asked for: they are joined"),
        ([[BOS, 1, 2], [BOS, 3, 4, 5, EOS]], "are not as long as the context, 4: they are joined"),
    ],
)
def test_rows_that_cannot_stay_whole_are_joined_with_a_word_and_without_a_bos_in_mid_window(
    documents: list[list[int]], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    rows = list(rows_of(stream(documents, rules_for(4, packing="auto"))))
    assert said in caplog.text
    assert all(row[0] == BOS and BOS not in row[1:] for row in rows)
    text = [token for row in rows for token in row[1:]]
    assert text == [t for d in documents for t in [*(token for token in d if token not in (BOS, EOS)), EOS]]


def test_ids_of_other_lengths_without_a_bos_are_ordinary_documents(caplog: pytest.LogCaptureFixture) -> None:
    rows = list(rows_of(stream([[1, 2], [3]], rules_for(4, packing="auto"))))
    assert rows == [[BOS, 1, 2, EOS], [BOS, 3, EOS]]
    assert caplog.text == ""


def test_padding_of_rows_is_never_text() -> None:
    padded: list[Any] = [TokenRow([BOS, 7], 4), TokenRow([BOS, 1, 2, 3], 4)]
    windows = stream(padded, rules_for(4, packing="auto"))[0]
    assert windows.tokens.tolist() == [[BOS, 7, PAD, PAD], [BOS, 1, 2, 3]]
    assert windows.kept.tolist() == [[False, True, False, False], [False, True, True, True]]
    joined = list(rows_of(stream(padded, rules_for(4, eos="none"))))
    assert joined == [[BOS, 7, 1, 2], [BOS, 3]]


def test_rows_longer_than_a_window_go_on_or_are_cut_off() -> None:
    assert list(rows_of(stream([[1, 2, 3]], rules_for(2, packing="rows")))) == [[1, 2], [3]]
    assert list(rows_of(stream([[1, 2, 3]], rules_for(2, packing="rows", overflow="truncate")))) == [[1, 2]]


def test_positions_at_both_ends_of_a_window_can_be_left_out() -> None:
    rules = rules_for(6, bos="none", eos="none", exclude_first=1, exclude_last=2, packing="document")
    windows = stream([[1, 2, 3, 4, 5, 6], [7, 8, 9, 10]], rules)[0]
    assert windows.kept.int().tolist() == [[0, 1, 1, 1, 0, 0], [0, 1, 0, 0, 0, 0]]


def test_special_tokens_are_left_out_by_role_or_altogether(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer(
        "<s>", "</s>", "<sep>", "<mask>", bos_token="<s>", sep_token="<sep>", mask_token="<mask>"
    )
    roles = resolve(TokenPolicy(exclude_special_tokens=("sep",)), tokenizer, 8)
    assert roles.excluded_ids == (0, 2)
    assert resolve(TokenPolicy(exclude_special_tokens=True), tokenizer, 8).excluded_ids == (0, 2, 3)
    with pytest.raises(ConfigError, match=r"no 'sepp' token; did you mean 'sep'\? \(it has: bos, sep, mask\)"):
        resolve(TokenPolicy(exclude_special_tokens=("sepp",)), tokenizer, 8)
    with pytest.raises(ConfigError, match="needs a tokenizer"):
        rules_for(8, exclude_special_tokens=True)
    asked = structure({"exclude_special_tokens": ["sep", "mask"]}, TokenPolicy)
    assert asked.exclude_special_tokens == ("sep", "mask")


def test_conversations_go_through_the_tokenizers_template(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer("<s>", "</s>", bos_token="<s>", eos_token="</s>")
    chat = Chat([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}])
    rules = resolve(TokenPolicy(), tokenizer, 12)
    with pytest.raises(ConfigError, match="no tokenizer with a chat template"):
        next(WindowStream([chat], rules, rows=1, tokenizer=tokenizer))
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
        "{{ m.role[0] }}:{{ m.content }};{% endfor %}{{ eos_token }}"
    )
    windows = next(WindowStream([chat], rules, rows=1, tokenizer=tokenizer))
    assert tokenizer.decode(windows.tokens[0, windows.attended[0]]) == "<s>u:hi;a:yo;</s>"
    with pytest.raises(DataError, match=r"refuses a conversation \(roles: tool\): no tools"):
        next(WindowStream([Chat([{"role": "tool", "content": "x"}])], rules, rows=1, tokenizer=tokenizer))


def test_no_documents_give_no_windows() -> None:
    assert stream([], rules_for(4)) == []
    assert stream([[], []], rules_for(4)) == []


def test_the_policy_survives_a_trip_through_json() -> None:
    policy = structure(
        {"bos": "document", "bos_token": "<s>", "eos_token": 0, "exclude_tokens": ["a", 5], "exclude_first": 2},
        TokenPolicy,
    )
    assert policy.exclude_tokens == ("a", 5)
    assert structure(json.loads(json.dumps(unstructure(policy))), TokenPolicy) == policy
    metadata = json.loads(json.dumps(rules_for(8, exclude_tokens=(3,)).metadata()))
    assert metadata["resolved"] == {
        "bos": "window", "bos_id": BOS, "eos_id": EOS, "pad_id": PAD, "excluded_ids": [3, BOS, EOS]
    }  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"exclude_first": -1}, "must not be negative"),
        ({"exclude_last": -2}, "'exclude_last' must not be negative"),
        ({"overflow": "truncate"}, "'overflow' belongs to packing: document or rows"),
        ({"packing": "rows", "bos": "window"}, "packing: rows puts in no tokens; leave out bos"),
        ({"exclude_special_tokens": "sep"}, "exclude_special_tokens"),
        ({"packing": "document", "incomplete": "drop"}, "'incomplete' belongs to packing: concatenate"),
        ({"bos": "none", "bos_token": 3, "exclude_bos": False}, "leave no use for it"),
        ({"bos": "windows"}, "windows"),
        ({"prepend_bos": True}, "unknown key 'prepend_bos'"),
        ({"bos_token": True}, "bos_token"),
    ],
)
def test_every_field_is_used_or_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        structure(settings, TokenPolicy)


def test_the_preview_marks_what_does_not_count(tokenizer: Any) -> None:
    rules = resolve(TokenPolicy(), tokenizer, 8)
    windows = next(WindowStream(["ab\n", "c"], rules, rows=2, tokenizer=tokenizer))
    assert (
        preview(windows, tokenizer) == "window 0: 7 tokens, 4 count, 1 of padding\n  [<s>]ab⏎[</s>]c[</s>] [padding: 1]"
    )
    assert torch.equal(windows.kept.sum(), torch.tensor(4))
