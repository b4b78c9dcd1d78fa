"""Worlds of several sites: what is where is known, batches of all sites are of one draw, and dictionaries are judged by it."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_core import SAE, ActivationBatch, TrainConfig, Trainer, create
from sae_core.errors import ConfigError, DataError, FormatError
from sae_core.protocols import ActivationSource, HasMetadata, HasTargets, Resumable
from sae_synthetic import (
    ActivationGenerator,
    ConstantFiringProbabilityConfig,
    HierarchyConfig,
    HierarchyNode,
    LowRankCorrelationConfig,
    MultiSiteModel,
    MultiSiteModelConfig,
    MultiSiteSource,
    MultiSiteSourceConfig,
    OrthogonalizationConfig,
    cosine_similarities,
    eval_sae_on_multi_site_model,
    hierarchy_modifier,
)

HALF = ConstantFiringProbabilityConfig(0.5)


def _config(**settings: Any) -> MultiSiteModelConfig:
    defaults: dict[str, Any] = {"num_features": 40, "sites": {"a": 16, "b": 16}, "seed": 3}
    return MultiSiteModelConfig(**{**defaults, **settings})


def _source(**settings: Any) -> MultiSiteSource:
    defaults: dict[str, Any] = {"num_features": 40, "sites": {"a": 16, "b": 8}, "firing_probability": 0.2, "seed": 3}
    return MultiSiteSource(MultiSiteSourceConfig(**{**defaults, **settings}))


def test_each_feature_is_where_the_config_says() -> None:
    world = MultiSiteModel(_config(exclusive={"a": 5, "b": 7}, weak={"a": 6}, weak_strength=0.25))
    strengths = world.strengths()
    kinds = sorted(tuple(round(float(x), 4) for x in column) for column in strengths.T)
    assert kinds == sorted([(1.0, 0.0)] * 5 + [(0.0, 1.0)] * 7 + [(0.25, 1.0)] * 6 + [(1.0, 1.0)] * 22)
    assert len(world.exclusive_to("a")) == 5
    assert len(world.exclusive_to("b")) == 7
    assert len(world.shared()) == 28
    frequent = MultiSiteModel(_config(exclusive={"a": 20})).exclusive_to("a").tolist()
    assert set(frequent) != set(range(20)), "which ones is drawn, so it is not the most frequent"


@pytest.mark.parametrize("alike", [0.0, 0.6, 1.0])
def test_shared_features_are_as_alike_as_asked(alike: float) -> None:
    world = MultiSiteModel(_config(num_features=300, sites={"a": 64, "b": 64, "c": 64}, alike=alike))
    vectors = [each.feature_vectors.detach() for each in world.dictionaries.values()]
    for one, other in itertools.combinations(vectors, 2):
        cosines = cosine_similarities(one, other).diagonal()
        assert float(cosines.mean()) == pytest.approx(alike, abs=0.02)
    assert torch.allclose(world.strengths(), torch.ones(3, 300), atol=1e-5)


def test_all_sites_and_targets_of_a_row_are_of_one_draw() -> None:
    world = MultiSiteModel(_config(targets={"out": 5}, exclusive={"out": 4}, bias=0.5))
    batch, codes = world.sample_with_codes(30)
    dense = codes.to_dense()
    assert batch.targets is not None
    parts = {**dict(zip("ab", batch.inputs.split(16, dim=1), strict=True)), "out": batch.targets}
    for name, part in parts.items():
        features = world.dictionaries[name]
        torch.testing.assert_close(part, dense @ features.feature_vectors + features.bias)
        assert float(features.bias.detach().norm()) == pytest.approx(0.5)


def test_a_seed_decides_the_world_and_its_samples() -> None:
    one, same, other = (MultiSiteModel(_config(exclusive={"b": 9}, seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(one.sample(20), same.sample(20))
    assert torch.equal(one.strengths(), same.strengths())
    assert not torch.equal(one.strengths(), other.strengths())


@pytest.mark.parametrize("seed", [4, None])
def test_a_saved_world_comes_back_as_it_was(tmp_path: Path, seed: int | None) -> None:
    world = MultiSiteModel(
        _config(
            targets={"out": 5},
            exclusive={"b": 3},
            weak={"a": 2},
            hierarchy=HierarchyConfig(4, 2, 2),
            correlation=LowRankCorrelationConfig(rank=2),
            std_firing_magnitudes=0.2,
            bias=0.3,
            seed=seed,
        )
    )
    world.save(tmp_path / "new" / "world")
    loaded = MultiSiteModel.load_from_disk(tmp_path / "new" / "world")
    assert loaded.cfg == world.cfg
    first, again = (each.sample_with_codes(50)[0] for each in (world, loaded))
    assert torch.equal(first.inputs, again.inputs)
    assert first.targets is not None
    assert again.targets is not None
    assert torch.equal(first.targets, again.targets)


@pytest.mark.parametrize("damage", ["config", "json", "weights", "shape", "extra", "firing"])
def test_a_damaged_folder_is_refused_by_file(tmp_path: Path, damage: str) -> None:
    from safetensors.torch import load_file, save_file

    MultiSiteModel(_config()).save(tmp_path)
    weights = tmp_path / "multi_site.safetensors"
    tensors = load_file(weights)
    if damage == "config":
        (tmp_path / "multi_site_config.json").unlink()
    elif damage == "json":
        (tmp_path / "multi_site_config.json").write_text(json.dumps({"num_features": 40, "site": {}}))
    elif damage == "weights":
        weights.unlink()
    elif damage == "shape":
        save_file({**tensors, "a/bias": torch.zeros(3)}, weights)
    elif damage == "extra":
        save_file({**tensors, "c/bias": torch.zeros(3)}, weights)
    else:
        (tmp_path / "firing" / "synthetic_model_config.json").unlink()
    with pytest.raises(
        FormatError, match=r"multi_site_config\.json|multi_site\.safetensors|synthetic_model_config\.json"
    ):
        MultiSiteModel.load_from_disk(tmp_path)


def test_a_world_may_fire_as_a_generator_that_is_given() -> None:
    generator = ActivationGenerator(
        40, 0.5, modify_activations=hierarchy_modifier(HierarchyNode(0, [HierarchyNode(1)]))
    )
    with pytest.raises(ConfigError, match="must agree on whether there are a hierarchy"):
        MultiSiteModel(_config(), activation_generator=generator)
    plain = ActivationGenerator(40, 0.5, seed=9)
    world = MultiSiteModel(_config(), activation_generator=plain)
    codes = plain.fork(9).sample_codes(10)
    assert torch.equal(world.sample_with_codes(10)[1].to_dense(), codes.to_dense())
    with pytest.raises(ConfigError, match="has not the 40 features"):
        MultiSiteModel(_config(), activation_generator=ActivationGenerator(3, 0.5))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sites": {}}, "sites: give at least one"),
        ({"sites": {"a": 0}}, "width of site 'a' must be a positive integer, not 0"),
        ({"targets": {"a": 4}}, "sites and targets share a name"),
        ({"exclusive": {"c": 1}}, "exclusive: no site 'c'"),
        ({"exclusive": {"a": 30}, "weak": {"b": 11}}, "41 features in all, but there are only 40"),
        ({"weak": {"b": -1}}, "weak: 'b' must be a number of features"),
        ({"sites": {"a": 4}, "exclusive": {"a": 1}}, "there is only one"),
        ({"weak_strength": 1.0}, r"weak_strength must be in \(0, 1\)"),
        ({"alike": 1.5}, r"alike must be in \[0, 1\]"),
        ({"sites": {"a": 4, "b": 5}, "alike": 0.5}, "alike: directions compare within one width only"),
        ({"num_features": 0}, "num_features must be a positive integer"),
        ({"mean_firing_magnitudes": -1.0}, "mean_firing_magnitudes must not be negative"),
    ],
)
def test_impossible_worlds_are_refused_by_field(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _config(**settings)


def test_a_source_names_its_sites_and_resumes_exactly() -> None:
    source = _source(targets={"out": 4}, total_samples=40)
    for protocol in (ActivationSource, HasTargets, HasMetadata):
        assert isinstance(source, protocol)
    assert source.sites == {"a": 16, "b": 8}
    assert source.target_sites == {"out": 4}
    assert source.metadata()["synthetic_model"]["config"]["targets"] == {"out": 4}
    whole = list(source.batches(16))
    assert [len(batch.inputs) for batch in whole if isinstance(batch, ActivationBatch)] == [16, 16, 8]
    stopped = source.batches(16)
    assert isinstance(stopped, Resumable)
    next(stopped)
    state = json.loads(json.dumps(stopped.state_dict()))
    resumed = _source(targets={"out": 4}, total_samples=40).batches(16)
    resumed.load_state_dict(state)
    for batch, wanted in zip(resumed, whole[1:], strict=True):
        assert torch.equal(batch.inputs, wanted.inputs)
        assert torch.equal(batch.targets, wanted.targets)
    with pytest.raises(DataError, match="'samples'"):
        resumed.load_state_dict({"samples": 3})


def test_a_source_without_targets_gives_tensors_of_all_sites(tmp_path: Path) -> None:
    batch = next(_source().batches(5))
    assert isinstance(batch, torch.Tensor)
    assert batch.shape == (5, 24)
    MultiSiteModel(_config()).save(tmp_path)
    one, same, other = (
        next(MultiSiteSource(MultiSiteSourceConfig(model=tmp_path, seed=seed)).batches(5)) for seed in (1, 1, 2)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_features": None}, "missing key num_features"),
        ({"sites": None}, "missing key sites"),
        ({"model": Path("somewhere")}, "the saved world has its own num_features, .*sites"),
        ({"exclusive": {"q": 3}}, "exclusive: no site 'q'"),
        ({"hierarchy": {"total_roots": 3}}, "total_root"),
        ({"total_samples": 0}, "total_samples must be at least 1"),
    ],
)
def test_impossible_settings_of_a_source_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _source(**settings)


def _at_truth(sae: SAE, directions: torch.Tensor, encoder: torch.Tensor | None = None) -> SAE:
    """Latent i is feature i: its direction, and an encoder that sees it."""
    parameters = dict(sae.named_parameters())
    with torch.no_grad():
        parameters["W_dec"].copy_(directions)
        parameters["encoder"].copy_(directions if encoder is None else encoder)
    return sae


def test_a_crosscoder_at_the_truth_has_every_score() -> None:
    world = MultiSiteModel(
        _config(num_features=12, exclusive={"a": 2, "b": 3}, weak={"a": 2}, sites={"a": 24, "b": 24})
    )
    sae = create("topk", d_in=48, d_sae=12, k=3, reads={"a": 24, "b": 24}, apply_b_dec_to_input=False)
    found = eval_sae_on_multi_site_model(_at_truth(sae, world.reads.feature_vectors.detach()), world, 500)
    assert found.whole.mcc == pytest.approx(1)
    assert found.share_error == pytest.approx(0, abs=1e-5)
    a, b = found.sites["a"], found.sites["b"]
    assert (a.exclusive_features, a.exclusive_found, a.exclusive_latents, a.exclusive_right) == (2, 1.0, 2, 1.0)
    assert (b.exclusive_features, b.exclusive_found, b.exclusive_latents, b.exclusive_right) == (3, 1.0, 3, 1.0)
    assert a.mcc == pytest.approx(1)
    assert found.whole.baseline is not None
    assert found.whole.baseline.mcc < 0.9
    flat = found.to_log_dict("x/")
    assert flat["x/sites/b/exclusive_right"] == 1.0
    assert json.loads(json.dumps(found.to_dict()))["sites"]["a"]["exclusive_features"] == 2


def test_a_latent_that_loses_a_weak_feature_at_a_site_is_an_artefact() -> None:
    world = MultiSiteModel(_config(num_features=12, weak={"a": 3}, exclusive={"b": 1}, sites={"a": 24, "b": 24}))
    directions = world.reads.feature_vectors.detach().clone()
    weak = (world.strengths()[0] == world.cfg.weak_strength) | (world.strengths()[0].sub(0.2).abs() < 1e-4)
    directions[weak, :24] = 0  # shrunk away
    sae = create("topk", d_in=48, d_sae=12, k=3, reads={"a": 24, "b": 24}, apply_b_dec_to_input=False)
    b = eval_sae_on_multi_site_model(_at_truth(sae, directions), world, 200, baseline=False).sites["b"]
    assert (b.exclusive_features, b.exclusive_found, b.exclusive_latents) == (1, 1.0, 4)
    assert b.exclusive_right == pytest.approx(0.25)


def test_a_transcoder_is_matched_with_the_features_that_are_written() -> None:
    world = MultiSiteModel(
        _config(num_features=10, sites={"in": 24}, targets={"out": 20}, exclusive={"in": 3}, firing_probability=HALF)
    )
    assert world.writes is not None
    written = world.strengths()[1] > 0
    sae = create("topk", d_in=24, d_sae=7, d_out=20, k=7, seed=0)
    directions = world.writes.feature_vectors.detach()[written]
    sae = _at_truth(sae, directions, world.reads.feature_vectors.detach()[written])
    found = eval_sae_on_multi_site_model(sae, world, 500)
    assert found.whole.mcc == pytest.approx(1)
    assert list(found.sites) == ["out"]
    assert found.share_error is None
    assert found.whole.classification.recall == pytest.approx(1, abs=0.02)


def _late_world(early: int, late: int, width: int) -> MultiSiteModel:
    """Two layers, read and written; the last `late` features are not yet there at the first layer."""
    config = _config(
        num_features=early + late,
        sites={"in0": width, "in1": width},
        targets={"out0": width, "out1": width},
        firing_probability=ConstantFiringProbabilityConfig(0.1),
        orthogonalization=OrthogonalizationConfig(num_steps=50),
    )
    drawn = MultiSiteModel(config)
    with torch.no_grad():
        for site in ("in0", "out0"):
            drawn.dictionaries[site].feature_vectors[early:] = 0
    return MultiSiteModel(config, drawn.dictionaries, drawn.activation_generator)


def _cross_layer_transcoder(width: int, **settings: Any) -> SAE:
    sites = {"d_in": 2 * width, "reads": {"in0": width, "in1": width}, "writes": {"out0": width, "out1": width}}
    return create("cross_layer_transcoder", **sites, **settings)


def test_a_cross_layer_transcoder_is_judged_by_all_that_its_latents_write() -> None:
    world, sae = _late_world(8, 8, 24), _cross_layer_transcoder(24, d_sae=16)
    assert world.writes is not None
    read, written = world.reads.feature_vectors.detach(), world.writes.feature_vectors.detach()
    parameters = dict(sae.named_parameters())
    with torch.no_grad():  # the early features are read at the first layer and written at both, the late at the second
        parameters["encoder.0"].copy_(read[:8, :24])
        parameters["encoder.1"].copy_(read[8:, 24:])
        parameters["W_dec.0"].copy_(written[:8])
        parameters["W_dec.1"].copy_(written[8:, 24:])
        for layer in (0, 1):
            parameters[f"threshold.{layer}"].fill_(0.5)
    found = eval_sae_on_multi_site_model(sae, world, 1000)
    assert found.whole.mcc == pytest.approx(1)
    assert found.share_error == pytest.approx(0, abs=1e-5)
    assert found.whole.baseline is not None
    assert found.whole.baseline.mcc < 0.7
    first, second = found.sites["out0"], found.sites["out1"]
    assert (first.exclusive_features, first.exclusive_latents) == (0, 0)
    assert (second.exclusive_features, second.exclusive_found, second.exclusive_right) == (8, 1.0, 1.0)
    with torch.no_grad():  # one early feature is found at the second layer instead, too late to write it at the first
        parameters["W_dec.1"][0].copy_(written[0, 24:])
        parameters["W_dec.0"][0].zero_()
    late = eval_sae_on_multi_site_model(sae, world, 1000, baseline=False)
    assert late.whole.mcc < 0.99
    assert late.sites["out1"].exclusive_right == pytest.approx(7 / 8)
    assert late.share_error is not None
    assert late.share_error > 0.02


def test_a_trained_cross_layer_transcoder_finds_where_features_begin() -> None:
    world = _late_world(8, 4, 16)
    assert world.writes is not None
    generator, reads, writes = world.activation_generator.fork(1), world.reads, world.writes
    draws = (generator.sample_codes(512) for _ in iter(int, 1))
    batches = (ActivationBatch(reads(codes).detach(), writes(codes).detach()) for codes in draws)
    sae = _cross_layer_transcoder(16, d_sae=24, activation="batchtopk", k=1.2, seed=0)
    config = TrainConfig(
        total_samples=60_000,
        batch_size=256,
        lr=1e-2,
        lr_decay_samples=30_000,
        dead_after_samples=10_000,
        progress_bar=False,
    )
    Trainer(sae, batches, config).fit()
    found = eval_sae_on_multi_site_model(sae, world, 2000)
    assert found.whole.baseline is not None
    assert found.whole.mcc > 0.9 > found.whole.baseline.mcc
    assert found.sites["out1"].exclusive_found is not None
    assert found.sites["out1"].exclusive_found == 1


def test_an_sae_of_one_site_says_which() -> None:
    world = MultiSiteModel(_config())
    sae = create("topk", d_in=16, d_sae=20, k=3)
    with pytest.raises(ConfigError, match=r"reads 16 columns, a, b have 32; name the sites with reads="):
        eval_sae_on_multi_site_model(sae, world, 100)
    found = eval_sae_on_multi_site_model(sae, world, 100, reads=["b"], baseline=False)
    assert list(found.sites) == ["b"]
    with pytest.raises(ConfigError, match="the world has no site 'c'"):
        eval_sae_on_multi_site_model(sae, world, 100, reads=["c"])
    named = create("topk", d_in=32, d_sae=20, k=3, reads={"b": 16, "a": 16})
    assert list(eval_sae_on_multi_site_model(named, world, 100, baseline=False).sites) == ["b", "a"]
    with pytest.raises(ConfigError, match="names its own sites, b, a"):
        eval_sae_on_multi_site_model(named, world, 100, reads=["a", "b"])


@pytest.mark.parametrize("kind", ["crosscoder", "transcoder"])
def test_dictionaries_trained_on_a_source_find_its_features(kind: str) -> None:
    targets = {"out": 16} if kind == "transcoder" else {}
    source = _source(
        num_features=16, sites={"a": 16, "b": 16}, targets=targets, firing_probability=0.1, orthogonalization={}
    )
    shape: dict[str, Any] = {"d_out": 16} if targets else {"reads": {"a": 16, "b": 16}}
    sae = create("batchtopk", d_in=32, d_sae=16, k=1.6, seed=0, **shape)
    config = TrainConfig(
        total_samples=200_000,
        batch_size=512,
        lr=1e-2,
        lr_decay_samples=100_000,
        dead_after_samples=20_000,
        progress_bar=False,
    )
    Trainer(sae, source, config).fit()
    found = eval_sae_on_multi_site_model(sae, source.model, 2000)
    assert found.whole.baseline is not None
    assert found.whole.mcc > 0.9 > found.whole.baseline.mcc
    assert all(scores.mcc > 0.85 for scores in found.sites.values())
