"""Facts: what the caller of a loader knows and the files do not say, and which of them mean something to every format.

A fact is either the loader's own (``k``, ``embedding``, a field of the config), or one of `METADATA_FACTS`, which say where an
SAE comes from and become metadata whatever the format, or ``ignore_keys``: config keys that the caller declares harmless.
Anything else is an error, so that a typo is never taken for a fact.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

from sae_core.errors import ConfigError, did_you_mean

__all__ = ["METADATA_FACTS", "known_facts"]

METADATA_FACTS = frozenset(
    {
        "context_size",
        "dataset_path",
        "exclude_special_tokens",
        "hf_hook_name",
        "hf_hook_name_out",
        "hook_head_index",
        "hook_head_index_out",
        "hook_name",
        "hook_name_out",
        "l0",
        "model_class_name",
        "model_from_pretrained_kwargs",
        "model_name",
        "model_revision",
        "neuronpedia_id",
        "prepend_bos",
        "seqpos_slice",
        "training_architecture",
        "training_architecture_details",
        "variance_explained",
    }
)
"""Facts that any loader takes from its caller and passes on as metadata; None means unknown."""


def known_facts(overrides: Mapping[str, Any] | None, loader: str, own: Iterable[str] = ()) -> dict[str, Any]:
    """The caller's facts. Raises ConfigError for one that neither the loader (`own`) nor every format knows.

    >>> known_facts({"hook_nmae": "blocks.1.hook_resid_post"}, "sparsify")
    Traceback (most recent call last):
    sae_core.errors.ConfigError: loader 'sparsify': unknown fact 'hook_nmae'; did you mean 'hook_name'? (known: \
context_size, dataset_path, exclude_special_tokens, hf_hook_name, hf_hook_name_out, hook_head_index, \
hook_head_index_out, hook_name, hook_name_out, ignore_keys, l0, model_class_name, model_from_pretrained_kwargs, model_name, \
model_revision, neuronpedia_id, prepend_bos, seqpos_slice, training_architecture, training_architecture_details, \
variance_explained)
    """
    facts = dict(overrides or {})
    known = {"ignore_keys", *own, *METADATA_FACTS}
    if unknown := sorted(map(str, set(facts) - known)):
        raise ConfigError(
            f"loader {loader!r}: unknown fact {unknown[0]!r}{did_you_mean(unknown[0], known)} "
            f"(known: {', '.join(sorted(known))})"
        )
    ignored = facts.get("ignore_keys") or []
    if not isinstance(ignored, list | tuple | set | frozenset) or not all(
        isinstance(key, str) for key in cast("Iterable[object]", ignored)
    ):
        raise ConfigError(f"loader {loader!r}: the fact ignore_keys must be a list of config keys, not {ignored!r}")
    return facts
