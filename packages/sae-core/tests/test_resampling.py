"""Dead latents start anew, gradients are gathered over batches, and mixed precision rounds factors and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sae_core import SAE, TrainConfig, Trainer, create
from sae_core.errors import ConfigError
from sae_core.ops.mixed import dense_products_in
from sae_core.protocols import ActivationBatch
from sae_core.sae import StepContext
from sae_core.training.health import duplicates, health
from sae_core.training.learner import Learner
from sae_core.training.resampling import forget_moments, resample

ROWS = torch.randn(2000, 8, generator=torch.Generator().manual_seed(0)).relu()


def settings(**changes: Any) -> TrainConfig:
    return TrainConfig(**{"total_samples": 2000, "batch_size": 50, "lr": 1e-3, "progress_bar": False, **changes})


def weights(sae: SAE) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in sae.named_parameters()}


def test_a_dead_latent_reads_and_writes_the_worst_input_and_starts_small() -> None:
    sae = create("jumprelu", d_in=8, d_sae=6, l0_coefficient=0.1, jumprelu_init_threshold=0.05)
    with torch.no_grad():
        sae.b_enc.fill_(0.3)
        sae.threshold.fill_(2.0)
        sae.b_dec.fill_(0.1)
    before = weights(sae)
    batch = ROWS[:3].clone()
    output = sae.training_step(batch, StepContext())
    output.reconstruction[[0, 1]] = output.target[[0, 1]]  # only the last row is reconstructed badly
    dead = torch.tensor([1, 4])
    resample(sae, dead, ActivationBatch(batch), output, seed=0)
    direction = torch.nn.functional.normalize(batch[2] - 0.1, dim=0)
    others = [0, 2, 3, 5]
    encoder_norm = before["encoder"][others].norm(dim=1).mean()
    decoder_norm = before["W_dec"][others].norm(dim=1).mean()
    for latent in dead.tolist():
        torch.testing.assert_close(sae.encoder[latent], 0.2 * encoder_norm * direction)
        torch.testing.assert_close(sae.W_dec[latent], decoder_norm * direction)
        assert sae.b_enc[latent].item() == 0.0
        assert sae.threshold[latent].item() == pytest.approx(0.05)
    for name, parameter in sae.named_parameters():
        kept = others if sae.axis(name).latent == 0 else slice(None)
        assert torch.equal(parameter[kept], before[name][kept])


def test_inputs_are_drawn_by_the_square_of_their_loss() -> None:
    sae = create("topk", d_in=8, d_sae=3000, k=2, apply_b_dec_to_input=False)
    batch = torch.eye(8)[:2]
    output = sae.training_step(batch, StepContext())
    output.reconstruction.copy_(output.target)
    output.reconstruction[0, 0] += 1.0  # loss 1
    output.reconstruction[1, 1] += 2.0**0.5  # loss 2: four times as likely
    resample(sae, torch.arange(3000), ActivationBatch(batch), output, seed=3)
    share = float((sae.W_dec[:, 1] > 0).float().mean())
    assert share == pytest.approx(0.8, abs=0.03)


def test_a_transcoder_writes_the_target_of_the_input_it_reads() -> None:
    sae = create("topk", d_in=8, d_sae=6, k=2, d_out=3)
    batch = ActivationBatch(ROWS[:1], torch.tensor([[0.0, 3.0, 4.0]]))
    output = sae.training_step(batch, StepContext())
    resample(sae, torch.tensor([2]), batch, output, seed=0)
    torch.testing.assert_close(
        torch.nn.functional.normalize(sae.W_dec[2], dim=0), torch.tensor([0.0, 0.6, 0.8]), atol=1e-6, rtol=0
    )
    torch.testing.assert_close(
        torch.nn.functional.normalize(sae.encoder[2], dim=0), torch.nn.functional.normalize(ROWS[0], dim=0)
    )


def test_adam_forgets_what_belonged_to_them_and_nothing_else() -> None:
    learner = Learner(create("standard", d_in=8, d_sae=6, l1_coefficient=0.01), settings())
    for batch in ROWS.split(50)[:3]:
        learner.step(batch)
    before = {name: learner.moments(name).clone() for name, _ in learner.sae.named_parameters()}  # pyright: ignore[reportOptionalMemberAccess]
    forget_moments(learner.optimizer, learner.sae, torch.tensor([1, 4]))
    for name, moments in before.items():
        expected = moments.clone()
        if name != "b_dec":
            expected[[1, 4]] = 0
        assert torch.equal(learner.moments(name), expected)  # pyright: ignore[reportArgumentType]


def test_training_brings_dead_latents_back_and_says_how_many(tmp_path: Path) -> None:
    def run(**changes: Any) -> Any:
        sae = create("standard", d_in=8, d_sae=16, l1_coefficient=0.02)
        with torch.no_grad():
            sae.b_enc[:8] = -100.0  # dead for good
        return Trainer(sae, list(ROWS.split(50)), settings(dead_after_samples=300, log_every_steps=10, **changes)).fit()

    left_alone, helped = run(), run(resample_dead_every_samples=500)
    assert left_alone.history[-1]["dead_fraction"] == 0.5
    assert "resampled" not in left_alone.history[0]
    assert helped.history[-1]["dead_fraction"] == 0.0
    assert helped.history[0]["resampled"] == 8
    assert helped.history[-1]["explained_variance"] > left_alone.history[-1]["explained_variance"]


def test_resampling_is_refused_where_it_cannot_be() -> None:
    sae = create("matching_pursuit", d_in=8, d_sae=16)
    with pytest.raises(ConfigError, match="latents of matching_pursuit cannot be restarted"):
        Learner(sae, settings(resample_dead_every_samples=100))
    with pytest.raises(ConfigError, match="cannot be pointed at a row"):
        sae.restart_latents(torch.tensor([0]), sae.prepare(ROWS[:1]), ROWS[:1])


def test_two_gathered_batches_make_the_step_of_one_twice_as_large() -> None:
    saes = [create("standard", d_in=8, d_sae=16, l1_coefficient=0.02, seed=1) for _ in range(2)]
    gathered = Learner(saes[0], settings(gradient_accumulation_steps=2))
    at_once = Learner(saes[1], settings())
    first = weights(saes[0])
    gathered.step(ROWS[:50])
    assert all(torch.equal(parameter, first[name]) for name, parameter in saes[0].named_parameters())
    gathered.step(ROWS[50:80])  # batches may differ in size
    at_once.step(ROWS[:80])
    for (name, one), two in zip(saes[0].named_parameters(), saes[1].parameters(), strict=True):
        torch.testing.assert_close(one, two, msg=lambda text, name=name: f"{name}: {text}")


def test_a_run_ends_with_the_step_of_what_has_been_gathered() -> None:
    sae = create("standard", d_in=8, d_sae=16, l1_coefficient=0.02)
    before = weights(sae)
    Trainer(sae, list(ROWS.split(50)), settings(total_samples=150, gradient_accumulation_steps=5)).fit()
    assert not torch.equal(sae.W_dec, before["W_dec"])


def test_a_run_resumed_between_two_batches_of_one_step_ends_with_the_same_bits(tmp_path: Path) -> None:
    def trainer(callbacks: Any = ()) -> Trainer:
        sae = create("standard", d_in=8, d_sae=16, l1_coefficient=0.02)
        more = {"gradient_accumulation_steps": 3, "resample_dead_every_samples": 400, "dead_after_samples": 200}
        return Trainer(sae, list(ROWS.split(50)), settings(log_every_steps=7, **more), callbacks)

    whole = trainer().fit()
    first = trainer([lambda progress: progress.trainer.stop() if progress.trainer.steps == 13 else None])
    first.fit()
    resumed = Trainer.resume(first.save(tmp_path / "saved"), list(ROWS.split(50))).fit()
    assert resumed.history == whole.history
    for one, two in zip(whole.sae.parameters(), resumed.sae.parameters(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("architecture", ["standard", "gated", "jumprelu"])
def test_mixed_precision_rounds_dense_products_and_nothing_else(architecture: str) -> None:
    weight = {"standard": "l1_coefficient", "gated": "l1_coefficient", "jumprelu": "l0_coefficient"}[architecture]
    sae = create(architecture, d_in=8, d_sae=32, **{weight: 0.01}).train()

    def gradients(dtype: torch.dtype | None) -> tuple[float, dict[str, torch.Tensor]]:
        sae.zero_grad()
        with dense_products_in(dtype):
            output = sae.training_step(ROWS[:200], StepContext())
        output.loss.backward()
        assert output.loss.dtype == output.reconstruction.dtype == torch.float32
        return output.loss.item(), {name: p.grad for name, p in sae.named_parameters() if p.grad is not None}

    (exact, full), (rounded, mixed) = gradients(None), gradients(torch.bfloat16)
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=0.01)
    for name, gradient in mixed.items():
        assert gradient.dtype == torch.float32
        assert float((gradient - full[name]).norm()) < 0.02 * float(full[name].norm()) + 1e-6, name


def test_mixed_precision_trains_as_well_and_is_refused_where_it_changes_nothing() -> None:
    def ends(**changes: Any) -> float:
        sae = create("standard", d_in=8, d_sae=32, l1_coefficient=0.01)
        history = Trainer(sae, list(ROWS.split(50)), settings(**changes)).fit().history
        assert sae.dtype == torch.float32
        return float(history[-1]["explained_variance"] or 0.0)

    assert ends(precision="bfloat16") == pytest.approx(ends(), abs=0.01)
    with pytest.raises(ConfigError, match="precision: bfloat16 makes no difference to matching_pursuit"):
        Learner(create("matching_pursuit", d_in=8, d_sae=16), settings(precision="bfloat16"))


def test_twins_are_counted_and_reported() -> None:
    assert duplicates(torch.zeros(0, 3)) == 0.0
    many = torch.randn(9000, 16, generator=torch.Generator().manual_seed(0))
    assert duplicates(many) < 0.05
    assert duplicates(torch.cat([many[:50], 2 * many[:50]])) == 1.0
    sae = create("standard", d_in=8, d_sae=16, l1_coefficient=0.0001)
    with torch.no_grad():
        for rows in (sae.encoder, sae.W_dec):
            rows[8:] = rows[:8] * 1.001
    learner = Learner(sae, settings(total_samples=1000))
    for batch in ROWS.split(50)[:20]:
        learner.step(batch)
    learner.flush()
    assert any("of the latents that fire have a twin" in finding for finding in health(learner))
