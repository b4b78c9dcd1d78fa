"""Gemma Scope's files: what SAELens computes from them, we compute, to 1e-6 of the largest value.

The files were made by sae-pretrained's `golden/make_sae_lens_foreign.py` in the published layouts.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from sae_core.format.files import LocalFiles
from sae_core.format.read import find_loader, read_sae
from sae_core.testing import run_checks
from safetensors.torch import load_file

GOLDEN = Path(__file__).parent / "golden/foreign"
TRANSCODERS = {  # SAELens's architectures, by which the cases are named, in our terms: architecture and skip path
    "transcoder": ("standard", False),
    "skip_transcoder": ("standard", True),
    "jumprelu_transcoder": ("jumprelu", False),
    "jumprelu_skip_transcoder": ("jumprelu", True),
}


def assert_equal(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 * max(1.0, expected.abs().max().item()))


@pytest.mark.parametrize("name", ["gemma_2", "gemma_2_transcoder", "gemma_3"])
def test_the_loaders_pass_the_conformance_kit(name: str, tmp_path: Path) -> None:
    case = json.loads((GOLDEN / name / "case.json").read_text())
    shutil.copytree(GOLDEN / name / "files", tmp_path / case["repository"])
    config = {"path": tmp_path / case["repository"], "inside": case["path"]}
    results = run_checks("loader", f"sae-loaders-gemmascope:{case['loader']}", config=config)
    assert [result for result in results if not result.ok] == []


@pytest.mark.parametrize("name", sorted(folder.name for folder in GOLDEN.iterdir()))
def test_files_of_gemma_scope_give_the_numbers_of_saelens(name: str, tmp_path: Path):
    case = json.loads((GOLDEN / name / "case.json").read_text())
    shutil.copytree(GOLDEN / name / "files", tmp_path / case["repository"])
    source = LocalFiles(tmp_path / case["repository"])
    assert find_loader(source, case["path"]) == f"sae-loaders-gemmascope:{case['loader']}"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sae = read_sae(source, case["path"])
    assert any("decoders added up" in str(warning.message) for warning in caught) == case.get("sums_decoders", False)
    architecture, skips = TRANSCODERS.get(case["architecture"], (case["architecture"], False))
    config = dataclasses.asdict(sae.config)
    assert (sae.architecture, config.get("skip", False)) == (architecture, skips)
    assert (config.get("d_out") is not None) == (case["architecture"] in TRANSCODERS)
    io = load_file(GOLDEN / name / "io.safetensors")
    with torch.no_grad():
        latents = sae.encode(io["x"])
        assert_equal(latents, io["acts"])
        assert torch.equal(latents != 0, io["acts"] != 0)
        assert_equal(sae(io["x"]), io["out"])
