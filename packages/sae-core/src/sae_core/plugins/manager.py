"""Trying plugins out, one at a time and without trusting any of them.

A plugin is loaded in quarantine: a throw-away `pluggy.PluginManager` that holds the hook specifications and this one
plugin. Its hooks are called, its generators drained, what they give is checked. Whatever goes wrong is an exception
from here, with nothing registered anywhere; `sae_core.plugins.registry` decides what to do with it.
"""

from __future__ import annotations

import importlib.util
import re
import reprlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, PathFinder

import pluggy

from sae_core.errors import PluginError, did_you_mean
from sae_core.plugins.finding import core_version
from sae_core.plugins.hookspecs import HOOKSPEC_VERSION, new_manager
from sae_core.plugins.specs import (
    ActivationSourceSpec,
    ArchitectureSpec,
    CatalogueSpec,
    CommandSpec,
    LoaderSpec,
    LoggerSpec,
    MetricSpec,
    Spec,
    WriterSpec,
)

__all__ = ["HEAVY", "HOOKS", "KINDS", "IncompatibleError", "Tried", "near_hook", "try_plugin"]

HOOKS: dict[str, type[Spec]] = {
    "sae_register_architectures": ArchitectureSpec,
    "sae_register_loaders": LoaderSpec,
    "sae_register_writers": WriterSpec,
    "sae_register_activation_sources": ActivationSourceSpec,
    "sae_register_catalogues": CatalogueSpec,
    "sae_register_metrics": MetricSpec,
    "sae_register_loggers": LoggerSpec,
    "sae_register_commands": CommandSpec,
}
"""Each hook and the spec that it gives."""

_PREFIX = "sae_register_"

KINDS: tuple[str, ...] = tuple(spec.kind for spec in HOOKS.values())

HEAVY = ("datasets", "huggingface_hub", "numpy", "plotly", "torch", "transformer_lens", "transformers", "wandb")
"""Libraries that a plugin must not import merely to be listed; one that does is listed with a remark."""


class IncompatibleError(PluginError):
    """The plugin was written for another version of the hooks."""


@dataclass(frozen=True, slots=True)
class Tried:
    """A plugin that survived: the object that holds its hooks, what they gave, and the heavy libraries it imported."""

    plugin: object
    specs: tuple[Spec, ...]
    heavy: tuple[str, ...] = ()


def try_plugin(qualified: str, load: Callable[[], object], *, trace: bool = False) -> Tried:
    """Load one plugin, call its hooks, and check what they give.

    Raises whatever the plugin raises (SystemExit included), IncompatibleError if it was written for other hooks, and
    PluginError if a hook is misspelt or unmarked, takes an argument that is not offered, gives something that is not
    the spec of that hook, or names a target that does not exist. With `trace`, what each hook gives is printed to stderr.
    """
    before = set(sys.modules)
    plugin = load()
    _check_hookspec_version(plugin)
    quarantine = new_manager()
    _check_hooks(plugin, quarantine)
    try:
        quarantine.register(plugin, name=qualified)
    except pluggy.PluginValidationError as error:
        raise PluginError(f"{' '.join(str(error).split())} (a hook may take: core_version)") from None
    specs = [spec for hook in HOOKS for spec in _call(quarantine, hook, qualified if trace else "")]
    _check_specs(specs)
    return Tried(plugin, tuple(specs), tuple(name for name in HEAVY if name in sys.modules and name not in before))


def _check_hookspec_version(plugin: object) -> None:
    wanted = getattr(plugin, "SAE_CORE_HOOKSPEC", HOOKSPEC_VERSION)
    if isinstance(wanted, bool) or not isinstance(wanted, int):
        raise PluginError(f"SAE_CORE_HOOKSPEC must be an integer, not {reprlib.repr(wanted)}")
    if wanted != HOOKSPEC_VERSION:
        behind = "sae-core" if wanted > HOOKSPEC_VERSION else "the plugin"
        raise IncompatibleError(
            f"written for version {wanted} of the hooks, and this sae-core offers version {HOOKSPEC_VERSION}; "
            f"update {behind}"
        )


def _check_hooks(plugin: object, quarantine: pluggy.PluginManager) -> None:
    """Refuse what pluggy would ignore in silence: unknown hooks, and hooks that nobody marked."""
    for name in dir(plugin):
        options = quarantine.parse_hookimpl_opts(plugin, name)
        if options is None:
            if name.startswith("sae_register_") and callable(getattr(plugin, name)):
                raise PluginError(f"{name} is not marked with @hookimpl, so it would never be called")
            continue
        hook = options.get("specname") or name
        if hook not in HOOKS and not options.get("optionalhook"):
            raise PluginError(f"unknown hook {hook!r}{near_hook(hook)} (known: {', '.join(HOOKS)})")
        if options.get("wrapper") or options.get("hookwrapper"):
            raise PluginError(f"{name} is a hook wrapper; a plugin may only speak for itself")


def near_hook(hook: str) -> str:
    """A suggestion by what follows the prefix that all hooks share; with it every hook would resemble every other."""
    kind = hook.removeprefix("sae_").removeprefix("register_")
    short = {known.removeprefix(_PREFIX): known for known in HOOKS}
    within = [known for name, known in short.items() if len(kind) > 3 and kind.removesuffix("s") in name]
    if len(within) == 1:
        return f"; did you mean {within[0]!r}?"
    return did_you_mean(kind, short).replace("'", f"'{_PREFIX}", 1)


def _call(quarantine: pluggy.PluginManager, hook: str, trace_as: str) -> Iterator[Spec]:
    """What the one plugin in quarantine gives for `hook`; generators run here, where a failure is still its own."""
    caller: pluggy.HookCaller = getattr(quarantine.hook, hook)
    expected = HOOKS[hook]
    results: list[object] = caller(core_version=core_version())
    if len(results) < len(caller.get_hookimpls()):  # pluggy drops None
        raise PluginError(f"{hook} gave None; yield or return {expected.__name__} objects")
    for result in results:
        if isinstance(result, Spec | str) or not isinstance(result, Iterable):
            raise PluginError(f"{hook} gave {_shown(result)}; yield or return {expected.__name__} objects")
        for item in result:
            if trace_as:
                print(f"sae-core: {trace_as} {hook} -> {item!r}", file=sys.stderr)  # noqa: T201 - asked for
            if not isinstance(item, expected):
                raise PluginError(f"{hook} gave {_shown(item)}, which is not an {expected.__name__}")
            yield item


def _shown(value: object) -> str:
    return f"{reprlib.repr(value)} ({type(value).__name__})"


def _check_specs(specs: Sequence[Spec]) -> None:
    """Refuse a name given twice, and a target that certainly does not exist, judged without importing anything."""
    seen: set[tuple[str, str]] = set()
    for spec in specs:
        if (spec.kind, spec.name) in seen:
            raise PluginError(f"gives {spec.kind} {spec.name!r} twice")
        seen.add((spec.kind, spec.name))
        module, _, attribute = spec.target.partition(":")
        found = _locate(module)
        if found is None:
            raise PluginError(f"{spec.kind} {spec.name!r}: target {spec.target!r}: there is no module {module!r}")
        if found.origin and found.origin.endswith(".py") and _certainly_lacks(found.origin, attribute):
            raise PluginError(f"{spec.kind} {spec.name!r}: target {spec.target!r}: {module!r} has no {attribute!r}")


def _locate(module: str) -> ModuleSpec | None:
    """Where a module is. Unlike `importlib.util.find_spec`, this does not import the packages that contain it."""
    if module in sys.modules:
        return getattr(sys.modules[module], "__spec__", None) or ModuleSpec(module, None)
    package, _, name = module.rpartition(".")
    if not package:
        return importlib.util.find_spec(module)
    outer = _locate(package)
    if outer is None or outer.submodule_search_locations is None:
        return None
    return PathFinder.find_spec(f"{package}.{name}", list(outer.submodule_search_locations))


_MAKES_NAMES = re.compile(r"import\s*\(?\s*\*|\b(__getattr__|__dict__|globals|vars|setattr|exec|eval)\b")


def _certainly_lacks(path: str, attribute: str) -> bool:
    """Whether a source file neither mentions the name nor does anything that could create it unmentioned."""
    try:
        with open(path, encoding="utf-8") as file:
            source = file.read()
    except (OSError, UnicodeError):
        return False
    return not re.search(rf"\b{attribute}\b", source) and not _MAKES_NAMES.search(source)
