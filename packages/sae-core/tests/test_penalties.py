"""No penalty can be paid with scale: a loss that falls while a latent's size only moves between encoder and decoder is cheated.

Dividing a latent's decoder row by c and multiplying by c what `AXES` says goes with its norm changes no output. Training must
see nothing there either: the gradient along that direction is zero. Where a term is kept from the decoder, its norms have to
be constants in that term, or the decoder pays for it alone.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sae_core import SAE, ActivationBatch, StepContext, create
from sae_core.errors import ConfigError
from sae_core.sae import Axis
from torch import Tensor

D_IN, D_SAE, D_OUT, ROWS = 6, 12, 5, 40
DEAD = torch.tensor([1, 4, 7])
SMOOTH = {"jumprelu_sparsity_loss_mode": "tanh", "l0_coefficient": 0.3}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "L1": ("standard", {"l1_coefficient": 0.3}),
    "p-norm": ("standard", {"l1_coefficient": 0.3, "lp_norm": 0.5, "lp_norm_keeps_scale": True}),
    "gate": ("gated", {"l1_coefficient": 0.3}),
    "smooth count": ("jumprelu", SMOOTH),
    "smooth count below zero": ("jumprelu", SMOOTH | {"apply_relu": False}),
}
SHAPES: dict[str, dict[str, Any]] = {
    "SAE": {},
    "skip transcoder": {"d_out": D_OUT, "skip": True},
    "crosscoder": {"reads": {"a": 4, "b": 2}},
    "joint norms": {"reads": {"a": 4, "b": 2}, "decoder_norm": "joint"},
}


def drawn(architecture: str, config: dict[str, Any]) -> SAE[Any]:
    sae = create(architecture, d_in=D_IN, d_sae=D_SAE, dtype="float64", **config)
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.5)
    sae.after_step()
    return sae.train()


def step_gradients(sae: SAE[Any], *terms: str, dead: Tensor | None = None) -> dict[str, Tensor]:
    """Gradients of these terms of the loss, of all without any."""
    random = torch.Generator().manual_seed(4)
    x = torch.randn(ROWS, D_IN, generator=random, dtype=torch.float64)
    target = None if sae.reconstructs_input else torch.randn(ROWS, D_OUT, generator=random, dtype=torch.float64)
    output = sae.training_step(ActivationBatch(x, target), StepContext(dead=dead))
    loss = torch.stack([output.losses[term] for term in terms]).sum() if terms else output.loss
    loss.backward()
    return {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in sae.named_parameters()}


def along_rescaling(sae: SAE[Any], gradients: dict[str, Tensor]) -> Tensor:
    """(d_sae,) the loss's slope when each latent's decoder row shrinks and what goes with its norm grows."""
    signs = {"with_norm": 1.0, "against_norm": -1.0}
    slope = torch.zeros(sae.d_sae, dtype=torch.float64)
    for name, parameter in sae.named_parameters():
        axis: Axis = sae.axis(name)
        if axis.scales != "no":
            slope += signs[axis.scales] * (gradients[name] * parameter.detach()).reshape(sae.d_sae, -1).sum(-1)
    return slope


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("case", CASES)
def test_moving_scale_between_encoder_and_decoder_gains_nothing(case: str, shape: str) -> None:
    architecture, config = CASES[case]
    sae = drawn(architecture, config | SHAPES[shape])
    gradients = step_gradients(sae)
    assert gradients["W_dec"].norm() > 0.1  # there is a loss to be lowered, only not this way
    if architecture == "jumprelu":
        gradients["threshold"].zero_()  # borrowed through a window of fixed width, so it is no slope of the loss
    torch.testing.assert_close(along_rescaling(sae, gradients), torch.zeros(D_SAE, dtype=torch.float64))


@pytest.mark.parametrize("shape", SHAPES)
def test_frozen_the_gates_penalty_and_reconstruction_leave_the_decoder_alone(shape: str) -> None:
    frozen = drawn("gated", SHAPES[shape] | {"freeze_decoder_in_aux": True})
    gradients = step_gradients(frozen, "l1", "auxiliary_reconstruction")
    assert gradients["W_dec"].count_nonzero() == 0
    assert gradients["encoder"].norm() > 0.1


@pytest.mark.parametrize("shape", SHAPES)
def test_lifting_dead_latents_does_not_shrink_their_decoder_rows(shape: str) -> None:
    config = {"pre_act_loss_coefficient": 1.0} | SHAPES[shape]
    gradients = step_gradients(drawn("jumprelu", config), "pre_act", dead=DEAD)
    assert gradients["W_dec"].count_nonzero() == 0
    assert gradients["b_enc"][DEAD].count_nonzero() == len(DEAD)
    as_sae_lens = step_gradients(drawn("jumprelu", config | {"freeze_decoder_in_pre_act": False}), "pre_act", dead=DEAD)
    assert as_sae_lens["W_dec"][DEAD].norm() > 0.1


def test_a_latent_below_zero_is_penalised_as_one_above() -> None:
    """Two latents of strength 1 and -0.5 whose decoder rows have norm 1: tanh(4) + tanh(2)."""
    sae = create("jumprelu", d_in=2, d_sae=2, apply_relu=False, dtype="float64", **SMOOTH)
    with torch.no_grad():
        sae.get_parameter("encoder").copy_(torch.eye(2))
        sae.get_parameter("W_dec").copy_(torch.eye(2))
        sae.get_parameter("threshold").copy_(torch.tensor([0.2, -2.0]))
    output = sae.training_step(torch.tensor([[1.0, -0.5]], dtype=torch.float64))
    assert sae.encode(torch.tensor([[1.0, -0.5]], dtype=torch.float64)).tolist() == [[1.0, -0.5]]
    assert output.losses["l0"].item() == pytest.approx(
        0.3 * (torch.tensor(4.0).tanh() + torch.tensor(2.0).tanh()).item()
    )


def test_a_field_for_a_penalty_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="freeze_decoder_in_pre_act"):
        create("jumprelu", d_in=2, d_sae=2, freeze_decoder_in_pre_act=False)
