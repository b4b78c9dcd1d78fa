"""Dashboards: everything is in them, nothing in them runs, and a browser shows them from the disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_core import create
from sae_core.cli import main
from sae_core.errors import ConfigError
from sae_explorer import NeuronpediaId, Studied, open_studied, write_dashboard, write_upload
from sae_explorer.dashboard import parse_latents
from sae_explorer.directions import logit_histograms, nearest, site_norms, unit_directions
from sae_explorer.index import INDEX_FILE, Query, search
from sae_lm.lens import Lens
from sae_lm.studies import StudyFolder


@pytest.fixture(scope="module")
def one(world: Path) -> Studied:
    return open_studied([str(world / "one")], device="cpu").studied[str(world / "one")]


def data_of(path: Path) -> Any:
    text = path.read_text(encoding="utf-8")
    return json.loads(text.partition(", ")[2].removesuffix(")"))


def test_what_is_shown_of_a_latent_is_what_study_and_decoder_say(one: Studied, world: Path) -> None:
    study, sae = StudyFolder(world / "one" / "study"), one.sae
    latent = int(study.latents["count"].argmax())
    found = one.latent(latent)
    assert found["count"] == int(study.latents["count"][latent])
    assert sum(found["histogram"]["counts"]) == found["count"]
    assert len(found["histogram"]["edges"]) == len(found["histogram"]["counts"]) + 1
    W = torch.nn.functional.normalize(sae.W_dec.detach(), dim=-1)
    cosines = (W @ W[latent]).index_fill(0, torch.tensor([latent]), -1)
    assert [n for n, _ in found["nearest"]] == cosines.topk(10).indices.tolist()
    assert found["nearest"][0][1] == pytest.approx(float(cosines.max()), abs=1e-3)
    assert found["promoted"][0][1] == pytest.approx(found["logits"]["high"], rel=1e-3)
    assert found["suppressed"][0][1] == pytest.approx(found["logits"]["low"], rel=1e-3)
    assert found["partners"][0][0] == study.partners(latent)[0][0]
    assert found["sites"] == {}
    assert found["neuronpedia"] == f"https://www.neuronpedia.org/tiny/1-res/{latent}"
    assert [e["band"] for e in found["examples"]] == [e.band for e in study.examples(latent)]
    with pytest.raises(ConfigError, match="there is no latent 96"):
        one.latent(96)


def test_histograms_of_logits_count_every_token_once() -> None:
    sae = create("standard", d_in=4, d_sae=6, seed=0)
    unembed = torch.randn(50, 4, generator=torch.Generator().manual_seed(1))
    lens = Lens(torch.ones(4), torch.zeros(4), False, unembed, None)
    counts, ends = logit_histograms(sae, lens, torch.arange(6), bins=7)
    logits = sae.W_dec.detach() @ unembed.T
    assert torch.allclose(ends, torch.stack([logits.amin(1), logits.amax(1)], 1), atol=1e-5)
    for latent in range(6):
        low, high = ends[latent].tolist()
        assert (counts[latent] - torch.histc(logits[latent], 7, low, high)).abs().sum() <= 2  # a token on an edge
    assert counts.sum(1).tolist() == [50] * 6


def test_the_sites_of_a_crosscoder_have_a_norm_each() -> None:
    sae = create("topk", d_in=6, d_sae=5, k=2, reads={"early": 2, "late": 4}, seed=0)
    norms = site_norms(sae, 3)
    one = torch.nn.functional.one_hot(torch.tensor([3]), 5).float()
    row = (sae.decode(one) - sae.decode(one * 0))[0].detach()  # in units of the latents as they are reported
    assert norms == {"early": pytest.approx(float(row[:2].norm())), "late": pytest.approx(float(row[2:].norm()))}
    assert unit_directions(sae).norm(dim=1).tolist() == pytest.approx([1.0] * 5)
    assert nearest(torch.eye(1), torch.tensor([0]), 3)[1].shape == (1, 0)


def test_a_folder_has_all_latents_and_a_file_the_few_that_were_asked_for(one: Studied, tmp_path: Path) -> None:
    page = write_dashboard(one, tmp_path / "all")
    blocks = [data_of(path) for path in sorted((page.parent / "data").glob("[0-9]*.js"))]
    assert sorted(int(n) for block in blocks for n in block) == list(range(96))
    assert data_of(page.parent / "data" / "index.js")["columns"]["latent"] == list(range(96))
    few = write_dashboard(one, tmp_path / "few.html", [3, 70])
    text = few.read_text(encoding="utf-8")
    assert few == tmp_path / "few.html"
    assert text.count("</script>") == 4  # the page's own and three receive(...): no token closes one
    assert "http-equiv" not in text
    assert "src=" not in text.replace("src=x", "").partition("const $")[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all", "few.html"]
    with pytest.raises(ConfigError, match="exists"):
        write_dashboard(one, tmp_path / "few.html", [3])


def test_a_dashboard_that_fails_leaves_nothing_behind(
    one: Studied, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(done: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_dashboard(one, tmp_path / "out", progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_said(
    one: Studied, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    given = ["dashboard", str(world / "one"), str(tmp_path / "file" / "out"), "--study", str(tmp_path / "study")]
    assert main([*given, "--device", "cpu"]) == 1
    assert f"cannot be written, for {tmp_path / 'file'} is no folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]  # no study was begun
    for write in (
        lambda: write_dashboard(one, "/proc/out", [3]),
        lambda: write_upload(one, "/proc/out", NeuronpediaId.parse("tiny/1-res"), [3]),
    ):
        with pytest.raises(ConfigError, match="/proc/out cannot be written: "):
            write()


def test_the_command_studies_what_was_not_studied(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = [
        "--study",
        str(tmp_path / "study"),
        "--device",
        "cpu",
        "--text",
        str(world / "text.txt"),
        "--tokens",
        "1e2",
    ]
    study += ["--set", "study.top=3", "--set", "context_size=16"]
    assert main(["dashboard", str(world / "one"), str(tmp_path / "out.html"), "--latents", "0-9", *study]) == 0
    said = capsys.readouterr().out
    assert "no study yet; studying 96 latents on 100 positions" in said
    assert f"open {(tmp_path / 'out.html').as_uri()}" in said
    assert StudyFolder(tmp_path / "study").index["study"]["top"] == 3
    assert main(["dashboard", str(world / "one"), str(tmp_path / "out.html")]) == 1
    assert "exists; name another" in capsys.readouterr().err
    assert main(["dashboard", str(world / "nowhere"), str(tmp_path / "b")]) == 1
    assert "it is not RELEASE:ID" in capsys.readouterr().err


def test_a_token_of_a_megabyte_is_shortened_wherever_it_is_shown(copied: Path, tmp_path: Path) -> None:
    path = copied / "study" / "tokens.json"
    tokens = json.loads(path.read_text(encoding="utf-8"))
    long = next(number for number, text in tokens.items() if len(text) > 1000)
    path.write_text(json.dumps({**tokens, long: "L" * 1_000_000}), encoding="utf-8")
    (copied / "study" / INDEX_FILE).unlink(missing_ok=True)
    studied = open_studied([str(copied)], device="cpu", with_model=False).studied[str(copied)]
    page = write_dashboard(studied, tmp_path / "out")
    sizes = [path.stat().st_size for path in page.parent.rglob("*.js")]
    assert any(
        "L" * 200 + "\\u2026" in path.read_text(encoding="utf-8") for path in (page.parent / "data").glob("*.js")
    )
    assert max(sizes) < 1_000_000
    assert studied.index.stat().st_size < 1_000_000


@pytest.mark.parametrize(
    ("given", "said"),
    [(["--latents", "90-99"], "90-99 is not within 0 to 95"), (["--latents", "x"], "is no number and no range")],
)
def test_what_cannot_be_written_is_said_before_the_study_is_made(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], given: list[str], said: str
) -> None:
    study = ["--study", str(tmp_path / "study"), "--device", "cpu"]
    assert main(["dashboard", str(world / "one"), str(tmp_path / "out.html"), *given, *study]) == 1
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_too_many_latents_for_one_file_are_refused_before_the_study_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    create("topk", d_in=4, d_sae=501, k=2).save(tmp_path / "wide")
    assert main(["dashboard", str(tmp_path / "wide"), str(tmp_path / "out.html"), "--device", "cpu"]) == 1
    assert "501 latents are too many for one file" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "x", "5-3", "96", "1,,2", "-1"])
def test_latents_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--latents"):
        parse_latents(text, 96)


def test_a_search_on_the_disk_shows_what_fires_on_the_word_first(
    copied: Path, tmp_path: Path, new_page: Callable[..., Any]
) -> None:
    from playwright.sync_api import expect

    studied = open_studied([str(copied)], device="cpu", with_model=False).studied[str(copied)]
    _, rows = search(studied.index, Query(sort="latent", descending=False, limit=96))
    fires = {row["latent"] for row in rows if "river" in row["tokens"].split()}
    other = next(row["latent"] for row in rows if "river" not in row["tokens"] + row["promotes"])
    studied.labels.put(other, "a river bank", "")
    page = new_page(write_dashboard(studied, tmp_path / "out").as_uri())
    expect(page.locator("#total")).to_have_text("96 latents")
    page.fill("#search", "river")
    expect(page.locator("#sort")).to_have_value("match")
    expect(page.locator("#rows .line").first).to_have_attribute("data-latent", str(other))
    shown = [int(line.get_attribute("data-latent")) for line in page.locator("#rows .line").all()]
    assert set(shown[1 : 1 + len(fires)]) == fires
    page.evaluate("location.hash = '#/latent/99999'")
    expect(page.locator("#detail .error")).to_have_text("latent 99999 is not in this dashboard")


def test_a_browser_shows_a_dashboard_from_the_disk(one: Studied, tmp_path: Path, new_page: Callable[..., Any]) -> None:
    from playwright.sync_api import expect

    page = new_page(write_dashboard(one, tmp_path / "out").as_uri())
    expect(page.locator("#total")).to_have_text("96 latents")
    page.keyboard.press("/")
    page.keyboard.type("hacked")
    expect(page.locator("#total")).not_to_have_text("96 latents")
    page.locator("#rows .line").first.click()
    expect(page.locator("#detail h2")).to_contain_text("Latent ")
    first = page.locator("#detail h2").inner_text()
    page.keyboard.press("j")
    expect(page.locator("#detail h2")).not_to_have_text(first)
    assert page.locator("#detail .example").count() >= 16
    assert page.locator("#detail svg").count() == 2
    assert page.locator("#detail script, #detail img").count() == 0
    assert "⟨200b⟩" in page.locator("#rows").inner_text() + page.locator("#detail").inner_text()
    page.locator("#detail .card:has-text('Writes alike') a").first.click()
    expect(page.locator("#detail h2")).not_to_have_text(first)
    assert page.title() == one.name  # no token's script ran
    small = new_page(write_dashboard(one, tmp_path / "few.html", [3, 70]).as_uri(), width=400, dark=True)
    small.locator("#rows .line").last.click()
    expect(small.locator("#detail h2")).to_be_visible()
    assert small.evaluate("document.documentElement.scrollWidth") <= 400
    small.locator(".back").click()
    expect(small.locator("#rows")).to_be_visible()
