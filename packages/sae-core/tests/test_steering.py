from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sae_core import TrainConfig, Trainer, create
from sae_core.errors import ConfigError
from sae_core.training.steering import L0Controller

FEATURES = torch.nn.functional.normalize(torch.randn(64, 16, generator=torch.Generator().manual_seed(0)), dim=-1)


def batches(count: int, seed: int = 1) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    return [(torch.rand(128, 64, generator=random) < 0.05).float() @ FEATURES for _ in range(count)]


def config(steps: int = 400, **changes: Any) -> TrainConfig:
    settings: dict[str, Any] = {
        "total_samples": 128 * steps, "batch_size": 128, "lr": 3e-3, "init_samples": 512, "progress_bar": False, **changes
    }  # fmt: skip
    return TrainConfig(**settings)


@pytest.mark.parametrize(
    ("architecture", "coefficient", "start", "steps"),
    [
        ("standard", "l1_coefficient", 3.0, 600),
        ("jumprelu", "l0_coefficient", 0.001, 800),
        pytest.param("gated", "l1_coefficient", 3.0, 1500, marks=pytest.mark.slow),
    ],
)
def test_every_architecture_with_a_sparsity_coefficient_is_steered_to_its_l0(
    architecture: str, coefficient: str, start: float, steps: int
) -> None:
    sae = create(architecture, d_in=16, d_sae=96, seed=0, **{coefficient: start})
    result = Trainer(sae, batches(steps), config(steps, target_l0=6.0, lr_decay_samples=0.2)).fit()
    last = result.history[-1]
    assert last["l0"] == pytest.approx(6.0, rel=0.1)
    assert last["sparsity_coefficient"] == float(getattr(result.sae.config, coefficient))
    assert not any("target_l0" in finding for finding in result.health)


def test_steering_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    def trainer(*callbacks: Any) -> Trainer:
        sae = create("standard", d_in=16, d_sae=96, seed=0, l1_coefficient=0.01)
        return Trainer(sae, batches(60), config(60, target_l0=6.0, log_every_steps=8), callbacks)

    whole = trainer()
    whole.fit()
    first = trainer(lambda p: p.trainer.stop() if p.trainer.steps == 23 else None)
    first.fit()
    resumed = Trainer.resume(first.save(tmp_path / "c"), batches(60))
    resumed.fit()
    assert resumed.history == whole.history
    assert resumed.sae.config == whole.sae.config
    assert all(torch.equal(a, b) for a, b in zip(resumed.sae.parameters(), whole.sae.parameters(), strict=True))


def test_a_controller_rests_on_the_target_and_brakes_before_it() -> None:
    assert L0Controller(5.0, 0.1).factor(5.0, 100) == 1.0
    falling = L0Controller(5.0, 0.1)
    factors = [falling.factor(l0, 100) for l0 in (40, 35, 30, 26, 22, 18, 14, 11, 8)]
    assert factors[0] == pytest.approx(1.1)
    assert factors[-1] < 1.0  # above the target still, but on the way to far below it


@pytest.mark.parametrize(
    ("architecture", "fields", "target", "message"),
    [
        ("topk", {"k": 3}, 5.0, "topk has no sparsity coefficient to steer"),
        ("standard", {"l1_coefficient": {"from": 0, "to": 1}}, 5.0, "must be a positive number to start from"),
        ("standard", {"l1_coefficient": 0.0}, 5.0, r"must be a positive number to start from, not 0\.0"),
        ("standard", {}, 97.0, r"target_l0 must lie in \(0, d_sae = 96\], not 97"),
        ("standard", {}, -1.0, "target_l0 must be positive or null"),
    ],
)
def test_what_cannot_be_steered_is_refused(architecture: str, fields: Any, target: float, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Trainer(create(architecture, d_in=16, d_sae=96, **fields), [], config(target_l0=target))


def test_a_healthy_run_has_nothing_to_say_and_an_ill_one_says_what_to_do() -> None:
    sae = create("topk", d_in=16, d_sae=32, k=4, seed=0)
    assert Trainer(sae, batches(60), config(60, dead_after_samples=1000)).fit().health == []
    ill = create("topk", d_in=16, d_sae=96, k=4, seed=0, aux_loss_coefficient=0.0)
    with torch.no_grad():
        ill.b_enc[20:] = -10.0
        ill.b_enc[:3] = 10.0
    found = Trainer(ill, batches(60), config(60, dead_after_samples=1000)).fit().health
    assert len(found) == 3
    assert "% of the latents are dead (silent for 1,000 samples)" in found[0]
    assert "3 of 96 latents fire on more than half" in found[1]
    assert "76 of 96 entries of b_enc never got a gradient" in found[2]


def test_an_l0_that_was_not_reached_is_told() -> None:
    sae = create("standard", d_in=16, d_sae=96, l1_coefficient=1e-6)
    found = Trainer(sae, batches(20), config(20, target_l0=2.0)).fit().health
    assert "target_l0 asked for 2; the sparsity coefficient went from 1e-06 to" in found[-1]
