from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_core.config import structure, unstructure
from sae_core.errors import ConfigError, DataError
from sae_core.protocols import ActivationSource, HasMetadata, Resumable
from sae_lm.source import HuggingFaceSource, HuggingFaceSourceConfig
from sae_lm.text import Part
from torch import nn

PARTS: tuple[Part, ...] = ("train", "held_out")


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("\n\n".join(f"Document {i}: {'word ' * (i % 7)}and {i * i}." for i in range(60)))
    return file


@pytest.fixture
def make_source(llama: Any, tokenizer: Any, text_file: Path) -> Callable[..., HuggingFaceSource]:
    def make(**changes: Any) -> HuggingFaceSource:
        settings: dict[str, Any] = {
            "model": "tiny-llama", "hook": "model.layers.1", "context_size": 16, "batch_prompts": 4, "buffer_rows": 200,
            "text": {"kind": "file", "path": str(text_file), "held_out": 0.1}, **changes,
        }  # fmt: skip
        config = structure(settings, HuggingFaceSourceConfig)
        return HuggingFaceSource(config, model=llama, tokenizer=tokenizer)

    return make


def in_order(rows: torch.Tensor) -> torch.Tensor:
    """Rows sorted, to compare sets of rows."""
    return rows[torch.tensor(sorted(range(len(rows)), key=lambda i: rows[i].tolist()))]


def all_rows(source: HuggingFaceSource, batch_size: int = 8) -> torch.Tensor:
    return torch.cat(list(source.batches(batch_size)))


def unshuffled(source: HuggingFaceSource) -> torch.Tensor:
    return torch.cat([source.activations(windows) for windows in source.windows("train")])


def test_it_is_what_the_core_asks_for(make_source: Callable[..., HuggingFaceSource]) -> None:
    source = make_source()
    assert isinstance(source, ActivationSource)
    assert isinstance(source, HasMetadata)
    assert isinstance(source.batches(8), Resumable)
    assert source.d_in == 32
    assert HuggingFaceSource.config_class is HuggingFaceSourceConfig


def test_the_rows_are_the_hidden_states_that_transformers_reports(
    make_source: Callable[..., HuggingFaceSource], llama: Any
) -> None:
    source = make_source()
    windows = next(source.windows("train"))
    with torch.no_grad():
        reported = llama(windows.tokens, output_hidden_states=True).hidden_states
    assert torch.equal(source.activations(windows), reported[2][windows.kept])
    before = make_source(hook="model.layers.1:input")
    assert torch.equal(before.activations(windows), reported[1][windows.kept])


def test_the_model_stops_at_the_hook_and_caches_nothing(
    make_source: Callable[..., HuggingFaceSource], llama: Any
) -> None:
    def hooks() -> int:  # transformers keeps some of its own
        return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in llama.modules())

    source = make_source()
    before = hooks()
    ran: list[int] = []
    handles = [
        layer.register_forward_pre_hook(lambda *_, i=i: ran.append(i)) for i, layer in enumerate(llama.model.layers)
    ]
    try:
        next(source.batches(8))
        assert set(ran) == {0, 1}
    finally:
        for handle in handles:
            handle.remove()
    assert hooks() == before


def test_batches_hold_every_counted_position_once_shuffled_and_trainable(
    make_source: Callable[..., HuggingFaceSource],
) -> None:
    source = make_source()
    expected = unshuffled(source)
    batches = list(source.batches(8))
    assert all(batch.shape == (8, 32) and batch.dtype == torch.float32 for batch in batches)
    served = torch.cat(batches)
    assert 0 <= len(expected) - len(served) < 8
    assert not torch.equal(served, expected[: len(served)])
    pool = {tuple(row) for row in expected.tolist()}
    rows = [tuple(row) for row in served.tolist()]
    assert set(rows) <= pool
    assert len(set(rows)) >= len(set(map(tuple, expected.tolist()))) - 8
    # Tensors made in inference mode could not be saved for a backward pass.
    weight = torch.ones(32, requires_grad=True)
    (batches[0] * weight).sum().backward()
    assert weight.grad is not None
    assert torch.allclose(weight.grad, batches[0].sum(0))


def test_excluded_positions_are_in_no_batch(make_source: Callable[..., HuggingFaceSource]) -> None:
    source = make_source()
    kept = sum(int(windows.kept.sum()) for windows in source.windows("train"))
    attended = sum(int(windows.attended.sum()) for windows in source.windows("train"))
    assert len(unshuffled(source)) == kept < attended
    assert len(unshuffled(make_source(tokens={"exclude_bos": False, "exclude_eos": False}))) == attended


def test_rows_do_not_depend_on_how_many_windows_run_at_once(make_source: Callable[..., HuggingFaceSource]) -> None:
    one, many = unshuffled(make_source(batch_prompts=1)), unshuffled(make_source(batch_prompts=8))
    assert torch.allclose(one, many, atol=1e-6)
    padded = make_source(tokens={"packing": "document"})
    alone = make_source(tokens={"packing": "document"}, batch_prompts=1)
    assert torch.allclose(unshuffled(padded), unshuffled(alone), atol=1e-6)


def test_the_order_is_the_seeds(make_source: Callable[..., HuggingFaceSource]) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first, same, other = all_rows(make_source()), all_rows(make_source()), all_rows(make_source(seed=1))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_cached_passes_give_the_same_bits_as_running_the_model_again(
    make_source: Callable[..., HuggingFaceSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    live = make_source(epochs=3)
    cached = make_source(epochs=3, cache_activations=True)
    runs = 0
    original = cached.activations

    def counted(windows: Any) -> torch.Tensor:
        nonlocal runs
        runs += 1
        return original(windows)

    once = len(list(cached.windows("train")))
    monkeypatch.setattr(cached, "activations", counted)
    expected = all_rows(live)
    assert torch.equal(all_rows(cached), expected)
    assert runs == once
    half = make_source(epochs=2, cache_activations=True, activation_dtype="bfloat16")
    assert torch.equal(all_rows(half), all_rows(make_source(epochs=2, activation_dtype="bfloat16")))
    assert all_rows(half).dtype == torch.bfloat16


def test_a_cache_that_grows_too_large_is_given_up_with_a_word_and_the_same_batches(
    make_source: Callable[..., HuggingFaceSource], caplog: pytest.LogCaptureFixture
) -> None:
    expected = all_rows(make_source(epochs=2))
    small = make_source(epochs=2, cache_activations=True, cache_limit_gb=1e-5)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(all_rows(small), expected)
    assert "every pass will run the model (cache_limit_gb)" in caplog.text


@pytest.mark.parametrize("policy", ["stop", "cycle", "error"])
def test_running_out_of_text_follows_the_policy_and_says_so(
    make_source: Callable[..., HuggingFaceSource], caplog: pytest.LogCaptureFixture, policy: str
) -> None:
    one_pass = len(unshuffled(make_source()))
    batches = make_source(on_exhausted=policy, epochs=2).batches(8)
    served = 0
    with caplog.at_level(logging.INFO):
        while served <= 2 * one_pass - 8:  # all that two passes give, whatever is to follow
            served += len(next(batches))
        assert caplog.text == "" or policy == "cycle"
        if policy == "error":
            with pytest.raises(DataError, match=r"used up after 2 pass.*raise epochs, or set on_exhausted"):
                next(batches)
        elif policy == "stop":
            assert next(batches, None) is next(batches, None) is None
            assert caplog.text.count("training ends here (on_exhausted: stop)") == 1
        else:
            while served < 5 * one_pass:
                served += len(next(batches))
            assert "going over it again" in caplog.text


def test_text_that_does_not_fill_a_batch_is_an_error(make_source: Callable[..., HuggingFaceSource]) -> None:
    rows = len(unshuffled(make_source()))
    with pytest.raises(DataError, match=rf"{rows:,} activations, fewer than one batch of 5000"):
        list(make_source(buffer_rows=6000).batches(5000))


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("done", [0.0, 0.001, 0.2, 0.34, 0.5, 0.68, 0.9, 0.99])
def test_a_resumed_source_gives_exactly_the_batches_that_were_left(
    make_source: Callable[..., HuggingFaceSource], done: float, cache: bool
) -> None:
    settings: dict[str, Any] = {"epochs": 3, "cache_activations": cache}
    stop = math.ceil(done * 3 * len(unshuffled(make_source())) / 16)
    source = make_source(**settings)
    batches = source.batches(16)
    for _ in range(stop):
        next(batches)
    state = batches.state_dict()
    rest = list(batches)
    resumed = make_source(**settings).batches(16)
    resumed.load_state_dict(state)
    again = list(resumed)
    assert len(again) == len(rest) > 0
    assert all(torch.equal(a, b) for a, b in zip(again, rest, strict=True))


@pytest.mark.parametrize("streaming", [False, True])
def test_going_on_with_a_data_set_reads_nothing_of_what_was_done(
    make_source: Callable[..., HuggingFaceSource], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streaming: bool
) -> None:
    import sae_lm.text
    from datasets import Dataset

    rows = [f"Document {i}: {'word ' * (i % 7)}and {i * i}." if i % 5 else None for i in range(400)]
    Dataset.from_dict({"text": rows}).to_parquet(tmp_path / "text.parquet")
    files = [str(tmp_path / "text.parquet")]
    text = {"kind": "dataset", "path": "parquet", "data_files": files, "streaming": streaming, "held_out": 0.1}
    batches = make_source(text=text).batches(16)
    for _ in range(400):
        next(batches)
    state = batches.state_dict()
    rest = list(batches)
    read: list[Any] = []
    original = sae_lm.text.is_held_out
    monkeypatch.setattr(sae_lm.text, "is_held_out", lambda *given: read.append(given) or original(*given))
    resumed = make_source(text=text).batches(16)
    resumed.load_state_dict(state)
    begun = len(read)  # by the look whether anything is held out
    assert all(torch.equal(a, b) for a, b in zip(resumed, rest, strict=True))  # pyright: ignore[reportArgumentType]
    assert len(rest) > 20
    assert len(read) - begun < 160


def test_the_metadata_say_everything_and_rebuild_the_source(
    make_source: Callable[..., HuggingFaceSource], text_file: Path
) -> None:
    source = make_source(tokens={"exclude_first": 2})
    metadata = json.loads(json.dumps(source.metadata()))
    assert metadata["model_name"] == "tiny-llama"
    assert metadata["hook_name"] == "model.layers.1"
    assert metadata["dataset_path"] == str(text_file)
    assert (metadata["context_size"], metadata["prepend_bos"]) == (16, True)
    assert metadata["exclude_special_tokens"] == [0, 1]
    assert metadata["seqpos_slice"] == [2, None]  # arguments of slice()
    ours = metadata["sae_lm"]
    assert ours["hook_point"] == {
        "module": "model.layers.1", "at": "output", "transformer_lens": "blocks.1.hook_resid_post"
    }  # fmt: skip
    assert ours["sites"] == {"model.layers.1": ours["hook_point"]}
    assert ours["tokens"]["resolved"]["bos_id"] == 0
    rebuilt = HuggingFaceSource.from_metadata(metadata, device="cpu")
    assert rebuilt.config == structure({**unstructure(source.config), "device": "cpu"}, HuggingFaceSourceConfig)
    with pytest.raises(ConfigError, match="do not say what it was trained on"):
        HuggingFaceSource.from_metadata({"model_name": "gpt2"})


def test_a_model_in_bfloat16_gives_its_activations_in_bfloat16_or_as_asked(tokenizer: Any, text_file: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    small = LlamaConfig(
        vocab_size=259, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(small).bfloat16()
    settings = {
        "model": "m", "hook": "model.layers.0", "context_size": 8, "batch_prompts": 2, "buffer_rows": 64,
        "text": {"kind": "file", "path": str(text_file)},
    }  # fmt: skip
    config = structure(settings, HuggingFaceSourceConfig)
    assert next(HuggingFaceSource(config, model=model, tokenizer=tokenizer).batches(4)).dtype == torch.bfloat16
    asked = structure({**settings, "activation_dtype": "float32"}, HuggingFaceSourceConfig)
    assert next(HuggingFaceSource(asked, model=model, tokenizer=tokenizer).batches(4)).dtype == torch.float32


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=259, n_embd=32, n_layer=3, n_head=4, n_positions=64)).eval()


def bert() -> Any:
    from transformers import BertConfig, BertModel

    small = BertConfig(
        vocab_size=259, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=64,
    )  # fmt: skip
    return BertModel(small).eval()


def qwen3() -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    small = Qwen3Config(
        vocab_size=259, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64,
    )  # fmt: skip
    return Qwen3ForCausalLM(small).eval()


def gemma3() -> Any:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    small = Gemma3TextConfig(
        vocab_size=259, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=64, sliding_window=8, pad_token_id=2,
    )  # fmt: skip
    return Gemma3ForCausalLM(small).eval()


def t5() -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    small = T5Config(vocab_size=259, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=2)
    return T5ForConditionalGeneration(small).eval()


def plain() -> nn.Module:
    return nn.Sequential(nn.Embedding(259, 24), nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 8))


class Heads(nn.Module):
    """Splits its width into two heads, and its tokens into one long row."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(259, 12)
        self.split, self.join = nn.Unflatten(-1, (2, 6)), nn.Flatten(0, 1)
        self.last = nn.Identity()

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.last(self.join(self.split(self.embed(tokens))))


@pytest.mark.parametrize(
    ("build", "hook", "d_in", "name"),
    [
        (gpt2, "transformer.h.1", 32, "blocks.1.hook_resid_post"),
        (gpt2, "transformer.h.1:input", 32, "blocks.1.hook_resid_pre"),
        (gpt2, "transformer.h.1.attn", 32, "blocks.1.hook_attn_out"),
        (gpt2, "transformer.h.0.mlp.act", 128, None),
        (bert, "encoder.layer.1", 32, None),
        (qwen3, "model.layers.1.mlp", 32, "blocks.1.hook_mlp_out"),
        (gemma3, "model.layers.0", 32, "blocks.0.hook_resid_post"),
        (t5, "encoder.block.1.layer.1", 32, None),
        (t5, "decoder.block.0", 32, None),
        (bert, "encoder.layer.0.attention.self", 32, None),
        (plain, "2", 40, None),
        (Heads, "split", 12, None),
        (Heads, "join", 12, None),
    ],
)
def test_models_of_every_kind_are_read_by_module_path(
    build: Callable[[], nn.Module], hook: str, d_in: int, name: str | None, tokenizer: Any, text_file: Path
) -> None:
    config = structure(
        {
            "model": "m", "hook": hook, "context_size": 16, "batch_prompts": 4, "buffer_rows": 128,
            "text": {"kind": "file", "path": str(text_file)}, "tokens": {"packing": "document"},
        },
        HuggingFaceSourceConfig,
    )  # fmt: skip
    source = HuggingFaceSource(config, model=build(), tokenizer=tokenizer)
    assert source.d_in == d_in
    assert source.metadata()["sae_lm"]["hook_point"]["transformer_lens"] == name
    batch = next(source.batches(16))
    assert batch.shape == (16, d_in)
    assert batch.isfinite().all()


def test_padding_changes_nothing_for_an_encoder_that_looks_both_ways(tokenizer: Any, text_file: Path) -> None:
    model = bert()
    config = structure(
        {
            "model": "m", "hook": "encoder.layer.2", "context_size": 32, "tokens": {"packing": "document"},
            "text": {"kind": "file", "path": str(text_file)},
        },
        HuggingFaceSourceConfig,
    )  # fmt: skip
    source = HuggingFaceSource(config, model=model, tokenizer=tokenizer)
    together = torch.cat([source.activations(windows) for windows in source.windows("train", rows=16)])
    alone = torch.cat([source.activations(windows) for windows in source.windows("train", rows=1)])
    assert torch.allclose(together, alone, atol=1e-5)


def test_documents_that_are_token_ids_need_no_tokenizer(llama: Any, tmp_path: Path) -> None:
    file = tmp_path / "games.jsonl"
    file.write_text("".join(json.dumps({"moves": [i % 60 for i in range(n, n + 30)]}) + "\n" for n in range(20)))
    config = structure(
        {
            "model": "m", "hook": "model.layers.0", "context_size": 10, "batch_prompts": 4, "buffer_rows": 128,
            "tokenizer": "none", "text": {"kind": "file", "path": str(file), "column": "moves", "held_out": 0.0},
        },
        HuggingFaceSourceConfig,
    )  # fmt: skip
    source = HuggingFaceSource(config, model=llama)
    assert len(unshuffled(source)) == 600
    assert "window 0: 10 tokens, 10 count\n  0 1 2" in source.preview()
    file.write_text('{"moves": [1, 2, 259]}\n')
    with pytest.raises(DataError, match="token id 259, but the model knows 259 tokens"):
        next(source.batches(4))


def test_impossible_settings_are_refused_before_the_model_runs(
    make_source: Callable[..., HuggingFaceSource], llama: Any
) -> None:
    with pytest.raises(ConfigError, match=r"buffer_rows: 60 cannot hold a batch of 8 beside the 64 activations"):
        next(make_source(buffer_rows=60).batches(8))
    with pytest.raises(ConfigError, match="no second pass to use the cache"):
        make_source(cache_activations=True)
    with pytest.raises(ConfigError, match=r"no module 'model\.layers\.7'.*which holds 0 to 3"):
        _ = make_source(hook="model.layers.7").d_in
    with pytest.raises(ConfigError, match="write a module path"):
        make_source(hook="model.layers.1:inputs")
    with pytest.raises(ConfigError, match="500 tokens are beyond the 128 positions of tiny-llama"):
        _ = make_source(context_size=500).d_in
    with pytest.raises(ConfigError, match="context_size must be positive"):
        make_source(context_size=0)


def test_a_model_in_int8_is_read_as_it_is(llama: Any, tokenizer: Any, text_file: Path) -> None:
    import copy
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch points to a library of its own for this
        model = torch.ao.quantization.quantize_dynamic(copy.deepcopy(llama), {nn.Linear}, dtype=torch.qint8)
    settings = {
        "model": "int8", "hook": "model.layers.1", "context_size": 16, "batch_prompts": 4, "buffer_rows": 200,
        "text": {"kind": "file", "path": str(text_file), "held_out": 0.1},
    }  # fmt: skip
    source = HuggingFaceSource(structure(settings, HuggingFaceSourceConfig), model=model, tokenizer=tokenizer)
    windows = next(source.windows("train"))
    with torch.no_grad():
        reported = model(windows.tokens, output_hidden_states=True).hidden_states[2][windows.kept]
        exact = llama(windows.tokens, output_hidden_states=True).hidden_states[2][windows.kept]
    assert torch.equal(source.activations(windows), reported)
    assert not torch.equal(reported, exact)
    assert next(source.batches(8)).dtype == torch.float32  # what int8 modules hand on


def roberta() -> Any:
    from transformers import RobertaConfig, RobertaModel

    small = RobertaConfig(
        vocab_size=259, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=18,
    )  # fmt: skip
    return RobertaModel(small).eval()


def test_positions_that_begin_behind_the_paddings_own_are_fewer_than_the_table_has(
    tokenizer: Any, text_file: Path
) -> None:
    settings = {"model": "m", "hook": "encoder.layer.0", "text": {"kind": "file", "path": str(text_file)}}
    fits = structure({**settings, "context_size": 16}, HuggingFaceSourceConfig)
    source = HuggingFaceSource(fits, model=roberta(), tokenizer=tokenizer)
    assert len(source.activations(next(source.windows("train")))) > 0
    beyond = structure({**settings, "context_size": 17}, HuggingFaceSourceConfig)
    with pytest.raises(ConfigError, match="17 tokens are beyond the 16 positions of m"):
        _ = HuggingFaceSource(beyond, model=roberta(), tokenizer=tokenizer).d_in


def test_an_empty_held_out_part_is_an_error_before_training(
    make_source: Callable[..., HuggingFaceSource], tmp_path: Path
) -> None:
    (tmp_path / "short.txt").write_text("b\n\nempty")
    source = make_source(text={"kind": "file", "path": str(tmp_path / "short.txt")})
    with pytest.raises(DataError, match="none of the 2 documents"):
        next(source.batches(4))
    assert "language_model" not in vars(source)


def test_the_preview_loads_the_tokenizer_and_no_model(saved_model: Path, tmp_path: Path) -> None:
    for file in saved_model.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    config = structure({"model": str(tmp_path), "hook": "model.layers.0", "context_size": 16}, HuggingFaceSourceConfig)
    source = HuggingFaceSource(config)
    assert source.preview(1).startswith("window 0: 16 tokens")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        _ = source.d_in


def test_text_without_a_token_to_train_on_is_an_error(
    make_source: Callable[..., HuggingFaceSource], tmp_path: Path
) -> None:
    (tmp_path / "empty.txt").write_text("\n\n  \n")
    source = make_source(text={"kind": "file", "path": str(tmp_path / "empty.txt")})
    with pytest.raises(DataError, match=r"gives no token to train on beside the 5% held out"):
        next(source.batches(8))
    with pytest.raises(DataError, match="gives no token to train on"):
        source.preview()


def test_an_activation_that_does_not_follow_the_tokens_is_an_error(tokenizer: Any, text_file: Path) -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.pool = nn.Embedding(259, 5), nn.Identity()

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.pool(self.embed(tokens).mean(1))

    config = structure(
        {
            "model": "m", "hook": "pool", "context_size": 8, "batch_prompts": 2, "buffer_rows": 64,
            "text": {"kind": "file", "path": str(text_file)},
        },
        HuggingFaceSourceConfig,
    )  # fmt: skip
    with pytest.raises(DataError, match=r"output of 'pool' has shape \(2, 5\) for tokens of shape \(2, 8\)"):
        next(HuggingFaceSource(config, model=Pooled(), tokenizer=tokenizer).batches(4))


def test_the_windows_of_training_and_of_evaluation_share_no_document(
    make_source: Callable[..., HuggingFaceSource],
) -> None:
    source = make_source(text={"kind": "stdlib"}, context_size=64)
    decode = source.language_model.tokenizer.decode
    train, held_out = (
        "".join(decode(row) for windows in source.windows(part) for row in windows.tokens) for part in PARTS
    )
    assert "Record of phased-in incompatible language changes" in train
    assert "Record of phased-in incompatible language changes" not in held_out
    assert len(held_out) > 20_000
