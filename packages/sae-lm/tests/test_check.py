"""`check`: a dictionary in its place passes; the wrong model, scale or place does not."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_core import SAE, create
from sae_core.errors import ConfigError, DataError
from sae_lm.checking import CheckError, check
from torch import nn

D = 24
TOKENS = torch.randint(1, 60, (4, 32), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny_llama(0)


def tiny_llama(seed: int) -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=D,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=60,
        initializer_range=0.5,
    )
    torch.manual_seed(seed)  # transformers initialises from the global generator
    return transformers.LlamaForCausalLM(config).eval()


def layer_output(model: Any, layer: int) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS, output_hidden_states=True).hidden_states[layer + 1]


def principal_sae(x: torch.Tensor, components: int, **metadata: Any) -> SAE:
    """A ReLU dictionary of the first principal components, each in both directions: explains as much as they do."""
    rows = x[:, 1:].reshape(-1, D)
    _, _, V = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    both = torch.cat([V[:components], -V[:components]])
    sae = create("standard", d_in=D, d_sae=2 * components)
    with torch.no_grad():
        sae.W_dec.copy_(both)
        sae.W_enc.copy_(both.T)
        sae.get_parameter("b_enc").zero_()
        sae.b_dec.copy_(rows.mean(0))
    sae.metadata = {"hook_name": "blocks.1.hook_resid_post", "hf_hook_name": "model.layers.1", **metadata}
    return sae.eval()


@pytest.mark.parametrize("written", ["model.layers.1.output", "model.layers.1:output", "layers.1"])
def test_a_hook_point_as_other_libraries_write_it_is_found_after_saving_and_loading(
    llama: Any, tmp_path: Path, written: str
):
    sae = principal_sae(layer_output(llama, 1), 20, hook_name=None, hf_hook_name=written)
    report = check(SAE.load(sae.save(tmp_path / "sae")), llama, TOKENS)
    assert report.place == "model.layers.1"
    assert report.explained_variance > 0.9


def test_a_dictionary_in_its_place_passes_and_reports_what_was_measured(llama: Any):
    x = layer_output(llama, 1)
    sae = principal_sae(x, 12)
    report = check(sae, llama, TOKENS)
    rows = x[:, 1:].reshape(-1, D)
    values = torch.linalg.svdvals(rows - rows.mean(0)) ** 2
    assert report.explained_variance == pytest.approx(float(values[:12].sum() / values.sum()), abs=1e-4)
    assert report.l0 == pytest.approx(12.0)  # of each pair, one direction fires
    assert (report.positions, report.place) == (4 * 31, "model.layers.1")


def test_another_model_of_the_same_shape_fails_and_the_right_one_is_named(llama: Any):
    sae = principal_sae(layer_output(llama, 1), 1, sae_core={"base_model": "lab/small"})
    with pytest.raises(
        CheckError, match=r"at least 0\.10 was expected\nthis SAE is for lab/small, blocks\.1\.hook"
    ) as caught:
        check(sae, tiny_llama(1), TOKENS)
    assert caught.value.report.explained_variance < 0.1


def test_a_scale_that_was_forgotten_fails(llama: Any):
    sae = principal_sae(layer_output(llama, 1), 12)
    with torch.no_grad():
        sae.W_dec *= 4
    with pytest.raises(CheckError, match="explained variance -"):
        check(sae, llama, TOKENS)


def test_a_dictionary_that_never_fires_fails(llama: Any):
    sae = principal_sae(layer_output(llama, 1), 12)
    with torch.no_grad():
        sae.get_parameter("b_enc").fill_(-1e6)
    with pytest.raises(CheckError, match="no latent fires"):
        check(sae, llama, TOKENS, min_explained_variance=-1.0)


def test_a_published_l0_far_from_the_measured_one_fails(llama: Any):
    sae = principal_sae(layer_output(llama, 1), 12, l0=500.0)
    with pytest.raises(CheckError, match=r"12\.0 latents fire on average .* published is 500"):
        check(sae, llama, TOKENS)


def test_a_poor_dictionary_that_was_published_as_poor_passes(llama: Any):
    sae = principal_sae(layer_output(llama, 1), 12, variance_explained=-3.0)
    with torch.no_grad():
        sae.W_dec *= 2.8
    assert -3.3 < check(sae, llama, TOKENS).explained_variance < 0


def test_centred_weights_of_training_are_imitated(llama: Any):
    """GPT-2 SAEs were trained with TransformerLens's centred weights: activations without their mean over features."""
    shifted = layer_output(llama, 1)
    sae = principal_sae(shifted - shifted.mean(-1, keepdim=True), 20)
    plain = check(sae, llama, TOKENS, min_explained_variance=-9.0).explained_variance
    sae.metadata["model_from_pretrained_kwargs"] = {"center_writing_weights": True}
    assert check(sae, llama, TOKENS).explained_variance > plain + 0.01


def test_inputs_of_modules_are_hook_points_too(llama: Any):
    sae = principal_sae(
        layer_output(llama, 1), 12, hook_name="blocks.2.hook_resid_pre", hf_hook_name="model.layers.2:input"
    )
    assert check(sae, llama, TOKENS).place == "model.layers.2:input"


def test_a_transcoder_is_judged_by_what_it_predicts(llama: Any):
    sae = create("standard", d_in=D, d_out=D, d_sae=8, apply_b_dec_to_input=False)
    sae.metadata = {"hf_hook_name": "model.layers.1.mlp:input", "hf_hook_name_out": "model.layers.1.mlp"}
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.zero_()
        sae.get_parameter("b_enc").fill_(1.0)
    with pytest.raises(CheckError) as caught:  # predicts zero, which explains nothing
        check(sae, llama, TOKENS)
    report = caught.value.report
    assert report.place == "model.layers.1.mlp:input -> model.layers.1.mlp"
    assert report.explained_variance < 0.05


def test_in_a_transformerlens_model_the_hook_point_is_a_module_of_its_own():
    class HookedBlock(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hook_resid_post = nn.Identity()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.hook_resid_post(x * 2)

    class HookedModel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(60, D)
            self.blocks = nn.ModuleList([HookedBlock(), HookedBlock()])

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            x = self.embed(tokens)
            for block in self.blocks:
                x = block(x)
            return x

    model = HookedModel()
    sae = principal_sae(model(TOKENS).detach(), 12)
    assert check(sae, model, TOKENS).place == "blocks.1.hook_resid_post"


def test_a_place_the_model_does_not_have_is_an_error_with_a_near_one(llama: Any):
    sae = principal_sae(layer_output(llama, 1), 12, hf_hook_name="model.layers.9")
    with pytest.raises(ConfigError, match=r"LlamaForCausalLM has no module .*model\.layers\.9; did you mean"):
        check(sae, llama, TOKENS)


def test_without_a_hook_point_one_must_be_given(llama: Any):
    sae = principal_sae(layer_output(llama, 1), 12)
    sae.metadata = {}
    with pytest.raises(ConfigError, match="say where it belongs"):
        check(sae, llama, TOKENS)
    assert check(sae, llama, TOKENS, at="model.layers.1").explained_variance > 0.3


def test_another_width_is_an_error_of_shape(llama: Any):
    sae = create("standard", d_in=D + 1, d_sae=8)
    sae.metadata = {"hf_hook_name": "model.layers.1"}
    with pytest.raises(DataError, match="the SAE's width there is 25"):
        check(sae, llama, TOKENS)


def test_too_few_tokens_are_refused(llama: Any):
    sae = principal_sae(layer_output(llama, 1), 12)
    with pytest.raises(DataError, match="more than 1 positions"):
        check(sae, llama, TOKENS[:, :1])


def test_the_sample_text_is_tokenised_by_the_given_tokenizer_with_bos(llama: Any):
    seen: list[str] = []

    class Letters:
        bos_token_id = 59

        def __call__(self, text: str) -> dict[str, list[int]]:
            seen.append(text)
            return {"input_ids": [ord(character) % 50 for character in text[:200]]}

    report = check(principal_sae(layer_output(llama, 1), 20), llama, tokenizer=Letters(), min_explained_variance=-9.0)
    assert report.positions == 200  # BOS was put in front, and is left out
    assert "refractive index" in seen[0]


def test_a_model_that_names_no_tokenizer_needs_tokens(llama: Any):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ConfigError, match="give tokens= or tokenizer="):
            check(principal_sae(layer_output(llama, 1), 12), llama)
