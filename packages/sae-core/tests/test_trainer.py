from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from sae_core import ActivationBatch, TrainConfig, Trainer, create
from sae_core.errors import ConfigError, DataError
from sae_core.training.learner import geometric_median
from sae_core.training.loggers import JsonlConfig, JsonlLogger
from sae_core.training.monitor import DeadLatents, Window
from sae_core.training.row_blocks import StepResult
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
    Trainer(small(), batches(5), config(), [lambda p: seen.append(p.result.target.shape[0])]).fit()
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
            window.add(StepResult.of(sae.training_step(part)))
        values.append(window.flush()["explained_variance"])
    residual, spread = (sae(x).detach() - x).square().sum(), (x - x.mean(0)).square().sum()
    assert values == pytest.approx([float(1 - residual / spread)] * 3, abs=1e-5)


def result(sae: Any, reconstruction: torch.Tensor, target: torch.Tensor) -> StepResult:
    return replace(StepResult.of(sae.training_step(target)), reconstruction=reconstruction)


def test_explained_variance_is_one_for_the_identity_and_zero_for_the_mean() -> None:
    sae, x = small(), next(batches(1))
    for reconstruction, expected in ((x, 1.0), (x.mean(0).expand_as(x), 0.0)):
        window = Window(D_IN, 48, x.device)
        window.add(result(sae, reconstruction, x))
        assert window.flush()["explained_variance"] == pytest.approx(expected, abs=1e-6)


def test_a_window_is_empty_after_its_flush() -> None:
    window = Window(D_IN, 48, torch.device("cpu"))
    window.add(StepResult.of(small().training_step(next(batches(1)))))
    assert window.flush()["l0"] <= 3
    assert window.flush() == {}


def test_latents_are_dead_after_as_many_samples_without_firing() -> None:
    sae = small()
    with torch.no_grad():
        sae.b_enc[:] = -100.0
        sae.b_enc[:3] = 100.0
    dead = DeadLatents(48, 500, sae.device)
    for _, expected in ((1, None), (2, 45)):
        dead.add(StepResult.of(sae.training_step(next(batches(1)))))
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


def test_a_step_after_training_is_refused_and_one_of_a_loaded_sae_trains_in_train_mode(tmp_path: Path) -> None:
    from sae_core import SAE

    trainer = Trainer(small(), batches(40), config())
    sae = trainer.fit().sae
    with pytest.raises(ConfigError, match="total_samples: 10240 samples have been trained on already"):
        trainer.step(next(batches(1)))
    with pytest.raises(ConfigError, match=r"this trainer has ended after 10240 samples; Trainer\.resume goes on"):
        trainer.fit()
    loaded = SAE.load(sae.save(tmp_path / "sae"))
    assert not loaded.training
    again = Trainer(loaded, batches(3), config(init_b_dec="zeros"))
    again.step(next(batches(1)))
    assert loaded.training
    assert again.fit().samples == 4 * 256


def test_a_threshold_moves_in_steps_by_hand_too() -> None:
    sae = create("batchtopk", d_in=D_IN, d_sae=48, k=3).eval()
    Trainer(sae, [], config()).step(next(batches(1)))
    assert float(sae.get_buffer("topk_threshold")) > 0


def test_a_trainer_that_was_stopped_goes_on() -> None:
    trainer = Trainer(small(), batches(40), config())
    trainer.callbacks.append(lambda p: p.trainer.stop() if p.trainer.steps == 13 else None)
    assert trainer.fit().samples == 13 * 256
    assert trainer.stopped
    assert trainer.fit().samples == 40 * 256
    twin = Trainer(small(), batches(40), config())
    twin.fit()
    assert trainer.history == twin.history


def test_sequences_count_by_their_positions() -> None:
    sae = create("temporal", d_in=D_IN, d_sae=24, kval_topk=3, n_heads=2, bottleneck_factor=2)
    rates: list[float] = []
    trainer = Trainer(
        sae, [batch.view(32, 8, D_IN) for batch in batches(12)],
        config(total_samples=2500, lr=1.0, lr_warmup_samples=1024, init_b_dec="zeros"),
        [lambda p: rates.append(p.trainer.optimizer.param_groups[0]["lr"])],
    )  # fmt: skip
    result = trainer.fit()
    assert rates[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert result.samples == 2504  # 2500 and the rest of the last sequence of 8
    assert result.history[-1]["samples"] == 2504


def test_rows_are_not_taken_for_a_sequence() -> None:
    sae = create("temporal", d_in=D_IN, d_sae=24, kval_topk=3, n_heads=2, bottleneck_factor=2)
    with pytest.raises(
        DataError, match=r"temporal reads whole sequences, \(sequences, positions, d_in\); rows in random order"
    ):
        Trainer(sae, batches(2), config(total_samples=256)).fit()


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_data_that_never_change_are_no_divergence(value: float) -> None:
    result = Trainer(small(), [torch.full((256, D_IN), value)] * 4, config(total_samples=1024)).fit()
    assert result.history[-1]["loss"] == pytest.approx(0.0, abs=1e-6)


def test_records_have_the_same_keys_from_the_first_one_on() -> None:
    sae = small()
    with torch.no_grad():
        sae.b_enc[10:] = -0.3
    result = Trainer(sae, batches(40), config(dead_after_samples=256 * 25)).fit()
    assert len({tuple(record) for record in result.history}) == 1
    first, last = result.history[0], result.history[-1]
    assert (first["loss/auxiliary_reconstruction"], first["dead_fraction"]) == (0.0, None)
    assert last["loss/auxiliary_reconstruction"] != 0.0
    assert last["dead_fraction"] is not None
    assert last["dead_fraction"] > 0


def test_what_an_architecture_measures_cannot_overwrite_what_the_trainer_does() -> None:
    sae = small()
    window = Window(D_IN, 48, torch.device("cpu"))
    step = sae.training_step(next(batches(1)))
    one = torch.ones(())
    metrics = {"l0": one, "residual": one * 2, "loss": one * 3, "unknown": one * math.nan}
    window.add(replace(StepResult.of(step), metrics=metrics))
    record = window.flush()
    assert (record["metrics/l0"], record["metrics/residual"], record["metrics/loss"]) == (1.0, 2.0, 3.0)
    assert record["metrics/unknown"] is None
    assert record["loss"] == pytest.approx(float(step.loss.detach()), rel=1e-6)
    assert record["l0"] == pytest.approx(float(step.codes.l0().double().mean()))


@pytest.mark.parametrize(("value", "what"), [(torch.ones(3), r"tensor of shape \(3,\)"), (0.5, "float")])
def test_metrics_that_are_not_one_number_are_one_error(value: Any, what: str) -> None:
    step = StepResult.of(small().training_step(next(batches(1))))
    window = Window(D_IN, 48, torch.device("cpu"))
    bad = replace(step, metrics={"odd": value})
    with pytest.raises(DataError, match=f"metrics/odd as a?.*{what}"):
        window.add(bad)


def test_training_that_does_harm_ends_at_the_record_that_shows_it() -> None:
    seen: list[int] = []
    with pytest.raises(DataError, match=r"step 10: the squared error grew from .* explained variance is -"):
        Trainer(small(), batches(40), config(lr=100.0), [lambda p: seen.append(p.trainer.steps)]).fit()
    assert len(seen) == 9


def test_a_bad_start_is_no_divergence() -> None:
    sae = small(decoder_init_norm=None)
    with torch.no_grad():
        sae.W_dec.mul_(30)
        sae.b_dec.add_(10)
    first = Trainer(sae, batches(40), config(init_b_dec="zeros", lr=1e-2)).fit().history[0]
    assert first["explained_variance"] is not None
    assert first["explained_variance"] < -10


@pytest.mark.parametrize(("changes", "samples"), [({"lr_decay_samples": 0.5}, 5), ({"dead_after_samples": 0.1}, 1)])
def test_lengths_may_be_fractions_of_the_run(changes: dict[str, Any], samples: int) -> None:
    whole = dict.fromkeys(changes, 256 * 10 * samples // 10)
    results = [
        Trainer(small(), batches(10), config(total_samples=2560, log_every_steps=2, **each)).fit()
        for each in (changes, whole)
    ]
    assert results[0].history == results[1].history


def test_several_dictionaries_on_one_stream_end_as_each_alone() -> None:
    def dictionaries() -> dict[str, Any]:
        return {
            "small": create("topk", d_in=D_IN, d_sae=24, k=2, seed=1),
            "jump": create("jumprelu", d_in=D_IN, d_sae=48, l0_coefficient=0.01, seed=2),
            "scaled": create(
                "batchtopk", d_in=D_IN, d_sae=48, k=3, seed=3, normalize_activations="expected_average_only_in"
            ),
        }

    configs = {
        "small": config(lr=1e-3, init_samples=100),
        "jump": config(total_samples=256 * 33, log_every_steps=4),
        "scaled": config(init_samples=700, dead_after_samples=512),
    }
    together = Trainer(dictionaries(), batches(40), configs).fit_all()
    for name, sae in dictionaries().items():
        alone = Trainer(sae, batches(40), configs[name]).fit()
        assert alone.history == together[name].history
        assert alone.samples == together[name].samples
        assert alone.sae.metadata == together[name].sae.metadata
        for a, b in zip(alone.sae.state_dict().values(), together[name].sae.state_dict().values(), strict=True):
            assert torch.equal(a, b)


def test_one_that_diverges_is_dropped_and_the_others_go_on(tmp_path: Path) -> None:
    configs = {"good": config(), "wild": config(lr=100.0)}
    trainer = Trainer({"good": small(), "wild": small()}, list(batches(40)), configs)
    results = trainer.fit_all()
    alone = Trainer(small(), batches(40), config()).fit()
    assert results["good"].history == alone.history
    assert results["good"].dropped is None
    assert results["wild"].samples == 2560
    assert "training diverged" in str(results["wild"].dropped)
    resumed = Trainer.resume(trainer.save(tmp_path / "c"), list(batches(40)))
    assert resumed.dropped == trainer.dropped
    assert resumed.finished
    wild = {"a": small(), "b": small()}
    with pytest.raises(DataError, match="diverged"):
        Trainer(wild, batches(40), config(lr=100.0)).fit_all()


def test_records_of_several_dictionaries_go_to_loggers_of_their_own(tmp_path: Path) -> None:
    loggers = {name: [JsonlLogger(JsonlConfig(path=tmp_path / f"{name}.jsonl"))] for name in "ab"}
    saes = {"a": small(), "b": small(seed=4)}
    results = Trainer(saes, batches(20), config(), loggers=loggers).fit_all()
    for name in "ab":
        lines = (tmp_path / f"{name}.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == [{"sae": name, **record} for record in results[name].history]


def test_what_several_dictionaries_share_must_agree() -> None:
    saes = {"a": small(), "b": small()}
    with pytest.raises(ConfigError, match=r"batch_size: SAEs on one stream share it, found \['128', '256'\]"):
        Trainer(saes, [], {"a": config(), "b": config(batch_size=128)})
    with pytest.raises(ConfigError, match="nothing is given for the SAE 'b'"):
        Trainer(saes, [], {"a": config()})
    with pytest.raises(ConfigError, match="several SAEs are trained: a, b"):
        Trainer(saes, [], config()).fit()
    with pytest.raises(ConfigError, match="no SAE to train"):
        Trainer({}, [], config())
