"""``sae-core check NAME``: does what is registered under a name keep the promises of its kind?

The checks are those of `sae_core.testing`, which plugins run in their tests; here they need no pytest.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from typing import TYPE_CHECKING, Any, ClassVar, final

from sae_core.cli.names import find_all
from sae_core.cli.tables import paragraphs, table
from sae_core.errors import ConfigError, did_you_mean
from sae_core.plugins import Contribution, get_registry
from sae_core.plugins.manager import KINDS

if TYPE_CHECKING:
    from sae_core.testing import CheckResult

__all__ = ["Check"]

_SHOWN = {"expected_failure": "failed, as expected", "unexpected_pass": "passed, not expected"}


@final
class Check:
    """Run the conformance checks of a kind on an architecture, loader, source, metric, logger, command or catalogue."""

    help: ClassVar[str] = (
        "Check that a contribution keeps the promises of its kind: what the conformance tests of plugins run, without pytest. "
        "Exits with 1 if a check fails."
    )

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Add the options."""
        parser.add_argument("name", help="as `sae-core list` prints it; distribution:name picks one provider")
        parser.add_argument("--kind", choices=KINDS, help="only this kind, where things of several kinds have the name")
        parser.add_argument(
            "--set", dest="overrides", metavar="KEY=VALUE", action="append", default=[],
            help="what a small instance needs: a field of its config, say k=4; for a loader path=FILES, inside=FOLDER and "
            "overrides; values in YAML; may be repeated",
        )  # fmt: skip
        parser.add_argument(
            "--expect-failure", dest="expected", metavar="CHECK=REASON", action="append", default=[],
            help="a check that must fail, and why; may be repeated",
        )  # fmt: skip
        parser.add_argument("--json", action="store_true", help="print JSON")

    def run(self, args: argparse.Namespace) -> int:
        """Check and report."""
        from sae_core.yaml_text import set_by_override

        config: dict[str, Any] = {}
        for override in args.overrides:
            set_by_override(config, override)
        with redirect_stdout(sys.stderr):  # what a plugin prints is no part of the report
            found = find_all(get_registry(), args.name, args.kind)
            expected = _expected(args.expected, [each.spec.kind for each in found])
            reports = [(each, _run(each, config, expected)) for each in found]
        if args.json:
            print(json.dumps([_as_json(each, results) for each, results in reports], indent=2))
        else:
            print("\n\n".join(_as_text(each, results) for each, results in reports))
        return 0 if all(result.ok for _, results in reports for result in results) else 1


def _expected(given: Sequence[str], kinds: Sequence[str]) -> dict[str, str]:
    """Reasons by check. Raises ConfigError for a check that none of the kinds has, and for a failure without a reason."""
    from sae_core.testing import checks_of

    known = {check.__name__ for kind in kinds for check in checks_of(kind)}
    expected: dict[str, str] = {}
    for each in given:
        name, _, reason = each.partition("=")
        if name not in known:
            raise ConfigError(f"--expect-failure {each}: no check {name!r}{did_you_mean(name, known)}")
        if not reason.strip():
            raise ConfigError(
                f"--expect-failure {each}: write CHECK=REASON, since a failure without a reason is a fault"
            )
        expected[name] = reason
    return expected


def _run(contribution: Contribution, config: Mapping[str, Any], expected: Mapping[str, str]) -> list[CheckResult]:
    from sae_core.testing import checks_of, run_checks

    kind = contribution.spec.kind
    names = {check.__name__ for check in checks_of(kind)}
    mine = {name: reason for name, reason in expected.items() if name in names}
    return run_checks(kind, contribution.qualified, config=config, expected_failures=mine)


def _as_json(contribution: Contribution, results: Sequence[CheckResult]) -> dict[str, Any]:
    return {
        "kind": contribution.spec.kind,
        "name": contribution.spec.name,
        "qualified": contribution.qualified,
        "distribution": contribution.distribution,
        "version": contribution.version,
        "target": contribution.spec.target,
        "ok": all(result.ok for result in results),
        "checks": [{"check": each.check, "status": each.status, "reason": each.reason} for each in results],
    }


def _as_text(contribution: Contribution, results: Sequence[CheckResult]) -> str:
    spec = contribution.spec
    parts = [f"{spec.kind} {spec.name}, from {contribution.distribution} {contribution.version} ({spec.target})"]
    rows = [
        [
            each.check.removeprefix("check_"),
            _SHOWN.get(each.status, each.status),
            "" if each.status == "failed" else each.reason,
        ]
        for each in results
    ]
    parts.append(table(["CHECK", "RESULT", "WHY"], rows))
    if failed := [each for each in results if not each.ok]:
        advice = _advice(spec.kind)
        parts += [
            paragraphs(f"{each.check}: {each.reason}", advice.get(each.check, "") if each.status == "failed" else "")
            for each in failed
        ]
    counts = Counter(_SHOWN.get(each.status, each.status) for each in results)
    parts.append(f"{len(results)} checks: " + ", ".join(f"{count} {status}" for status, count in counts.items()))
    return "\n\n".join(parts)


def _advice(kind: str) -> dict[str, str]:
    """What each check is about and what usually is the matter, from its documentation."""
    import inspect

    from sae_core.testing import checks_of

    return {check.__name__: " ".join((inspect.getdoc(check) or "").split()) for check in checks_of(kind)}
