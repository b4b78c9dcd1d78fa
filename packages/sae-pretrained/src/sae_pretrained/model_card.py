"""The README of a repository of SAEs: what they are for and how to load them, with every library that can.

The list of SAEs stands between two comments, so that a later upload can bring it up to date and leave everything that
people have written around it alone. A README without these comments is theirs and is not touched.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sae_core.errors import UnknownNameError
from sae_core.plugins import get_registry

from sae_pretrained.models import base_model

if TYPE_CHECKING:
    from sae_core.sae import SAE

__all__ = ["CARD_FILE", "SharedSAE", "updated_card"]

CARD_FILE = "README.md"
_START, _END = "<!-- sae-core: list of SAEs -->", "<!-- sae-core: end of list -->"
_LIST = re.compile(f"{re.escape(_START)}\n(.*?){re.escape(_END)}", re.DOTALL)


@dataclass(frozen=True, kw_only=True, slots=True)
class SharedSAE:
    """What the card says about one SAE."""

    sae_id: str
    architecture: str
    d_in: int
    d_sae: int
    model: str | None
    hook: str | None
    for_sae_lens: bool = True
    """Whether SAELens reads it, too."""

    @classmethod
    def describe(cls, sae_id: str, sae: SAE[Any]) -> SharedSAE:
        """From a loaded SAE; base model and hook point are what its metadata say."""
        from sae_core.format.sae_lens_writer import sae_lens_reads

        facts = sae.metadata.get("sae_core", {})
        return cls(
            sae_id=sae_id,
            architecture=get_registry().lasting_name("architecture", type(sae)),
            d_in=sae.d_in,
            d_sae=sae.d_sae,
            model=facts.get("base_model") or _hub_id(sae.metadata.get("model_name")),
            hook=sae.metadata.get("hook_name") or sae.metadata.get("hf_hook_name"),
            for_sae_lens=sae_lens_reads(sae),
        )

    @property
    def package(self) -> str:
        """The distribution that reads it."""
        return self.architecture.rpartition(":")[0] or "sae-core"

    def row(self) -> str:
        """A line of the card's table."""
        cells = [f"`{self.sae_id}`", self.architecture, self.d_in, self.d_sae, self.model or "", f"`{self.hook or ''}`"]
        return "| " + " | ".join(str(cell).replace("``", "") for cell in cells) + " |"


def _hub_id(model: str | None) -> str | None:
    """The Hub's name of a model that may go by another one."""
    try:
        return base_model(model).id if model else None
    except UnknownNameError:
        return model


def updated_card(old: str | None, repository: str, saes: Iterable[SharedSAE]) -> str | None:
    """The card with these SAEs in its list; None when `old` needs no change or has no list of ours.

    >>> sae = SharedSAE(sae_id="l9", architecture="topk", d_in=8, d_sae=32, model="lab/small", hook=None)
    >>> print((updated_card(None, "lab/saes", [sae]) or "").partition("\\n---")[0])
    ---
    library_name: saelens
    tags:
    - sparse-autoencoder
    - sae-core
    base_model:
    - lab/small
    """
    saes = list(saes)
    if old is None:
        return _new_card(repository, saes)
    found = _LIST.search(old)
    if found is None:
        return None
    rows = {line.split("|")[1].strip(): line for line in found[1].splitlines() if line.startswith("| `")}
    rows |= {f"`{sae.sae_id}`": sae.row() for sae in saes}
    card = old[: found.start()] + _list(rows.values()) + old[found.end() :]
    return None if card == old else card


def _new_card(repository: str, saes: list[SharedSAE]) -> str:
    models = sorted({sae.model for sae in saes if sae.model and "/" in sae.model})
    base = ["base_model:", *(f"- {model}" for model in models)] if models else []
    first = saes[0].sae_id
    readable = [sae.sae_id for sae in saes if sae.for_sae_lens]
    packages = ["sae-core", "sae-pretrained", *sorted({sae.package for sae in saes} - {"sae-core", "local"})]
    return "\n".join(
        [
            "---",
            *(["library_name: saelens"] if readable else []),  # by this name the Hub offers a snippet
            "tags:",
            "- sparse-autoencoder",
            "- sae-core",
            *base,
            "---",
            "",
            f"# {repository.partition('/')[2]}",
            "",
            "Sparse autoencoders of language model activations. Each folder is one of them: `cfg.json` says what it is,",
            "`sae_weights.safetensors` holds its weights.",
            "",
            _list(sae.row() for sae in saes),
            "",
            f"With sae-core (`pip install {' '.join(packages)}`):",
            "",
            "```python",
            "from sae_core import SAE",
            "",
            f'sae = SAE.from_pretrained("{repository}", "{first}")',
            "```",
            "",
            *(_for_sae_lens(repository, readable[0]) if readable else []),
        ]
    )


def _for_sae_lens(repository: str, sae_id: str) -> list[str]:
    return [
        "With [SAELens](https://github.com/decoderesearch/SAELens) 6 or later:",
        "",
        "```python",
        "from sae_lens import SAE",
        "",
        f'sae = SAE.from_pretrained("{repository}", "{sae_id}")',
        "```",
        "",
    ]


def _list(rows: Iterable[str]) -> str:
    header = ["| id | architecture | d_in | d_sae | base model | hook point |", "|---|---|---|---|---|---|"]
    return "\n".join([_START, *header, *sorted(rows), _END])
