"""The explorer as people use it: clicked and typed in a real browser, against a real server."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sae_core.cli import main
from sae_explorer.playing import Model

pytestmark = pytest.mark.slow

HOSTILE = "<img src=x onerror=document.title='hacked'> שלום\u202e 👩‍👩‍👧 \u200b'; DROP TABLE labels"


def test_a_latent_is_found_labelled_and_steered(
    serve: Callable[..., str], copied: Path, new_page: Callable[..., Any]
) -> None:
    from playwright.sync_api import expect

    address = serve(copied)
    page = new_page(address)
    expect(page.locator("#total")).to_have_text("96 latents")  # from then on the page listens
    page.keyboard.press("/")
    expect(page.locator("#search")).to_be_focused()
    page.keyboard.type("river")
    expect(page.locator("#sort")).to_have_value("match")
    expect(page.locator("#total")).not_to_have_text("96 latents")
    first = page.locator("#rows .line").first
    expect(first).to_contain_text("river")
    first.click()
    expect(page.locator("#detail .example").first).to_be_visible()
    assert "river" in page.locator("#detail .card:has-text('Fires most strongly on')").inner_text()
    latent = int(page.locator("#detail h2").inner_text().removeprefix("Latent "))

    page.fill("#label", HOSTILE)
    page.fill("#note", "a note")
    page.locator("#label").focus()
    expect(page.locator("#detail form").first).to_contain_text("saved")
    page.fill("#prompt", "the cat <script>document.title='hacked'</script>")
    page.fill("#amount", "60")
    page.fill("#length", "6")
    page.click("#generate")
    expect(page.locator("#said")).to_have_text("done")
    assert page.locator("#plain").inner_text() != page.locator("#edited").inner_text()
    assert "<script>" in page.locator("#plain").inner_text()
    page.fill("#prompt", "")
    page.click("#generate")
    expect(page.locator("#said")).to_have_text("the text is empty")

    other = new_page(address, width=400, dark=True)  # a second browser sees what the first one wrote
    other.fill("#search", "DROP TABLE labels")
    expect(other.locator("#rows .line b")).to_contain_text("<img src=x")
    other.fill("#search", "a note")
    expect(other.locator("#total")).to_have_text("1 latent")
    other.locator(f"#rows .line[data-latent='{latent}']").click()
    expect(other.locator("#label")).to_have_value(HOSTILE)
    with other.expect_download() as download:
        other.click("text=export all as JSON")
    exported = json.loads(Path(download.value.path()).read_text(encoding="utf-8"))
    assert [(one["latent"], one["label"], one["note"]) for one in exported["labels"]] == [(latent, HOSTILE, "a note")]
    assert page.title() == other.title() == str(copied)  # no text ran


def test_the_stop_button_stops(
    serve: Callable[..., str], copied: Path, new_page: Callable[..., Any], monkeypatch: Any
) -> None:
    from playwright.sync_api import expect

    taken: list[int] = []
    step = Model._step  # pyright: ignore[reportPrivateUsage]

    def slow(self: Model, *given: Any) -> Any:
        taken.append(1)
        time.sleep(0.05)
        return step(self, *given)

    monkeypatch.setattr(Model, "_step", slow)
    page = new_page(serve(copied) + "#/latent/5")
    page.fill("#length", "200")
    page.fill("#prompt", "the cat")
    page.click("#generate")
    expect(page.locator("#edited")).not_to_have_text("the cat")
    page.click("#stop")
    expect(page.locator("#said")).to_have_text("stopped")
    expect(page.locator("#generate")).to_be_enabled()
    time.sleep(0.3)
    after = len(taken)
    time.sleep(0.3)
    assert len(taken) == after < 150


def test_a_text_shows_its_latents_and_dictionaries_are_compared(
    serve: Callable[..., str], copied: Path, world: Path, new_page: Callable[..., Any]
) -> None:
    from playwright.sync_api import expect

    second = shutil.copytree(world / "two", copied.with_name("two"))
    page = new_page(serve(copied, second))
    page.click("#tabs >> text=Text")
    page.fill("#text", "the cat sleeps. <script>document.title='hacked'</script> שלום")
    page.click("#run")
    tokens = page.locator("#tokens .token")
    expect(tokens.first).to_be_visible()
    assert [text for text in tokens.all_inner_texts() if "script" in text] == [
        "<script>document.title='hacked'</script>"
    ]
    page.locator("#by").select_option("effect")
    rows = page.locator("#detail tbody tr")
    effects = [abs(float(text)) for text in page.locator("#detail tbody td:nth-child(4)").all_inner_texts()]
    assert effects == sorted(effects, reverse=True)
    everywhere = rows.count()
    tokens.nth(2).click()
    expect(page.locator("#detail h3").last).to_have_text("Latents on token 3 (4)")
    assert rows.count() == 4 < everywhere
    latent = rows.first.locator("a").inner_text()
    rows.first.locator("a").click()
    expect(page.locator("#detail h2")).to_have_text(f"Latent {latent}")
    page.click("#tabs >> text=Compare")
    page.click("#compare")
    expect(page.locator("#detail")).to_contain_text("Only in the second")
    page.locator("#dictionary").select_option(str(second))
    expect(page.locator("#name")).to_have_text(str(second))


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (400, True)])
def test_nothing_is_cut_off_or_moves(
    serve: Callable[..., str], copied: Path, new_page: Callable[..., Any], width: int, dark: bool
) -> None:
    from playwright.sync_api import expect

    page = new_page(serve(copied), width=width, dark=dark)
    expect(page.locator("#rows .line").first).to_be_visible()
    moved = (
        "new Promise(done => { let sum = 0; new PerformanceObserver(list => list.getEntries().forEach(e => sum += e.value))"
        ".observe({type: 'layout-shift', buffered: true}); setTimeout(() => done(sum), 100); })"
    )
    assert page.evaluate(moved) < 0.02
    page.locator("#rows .line").nth(1).click()
    expect(page.locator("#steer")).to_be_visible()
    wide = (
        "[...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1)"
        ".map(e => e.outerHTML.slice(0, 80))"
    )
    assert page.evaluate(wide) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_what_the_command_serves_leaves_every_label_behind_when_it_is_killed(
    serve: Callable[..., str],
    copied: Path,
    new_page: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import httpx
    import uvicorn
    from playwright.sync_api import expect

    servers: list[uvicorn.Server] = []
    run = uvicorn.Server.run
    monkeypatch.setattr(uvicorn.Server, "run", lambda self, **given: servers.append(self) or run(self, **given))
    ended: list[int] = []
    command = threading.Thread(target=lambda: ended.append(main(["explore", str(copied), "--device", "cpu"])))
    command.start()
    try:
        while command.is_alive() and not (servers and servers[0].started):
            time.sleep(0.01)
        address = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("open ")).split()[1]
        origin = address.rsplit("/", 2)[0]
        body = {"dictionary": str(copied), "latent": 9, "label": "kept", "note": ""}
        sent = {"json": body, "headers": {"origin": origin}, "timeout": 20}
        assert httpx.post(f"{address}api/label", **sent).status_code == 200
        left = shutil.copytree(
            copied, copied.with_name("left")
        )  # the files as a process that is killed now leaves them
        assert httpx.post(f"{origin}/api/label", **sent).status_code == 403
    finally:
        for server in servers:
            server.should_exit = True
        command.join(20)
    assert ended == [0]
    page = new_page(serve(left) + "#/latent/9")
    expect(page.locator("#label")).to_have_value("kept")
