"""Synthetic activations for a trainer: exact batches, exact resumption, and settings that make sense."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_core import ActivationBatch
from sae_core.cli import main
from sae_core.errors import ConfigError, DataError, UnknownNameError
from sae_core.protocols import Resumable
from sae_synthetic import (
    ActivationGenerator,
    FeatureDictionary,
    MultiSiteSource,
    MultiSiteSourceConfig,
    SyntheticActivationIterator,
    SyntheticModel,
    SyntheticModelConfig,
    SyntheticSource,
    SyntheticSourceConfig,
)
from torch import Tensor


def _source(**settings: Any) -> SyntheticSource:
    return SyntheticSource(
        SyntheticSourceConfig(
            **{"num_features": 30, "d_in": 8, "firing_probability": 0.2, "std_firing_magnitudes": 0.1, **settings}
        )
    )


def _first(source: SyntheticSource | SyntheticActivationIterator, count: int, size: int = 16) -> list[Tensor]:
    return list(itertools.islice(source.batches(size), count))


def test_resumed_batches_are_what_the_uninterrupted_ones_are() -> None:
    whole = _first(_source(seed=3), 5)
    stopped = _source(seed=3).batches(16)
    assert isinstance(stopped, Resumable)
    assert all(map(torch.equal, itertools.islice(stopped, 2), whole[:2]))
    state = json.loads(json.dumps(stopped.state_dict()))
    next(stopped)  # what is drawn after the state was taken does not move it
    resumed = _source(seed=3).batches(16)
    resumed.load_state_dict(state)
    assert all(map(torch.equal, itertools.islice(resumed, 3), whole[2:]))


def test_two_rows_of_batches_of_one_source_have_places_of_their_own() -> None:
    source = _source(seed=3)
    ahead, behind = source.batches(16), source.batches(16)
    first = next(ahead)
    next(ahead)
    source.model.sample(5)
    assert torch.equal(next(behind), first)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, "the keys 'samples' and 'generator'"),
        ({"samples": 16, "generator": {"seed": 0}}, "'position' must be a non-negative integer, not None"),
        ({"samples": -1, "generator": {"seed": 0, "position": 1}}, "'samples' must be a non-negative integer, not -1"),
        ({"samples": 16, "generator": {"seed": 0, "position": 1}, "rank": 1}, "found .*'rank'"),
    ],
)
def test_a_state_of_something_else_is_refused_and_changes_nothing(state: dict[str, Any], message: str) -> None:
    batches = _source(seed=3).batches(16)
    before = batches.state_dict()
    with pytest.raises(DataError, match=message):
        batches.load_state_dict(state)
    assert batches.state_dict() == before


def test_a_seed_of_a_source_is_exact() -> None:
    one, same, other = (torch.cat(_first(_source(seed=seed), 2)) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("ranks", [2, 3])
def test_parts_are_rows_of_the_batches_that_one_process_has(ranks: int) -> None:
    whole = _first(_source(seed=5, total_samples=40), 3)
    for rank in range(ranks):
        parts = _source(seed=5, total_samples=40).parts(16, rank, ranks)
        first, state = next(parts), parts.state_dict()
        for (part, size), expected in zip([first, *parts], whole, strict=True):
            assert size == len(expected)
            torch.testing.assert_close(part, expected[rank::ranks], rtol=0, atol=0)
        alone = _source(seed=5, total_samples=40).batches(16)
        alone.load_state_dict(state)
        assert torch.equal(next(alone), whole[1])


def test_pairs_of_several_sites_come_in_parts_too() -> None:
    def source() -> MultiSiteSource:
        return MultiSiteSource(MultiSiteSourceConfig(num_features=32, sites={"in": 16}, targets={"out": 8}, seed=3))

    whole = next(source().batches(9))
    (part, size), _ = (next(source().parts(9, rank, 2)) for rank in (1, 0))
    assert isinstance(part, ActivationBatch)
    assert isinstance(whole, ActivationBatch)
    assert size == 9
    assert torch.equal(part.inputs, whole.inputs[1::2])
    assert part.targets is not None
    assert whole.targets is not None
    assert torch.equal(part.targets, whole.targets[1::2])


def test_total_samples_end_the_source_also_after_a_pause() -> None:
    stopped = _source(total_samples=40).batches(16)
    assert [len(batch) for batch in itertools.islice(stopped, 2)] == [16, 16]
    resumed = _source(total_samples=40).batches(16)
    resumed.load_state_dict(stopped.state_dict())
    assert [len(batch) for batch in resumed] == [8]
    assert not list(resumed)


def test_a_saved_model_is_sampled_with_the_sources_own_seed(tmp_path: Path) -> None:
    SyntheticModel(SyntheticModelConfig(num_features=30, hidden_dim=8, seed=5)).save(tmp_path)
    one, same, other = (
        _first(SyntheticSource(SyntheticSourceConfig(model=tmp_path, seed=seed)), 1)[0] for seed in (1, 1, 2)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    source = SyntheticSource(SyntheticSourceConfig(model=tmp_path))
    assert source.d_in == 8
    assert source.metadata()["synthetic_model"] == {"config": source.model.cfg.to_dict(), "path": str(tmp_path)}


def test_a_run_on_a_world_named_from_here_goes_on_from_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    SyntheticModel(SyntheticModelConfig(num_features=30, hidden_dim=8, seed=5)).save("world")
    Path("run.yaml").write_text(
        "sae: {architecture: topk, d_sae: 16, k: 2}\nsource: {name: synthetic, model: world}\n"
        "train: {total_samples: 64, batch_size: 16, progress_bar: false, checkpoint_every_samples: 32}\noutput: out\n"
    )
    assert main(["train", "run.yaml"]) == 0
    monkeypatch.chdir("/")
    assert main(["train", "--resume", str(tmp_path / "out"), "--set", "train.total_samples=96"]) == 0
    assert '"samples": 96' in (tmp_path / "out" / "log.jsonl").read_text().splitlines()[-1]


def test_settings_of_a_run_file_reach_the_model() -> None:
    source = _source(
        firing_probability={"generator_name": "linear", "max_prob": 0.5, "min_prob": 0.25},
        hierarchy={"total_root_nodes": 2, "branching_factor": 3, "max_depth": 2},
        correlation={"rank": 2},
        orthogonalization={"num_steps": 3},
        mean_firing_magnitudes={"generator_name": "constant", "value": 2.0},
        bias=1.5,
        seed=4,
    )
    config = source.model.cfg
    assert config.hierarchy is not None
    assert config.hierarchy.branching_factor == 3
    assert config.correlation is not None
    assert config.orthogonalization is not None
    assert source.model.activation_generator.mean_firing_magnitudes.tolist() == [2.0] * 30
    assert float(source.model.feature_dict.bias.detach().norm()) == pytest.approx(1.5)
    assert config.seed == 4
    assert float(_source().model.feature_dict.bias.detach().norm()) == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_features": None}, "missing key num_features"),
        ({"firing_probability": 1.5}, r"probability must be in \(0, 1\], not 1.5"),
        ({"firing_probability": {"generator_name": "zipfain"}}, "did you mean 'zipfian'"),
        ({"hierarchy": {"total_roots": 3}}, "total_root"),
        ({"total_samples": 0}, "total_samples must be at least 1"),
        ({"seed": -1}, "seed must be a non-negative integer"),
        ({"model": Path("somewhere")}, "the saved world has its own num_features, .*d_in"),
        ({"mean_firing_magnitudes": -2.0}, "mean_firing_magnitudes must not be negative"),
    ],
)
def test_impossible_settings_are_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, UnknownNameError), match=message):
        _source(**settings)


def test_an_iterator_goes_on_where_its_state_was_taken() -> None:
    def make() -> SyntheticActivationIterator:
        features = FeatureDictionary(30, 8, initializer=None, seed=1)
        return SyntheticActivationIterator(features, ActivationGenerator(30, 0.2, 0.1, seed=2), 16)

    whole = make()
    wanted = [next(whole), whole.next_batch(), *_first(whole, 1)]
    stopped = make()
    assert torch.equal(next(iter(stopped)), wanted[0])
    resumed = make()
    resumed.load_state_dict(stopped.state_dict())
    assert torch.equal(resumed.next_batch(), wanted[1])
    row = resumed.batches(16)
    assert isinstance(row, Resumable)
    assert torch.equal(next(row), wanted[2])
    again = make().batches(16)
    again.load_state_dict(row.state_dict())
    assert torch.equal(next(again), next(row))


def test_an_iterators_parts_must_fit() -> None:
    features = FeatureDictionary(30, 8, initializer=None, seed=1)
    with pytest.raises(ConfigError, match="the dictionary has 30 features, the generator 20"):
        SyntheticActivationIterator(features, ActivationGenerator(20, 0.2), 16)
    with pytest.raises(ConfigError, match="batch_size must be at least 1"):
        SyntheticActivationIterator(features, ActivationGenerator(30, 0.2), 0)
