"""The same weights and batch give what SAELens 6.54.12 gives: outputs, every loss term, every gradient.

The golden tensors are made by `golden/make_sae_lens_training.py`. Every case runs in both forms of the ops, dense and
sparse, whichever the dispatch would choose at this tiny width.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_core import SAE, StepContext, StepOutput, create
from sae_core.folding import fold_decoder_norm, fold_normalization
from sae_core.normalization import Normalization
from safetensors.torch import load_file
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden" / "sae_lens_training"
CASES = json.loads((GOLDEN / "cases.json").read_text())
LOSS_NAMES = {
    "mse_loss": "mse",
    "l1_loss": "l1",
    "l0_loss": "l0",
    "pre_act_loss": "pre_act",
    "auxiliary_reconstruction_loss": "auxiliary_reconstruction",
}
# What is deliberately another default here; docs/architectures.md says why.
AS_SAE_LENS = {
    "batchtopk": {"topk_threshold_bias_correction": False},
    "matryoshka_batchtopk": {"topk_threshold_bias_correction": False},
}
WHITENING = {"mean": "mean", "whiten": "whiten", "unwhiten": "unwhiten"}
COEFFICIENTS = {"l1": "l1_coefficient", "l0": "l0_coefficient"}


@pytest.fixture(params=["dense", "sparse"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Make the dispatch choose one form everywhere."""
    chosen = request.param == "sparse"
    monkeypatch.setattr("sae_core.ops.active.prefer_sparse", lambda **_: chosen)
    return str(request.param)


def ours(case: str, **changes: Any) -> tuple[SAE[Any], dict[str, Tensor]]:
    """Our SAE with the case's config and weights, in train mode, and the case's tensors."""
    described = CASES["steps"][case]
    tensors = load_file(GOLDEN / f"{case}.safetensors")
    architecture = described["architecture"]
    config = described["config"] | AS_SAE_LENS.get(architecture, {}) | changes
    if "pre_act_loss_coefficient" in config:
        config["freeze_decoder_in_pre_act"] = False
    config |= {COEFFICIENTS[name]: value for name, value in described["coefficients"].items()}
    sae = create(architecture, dtype="float64", **config)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            parameter.copy_(in_its_layout(sae, tensors, "weight", name))
        sae.after_step()
    return sae.train(), tensors


def in_its_layout(sae: SAE[Any], tensors: dict[str, Tensor], kind: str, name: str) -> Tensor:
    """A parameter's tensor of the case, which has SAELens's names and layout; zeros where SAELens has no gradient."""
    axis, parameter = sae.axis(name), sae.get_parameter(name)
    found = tensors.get(f"{kind}.{axis.file or name}") if kind == "grad" else tensors[f"{kind}.{axis.file or name}"]
    if found is None:
        return torch.zeros_like(parameter)
    return found.t() if axis.file else found


def step(sae: SAE[Any], tensors: dict[str, Tensor]) -> StepOutput:
    dead = tensors["dead"].nonzero().squeeze(-1) if "dead" in tensors else None
    output = sae.training_step(tensors["input"], StepContext(dead=dead))
    output.loss.backward()
    return output


def close(actual: Tensor, expected: Tensor, what: str) -> None:
    scale = max(float(expected.detach().abs().max()), 1e-6)
    torch.testing.assert_close(
        actual.detach().to(expected.dtype), expected, rtol=1e-5, atol=1e-6 * scale, msg=lambda text: f"{what}: {text}"
    )


@pytest.mark.parametrize("case", CASES["steps"])
def test_a_training_step_equals_sae_lens(case: str, form: str) -> None:
    sae, tensors = ours(case)
    output = step(sae, tensors)
    close(output.reconstruction, tensors["out"], "reconstruction")
    close(output.codes.to_dense(), tensors["acts"], "activations")
    close(output.loss, tensors["loss"], "loss")
    for key in [key for key in tensors if key.startswith("loss.")]:
        name = key.removeprefix("loss.")
        name = LOSS_NAMES.get(name, name.replace("inner_mse_loss", "inner_mse"))
        close(output.losses.get(name, torch.zeros(())), tensors[key], name)
    for name, parameter in sae.named_parameters():
        expected = in_its_layout(sae, tensors, "grad", name)
        actual = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        close(actual, expected, f"gradient of {name}")


@pytest.mark.parametrize(
    "case", [case for case in CASES["steps"] if "batchtopk" in CASES["steps"][case]["architecture"]]
)
def test_the_running_threshold_moves_as_in_sae_lens(case: str) -> None:
    sae, tensors = ours(case)
    output = step(sae, tensors)
    close(sae.get_buffer("topk_threshold"), tensors["metric.topk_threshold"], "threshold")
    close(output.metrics["topk_threshold"], tensors["metric.topk_threshold"], "metric")


def test_frozen_neither_the_gates_penalty_nor_its_own_reconstruction_trains_the_decoder() -> None:
    """As in the paper; the loss is the same, and so is every gradient but the decoder's."""
    frozen, tensors = ours("gated", freeze_decoder_in_aux=True)
    output = step(frozen, tensors)
    close(output.loss, tensors["loss"], "loss")
    for name, parameter in frozen.named_parameters():
        if name not in ("W_dec", "b_dec"):
            close(parameter.grad, in_its_layout(frozen, tensors, "grad", name), f"gradient of {name}")
    # The decoder's gradient is that of the error alone, which is what freezing means.
    again, _ = ours("gated", freeze_decoder_in_aux=True)
    output = again.training_step(tensors["input"])
    output.losses["mse"].backward()
    close(frozen.W_dec.grad, again.W_dec.grad, "gradient of W_dec")
    assert not torch.allclose(frozen.W_dec.grad, tensors["grad.W_dec"])


def test_the_corrected_running_threshold_is_the_weighted_mean_of_what_it_has_seen() -> None:
    sae, tensors = ours("batchtopk_fraction", topk_threshold_bias_correction=True, topk_threshold_lr=0.25)
    smallest: list[float] = []
    for scale in (1.0, 2.0, 0.5):
        output = sae.training_step(tensors["input"] * scale)
        smallest.append(float(output.codes.values.detach().min()))
        weights = [0.25 * 0.75**age for age in reversed(range(len(smallest)))]
        mean = sum(w * s for w, s in zip(weights, smallest, strict=True)) / sum(weights)
        assert float(sae.get_buffer("topk_threshold")) == pytest.approx(mean, rel=1e-12)
    before = sae.get_buffer("topk_threshold").clone()
    sae.eval().training_step(tensors["input"])
    assert torch.equal(sae.get_buffer("topk_threshold"), before)


@pytest.mark.parametrize("name", CASES["folds"])
def test_folding_equals_sae_lens(name: str) -> None:
    described, tensors = CASES["folds"][name], load_file(GOLDEN / f"{name}.safetensors")
    sae = create(described["architecture"], dtype="float64", **described["config"])
    weights = {key: in_its_layout(sae, tensors, "weight", key) for key, _ in sae.named_parameters()}
    with torch.no_grad():
        for key, parameter in sae.named_parameters():
            parameter.copy_(weights[key])
    scales = {key: sae.axis(key).scales for key in weights}
    scaling = Normalization("expected_average_only_in", 8).double()
    scaling.set_scale(described["scale"])
    whitening = Normalization("covariance_whitening", 8).double()
    whitening.load_state_dict({f"site.0.{key}": tensors[source] for key, source in WHITENING.items()})

    def folded_into(tensors: dict[str, Tensor], normalization: Normalization) -> dict[str, Tensor]:
        fixed, centred = normalization.fixed_map(), described["config"].get("apply_b_dec_to_input", True)
        return fold_normalization(tensors, fixed, fixed, centred=centred, biases=sae.input_gains)

    unit_norm = fold_decoder_norm(weights, scales, weights["W_dec"].norm(dim=-1))
    rescaled = described["architecture"] in ("topk", "batchtopk")
    folds = {
        "norm": unit_norm,
        "scale": folded_into(weights, scaling),
        "whitening": folded_into(unit_norm if rescaled else weights, whitening),
    }
    for kind, folded in folds.items():
        for key, value in sae.in_files(folded).items():
            close(value, tensors[f"fold.{kind}.{key}"], f"{kind} {key}")
    if "weight.topk_threshold" in tensors:
        # It is in units of pre-activation times decoder norm, and scaling divides the norms.
        expected = tensors["weight.topk_threshold"] / described["scale"]
        close(tensors["fold.scale.topk_threshold"], expected, "threshold")
