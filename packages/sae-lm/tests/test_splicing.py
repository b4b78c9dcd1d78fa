"""Dictionaries inside models: reconstructions in place of activations, edits of latents, and the model as it was afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sae_core import create
from sae_core.codes import SparseCodes
from sae_core.errors import ConfigError, DataError, ShapeError
from sae_lm import Splice, ablate, attach, capture, clamp, edited, keep_only, scale, spliced, steer
from sae_lm.latents import apply_edits, rows_at
from torch import nn

TOKENS = torch.randint(3, 259, (3, 10), generator=torch.Generator().manual_seed(0))
PLACE = "model.layers.1"


def hooks_of(model: nn.Module) -> dict[str, int]:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_always_called", "_forward_hooks_with_kwargs",
             "_forward_pre_hooks_with_kwargs", "_backward_hooks")  # fmt: skip
    return {f"{name}.{kind}": len(getattr(module, kind)) for name, module in model.named_modules() for kind in kinds}


def logits(model: nn.Module, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    with torch.no_grad():
        out = model(tokens)
    return getattr(out, "logits", out)


def dictionary(d_in: int = 32, d_sae: int = 64, **config: Any) -> Any:
    return create("topk", d_in=d_in, d_sae=d_sae, k=6, seed=1, decoder_init_norm=1.0, **config).eval()


@pytest.fixture(scope="module")
def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=259, n_embd=32, n_layer=3, n_head=4, n_positions=64, initializer_range=0.5)
    return GPT2LMHeadModel(config).eval()


def test_what_the_model_goes_on_with_is_the_reconstruction_and_the_latents_are_seen(llama: Any) -> None:
    sae = dictionary()
    x = capture(llama, [PLACE], TOKENS)[PLACE]
    with spliced(llama, {PLACE: sae}) as seen, torch.no_grad():
        downstream = llama(TOKENS, output_hidden_states=True).hidden_states[2]
    assert torch.equal(downstream, sae(x))
    assert torch.equal(seen.latents[PLACE].to_dense(), sae.encode(x))
    assert torch.allclose(seen.errors[PLACE][0], x - sae(x), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_with_the_error_term_and_no_edit_not_one_bit_changes(llama: Any, dtype: torch.dtype) -> None:
    import copy

    model = copy.deepcopy(llama).to(dtype)
    saes = {f"model.layers.{layer}": dictionary() for layer in range(3)}
    before = logits(model)
    with spliced(model, saes, error_term=True) as seen:
        assert torch.equal(logits(model), before)
    assert all(seen.latents[name].l0().eq(6).all() for name in saes)
    with spliced(model, saes):
        assert not torch.equal(logits(model), before)
        assert logits(model).dtype == dtype


def test_afterwards_the_model_is_what_it_was_exceptions_included(llama: Any) -> None:
    before, hooks = logits(llama), hooks_of(llama)
    sae = dictionary()
    with spliced(llama, {PLACE: sae}, skip_tokens=[5]):
        logits(llama)
    with pytest.raises(RuntimeError, match="mine"), spliced(llama, {PLACE: sae}, edit=steer(3, 5.0)):
        raise RuntimeError("mine")
    with pytest.raises(ConfigError, match=r"no module 'model\.layers\.9'"):
        attach(llama, {PLACE: sae, "model.layers.9": sae})
    with pytest.raises(DataError, match="the SAE's width there is 16"), spliced(llama, {PLACE: dictionary(16)}):
        llama(TOKENS)
    first, second = attach(llama, {PLACE: sae}), attach(llama, {"model.layers.2": sae})
    first.remove()
    with edited(llama, {"model.layers.0": lambda x: x * 2}):
        second.remove()
        assert not torch.equal(logits(llama), before)
    first.remove()  # again: nothing happens
    assert hooks_of(llama) == hooks
    assert torch.equal(logits(llama), before)


def test_a_dictionary_in_train_mode_works_as_in_eval_mode_and_stays_in_train_mode(llama: Any) -> None:
    sae = create("batchtopk", d_in=32, d_sae=64, k=4, seed=0)
    sae.train()
    with spliced(llama, {PLACE: sae}) as seen:
        logits(llama)
        whole = seen.latents[PLACE].to_dense()
        logits(llama, TOKENS[:1])
    assert sae.training
    assert torch.allclose(
        seen.latents[PLACE].to_dense(), whole[:1], atol=1e-5
    )  # nothing depends on the rest of the batch
    assert torch.equal(whole, sae.eval().encode(capture(llama, [PLACE], TOKENS)[PLACE]))


def test_steering_with_the_error_term_adds_the_decoder_direction_where_it_is_asked_for(llama: Any) -> None:
    sae = dictionary()
    x = capture(llama, [PLACE], TOKENS)[PLACE]
    with (
        spliced(llama, {PLACE: sae}, error_term=True, edit=steer({7: 3.0, 9: -1.0}, positions=[2, -1])),
        torch.no_grad(),
    ):
        steered = llama(TOKENS, output_hidden_states=True).hidden_states[2]
    expected = x.clone()
    expected[:, [2, 9]] += 3.0 * sae.W_dec[7] - sae.W_dec[9]
    assert torch.allclose(steered, expected, atol=1e-5)
    untouched = [0, 1, 3, 4, 5, 6, 7, 8]
    assert torch.equal(steered[:, untouched], x[:, untouched])


def test_edits_by_hand() -> None:
    codes = SparseCodes.from_dense(torch.tensor([[[1.0, 0.0, 2.0], [0.0, 3.0, 4.0], [5.0, 6.0, 0.0]]]))

    def after(*edits: Any, offset: int = 0) -> list[list[float]]:
        return apply_edits(codes, edits, offset=offset).to_dense()[0].tolist()

    assert after(clamp(1, 9.0, positions=0)) == [[1, 9, 2], [0, 3, 4], [5, 6, 0]]
    assert after(scale([0, 2], 10.0, positions=slice(1, None))) == [[1, 0, 2], [0, 3, 40], [50, 6, 0]]
    assert after(ablate([0, 1], positions=[-1])) == [[1, 0, 2], [0, 3, 4], [0, 0, 0]]
    assert after(keep_only(2)) == [[0, 0, 2], [0, 0, 4], [0, 0, 0]]
    assert after(steer(0, 1.0), clamp(0, 0.5, positions=0)) == [[0.5, 0, 2], [1, 3, 4], [6, 6, 0]]
    assert after(ablate(2, positions=11), offset=10) == [[1, 0, 2], [0, 3, 0], [5, 6, 0]]
    mask = torch.tensor([[False] * 11 + [True]])
    assert after(ablate(2, positions=mask), offset=10) == [[1, 0, 2], [0, 3, 0], [5, 6, 0]]
    with pytest.raises(ConfigError, match="there is no latent 3; the dictionary has 3"):
        after(ablate(3))
    with pytest.raises(ConfigError, match="named twice"):
        ablate([1, 1])
    with pytest.raises(ShapeError, match="a mask of shape"):
        rows_at(torch.ones(2, 3, dtype=torch.bool), (1, 3), 0, torch.device("cpu"))


def test_edited_values_carry_gradients() -> None:
    values = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    codes = SparseCodes(values, torch.tensor([0, 1, 1]), (2,), 3, torch.tensor([0, 2, 3]))
    apply_edits(codes, [scale(1, 10.0), steer(2, 1.0)]).to_dense().sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [1.0, 10.0, 10.0]


def test_edits_apply_while_a_model_generates_with_a_key_value_cache(llama: Any) -> None:
    sae = dictionary()
    edits = [steer(3, 40.0, positions=slice(8, None)), clamp(5, 9.0, positions=4)]

    def generated(**options: Any) -> tuple[list[list[int]], torch.Tensor]:
        with spliced(llama, {PLACE: sae}, error_term=True, edit=edits, keep_passes=True) as seen:
            ids = llama.generate(
                TOKENS[:, :6], max_new_tokens=6, do_sample=False, pad_token_id=2, eos_token_id=None, **options
            )
        passes = seen.passes[PLACE]
        last = passes[-1].to_dense() if not options["use_cache"] else torch.cat([p.to_dense() for p in passes], dim=1)
        return ids.tolist(), last

    cached_ids, cached = generated(use_cache=True)
    whole_ids, whole = generated(use_cache=False)
    plain = llama.generate(TOKENS[:, :6], max_new_tokens=6, do_sample=False, pad_token_id=2, eos_token_id=None)
    assert cached_ids == whole_ids != plain.tolist()
    assert cached.shape == (3, 11, 64)  # 6 of the prompt, 5 more that were fed back
    assert torch.allclose(cached, whole, atol=1e-3)
    assert (cached[:, 8:, 3] >= 40).all()
    assert (cached[:, :8, 3] < 40).all()
    assert (cached[:, 4, 5] == 9).all()


def test_a_transcoder_is_spliced_at_its_target(llama: Any) -> None:
    transcoder = create("topk", d_in=32, d_sae=48, d_out=32, k=4, seed=2).eval()
    transcoder.metadata = {"hook_name": "model.layers.1.mlp:input", "hook_name_out": "model.layers.1.mlp"}
    before = logits(llama)
    x = capture(llama, ["model.layers.1.mlp:input"], TOKENS)["model.layers.1.mlp:input"]
    with spliced(llama, transcoder) as seen:
        (name,) = seen.routes
        out = capture(llama, ["model.layers.1.mlp"], TOKENS)["model.layers.1.mlp"]
    assert name == "model.layers.1.mlp:input -> model.layers.1.mlp"
    assert torch.equal(out, transcoder(x))
    with spliced(llama, {name: transcoder}, error_term=True):
        assert torch.equal(logits(llama), before)
    with pytest.raises(ConfigError, match=r"say where: 'model\.layers\.1 -> PLACE'"):
        attach(llama, {"model.layers.1": transcoder})
    with (
        spliced(llama, {"model.layers.2 -> model.layers.1": transcoder}),
        pytest.raises(DataError, match=r"model\.layers\.1 runs before the dictionary has read model\.layers\.2"),
    ):
        llama(TOKENS)


def test_dictionaries_at_one_place_follow_each_other(llama: Any) -> None:
    a, b = dictionary(), create("topk", d_in=32, d_sae=40, k=3, seed=5).eval()
    x = capture(llama, [PLACE], TOKENS)[PLACE]
    with spliced(llama, {"a": Splice(a, PLACE), "b": Splice(b, PLACE)}) as seen, torch.no_grad():
        out = llama(TOKENS, output_hidden_states=True).hidden_states[2]
    assert torch.allclose(out, b(a(x)), atol=1e-6)
    assert torch.equal(seen.latents["a"].to_dense(), a.encode(x))
    a.metadata = b.metadata = {"hook_name": PLACE}
    with pytest.raises(ConfigError, match=r"two dictionaries at model\.layers\.1"):
        attach(llama, [a, b])


def test_positions_and_tokens_that_are_left_out_keep_their_very_bits(llama: Any) -> None:
    sae, where = dictionary(), torch.rand(3, 10, generator=torch.Generator().manual_seed(3)) < 0.5
    x = capture(llama, [PLACE], TOKENS)[PLACE]
    with spliced(llama, {PLACE: sae}, where=where, edit=steer(1, 4.0)) as seen, torch.no_grad():
        out = llama(TOKENS, output_hidden_states=True).hidden_states[2]
    assert torch.equal(out[~where], x[~where])
    assert torch.allclose(out[where], (sae(x) + 4.0 * sae.W_dec[1])[where], atol=1e-5)
    assert not seen.latents[PLACE].to_dense()[~where].any()
    assert not seen.errors[PLACE][0][~where].any()

    skipped = TOKENS[0, :2].tolist()
    with spliced(llama, {PLACE: sae}, skip_tokens=skipped), torch.no_grad():
        out = llama(TOKENS, output_hidden_states=True).hidden_states[2]
    skip = torch.isin(TOKENS, torch.tensor(skipped))
    assert torch.equal(out[skip], x[skip])
    assert torch.allclose(out[~skip], sae(x)[~skip], atol=1e-6)


def test_an_sae_named_in_transformer_lens_terms_finds_its_place_and_its_centred_weights_are_honoured(gpt2: Any) -> None:
    sae = dictionary()
    sae.metadata = {
        "hook_name": "blocks.1.hook_resid_pre", "model_name": "gpt2-small",
        "model_from_pretrained_kwargs": {"center_writing_weights": True},
    }  # fmt: skip
    x = capture(gpt2, ["transformer.h.1:input"], TOKENS)["transformer.h.1:input"]
    centred = x - x.mean(-1, keepdim=True)
    before = logits(gpt2)
    with spliced(gpt2, sae) as seen:
        (name,) = seen.routes
        out = capture(gpt2, ["transformer.h.0"], TOKENS)
        replaced = capture(gpt2, ["transformer.h.1.ln_1:input"], TOKENS)["transformer.h.1.ln_1:input"]
    assert (name, list(out)) == ("transformer.h.1:input", ["transformer.h.0"])
    assert torch.allclose(seen.latents[name].to_dense(), sae.encode(centred), atol=1e-5)
    assert torch.allclose(replaced, sae(centred) + x.mean(-1, keepdim=True), atol=1e-4)
    with spliced(gpt2, sae, error_term=True):
        assert torch.equal(logits(gpt2), before)
    sae.metadata["model_from_pretrained_kwargs"] = {"fold_value_biases": True}
    with pytest.raises(ConfigError, match="prepared with fold_value_biases=True, which GPT2LMHeadModel is not"):
        attach(gpt2, sae)
    sae.metadata = {}
    with pytest.raises(ConfigError, match="metadata name no hook point"):
        attach(gpt2, sae)


def test_joined_heads_and_a_single_head_are_reached(gpt2: Any) -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.z = nn.Identity()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.z(x.unflatten(-1, (4, 8))).flatten(-2)

    model, x = Heads(), torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    joined = dictionary(reshape_activations="hook_z")
    with spliced(model, {"z": joined}) as seen:
        assert torch.allclose(model(x), joined(x), atol=1e-6)
        assert seen.latents["z"].shape == (2, 5, 64)
    single = dictionary(8)
    single.metadata = {"hook_name": "z", "hook_head_index": 2}
    with spliced(model, single):
        out = model(x).unflatten(-1, (4, 8))
    heads = x.unflatten(-1, (4, 8))
    assert torch.equal(out[..., [0, 1, 3], :], heads[..., [0, 1, 3], :])
    assert torch.allclose(out[..., 2, :], single(heads[..., 2, :]), atol=1e-6)
    single.metadata["hook_head_index"] = 4
    with spliced(model, single), pytest.raises(DataError, match=r"reads head 4 of \(…, heads, 8\)"):
        model(x)


def test_an_encoder_is_spliced_while_an_encoder_decoder_generates() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(vocab_size=259, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config).eval()
    sae = dictionary()
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    for _ in range(2):
        with spliced(model, {"encoder.block.0": sae}, edit=steer(0, 50.0), keep_passes=True) as seen:
            model.generate(TOKENS, **options)
        assert [codes.shape for codes in seen.passes["encoder.block.0"]] == [(3, 10, 64)]


def test_edits_are_for_a_dictionary_that_is_there(llama: Any) -> None:
    sae = dictionary()
    with pytest.raises(ConfigError, match="say which of"):
        attach(llama, {PLACE: sae, "model.layers.2": sae}, edit=steer(1, 1.0))
    with pytest.raises(ConfigError, match="there is no dictionary nowhere"):
        attach(llama, {PLACE: sae}, edit={"nowhere": steer(1, 1.0)})
    with spliced(llama, {PLACE: sae, "model.layers.2": sae}, edit={PLACE: clamp(1, 2.0)}) as seen:
        logits(llama)
    assert (seen.latents[PLACE].to_dense()[..., 1] == 2).all()
    assert not (seen.latents["model.layers.2"].to_dense()[..., 1] == 2).all()


def test_a_dictionary_of_several_places_is_spliced_at_all_of_them(llama: Any) -> None:
    places = ("model.layers.0", "model.layers.2")
    crosscoder = create("topk", d_in=64, d_sae=48, k=5, seed=3, reads=dict.fromkeys(places, 32)).eval()
    before = logits(llama)
    found = capture(llama, places, TOKENS)
    x = torch.cat([found[place] for place in places], dim=-1)
    with spliced(llama, crosscoder) as seen:
        (name,) = seen.routes
        after = capture(llama, places, TOKENS)
    assert name == "model.layers.0, model.layers.2"
    assert torch.equal(seen.latents[name].to_dense(), crosscoder.encode(x))
    for place, part in zip(places, crosscoder(x).split(32, dim=-1), strict=True):
        assert torch.allclose(after[place], part, atol=1e-6)
    with spliced(llama, crosscoder, error_term=True, edit=steer(1, 0.0)):
        assert torch.equal(logits(llama), before)
    with spliced(llama, crosscoder), pytest.raises(DataError, match="cannot look ahead with a key-value cache"):
        llama(TOKENS, use_cache=True, past_key_values=_empty_cache())
    assert torch.equal(logits(llama), before)


def _empty_cache() -> Any:
    from transformers import DynamicCache

    return DynamicCache()


def test_a_dictionary_that_reads_sequences_gets_them_whole(llama: Any) -> None:
    temporal = create("temporal", d_in=32, d_sae=64, n_heads=2, bottleneck_factor=8, kval_topk=5, seed=0).eval()
    x = capture(llama, [PLACE], TOKENS)[PLACE]
    where = torch.ones(3, 10, dtype=torch.bool)
    where[:, 0] = False
    with spliced(llama, {PLACE: temporal}, where=where) as seen:
        out = capture(llama, [PLACE], TOKENS)[PLACE]
    assert torch.allclose(out[:, 1:], temporal(x)[:, 1:], atol=1e-5)
    assert torch.equal(out[:, 0], x[:, 0])
    assert torch.equal(seen.latents[PLACE].to_dense()[:, 1:], temporal.encode(x)[:, 1:])
    with spliced(llama, {PLACE: temporal}), pytest.raises(DataError, match="generate with use_cache=False"):
        llama.generate(TOKENS, max_new_tokens=3, do_sample=False, pad_token_id=2, eos_token_id=None)
