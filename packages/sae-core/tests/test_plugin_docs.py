"""Writing an architecture stays short: the one in docs/plugins.md works, and so few lines are all it takes."""

from __future__ import annotations

import ast
import re
import sys
from importlib.resources import files
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from sae_core import ActivationBatch

PAGE = Path(__file__).parents[3] / "docs" / "plugins.md"
TEMPLATE = files("sae_core") / "templates" / "sae-plugin" / "{{ cookiecutter.distribution }}" / "src"
needs_docs = pytest.mark.skipif(not PAGE.exists(), reason="the package is tested without the repository's docs")


def code_lines(text: str) -> int:
    """Lines that hold code: no blank lines, comments or docstrings."""
    documents = [
        node.body[0]
        for node in ast.walk(ast.parse(text))
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None
    ]
    in_docstrings = {n for node in documents for n in range(node.lineno, (node.end_lineno or node.lineno) + 1)}
    lines = enumerate(text.splitlines(), start=1)
    return sum(1 for n, line in lines if line.strip() and not line.strip().startswith("#") and n not in in_docstrings)


def documented() -> str:
    (found,) = [
        b for b in re.findall(r"^```python\n(.*?)^```", PAGE.read_text("utf-8"), re.M | re.S) if "LinearSAE" in b
    ]
    return found


def rendered() -> str:
    text = (TEMPLATE / "{{ cookiecutter.package }}" / "architecture.py").read_text(encoding="utf-8")
    names = {"name": "cubic", "class_name": "CubicSAE", "config_name": "CubicConfig"}
    return re.sub(r"\{\{ cookiecutter\.(\w+) \}\}", lambda found: names[found[1]], text)


def test_the_architecture_of_the_template_is_at_most_forty_lines() -> None:
    assert 20 < code_lines(rendered()) <= 40


@needs_docs
def test_the_architecture_of_the_docs_is_at_most_forty_lines_and_is_every_shape(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert 20 < code_lines(documented()) <= 40
    module = ModuleType("documented_architecture")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec("from __future__ import annotations\n" + documented(), module.__dict__)
    made: Any = module.__dict__
    x, target = torch.randn(40, 6, generator=torch.Generator().manual_seed(0)), torch.zeros(40, 5)
    for fields in ({}, {"d_out": 5, "skip": True}, {"reads": {"a": 4, "b": 2}}):
        sae = made["ShrinkSAE"](made["ShrinkConfig"](d_in=6, d_sae=12, **fields))
        with torch.no_grad():
            sae.amount.fill_(0.01)
        sae.training_step(ActivationBatch(x, target if "d_out" in fields else None)).loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in sae.parameters())
        assert sae.amount.grad.norm() > 0
        before = sae(x)
        sae.fold_decoder_norm()
        torch.testing.assert_close(sae(x), before, rtol=1e-4, atol=1e-5)
