"""``sae-core check``: what it says of what is right, wrong, unknown, or there several times."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any, ClassVar

import pytest
from sae_core.cli import main
from sae_core.metrics import MeanSquaredError
from sae_core.plugins import LoggerSpec, MetricSpec, get_registry, reset_registry
from sae_core.testing import checks_of
from torch import Tensor


class Forgetful:
    """Divides by the rows that it has seen."""

    def __init__(self) -> None:
        self.total, self.rows = 0.0, 0

    def update(self, inputs: Tensor, outputs: Tensor, codes: Any) -> None:
        self.total, self.rows = self.total + (inputs - outputs).detach().double().sum().item(), self.rows + 1

    def compute(self) -> Mapping[str, float]:
        return {"forgetful": self.total / self.rows}


class ForgetfulLogger:
    """Has no config."""

    config_class: ClassVar[type] = dict


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    module = ModuleType("of_a_test")
    module.__dict__.update(Forgetful=Forgetful, ForgetfulLogger=ForgetfulLogger)
    monkeypatch.setitem(sys.modules, "of_a_test", module)
    get_registry().register(MetricSpec(name="forgetful", target="of_a_test:Forgetful", summary="Of a test"), "tests")
    yield
    reset_registry()


def test_what_keeps_its_promises_is_a_table_and_exit_code_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "mse"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("metric mse, from sae-core ")
    assert lines[2].split() == ["CHECK", "RESULT", "WHY"]
    names = [check.__name__.removeprefix("check_") for check in checks_of("metric")]
    assert [line.split()[:2] for line in lines[4 : 4 + len(names)]] == [[name, "passed"] for name in names]
    assert lines[-1] == f"{len(names)} checks: {len(names)} passed"


@pytest.mark.usefixtures("registered")
def test_what_breaks_one_is_named_with_what_usually_is_the_matter_and_exit_code_1(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["check", "tests:forgetful"]) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "check_few_rows: ZeroDivisionError: float division by zero No row and one row are rows too" in out
    assert "check_batches_make_no_difference: forgetful in several batches and at once:" in out
    assert out.endswith("8 checks: 5 passed, 2 failed, 1 skipped")


@pytest.mark.usefixtures("registered")
def test_for_scripts_there_is_json_and_expected_failures_need_a_reason(capsys: pytest.CaptureFixture[str]) -> None:
    expected = [
        "--expect-failure", "check_few_rows=rows always come",
        "--expect-failure", "check_batches_make_no_difference=a mean of batches is meant",
        "--expect-failure", "check_numbers=it does not fail",
    ]  # fmt: skip
    assert main(["check", "forgetful", "--json", *expected]) == 1
    (report,) = json.loads(capsys.readouterr().out)
    assert (report["kind"], report["qualified"], report["ok"]) == ("metric", "tests:forgetful", False)
    status = {each["check"]: (each["status"], each["reason"]) for each in report["checks"]}
    assert status["check_few_rows"] == ("expected_failure", "rows always come")
    assert status["check_numbers"] == ("unexpected_pass", "expected to fail: it does not fail")
    assert main(["check", "forgetful", *expected[:4]]) == 0
    capsys.readouterr()
    assert main(["check", "forgetful", "--expect-failure", "check_few_rows="]) == 1
    assert "a failure without a reason is a fault" in capsys.readouterr().err
    assert main(["check", "forgetful", "--expect-failure", "check_few_row=x"]) == 1
    assert "no check 'check_few_row'; did you mean 'check_few_rows'?" in capsys.readouterr().err


@pytest.mark.usefixtures("registered")
def test_things_of_several_kinds_are_all_checked_unless_one_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    get_registry().register(LoggerSpec(name="mse", target="of_a_test:ForgetfulLogger"), "tests")
    assert main(["check", "mse", "--json"]) == 1
    metric, logger = json.loads(capsys.readouterr().out)
    assert (metric["kind"], metric["ok"], logger["kind"], logger["ok"]) == ("metric", True, "logger", False)
    first, *others = logger["checks"]
    assert (first["check"], first["status"]) == ("check_class", "failed")
    assert "ForgetfulLogger is no logger: it has no close, log, start" in first["reason"]
    assert {(each["status"], each["reason"]) for each in others} == {("skipped", "check_class failed")}
    assert main(["check", "mse", "--kind", "metric"]) == 0


def test_what_a_small_instance_needs_is_asked_for_and_can_be_given(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "standard", "--set", "l1_coefficient=much"]) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "no instance can be made to look at: architecture 'sae-core:standard': expected float | Schedule" in out
    assert "--set on the command line" in out
    assert main(["check", "csv", "--set", 'path="{folder}/other.csv"']) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mes"], "unknown name 'mes'"),
        (["mse", "--kind", "logger"], "unknown logger 'mse'"),
        (["sae-nowhere:mse"], "'mse' comes with sae-nowhere, which is not installed: pip install sae-nowhere"),
        (["mse", "--set", "k"], "write key=value"),
    ],
)
def test_an_unknown_name_is_one_clear_error(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", *arguments]) == 1
    said = capsys.readouterr()
    assert message in said.err
    assert said.out == ""


def test_a_metric_here_is_the_one_that_is_listed() -> None:
    assert get_registry().resolve("metric", "mse") is MeanSquaredError
