"""Which columns of a source's batches a dictionary reads, and which it is to predict.

A source names the sites of its tensors, and a dictionary the sites that it reads and writes. A dictionary without names
takes all columns. So several dictionaries can be trained on one stream, each on sites of its own, and what belongs to one
row stays in one row through every shuffle.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from torch import Tensor

from sae_core.errors import ConfigError, did_you_mean
from sae_core.protocols import ActivationBatch, ActivationSource, GivesSequences, HasTargets
from sae_core.sae import SAE
from sae_core.sites import Sites

__all__ = ["Wiring", "fields_for"]


def fields_for(source: ActivationSource, sae_class: type[SAE]) -> dict[str, Any]:
    """The widths that an architecture's config takes from a source: d_in, for pairs d_out, and sites where there are several.

    Raises ConfigError when the source gives pairs to an architecture that is no transcoder.
    """
    known = {field.name for field in dataclasses.fields(sae_class.config_class)}
    fields: dict[str, Any] = {"d_in": sum(source.sites.values())}
    if len(source.sites) > 1 and "reads" in known:
        fields["reads"] = dict(source.sites)
    if isinstance(source, HasTargets) and source.target_sites:
        if "d_out" not in known:
            raise ConfigError(
                f"the source gives pairs of inputs and targets ({_listed(source.target_sites)}), but architecture "
                f"{sae_class.architecture!r} reconstructs its input; leave the targets out, or use one that takes d_out"
            )
        fields["d_out"] = sum(source.target_sites.values())
        if len(source.target_sites) > 1:
            fields["writes"] = dict(source.target_sites)
    return fields


@final
@dataclass(frozen=True, slots=True)
class Wiring:
    """Takes of each batch what one dictionary reads and writes; calling it with a batch gives that dictionary's batch.

    `inputs` are the columns read, None for all as they are; `targets` those to predict, of the batch's `targets_from`.
    """

    inputs: tuple[slice, ...] | None
    targets: tuple[slice, ...] | None
    targets_from: Literal["targets", "inputs", "nowhere"]

    @classmethod
    def between(cls, sae: SAE, source: ActivationSource, who: str = "") -> Wiring:
        """The wiring of `sae` to `source`. Raises ConfigError where the source does not give what the dictionary needs; `who`
        stands before its message.
        """
        what = f"{who}{sae.architecture}"
        sites = source.sites
        given = source.target_sites if isinstance(source, HasTargets) else {}
        if sae.reads_sequences and not (isinstance(source, GivesSequences) and source.sequence_length):
            raise ConfigError(
                f"{what} reads whole sequences, and this source gives shuffled rows; rows in random order would "
                "be taken for neighbours. Use a source that gives sequences, and ask it for them"
            )
        inputs = _columns(sae.reads, sites, f"{what}: reads")
        if sae.reconstructs_input:
            return cls(inputs, None, "nowhere" if given else "targets")
        from_inputs = "" not in sae.writes and not set(sae.writes) <= set(given) and set(sae.writes) <= set(sites)
        if not given and not from_inputs:
            raise ConfigError(
                f"{what}: d_out is set, so it needs targets of width {sae.d_out}, and the source gives none; it "
                f"gives {_listed(sites)}. Name sites of the source in writes, or make the source give targets"
            )
        targets = _columns(sae.writes, sites if from_inputs else given, f"{what}: writes")
        return cls(inputs, targets, "inputs" if from_inputs else "targets")

    def __call__(self, batch: ActivationBatch) -> ActivationBatch:
        """The columns that belong to the dictionary, as views where they are neighbours."""
        inputs = _taken(batch.inputs, self.inputs)
        found = {"targets": batch.targets, "inputs": batch.inputs, "nowhere": None}[self.targets_from]
        return ActivationBatch(inputs, None if found is None else _taken(found, self.targets))


def _columns(wanted: Mapping[str, int], given: Mapping[str, int], what: str) -> tuple[slice, ...] | None:
    """Slices of the given columns that make up the wanted ones, None for all of them in their order."""
    nameless = "" in wanted or "" in given
    if nameless or list(wanted.items()) == list(given.items()):
        if sum(wanted.values()) != sum(given.values()):
            raise ConfigError(
                f"{what}: width {sum(wanted.values())} is wanted, but the source gives {_listed(given)}, "
                f"{sum(given.values())} in all"
            )
        return None
    for name, width in wanted.items():
        if name not in given:
            raise ConfigError(
                f"{what}: the source has no site {name!r}{did_you_mean(name, given)}; it gives {_listed(given)}"
            )
        if given[name] != width:
            raise ConfigError(f"{what}: site {name!r} is {width} wide here, but {given[name]} in the source")
    slices = Sites(given).slices()
    return _merged([slices[name] for name in wanted])


def _merged(slices: Sequence[slice]) -> tuple[slice, ...]:
    """Neighbouring slices as one."""
    merged = [slices[0]]
    for part in slices[1:]:
        if part.start == merged[-1].stop:
            merged[-1] = slice(merged[-1].start, part.stop)
        else:
            merged.append(part)
    return tuple(merged)


def _taken(x: Tensor, slices: tuple[slice, ...] | None) -> Tensor:
    if slices is None:
        return x
    parts = [x[..., part] for part in slices]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def _listed(sites: Mapping[str, int]) -> str:
    return ", ".join(f"{name or 'one site'} ({width})" for name, width in sites.items()) or "no site"
