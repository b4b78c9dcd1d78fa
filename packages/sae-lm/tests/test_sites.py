"""Several places from one pass: crosscoders, transcoders, two models, whole sequences."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_core.config import structure
from sae_core.errors import ConfigError, DataError
from sae_core.protocols import ActivationBatch
from sae_lm.batches import ahead
from sae_lm.inputs import explaining_memory
from sae_lm.source import HuggingFaceSource, HuggingFaceSourceConfig
from torch import Tensor, nn

LAYERS = ["model.layers.0", "model.layers.2", "model.layers.1.mlp"]


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("\n\n".join(f"Document {i}: {'word ' * (i % 7)}and {i * i}." for i in range(40)))
    return file


@pytest.fixture
def make_source(llama: Any, tokenizer: Any, text_file: Path) -> Callable[..., HuggingFaceSource]:
    def make(other: nn.Module | None = None, **changes: Any) -> HuggingFaceSource:
        settings: dict[str, Any] = {
            "model": "tiny-llama", "context_size": 16, "batch_prompts": 4, "buffer_rows": 200,
            "text": {"kind": "file", "path": str(text_file), "held_out": 0.1}, **changes,
        }  # fmt: skip
        config = structure(settings, HuggingFaceSourceConfig)
        return HuggingFaceSource(config, model=llama, tokenizer=tokenizer, second_model=other)

    return make


def rows_of(tensor: Tensor) -> set[tuple[float, ...]]:
    return {tuple(row) for row in tensor.tolist()}


def truth(source: HuggingFaceSource, model: Any, hooks: list[str]) -> Tensor:
    """The places side by side, each by a hook and a whole pass of its own."""
    parts: list[list[Tensor]] = []
    for windows in source.windows("train"):
        seen: dict[str, Tensor] = {}
        handles = [
            model.get_submodule(hook).register_forward_hook(
                lambda _, __, out, hook=hook, seen=seen: seen.update({hook: out[0] if isinstance(out, tuple) else out})
            )
            for hook in hooks
        ]
        with torch.no_grad():
            model(windows.tokens, attention_mask=windows.attended.long())
        for handle in handles:
            handle.remove()
        parts.append([seen[hook][windows.kept] for hook in hooks])
    return torch.cat([torch.cat(row, dim=-1) for row in parts])


def test_places_lie_side_by_side_and_belong_to_one_token(
    make_source: Callable[..., HuggingFaceSource], llama: Any
) -> None:
    source = make_source(reads=LAYERS)
    assert dict(source.sites) == dict.fromkeys(LAYERS, 32)
    assert (source.d_in, dict(source.target_sites), source.sequence_length) == (96, {}, None)
    expected = truth(source, llama, LAYERS)
    batches = list(source.batches(8))
    assert all(batch.shape == (8, 96) for batch in batches)
    assert torch.allclose(torch.cat([source.activations(w) for w in source.windows("train")]), expected, atol=1e-6)
    assert rows_of(torch.cat(batches)) <= rows_of(torch.cat([source.activations(w) for w in source.windows("train")]))


def test_one_pass_serves_all_places_and_stops_behind_the_last(
    make_source: Callable[..., HuggingFaceSource], llama: Any
) -> None:
    source = make_source(reads=["model.layers.1", "model.layers.0"], writes=["model.layers.2.mlp"])
    windows = next(source.windows("train"))
    _ = source.sites
    ran: list[int] = []
    handles = [
        layer.register_forward_pre_hook(lambda *_, i=i: ran.append(i)) for i, layer in enumerate(llama.model.layers)
    ]
    try:
        source.activations(windows)
    finally:
        for handle in handles:
            handle.remove()
    assert ran == [0, 1, 2]


def test_targets_belong_to_the_tokens_of_the_inputs(make_source: Callable[..., HuggingFaceSource], llama: Any) -> None:
    source = make_source(reads=["model.layers.1.mlp:input"], writes=["model.layers.1.mlp", "model.layers.2"])
    assert dict(source.sites) == {"model.layers.1.mlp:input": 32}
    assert dict(source.target_sites) == {"model.layers.1.mlp": 32, "model.layers.2": 32}
    mlp = llama.model.layers[1].mlp
    for number, batch in enumerate(source.batches(8)):
        assert isinstance(batch, ActivationBatch)
        assert batch.targets is not None
        assert (batch.inputs.shape, batch.targets.shape) == ((8, 32), (8, 64))
        assert batch.inputs.is_contiguous()
        with torch.no_grad():
            assert torch.allclose(mlp(batch.inputs), batch.targets[:, :32], atol=1e-6)
        if number == 5:
            break
    metadata = source.metadata()
    assert metadata["hook_name"] == "model.layers.1.mlp:input"
    assert metadata["hook_name_out"] is None
    assert list(metadata["sae_lm"]["sites"]) == ["model.layers.1.mlp:input", "model.layers.1.mlp", "model.layers.2"]


def test_a_place_that_is_read_and_written_is_stored_once(make_source: Callable[..., HuggingFaceSource]) -> None:
    source = make_source(reads=["model.layers.0", "model.layers.1"], writes=["model.layers.1", "model.layers.2"])
    assert list(source.stored_sites) == ["model.layers.0", "model.layers.1", "model.layers.2"]
    batch = next(source.batches(8))
    assert isinstance(batch, ActivationBatch)
    assert batch.targets is not None
    assert torch.equal(batch.inputs[:, 32:], batch.targets[:, :32])


@pytest.fixture(scope="module")
def tuned(llama: Any) -> Any:
    import copy

    other = copy.deepcopy(llama)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    return other


def test_two_models_read_the_same_tokens(make_source: Callable[..., HuggingFaceSource], llama: Any, tuned: Any) -> None:
    source = make_source(tuned, hook="model.layers.1", second_model="tuned")
    assert list(source.sites) == ["model.layers.1", "second/model.layers.1"]
    windows = next(source.windows("train"))
    with torch.no_grad():
        parts = [m(windows.tokens, output_hidden_states=True).hidden_states[2][windows.kept] for m in (llama, tuned)]
    assert torch.equal(source.activations(windows), torch.cat(parts, dim=-1))
    pool = rows_of(torch.cat([source.activations(w) for w in source.windows("train")]))
    assert rows_of(torch.cat(list(source.batches(8)))) <= pool
    with pytest.raises(ConfigError, match=r"no module 'model\.layers\.9'"):
        _ = make_source(tuned, reads=["model.layers.1", "second/model.layers.9"], second_model="tuned").sites


def test_a_second_model_with_another_tokenizer_is_refused(
    make_tokenizer: Callable[..., Any], saved_model: Path, llama: Any, tmp_path: Path, text_file: Path
) -> None:
    llama.save_pretrained(tmp_path / "other")
    make_tokenizer("</s>", "<s>", bos_token="<s>").save_pretrained(tmp_path / "other")
    settings = {
        "model": str(saved_model), "hook": "model.layers.0", "second_model": str(tmp_path / "other"), "context_size": 16,
        "device": "cpu", "text": {"kind": "file", "path": str(text_file)},
    }  # fmt: skip
    source = HuggingFaceSource(structure(settings, HuggingFaceSourceConfig))
    with pytest.raises(
        ConfigError, match=r"other has another tokenizer: '<s>' is 0 in the first model's and 1 in its own"
    ):
        _ = source.sites


def test_whole_sequences_keep_their_order_and_lose_the_excluded_ends(
    make_source: Callable[..., HuggingFaceSource],
) -> None:
    source = make_source(hook="model.layers.1", sequences=True, tokens={"exclude_last": 2})
    assert source.sequence_length == 13  # of 16, without the BOS and two at the end
    batches = list(source.batches(26))
    assert all(batch.shape == (2, 13, 32) for batch in batches)
    expected = [
        source.capture(w)["model.layers.1"].view(*w.tokens.shape, 32)[w.attended.all(1)][:, 1:14]
        for w in source.windows("train")
    ]
    pool = {tuple(sequence.flatten().tolist()) for sequence in torch.cat(expected)}
    given = [tuple(sequence.flatten().tolist()) for batch in batches for sequence in batch]
    assert set(given) <= pool
    assert len(pool) - 2 < len(set(given)) <= len(pool)


def test_sequences_of_targets_too(make_source: Callable[..., HuggingFaceSource]) -> None:
    batch = next(make_source(reads=["model.layers.0"], writes=["model.layers.1"], sequences=True).batches(30))
    assert isinstance(batch, ActivationBatch)
    assert batch.targets is not None
    assert (batch.inputs.shape, batch.targets.shape) == ((2, 15, 32), (2, 15, 32))


def test_a_text_without_a_full_window_gives_no_sequences(make_source: Callable[..., HuggingFaceSource]) -> None:
    source = make_source(
        hook="model.layers.0", sequences=True, context_size=100, buffer_rows=2000, tokens={"packing": "document"}
    )
    with pytest.raises(DataError, match="gives no full window of 100 tokens"):
        next(source.batches(200))
    with pytest.raises(ConfigError, match="20 positions do not hold one sequence of 99"):
        source.batches(20)
    with pytest.raises(ConfigError, match=r"batch of 198 beside the 396 .*set it to 2376 or so"):
        make_source(hook="model.layers.0", sequences=True, context_size=100).batches(200)


@pytest.mark.parametrize(
    "settings",
    [
        {"reads": LAYERS[:2], "writes": LAYERS[2:]},
        {"hook": LAYERS[0], "sequences": True},
        {"hook": LAYERS[0], "prefetch": 2, "tokens": {"packing": "document"}},
    ],
)
@pytest.mark.parametrize("stop", [0, 3, 20])
def test_the_iterator_goes_on_exactly_where_a_saved_state_stood(
    make_source: Callable[..., HuggingFaceSource], settings: dict[str, Any], stop: int
) -> None:
    def plain(batch: Any) -> Tensor:
        return torch.cat([batch.inputs, batch.targets], -1) if isinstance(batch, ActivationBatch) else batch

    batches = make_source(epochs=2, **settings).batches(30)
    for _ in range(stop):
        next(batches)
    state = batches.state_dict()
    rest = [plain(batch) for batch in batches]
    resumed = make_source(epochs=2, **settings).batches(30)
    resumed.load_state_dict(state)
    assert resumed.state_dict()["done"] == state["done"]
    again = [plain(batch) for batch in resumed]
    assert len(again) == len(rest) > 0
    assert all(torch.equal(a, b) for a, b in zip(again, rest, strict=True))
    with pytest.raises(DataError, match="only before the first batch"):
        resumed.load_state_dict(state)


def test_every_call_of_batches_starts_anew(make_source: Callable[..., HuggingFaceSource]) -> None:
    source = make_source(hook=LAYERS[0])
    first, second = source.batches(8), source.batches(8)
    assert torch.equal(next(first), next(second))  # pyright: ignore[reportArgumentType]


def test_reading_ahead_changes_no_batch_and_hides_no_error(make_source: Callable[..., HuggingFaceSource]) -> None:
    plain, threaded = (list(make_source(hook=LAYERS[0], prefetch=depth).batches(8)) for depth in (0, 3))
    assert all(torch.equal(a, b) for a, b in zip(plain, threaded, strict=True))

    def failing() -> Any:
        yield torch.zeros(1), dict
        raise DataError("bad row")

    chunks = ahead(failing(), 2)
    next(chunks)
    with pytest.raises(DataError, match="bad row"):
        next(chunks)
    import itertools
    import threading

    endless = ahead(((torch.zeros(1), dict) for _ in itertools.count()), 1)
    next(endless)
    endless.close()  # type: ignore[attr-defined]
    assert not [thread for thread in threading.enumerate() if thread.name == "activations ahead"]


GPU = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
)


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("buffer_device", ["model", "cpu"])
def test_where_the_buffer_is_and_what_is_read_ahead_change_no_batch(
    llama: Any, tokenizer: Any, text_file: Path, device: str, buffer_device: str
) -> None:
    import copy

    model = copy.deepcopy(llama).to(device)

    def batches(**changes: Any) -> list[Tensor]:
        settings: dict[str, Any] = {
            "model": "tiny-llama", "hook": "model.layers.1", "context_size": 16, "batch_prompts": 4, "buffer_rows": 200,
            "text": {"kind": "file", "path": str(text_file), "held_out": 0.1}, **changes,
        }  # fmt: skip
        source = HuggingFaceSource(structure(settings, HuggingFaceSourceConfig), model=model, tokenizer=tokenizer)
        return [batch for batch in source.batches(8) if isinstance(batch, Tensor)]

    plain = batches(prefetch=0)
    moved = batches(buffer_device=buffer_device, **({} if device == "cuda" else {"prefetch": 2}))
    assert {batch.device.type for batch in moved} == {device if buffer_device == "model" else "cpu"}
    assert len(plain) == len(moved) > 20
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(plain, moved, strict=True))


def test_a_given_model_is_left_as_it_was_found(tokenizer: Any, text_file: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=259, n_embd=16, n_layer=2, n_head=2, n_positions=32)).train()
    model.transformer.h[1].eval()
    before = [module.training for module in model.modules()]
    settings = {
        "model": "m", "hook": "transformer.h.0", "context_size": 16, "batch_prompts": 2, "buffer_rows": 128,
        "text": {"kind": "file", "path": str(text_file)},
    }  # fmt: skip
    source = HuggingFaceSource(structure(settings, HuggingFaceSourceConfig), model=model, tokenizer=tokenizer)
    windows = next(source.windows("train"))
    assert torch.equal(source.activations(windows), source.activations(windows))  # dropout is off meanwhile
    assert [module.training for module in model.modules()] == before
    assert all(parameter.requires_grad for parameter in model.parameters())
    # What comes out can take part in a graph.
    weight = torch.ones(16, requires_grad=True)
    (source.activations(windows) * weight).sum().backward()
    assert weight.grad is not None


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.split = nn.Embedding(259, 12), nn.Unflatten(-1, (3, 4))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.split(self.embed(tokens))


def test_one_head_can_be_taken(tokenizer: Any, text_file: Path) -> None:
    model = Heads()

    def source(**more: Any) -> HuggingFaceSource:
        settings = {
            "model": "m",
            "hook": "split",
            "context_size": 8,
            "text": {"kind": "file", "path": str(text_file)},
            **more,
        }
        return HuggingFaceSource(structure(settings, HuggingFaceSourceConfig), model=model, tokenizer=tokenizer)

    windows = next(source().windows("train"))
    joined = source().activations(windows)
    assert torch.equal(source(head=2).activations(windows), joined[:, 8:])
    assert (source(head=2).d_in, source(head=2).metadata()["hook_head_index"]) == (4, 2)
    with pytest.raises(ConfigError, match="head: 3 of 'split', which has heads 0 to 2"):
        _ = source(head=3).d_in
    with pytest.raises(ConfigError, match="in which there are no heads"):
        _ = source(head=0, hook="embed").d_in


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "name the place to read with hook, or several with reads"),
        ({"hook": "a", "reads": ["b"]}, "name the place to read with hook"),
        ({"reads": ["a", "a:output"]}, "reads: \\['a'\\] stands there twice"),
        ({"reads": "ab"}, "expected a list at reads"),
        ({"hook": "second/a"}, "a place in second/ needs a second_model"),
        ({"reads": ["a"], "second_model": "m"}, "no place of it is read"),
        ({"hook": "a", "second_revision": "main"}, "second_revision needs a second_model"),
        ({"hook": "a", "prefetch": -1}, "prefetch must not be negative"),
        ({"hook": "a", "device": "cpu", "model_options": {"device_map": "auto"}}, "leave out one of them"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        structure({"model": "m", **settings}, HuggingFaceSourceConfig)


def test_running_out_of_memory_names_the_settings_to_lower(
    make_source: Callable[..., HuggingFaceSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_source(hook=LAYERS[0])
    windows = next(source.windows("train"))

    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("sae_lm.source.capture", full)
    with pytest.raises(
        ConfigError, match="out of memory for 4 windows of 16 tokens; lower batch_prompts, context_size"
    ):
        source.activations(windows)
    with pytest.raises(ConfigError, match="lower buffer_rows"), explaining_memory("a buffer", "buffer_rows"):
        torch.empty(1 << 60)
    with pytest.raises(RuntimeError, match="other"), explaining_memory("a buffer", "buffer_rows"):
        raise RuntimeError("other")
