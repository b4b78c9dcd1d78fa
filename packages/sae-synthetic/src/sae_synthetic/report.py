"""A self-contained page of tables and plotly figures: sae-core's page, with figures of this package's plots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, final

from sae_core.report.page import Page

from sae_synthetic.plots import require_plotly

if TYPE_CHECKING:
    import plotly.graph_objects as go

__all__ = ["Report"]


@final
class Report:
    """Collects paragraphs, tables and figures, and writes them as one page."""

    def __init__(self, title: str) -> None:
        require_plotly()
        self._page = Page(title)

    def text(self, paragraph: str) -> None:
        """Add a paragraph."""
        self._page.text(paragraph)

    def heading(self, title: str) -> None:
        """Start a section."""
        self._page.heading(title)

    def table(self, headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Add a table."""
        self._page.table(headers, rows)

    def figure(self, figure: go.Figure) -> None:
        """Add a figure."""
        self._page.figure(str(figure.to_json()))

    def write(self, path: str | Path) -> Path:
        """Write the page; it appears complete or not at all. Returns its path."""
        return self._page.write(path)
