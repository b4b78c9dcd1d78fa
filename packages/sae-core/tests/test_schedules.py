from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sae_core import TrainConfig, Trainer, create
from sae_core.config import Schedule, ends_of, structure, unstructure, value_at
from sae_core.errors import ConfigError
from sae_core.training.schedules import sae_lens_learning_rate


def train_config(**changes: Any) -> TrainConfig:
    return structure({"total_samples": 400, "batch_size": 40, "progress_bar": False, **changes}, TrainConfig)


def lr(schedule: Any) -> float | Schedule:
    return train_config(lr=schedule).lr


@pytest.mark.parametrize(
    ("written", "points"),
    [
        ({"from": 4, "to": 2, "over": 0.5}, {0: 4, 0.25: 3, 0.5: 2, 1: 2}),
        ({"from": 4, "to": 2, "shape": "cosine"}, {0: 4, 0.25: 3 + math.cos(math.pi / 4), 0.5: 3, 1: 2}),
        ({"from": 1, "to": 16, "shape": "exponential"}, {0: 1, 0.25: 2, 0.5: 4, 0.75: 8, 1: 16}),
        ({"from": 1, "to": 0, "shape": "cosine", "restarts": 1}, {0: 1, 0.25: 0.5, 0.5: 1, 0.75: 0.5, 1: 0}),
        (
            [{"from": 0, "to": 1, "over": 0.1}, {"over": 0.6}, {"to": 0.5, "over": 0.2}],
            {0: 0, 0.05: 0.5, 0.1: 1, 0.4: 1, 0.7: 1, 0.8: 0.75, 0.9: 0.5, 1: 0.5},
        ),
        ([{"from": 1, "over": 0.5}, {"from": 2, "to": 2, "over": 0.5}], {0: 1, 0.499: 1, 0.5: 2, 1: 2}),
    ],
)
def test_every_shape_passes_through_the_points_worked_by_hand(written: Any, points: dict[float, float]) -> None:
    schedule = lr(written)
    for progress, value in points.items():
        assert value_at(schedule, progress) == pytest.approx(value)


piece = st.fixed_dictionaries(
    {
        "from": st.floats(0.1, 10),
        "to": st.floats(0.1, 10),
        "over": st.floats(0.01, 0.2),
        "shape": st.sampled_from(["linear", "cosine", "exponential"]),
        "restarts": st.integers(0, 3),
    }
)
pieces = st.lists(piece, min_size=1, max_size=5)


@given(pieces, st.floats(0, 1))
def test_values_lie_between_the_ends_and_what_is_written_is_read_back(written: Any, progress: float) -> None:
    schedule = lr(written)
    assert min(ends_of(schedule)) - 1e-9 <= value_at(schedule, progress) <= max(ends_of(schedule)) + 1e-9
    config = train_config(lr=written)
    assert structure(unstructure(config), TrainConfig) == config


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ([], "an empty list"),
        ([3], r"each piece is \{from, to, over\}, found 3"),
        ({"from": 1}, r"missing key \['to'\]"),
        ([{"to": 1, "over": 0.5}, {"to": 2, "over": 0.5}], r"missing key \['from'\] in piece 1"),
        ([{"from": 1, "over": 0.5}, {"to": 2}], r"missing key \['over'\] in piece 2"),
        ({"from": 1, "to": 2, "until": 3}, r"unknown key \['until'\]"),
        ([{"from": 1, "over": 0.6}, {"to": 2, "over": 0.6}], r"the pieces take 1\.2 of the run"),
        ({"from": 1, "to": 2, "shape": "square"}, "'shape' is one of linear, cosine, exponential, not 'square'"),
        ({"from": 0, "to": 2, "shape": "exponential"}, "never reaches zero"),
        ({"from": 1, "to": 2, "restarts": -1}, "'restarts' must be a whole number"),
        ({"from": 1, "to": 2, "restarts": True}, "'restarts' must be a whole number"),
        ({"from": 1, "to": "x"}, "'end' must be a finite number"),
        ({"from": -1, "to": 1}, "lr must be positive"),
    ],
)
def test_impossible_schedules_are_refused(written: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        lr(written)


@pytest.mark.parametrize(
    ("field", "schedule", "message"),
    [
        ("adam_beta1", {"from": 0.9, "to": 1.0}, r"adam_beta1 must lie in \[0, 1\), not 1\.0"),
        ("grad_clip_norm", {"from": 1.0, "to": 0.0}, "grad_clip_norm must be positive"),
    ],
)
def test_both_ends_of_a_schedule_are_checked(field: str, schedule: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        train_config(**{field: schedule})


def test_settings_of_the_optimiser_follow_their_schedules() -> None:
    seen: list[tuple[float, float, float]] = []
    group: Any = None

    def look(progress: Any) -> None:
        nonlocal group
        group = progress.trainer.optimizer.param_groups[0]
        seen.append((group["lr"], *group["betas"]))

    config = train_config(
        lr={"from": 1e-3, "to": 1e-4, "over": 0.5}, adam_beta1={"from": 0.5, "to": 0.9},
        adam_beta2={"from": 0.9, "to": 0.99}, grad_clip_norm={"from": 1e-3, "to": 1.0, "shape": "exponential"},
        lr_warmup_samples=40,
    )  # fmt: skip
    batches = [torch.randn(40, 6, generator=torch.Generator().manual_seed(i)) for i in range(10)]
    Trainer(create("topk", d_in=6, d_sae=12, k=2), batches, config, [look]).fit()
    for step, found in enumerate(seen):
        at = step / 10
        assert found == pytest.approx((1e-3 - 9e-4 * min(2 * at, 1), 0.5 + 0.4 * at, 0.9 + 0.09 * at))


def test_the_clipped_norm_follows_its_schedule() -> None:
    sae = create("topk", d_in=6, d_sae=12, k=2)
    trainer = Trainer(sae, [], train_config(grad_clip_norm={"from": 0.01, "to": 0.02, "over": 0.2}))
    for expected in (0.01, 0.015, 0.02, 0.02):
        trainer.step(torch.randn(40, 6) * 100)
        norm = math.sqrt(sum(float(p.grad.square().sum()) for p in sae.parameters() if p.grad is not None))
        assert norm == pytest.approx(expected, rel=1e-3)


def torch_schedule(
    name: str, lr: float, steps: int, warm_up: int, decay: int, lr_end: float, cycles: int
) -> list[float]:
    """The same shapes, put together from PyTorch's own schedulers."""
    from torch.optim import lr_scheduler as torch_lr

    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=lr)
    main = steps - warm_up - decay
    parts: list[Any] = []
    milestones: list[int] = []
    if warm_up:
        parts.append(torch_lr.LinearLR(optimizer, start_factor=1 / warm_up, end_factor=1.0, total_iters=warm_up - 1))
        milestones.append(warm_up)
    if name == "constant":
        parts.append(torch_lr.LambdaLR(optimizer, lambda _: 1.0))
        lr_end = lr
    elif name == "cosineannealing":
        parts.append(torch_lr.CosineAnnealingLR(optimizer, T_max=main, eta_min=lr_end))
    else:
        parts.append(torch_lr.CosineAnnealingWarmRestarts(optimizer, T_0=main // cycles, eta_min=lr_end))
    if decay:
        parts.append(torch_lr.LinearLR(optimizer, start_factor=lr_end / lr, end_factor=0.0, total_iters=decay))
        milestones.append(steps - decay)
    whole = torch_lr.SequentialLR(optimizer, parts, milestones)
    rates: list[float] = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        whole.step()
    return rates


@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step")
@pytest.mark.parametrize("name", ["constant", "cosineannealing", "cosineannealingwarmrestarts"])
@pytest.mark.parametrize(("warm_up", "decay"), [(0, 0), (1, 0), (10, 0), (0, 20), (10, 25)])
def test_the_shapes_of_sae_lens_are_those_of_pytorchs_schedulers(name: Any, warm_up: int, decay: int) -> None:
    expected = torch_schedule(name, 0.4, 100, warm_up, decay, 0.1, 3)
    schedule = sae_lens_learning_rate(
        name, 0.4, steps=100, warm_up_steps=warm_up, decay_steps=decay, lr_end=0.1, num_cycles=3
    )
    assert [value_at(schedule, step / 100) for step in range(100)] == pytest.approx(expected, rel=1e-6)
