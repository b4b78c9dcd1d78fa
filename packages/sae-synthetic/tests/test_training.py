"""`train_toy_sae`: it learns the features, starts where the SAE is, and shows itself on the way."""

from __future__ import annotations

import pytest
import torch
from sae_core import Trainer, create
from sae_core.errors import ConfigError
from sae_synthetic import (
    ActivationGenerator,
    FeatureDictionary,
    Snapshot,
    SyntheticActivationIterator,
    eval_sae_on_synthetic_data,
    init_sae_to_match_feature_dict,
    mean_correlation_coefficient,
    train_toy_sae,
)


def _world() -> tuple[FeatureDictionary, ActivationGenerator]:
    return FeatureDictionary(12, 16, seed=0), ActivationGenerator(12, 0.15, 0.1, seed=1)


def test_it_learns_the_features() -> None:
    features, generator = _world()
    sae = create("batchtopk", d_in=16, d_sae=12, k=1.8, seed=0)
    result = train_toy_sae(sae, features, generator, 300_000, 256, lr=1e-2, lr_decay_steps=600, progress_bar=False)
    assert result.samples == 300_000
    found = eval_sae_on_synthetic_data(sae, features, generator, num_samples=2000)
    assert found.baseline is not None
    assert found.mcc > 0.9 > found.baseline.mcc


def test_an_sae_that_starts_at_the_truth_stays_there() -> None:
    features, generator = _world()
    sae = create("topk", d_in=16, d_sae=12, k=2)
    init_sae_to_match_feature_dict(sae, features)
    train_toy_sae(sae, features, generator, 20_000, 500, progress_bar=False)
    assert mean_correlation_coefficient(sae.W_dec, features.feature_vectors, signed=True) > 0.99


@pytest.mark.parametrize(("snapshots", "due"), [(1, [40]), (4, [10, 20, 30, 40]), (3, [13, 27, 40]), (0, [])])
def test_snapshots_come_evenly_and_end_with_the_end(snapshots: int, due: list[int]) -> None:
    features, generator = _world()
    sae = create("topk", d_in=16, d_sae=12, k=2, seed=0)
    seen: list[tuple[int, int, torch.Tensor]] = []

    def keep(snapshot: Snapshot) -> None:
        assert snapshot.trainer.sae is snapshot.sae is sae
        seen.append((snapshot.n_training_steps, snapshot.n_training_samples, snapshot.sae.W_dec.detach().clone()))

    train_toy_sae(sae, features, generator, 4000, 100, n_snapshots=snapshots, snapshot_fn=keep, progress_bar=False)
    assert [steps for steps, _, _ in seen] == due
    assert [samples for _, samples, _ in seen] == [100 * steps for steps in due]
    if snapshots:
        assert torch.equal(seen[-1][2], sae.W_dec)
    if snapshots > 1:
        assert not torch.equal(seen[0][2], seen[1][2])


def test_it_is_the_trainers_loop_on_the_worlds_batches() -> None:
    features, generator = _world()
    one, other = (create("topk", d_in=16, d_sae=12, k=2, seed=0) for _ in range(2))
    train_toy_sae(one, features, generator, 2000, 100, progress_bar=False)
    features, generator = _world()
    from sae_core import TrainConfig

    config = TrainConfig(
        total_samples=2000,
        batch_size=100,
        lr=3e-4,
        init_b_dec="zeros",
        dead_after_samples=100_000,
        progress_bar=False,
    )
    Trainer(other, SyntheticActivationIterator(features, generator, 100), config).fit()
    assert torch.equal(one.W_dec, other.W_dec)


def test_snapshots_without_a_function_and_negative_numbers_are_refused() -> None:
    sae = create("topk", d_in=16, d_sae=12, k=2)
    with pytest.raises(ConfigError, match="snapshot_fn is missing"):
        train_toy_sae(sae, *_world(), 1000, n_snapshots=2)
    with pytest.raises(ConfigError, match="n_snapshots must not be negative"):
        train_toy_sae(sae, *_world(), 1000, n_snapshots=-1)


def test_autocast_of_the_data_and_of_the_sae_are_honoured() -> None:
    ends = []
    for autocast in (False, True):
        sae = create("standard", d_in=16, d_sae=12, l1_coefficient=0.01, seed=0)
        result = train_toy_sae(sae, *_world(), 20_000, autocast_sae=autocast, progress_bar=False)
        assert sae.dtype == torch.float32
        ends.append(result.history[-1]["loss"])
    assert ends[0] != ends[1] == pytest.approx(ends[0], rel=0.02)
    features, generator = _world()
    batches = SyntheticActivationIterator(features, generator.fork(5), 64, autocast=True)
    exact = next(SyntheticActivationIterator(features, generator.fork(5), 64))
    rounded = next(batches)
    assert rounded.dtype == torch.float32
    assert 0 < float((rounded - exact).abs().max()) < 0.02 * float(exact.abs().max())
    assert torch.equal(
        next(SyntheticActivationIterator(features, generator.fork(5), 1, autocast=True).batches(64)), rounded
    )
    one, other = (create("topk", d_in=16, d_sae=12, k=2, seed=0) for _ in range(2))
    train_toy_sae(one, *_world(), 1000, autocast_data=True, progress_bar=False)
    train_toy_sae(other, *_world(), 1000, progress_bar=False)
    assert not torch.equal(one.W_dec, other.W_dec)


def test_a_running_threshold_that_somebody_set_in_another_precision_goes_on_moving() -> None:
    sae = create("batchtopk", d_in=16, d_sae=12, k=2, seed=0)
    sae.topk_threshold = torch.tensor(5.0, dtype=torch.float32)  # type: ignore[assignment]
    train_toy_sae(sae, *_world(), 1000, progress_bar=False)
    assert 0 < float(sae.topk_threshold) < 5
