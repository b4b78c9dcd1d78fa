"""What a name given on the command line means, where things of several kinds may have it."""

from __future__ import annotations

from sae_core.errors import UnknownNameError
from sae_core.plugins import Contribution, Registry
from sae_core.plugins.errors import unknown_name
from sae_core.plugins.manager import KINDS
from sae_core.plugins.records import canonical

__all__ = ["find_all", "find_one"]


def find_all(registry: Registry, name: str, kind: str | None = None) -> list[Contribution]:
    """Everything of that name, bare or as ``distribution:name``, one of each kind, in the order of the kinds.

    Raises UnknownNameError where there is nothing, or where several plugins give what the bare name says.
    """
    owner, colon, bare = name.rpartition(":")
    bare = bare.replace("-", "_")  # a command's name is typed with dashes
    name = f"{owner}{colon}{bare}"
    if kind is not None:
        return [registry.find(kind, name)]
    kinds = [
        k
        for k in KINDS
        if any(
            c.spec.name == bare and (not owner or c.distribution == canonical(owner)) for c in registry.contributions(k)
        )
    ]
    if not kinds:
        known = [known for k in KINDS for known in registry.names(k)]
        raise UnknownNameError(unknown_name("name", name, known, registry.plugins()))
    return [registry.find(kind, name) for kind in kinds]


def find_one(registry: Registry, name: str, kind: str | None = None) -> Contribution:
    """The one thing of that name. Raises UnknownNameError as `find_all` does, and where several kinds have it."""
    found = find_all(registry, name, kind)
    if len(found) > 1:
        choices = " or ".join(f"--kind {each.spec.kind}" for each in found)
        raise UnknownNameError(f"{found[0].spec.name!r} names things of several kinds; add {choices}")
    return found[0]
