"""How checks are run and reported, whatever they check.

A check is a plain function of a `Subject`, the registered name that is looked at: it returns if the promise is kept, raises if
it is broken, and raises `NotApplicable` where nothing is promised, or nothing is there to look at. `run_checks` runs all checks
of a kind and returns what became of each; `parametrize_with_checks` makes a pytest test of each. The subject is reached by its
registered name, so what is checked is what users get, entry point and all.

A check that must fail for a good reason is named by the caller together with the reason; if it then passes, that is reported
too. New versions of sae-core may bring new checks: pin sae-core in your tests if that is unwelcome.
"""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, final

from sae_core.errors import ConfigError, MissingDependencyError, UnknownNameError, did_you_mean
from sae_core.plugins import Contribution, get_registry

if TYPE_CHECKING:
    import pytest

__all__ = [
    "Check",
    "CheckResult",
    "NotApplicable",
    "Subject",
    "check_class",
    "check_options",
    "checks_of",
    "in_a_folder",
    "parametrize_with_checks",
    "run_checks",
]

_HOMES = {
    "architecture": "architectures",
    "loader": "loaders",
    "writer": "writers",
    "source": "sources",
    "catalogue": "catalogues",
    "metric": "metrics",
    "logger": "loggers",
    "command": "commands",
}
_CONFIGURED = ("source", "logger")
_FOLDER = "{folder}"


class NotApplicable(Exception):
    """Raised by a check when the subject does not promise what is checked, or more is needed to look; the reason says which."""


@dataclass(frozen=True, slots=True)
class CheckResult:
    """What became of one check; `reason` is empty when it simply passed."""

    check: str
    status: Literal["passed", "failed", "skipped", "expected_failure", "unexpected_pass"]
    reason: str = ""

    @property
    def ok(self) -> bool:
        """Whether the subject did what is expected of it."""
        return self.status in ("passed", "skipped", "expected_failure")


@final
@dataclass(frozen=True)
class Subject:
    """What is checked: a registered name of some kind, and what small instances of it are made with.

    `config` goes over what the class itself says in `example`. In both, `{folder}` in a text stands for `folder`, an empty one
    that is removed after the check, and a function is called with it for the value.
    """

    kind: str
    name: str
    config: Mapping[str, Any] = field(default_factory=dict[str, Any])
    folder: Path = field(default_factory=lambda: Path(tempfile.gettempdir()))

    @cached_property
    def contribution(self) -> Contribution:
        """Who provides it. Raises UnknownNameError."""
        return get_registry().find(self.kind, self.name)

    @cached_property
    def cls(self) -> type:
        """The class behind the name. Raises PluginError where it is not what its kind asks for."""
        return get_registry().usable(self.kind, self.contribution.qualified)

    @property
    def settings(self) -> dict[str, Any]:
        """What small instances are made with."""
        example = cast("Mapping[str, Any]", getattr(self.cls, "example", {}))
        return {key: _placed(value, self.folder) for key, value in {**example, **self.config}.items()}

    def new(self, **changes: Any) -> Any:
        """A fresh instance: of its config where the kind has one, else without arguments."""
        if self.kind == "architecture":
            from sae_core.sae import create

            fields: dict[str, Any] = {"d_in": 16, "d_sae": 64, **self.settings, **changes}
            return create(self.contribution.qualified, seed=fields.pop("seed", 0), **fields)
        if self.kind in _CONFIGURED:
            from sae_core.config import structure

            made = cast("Any", self.cls)
            return made(structure({**self.settings, **changes}, made.config_class, where=f"{self.kind} {self.name!r}"))
        return self.cls()


Check = Callable[[Subject], None]


def _placed(value: Any, folder: Path) -> Any:
    if callable(value):
        return value(folder)
    if isinstance(value, str):
        return value.replace(_FOLDER, str(folder))
    if isinstance(value, list):
        return [_placed(each, folder) for each in cast("list[Any]", value)]
    return value


def checks_of(kind: str) -> tuple[Check, ...]:
    """The checks of a kind, in the order in which they are run. Raises UnknownNameError for a kind that does not exist.

    >>> [check.__name__ for check in checks_of("command")][:2]
    ['check_class', 'check_help']
    """
    if kind not in _HOMES:
        raise UnknownNameError(f"unknown kind {kind!r}{did_you_mean(kind, _HOMES)} (known: {', '.join(_HOMES)})")
    return cast("Any", importlib.import_module(f"sae_core.testing.{_HOMES[kind]}")).CHECKS


def run_checks(
    kind: str,
    name: str,
    *,
    config: Mapping[str, Any] | None = None,
    expected_failures: Mapping[str, str] | None = None,
) -> list[CheckResult]:
    """Run every check on what is registered as `name`, bare or ``distribution:name``.

    `config` holds what small instances need: fields of the config, for a loader the `path` of files that it reads (and
    `overrides` for it). `expected_failures` are checks that do not apply and why. Where the first check fails, there is
    nothing to run the others on, and they are skipped. Raises ConfigError for checks that do not exist.

    >>> results = run_checks("architecture", "topk", config={"k": 4})
    >>> [result for result in results if not result.ok]
    []
    """
    checks = checks_of(kind)
    expected = _expected(expected_failures, checks)
    subject = Subject(kind, name, config or {})
    results: list[CheckResult] = []
    for check in checks:
        if results and results[0].status == "failed":
            results.append(CheckResult(check.__name__, "skipped", f"{results[0].check} failed"))
        else:
            results.append(_run(check, subject, expected.get(check.__name__, "")))
    return results


def parametrize_with_checks(
    names: Mapping[str, Mapping[str, Any]] | Iterable[str],
    *,
    kind: str = "architecture",
    expected_failures: Mapping[str, str] | None = None,
) -> pytest.MarkDecorator:
    """A pytest decorator: the test is called once a check and name, with a callable `check`.

    `names` are registered names, or names with the config that small instances need. Expected failures are marked
    ``xfail(strict=True)`` with their reason; what is not promised is skipped. ::

        @parametrize_with_checks({"cubic": {"power": 3}})
        def test_conformance(check):
            check()
    """
    import pytest

    checks = checks_of(kind)
    expected = _expected(expected_failures, checks)
    configs = names if isinstance(names, Mapping) else {name: {} for name in names}

    def called(check: Check, subject: Subject) -> Callable[[], None]:
        def run() -> None:
            try:
                in_a_folder(check, subject)
            except NotApplicable as reason:
                pytest.skip(str(reason))

        return run

    return pytest.mark.parametrize(
        "check",
        [
            pytest.param(
                called(check, Subject(kind, name, config)),
                id=f"{name}-{check.__name__}",
                marks=[pytest.mark.xfail(reason=expected[check.__name__], strict=True, raises=AssertionError)]
                if check.__name__ in expected
                else [],
            )
            for name, config in configs.items()
            for check in checks
        ],
    )


def in_a_folder(check: Check, subject: Subject) -> None:
    """Run a check with an empty folder that is removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="sae-core-check-") as folder:
        try:
            check(replace(subject, folder=Path(folder)))
        except MissingDependencyError as error:
            raise NotApplicable(str(error)) from error


def _expected(failures: Mapping[str, str] | None, checks: Iterable[Check]) -> Mapping[str, str]:
    known = [check.__name__ for check in checks]
    if unknown := sorted(set(failures or {}) - set(known)):
        raise ConfigError(f"expected_failures: no check {unknown} (known: {', '.join(known)})")
    return failures or {}


def _run(check: Check, subject: Subject, expected: str) -> CheckResult:
    try:
        in_a_folder(check, subject)
    except NotApplicable as reason:
        return CheckResult(check.__name__, "skipped", str(reason))
    except Exception as error:  # noqa: BLE001 - whatever a subject raises is a result to report
        reason = str(error) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"
        if expected:
            return CheckResult(check.__name__, "expected_failure", expected)
        return CheckResult(check.__name__, "failed", reason or type(error).__name__)
    if expected:
        return CheckResult(check.__name__, "unexpected_pass", f"expected to fail: {expected}")
    return CheckResult(check.__name__, "passed")


def check_class(subject: Subject) -> None:
    """The name leads to a documented class that is what its kind asks for, and a small instance of it can be made.

    What an instance needs is said by the class, in `example`, or by whoever runs the checks.
    """
    cls = subject.cls
    assert vars(cls).get("__doc__"), f"{cls.__name__} has no docstring"
    assert subject.contribution.spec.summary, "the spec has no summary, so `sae-core list` shows an empty line"
    try:
        subject.new()
    except ConfigError as error:
        raise AssertionError(
            f"no instance can be made to look at: {error}. Say what one needs: config= in Python, --set on the command line, "
            "`example` in the class"
        ) from None


def check_options(subject: Subject) -> None:
    """The config is a frozen dataclass whose fields are explained, and that refuses what it does not know.

    Make every field with `sae_core.config.option(help=...)` and check values in ``__post_init__`` with `require`.
    """
    from sae_core.config import describe_fields

    config_class = cast("Any", subject.cls).config_class
    assert config_class.__dataclass_params__.frozen, f"{config_class.__name__} is not frozen"
    unexplained = [described.name for described in describe_fields(config_class) if not described.help]
    assert not unexplained, f"fields without help: {', '.join(unexplained)}"
    try:
        subject.new(no_such_field=1)
    except ConfigError:
        return
    raise AssertionError("the config {'no_such_field': 1} was accepted")
