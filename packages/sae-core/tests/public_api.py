"""The public names of sae-core with their signatures, as text: what plugins may rely on.

    uv run python packages/sae-core/tests/public_api.py

writes `public_api.txt` anew. `test_public_api.py` compares, so that no name and no argument changes unnoticed.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TEXT = Path(__file__).with_name("public_api.txt")
MODULES = (
    "sae_core",
    "sae_core.plugins",
    "sae_core.protocols",
    "sae_core.dictionary",
    "sae_core.sae",
    "sae_core.codes",
    "sae_core.config",
    "sae_core.errors",
    "sae_core.sites",
    "sae_core.metrics",
    "sae_core.testing",
    "sae_core.architectures.linear",
    "sae_core.architectures.parts",
    "sae_core.data.shuffle",
    "sae_core.format.convert",
    "sae_core.format.files",
    "sae_core.format.read",
    "sae_core.pretrained",
    "sae_core.training.config",
    "sae_core.training.trainer",
)


def described() -> str:
    """One line a name."""
    return "\n".join(line for module in MODULES for line in _module(module)) + "\n"


def _module(name: str) -> Iterator[str]:
    module = importlib.import_module(name)
    for attribute in sorted(module.__all__):
        yield from _member(f"{name}.{attribute}", getattr(module, attribute))


def _member(name: str, value: Any) -> Iterator[str]:
    if isinstance(value, type):
        bases = ", ".join(base.__name__ for base in value.__bases__ if base is not object)
        yield f"class {name}({bases})"
        if dataclasses.is_dataclass(value):
            yield from (
                f"    {field.name}: {_plain(str(field.type))}"
                for field in dataclasses.fields(value)
                if field.name[0] != "_"
            )
        for own in sorted(vars(value)):
            if not own.startswith("_") or own == "__init__":
                yield from _of_class(own, vars(value)[own], dataclass=dataclasses.is_dataclass(value))
    elif callable(value):
        yield f"def {name}{_signature(value)}"
    else:
        yield f"{name}: {_plain(type(value).__name__)}"


def _of_class(name: str, value: Any, *, dataclass: bool) -> Iterator[str]:
    if isinstance(value, (staticmethod, classmethod)):
        value = value.__func__
    if isinstance(value, property):
        yield f"    {name} (property)"
    elif inspect.isfunction(value) and not (name == "__init__" and dataclass):
        yield f"    def {name}{_signature(value)}"


def _signature(value: Any) -> str:
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):
        return "(...)"
    return _plain(str(signature))


def _plain(text: str) -> str:
    """Without what differs from one Python to the next: quotation marks of annotations, addresses, module paths."""
    text = re.sub(r" at 0x[0-9a-f]+", "", text)
    text = re.sub(r"(?<![\w.])(?:[a-z_]+\.)+([A-Za-z_]\w*)", r"\1", text)
    return re.sub("['\"]", "", text)


if __name__ == "__main__":
    TEXT.write_text(described(), encoding="utf-8")
    sys.stdout.write(f"wrote {TEXT}\n")
