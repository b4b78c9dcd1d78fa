"""Every preset runs with a tiny budget; what it says is measured, and what it writes is whole."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import operator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sae_core import TrainConfig, Trainer, create
from sae_core.errors import ConfigError, UnknownNameError
from sae_synthetic import SyntheticModel, mean_correlation_coefficient
from sae_synthetic.experiments import (
    PRESETS,
    consistency,
    crosscoder,
    get_preset,
    l0_selection,
    run_preset,
    sparse_but_wrong,
    synthsaebench,
    tree,
)
from sae_synthetic.experiments import result as result_module
from sae_synthetic.experiments.result import Settings
from sae_synthetic.experiments.steering import SteerL0
from torch import Tensor

TINY = dict.fromkeys(PRESETS, 1e-06)  # at least twenty steps are taken


@pytest.fixture
def small_worlds(monkeypatch: pytest.MonkeyPatch) -> None:
    """The two worlds of SynthSAEBench in small, so that a test is not spent on making directions orthogonal."""
    small = synthsaebench._world(256, 48, roots=4, least=5e-3)
    monkeypatch.setattr(synthsaebench, "MINI", small)
    monkeypatch.setattr(synthsaebench, "SYNTHSAEBENCH_16K", small)
    monkeypatch.setattr(synthsaebench, "MINI_LATENTS", 192)
    monkeypatch.setattr(synthsaebench, "FULL_LATENTS", 128)
    monkeypatch.setattr(synthsaebench, "FULL_WIDTHS", (8, 32))
    monkeypatch.setattr(synthsaebench, "EVAL_SAMPLES", 2000)
    monkeypatch.setattr(sparse_but_wrong, "EVAL_SAMPLES", 2000)
    monkeypatch.setattr(crosscoder, "EVAL_SAMPLES", 5000)
    monkeypatch.setattr(l0_selection, "EVAL_SAMPLES", 2000)
    monkeypatch.setattr(l0_selection, "LOOK_SAMPLES", 500)


@pytest.mark.usefixtures("small_worlds")
@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_runs_and_is_written_whole(name: str, tmp_path: Path) -> None:
    result = run_preset(name, seeds=2 if name == "consistency" else 1, scale=TINY[name], progress=False)
    assert result.name == name
    assert result.paper.split()[-1] in PRESETS[name].paper
    assert all(len(row) == len(result.columns) for row in result.rows)
    assert any(row[0].startswith(("random", "untrained")) for row in result.rows)  # the baseline, always
    assert any("publ" in column for column in result.columns)
    assert result.claims
    assert result.seconds > 0
    written, page = result.save(tmp_path / "out")
    content = json.loads(written.read_text(), parse_constant=lambda constant: constant)
    assert content["rows"] == result.rows
    assert [claim["holds"] for claim in content["claims"]] == [claim.holds for claim in result.claims]
    html = page.read_text()
    assert "<script src=" not in html
    assert html.count("Plotly.newPlot(") >= len(result.figures) >= 1
    assert all(f"<h2>{title}</h2>" in html for title, _ in result.figures)


@pytest.mark.parametrize("name", ["hedging", "absorption"])
def test_a_seed_decides_every_number(name: str) -> None:
    one, other = (run_preset(name, seeds=2, scale=1e-6, progress=False) for _ in range(2))
    assert one.data == other.data
    assert one.rows == other.rows


def test_the_hedging_preset_shows_hedging() -> None:
    result = run_preset("hedging", scale=0.25, progress=False)
    assert [claim.holds for claim in result.claims] == [True] * 4


def test_all_presets_are_known_by_name_and_others_are_answered() -> None:
    assert list(PRESETS) == [
        "consistency",
        "sparse-but-wrong",
        "l0-selection",
        "hedging",
        "absorption",
        "tree",
        "crosscoder",
        "synthsaebench-mini",
        "synthsaebench",
    ]
    with pytest.raises(UnknownNameError, match=r"unknown experiment 'hegding'; did you mean 'hedging'\?"):
        get_preset("hegding")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seeds": 0}, "seeds must be at least 1"),
        ({"scale": 0.0}, r"scale must be in \(0, 100\]"),
        ({"scale": math.nan}, "scale must be in"),
        ({"device": "nonsense"}, "device: 'nonsense' cannot be used"),
        ({"processes": 2}, "hedging takes its seeds one after the other; those that share them: synthsaebench-mini"),
    ],
)
def test_impossible_settings_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run_preset("hedging", **arguments)


@pytest.mark.parametrize(("processes", "message"), [(0, "at least 1, not 0"), (3, r"3 are to share 2 seed\(s\)")])
def test_processes_are_no_more_than_the_seeds(processes: int, message: str) -> None:
    with pytest.raises(ConfigError, match=f"processes.*{message}"):
        Settings(seeds=2, processes=processes)


def test_processes_share_seeds_which_come_back_in_order() -> None:
    settings = Settings(seeds=3, processes=2, progress=False)
    repeated = settings.each_seed(itertools.repeat)  # the settings, as often as the seed says
    assert [list(seed) for seed in repeated] == [[], [settings], [settings] * 2]
    with pytest.raises(TypeError, match="unsupported operand"):
        settings.each_seed(operator.truediv)


def test_the_consistency_data_are_the_published() -> None:
    truth, points = consistency._data()
    assert truth.shape == (32, 16)
    assert points.shape == (50_000, 16)
    torch.testing.assert_close(truth.norm(dim=1), torch.ones(32))
    # Each point lies in the span of three directions: its least-squares residual on the right three is nothing.
    dense = torch.linalg.lstsq(truth.T.double(), points[:5].T.double()).residuals
    assert float(dense.abs().sum()) < 1e-9
    assert consistency.PUBLISHED == {"topk": (0.967, 0.951), "standard": (0.631, 0.609)}


def test_the_sparse_but_wrong_world_is_the_published() -> None:
    features, generator = sparse_but_wrong.world()
    assert (features.num_features, features.hidden_dim) == (50, 100)
    rates = generator.firing_probabilities
    assert (float(rates[0]), float(rates[-1])) == pytest.approx((0.345 * 49 / 50 + 0.05, 0.05))
    assert float(rates.sum()) == pytest.approx(sparse_but_wrong.RIGHT, abs=0.1)


def test_the_tree_fires_at_its_rates_and_its_children_exclude_each_other() -> None:
    _, generator = tree.world(0)
    fires = generator.sample_codes(40_000).to_dense() > 0
    rates = fires.double().mean(0)
    assert rates[[0, 4, 8]].tolist() == pytest.approx([0.15] * 3, abs=0.008)
    assert rates[[1, 2, 3]].tolist() == pytest.approx([0.03] * 3, abs=0.004)
    for parent in (0, 4, 8):
        children = fires[:, parent + 1 : parent + 4].sum(1)
        assert int(children.max()) == 1
        assert not bool((children.bool() & ~fires[:, parent]).any())


def test_synthsaebench_is_the_published_setting() -> None:
    world = synthsaebench.SYNTHSAEBENCH_16K
    assert (world.num_features, world.hidden_dim, world.seed, world.bias) == (16_384, 768, 42, 0.5)
    assert world.firing_probability.to_dict() == {
        "generator_name": "zipfian",
        "exponent": 0.5,
        "max_prob": 0.4,
        "min_prob": 5e-4,
    }
    assert world.hierarchy is not None
    hierarchy = world.hierarchy
    assert (hierarchy.total_root_nodes, hierarchy.branching_factor, hierarchy.max_depth) == (128, 4, 3)
    assert hierarchy.compensate_probabilities
    assert hierarchy.scale_children_by_parent
    assert world.correlation is not None
    assert (world.correlation.rank, world.correlation.correlation_scale) == (25, 0.1)
    assert synthsaebench.FULL_RECIPES["+ k from 60"][0] == {"k": {"from": 60, "to": 25, "over": 0.5}}
    assert (synthsaebench.FULL_SAMPLES, synthsaebench.FULL_RATE, synthsaebench.FULL_LATENTS) == (
        200_000_000,
        3e-4,
        4096,
    )


@pytest.mark.usefixtures("small_worlds")
def test_k_falls_from_60_to_25_and_the_rate_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, float, float]] = []
    plain = result_module.Trainer

    def watched(sae: Any, batches: Any, plan: TrainConfig, callbacks: Any = ()) -> Trainer:
        def watch(progress: Any) -> None:
            k = float(progress.result.l0.double().mean())
            seen.append((str(sae.config.k), k, progress.trainer.optimizer.param_groups[0]["lr"]))

        return plain(sae, batches, plan, callbacks=[*callbacks, watch])

    monkeypatch.setattr(result_module, "Trainer", watched)
    synthsaebench.run_full(Settings(scale=1e-6, progress=False))
    fixed, falling = seen[:20], seen[40:]
    assert {round(k) for _, k, _ in fixed} == {25}
    assert {lr for _, _, lr in fixed} == {3e-4}
    assert round(falling[0][1]) >= 58
    assert [round(k) for _, k, _ in falling[11:]] == [25] * 9
    assert falling[-1][2] < 6e-5 < falling[10][2] == 3e-4


@pytest.mark.slow
def test_synthsaebench_takes_steps_at_full_size() -> None:
    config = dataclasses.replace(synthsaebench.SYNTHSAEBENCH_16K, orthogonalization=None)
    world = SyntheticModel(config)
    k, _, _ = synthsaebench.FULL_RECIPES["+ k from 60"]
    sae = create("matryoshka_batchtopk", d_in=768, d_sae=4096, seed=0, matryoshka_widths=synthsaebench.FULL_WIDTHS, **k)
    plan = TrainConfig(total_samples=2048, batch_size=1024, lr=3e-4, init_b_dec="zeros", progress_bar=False)
    before = mean_correlation_coefficient(sae.W_dec[:512], world.feature_dict.feature_vectors[:512])
    result = Trainer(sae, synthsaebench._batches(world, 0, 1024), plan).fit()
    assert result.samples == 2048
    assert math.isfinite(result.history[-1]["loss"])
    assert 0 < before < 0.5
    codes = world.activation_generator.held_out().sample_codes(2000)
    assert float(codes.l0().double().mean()) == pytest.approx(34, abs=3)  # as published


def _progress(l0: float, steps: int, sae: Any, batch: int = 100) -> Any:
    trainer = SimpleNamespace(steps=steps, samples=steps * batch, sae=sae)
    return SimpleNamespace(trainer=trainer, result=SimpleNamespace(l0=torch.full((4,), l0)))


@pytest.mark.parametrize(("l0", "grows"), [(20.0, True), (2.0, False)])
def test_steering_pushes_towards_the_target(l0: float, grows: bool) -> None:
    sae = create("standard", d_in=4, d_sae=8, l1_coefficient=1.0)
    steer = SteerL0("l1_coefficient", 5.0, 10_000)
    for step in range(1, 101):
        steer(_progress(l0, step, sae))
    value = float(sae.config.l1_coefficient)
    assert (value > 1.2) if grows else (value < 0.8)


def test_steering_brakes_before_the_target_is_reached_and_rests_on_it() -> None:
    sae = create("standard", d_in=4, d_sae=8, l1_coefficient=1.0)
    steer = SteerL0("l1_coefficient", 5.0, 100_000)
    steer(_progress(5.0, 10, sae))
    assert sae.config.l1_coefficient == 1.0
    falling = SteerL0("l1_coefficient", 5.0, 100_000)
    for step, l0 in zip(range(10, 100, 10), (40, 35, 30, 26, 22, 18, 14, 11, 8), strict=True):
        before = sae.config.l1_coefficient
        falling(_progress(l0, step, sae))
    assert sae.config.l1_coefficient < before  # above the target still, but on the way to far below it


def test_an_sae_is_steered_to_its_l0() -> None:
    features, generator = tree.world(0)
    source = (features(generator.sample_codes(200)).detach() for _ in iter(int, 1))
    sae = create("standard", d_in=20, d_sae=20, l1_coefficient=0.02, seed=0)
    plan = TrainConfig(total_samples=200_000, batch_size=200, lr=3e-3, init_b_dec="zeros", progress_bar=False)
    Trainer(sae, source, plan, callbacks=[SteerL0("l1_coefficient", 1.1, 200_000, 0.1)]).fit()
    x: Tensor = features(generator.sample_codes(2000)).detach()
    assert float(sae.encode_sparse(x).l0().double().mean()) == pytest.approx(1.1, rel=0.25)


def test_a_target_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="target L0 must be positive"):
        SteerL0("l1_coefficient", 0.0, 100)
