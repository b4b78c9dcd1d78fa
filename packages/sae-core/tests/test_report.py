"""Reports of runs: what they say, and that a browser shows all of it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from sae_core import create
from sae_core.cli import main
from sae_core.errors import MissingDependencyError
from sae_core.report import page as report_page
from sae_core.report.figures import curves, histogram, points
from sae_core.report.page import Page
from sae_core.report.training import write_comparison_report, write_report
from sae_core.run import execute_all, read_run
from sae_core.training.trainer import TrainResult
from safetensors.torch import save_file

ROWS = torch.randn(1500, 8, generator=torch.Generator().manual_seed(0)).relu()
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
LOOKED_AT = """
<script>addEventListener("load", () => setTimeout(() => {
  const seen = [...document.querySelectorAll(".figure")].map(figure => {
    const box = figure.getBoundingClientRect(), texts = [...figure.querySelectorAll("svg text")];
    const outside = texts.filter(text => {
      const at = text.getBoundingClientRect();
      const sideways = at.left < box.left - 1 || at.right > box.right + 1;
      return at.width && (sideways || at.top < box.top - 1 || at.bottom > box.bottom + 1);
    });
    return {texts: texts.map(text => text.textContent), outside: outside.map(text => text.textContent),
            marks: figure.querySelectorAll(".scatterlayer path, .barlayer path, .heatmaplayer image").length};
  });
  document.body.innerHTML = "<pre id=seen></pre>";
  document.getElementById("seen").textContent = JSON.stringify(seen);
}, 0))</script>
"""


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    save_file({"activations": ROWS}, tmp_path / "rows.safetensors")
    run = {
        "output": str(tmp_path / "out"),
        "sae": {"architecture": "standard", "d_sae": 16, "l1_coefficient": 0.1},
        "source": {"name": "tensor_files", "paths": [str(tmp_path / "rows.safetensors")], "epochs": 4},
        "train": {
            "total_samples": 4000, "batch_size": 40, "log_every_steps": 5, "dead_after_samples": 400, "progress_bar": False,
        },
    }  # fmt: skip
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(run))
    return path


def figures_of(page: str) -> list[dict[str, Any]]:
    """The figures of a page, as it gives them to plotly."""
    decoder = json.JSONDecoder()
    found: list[dict[str, Any]] = []
    for call in re.finditer(r'Plotly\.newPlot\("figure-\d+", ', page):
        data, end = decoder.raw_decode(page, call.end())
        layout, _ = decoder.raw_decode(page, end + 2)
        found.append({"data": data, "layout": layout})
    return found


def seen_by_a_browser(path: Path) -> list[dict[str, Any]]:
    """What every figure shows in Chromium: its texts, those of them that are cut off, the number of marks."""
    looked_at = path.with_name(f"looked-at-{path.name}")
    looked_at.write_text(path.read_text().replace("</body>", f"{LOOKED_AT}</body>"))
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1200,900", "--virtual-time-budget=10000",
        f"--user-data-dir={path.parent / 'browser'}", "--dump-dom", looked_at.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found is not None, done.stdout[-2000:]
    return json.loads(found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))


def title(figure: dict[str, Any]) -> str:
    return figure["layout"]["title"]["text"]


def test_a_report_says_what_was_reached_and_its_curves_end_there(run_file: Path, tmp_path: Path) -> None:
    (result,) = execute_all(read_run(run_file)).values()
    page = (tmp_path / "out" / "report.html").read_text()
    last = result.history[-1]
    assert f"<td>L0</td><td>{last['l0']:.2f}</td>" in page
    assert f"<td>explained variance</td><td>{last['explained_variance']:.4f}</td>" in page
    figures = {title(figure): figure for figure in figures_of(page)}
    assert list(figures) == [
        "Losses", "Explained variance", "L0", "Learning rate", "Dead latents, as a fraction", "How often latents fire",
        "Norms of the decoder rows",
    ]  # fmt: skip
    assert {line["name"]: line["y"][-1] for line in figures["Losses"]["data"]} == {
        name: last[name] for name in ("loss", "loss/mse", "loss/l1")
    }
    assert figures["L0"]["data"][0]["x"] == [record["samples"] for record in result.history]
    assert sum(figures["Norms of the decoder rows"]["data"][0]["y"]) == 16
    for said in (
        "l1_coefficient: 0.1",
        "<td>sae-core:core</td>",
        f"<td>torch</td><td>{torch.__version__}",
        "processors",
    ):
        assert said in page
    assert page.count("plotly.js v") == 1
    assert "<script src" not in page


def test_several_dictionaries_have_a_page_side_by_side_that_leads_to_their_own(run_file: Path, tmp_path: Path) -> None:
    results = execute_all(
        read_run(run_file, ["grid={l1_coefficient: [0.02, 0.5]}", "train.dead_after_samples=1000000"])
    )
    page = (tmp_path / "out" / "report.html").read_text()
    pareto = figures_of(page)[0]
    assert "Dead latents, as a fraction" not in map(title, figures_of(page))  # not known after so few samples
    assert title(pareto) == "Explained variance against L0"
    last = {name: result.history[-1] for name, result in results.items()}
    shown = dict(zip(pareto["data"][1]["text"], pareto["data"][1]["x"], strict=True))
    assert shown == {name: record["l0"] for name, record in last.items()}
    body = page[page.index("<body>") :]
    links = re.findall(r'<a href="(.*?)">', body)
    assert [(tmp_path / "out" / link).exists() for link in links] == [True, True]


def test_cross_entropy_recovered_has_a_curve_and_a_trade_off_of_its_own(tmp_path: Path) -> None:
    def result(l0: float, recovered: float) -> TrainResult:
        sae = create("topk", d_in=8, d_sae=16, k=2)
        first = {"step": 1.0, "samples": 10.0, "lr": 0.1, "loss": 2.0, "l0": l0, "explained_variance": 0.5}
        measured = {"held_out.ce_recovered": recovered, "held_out.ce": 3.0}
        return TrainResult(sae, [first, {**first, "samples": 20.0, **measured}, {**first, "samples": 30.0}], 30)

    results = {"few": result(2.0, 0.7), "many": result(4.0, 0.9), "worse": result(5.0, 0.8)}
    own = write_report(tmp_path / "few.html", results["few"], {}).read_text()
    curve = next(f for f in figures_of(own) if title(f) == "Cross-entropy recovered, on data held out")
    assert (curve["data"][0]["x"], curve["data"][0]["y"]) == ([20.0], [0.7])
    assert "<td>cross-entropy recovered</td><td>0.7000</td>" in own
    page = write_comparison_report(tmp_path / "all.html", results, {}, {}).read_text()
    line, dots = next(f for f in figures_of(page) if title(f) == "Cross-entropy recovered against L0")["data"]
    assert dict(zip(dots["text"], dots["y"], strict=True)) == {"few": 0.7, "many": 0.9, "worse": 0.8}
    assert line["y"] == [0.7, 0.9]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")
def test_a_browser_shows_every_figure_with_nothing_cut_off(run_file: Path, tmp_path: Path) -> None:
    execute_all(read_run(run_file, ["grid={l1_coefficient: [0.02, 0.5]}"]))
    for path in (tmp_path / "out" / "report.html", tmp_path / "out" / "saes" / "l1_coefficient=0.5" / "report.html"):
        drawn = figures_of(path.read_text())
        seen = seen_by_a_browser(path)
        assert len(seen) == len(drawn)
        for figure, shown in zip(drawn, seen, strict=True):
            assert title(figure) in shown["texts"]
            assert shown["outside"] == []
            assert shown["marks"] > 0


def test_without_plotly_the_run_ends_well_and_says_how_to_get_a_report(
    run_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def missing() -> str:
        raise MissingDependencyError("pip install 'sae-core[report]'")

    monkeypatch.setattr(report_page, "plotly_script", missing)
    assert main(["train", str(run_file)]) == 0
    said = capsys.readouterr()
    assert "sae-core: no report.html: pip install 'sae-core[report]'\n" in said.err
    assert "report.html" not in said.out
    assert (tmp_path / "out" / "cfg.json").exists()
    assert not (tmp_path / "out" / "report.html").exists()


def test_the_script_is_looked_for_without_importing_plotly(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.metadata

    def not_there(name: str) -> Any:
        raise importlib.metadata.PackageNotFoundError(name)

    assert "plotly.js v" in report_page.plotly_script()[:200]
    monkeypatch.setattr(importlib.metadata, "distribution", not_there)
    with pytest.raises(MissingDependencyError, match=r"pip install 'sae-core\[report\]'"):
        Page("x")


def test_a_report_that_fails_costs_nothing_but_the_report(
    run_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def failing(*_: Any) -> Any:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("sae_core.report.training.write_report", failing)
    execute_all(read_run(run_file))
    assert "no report.html: ZeroDivisionError: a bug" in capsys.readouterr().err
    assert (tmp_path / "out" / "cfg.json").exists()


def test_noise_does_not_fill_an_axis() -> None:
    flat = curves("EV", {"a": [(0, 0.991), (1, 0.992), (2, 0.990)]}, high=1.0)
    low, high = flat["layout"]["yaxis"]["range"]
    assert high - low >= 0.1
    assert low < 0.95 < 1.0 <= high
    nothing = curves("dead", {"a": [(0, 0.0), (1, 0.0)]}, low=0.0, span=0.1)["layout"]["yaxis"]["range"]
    assert nothing == [0.0, pytest.approx(0.105)]
    steep = curves("loss", {"a": [(0, 100.0), (1, 1.0)]}, logarithmic=True)
    assert steep["layout"]["yaxis"]["type"] == "log"
    assert "type" not in curves("loss", {"a": [(0, 100.0), (1, -1.0)]}, logarithmic=True)["layout"]["yaxis"]


def test_a_histogram_counts_every_latent_once_even_where_all_are_alike() -> None:
    for values in (torch.ones(50), torch.linspace(0, 1, 50), torch.tensor([1.0, 1.0 + 1e-7])):
        bars = histogram("norms", values, "norm")["data"][0]
        assert sum(bars["y"]) == len(values)
        assert bars["x"][-1] - bars["x"][0] > 0.05


def test_the_line_of_a_trade_off_goes_through_the_best_in_order() -> None:
    named = {"b": (2.0, 0.8), "a": (1.0, 0.5), "c": (3.0, 0.6)}
    line, dots = points("t", named, ["b", "a"], x_title="L0", y_title="EV")["data"]
    assert (line["x"], line["y"]) == ([1.0, 2.0], [0.5, 0.8])
    assert dots["text"] == ["a", "b", "c"]


def test_texts_of_a_page_cannot_end_its_scripts(tmp_path: Path) -> None:
    page = Page("a < b")
    page.text("x & y")
    page.figure({"data": [{"y": [1], "name": "</script><b>"}], "layout": {}})
    written = page.write(tmp_path / "new" / "page.html").read_text()
    assert "<h1>a &lt; b</h1><p>x &amp; y</p>" in written
    assert "</script><b>" not in written
    assert figures_of(written)[0]["data"][0]["name"] == "</script><b>"
