"""For the documentation's API pages: examples in docstrings are code, not prose that Markdown may read as links."""

from __future__ import annotations

import re
from typing import Any

import griffe

__all__ = ["Doctests"]

_EXAMPLE = re.compile(r"(?:^>>> .*\n?(?:^(?!>>> )\S.*\n?|^\.\.\. ?.*\n?|^ .*\n?)*)+", re.MULTILINE)


class Doctests(griffe.Extension):
    """Puts every run of ``>>>`` lines with what they print into a fenced block."""

    def on_object(self, *, obj: griffe.Object, **_others: Any) -> None:
        """Called for each module, class and function."""
        if obj.docstring is not None and ">>> " in obj.docstring.value:
            obj.docstring.value = _EXAMPLE.sub(lambda m: f"```pycon\n{m[0].rstrip()}\n```\n", obj.docstring.value)
