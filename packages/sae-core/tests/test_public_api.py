"""What plugins rely on does not change unnoticed."""

from __future__ import annotations

import difflib
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
from sae_core.plugins import HOOKSPEC_VERSION

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def public_api() -> ModuleType:
    spec = importlib.util.spec_from_file_location("public_api", HERE / "public_api.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_names_and_signatures_are_those_that_were_written_down(public_api: ModuleType) -> None:
    kept, found = public_api.TEXT.read_text(encoding="utf-8").splitlines(), public_api.described().splitlines()
    changed = list(difflib.unified_diff(kept, found, "written down", "here", lineterm="", n=0))
    assert not changed, (
        "the public API has changed. If that is meant, tell users in CHANGELOG.md and run\n"
        "    uv run python packages/sae-core/tests/public_api.py\n" + "\n".join(changed)
    )


def test_what_is_written_down_notices_a_changed_argument(public_api: ModuleType) -> None:
    def before(x: int, *, seed: int = 0) -> int: ...

    def after(x: int, *, seed: int = 1) -> int: ...

    assert list(public_api._member("f", before)) == ["def f(x: int, *, seed: int = 0) -> int"]
    assert list(public_api._member("f", after)) != list(public_api._member("f", before))


def test_the_hooks_are_those_of_their_version() -> None:
    """A hook that goes or changes its meaning raises HOOKSPEC_VERSION; one that comes does not."""
    from sae_core.plugins.hookspecs import new_manager

    hooks = {name: new_manager().hook.__getattribute__(name).spec.argnames for name in vars(new_manager().hook)}
    assert HOOKSPEC_VERSION == 1
    assert hooks == {
        f"sae_register_{kind}": ("core_version",)
        for kind in (
            "architectures", "loaders", "writers", "activation_sources", "catalogues", "metrics", "loggers", "commands",
        )
    }  # fmt: skip
