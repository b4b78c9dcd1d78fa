"""What decides the numbers of a run besides its state: who made the source, with which settings, and which code ran.

`facts` collects it as plain data when a checkpoint is written; `differences` compares it with what is there when training is
to go on, and names what differs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, cast, runtime_checkable

import torch

from sae_core.config import absolute_paths, unstructure
from sae_core.errors import UnknownNameError
from sae_core.protocols import ActivationSource, HasFingerprint, HasMetadata, HasTargets
from sae_core.sae import SAE
from sae_core.training.config import TrainConfig

__all__ = [
    "MAY_CHANGE",
    "StandsForSource",
    "claimed",
    "config_facts",
    "differences",
    "named_architecture",
    "orphaned",
    "source_facts",
    "version_facts",
]

MAY_CHANGE = (
    "total_samples", "lr", "lr_warmup_samples", "lr_decay_samples", "grad_clip_norm", "log_every_steps",
    "checkpoint_every_samples", "checkpoint_every_minutes", "keep_last",
    "progress_bar",
)  # fmt: skip
"""Fields of `TrainConfig` that may differ when a run goes on; they count from there."""


@runtime_checkable
class StandsForSource(Protocol):
    """A source in place of one that is elsewhere, whose facts it has."""

    @property
    def facts(self) -> Mapping[str, Any]: ...


def source_facts(source: object) -> dict[str, Any]:
    """The source as data: its class, its config, its sites, and what it says about itself."""
    if isinstance(source, StandsForSource):
        return dict(source.facts)
    facts: dict[str, Any] = {"class": f"{type(source).__module__}.{type(source).__qualname__}"}
    config = getattr(source, "config", None)
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        facts["config"] = unstructure(absolute_paths(config))
    if isinstance(source, ActivationSource):
        facts["sites"] = dict(source.sites)
        facts["target_sites"] = dict(source.target_sites) if isinstance(source, HasTargets) else {}
    if isinstance(source, HasFingerprint):
        facts["fingerprint"] = source.fingerprint()
    if isinstance(source, HasMetadata):
        facts["metadata"] = _plain(source.metadata())
    if isinstance(source, Sequence) and not isinstance(source, str):
        facts["batches"] = len(cast("Sequence[Any]", source))
    return facts


def config_facts(config: TrainConfig) -> dict[str, Any]:
    """The settings of training that must stay."""
    return {name: value for name, value in unstructure(config).items() if name not in MAY_CHANGE}


def named_architecture(sae: SAE) -> str:
    """The name under which `sae`'s class is made again: with its distribution, unless it is sae-core's own or nobody's."""
    from sae_core.plugins import get_registry

    try:
        return get_registry().lasting_name("architecture", type(sae))
    except UnknownNameError:
        return (
            sae.architecture
        )  # of a class that nobody registered, which trains, but is refused when it is to be saved


def version_facts(sae: SAE) -> dict[str, Any]:
    """The versions of the code that computes the numbers."""
    from sae_core import __version__
    from sae_core.plugins import get_registry

    provider = get_registry().provider_of("architecture", type(sae))
    return {
        "sae-core": __version__,
        "torch": torch.__version__,
        "architecture": f"{provider.distribution} {provider.version}",
    }


def orphaned(state: Mapping[str, Any]) -> list[str]:
    """The dictionaries of a checkpoint whose architecture nobody provides any more, by name."""
    from sae_core.plugins import get_registry

    gone: list[str] = []
    for name, config in state["initial"].items():
        try:
            get_registry().find("architecture", config["architecture"])
        except UnknownNameError:
            gone.append(name)
    return gone


def claimed(state: Mapping[str, Any], architectures: Mapping[str, str]) -> dict[str, Any]:
    """A checkpoint's state as if these `architectures`, by the names of dictionaries, had written it: for packages that
    changed their name.
    """
    from sae_core.plugins import get_registry

    initial: dict[str, Any] = dict(state["initial"])
    versions: dict[str, Any] = dict(state["facts"]["versions"])
    for name, architecture in architectures.items():
        found = get_registry().find("architecture", architecture)
        initial[name] = {**initial[name], "architecture": found.lasting}
        now = {"architecture": f"{found.distribution} {found.version}"}
        if name:  # one of several, whose versions are by name
            versions[name] = {**versions[name], **now}
        else:
            versions |= now
    return {**state, "initial": initial, "facts": {**state["facts"], "versions": versions}}


def differences(saved: Any, now: Any, path: str) -> Iterator[str]:
    """What differs, one sentence each.

    >>> list(differences({"seed": 0, "k": 3}, {"seed": 1, "k": 3}, "source"))
    ['source.seed was 0, is now 1']
    """
    if isinstance(saved, Mapping) and isinstance(now, Mapping):
        before, after = cast("Mapping[str, Any]", saved), cast("Mapping[str, Any]", now)
        for key in {**before, **after}:
            yield from differences(before.get(key), after.get(key), f"{path}.{key}" if path else key)
    elif saved != now:
        yield f"{path} was {saved!r}, is now {now!r}"


def _plain(value: Any) -> Any:
    """`value` as it comes back from JSON."""
    import json

    return json.loads(json.dumps(value, default=str))
