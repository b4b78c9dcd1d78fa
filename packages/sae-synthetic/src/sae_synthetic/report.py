"""A self-contained HTML page of tables and figures: plotly's own script is inside, so it opens without a network."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, final

from sae_core.format.write import write_atomically

from sae_synthetic.plots import require_plotly

if TYPE_CHECKING:
    import plotly.graph_objects as go

__all__ = ["Report"]

_STYLE = """
body { font-family: system-ui, sans-serif; max-width: 1100px; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; } th, td { padding: .3rem .8rem; text-align: right; }
th { border-bottom: 2px solid #888; } td { border-bottom: 1px solid #ddd; } th:first-child, td:first-child { text-align: left; }
p { line-height: 1.5; }
"""


@final
class Report:
    """Collects paragraphs, tables and figures, and writes them as one page."""

    def __init__(self, title: str) -> None:
        require_plotly()
        self._title = title
        self._parts: list[str] = []
        self._has_script = False

    def text(self, paragraph: str) -> None:
        """Add a paragraph."""
        self._parts.append(f"<p>{html.escape(paragraph)}</p>")

    def heading(self, title: str) -> None:
        """Start a section."""
        self._parts.append(f"<h2>{html.escape(title)}</h2>")

    def table(self, headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Add a table."""
        head = "".join(f"<th>{html.escape(name)}</th>" for name in headers)
        body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
        self._parts.append(f"<table><tr>{head}</tr>{body}</table>")

    def figure(self, figure: go.Figure) -> None:
        """Add a figure."""
        self._parts.append(figure.to_html(full_html=False, include_plotlyjs=not self._has_script))
        self._has_script = True

    def write(self, path: str | Path) -> Path:
        """Write the page; it appears complete or not at all. Returns its path."""
        path = Path(path)
        title = html.escape(self._title)
        page = (
            f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
            f"</head><body><h1>{title}</h1>{''.join(self._parts)}</body></html>"
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda file: _fill(file, page))
        return path


def _fill(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8")
