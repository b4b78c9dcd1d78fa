"""Formats whose original cannot be installed here: files in the published layout against the published formula.

Every formula is written out from the original's own description, with the file's own names and orientation, and knows
nothing of how the loader maps them.
"""

# B rows, D d_in, F d_sae, O d_out, L layers or inputs

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from sae_core import SAE
from sae_core.errors import ConfigError, FormatError
from sae_core.format.files import LocalFiles
from sae_core.format.read import read_sae
from safetensors.torch import save_file
from torch import Tensor

B, D, F = 7, 8, 24


class Drawn:
    """Random tensors from one seed."""

    def __init__(self, seed: int = 0) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int, scale: float = 0.5) -> Tensor:
        return scale * torch.randn(*shape, generator=self._generator)

    def positive(self, *shape: int) -> Tensor:
        return 0.1 + torch.rand(*shape, generator=self._generator)


@pytest.fixture
def draw() -> Drawn:
    return Drawn()


def assert_computes(sae: SAE, x: Tensor, acts: Tensor, out: Tensor) -> None:
    assert 0 < (acts != 0).double().mean() < 0.95, "a formula that keeps everything or nothing tests little"
    with torch.no_grad():
        for found, expected in ((sae.encode(x), acts), (sae(x), out)):
            torch.testing.assert_close(found, expected, rtol=0, atol=2e-6 * max(1.0, expected.abs().max().item()))
        assert torch.equal(sae.encode(x) != 0, acts != 0)


def largest(pre_BF: Tensor, k: int, by_BF: Tensor | None = None) -> Tensor:
    """Zero where an entry is not among the k that `by_BF` ranks first."""
    chosen = (pre_BF if by_BF is None else by_BF).topk(k, dim=-1).indices
    return torch.zeros_like(pre_BF).scatter(-1, chosen, pre_BF.gather(-1, chosen))


# ----------------------------------------------------------------------------------------------------------------------
# openai


def openai_file(path: Path, draw: Drawn, **more: Any) -> dict[str, Tensor]:
    tensors = {
        "pre_bias": draw(D),
        "latent_bias": draw(F),
        "encoder.weight": draw(F, D),
        "decoder.weight": draw(D, F),
        "stats_last_nonzero": torch.zeros(F, dtype=torch.long),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({**tensors, **more}, path)
    return tensors


def test_openai_topk_normalises_each_row_and_undoes_it(tmp_path: Path, draw: Drawn):
    path = tmp_path / "resid_post_mlp_v5_32k/autoencoders/6.pt"
    t = openai_file(path, draw, activation="TopK", activation_state_dict={"k": 5, "postact_fn": "ReLU"})
    sae = SAE.load(path)
    x = draw(B, D, scale=3.0) + 1.0
    mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
    z = (x - mean) / (std + 1e-5)
    acts = largest((z - t["pre_bias"]) @ t["encoder.weight"].T + t["latent_bias"], 5).relu()
    assert_computes(sae, x, acts, (acts @ t["decoder.weight"].T + t["pre_bias"]) * std + mean)
    assert sae.metadata["hook_name"] == "blocks.6.hook_resid_post"


def test_openai_relu_does_not_normalise(tmp_path: Path, draw: Drawn):
    t = openai_file(tmp_path / "a.pt", draw, activation="ReLU", activation_state_dict={})
    x = draw(B, D, scale=3.0)
    acts = ((x - t["pre_bias"]) @ t["encoder.weight"].T + t["latent_bias"]).relu()
    assert_computes(SAE.load(tmp_path / "a.pt"), x, acts, acts @ t["decoder.weight"].T + t["pre_bias"])


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({}, "activation is None"),
        ({"activation": "Identity", "activation_state_dict": {}}, "'Identity'"),
        ({"activation": "TopK", "activation_state_dict": {"postact_fn": "ReLU"}}, "no whole number k"),
        ({"activation": "TopK", "activation_state_dict": {"k": 5, "postact_fn": "Identity"}}, "'Identity'"),
        ({"activation": "TopK", "activation_state_dict": {"k": 5, "postact_fn": "ReLU", "eps": 1}}, "'eps'"),
        ({"activation": "ReLU", "activation_state_dict": {"k": 5}}, "state of its own"),
    ],
)
def test_openai_activations_that_are_not_ours_are_refused(tmp_path: Path, draw: Drawn, more: dict[str, Any], said: str):
    openai_file(tmp_path / "a.pt", draw, **more)
    with pytest.raises(FormatError, match=said):
        SAE.load(tmp_path / "a.pt")


# ----------------------------------------------------------------------------------------------------------------------
# openmoss and its two older layouts


def openmoss_config(**changes: Any) -> dict[str, Any]:
    config = {
        "sae_type": "sae",
        "d_model": D,
        "expansion_factor": F / D,
        "act_fn": "relu",
        "norm_activation": "dataset-wise",
        "hook_point_in": "blocks.4.hook_resid_post",
        "hook_point_out": "blocks.4.hook_resid_post",
        "sparsity_include_decoder_norm": True,
        "use_decoder_bias": True,
        "top_k": 5,
        "dtype": "torch.float32",
        "device": "cuda",
    }
    return config | changes


def openmoss_folder(folder: Path, draw: Drawn, config: dict[str, Any], **more: Tensor) -> dict[str, Tensor]:
    tensors = {"W_E": draw(D, F), "b_E": draw(F), "W_D": draw(F, D), "b_D": draw(D), **more}
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "sae_weights.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return tensors


NORM = "dataset_average_activation_norm.blocks.4."


def test_openmoss_jumprelu_compares_latents_times_decoder_norms_with_exp_of_the_threshold(tmp_path: Path, draw: Drawn):
    config = openmoss_config(act_fn="jumprelu")
    log = draw(F)
    more = {"activation_function.log_jumprelu_threshold": log, f"{NORM}hook_resid_post": torch.tensor(5.5)}
    t = openmoss_folder(tmp_path, draw, config, **more)
    x = draw(B, D, scale=3.0)
    scale = math.sqrt(D) / 5.5
    pre = (x * scale @ t["W_E"] + t["b_E"]) * t["W_D"].norm(dim=1)
    acts = torch.where(pre > log.exp(), pre, 0.0) / t["W_D"].norm(dim=1)
    assert_computes(SAE.load(tmp_path), x, acts, (acts @ t["W_D"] + t["b_D"]) / scale)


def test_openmoss_without_decoder_norms_compares_latents_themselves(tmp_path: Path, draw: Drawn):
    config = openmoss_config(act_fn="jumprelu", sparsity_include_decoder_norm=False, norm_activation="inference")
    log = draw(F)
    t = openmoss_folder(tmp_path, draw, config, **{"activation_function.log_jumprelu_threshold": log})
    x = draw(B, D, scale=3.0)
    pre = x @ t["W_E"] + t["b_E"]
    acts = torch.where(pre > log.exp(), pre, 0.0)
    assert_computes(SAE.load(tmp_path), x, acts, acts @ t["W_D"] + t["b_D"])


def test_openmoss_token_wise_scales_every_row_to_norm_sqrt_d(tmp_path: Path, draw: Drawn):
    t = openmoss_folder(tmp_path, draw, openmoss_config(norm_activation="token-wise"))
    x = draw(B, D, scale=3.0)
    scale = math.sqrt(D) / x.norm(dim=-1, keepdim=True)
    acts = (x * scale @ t["W_E"] + t["b_E"]).relu()
    assert_computes(SAE.load(tmp_path), x, acts, (acts @ t["W_D"] + t["b_D"]) / scale)


def test_openmoss_topk_ranks_by_decoder_norm_and_reports_latents_without_it(tmp_path: Path, draw: Drawn):
    W_D = draw(F, D)
    unit = W_D / W_D.norm(dim=1, keepdim=True)
    config = openmoss_config(act_fn="topk", norm_activation="inference")
    t = openmoss_folder(tmp_path, draw, config, W_D=unit)
    x = draw(B, D, scale=3.0)
    acts = largest(x @ t["W_E"] + t["b_E"], 5).relu()
    assert_computes(SAE.load(tmp_path), x, acts, acts @ t["W_D"] + t["b_D"])


def test_openmoss_topk_with_other_decoder_norms_loads_only_in_units_that_the_caller_accepts(
    tmp_path: Path, draw: Drawn
):
    t = openmoss_folder(tmp_path, draw, openmoss_config(act_fn="topk", norm_activation="inference"))
    with pytest.raises(FormatError, match="latents_in_decoder_units"):
        SAE.load(tmp_path)
    x, norms = draw(B, D, scale=3.0), t["W_D"].norm(dim=1)
    in_decoder_units = largest((x @ t["W_E"] + t["b_E"]) * norms, 5).relu()
    sae = SAE.load(tmp_path, overrides={"latents_in_decoder_units": True})
    assert_computes(sae, x, in_decoder_units, in_decoder_units / norms @ t["W_D"] + t["b_D"])


def test_openmoss_fields_that_are_missing_have_the_librarys_defaults(tmp_path: Path, draw: Drawn):
    """lm-saes 2: ReLU, dataset-wise norms, decoder norms in the comparison, a decoder bias, and k = 50 for TopK."""
    bare = {
        key: openmoss_config()[key]
        for key in ("sae_type", "d_model", "expansion_factor", "hook_point_in", "hook_point_out")
    }
    t = openmoss_folder(tmp_path / "relu", draw, bare, **{f"{NORM}hook_resid_post": torch.tensor(5.5)})
    x, scale = draw(B, D, scale=3.0), math.sqrt(D) / 5.5
    acts = (x * scale @ t["W_E"] + t["b_E"]).relu()
    assert_computes(SAE.load(tmp_path / "relu"), x, acts, (acts @ t["W_D"] + t["b_D"]) / scale)
    wide = {**bare, "expansion_factor": 8, "act_fn": "topk", "norm_activation": "inference"}
    wide["sparsity_include_decoder_norm"] = False
    openmoss_folder(tmp_path / "topk", draw, wide, W_E=draw(D, 64), b_E=draw(64), W_D=draw(64, D))
    assert SAE.load(tmp_path / "topk").config.k == 50  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [("top_k", 0, "key 'top_k' is 0, expected at least 1"), ("hook_point_out", None, "'hook_point_out'")],
)
def test_openmoss_settings_that_mean_nothing_are_refused(
    tmp_path: Path, draw: Drawn, key: str, value: object, said: str
):
    config = openmoss_config(act_fn="topk", norm_activation="inference")
    openmoss_folder(tmp_path / "said", draw, config | {key: value})
    with pytest.raises(FormatError, match=said):
        SAE.load(tmp_path / "said")


def test_openmoss_without_a_target_is_not_taken_for_an_sae(tmp_path: Path, draw: Drawn):
    config = {
        key: value for key, value in openmoss_config(norm_activation="inference").items() if key != "hook_point_out"
    }
    openmoss_folder(tmp_path, draw, config)
    with pytest.raises(FormatError, match="'hook_point_out' is missing"):
        SAE.load(tmp_path)


def test_openmoss_transcoders_scale_outputs_by_their_own_norm(tmp_path: Path, draw: Drawn):
    config = openmoss_config(hook_point_in="blocks.4.ln2.hook_normalized", hook_point_out="blocks.4.hook_mlp_out")
    norms = {f"{NORM}ln2.hook_normalized": torch.tensor(4.0), f"{NORM}hook_mlp_out": torch.tensor(0.7)}
    t = openmoss_folder(tmp_path, draw, config, **norms)
    x = draw(B, D, scale=3.0)
    acts = (x * math.sqrt(D) / 4.0 @ t["W_E"] + t["b_E"]).relu()
    sae = SAE.load(tmp_path)
    assert_computes(sae, x, acts, (acts @ t["W_D"] + t["b_D"]) * 0.7 / math.sqrt(D))
    assert (sae.architecture, sae.config.d_out) == ("standard", D)
    assert sae.metadata["hook_name_out"] == "blocks.4.hook_mlp_out"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"act_fn": "batchtopk"}, "'batchtopk'"),
        ({"norm_activation": "batch-wise"}, "'batch-wise'"),
        ({"use_glu_encoder": True}, "use_glu_encoder"),
        ({"sae_type": "crosscoder"}, "'crosscoder'"),
        ({"norm_activation": "token-wise", "hook_point_out": "blocks.4.hook_mlp_out"}, "token-wise transcoder"),
        ({"act_fn": "jumprelu"}, "log_jumprelu_threshold"),
        ({}, "dataset_average_activation_norm"),
    ],
)
def test_openmoss_dictionaries_that_nothing_here_computes_are_refused(
    tmp_path: Path, draw: Drawn, changes: dict[str, Any], said: str
):
    openmoss_folder(tmp_path, draw, openmoss_config(**changes))
    with pytest.raises(FormatError, match=said):
        SAE.load(tmp_path)


def llama_scope_folder(folder: Path, draw: Drawn, **changes: Any) -> dict[str, Tensor]:
    hyper = {
        "d_model": D,
        "d_sae": F,
        "act_fn": "jumprelu",
        "jump_relu_threshold": 0.8,
        "use_glu_encoder": False,
        "use_decoder_bias": True,
        "norm_activation": "dataset-wise",
        "hook_point_in": "blocks.4.hook_resid_post",
        "hook_point_out": "blocks.4.hook_resid_post",
        "apply_decoder_bias_to_pre_encoder": False,
        "sparsity_include_decoder_norm": True,
        "dataset_average_activation_norm": {"in": 6.0, "out": 6.0},
    }
    tensors = {
        "encoder.weight": draw(F, D),
        "encoder.bias": draw(F),
        "decoder.weight": draw(D, F),
        "decoder.bias": draw(D),
    }
    (folder / "checkpoints").mkdir(parents=True)
    save_file(tensors, folder / "checkpoints/final.safetensors")
    (folder / "hyperparams.json").write_text(json.dumps(hyper | changes))
    return tensors


def test_llama_scope_without_decoder_norms_compares_latents_in_the_units_of_the_input(tmp_path: Path, draw: Drawn):
    norms = {"in": 6.0, "out": 1.5}
    t = llama_scope_folder(
        tmp_path,
        draw,
        sparsity_include_decoder_norm=False,
        hook_point_in="blocks.4.ln2.hook_normalized",
        hook_point_out="blocks.4.hook_mlp_out",
        dataset_average_activation_norm=norms,
    )
    x = draw(B, D, scale=3.0)
    into, out = math.sqrt(D) / norms["in"], math.sqrt(D) / norms["out"]
    # the original divides the scale out of the encoder's bias and then compares: x W + b / into > threshold
    in_model_units = x @ t["encoder.weight"].T + t["encoder.bias"] / into
    acts = torch.where(in_model_units > 0.8, in_model_units, 0.0) * into
    assert_computes(SAE.load(tmp_path), x, acts, (acts @ t["decoder.weight"].T + t["decoder.bias"]) / out)


@pytest.mark.parametrize("subtracts", [False, True])
def test_llama_scope_compares_contributions_in_the_units_of_the_model(tmp_path: Path, draw: Drawn, subtracts: bool):
    t = llama_scope_folder(tmp_path, draw, apply_decoder_bias_to_pre_encoder=subtracts)
    x = draw(B, D, scale=3.0)
    scale = math.sqrt(D) / 6.0
    centred = x * scale - (t["decoder.bias"] if subtracts else 0.0)
    pre = centred @ t["encoder.weight"].T + t["encoder.bias"]
    length_in_model_units = pre * t["decoder.weight"].norm(dim=0) / scale
    acts = torch.where(length_in_model_units > 0.8, pre, 0.0)
    assert_computes(SAE.load(tmp_path), x, acts, (acts @ t["decoder.weight"].T + t["decoder.bias"]) / scale)


def test_llama_scope_transcoders_have_a_scale_for_each_side(tmp_path: Path, draw: Drawn):
    t = llama_scope_folder(
        tmp_path,
        draw,
        hook_point_in="blocks.4.ln2.hook_normalized",
        hook_point_out="blocks.4.hook_mlp_out",
        dataset_average_activation_norm={"in": 6.0, "out": 1.5},
    )
    x = draw(B, D, scale=3.0)
    into, out = math.sqrt(D) / 6.0, math.sqrt(D) / 1.5
    pre = x * into @ t["encoder.weight"].T + t["encoder.bias"]
    acts = torch.where(pre * t["decoder.weight"].norm(dim=0) / out > 0.8, pre, 0.0)
    sae = SAE.load(tmp_path)
    assert (sae.architecture, sae.config.d_out) == ("jumprelu", D)
    assert_computes(sae, x, acts, (acts @ t["decoder.weight"].T + t["decoder.bias"]) / out)


def test_a_scaling_factor_that_contradicts_the_norms_in_the_files_is_refused(tmp_path: Path, draw: Drawn):
    llama_scope_folder(tmp_path, draw)
    SAE.load(tmp_path, overrides={"norm_scaling_factor": math.sqrt(D) / 6.0 * 1.001})
    with pytest.raises(FormatError, match="scaling factor"):
        SAE.load(tmp_path, overrides={"norm_scaling_factor": 1.0})


def r1_distill_folder(folder: Path, draw: Drawn, **more: Tensor) -> dict[str, Tensor]:
    hook = "blocks.4.hook_resid_post"
    config = {
        "d_model": D,
        "expansion_factor": F // D,
        "act_fn": "jumprelu",
        "use_glu_encoder": False,
        "use_decoder_bias": True,
        "apply_decoder_bias_to_pre_encoder": False,
        "norm_activation": "dataset-wise",
        "hook_point_in": hook,
        "hook_point_out": hook,
        "sparsity_include_decoder_norm": True,
    }
    tensors = {
        "encoder.weight": draw(F, D),
        "encoder.bias": draw(F),
        "decoder.weight": draw(D, F),
        "decoder.bias": draw(D),
        "log_jumprelu_threshold": draw(F),
        **more,
    }
    save_file(tensors, folder / "sae_weights.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return tensors


@pytest.mark.parametrize("stored", [True, False])
def test_r1_distill_takes_its_scale_from_the_file_or_from_a_fact_and_from_nowhere_else(
    tmp_path: Path, draw: Drawn, stored: bool
):
    norm = {"dataset_average_activation_norm.blocks.4.hook_resid_post": torch.tensor(6.0)} if stored else {}
    t = r1_distill_folder(tmp_path, draw, **norm)
    scale = math.sqrt(D) / 6.0
    if not stored:
        with pytest.raises(FormatError, match="norm_scaling_factor"):
            SAE.load(tmp_path)
    x, norms = draw(B, D, scale=3.0), t["decoder.weight"].norm(dim=0)
    pre = x * scale @ t["encoder.weight"].T + t["encoder.bias"]
    acts = torch.where(pre * norms > t["log_jumprelu_threshold"].exp(), pre, 0.0)
    sae = SAE.load(tmp_path, overrides=None if stored else {"norm_scaling_factor": scale})
    assert_computes(sae, x, acts, (acts @ t["decoder.weight"].T + t["decoder.bias"]) / scale)


def test_a_latent_with_a_zero_decoder_row_never_fires_where_its_contribution_is_what_is_compared(
    tmp_path: Path, draw: Drawn
):
    decoder = draw(D, F)
    decoder[:, 3] = 0.0
    t = r1_distill_folder(tmp_path, draw, **{"decoder.weight": decoder})
    x = draw(B, D, scale=100.0)
    sae = SAE.load(tmp_path, overrides={"norm_scaling_factor": 1.0})
    pre = x @ t["encoder.weight"].T + t["encoder.bias"]
    assert (pre[:, 3] > 0).any()
    assert not sae.encode(x)[:, 3].any()


# ----------------------------------------------------------------------------------------------------------------------
# circuit-tracer's layouts


def layer_transcoder(
    folder: Path, draw: Drawn, config: dict[str, Any] | None = None, **more: Tensor
) -> dict[str, Tensor]:
    tensors = {"W_enc": draw(F, D), "b_enc": draw(F), "W_dec": draw(F, D), "b_dec": draw(D), **more}
    save_file(tensors, folder / "layer_3.safetensors")
    hooks = {"model_name": "Qwen/Qwen3-4B", "feature_input_hook": "mlp.hook_in", "feature_output_hook": "hook_mlp_out"}
    (folder / "config.yaml").write_text(yaml.safe_dump(config or hooks))
    return tensors


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("activation", ["relu", "threshold", "k"])
def test_circuit_tracers_transcoders_of_every_activation(tmp_path: Path, draw: Drawn, activation: str, skip: bool):
    more: dict[str, Tensor] = {"W_skip": draw(D, D)} if skip else {}
    threshold = draw.positive(1, F)
    if activation == "threshold":
        more["activation_function.threshold"] = threshold
    elif activation == "k":
        more["k"] = torch.tensor(4)
    t = layer_transcoder(tmp_path, draw, **more)
    x = draw(B, D, scale=3.0)
    pre = x @ t["W_enc"].T + t["b_enc"]
    acts = {
        "relu": lambda: pre.relu(),
        "threshold": lambda: torch.where(pre > threshold, pre, 0.0),
        "k": lambda: largest(pre, 4),
    }[activation]()
    out = acts @ t["W_dec"] + t["b_dec"] + (x @ t["W_skip"].T if skip else 0.0)
    sae = read_sae(LocalFiles(tmp_path), "layer_3.safetensors")
    assert_computes(sae, x, acts, out)
    assert sae.metadata["hook_name"] == "blocks.3.mlp.hook_in"
    assert sae.metadata["model_name"] == "Qwen/Qwen3-4B"


@pytest.mark.parametrize("kind", ["threshold", "k"])
def test_what_circuit_tracer_lets_through_below_zero_is_kept(tmp_path: Path, draw: Drawn, kind: str):
    threshold = torch.linspace(-0.9, 1, F)
    more = {"activation_function.threshold": threshold} if kind == "threshold" else {"k": torch.tensor(F - 3)}
    t = layer_transcoder(tmp_path, draw, **more)
    x = draw(B, D, scale=3.0)
    pre = x @ t["W_enc"].T + t["b_enc"]
    acts = torch.where(pre > threshold, pre, 0.0) if kind == "threshold" else largest(pre, F - 3)
    sae = SAE.load(tmp_path / "layer_3.safetensors")
    assert (acts < 0).any()
    assert sae.config.apply_relu is False
    assert_computes(sae, x, acts, acts @ t["W_dec"] + t["b_dec"])
    assert_computes(SAE.load(sae.save(tmp_path / "ours")), x, acts, acts @ t["W_dec"] + t["b_dec"])


def test_a_single_layers_file_loads_with_the_facts_that_its_repository_would_say(tmp_path: Path, draw: Drawn):
    t = layer_transcoder(tmp_path, draw)
    (tmp_path / "config.yaml").unlink()
    with pytest.raises(FormatError, match="format='mwhanna_transcoder' and the facts hook_name and hook_name_out"):
        SAE.load(tmp_path / "layer_3.safetensors")
    facts = {"hook_name": "blocks.3.mlp.hook_in"}
    with pytest.raises(FormatError, match="load with the fact hook_name_out"):
        SAE.load(tmp_path / "layer_3.safetensors", format="mwhanna_transcoder", overrides=facts)
    facts["hook_name_out"] = "blocks.3.hook_mlp_out"
    sae = SAE.load(tmp_path / "layer_3.safetensors", format="mwhanna_transcoder", overrides=facts)
    x = draw(B, D, scale=3.0)
    acts = (x @ t["W_enc"].T + t["b_enc"]).relu()
    assert_computes(sae, x, acts, acts @ t["W_dec"] + t["b_dec"])
    assert (sae.metadata["hook_name"], sae.metadata["hook_name_out"]) == tuple(facts.values())


def cross_layer(folder: Path, draw: Drawn, layers: int, *, thresholds: bool = False) -> list[dict[str, Tensor]]:
    written: list[dict[str, Tensor]] = []
    for n in range(layers):
        t = {f"W_enc_{n}": draw(F, D), f"b_enc_{n}": draw(F), f"b_dec_{n}": draw(D)}
        if thresholds:
            t[f"threshold_{n}"] = draw.positive(F)
        decoder = {f"W_dec_{n}": draw(F, layers - n, D)}
        save_file(t, folder / f"W_enc_{n}.safetensors")
        save_file(decoder, folder / f"W_dec_{n}.safetensors")
        written.append(t | decoder)
    hooks = {"model_name": "google/gemma-2-2b", "feature_input_hook": "hook_resid_mid"}
    (folder / "config.yaml").write_text(yaml.safe_dump(hooks | {"feature_output_hook": "hook_mlp_out"}))
    return written


@pytest.mark.parametrize("thresholds", [False, True])
def test_views_by_target_layer_add_up_to_the_cross_layer_transcoder(tmp_path: Path, draw: Drawn, thresholds: bool):
    layers = 3
    files = cross_layer(tmp_path, draw, layers, thresholds=thresholds)
    residual = draw(layers, B, D, scale=3.0)
    source = LocalFiles(tmp_path)
    for target in range(layers):
        expected = files[target][f"b_dec_{target}"].expand(B, D)
        found = torch.zeros(B, D)
        for n in range(target + 1):
            pre = residual[n] @ files[n][f"W_enc_{n}"].T + files[n][f"b_enc_{n}"]
            acts = torch.where(pre > files[n][f"threshold_{n}"], pre, 0.0) if thresholds else pre.relu()
            expected = expected + acts @ files[n][f"W_dec_{n}"][:, target - n]
            sae = read_sae(source, str(n), overrides={"decoder": target})
            torch.testing.assert_close(sae.encode(residual[n]), acts, rtol=0, atol=1e-5)
            found += sae(residual[n]).detach()
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    with pytest.raises(ConfigError, match="layers 1 to 2; the fact decoder is 0"):
        read_sae(source, "1", overrides={"decoder": 0})
    with pytest.warns(UserWarning, match="decoders added up"):
        summed = read_sae(source, "W_enc_1.safetensors")
    torch.testing.assert_close(summed.W_dec.detach(), files[1]["W_dec_1"].sum(1), rtol=0, atol=1e-6)


# ----------------------------------------------------------------------------------------------------------------------
# saev


def saev_file(path: Path, draw: Drawn, header: dict[str, Any], **more: Tensor) -> dict[str, Tensor]:
    tensors = {"W_enc": draw(D, F), "b_enc": draw(F), "W_dec": draw(F, D), "b_dec": draw(D), **more}
    weights = io.BytesIO()
    torch.save(tensors, weights)
    path.write_bytes(json.dumps(header).encode() + b"\n" + weights.getvalue())
    return tensors


def saev_header(cls: str, params: dict[str, Any], schema: int = 5) -> dict[str, Any]:
    cfg = {"d_model": D, "d_sae": F, "normalize_w_dec": True, "seed": 0, "activation": {"cls": cls, "params": params}}
    return {"schema": schema, "commit": "0123", "lib": "0.2", "cfg": cfg}


def test_saev_relu_encodes_without_subtracting_the_bias(tmp_path: Path, draw: Drawn):
    t = saev_file(tmp_path / "sae.pt", draw, saev_header("Relu", {"sparsity": {"coeff": 1e-3}}))
    x = draw(B, D, scale=3.0)
    acts = (x @ t["W_enc"] + t["b_enc"]).relu()
    assert_computes(SAE.load(tmp_path / "sae.pt"), x, acts, acts @ t["W_dec"] + t["b_dec"])


@pytest.mark.parametrize("subtracts", [False, True])
def test_saev_files_of_unknown_convention_need_the_callers_word(tmp_path: Path, draw: Drawn, subtracts: bool):
    header = {"d_vit": D, "exp_factor": F // D, "n_reinit_samples": 8, "seed": 0}
    t = saev_file(tmp_path / "sae.pt", draw, header)
    with pytest.raises(FormatError, match="apply_b_dec_to_input"):
        SAE.load(tmp_path / "sae.pt")
    x = draw(B, D, scale=3.0)
    acts = ((x - t["b_dec"] if subtracts else x) @ t["W_enc"] + t["b_enc"]).relu()
    sae = SAE.load(tmp_path / "sae.pt", overrides={"apply_b_dec_to_input": subtracts})
    assert_computes(sae, x, acts, acts @ t["W_dec"] + t["b_dec"])


def test_saev_topk_keeps_negative_latents(tmp_path: Path, draw: Drawn):
    t = saev_file(tmp_path / "sae.pt", draw, saev_header("TopK", {"top_k": F - 4}))
    x = draw(B, D, scale=3.0)
    acts = largest(x @ t["W_enc"] + t["b_enc"], F - 4)
    assert (acts < 0).any()
    assert_computes(SAE.load(tmp_path / "sae.pt"), x, acts, acts @ t["W_dec"] + t["b_dec"])


def test_saev_batchtopk_uses_its_threshold_and_is_refused_without(tmp_path: Path, draw: Drawn):
    header = saev_header("BatchTopK", {"top_k": 5, "momentum": 0.1})
    t = saev_file(tmp_path / "sae.pt", draw, header, **{"activation.threshold": torch.tensor(0.9)})
    x = draw(B, D, scale=3.0)
    pre = x @ t["W_enc"] + t["b_enc"]
    acts = torch.where(pre > 0.9, pre, 0.0)
    assert_computes(SAE.load(tmp_path / "sae.pt"), x, acts, acts @ t["W_dec"] + t["b_dec"])
    saev_file(tmp_path / "old.pt", draw, header)
    with pytest.raises(FormatError, match="depends on the rest of the batch"):
        SAE.load(tmp_path / "old.pt")


@pytest.mark.parametrize(
    ("header", "said"),
    [({"schema": 6, "cfg": {}}, "schema 6 is unknown"), (saev_header("Softmax", {}), "Softmax")],
)
def test_saev_files_of_unknown_kind_are_refused(tmp_path: Path, draw: Drawn, header: dict[str, Any], said: str):
    saev_file(tmp_path / "sae.pt", draw, header)
    with pytest.raises(FormatError, match=said):
        SAE.load(tmp_path / "sae.pt")


# ----------------------------------------------------------------------------------------------------------------------
# crosscoders


def crosscoder_folder(
    folder: Path, draw: Drawn, config: dict[str, Any], *, inputs: int = 2, **more: Tensor
) -> dict[str, Tensor]:
    tensors = {
        "encoder.weight": draw(inputs, D, F),
        "encoder.bias": draw(F),
        "decoder.weight": draw(2, F, D),
        "decoder.bias": draw(2, D),
        **more,
    }
    save_file(tensors, folder / "model.safetensors")
    basic = {"activation_dim": D, "dict_size": F, "num_layers": 2, "model_type": "CrossCoder"}
    (folder / "config.json").write_text(json.dumps(basic | config))
    return tensors


CODE_NORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "CROSSCODER": lambda W_LFD: W_LFD.norm(dim=2).sum(0),
    "SAE": lambda W_LFD: W_LFD.square().sum((0, 2)).sqrt(),
    "MIXED": lambda W_LFD: 0.7 * W_LFD.square().sum((0, 2)).sqrt() + 0.2 * W_LFD.norm(dim=2).sum(0),
    "NONE": lambda W_LFD: torch.ones(F),
}


def cross_code(t: dict[str, Tensor], x_BLD: Tensor) -> Tensor:
    return torch.einsum("bld,ldf->bf", x_BLD, t["encoder.weight"]) + t["encoder.bias"]


def cross_decode(t: dict[str, Tensor], acts: Tensor) -> Tensor:
    return torch.einsum("bf,lfd->bld", acts, t["decoder.weight"]) + t["decoder.bias"]


def test_a_crosscoder_is_a_dictionary_on_concatenated_activations(tmp_path: Path, draw: Drawn):
    t = crosscoder_folder(tmp_path, draw, {})
    x = draw(B, 2, D, scale=3.0)
    acts = cross_code(t, x).relu()
    assert_computes(SAE.load(tmp_path), x.flatten(1), acts, cross_decode(t, acts).flatten(1))


@pytest.mark.parametrize("code", CODE_NORMS)
def test_a_batchtopk_crosscoder_compares_latents_times_the_code_norm(tmp_path: Path, draw: Drawn, code: str):
    config = {
        "code_normalization": code,
        "k": 5,
        "code_normalization_alpha_sae": 0.7,
        "code_normalization_alpha_cc": 0.2,
    }
    number = torch.tensor(list(CODE_NORMS).index(code) + 1)
    more = {"threshold": torch.tensor(1.7), "k": torch.tensor(5), "code_normalization_id": number}
    t = crosscoder_folder(tmp_path, draw, config, **more)
    x = draw(B, 2, D, scale=3.0)
    pre = cross_code(t, x).relu()
    acts = pre * (pre * CODE_NORMS[code](t["decoder.weight"]) > 1.7)
    assert_computes(SAE.load(tmp_path), x.flatten(1), acts, cross_decode(t, acts).flatten(1))


def test_a_crosscoders_normaliser_is_folded_into_its_weights(tmp_path: Path, draw: Drawn):
    mean, scale = draw(2, D), draw.positive(2)
    more = {
        "activation_mean": mean,
        "activation_global_scale": scale,
        "activation_std": draw.positive(2, D),
        "target_rms": torch.tensor(1.0),
    }
    t = crosscoder_folder(tmp_path, draw, {}, **more)
    x = draw(B, 2, D, scale=3.0)
    acts = cross_code(t, (x - mean) * scale[:, None]).relu()
    out = cross_decode(t, acts) / (scale + 1e-8)[:, None] + mean
    assert_computes(SAE.load(tmp_path), x.flatten(1), acts, out.flatten(1))


def test_one_inputs_view_exists_only_where_the_latents_read_nothing_else(tmp_path: Path, draw: Drawn):
    (tmp_path / "both").mkdir()
    (tmp_path / "first").mkdir()
    crosscoder_folder(tmp_path / "both", draw, {})
    with pytest.raises(FormatError, match="no view of it by itself"):
        SAE.load(tmp_path / "both", overrides={"only": 0})
    t = crosscoder_folder(tmp_path / "first", draw, {"encoder_layers": [0]}, inputs=1)
    x = draw(B, D, scale=3.0)
    acts = cross_code(t, x[:, None]).relu()
    both = cross_decode(t, acts)
    assert_computes(SAE.load(tmp_path / "first", overrides={"only": 0}), x, acts, both[:, 0])
    whole = SAE.load(tmp_path / "first")
    assert (whole.architecture, whole.config.d_out) == ("standard", 2 * D)
    assert_computes(whole, x, acts, both.flatten(1))


@pytest.mark.parametrize(
    ("config", "more", "said"),
    [
        ({"code_normalization": "DECOUPLED"}, {"threshold": torch.tensor(1.0)}, "a latent for each input"),
        ({"code_normalization": "HALF"}, {}, "HALF"),
        ({"k": 5}, {"threshold": torch.tensor(1.0), "k": torch.tensor(6)}, "k is 6 here, but 5"),
        ({}, {"code_normalization_id": torch.tensor(2)}, "contradicts"),
        ({"latent_processor": "relu6"}, {}, "latent_processor"),
        ({}, {"target_rms": torch.tensor(1.0)}, "normaliser only target_rms"),
    ],
)
def test_crosscoders_that_contradict_themselves_are_refused(
    tmp_path: Path, draw: Drawn, config: dict[str, Any], more: dict[str, Tensor], said: str
):
    crosscoder_folder(tmp_path, draw, config, **more)
    with pytest.raises(FormatError, match=said):
        SAE.load(tmp_path)


def test_the_model_diffing_layout_needs_the_scale_of_its_inputs(tmp_path: Path, draw: Drawn):
    t = {"W_enc": draw(2, D, F), "b_enc": draw(F), "W_dec": draw(F, 2, D), "b_dec": draw(2, D)}
    torch.save(t, tmp_path / "cc_weights.pt")
    config = {"d_in": D, "dict_size": F, "hook_point": "blocks.14.hook_resid_pre", "dec_init_norm": 0.08}
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match="input_scaling"):
        SAE.load(tmp_path)
    factors = torch.tensor([0.27, 0.24])
    x = draw(B, 2, D, scale=3.0)
    acts = (torch.einsum("bld,ldf->bf", x * factors[:, None], t["W_enc"]) + t["b_enc"]).relu()
    out = (torch.einsum("bf,fld->bld", acts, t["W_dec"]) + t["b_dec"]) / factors[:, None]
    sae = SAE.load(tmp_path, overrides={"input_scaling": [0.27, 0.24]})
    assert_computes(sae, x.flatten(1), acts, out.flatten(1))
    with pytest.raises(ConfigError, match="two positive numbers"):
        SAE.load(tmp_path, overrides={"input_scaling": [0.27, 0.0]})


# ----------------------------------------------------------------------------------------------------------------------
# sparsify's old and rare forms


def sparsify_folder(folder: Path, draw: Drawn, out: int = D, **changes: Any) -> dict[str, Tensor]:
    config = {"expansion_factor": F // D, "normalize_decoder": True, "num_latents": 0, "k": 5, "d_in": D}
    tensors = {"encoder.weight": draw(F, D), "encoder.bias": draw(F), "W_dec": draw(F, out), "b_dec": draw(out)}
    (folder / "cfg.json").write_text(json.dumps(config | changes))
    save_file(tensors, folder / "sae.safetensors")
    return tensors


def test_signed_coders_of_old_sparsify_keep_the_largest_magnitudes(tmp_path: Path, draw: Drawn):
    t = sparsify_folder(tmp_path, draw, signed=True)
    x = draw(B, D, scale=3.0)
    pre = (x - t["b_dec"]) @ t["encoder.weight"].T + t["encoder.bias"]
    acts = largest(pre, 5, pre.abs())
    assert (acts < 0).any()
    assert_computes(SAE.load(tmp_path), x, acts, acts @ t["W_dec"] + t["b_dec"])


def test_a_transcoder_of_sparsify_may_write_to_another_width(tmp_path: Path, draw: Drawn):
    t = sparsify_folder(tmp_path, draw, out=5, transcode=True, activation="topk", multi_topk=False)
    x = draw(B, D, scale=3.0)
    acts = largest((x @ t["encoder.weight"].T + t["encoder.bias"]).relu(), 5)
    assert_computes(SAE.load(tmp_path), x, acts, acts @ t["W_dec"] + t["b_dec"])


@pytest.mark.parametrize("transcode", [False, True])
@pytest.mark.parametrize("skips", [False, True])
def test_groupmax_coders_of_sparsify_transcode_and_skip_too(tmp_path: Path, draw: Drawn, transcode: bool, skips: bool):
    t = sparsify_folder(tmp_path, draw, activation="groupmax", k=4, transcode=transcode, skip_connection=skips)
    t["W_skip"] = draw(D, D)
    if skips:
        save_file(t, tmp_path / "sae.safetensors")
    x = draw(B, D, scale=3.0)
    pre = ((x if transcode else x - t["b_dec"]) @ t["encoder.weight"].T + t["encoder.bias"]).relu()
    groups = pre.unflatten(-1, (4, -1))
    acts = (groups * (groups == groups.amax(-1, keepdim=True))).flatten(-2)
    sae = SAE.load(tmp_path)
    assert sae.architecture == "groupmax"
    y = acts @ t["W_dec"] + t["b_dec"]
    assert_computes(sae, x, acts, y + x @ t["W_skip"].T if skips else y)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"transcode": True, "n_targets": 3}, "n_targets is 3: a coder that writes to several layers"),
        ({"transcode": True, "n_targets": 1, "n_sources": 2}, "n_sources is 2"),
        ({"transcode": True, "coalesce_topk": "concat"}, "coalesce_topk is 'concat', and only 'none'"),
        ({"use_fp8": True}, "use_fp8"),
        ({"signed": True, "transcode": True}, "signed"),
        ({"activation": "softmax"}, "'softmax'"),
    ],
)
def test_coders_of_sparsify_that_nothing_here_computes_are_refused(
    tmp_path: Path, draw: Drawn, changes: dict[str, Any], said: str
):
    sparsify_folder(tmp_path, draw, **changes)
    with pytest.raises(FormatError, match=said):
        SAE.load(tmp_path)


FORK = json.loads((Path(__file__).parent / "golden/clt_training.json").read_text())


@pytest.mark.parametrize("scale", [False, True])
def test_a_skip_transcoder_of_the_clt_training_fork_is_one_of_ours(tmp_path: Path, draw: Drawn, scale: bool):
    """Its latents pass through a bias, which is zero, and a scale on their way to the decoder."""
    t = sparsify_folder(tmp_path, draw, **FORK | {"num_latents": F, "k": 5, "d_in": D, "post_encoder_scale": scale})
    t |= {"W_skip": draw(D, D), "post_enc": torch.zeros(F)}
    if scale:
        t["post_enc_scale"] = draw.positive(F)
    save_file(t, tmp_path / "sae.safetensors")
    x = draw(B, D, scale=3.0)
    acts = largest((x @ t["encoder.weight"].T + t["encoder.bias"]).relu(), 5)
    out = (acts * t.get("post_enc_scale", 1.0)) @ t["W_dec"] + t["b_dec"] + x @ t["W_skip"].T
    assert_computes(SAE.load(tmp_path), x, acts, out)
    t["post_enc"][2] = 0.1
    save_file(t, tmp_path / "sae.safetensors")
    with pytest.raises(FormatError, match="'post_enc' is not all zeros"):
        SAE.load(tmp_path)


@pytest.mark.parametrize("transcode", [False, True])
def test_the_forks_scaling_of_inputs_and_outputs_moves_into_the_weights(tmp_path: Path, draw: Drawn, transcode: bool):
    t = sparsify_folder(tmp_path, draw, transcode=transcode, normalize_io=True)
    t |= {"in_norm": torch.tensor([7.0]), "out_norm": torch.tensor([0.6]), "post_enc": torch.zeros(F)}
    save_file(t, tmp_path / "sae.safetensors")
    x = draw(B, D, scale=3.0)
    z = x * math.sqrt(D) / 7.0
    pre = (z if transcode else z - t["b_dec"]) @ t["encoder.weight"].T + t["encoder.bias"]
    acts = largest(pre.relu(), 5)
    assert_computes(SAE.load(tmp_path), x, acts, (acts @ t["W_dec"] + t["b_dec"]) * 0.6 / math.sqrt(D))


def test_one_target_of_the_fork_is_found_under_its_number(tmp_path: Path, draw: Drawn):
    t = sparsify_folder(tmp_path, draw, transcode=True, n_targets=1)
    stored = {"encoder.weight": t["encoder.weight"], "encoder.bias": t["encoder.bias"], "post_encs.0": torch.zeros(F)}
    stored |= {"W_decs.0": t["W_dec"], "b_decs.0": t["b_dec"]}
    save_file(stored, tmp_path / "sae.safetensors")
    x = draw(B, D, scale=3.0)
    acts = largest((x @ t["encoder.weight"].T + t["encoder.bias"]).relu(), 5)
    assert_computes(SAE.load(tmp_path), x, acts, acts @ t["W_dec"] + t["b_dec"])


def test_sparsify_fields_that_are_missing_have_the_librarys_defaults(tmp_path: Path, draw: Drawn):
    """eai-sparsify 1.3.3: topk of k = 32, an SAE of 32 latents for each input dimension."""
    tensors = {
        "encoder.weight": draw(32 * D, D),
        "encoder.bias": draw(32 * D),
        "W_dec": draw(32 * D, D),
        "b_dec": draw(D),
    }
    (tmp_path / "cfg.json").write_text(json.dumps({"d_in": D}))
    save_file(tensors, tmp_path / "sae.safetensors")
    x = draw(B, D, scale=3.0)
    acts = largest(((x - tensors["b_dec"]) @ tensors["encoder.weight"].T + tensors["encoder.bias"]).relu(), 32)
    assert_computes(SAE.load(tmp_path), x, acts, acts @ tensors["W_dec"] + tensors["b_dec"])


# ----------------------------------------------------------------------------------------------------------------------
# temporal, and what the catalogue says of all


def test_temporal_saes_use_the_files_scale_and_refuse_another():
    folder = Path(__file__).parent / "golden/foreign/temporal/files/layer_12/temporal"
    sae = SAE.load(folder, overrides={"norm_scaling_factor": 0.251})
    assert sae.config.activation_normalization_factor == 0.25
    with pytest.raises(FormatError, match=r"scaling_factor is 0\.25, but the caller says 0\.5"):
        SAE.load(folder, overrides={"norm_scaling_factor": 0.5})


# ----------------------------------------------------------------------------------------------------------------------
# qwen_scope


def test_qwen_scope_reads_k_from_the_repositorys_name_and_checks_its_width(tmp_path: Path, draw: Drawn):
    def write(repository: str, d_sae: int) -> Path:
        path = tmp_path / repository / "layer7.sae.pt"
        path.parent.mkdir()
        torch.save({"W_enc": draw(d_sae, D), "b_enc": draw(d_sae), "W_dec": draw(D, d_sae), "b_dec": draw(D)}, path)
        return path

    sae = SAE.load(write("SAE-Res-Qwen3-1.7B-Base-W1K-L0_12", 1024))
    assert sae.architecture == "topk"
    assert (sae.encode(draw(B, D, scale=3.0)) > 0).sum(-1).tolist() == [12] * B
    assert sae.metadata["model_name"] == "Qwen/Qwen3-1.7B-Base"
    assert sae.metadata["hf_hook_name"] == "model.layers.7"
    with pytest.raises(FormatError, match="24 latents, but the repository's name says 32K"):
        SAE.load(write("SAE-Res-Qwen3-1.7B-Base-W32K-L0_12", 24))
    renamed = write("renamed", 24)
    with pytest.raises(FormatError, match="the fact k"):
        SAE.load(renamed)
    (renamed.parent / "config.json").write_text(json.dumps({"top_k": 5, "model_type": "sae"}))
    assert SAE.load(renamed).config.k == 5  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(FormatError, match=r"k is 5 in config\.json \(top_k\), but 6 in the fact k"):
        SAE.load(renamed, overrides={"k": 6})


# ----------------------------------------------------------------------------------------------------------------------
# files that could be anybody's


def two_layers(path: Path, draw: Drawn) -> dict[str, Tensor]:
    t = {"encoder.weight": draw(F, D), "encoder.bias": draw(F), "decoder.weight": draw(D, F), "decoder.bias": draw(D)}
    torch.save(t, path)
    return t


def test_two_linear_layers_are_nobodys_format_until_the_caller_names_it(tmp_path: Path, draw: Drawn):
    t = two_layers(tmp_path / "mine.pt", draw)
    with pytest.raises(
        FormatError, match=r"which library wrote it.*format='deepseek_r1'.*format='dictionary_learning_1'"
    ):
        SAE.load(tmp_path / "mine.pt")
    sae = SAE.load(tmp_path / "mine.pt", format="deepseek_r1")
    x = draw(B, D, scale=3.0)
    acts = (x @ t["encoder.weight"].T + t["encoder.bias"]).relu()
    assert_computes(sae, x, acts, acts @ t["decoder.weight"].T + t["decoder.bias"])
    assert sae.metadata == {}


def test_an_ae_pt_without_its_config_loads_with_the_class_that_wrote_it(tmp_path: Path, draw: Drawn):
    t = two_layers(tmp_path / "ae.pt", draw)
    with pytest.raises(FormatError, match="format='dictionary_learning_1' and the fact dict_class, one of AutoEncoder"):
        SAE.load(tmp_path)
    with pytest.raises(FormatError, match=r"no config.json says which class this is.*dict_class"):
        SAE.load(tmp_path, format="dictionary_learning_1")
    facts = {"dict_class": "AutoEncoderNew"}
    sae = SAE.load(tmp_path, format="dictionary_learning_1", overrides=facts)
    x = draw(B, D, scale=3.0)
    acts = (x @ t["encoder.weight"].T + t["encoder.bias"]).relu()
    assert_computes(sae, x, acts, acts @ t["decoder.weight"].T + t["decoder.bias"])
    again = SAE.load(tmp_path / "ae.pt", format="dictionary_learning_1", overrides=facts)
    assert torch.equal(again.encode(x), sae.encode(x))


def test_a_topk_ae_pt_without_its_config_and_without_k_asks_for_k(tmp_path: Path, draw: Drawn):
    t = {"encoder.weight": draw(F, D), "encoder.bias": draw(F), "decoder.weight": draw(D, F), "b_dec": draw(D)}
    torch.save(t, tmp_path / "ae.pt")
    facts: dict[str, Any] = {"dict_class": "AutoEncoderTopK"}
    with pytest.raises(FormatError, match=r"neither it nor config.json says k; load with the fact k"):
        SAE.load(tmp_path, format="dictionary_learning_1", overrides=facts)
    sae = SAE.load(tmp_path, format="dictionary_learning_1", overrides=facts | {"k": 4})
    x = draw(B, D, scale=3.0)
    acts = largest(((x - t["b_dec"]) @ t["encoder.weight"].T + t["encoder.bias"]).relu(), 4)
    assert_computes(sae, x, acts, acts @ t["decoder.weight"].T + t["b_dec"])
