"""A page of text, tables and figures in one file that opens without a network.

A figure is plain data, the ``data`` and ``layout`` that plotly.js draws, so nothing of plotly's Python is imported: what is
taken from an installed plotly is its script, once a page. plotly's own figures come in by their ``to_json()``.
"""

from __future__ import annotations

import html
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, final

from sae_core.errors import FormatError, MissingDependencyError
from sae_core.format.write import write_atomically

__all__ = ["Page", "plotly_script"]

_STYLE = """
body { font-family: system-ui, sans-serif; max-width: 1100px; margin: 2rem auto; padding: 0 1rem; color: #222; }
body { line-height: 1.5; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .25rem .8rem; text-align: right; border-bottom: 1px solid #ddd; vertical-align: top; }
th { border-bottom: 2px solid #888; }
th:first-child, td:first-child { text-align: left; }
pre { background: #f5f5f5; padding: 1rem; overflow-x: auto; font-size: .85rem; line-height: 1.35; }
summary { cursor: pointer; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(460px, 1fr)); gap: .5rem 1rem; }
.figure { min-width: 0; }
.found { border-left: 4px solid #d9822b; padding-left: .8rem; }
"""


def plotly_script() -> str:
    """The script plotly.js of the installed plotly. Raises MissingDependencyError that says how to get it."""
    how = "the figures of a report are drawn by plotly's script: pip install 'sae-core[report]'"
    try:
        found = importlib.metadata.distribution("plotly").locate_file("plotly/package_data/plotly.min.js")
        return Path(str(found)).read_text(encoding="utf-8")
    except (importlib.metadata.PackageNotFoundError, FileNotFoundError):
        raise MissingDependencyError(how) from None
    except OSError as error:
        raise FormatError(f"plotly's script cannot be read: {error}") from None


@final
class Page:
    """Collects parts, and writes them as one page. Raises MissingDependencyError at once where figures cannot be drawn.

    >>> page = Page("Numbers")
    >>> page.table(["name", "value"], [["L0", "32"]])
    >>> page.figure({"data": [{"y": [1, 2]}], "layout": {}})
    >>> "<td>32</td>" in page.html(), page.html().count("Plotly.newPlot")
    (True, 1)
    """

    def __init__(self, title: str) -> None:
        self._script = plotly_script()
        self._title = title
        self._parts: list[str] = []
        self._drawings: list[str] = []  # after everything else: a figure's size depends on what stands beside it

    def heading(self, title: str) -> None:
        """Start a section."""
        self._parts.append(f"<h2>{html.escape(title)}</h2>")

    def text(self, paragraph: str, *, finding: bool = False) -> None:
        """Add a paragraph; a finding stands out."""
        self._parts.append(f"<p{' class=found' if finding else ''}>{html.escape(paragraph)}</p>")

    def table(
        self, headers: Sequence[str], rows: Sequence[Sequence[str]], links: Mapping[str, str] | None = None
    ) -> None:
        """Add a table; first cells that are in `links` lead there."""
        head = "".join(f"<th>{html.escape(name)}</th>" for name in headers)
        body = "".join(f"<tr>{''.join(_cells(row, links or {}))}</tr>" for row in rows)
        self._parts.append(f"<table><tr>{head}</tr>{body}</table>")

    def folded(self, summary: str, content: str) -> None:
        """Add text as it is, say a file, that a click unfolds."""
        self._parts.append(
            f"<details><summary>{html.escape(summary)}</summary><pre>{html.escape(content)}</pre></details>"
        )

    def figure(self, figure: Mapping[str, Any] | str) -> None:
        """Add a figure in full width: ``data`` and ``layout`` of plotly.js, or the JSON of them."""
        self._parts.append(self._drawn(figure))

    def figures(self, figures: Sequence[Mapping[str, Any]]) -> None:
        """Add figures side by side, as many as there is room for."""
        self._parts.append(f'<div class="figures">{"".join(map(self._drawn, figures))}</div>')

    def html(self) -> str:
        """The page."""
        title = html.escape(self._title)
        return (
            f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
            f"<script>{self._script}</script></head><body><h1>{title}</h1>{''.join(self._parts)}"
            f"<script>{''.join(self._drawings)}</script></body></html>\n"
        )

    def write(self, path: str | Path) -> Path:
        """Write the page; it appears complete or not at all. Returns its path."""
        path, page = Path(path), self.html()
        path.parent.mkdir(parents=True, exist_ok=True)

        def fill(file: Path) -> None:
            file.write_text(page, encoding="utf-8")

        write_atomically(path, fill)
        return path

    def _drawn(self, figure: Mapping[str, Any] | str) -> str:
        content = json.loads(figure) if isinstance(figure, str) else figure
        layout = content.get("layout", {})
        height = layout.get("height", 320)
        name = f"figure-{len(self._drawings) + 1}"
        # "</" would end the script early wherever it stood in a text
        given = ", ".join(_json(part).replace("</", "<\\/") for part in (content["data"], layout))
        settings = '{"responsive": true, "displayModeBar": false}'  # the bar would lie over titles
        self._drawings.append(f'Plotly.newPlot("{name}", {given}, {settings});\n')
        return f'<div class="figure" id="{name}" style="height: {height}px"></div>'


def _cells(row: Sequence[str], links: Mapping[str, str]) -> list[str]:
    cells = [html.escape(cell) for cell in row]
    if row[0] in links:
        cells[0] = f'<a href="{html.escape(links[row[0]])}">{cells[0]}</a>'
    return [f"<td>{cell}</td>" for cell in cells]


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)
