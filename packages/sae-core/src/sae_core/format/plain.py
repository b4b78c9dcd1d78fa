"""Metadata as JSON can hold them: what people put there, numpy numbers, paths and dtypes, in plain form.

JSON has no NaN and no infinity, and what writers put in their place is no JSON. Unknown numbers are null.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any, cast

from sae_core.errors import FormatError

__all__ = ["plain"]

_LONGEST = 100_000  # elements of an array that is metadata, and not a tensor gone astray


def plain(value: Any, where: str) -> Any:
    """`value` made of dicts, lists, text, numbers, truth values and None. Raises FormatError naming the key if it cannot be.

    >>> from pathlib import Path
    >>> plain({"l0": float("nan"), "path": Path("a/b"), "seeds": (1, 2)}, "metadata")
    {'l0': None, 'path': 'a/b', 'seeds': [1, 2]}
    >>> plain({"run": {"model": object()}}, "metadata")
    Traceback (most recent call last):
    sae_core.errors.FormatError: metadata.run.model is an object of type 'object', which cannot be written as JSON; store \
text or numbers instead
    """
    import numpy as np
    import torch

    if value is None or isinstance(value, bool | str):
        return value if not isinstance(value, enum.Enum) else plain(value.value, where)
    if isinstance(value, enum.Enum):
        return plain(value.value, where)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, np.generic):
        return plain(value.item(), where)
    if isinstance(value, Mapping):
        given = cast("Mapping[Any, Any]", value)
        if odd := [key for key in given if not isinstance(key, str)]:
            raise FormatError(f"{where} has the key {odd[0]!r}, which cannot be written as JSON; keys must be text")
        return {key: plain(item, f"{where}.{key}") for key, item in given.items()}
    if isinstance(value, list | tuple):
        return [plain(item, f"{where}[{i}]") for i, item in enumerate(cast("list[Any]", value))]
    if isinstance(value, set | frozenset):
        return sorted((plain(item, where) for item in cast("set[Any]", value)), key=repr)
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, torch.device):
        return str(value)
    if isinstance(value, torch.Tensor | np.ndarray):
        count = value.numel() if isinstance(value, torch.Tensor) else value.size
        if count <= _LONGEST:
            return plain(value.tolist(), where)
    kind = type(value).__name__
    raise FormatError(
        f"{where} is an object of type {kind!r}, which cannot be written as JSON; store text or numbers instead"
    )
