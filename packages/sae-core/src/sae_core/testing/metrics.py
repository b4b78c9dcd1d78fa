"""What every metric promises: numbers by name, the same ones however the rows came."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor

from sae_core.codes import SparseCodes
from sae_core.protocols import Metric
from sae_core.testing.kit import Check, NotApplicable, Subject, check_class

__all__ = [
    "CHECKS",
    "check_batches_make_no_difference",
    "check_codes",
    "check_few_rows",
    "check_inputs_are_left_alone",
    "check_instances_are_apart",
    "check_numbers",
    "check_order_makes_no_difference",
]

_ROWS, _WIDTH, _LATENTS = 24, 8, 20


def check_numbers(subject: Subject) -> None:
    """`compute` gives plain numbers under names that start with the metric's own, so that several metrics do not collide.

    A tensor is no plain number: ``.item()`` makes one of it.
    """
    found = _computed(_metric(subject), _rows())
    assert isinstance(found, Mapping), f"compute() gave {found!r}, not a mapping"
    assert found, "compute() gave no number"
    name = subject.contribution.spec.name
    for key, value in found.items():
        assert str(key).startswith(name), f"the name {key!r} does not start with {name!r}"
        assert type(value) in (int, float), f"{key} is {type(value).__name__}, not a plain number"
        assert math.isfinite(value), f"{key} of {_ROWS} ordinary rows is {value}"


def check_few_rows(subject: Subject) -> None:
    """No row and one row are rows too: nothing is raised, the names are the same, and what is not known is NaN."""
    rows = _rows()
    names = set(_computed(_metric(subject), rows))
    nothing, empty, one = (_metric(subject) for _ in range(3))
    _update(empty, _cut(rows, slice(0, 0)))
    _update(one, _cut(rows, slice(0, 1)))
    for what, metric in (("before any update", nothing), ("of no rows", empty), ("of one row", one)):
        found = metric.compute()
        assert set(found) == names, f"the names {what} are {sorted(found)}, those of many rows {sorted(names)}"
        assert all(type(value) in (int, float) for value in found.values()), f"a value {what} is no plain number"


def check_batches_make_no_difference(subject: Subject) -> None:
    """Rows in several batches, of any leading shape, give what they give at once; an empty batch changes nothing."""
    rows = _rows()
    expected = _computed(_metric(subject), rows)
    parts = _metric(subject)
    for cut in (slice(0, 1), slice(1, 1), slice(1, 17), slice(17, _ROWS)):
        _update(parts, _cut(rows, cut))
    _same(parts.compute(), expected, "in several batches and at once")
    shaped = [part.reshape(4, 6, -1) for part in rows]
    _same(_computed(_metric(subject), shaped), expected, "with a leading shape and without")


def check_order_makes_no_difference(subject: Subject) -> None:
    """With `order_independent`, rows in another order give the same numbers."""
    if not getattr(subject.cls, "order_independent", False):
        raise NotApplicable("it does not say order_independent")
    rows = _rows()
    expected = _computed(_metric(subject), rows)
    turned = [part.flip(0) for part in rows]
    _same(_computed(_metric(subject), turned), expected, "in another order")


def check_codes(subject: Subject) -> None:
    """Codes are `SparseCodes` or dense latents; both give the same numbers."""
    x, y, dense = _rows()
    one, two = _metric(subject), _metric(subject)
    one.update(x, y, dense)
    two.update(x, y, SparseCodes.from_dense(dense))
    _same(two.compute(), one.compute(), "with sparse codes and with dense ones")


def check_inputs_are_left_alone(subject: Subject) -> None:
    """`update` changes nothing that it is given, takes any floating dtype, and what is part of an autograd graph."""
    expected = _computed(_metric(subject), _rows())
    given = _rows()
    _computed(_metric(subject), given)
    for part, kept in zip(given, _rows(), strict=True):
        assert torch.equal(part, kept), "update() changes what it is given"
    graph = [part.clone().requires_grad_() * 1 for part in _rows()]
    _same(_computed(_metric(subject), graph), expected, "with a gradient and without")
    for dtype in (torch.float64, torch.bfloat16):
        found = _computed(_metric(subject), [part.to(dtype) for part in _rows()])
        assert all(math.isfinite(value) for value in found.values()), f"a value of {dtype} rows is not finite"


def check_instances_are_apart(subject: Subject) -> None:
    """A new instance starts from nothing, and `compute` does not end what is counted: nothing is kept on the class."""
    rows = _rows()
    used = _metric(subject)
    expected = dict(_computed(used, rows))
    _same(_computed(_metric(subject), rows), expected, "of a second instance")
    _same(used.compute(), expected, "computed a second time")


def _metric(subject: Subject) -> Metric:
    return cast("Metric", subject.new())


def _rows() -> list[Tensor]:
    """Inputs, reconstructions that are near them, and latents: some never fire, and on one row none does."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_ROWS, _WIDTH, generator=generator) + 0.5
    y = x + 0.1 * torch.randn(_ROWS, _WIDTH, generator=generator)
    latents = torch.relu(torch.randn(_ROWS, _LATENTS, generator=generator) - 0.8)
    latents[:, -2:] = 0
    latents[3] = 0
    return [x, y, latents]


def _cut(rows: list[Tensor], cut: slice) -> list[Tensor]:
    return [part[cut] for part in rows]


def _update(metric: Metric, rows: list[Tensor]) -> None:
    metric.update(rows[0], rows[1], rows[2])


def _computed(metric: Metric, rows: list[Tensor]) -> Mapping[str, float]:
    _update(metric, rows)
    return metric.compute()


def _same(found: Mapping[str, float], expected: Mapping[str, float], how: str) -> None:
    assert set(found) == set(expected), f"the names {how} differ: {sorted(set(found) ^ set(expected))}"
    for name, value in expected.items():
        other = found[name]
        near = (math.isnan(value) and math.isnan(other)) or math.isclose(other, value, rel_tol=1e-5, abs_tol=1e-6)
        assert near, f"{name} {how}: {other} and {value}"


CHECKS: tuple[Check, ...] = (
    check_class,
    check_numbers,
    check_few_rows,
    check_batches_make_no_difference,
    check_order_makes_no_difference,
    check_codes,
    check_inputs_are_left_alone,
    check_instances_are_apart,
)
