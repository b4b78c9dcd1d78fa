"""Dashboards: the page of a dictionary as files that need neither a server nor a network.

A folder holds the page, an index of all its latents, and their details in blocks that the page loads when one is looked at, by
script tags, since a page opened from a disk may not fetch. For few latents all of it fits into one file.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from sae_core.config import require
from sae_core.durable import sync_folder, umask, unique_folder
from sae_core.errors import ConfigError

from sae_explorer.index import COLUMNS, Query, search
from sae_explorer.reading import Studied

__all__ = [
    "MOST_IN_ONE_FILE",
    "PAGE_FILES",
    "begun",
    "linked_page",
    "page_file",
    "parse_latents",
    "require_room",
    "write_dashboard",
]

MOST_IN_ONE_FILE = 500
SCRIPTS = ("dom.js", "data.js", "list.js", "latent.js", "live.js", "start.js")
"""The page's scripts in the order in which they are loaded; what one declares the next ones see."""
_STYLE = "app.css"
PAGE_FILES = (*SCRIPTS, _STYLE)
_BLOCK = 32


def page_file(name: str) -> str:
    """One of the page's own files."""
    return (files("sae_explorer") / "page" / name).read_text(encoding="utf-8")


def parse_latents(text: str, d_sae: int) -> list[int]:
    """Latents written as numbers and ranges, both ends included. Raises ConfigError for what is none.

    >>> parse_latents("3, 7-9", 16)
    [3, 7, 8, 9]
    """
    found: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:\s*-\s*(\d+))?\s*", part)
        require(match is not None, f"--latents: {part.strip()!r} is no number and no range such as 7-9")
        assert match is not None
        first, last = int(match[1]), int(match[2] or match[1])
        require(first <= last < d_sae, f"--latents: {part.strip()} is not within 0 to {d_sae - 1}")
        found |= set(range(first, last + 1))
    return sorted(found)


def require_room(out: str | Path, latents: Sequence[int]) -> None:
    """Raise ConfigError where a dashboard of these latents cannot be written, before work is put into it."""
    out = Path(out)
    require(not out.exists(), f"dashboard: {out} exists; name another, or remove it")
    above = next(path for path in out.absolute().parents if path.exists())
    require(above.is_dir(), f"dashboard: {out} cannot be written, for {above} is no folder")
    require(bool(latents), "dashboard: there is no latent to show")
    require(
        out.suffix != ".html" or len(latents) <= MOST_IN_ONE_FILE,
        f"dashboard: {len(latents):,} latents are too many for one file; name a folder, or {MOST_IN_ONE_FILE} --latents",
    )


def write_dashboard(
    studied: Studied,
    out: str | Path,
    latents: Sequence[int] | None = None,
    *,
    progress: Callable[[int], object] | None = None,
) -> Path:
    """Write a dashboard of some latents, None for all, and return the page to open.

    An `out` that ends in .html becomes one file, for at most 500 latents; another one becomes a folder. It appears complete or
    not at all. `progress` is called with the number of latents done. Raises ConfigError when `out` exists.
    """
    out = Path(out)
    chosen = list(range(studied.sae.d_sae)) if latents is None else sorted(set(latents))
    require_room(out, chosen)
    one_file = out.suffix == ".html"
    folder = begun(out)
    try:
        page = folder / "index.html"
        scripts = [f"receive('index', {_script(_index(studied, chosen))})"]
        blocks = _blocks(studied, chosen, progress)
        if one_file:
            scripts += [f"receive({number}, {content})" for number, content in blocks]
            own = "\n".join(page_file(name) for name in SCRIPTS)
            page.write_text(_whole_page(f"<style>{page_file(_STYLE)}</style>", [own, *scripts]), "utf-8")
            page.chmod(0o666 & ~umask())
            page.replace(out)
            shutil.rmtree(folder)
            return out
        (folder / "data").mkdir()
        for number, content in blocks:
            (folder / "data" / f"{number}.js").write_text(f"receive({number}, {content})", "utf-8")
        (folder / "data" / "index.js").write_text(scripts[0], "utf-8")
        for name in PAGE_FILES:
            (folder / name).write_text(page_file(name), "utf-8")
        page.write_text(linked_page("", [*SCRIPTS, "data/index.js"]), "utf-8")
        sync_folder(folder)
        folder.rename(out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return out / "index.html"


def begun(out: Path) -> Path:
    """A new folder beside `out`, in which it grows. Raises ConfigError where none can be made."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        return unique_folder(out)
    except OSError as error:
        raise ConfigError(f"dashboard: {out} cannot be written: {error.strerror}; name another place") from None


def _whole_page(head: str, scripts: Sequence[str]) -> str:
    """The page with its scripts in it; `head` has the style."""
    return _filled(head, [f"<script>{text}</script>" for text in scripts])


def linked_page(head: str, scripts: Sequence[str] = SCRIPTS) -> str:
    """The page that loads its style and scripts from beside it."""
    style = f'<link rel="stylesheet" href="{_STYLE}">'
    return _filled(head + style, [f'<script src="{name}"></script>' for name in scripts])


def _filled(head: str, tags: Sequence[str]) -> str:
    return page_file("app.html").replace("<!--STYLE-->", head).replace("<!--SCRIPTS-->", "\n".join(tags))


def _index(studied: Studied, chosen: Sequence[int]) -> dict[str, Any]:
    wanted = set(chosen)
    columns: dict[str, list[Any]] = {name: [] for name in COLUMNS}
    for start in range(0, studied.sae.d_sae, 1000):
        _, rows = search(
            studied.index, Query(sort="latent", descending=False, offset=start, limit=1000), studied.labels_path
        )
        for row in rows:
            if row["latent"] in wanted:
                for name in COLUMNS:
                    value = row[name]
                    columns[name].append(float(f"{value:.4g}") if isinstance(value, float) else value)
    return {"facts": studied.facts(), "columns": columns, "block": _BLOCK}


def _blocks(
    studied: Studied, chosen: Sequence[int], progress: Callable[[int], object] | None
) -> Iterator[tuple[int, str]]:
    """Details of the latents, by the number of their block."""
    by_block: dict[int, list[int]] = {}
    for latent in chosen:
        by_block.setdefault(latent // _BLOCK, []).append(latent)
    done = 0
    for number, latents in by_block.items():
        yield number, _script({str(one["latent"]): one for one in studied.latents(latents)})
        done += len(latents)
        if progress is not None:
            progress(done)


def _script(value: Any) -> str:
    """JSON that may stand in a script element: nothing in it ends the element or opens a comment."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
