"""Writing an architecture stays short: the one in docs/plugins.md works, and so few lines are all it takes."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from sae_core import ActivationBatch
from sae_core.cli.new_plugin import render, variables_for
from sae_core.plugins import reset_registry

PAGE = Path(__file__).parents[3] / "docs" / "plugins.md"
EXAMPLE = Path(__file__).parents[3] / "examples" / "new_activation.py"
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


def test_the_architecture_that_new_plugin_writes_is_at_most_forty_lines(tmp_path: Path) -> None:
    project = render(tmp_path, variables_for("cubic"))
    text = (project / "src" / "sae_cubic" / "architecture.py").read_text(encoding="utf-8")
    assert 20 < code_lines(text) <= 40


@needs_docs
def test_the_architecture_among_the_examples_is_at_most_forty_lines() -> None:
    text = EXAMPLE.read_text(encoding="utf-8").partition("# -- in use")[0]
    assert "LinearSAE" in text
    assert 20 < code_lines(text) <= 40


@needs_docs
def test_the_example_runs_from_top_to_bottom(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = ModuleType("new_activation")
    monkeypatch.setitem(sys.modules, "new_activation", module)
    module.__dict__["__name__"] = "new_activation"
    try:
        exec(compile(EXAMPLE.read_text(encoding="utf-8"), str(EXAMPLE), "exec"), module.__dict__)
        module.__dict__["main"]()
    finally:
        reset_registry()
    said = capsys.readouterr().out
    assert re.search(r"explained variance 0\.[5-9]\d", said)
    assert "0 checks failed" in said


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
