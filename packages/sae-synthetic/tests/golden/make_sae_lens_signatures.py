"""Write the public names of SAELens' synthetic package, and how each is called, to `signatures.json`.

Run with the Python of an environment that holds SAELens, in this folder:

    python make_sae_lens_signatures.py

Per name of ``sae_lens.synthetic.__all__``: `kind` (class, function, alias or constant), `parameters` with their defaults
(``"required"``, ``[default]`` where JSON can hold it, else ``"other"``), and of classes `members`, public methods and
properties that they define themselves. Names that SAELens exports beside the list are taken too. `architectures` are the names
of its classes of SAEs.
"""

from __future__ import annotations

import inspect
import json
import warnings
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

warnings.simplefilter("ignore")

from sae_lens import synthetic  # noqa: E402 - its import is what the filter above silences
from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY  # noqa: E402


def parameters(thing: object) -> dict[str, object]:
    """Names and defaults of what can be passed."""
    found: dict[str, object] = {}
    for p in inspect.signature(thing).parameters.values():  # type: ignore[arg-type]
        if p.name in ("self", "cls"):
            continue
        if p.default is p.empty:
            found[p.name] = "required"
        else:
            found[p.name] = [p.default] if isinstance(p.default, bool | int | float | str | None) else "other"
    return found


def members(cls: type) -> dict[str, object]:
    """Public methods and properties that SAELens defines in the class or in one of its own bases."""
    found: dict[str, object] = {}
    own = [base for base in cls.__mro__ if base.__module__.startswith("sae_lens")]
    for base in reversed(own):
        for name, value in vars(base).items():
            if name.startswith("_"):
                continue
            if isinstance(value, property):
                found[name] = "property"
            elif isinstance(value, classmethod | staticmethod) or inspect.isfunction(value):
                found[name] = parameters(getattr(cls, name))
    return dict(sorted(found.items()))


def describe(thing: object) -> dict[str, object]:
    """What the name stands for."""
    if isinstance(thing, bool | int | float | str):
        return {"kind": "constant", "value": thing}
    if inspect.isclass(thing):
        return {"kind": "class", "parameters": parameters(thing), "members": members(thing)}
    if inspect.isfunction(thing):
        return {"kind": "function", "parameters": parameters(thing)}
    return {"kind": "alias"}


public = {
    name for name, value in vars(synthetic).items() if not name.startswith("_") and not isinstance(value, ModuleType)
}
names = sorted({*synthetic.__all__, *public})
registries = (SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY)
table = {
    "sae_lens": version("sae-lens"),
    "architectures": sorted({classes[0].__name__ for registry in registries for classes in registry.values()}),
    "names": {name: describe(getattr(synthetic, name)) for name in names},
}
(Path(__file__).parent / "signatures.json").write_text(json.dumps(table, indent=1) + "\n")
