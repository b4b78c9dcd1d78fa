"""Attribution: shares are derivatives times values, they add up where they must, and the model is left alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sae_core import create
from sae_core.errors import ConfigError, DataError
from sae_lm import spliced
from sae_lm.attribution import attribute, integrated_gradients
from sae_lm.hooks import capture, edited
from sae_lm.latents import ablate, apply_edits
from sae_lm.lens import Lens, direct_logit_attribution, directions, logit_lens
from sae_lm.token_sets import enrichment, enrichment_of_latents, matching_tokens, tokens_by_first_letter

TOKENS = torch.randint(3, 259, (2, 7), generator=torch.Generator().manual_seed(0))
PLACE = "model.layers.1"


def dictionary(architecture: str = "topk", **config: Any) -> Any:
    settings = {"topk": {"k": 5}, "jumprelu": {"jumprelu_init_threshold": 0.01}}.get(architecture, {})
    sae = create(architecture, d_in=32, d_sae=40, seed=1, decoder_init_norm=1.0, **settings, **config)
    with torch.no_grad():
        sae.W_dec *= 0.05  # so that what it writes is of the size of the tiny model's stream
    return sae.eval()


def difference(output: Any) -> torch.Tensor:
    logits = getattr(output, "logits", output)
    return (logits[:, -1, 7] - logits[:, -1, 9]).sum()


@pytest.mark.parametrize("error_term", [True, False])
def test_a_share_is_a_value_times_the_derivative_by_it(llama: Any, error_term: bool) -> None:
    sae = dictionary()
    found = attribute(llama, {PLACE: sae}, difference, TOKENS, error_term=error_term)[PLACE]
    assert all(parameter.grad is None for parameter in llama.parameters())
    x = capture(llama, [PLACE], TOKENS)[PLACE]
    codes = sae.encode_sparse(x)
    values = codes.values.detach().requires_grad_()
    clean = sae.decode(codes).detach()

    def put(activation: torch.Tensor) -> torch.Tensor:
        y = sae.decode(codes.with_values(values))
        return activation.detach() + y - clean if error_term else y

    with edited(llama, {PLACE: put}):
        (slopes,) = torch.autograd.grad(difference(llama(TOKENS)), values)
    assert torch.allclose(found.codes.values, codes.values, atol=1e-5)
    assert torch.equal(found.codes.indices, codes.indices)
    assert torch.allclose(found.gradients.values, slopes, atol=1e-5)
    assert torch.allclose(found.latents.values, slopes * codes.values, atol=1e-5)
    assert found.latents.shape == (2, 7, 40)
    latent, share = found.top(1)[0]
    assert share == pytest.approx(float(found.by_latent()[latent]))
    assert bool(found.errors.any()) == error_term


@pytest.mark.parametrize("error_term", [True, False])
def test_no_gradient_of_a_dictionary_is_computed_and_its_parameters_learn_again_afterwards(
    llama: Any, error_term: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    sae, learning = dictionary(), list[bool]()
    decode = sae.decode

    def seen(*args: Any, **kwargs: Any) -> torch.Tensor:
        learning.append(any(parameter.requires_grad for parameter in sae.parameters()))
        return decode(*args, **kwargs)

    monkeypatch.setattr(sae, "decode", seen)
    attribute(llama, {PLACE: sae}, difference, TOKENS, error_term=error_term)
    integrated_gradients(llama, sae, difference, TOKENS, steps=1, at=PLACE)
    assert learning.count(True) == 1  # the clean reconstruction of integrated gradients, of which there is no graph
    assert all(parameter.requires_grad for parameter in sae.parameters())


def test_shares_and_errors_add_up_to_the_first_order_effect_of_the_place(llama: Any) -> None:
    sae = dictionary()
    found = attribute(llama, {PLACE: sae}, difference, TOKENS)[PLACE]
    seen: list[torch.Tensor] = []

    def keep(activation: torch.Tensor) -> torch.Tensor:
        seen.append(activation.detach().requires_grad_())
        return seen[0]

    with edited(llama, {PLACE: keep}):
        (gradient,) = torch.autograd.grad(difference(llama(TOKENS)), seen[0])
    bias = (gradient * sae.b_dec).sum(-1)
    parts = found.latents.row_sums().view(2, 7) + found.errors + bias
    assert torch.allclose(parts, (gradient * seen[0]).sum(-1).detach(), atol=1e-5)


def test_dictionaries_of_several_places_and_transcoders_have_shares_at_once(llama: Any) -> None:
    transcoder = create("topk", d_in=32, d_out=32, d_sae=24, k=4, seed=3).eval()
    saes = {
        "model.layers.0": dictionary(),
        PLACE: dictionary("jumprelu"),
        "model.layers.2.mlp:input -> model.layers.2.mlp": transcoder,
    }
    together = attribute(llama, saes, difference, TOKENS)
    for name, sae in saes.items():
        alone = attribute(llama, {name: sae}, difference, TOKENS)[name]
        assert torch.allclose(together[name].latents.values, alone.latents.values, atol=1e-6)
    with pytest.raises(DataError, match="must be one number, not"):
        attribute(llama, saes, lambda output: output.logits, TOKENS)
    with pytest.raises(DataError, match=r"does not depend on model\.layers\.3"):
        attribute(
            llama,
            {"model.layers.3": dictionary()},
            lambda output: output.logits.detach().sum().requires_grad_(),
            TOKENS,
        )


def test_integrated_gradients_add_up_to_the_difference_that_latents_make(llama: Any) -> None:
    sae = dictionary()
    with torch.no_grad():
        whole = difference(llama(TOKENS))
        with spliced(llama, {PLACE: sae}, error_term=True, edit=ablate(range(40))):
            without = difference(llama(TOKENS))
    found = integrated_gradients(llama, sae, difference, TOKENS, steps=32, at=PLACE)
    assert found.latents.values.sum().item() == pytest.approx(float(whole - without), rel=1e-2)
    few = integrated_gradients(llama, sae, difference, TOKENS, steps=1, at=PLACE)
    assert abs(few.latents.values.sum() - (whole - without)) >= abs(found.latents.values.sum() - (whole - without))


def test_ablating_a_latent_changes_the_number_by_its_share_to_first_order(llama: Any) -> None:
    sae = dictionary()
    with torch.no_grad():
        sae.W_dec *= 0.01  # a change so small that the first order is all there is
        sae.W_dec[:, :1] += 1e-6
    found = attribute(llama, {PLACE: sae}, difference, TOKENS)[PLACE]
    latent, share = found.top(1)[0]
    with torch.no_grad():
        whole = difference(llama(TOKENS).logits.double())
        with spliced(llama, {PLACE: sae}, error_term=True, edit=ablate(latent)):
            without = difference(llama(TOKENS).logits.double())
    assert float(whole - without) == pytest.approx(share, rel=0.05)


@pytest.fixture(scope="module")
def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=259, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.5)
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        model.transformer.ln_f.weight.uniform_(0.5, 2.0)
        model.transformer.ln_f.bias.uniform_(-1.0, 1.0)
    return model


def test_the_final_norm_is_found_and_measured_whatever_the_family(llama: Any, gpt2: Any) -> None:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    gemma_config = Gemma3TextConfig(
        vocab_size=259, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    gemma = Gemma3ForCausalLM(gemma_config).eval()
    with torch.no_grad():
        gemma.model.norm.weight.uniform_(-0.5, 0.5)
    for model, path, centred in (
        (llama, "model.norm", False),
        (gpt2, "transformer.ln_f", True),
        (gemma, "model.norm", False),
    ):
        lens = Lens.of(model)
        assert (lens.norm, lens.centred) == (path, centred)
        x = torch.randn(5, 32, generator=torch.Generator().manual_seed(1)) * 7
        moved = x - x.mean(-1, keepdim=True) if centred else x
        expected = model.get_submodule(path)(x.view(1, 5, 32)).view(5, 32)
        assert torch.allclose(
            moved / lens.scale(x).unsqueeze(-1) * lens.weight + lens.bias, expected, rtol=1e-2, atol=1e-2
        )


@pytest.mark.parametrize("architecture", ["topk", "jumprelu", "gated", "matching_pursuit"])
def test_directions_are_what_a_latent_adds(architecture: str) -> None:
    settings: dict[str, Any] = {"topk": {"k": 5, "rescale_acts_by_decoder_norm": False}}.get(architecture, {})
    sae = create(architecture, d_in=32, d_sae=40, seed=1, **settings)
    assert torch.allclose(directions(sae, torch.tensor([3, 17])), sae.W_dec[[3, 17]], atol=1e-5)


def test_directions_survive_a_normalisation_that_differs_from_row_to_row() -> None:
    sae = create("topk", d_in=32, d_sae=40, k=5, seed=1, normalize_activations="layer_norm")
    found = directions(sae, torch.tensor([3]))
    assert torch.cosine_similarity(found, sae.W_dec[[3]]).item() == pytest.approx(1.0, abs=1e-4)


def test_the_logit_lens_is_direction_times_norm_times_unembedding(gpt2: Any, llama: Any) -> None:
    sae = dictionary()
    lens = logit_lens(sae, gpt2, [4, 8], k=3)
    direction = directions(sae, torch.tensor([4, 8]))
    logits = (direction - direction.mean(-1, keepdim=True)) * gpt2.transformer.ln_f.weight @ gpt2.lm_head.weight.T
    most, least = logits.detach().topk(3), logits.detach().topk(3, largest=False)
    assert torch.equal(lens.promoted, most.indices)
    assert torch.allclose(lens.promoted_logits, most.values, rtol=1e-3)
    assert torch.equal(lens.suppressed, least.indices)
    assert logit_lens(sae, llama, k=2).promoted.shape == (40, 2)
    with pytest.raises(ConfigError, match="writes 16 columns, the residual stream has 32"):
        logit_lens(create("topk", d_in=16, d_sae=40, k=5), gpt2)
    with pytest.raises(ConfigError, match="has no unembedding"):
        logit_lens(sae, torch.nn.Sequential(torch.nn.Linear(2, 2)))


def test_direct_logit_attribution_adds_up_to_what_the_place_adds(gpt2: Any) -> None:
    sae, place = dictionary(), "transformer.h.0"
    found = direct_logit_attribution(gpt2, sae, TOKENS, (7, 9), at=place)
    assert torch.allclose(found.latents.row_sums() + found.bias + found.error, found.total, atol=1e-5)
    captured = capture(gpt2, [place, "transformer.ln_f:input"], TOKENS)
    x, stream = captured[place][:, -1], captured["transformer.ln_f:input"][:, -1]
    scale = (stream - stream.mean(-1, keepdim=True)).square().mean(-1).sqrt()
    centred = (x - x.mean(-1, keepdim=True)) / scale.unsqueeze(-1) * gpt2.transformer.ln_f.weight
    expected = centred @ (gpt2.lm_head.weight[7] - gpt2.lm_head.weight[9])
    assert torch.allclose(found.total, expected.detach(), rtol=1e-2, atol=1e-3)
    codes = sae.encode_sparse(x)
    row, latent, value = 1, int(codes.indices[5]), float(codes.values[5].detach())
    direction = directions(sae, torch.tensor([latent]))[0] * value
    share = (direction - direction.mean()) / scale[row] * gpt2.transformer.ln_f.weight
    share = share @ (gpt2.lm_head.weight[7] - gpt2.lm_head.weight[9])
    assert found.latents.to_dense()[row, latent].item() == pytest.approx(share.item(), rel=1e-2, abs=1e-4)
    assert apply_edits(codes, []).values is codes.values


def walk(scores: torch.Tensor, chosen: list[int]) -> float:
    """The running sum, step by step."""
    total, best = 0.0, 0.0
    for token in scores.argsort(descending=True, stable=True).tolist():
        total += 1 / len(chosen) if token in chosen else -1 / (len(scores) - len(chosen))
        best = total if abs(total) > abs(best) + 1e-12 else best
    return best


def test_enrichment_is_the_extreme_of_the_walk_for_all_rows_and_sets_at_once() -> None:
    scores = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    sets = {"a": [3, 4, 5], "b": list(range(0, 50, 2)), "c": [49]}
    found = enrichment(scores, sets)
    for name, chosen in sets.items():
        for row in range(6):
            assert abs(found[name][row]) == pytest.approx(abs(walk(scores[row], chosen)), abs=1e-5)
    for wrong, message in (([], "must hold some"), (list(range(50)), "but not all"), ([50], "beyond the 50")):
        with pytest.raises(DataError, match=message):
            enrichment(scores, {"wrong": wrong})


def test_a_latent_that_writes_a_token_is_enriched_for_its_set(llama: Any, tokenizer: Any) -> None:
    sae = dictionary()
    digits = matching_tokens(tokenizer, r" ?[0-9]")
    assert len(digits) == 10
    with torch.no_grad():
        weight = llama.lm_head.weight / llama.model.norm.weight
        sae.W_dec[11] = weight[digits].mean(0)
    found = enrichment_of_latents(sae, llama, {"digits": digits})["digits"]
    assert int(found.argmax()) == 11
    assert found[11] > 0.7
    assert tokens_by_first_letter(tokenizer) == {}  # a tokenizer of bytes has no words


@pytest.mark.filterwarnings("ignore")
def test_a_model_of_transformer_lens_has_shares_and_a_lens_too() -> None:
    transformer_lens = pytest.importorskip("transformer_lens")
    settings = transformer_lens.HookedTransformerConfig(
        n_layers=2, d_model=32, n_ctx=32, d_head=8, n_heads=4, d_mlp=32, d_vocab=259, act_fn="gelu", seed=0, device="cpu",
        normalization_type="LN",
    )  # fmt: skip
    model = transformer_lens.HookedTransformer(settings)
    sae, place = dictionary(), "blocks.0.hook_resid_post"
    found = attribute(model, {place: sae}, difference, TOKENS)[place]
    assert found.latents.shape == (2, 7, 40)
    lens = Lens.of(model)
    assert (lens.norm, lens.centred) == ("ln_final", True)
    assert logit_lens(sae, lens, [0], k=4).promoted.shape == (1, 4)
