"""Who a name belongs to: reserved, shared, picked, unknown, promised but not there."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
from sae_core import SAE
from sae_core.errors import PluginError, UnknownNameError
from sae_core.plugins import ArchitectureSpec, LoggerSpec, Registry, hookimpl
from sae_core.plugins.finding import find_own_plugin
from sae_core.plugins.manager import KINDS
from sae_core.plugins.records import Candidate
from sae_core.plugins.switches import Switches
from sae_core.sae import SAEConfig
from sae_core.testing import PluginFolder


def plugin(*specs: ArchitectureSpec | LoggerSpec) -> object:
    """A plugin object that gives these architectures and loggers."""
    return SimpleNamespace(
        sae_register_architectures=hookimpl(lambda: [s for s in specs if isinstance(s, ArchitectureSpec)]),
        sae_register_loggers=hookimpl(lambda: [s for s in specs if isinstance(s, LoggerSpec)]),
    )


def candidate(distribution: str, *specs: ArchitectureSpec | LoggerSpec) -> Candidate:
    return Candidate(name="main", distribution=distribution, version="1.0", load=lambda: plugin(*specs))


def spec(name: str, target: str = "collections:OrderedDict") -> ArchitectureSpec:
    return ArchitectureSpec(name=name, target=target)


def registry(*candidates: Candidate) -> Registry:
    return Registry(lambda: candidates, Switches())


def states(found: Registry) -> dict[str, str]:
    return {info.distribution: info.state for info in found.plugins()}


def test_a_unique_name_needs_no_prefix() -> None:
    found = registry(candidate("sae-core", spec("topk")), candidate("sae-foo", spec("cubic")))
    assert found.find("architecture", "cubic").qualified == "sae-foo:cubic"
    assert found.find("architecture", "sae-foo:cubic") is found.find("architecture", "cubic")
    assert found.find("architecture", "Sae_Foo:cubic").distribution == "sae-foo"


def test_names_of_different_kinds_do_not_meet() -> None:
    found = registry(
        candidate("sae-foo", spec("same")), candidate("sae-goo", LoggerSpec(name="same", target="json:JSONDecoder"))
    )
    assert states(found) == {"sae-foo": "loaded", "sae-goo": "loaded"}
    assert found.find("logger", "same").distribution == "sae-goo"


def test_the_cores_names_are_reserved_and_a_strangers_claim_is_listed_as_conflict() -> None:
    found = registry(candidate("sae-core", spec("topk")), candidate("sae-foo", spec("topk"), spec("cubic")))
    assert found.find("architecture", "topk").distribution == "sae-core"
    assert found.find("architecture", "sae-foo:topk").distribution == "sae-foo"
    assert found.find("architecture", "cubic").distribution == "sae-foo"
    assert states(found) == {"sae-core": "loaded", "sae-foo": "conflict"}
    reason = found.plugins()[1].reason
    assert reason == "architecture 'topk' is sae-core's own; write sae-foo:topk for this one"
    assert found.names("architecture") == ["cubic", "topk", "sae-foo:topk"]


def test_a_name_that_two_strangers_give_must_be_picked() -> None:
    found = registry(
        candidate("sae-foo", spec("cubic")), candidate("sae-goo", spec("cubic", "sae_core.architectures.topk:TopKSAE"))
    )
    assert states(found) == {"sae-foo": "conflict", "sae-goo": "conflict"}
    assert [info.provides[0].name for info in found.plugins()] == ["cubic", "cubic"]
    with pytest.raises(UnknownNameError) as raised:
        found.resolve("architecture", "cubic")
    assert str(raised.value) == (
        "architecture 'cubic' is provided by 2 plugins; say which one is meant:\n"
        "  sae-foo:cubic  (sae-foo 1.0, collections:OrderedDict)\n"
        "  sae-goo:cubic  (sae-goo 1.0, sae_core.architectures.topk:TopKSAE)"
    )
    assert found.resolve("architecture", "sae-goo:cubic").__name__ == "TopKSAE"
    assert found.names("architecture") == ["sae-foo:cubic", "sae-goo:cubic"]


def test_an_unknown_name_says_what_is_known_and_near() -> None:
    found = registry(candidate("sae-core", spec("standard"), spec("topk")))
    with pytest.raises(UnknownNameError) as raised:
        found.find("architecture", "tpok")
    assert str(raised.value) == "unknown architecture 'tpok'; did you mean 'topk'?\nknown: standard, topk"


def test_an_unknown_name_repeats_what_failed_or_is_switched_off() -> None:
    def broken() -> object:
        raise RuntimeError("no licence")

    bad = Candidate(name="bad", distribution="sae-bad", version="0.3", load=broken)
    off = candidate("sae-off", spec("cubic"))
    found = Registry(lambda: [bad, off], Switches(deny=("sae-off",)), on_trouble="ignore")
    with pytest.raises(UnknownNameError) as raised:
        found.find("architecture", "cubic")
    assert str(raised.value).splitlines() == [
        "unknown architecture 'cubic'",
        "known: none",
        "plugin sae-bad:bad 0.3 failed to load: RuntimeError: no licence",
        "plugin sae-off:main 1.0 is disabled: named in SAE_CORE_DISABLE_PLUGINS",
    ]


def test_an_unknown_name_with_a_provider_says_what_to_install() -> None:
    found = registry(candidate("sae-core", spec("topk")))
    with pytest.raises(
        UnknownNameError, match="'cubic' comes with sae-foo, which is not installed: pip install sae-foo"
    ):
        found.find("architecture", "sae_foo:cubic")


def test_an_unknown_name_of_an_extension_of_ours_says_which() -> None:
    found = registry(candidate("sae-core", spec("topk")))
    with pytest.raises(
        UnknownNameError, match="'gemma_2' comes with sae-loaders-gemmascope, which is not installed: pip "
    ):
        found.find("loader", "gemma_2")
    off = Registry(lambda: [candidate("sae-loaders-gemmascope", spec("x"))], Switches(allow=()))
    with pytest.raises(
        UnknownNameError, match="'gemma_2' comes with sae-loaders-gemmascope, which is disabled; see below"
    ):
        off.find("loader", "gemma_2")


def test_an_unknown_kind_is_an_error_with_the_known_ones() -> None:
    with pytest.raises(UnknownNameError, match="unknown kind 'architectures'; did you mean 'architecture'"):
        registry().find("architectures", "topk")


def test_a_class_is_imported_at_its_first_use_and_kept() -> None:
    module = ModuleType("counted")
    module.__dict__["__getattr__"] = lambda name: uses.append(name) or type(name, (SAE,), {"config_class": SAEConfig})
    uses: list[str] = []
    sys.modules["counted"] = module
    try:
        found = registry(candidate("sae-foo", spec("cubic", "counted:Cubic")))
        uses.clear()  # looking for the target asks the module for a few things
        assert found.resolve("architecture", "cubic") is found.resolve("architecture", "sae-foo:cubic")
        assert uses == ["Cubic"]
    finally:
        del sys.modules["counted"]


@pytest.mark.parametrize(
    ("target", "model", "message"),
    [
        (
            "sae_foo.model:Model",
            "Model = None; raise OSError('libfoo.so')",
            "cannot import 'sae_foo.model': OSError: libfoo.so",
        ),
        (
            "sae_foo.model:Model",
            "Model = None; import sys; sys.exit(1)",
            "cannot import 'sae_foo.model': SystemExit: 1",
        ),
        ("sae_foo.model:Model", "Models = vars()", "'sae_foo.model' has no 'Model'; did you mean 'Models'"),
        ("sae_foo.model:Model", "Model = 3", "target 'sae_foo.model:Model' is not a class but int"),
    ],
)
def test_a_class_that_cannot_be_had_names_its_provider(
    site: PluginFolder, target: str, model: str, message: str
) -> None:
    source = f"""
    from sae_core.plugins import MetricSpec, hookimpl

    @hookimpl
    def sae_register_metrics():
        yield MetricSpec(name="cubic", target="{target}")
    """
    site.add("sae-foo", source, version="0.7", files={"model.py": model})
    done = site.cli("show", "cubic")
    assert done.returncode == 1
    assert done.stderr.startswith("sae-core: error: metric 'cubic' of sae-foo 0.7: ")
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_notebook_registers_a_single_spec(monkeypatch: pytest.MonkeyPatch) -> None:
    class Cubic(SAE):
        config_class = SAEConfig

    cells = ModuleType("cells")  # as __main__ is in a notebook
    cells.__dict__["Cubic"] = Cubic
    monkeypatch.setitem(sys.modules, "cells", cells)
    found = registry()
    info = found.register(spec("cubic", "cells:Cubic"))
    assert (info.qualified, info.state) == ("local:architecture_cubic", "loaded")
    assert found.resolve("architecture", "cubic") is Cubic
    assert found.resolve("architecture", "local:cubic") is Cubic


def test_registering_again_replaces_what_was_there() -> None:
    found = registry()
    module = SimpleNamespace(__name__="pack.cell", sae_register_architectures=hookimpl(lambda: [spec("one")]))
    found.register(module)
    module.sae_register_architectures = hookimpl(lambda: [spec("two")])
    found.register(module)
    assert found.names("architecture") == ["two"]
    assert [info.qualified for info in found.plugins()] == ["local:cell"]


def test_a_failed_registration_raises_and_changes_nothing() -> None:
    found = registry()
    module = SimpleNamespace(__name__="cell", sae_register_architectures=hookimpl(lambda: [spec("one")]))
    found.register(module)
    module.sae_register_architectures = hookimpl(lambda: ["two"])
    with pytest.raises(PluginError, match=r"plugin local:cell local failed to load: .*'two' \(str\)"):
        found.register(module)
    other = SimpleNamespace(__name__="other", sae_register_architectures=hookimpl(lambda: [spec("one")]))
    with pytest.raises(PluginError, match="architecture 'one' is already given by local:cell"):
        found.register(other)
    assert found.names("architecture") == ["one"]
    assert len(found.plugins()) == 1


def test_a_conflict_ends_when_the_rival_is_replaced() -> None:
    found = registry(candidate("sae-foo", spec("cubic")))
    module = SimpleNamespace(__name__="cell", sae_register_architectures=hookimpl(lambda: [spec("cubic")]))
    assert found.register(module).state == "conflict"
    assert states(found)["sae-foo"] == "conflict"
    module.sae_register_architectures = hookimpl(lambda: [spec("quartic")])
    assert found.register(module).state == "loaded"
    assert states(found)["sae-foo"] == "loaded"


def test_every_name_of_the_core_leads_to_a_class() -> None:
    own = Registry(find_own_plugin, Switches())
    contributions = [contribution for kind in KINDS for contribution in own.contributions(kind)]
    assert len(contributions) > 10
    for contribution in contributions:
        assert own.resolve(contribution.spec.kind, contribution.spec.name).__name__ in contribution.spec.target
