"""Every view, wide and narrow, light and dark: nothing is cut off, nothing moves, and pictures for the documentation.

    PICTURES_OF=runs/smollm2-l9 uv run pytest packages/sae-explorer/tests/test_pictures.py

writes docs/pictures/explorer-*.png anew, of that dictionary, which needs a study. Without the variable the views of the tests'
own tiny model are looked at and no picture is written.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parents[3] / "docs"
PICTURES = DOCS / "pictures"
OF = os.environ.get("PICTURES_OF")
SEARCH, TEXT = (
    ("return", "The function returns a list of open files.") if OF else ("river", "the cat sleeps and the river runs.")
)
SIZES = [(1280, False), (1280, True), (400, False), (400, True)]

# Of what is in cells that end in an ellipsis, only the cells.
BEYOND = (
    "[...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1 && "
    "e.checkVisibility() && !e.parentElement.closest('.line, td, th')).map(e => e.outerHTML.slice(0, 80))"
)
MOVED = (
    "new Promise(done => { let sum = 0; new PerformanceObserver(list => list.getEntries().forEach(e => sum += e.value))"
    ".observe({type: 'layout-shift', buffered: true}); setTimeout(() => done(sum), 100); })"
)


@pytest.fixture
def shoot() -> Callable[[Any, str], None]:
    """Looks at a page: nothing is wider than it; where pictures are asked for, keeps one."""

    def look(page: Any, name: str) -> None:
        assert page.evaluate(BEYOND) == []
        assert page.evaluate("document.documentElement.scrollWidth") <= page.viewport_size["width"]
        if OF is not None:
            from PIL import Image

            theme = "dark" if page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches") else "light"
            picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB").quantize(96, dither=Image.Dither.NONE)
            PICTURES.mkdir(exist_ok=True)
            path = PICTURES / f"explorer-{name}-{page.viewport_size['width']}-{theme}.png"
            picture.save(path, optimize=True)
            assert path.stat().st_size < 100_000

    return look


@pytest.mark.parametrize(("width", "dark"), SIZES)
def test_every_view_fits_and_stays_where_it_is(
    serve: Callable[..., str], world: Path, new_page: Callable[..., Any], shoot: Any, width: int, dark: bool
) -> None:
    from playwright.sync_api import expect

    page = new_page(serve(Path(OF) if OF else world / "one"), width=width, dark=dark)
    page.set_default_timeout(60_000)
    expect(page.locator("#rows .line").first).to_be_visible()
    shoot(page, "list")
    page.click("summary")
    expect(page.locator("#labelled")).to_be_visible()
    assert page.evaluate(BEYOND) == []
    page.click("summary")
    page.fill("#search", SEARCH)
    expect(page.locator("#sort")).to_have_value("match")
    expect(page.locator("#rows .line").first).to_contain_text(SEARCH)
    page.locator("#rows .line").first.click()
    expect(page.locator("#steer")).to_be_visible()
    assert page.evaluate(MOVED) < 0.02
    shoot(page, "latent")
    page.fill("#length", "24")
    page.locator("#steer").scroll_into_view_if_needed()
    page.click("#generate")
    expect(page.locator("#said")).to_have_text("done", timeout=120_000)
    page.locator("#steer h3").evaluate("title => title.scrollIntoView()")
    shoot(page, "steering")
    page.click("#tabs >> text=Text")
    page.fill("#text", TEXT)
    page.click("#run")
    expect(page.locator("#tokens .token").first).to_be_visible()
    shoot(page, "text")


def test_the_documentation_shows_every_picture_and_none_is_large() -> None:
    if not PICTURES.is_dir():
        pytest.skip("needs the repository")
    shown = (DOCS / "explorer.md").read_text(encoding="utf-8")
    pictures = sorted(PICTURES.glob("explorer-*.png"))
    assert len(pictures) == 4 * len(SIZES)
    for picture in pictures:
        assert f"pictures/{picture.name}" in shown
        assert picture.stat().st_size < 100_000
