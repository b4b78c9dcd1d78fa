"""What the installed plugins provide, by kind and name.

`get_registry()` finds and tries the plugins once per process, at the first call and never at ``import sae_core``. A
plugin counts whole or not at all: one that fails is listed with its reason and contributes nothing. Names of sae-core
itself are reserved; among strangers a bare name works while it is unique, and ``distribution:name`` always does.

Resolving a name to its class is the only step that imports anything heavy, and it happens when the name is used.
"""

from __future__ import annotations

import importlib
import os
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Literal, final

from sae_core.errors import PluginError, SaeCoreError, UnknownNameError, did_you_mean
from sae_core.plugins.errors import PluginWarning, ambiguous_name, one_line, plugin_trouble, unknown_name
from sae_core.plugins.finding import find_plugins, version_problem
from sae_core.plugins.hookspecs import hookimpl, new_manager
from sae_core.plugins.manager import HOOKS, KINDS, IncompatibleError, Tried, try_plugin
from sae_core.plugins.promises import missing_of
from sae_core.plugins.records import CORE, Candidate, Contribution, PluginInfo, State, canonical
from sae_core.plugins.specs import Spec
from sae_core.plugins.switches import Switches

__all__ = ["Registry", "get_registry", "list_plugins", "reset_registry"]

OnTrouble = Literal["warn", "raise", "ignore"]


@final
class Registry:
    """The plugins that were found, what became of each, and what they provide.

    `find` returns the candidates and `switches` decide which are on; by default both come from the environment. With
    `load` False nothing is imported and every plugin is ``not_loaded``. `on_trouble` says what to do about one that
    cannot be used: warn (one PluginWarning each, the default), raise the first as PluginError (the default under
    SAE_CORE_STRICT_PLUGINS=1), or only list it.
    """

    def __init__(
        self,
        find: Callable[[], Iterable[Candidate]] = find_plugins,
        switches: Switches | None = None,
        *,
        load: bool = True,
        on_trouble: OnTrouble | None = None,
    ) -> None:
        self._switches = switches or Switches.from_environment()
        self._on_trouble: OnTrouble = on_trouble or ("raise" if self._switches.strict else "warn")
        self._manager = new_manager()  # holds what survived, under the name distribution:name
        self._plugins: dict[str, PluginInfo] = {}
        self._contributions: dict[str, list[Contribution]] = {kind: [] for kind in KINDS}
        self._resolved: dict[str, type] = {}
        candidates = list(find())
        self._problems = tuple(self._switches.problems(candidates))
        for problem in self._problems:
            self._trouble(problem, None)
        for candidate in candidates:
            self._plugins[candidate.qualified] = self._admit(candidate) if load else self._unopened(candidate)

    @property
    def problems(self) -> Sequence[str]:
        """Sentences about switches that name no installed plugin."""
        return self._problems

    def plugins(self) -> list[PluginInfo]:
        """Every plugin that was found: sae-core's own first, the rest sorted by distribution and name."""
        return [self._with_contested_names(info) for info in self._plugins.values()]

    def contributions(self, kind: str) -> list[Contribution]:
        """Everything of one kind, sorted by name, sae-core's own first among equals."""
        if kind not in KINDS:
            raise UnknownNameError(f"unknown kind {kind!r}{did_you_mean(kind, KINDS)} (known: {', '.join(KINDS)})")
        return sorted(self._contributions[kind], key=lambda c: (c.spec.name, c.distribution != CORE, c.distribution))

    def name_of(self, contribution: Contribution) -> str:
        """What a user may write for it: its bare name if that is clear, else ``distribution:name``."""
        rivals = self._rivals(contribution.spec, contribution.distribution)
        return contribution.qualified if rivals and contribution.distribution != CORE else contribution.spec.name

    def names(self, kind: str) -> list[str]:
        """What a user may write for each contribution of a kind, sorted by bare name."""
        return [self.name_of(contribution) for contribution in self.contributions(kind)]

    def find(self, kind: str, name: str) -> Contribution:
        """Who provides `name`, bare or as ``distribution:name``. Raises UnknownNameError if nobody or several do."""
        owner, colon, bare = name.rpartition(":")
        claims = [c for c in self.contributions(kind) if c.spec.name == bare]
        if colon:
            claims = [c for c in claims if c.distribution == canonical(owner)]
        elif claims and claims[0].distribution == CORE:
            claims = claims[:1]
        if not claims:
            qualified = [contribution.qualified for contribution in self.contributions(kind)]
            raise UnknownNameError(unknown_name(kind, name, self.names(kind), self.plugins(), qualified))
        if len(claims) > 1:
            raise UnknownNameError(ambiguous_name(kind, name, claims))
        return claims[0]

    def provider_of(self, kind: str, cls: type) -> Contribution:
        """Who provides the class `cls`, whatever other plugin has a claim on its name. Raises UnknownNameError if nobody."""
        for contribution in self.contributions(kind):
            target = contribution.spec.target
            if self._resolved.get(target) is cls or target == f"{cls.__module__}:{cls.__qualname__}":
                return contribution
        where = f"{cls.__module__}:{cls.__qualname__}"
        raise UnknownNameError(
            f"no plugin provides the {kind} {where}; in a notebook, get_registry().register it first"
        )

    def lasting_name(self, kind: str, cls: type) -> str:
        """The name for `cls` that means it whatever is installed later: with its owner, unless it is sae-core's.

        Raises UnknownNameError where nobody provides it.
        """
        return self.provider_of(kind, cls).lasting

    def resolve(self, kind: str, name: str) -> type:
        """The class behind `name`: imported at the first use, then kept.

        Raises UnknownNameError as `find` does, and PluginError when the class cannot be imported or is not a class.
        """
        contribution = self.find(kind, name)
        target = contribution.spec.target
        if target not in self._resolved:
            self._resolved[target] = _import_target(contribution)
        return self._resolved[target]

    def usable(self, kind: str, name: str) -> type:
        """`resolve`, and PluginError unless the class is what its kind asks for (`promises`): for those who will use it."""
        found = self.resolve(kind, name)
        if lacking := missing_of(kind, found):
            contribution = self.find(kind, name)
            raise PluginError(f"{kind} {name!r} of {contribution.distribution} {contribution.version}: {lacking}")
        return found

    def register(self, plugin: object, distribution: str = "local") -> PluginInfo:
        """Add what `plugin` provides to this process; for notebooks and tests.

        `plugin` is a module or object with hooks, or a single spec. Registering the same one again replaces it. Raises
        PluginError with the reason if it cannot be used; then nothing has changed.
        """
        if isinstance(plugin, Spec):
            name = f"{plugin.kind}_{plugin.name}"
        else:
            name = str(getattr(plugin, "__name__", type(plugin).__name__)).rpartition(".")[2]
        candidate = Candidate(
            name=name, distribution=canonical(distribution), version="local", load=lambda: _with_hooks(plugin)
        )
        info, error = self._try(candidate)
        if info.state != "loaded":
            raise PluginError(plugin_trouble(info)) from error
        self._plugins[candidate.qualified] = info
        return self._with_contested_names(info)

    # -- how one plugin gets in ----------------------------------------------------------------------------------------

    def _unopened(self, candidate: Candidate) -> PluginInfo:
        """What metadata and switches alone say about a plugin."""
        state: State = "not_loaded"
        reason = candidate.remark
        if disabled := self._switches.why_disabled(candidate.distribution, candidate.name):
            state, reason = "disabled", disabled
        elif candidate.refusal:
            state, reason = candidate.refusal
        return PluginInfo(
            name=candidate.name,
            distribution=candidate.distribution,
            version=candidate.version,
            state=state,
            reason=reason,
            target=candidate.target,
            location=candidate.location,
        )

    def _admit(self, candidate: Candidate) -> PluginInfo:
        info, error = self._unopened(candidate), None
        if info.state == "not_loaded":
            info, error = self._try(candidate)
        if info.state not in ("loaded", "disabled"):
            self._trouble(f"{plugin_trouble(info)}; run `sae-core list-plugins -v`", error)
        return info

    def _try(self, candidate: Candidate) -> tuple[PluginInfo, BaseException | None]:
        info = replace(self._unopened(candidate), state="failed")
        started = time.perf_counter()
        try:
            tried = try_plugin(candidate.qualified, candidate.load, trace=self._switches.trace)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # noqa: BLE001 - the one place where a stranger's failure is caught, sys.exit() too
            info = replace(
                info,
                reason=one_line(error),
                import_ms=_milliseconds_since(started),
                traceback="".join(traceback.format_exception(error)),
            )
            if diagnosis := version_problem(candidate.requires):
                return replace(info, state="incompatible", reason=f"{diagnosis}; {info.reason}"), error
            if isinstance(error, IncompatibleError):
                return replace(info, state="incompatible"), error
            return info, error
        info = replace(info, import_ms=_milliseconds_since(started))
        if clash := self._clash(candidate, tried):
            return replace(info, state="conflict", reason=clash), None
        return self._keep(info, tried), None

    def _clash(self, candidate: Candidate, tried: Tried) -> str:
        """Why a plugin cannot be told apart from another one that is already in; an empty string if it can."""
        twin = self._manager.get_name(tried.plugin)
        if twin not in (None, candidate.qualified):
            return f"the same module as {twin}; remove one of the two entry points"
        for spec in tried.specs:
            for rival in self._contributions[spec.kind]:
                mine = rival.distribution == candidate.distribution and rival.plugin != candidate.name
                if mine and rival.spec.name == spec.name:
                    return f"{spec.kind} {spec.name!r} is already given by {rival.distribution}:{rival.plugin}"
        return ""

    def _keep(self, info: PluginInfo, tried: Tried) -> PluginInfo:
        if self._manager.has_plugin(info.qualified):
            self._forget(self._plugins[info.qualified])
        self._manager.register(tried.plugin, name=info.qualified)
        for spec in tried.specs:
            self._contributions[spec.kind].append(Contribution(spec, info.name, info.distribution, info.version))
        remarks = [info.reason] if info.reason else []
        if tried.heavy:
            remarks.append(f"imports {', '.join(tried.heavy)} merely to be listed, which slows every command down")
        return replace(info, state="loaded", reason="; ".join(remarks), provides=tried.specs)

    def _forget(self, info: PluginInfo) -> None:
        self._manager.unregister(name=info.qualified)
        for spec in info.provides:
            claims = self._contributions[spec.kind]
            self._contributions[spec.kind] = [c for c in claims if c.spec is not spec]
            self._resolved.pop(spec.target, None)

    def _rivals(self, spec: Spec, distribution: str) -> list[Contribution]:
        claims = self._contributions[spec.kind]
        return [c for c in claims if c.spec.name == spec.name and c.distribution != distribution]

    def _with_contested_names(self, info: PluginInfo) -> PluginInfo:
        """The plugin as a conflict if another one has a claim on a name it gives; both stay usable by full name."""
        if info.state != "loaded" or info.distribution == CORE:
            return info
        reasons: list[str] = []
        for spec in info.provides:
            rivals = self._rivals(spec, info.distribution)
            if rivals:
                own = any(rival.distribution == CORE for rival in rivals)
                whose = "is sae-core's own" if own else f"is also {', '.join(sorted(c.qualified for c in rivals))}"
                reasons.append(f"{spec.kind} {spec.name!r} {whose}; write {info.distribution}:{spec.name} for this one")
        return replace(info, state="conflict", reason="; ".join(reasons)) if reasons else info

    def _trouble(self, message: str, error: BaseException | None) -> None:
        if self._on_trouble == "raise":
            raise PluginError(message) from error
        if self._on_trouble == "warn":
            warnings.warn(message, PluginWarning, stacklevel=2)


def _with_hooks(plugin: object) -> object:
    """A single spec as a plugin that gives it; anything else as it is."""
    if not isinstance(plugin, Spec):
        return plugin
    hook = next(hook for hook, spec in HOOKS.items() if isinstance(plugin, spec))
    return SimpleNamespace(**{hook: hookimpl(lambda: [plugin])})


def _milliseconds_since(started: float) -> float:
    return round((time.perf_counter() - started) * 1000, 1)


def _import_target(contribution: Contribution) -> type:
    spec = contribution.spec
    what = f"{spec.kind} {spec.name!r} of {contribution.distribution} {contribution.version}"
    module_name, _, attribute = spec.target.partition(":")
    try:
        module = importlib.import_module(module_name)
    except SaeCoreError:
        raise  # it already says what is missing
    except (Exception, SystemExit) as error:
        raise PluginError(f"{what}: cannot import {module_name!r}: {one_line(error)}") from error
    try:
        found = getattr(module, attribute)
    except AttributeError:
        near = did_you_mean(attribute, dir(module))
        raise PluginError(f"{what}: target {spec.target!r}: {module_name!r} has no {attribute!r}{near}") from None
    if not isinstance(found, type):
        raise PluginError(f"{what}: target {spec.target!r} is not a class but {type(found).__name__}")
    return found


# -- one registry per process -----------------------------------------------------------------------------------------

_registry: Registry | None = None
_loading = False
_lock = threading.RLock()


def get_registry() -> Registry:
    """The registry of this process; the first call finds and tries the plugins.

    With SAE_CORE_STRICT_PLUGINS=1 a plugin that cannot be used is raised as PluginError.
    """
    global _registry, _loading
    if _registry is not None:
        return _registry
    with _lock:
        if _loading:
            raise PluginError("a plugin asked for the registry while it was being loaded; do that when it is used")
        if _registry is None:
            _loading = True
            try:
                _registry = Registry()
            finally:
                _loading = False
        return _registry


def list_plugins() -> list[PluginInfo]:
    """Every installed plugin with its state, sae-core's own first."""
    return get_registry().plugins()


def reset_registry() -> None:
    """Forget what was found, so that the next call looks again; for tests that change what is installed."""
    global _registry
    _registry = None


def _after_fork() -> None:
    """A child forked while another thread was loading plugins would wait for that thread forever."""
    global _lock, _loading
    _lock, _loading = threading.RLock(), False


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
