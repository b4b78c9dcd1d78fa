"""TransformerLens is an optional extra: these tests run where it is installed."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_core import create
from sae_core.config import structure
from sae_core.errors import ConfigError, MissingDependencyError
from sae_lm import attach, spliced, steer
from sae_lm.evaluation import evaluate_candidates
from sae_lm.model import load
from sae_lm.source import HuggingFaceSource, HuggingFaceSourceConfig


def hooked_model() -> Any:
    transformer_lens = pytest.importorskip("transformer_lens")
    if not hasattr(transformer_lens, "HookedTransformer"):
        pytest.skip("TransformerLens 4 has bridges only")
    settings = transformer_lens.HookedTransformerConfig(
        n_layers=3,
        d_model=16,
        n_ctx=32,
        d_head=8,
        n_heads=2,
        d_mlp=32,
        d_vocab=259,
        act_fn="gelu",
        seed=0,
        device="cpu",
    )
    return transformer_lens.HookedTransformer(settings)


@pytest.mark.filterwarnings("ignore")
def test_hook_points_of_a_hooked_transformer_are_read_replaced_and_evaluated(tokenizer: Any, tmp_path: Path) -> None:
    model = hooked_model()
    file = tmp_path / "text.txt"
    file.write_text("\n\n".join(f"Document {i} has {i * i}." for i in range(40)))
    settings = {
        "model": "tiny", "hook": "blocks.1.hook_resid_post", "context_size": 16, "batch_prompts": 4, "buffer_rows": 128,
        "text": {"kind": "file", "path": str(file), "held_out": 0.2},
    }  # fmt: skip
    source = HuggingFaceSource(structure(settings, HuggingFaceSourceConfig), model=model, tokenizer=tokenizer)
    windows = next(source.windows("train"))
    with torch.no_grad():
        _, cache = model.run_with_cache(windows.tokens)
    assert torch.allclose(source.activations(windows), cache["blocks.1.hook_resid_post"][windows.kept], atol=1e-6)
    assert next(source.batches(8)).shape == (8, 16)
    assert source.metadata()["sae_lm"]["hook_point"]["transformer_lens"] == "blocks.1.hook_resid_post"

    result = evaluate_candidates(
        model, source.point, source.windows("held_out"), {"identity": lambda x: (x, None)}, rules=source.rules
    )
    assert result.candidates["identity"]["ce_recovered"] == 1.0
    assert result.predictions > 0


def test_without_transformer_lens_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "transformer_lens", None)
    with pytest.raises(MissingDependencyError, match=r"install sae-lm\[transformer-lens\]"):
        load("gpt2", model_class="HookedTransformer")


@pytest.mark.filterwarnings("ignore")
def test_settings_that_a_hooked_transformer_cannot_follow_are_refused() -> None:
    pytest.importorskip("transformer_lens")
    with pytest.raises(ConfigError, match="dtype: auto"):
        load("gpt2", model_class="HookedTransformer", dtype="auto")
    with pytest.raises(ConfigError, match="brings its own"):
        load("gpt2", model_class="HookedTransformer", tokenizer="gpt2")


def bridge_model() -> Any:
    """TransformerLens 3's bridge around a tiny GPT-2 of transformers; not trained, and nothing is downloaded."""
    bridge = pytest.importorskip("transformer_lens.model_bridge")
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=259, n_embd=16, n_layer=3, n_head=2, n_positions=32, initializer_range=0.5)
    model = GPT2LMHeadModel(config).eval()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return bridge.TransformerBridge.boot_transformers(folder, device="cpu", hf_model=model)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("build", [hooked_model, bridge_model])
def test_dictionaries_are_spliced_under_transformer_lens_names(build: Callable[[], Any]) -> None:
    model = build()
    tokens = torch.randint(3, 259, (2, 8), generator=torch.Generator().manual_seed(0))
    sae = create("topk", d_in=16, d_sae=32, k=4, seed=0, decoder_init_norm=1.0).eval()
    sae.metadata = {"hook_name": "blocks.1.hook_resid_post"}
    heads = create("topk", d_in=16, d_sae=32, k=4, seed=1, reshape_activations="hook_z").eval()
    heads.metadata = {"hook_name": "blocks.0.attn.hook_z"}
    with torch.no_grad():
        before, cache = model.run_with_cache(tokens)
    x = cache["blocks.1.hook_resid_post"]

    with spliced(model, sae) as seen, torch.no_grad():
        assert not torch.equal(model(tokens), before)
    assert torch.allclose(seen.latents["blocks.1.hook_resid_post"].to_dense(), sae.encode(x), atol=1e-5)
    with spliced(model, [heads, sae], error_term=True) as seen, torch.no_grad():
        assert torch.equal(model(tokens), before)
    assert seen.latents["blocks.0.attn.hook_z"].shape == (2, 8, 32)
    with torch.no_grad():
        assert torch.equal(model(tokens), before)
    with pytest.raises(ConfigError, match=r"no module 'blocks\.1\.hook_resid_pots'"):
        attach(model, {"blocks.1.hook_resid_pots": sae})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("build", [hooked_model, bridge_model])
def test_steering_reaches_every_token_that_a_transformer_lens_model_generates(build: Callable[[], Any]) -> None:
    model = build()
    tokens = torch.randint(3, 259, (2, 6), generator=torch.Generator().manual_seed(1))
    sae = create("topk", d_in=16, d_sae=32, k=4, seed=0, decoder_init_norm=1.0).eval()
    steering = steer(3, 30.0, positions=slice(5, None))

    with spliced(model, {"blocks.1.hook_resid_post": sae}, error_term=True, edit=steering, keep_passes=True) as seen:
        model.generate(tokens, max_new_tokens=5, do_sample=False, stop_at_eos=False, verbose=False)
    passes = seen.passes["blocks.1.hook_resid_post"]
    assert [codes.shape[1] for codes in passes] == [6, 1, 1, 1, 1]
    latent = torch.cat([codes.to_dense()[..., 3] for codes in passes], dim=1)
    assert (latent[:, 5:] >= 30).all()
    assert (latent[:, :5] < 30).all()


@pytest.mark.filterwarnings("ignore")
def test_a_bridge_is_loaded_by_name_and_gives_its_activations(saved_model: Path, llama: Any) -> None:
    settings = {
        "model": str(saved_model), "model_class": "TransformerBridge", "hook": "blocks.1.hook_resid_post", "device": "cpu",
        "context_size": 16, "batch_prompts": 2, "buffer_rows": 64,
    }  # fmt: skip
    source = HuggingFaceSource(structure(settings, HuggingFaceSourceConfig))
    windows = next(source.windows("train"))
    with torch.no_grad():
        expected = llama(windows.tokens, output_hidden_states=True).hidden_states[2][windows.kept]
    assert torch.allclose(source.activations(windows), expected, atol=1e-5)
    with pytest.raises(ConfigError, match="16384 tokens are beyond the 128 positions"):
        _ = HuggingFaceSource(structure({**settings, "context_size": 16384}, HuggingFaceSourceConfig)).d_in
