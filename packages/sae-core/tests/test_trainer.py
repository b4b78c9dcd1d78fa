from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from sae_core import ActivationBatch, TrainConfig, Trainer, create
from sae_core.errors import ConfigError, DataError
from sae_core.sae import StepOutput
from sae_core.training.learner import geometric_median
from sae_core.training.loggers import JsonlConfig, JsonlLogger
from sae_core.training.monitor import DeadLatents, Window
from sae_core.training.trainer import Progress

D_IN, FEATURES = 16, 32
DICTIONARY = torch.nn.functional.normalize(
    torch.randn(FEATURES, D_IN, generator=torch.Generator().manual_seed(0)), dim=-1
)


def batches(count: int, size: int = 256, seed: int = 1) -> Iterator[torch.Tensor]:
    """Sparse combinations of known directions."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        firing = torch.rand(size, FEATURES, generator=generator) < 0.06
        yield (firing * (1 + 0.1 * torch.randn(size, FEATURES, generator=generator))) @ DICTIONARY + 0.5


def config(**changes: Any) -> TrainConfig:
    settings: dict[str, Any] = {
        "total_samples": 256 * 40, "batch_size": 256, "lr": 3e-3, "log_every_steps": 10, "init_samples": 512,
        "progress_bar": False, **changes,
    }  # fmt: skip
    return TrainConfig(**settings)


def small(architecture: str = "topk", **fields: Any) -> Any:
    return create(architecture, d_in=D_IN, d_sae=48, **({"k": 3} if architecture == "topk" else {}), **fields)


@pytest.mark.parametrize(
    ("architecture", "fields"),
    [("topk", {}), ("standard", {"l1_coefficient": 0.03}), ("jumprelu", {"l0_coefficient": 0.003})],
)
def test_training_explains_data_that_a_sparse_dictionary_made(architecture: str, fields: dict[str, Any]) -> None:
    sae = small(architecture, **fields)
    result = Trainer(sae, batches(300), config(total_samples=256 * 300)).fit()
    first, last = result.history[0], result.history[-1]
    assert last["loss"] < first["loss"]
    assert last["explained_variance"] > 0.8
    assert result.samples == 256 * 300
    assert not result.sae.training


@pytest.mark.parametrize("architecture", ["topk", "standard", "jumprelu"])
def test_two_runs_of_one_seed_give_identical_weights(architecture: str) -> None:
    states = [
        Trainer(small(architecture, seed=5), batches(30), config(dead_after_samples=512)).fit().sae.state_dict()
        for _ in range(2)
    ]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_run_stops_at_the_sample_that_was_asked_for() -> None:
    result = Trainer(small(), batches(40), config(total_samples=1000)).fit()
    assert result.samples == 1000


def test_a_source_that_ends_early_ends_the_run_with_what_there_was() -> None:
    assert Trainer(small(), batches(3), config()).fit().samples == 3 * 256


def test_an_empty_source_is_an_error() -> None:
    with pytest.raises(DataError, match="the source gave no batch"):
        Trainer(small(), [], config()).fit()


def good_then(bad: Any, count: int = 6) -> Iterator[Any]:
    return itertools.chain(batches(count), [bad], batches(count, seed=9))


def with_value(value: float) -> torch.Tensor:
    batch = next(batches(1, seed=4)).clone()
    batch[17, 3] = value
    return batch


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (with_value(math.nan), r"step 6, samples from 1536: inputs: 1 NaN and 0 infinite .*sample 1553, dimension 3"),
        (with_value(-math.inf), r"0 NaN and 1 infinite .*\(-inf\) in sample 1553, dimension 3"),
        (torch.zeros(4, D_IN + 1), r"step 6, samples from 1536: inputs: shape \(4, 17\), but rows of width 16"),
        (torch.zeros(4, D_IN, dtype=torch.int32), "floating point activations are needed, found torch.int32"),
        (torch.zeros(0, D_IN), "holds no activations"),
        (torch.zeros(D_IN), "rows of width 16 are needed"),
        ("words", "floating point activations are needed, found str"),
        (ActivationBatch(torch.zeros(4, D_IN), torch.zeros(4, 3)), r"targets: shape \(4, 3\)"),
    ],
)
def test_a_bad_batch_stops_with_an_error_that_says_which_and_keeps_what_was_learnt(bad: Any, message: str) -> None:
    sae, twin = small(), small()
    with pytest.raises(DataError, match=message):
        Trainer(sae, good_then(bad), config()).fit()
    Trainer(twin, batches(6), config()).fit()
    assert all(torch.equal(a, b) for a, b in zip(sae.parameters(), twin.parameters(), strict=True))
    assert not sae.training


def test_a_bad_batch_among_the_first_samples_stops_before_anything_is_changed() -> None:
    sae, untouched = small(), small()
    with pytest.raises(DataError, match=r"initialisation, samples from 256: inputs: 1 NaN .* in sample 273"):
        Trainer(sae, itertools.chain(batches(1), [with_value(math.nan)]), config()).fit()
    assert all(torch.equal(a, b) for a, b in zip(sae.parameters(), untouched.parameters(), strict=True))


def test_divergence_is_told_as_such() -> None:
    huge = [torch.full((8, D_IN), 1e30) for _ in range(20)]
    with pytest.raises(DataError, match=r"the loss is (inf|nan); training diverged"):
        Trainer(small(), huge, config(log_every_steps=1, init_b_dec="zeros")).fit()


def test_a_source_of_another_width_is_refused_before_training() -> None:
    class Wide:
        sites: ClassVar = {"": D_IN + 1}

        def batches(self, batch_size: int) -> Iterator[torch.Tensor]:
            raise AssertionError("not reached")

    with pytest.raises(ConfigError, match=r"width 16 is wanted, but the source gives one site \(17\)"):
        Trainer(small(), Wide(), config())


def test_the_first_samples_are_trained_on_after_they_were_looked_at() -> None:
    seen: list[int] = []
    Trainer(small(), batches(5), config(), [lambda p: seen.append(p.output.target.shape[0])]).fit()
    assert seen == [256] * 5


def test_b_dec_starts_where_it_is_asked_to() -> None:
    data = list(batches(2))
    x = torch.cat(data)
    for how, expected in (("zeros", torch.zeros(D_IN)), ("mean", x.mean(0)), ("geometric_median", geometric_median(x))):
        sae = small()
        trainer = Trainer(sae, data, config(init_b_dec=how, lr=1e-12, total_samples=256))
        trainer.fit()
        torch.testing.assert_close(sae.b_dec.detach(), expected, rtol=1e-4, atol=1e-5)


def test_the_geometric_median_ignores_an_outlier_that_moves_the_mean() -> None:
    points = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [1000.0, 1000.0]])
    assert geometric_median(points).norm() < 2
    torch.testing.assert_close(geometric_median(points[:4]), torch.tensor([0.5, 0.5]), rtol=1e-4, atol=1e-4)


def test_the_learning_rate_rises_and_falls_as_asked() -> None:
    rates: list[float] = []
    Trainer(
        small(), batches(10), config(total_samples=2560, lr=1.0, lr_warmup_samples=1024, lr_decay_samples=1024),
        [lambda p: rates.append(p.trainer.optimizer.param_groups[0]["lr"])],
    ).fit()  # fmt: skip
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25])


def test_the_gradient_is_clipped_to_the_norm_asked_for() -> None:
    norms: dict[float | None, float] = {}
    for clip in (None, 0.5):
        sae = small()
        trainer = Trainer(sae, [], config(grad_clip_norm=clip))
        trainer.step(next(batches(1)) * 100)
        norms[clip] = math.sqrt(sum(float(p.grad.square().sum()) for p in sae.parameters() if p.grad is not None))
    assert norms[None] > 10
    assert norms[0.5] == pytest.approx(0.5, rel=1e-3)


def test_one_step_equals_adam_written_out() -> None:
    sae, batch = small("standard", l1_coefficient=0.1, dtype="float64"), next(batches(1)).double()
    before = {name: p.detach().clone() for name, p in sae.named_parameters()}
    sae.training_step(batch).loss.backward()
    expected = {}
    for name, parameter in sae.named_parameters():
        assert parameter.grad is not None
        first, second = 0.1 * parameter.grad, 0.001 * parameter.grad.square()
        expected[name] = before[name] - 3e-3 * (first / 0.1) / ((second / 0.001).sqrt() + 1e-8)
        parameter.grad = None
    Trainer(sae, [], config(grad_clip_norm=None)).step(batch)
    for name, parameter in sae.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=1e-9, atol=1e-9)


def test_explained_variance_of_a_window_does_not_depend_on_the_batch_size() -> None:
    sae, x = small(), torch.cat(list(batches(4)))
    values = []
    for size in (1024, 256, 64):
        window = Window(D_IN, 48, x.device)
        for part in x.split(size):
            window.add(sae.training_step(part))
        values.append(window.flush()["explained_variance"])
    residual, spread = (sae(x).detach() - x).square().sum(), (x - x.mean(0)).square().sum()
    assert values == pytest.approx([float(1 - residual / spread)] * 3, abs=1e-5)


def outputs(sae: Any, reconstruction: torch.Tensor, target: torch.Tensor) -> StepOutput:
    step = sae.training_step(target)
    return StepOutput(step.loss, step.losses, step.codes, reconstruction, target)


def test_explained_variance_is_one_for_the_identity_and_zero_for_the_mean() -> None:
    sae, x = small(), next(batches(1))
    for reconstruction, expected in ((x, 1.0), (x.mean(0).expand_as(x), 0.0)):
        window = Window(D_IN, 48, x.device)
        window.add(outputs(sae, reconstruction, x))
        assert window.flush()["explained_variance"] == pytest.approx(expected, abs=1e-6)


def test_a_window_is_empty_after_its_flush() -> None:
    window = Window(D_IN, 48, torch.device("cpu"))
    window.add(small().training_step(next(batches(1))))
    assert window.flush()["l0"] <= 3
    assert window.flush() == {}


def test_latents_are_dead_after_as_many_samples_without_firing() -> None:
    sae = small()
    with torch.no_grad():
        sae.b_enc[:] = -100.0
        sae.b_enc[:3] = 100.0
    dead = DeadLatents(48, 500, sae.device)
    for _, expected in ((1, None), (2, 45)):
        dead.add(sae.training_step(next(batches(1))))
        indices = dead.indices()
        assert (None if indices is None else indices.numel()) == expected
    assert indices is not None
    assert indices.tolist() == list(range(3, 48))


def test_the_auxiliary_loss_wakes_dead_latents() -> None:
    counts = {}
    for coefficient in (0.0, 1.0):
        sae = small(aux_loss_coefficient=coefficient)
        with torch.no_grad():
            sae.b_enc[10:] = -0.3
        result = Trainer(sae, batches(150), config(total_samples=256 * 150, dead_after_samples=1024)).fit()
        counts[coefficient] = result.history[-1]["dead_fraction"]
    assert counts[0.0] > 0.5
    assert counts[1.0] < 0.75 * counts[0.0]


def test_records_carry_the_loss_terms_and_reach_every_logger(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "log.jsonl"
    result = Trainer(small("standard"), batches(20), config(), loggers=[JsonlLogger(JsonlConfig(path=path))]).fit()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == result.history
    assert [line["step"] for line in lines] == [10, 20]
    assert {"loss", "loss/mse", "loss/l1", "l0", "explained_variance", "dead_fraction", "lr", "samples"} <= set(
        lines[0]
    )
    assert lines[0]["loss"] == pytest.approx(lines[0]["loss/mse"] + lines[0]["loss/l1"], rel=1e-6)


def test_callbacks_see_every_step_and_the_record_of_a_flush() -> None:
    seen: list[Progress] = []
    Trainer(small(), batches(20), config(), [seen.append]).fit()
    assert [p.record is not None for p in seen] == ([False] * 9 + [True]) * 2


def test_training_leaves_a_record_of_itself_in_the_metadata() -> None:
    sae = Trainer(small(), batches(4), config()).fit().sae
    training = sae.metadata["sae_core"]["training"]
    assert (training["samples"], training["steps"]) == (1024, 4)
    assert training["train_config"]["lr"] == 3e-3


def test_a_loaded_sae_can_be_trained_on(tmp_path: Path) -> None:
    from sae_core import SAE

    sae = SAE.load(Trainer(small(), batches(20), config()).fit().sae.save(tmp_path / "sae"))
    x = next(batches(1))
    before = (sae(x) - x).square().mean().item()
    Trainer(sae, batches(40), config()).fit()
    assert (sae(x) - x).square().mean().item() < before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"total_samples": 0}, "total_samples must be positive"),
        ({"batch_size": -1}, "batch_size must be positive"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"lr_warmup_samples": 10**9}, "lr_warmup_samples must lie in"),
        ({"adam_beta1": 1.0}, "adam_beta1 must lie in"),
        ({"grad_clip_norm": 0.0}, "grad_clip_norm must be positive or null"),
        ({"init_samples": 0}, "init_samples must be positive"),
        ({"log_every_steps": 0}, "log_every_steps must be positive"),
    ],
)
def test_impossible_training_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**changes)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_step_on_a_gpu_never_waits_for_it() -> None:
    sae = small().to("cuda")
    trainer = Trainer(sae, [], config(log_every_steps=10_000, dead_refresh_steps=10_000))
    batch = next(batches(1)).cuda()
    trainer.step(batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.step(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
