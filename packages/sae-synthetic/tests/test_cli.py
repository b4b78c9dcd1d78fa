"""`sae-core synthetic`, as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from sae_core import create
from sae_core.cli import main
from sae_synthetic import (
    MultiSiteModel,
    MultiSiteModelConfig,
    SyntheticModel,
    SyntheticModelConfig,
    init_sae_to_match_feature_dict,
)


def _error(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["synthetic", *arguments]) == 1
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return captured.err


def test_the_list_names_every_experiment_and_fits_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["synthetic", "list"]) == 0
    printed = capsys.readouterr().out
    for name in ("consistency", "sparse-but-wrong", "hedging", "absorption", "tree", "synthsaebench-mini"):
        assert f"\n{name} " in printed
    assert "arXiv 2505.20254" in printed
    assert max(map(len, printed.splitlines())) <= 80


def test_the_list_needs_no_torch() -> None:
    code = "import sys; from sae_core.cli import main; main(['synthetic', 'list']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_a_run_prints_measured_beside_published_and_writes_both_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "out"
    assert main(["synthetic", "run", "hedging", "--seeds", "2", "--scale", "0.02", "--output", str(out)]) == 0
    printed = capsys.readouterr().out
    header = next(line for line in printed.splitlines() if line.startswith("FEATURES"))
    assert header.split() == ["FEATURES", "WITH", "PARENT", "WITH", "CHILD", "PUBLISHED"]
    row = next(line for line in printed.splitlines() if line.startswith("hierarchy "))
    assert row.endswith("positive")
    assert row.count("±") == 2  # over two seeds
    assert "2 seed(s)" in " ".join(printed.split())
    assert "seen]" in printed
    assert max(map(len, printed.splitlines()[:-1])) <= 80
    result = json.loads((out / "result.json").read_text())
    assert result["name"] == "hedging"
    assert len(result["data"]["cosines with parent and child"]["hierarchy"]) == 2
    page = (out / "report.html").read_text()
    assert "Plotly.newPlot" in page
    assert "<script src=" not in page


def test_without_a_report_only_json_is_written(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["synthetic", "run", "hedging", "--scale", "0.001", "--no-report", "--output", str(out)]) == 0
    assert [path.name for path in out.iterdir()] == ["result.json"]


def test_the_output_has_a_default_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["synthetic", "run", "hedging", "--scale", "0.001", "--no-report"]) == 0
    assert (tmp_path / "runs" / "synthetic-hedging" / "result.json").exists()
    assert "runs/synthetic-hedging/result.json" in capsys.readouterr().out


def test_a_result_is_replaced_only_when_told_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    run = ["run", "hedging", "--scale", "0.001", "--no-report", "--output", str(tmp_path)]
    assert main(["synthetic", *run]) == 0  # a folder that holds other things is no hindrance
    first = (tmp_path / "result.json").read_bytes()
    assert "already holds a result; choose another --output or pass --overwrite" in _error(run, capsys)
    assert (tmp_path / "result.json").read_bytes() == first
    assert main(["synthetic", *run, "--overwrite"]) == 0
    assert (tmp_path / "result.json").read_bytes() != first  # it holds the seconds it took
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "hegding"], "unknown experiment 'hegding'; did you mean 'hedging'?"),
        (["run", "hedging", "--seeds", "0"], "seeds must be at least 1, not 0"),
        (["run", "hedging", "--scale", "0"], "scale must be in (0, 100], not 0.0"),
        (["run", "hedging", "--device", "nonsense"], "device: 'nonsense' cannot be used"),
        (["run", "hedging", "--output", "/dev/null/x"], "/dev/null/x cannot be a folder"),
    ],
)
def test_what_cannot_be_run_is_said_in_one_line_and_leaves_nothing_behind(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    error = _error(arguments, capsys)
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [[], ["run"], ["run", "hedging", "--seeds", "two"], ["run", "hedging", "--what"]])
def test_wrong_usage_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["synthetic", *arguments])
    assert stop.value.code == 2
    assert "usage: sae-core" in capsys.readouterr().err


def _save_world_and_sae(folder: Path) -> None:
    world = SyntheticModel(SyntheticModelConfig(num_features=16, hidden_dim=24, bias=False, seed=0))
    world.save(folder / "world")
    sae = create("topk", d_in=24, d_sae=16, k=3, seed=0)
    init_sae_to_match_feature_dict(sae, world.feature_dict)
    sae.save(folder / "sae")


def test_an_sae_is_scored_against_a_saved_world_beside_an_untrained_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _save_world_and_sae(tmp_path)
    arguments = ["synthetic", "score", str(tmp_path / "sae"), "--world", str(tmp_path / "world"), "--samples", "500"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    rows = {line[:20].strip(): line[20:].split() for line in printed.splitlines()}
    assert rows["MCC"][0] == "1.000"
    assert float(rows["MCC"][-1]) < 0.8
    assert "UNTRAINED" in printed.splitlines()[0]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["scores"]["num_samples"] == 500
    assert found["scores"]["mcc"] > 0.999 > found["scores"]["baseline"]["mcc"]


def test_a_crosscoder_is_scored_against_a_world_of_several_sites(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = MultiSiteModelConfig(num_features=16, sites={"base": 12, "tuned": 12}, exclusive={"tuned": 3}, seed=0)
    MultiSiteModel(config).save(tmp_path / "world")
    create("topk", d_in=24, d_sae=16, k=3, reads={"base": 12, "tuned": 12}).save(tmp_path / "sae")
    assert (
        main(["synthetic", "score", str(tmp_path / "sae"), "--world", str(tmp_path / "world"), "--samples", "200"]) == 0
    )
    printed = capsys.readouterr().out
    (line,) = [line for line in printed.splitlines() if line.startswith("tuned")]
    assert line.split()[2] == "3"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{}/sae", "--world", "{}/sae"], "no world there"),
        (["{}/nothing", "--world", "{}/world"], "there is no such folder or file"),
        (["{}/sae", "--world", "{}/world", "--samples", "0"], "num_samples must be at least 1"),
        (["{}/sae", "--world", "{}/world", "--device", "moon"], "device"),
    ],
)
def test_what_cannot_be_scored_is_refused_in_one_message(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _save_world_and_sae(tmp_path)
    assert message in " ".join(_error(["score", *(part.format(tmp_path) for part in arguments)], capsys).split())
