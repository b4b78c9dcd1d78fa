"""Training steps in blocks of rows: the same numbers as at once, for every architecture whose loss is a mean over rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sae_core import ActivationBatch, TrainConfig, Trainer, create
from sae_core.sae import SAE, StepContext, StepOutput
from sae_core.training import row_blocks
from sae_core.training.row_blocks import forward_and_backward

D_IN, D_SAE, ROWS = 6, 16, 23
CASES: dict[str, dict[str, Any]] = {
    "standard": {},
    "standard, p < 1": {"lp_norm": 0.7},
    "standard, layer_norm": {"normalize_activations": "layer_norm"},
    "gated": {},
    "gated, frozen": {"freeze_decoder_in_aux": True},
    "jumprelu": {"pre_act_loss_coefficient": 0.1},
    "jumprelu, quadratic": {"jumprelu_sparsity_loss_mode": "quadratic", "target_l0": 3.0},
    "jumprelu, tanh": {"jumprelu_sparsity_loss_mode": "tanh", "jumprelu_ste_to_input": True},
}


def made(case: str) -> SAE:
    sae = create(case.split(",")[0], d_in=D_IN, d_sae=D_SAE, dtype="float64", seed=0, **CASES[case])
    sae.train()
    return sae


def inputs(seed: int = 1) -> torch.Tensor:
    return torch.randn(ROWS, D_IN, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gradients(sae: SAE) -> dict[str, torch.Tensor]:
    """What is in the parameters' ``.grad``, which is emptied."""
    found = {name: parameter.grad for name, parameter in sae.named_parameters() if parameter.grad is not None}
    sae.zero_grad()
    return found


@pytest.mark.parametrize("case", CASES)
def test_blocks_of_rows_give_the_loss_the_gradients_and_the_statistics_of_the_whole(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_blocks, "_BLOCK_ENTRIES", 5 * D_SAE)
    sae, batch = made(case), ActivationBatch(inputs())
    context = StepContext(progress=0.5, dead=torch.tensor([1, 4]), density=0.5)
    whole = sae.training_step(batch, context)
    whole.loss.backward()
    expected = gradients(sae)
    found = forward_and_backward(sae, batch, context)
    torch.testing.assert_close(gradients(sae), expected)
    torch.testing.assert_close(found.loss, whole.loss.detach())
    torch.testing.assert_close(dict(found.losses), {name: value.detach() for name, value in whole.losses.items()})
    torch.testing.assert_close(found.reconstruction, whole.reconstruction.detach())
    torch.testing.assert_close(found.target, whole.target)
    assert found.l0.tolist() == whole.codes.l0().tolist()
    assert found.firing_counts.tolist() == whole.codes.firing_counts().tolist()


@pytest.mark.parametrize("entries", [5 * D_SAE, 10**6])
def test_gradients_are_added_to_those_that_are_there(entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_blocks, "_BLOCK_ENTRIES", entries)
    sae, batch = made("standard"), ActivationBatch(inputs())
    forward_and_backward(sae, batch, StepContext())
    once = {name: gradient.clone() for name, gradient in gradients(sae).items()}
    for _ in range(2):
        forward_and_backward(sae, batch, StepContext())
    torch.testing.assert_close(gradients(sae), {name: 2 * gradient for name, gradient in once.items()})


@pytest.mark.parametrize(
    ("architecture", "options", "density"),
    [
        ("topk", {"k": 2}, None),
        ("standard", {"lp_norm": 0.7, "lp_norm_keeps_scale": True}, None),
        ("standard", {}, "low"),
    ],
)
def test_what_is_not_a_mean_over_rows_or_is_sparse_goes_at_once(
    architecture: str, options: dict[str, Any], density: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_blocks, "_BLOCK_ENTRIES", 100)
    sae = create(architecture, d_in=D_IN, d_sae=512, seed=0, **options)
    context = StepContext(density=0.001 if density else None)
    seen: list[int] = []
    whole = sae.training_step

    def watched(batch: ActivationBatch, context: StepContext) -> StepOutput:
        seen.append(len(batch.inputs))
        return whole(batch, context)

    monkeypatch.setattr(sae, "training_step", watched)
    forward_and_backward(sae, ActivationBatch(inputs()), context)
    assert seen == [ROWS]


@pytest.mark.parametrize("case", ["standard", "gated", "jumprelu"])
def test_training_in_blocks_logs_and_learns_what_training_at_once_does(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trained() -> tuple[list[dict[str, float | None]], torch.Tensor]:
        sae = create(case, d_in=D_IN, d_sae=D_SAE, dtype="float64", seed=0)
        config = TrainConfig(total_samples=4 * ROWS, batch_size=ROWS, log_every_steps=2, progress_bar=False)
        history = Trainer(sae, [inputs(seed) for seed in range(4)], config).fit().history
        return history, sae.W_dec.detach()

    at_once, W_dec = trained()
    monkeypatch.setattr(row_blocks, "_BLOCK_ENTRIES", 5 * D_SAE)
    for again in (trained(), trained()):
        assert [record.keys() for record in again[0]] == [record.keys() for record in at_once]
        for ours, theirs in zip(again[0], at_once, strict=True):
            known = {name: value for name, value in theirs.items() if value is not None}
            assert {name: value for name, value in ours.items() if value is not None} == pytest.approx(known, rel=1e-6)
        torch.testing.assert_close(again[1], W_dec, rtol=1e-6, atol=1e-9)
    assert torch.equal(trained()[1], again[1])  # bit by bit
