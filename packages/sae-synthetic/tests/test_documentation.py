"""The code in the README and on the page about synthetic data runs as it stands."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1]
PAGES = {
    PACKAGE / "README.md": ["MCC 0.9"],
    PACKAGE.parents[1] / "docs" / "synthetic.md": [],
}
WRITTEN = {"README.md": set[str](), "synthetic.md": {"world", "similarity.html", "report.html"}}


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_code_of_a_page_runs_from_top_to_bottom(page: Path, tmp_path: Path) -> None:
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL))
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for line in PAGES[page]:
        assert line in done.stdout
    assert {path.name for path in tmp_path.iterdir()} == WRITTEN[page.name]


def test_the_page_shows_every_preset() -> None:
    from sae_synthetic.experiments import PRESETS

    page = (PACKAGE.parents[1] / "docs" / "synthetic.md").read_text(encoding="utf-8")
    for preset in PRESETS.values():
        assert f"### `{preset.name}` ({preset.paper.removeprefix('arXiv ').removesuffix(' (LessWrong)')})" in page


def test_the_run_files_on_the_page_are_run_files(tmp_path: Path) -> None:
    from sae_core.run import read_run

    page = (PACKAGE.parents[1] / "docs" / "synthetic.md").read_text(encoding="utf-8")
    found: list[tuple[str, int]] = []
    for text in re.findall(r"^```yaml\n(.*?)^```", page, re.MULTILINE | re.DOTALL):
        (tmp_path / "run.yaml").write_text(text)
        run = read_run(tmp_path / "run.yaml", [])
        found.append((run.source["name"], run.train.total_samples))
    assert sorted(found) == [("synthetic", 1_000_000), ("synthetic", 200_000_000), ("synthetic_sites", 1_000_000)]
