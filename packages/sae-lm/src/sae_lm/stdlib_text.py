"""The docstrings of Python's own standard library: text that is there without a download.

Nothing is imported: the sources are parsed.
"""

from __future__ import annotations

import ast
import sysconfig
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from sae_core.errors import DataError

__all__ = ["stdlib_docstrings"]


@cache
def stdlib_docstrings() -> tuple[str, ...]:
    """The docstrings of the running Python's standard library, joined to one document a module; about 1.6 MB.

    Modules come in the order of their paths, docstrings in that of the source, and a docstring met before is left out.
    Raises DataError where Python was installed without them.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    outside = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}
    seen: set[str] = set()
    modules: list[str] = []
    for path in sorted(root.rglob("*.py")):
        if outside.isdisjoint(path.relative_to(root).parts):
            fresh = [text for text in dict.fromkeys(_docstrings(path)) if text not in seen]
            seen.update(fresh)
            if fresh:
                modules.append("\n\n".join(fresh))
    if not modules:
        raise DataError(f"text: no Python sources under {str(root)!r}; use kind: file or kind: dataset")
    return tuple(modules)


def _docstrings(path: Path) -> Iterator[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about escapes in old sources
        try:
            tree = ast.parse(path.read_bytes())
        except SyntaxError:  # the library carries a few templates that are no Python
            return
    for node in _statements(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield text


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """The node and all statements in it, in the order of the source; expressions, most of the tree, hold no docstring."""
    yield node
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt | ast.excepthandler | ast.match_case):
            yield from _statements(child)
