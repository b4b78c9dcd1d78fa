"""Files that the original libraries wrote: what they compute, we compute, to 1e-6 of the largest value.

`golden/make_*.py` made the files and their outputs. Formats of single publications were read and run by SAELens, which has
loaders for them.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_core import SAE
from sae_core.format.files import LocalFiles
from sae_core.format.read import find_loader, read_sae
from safetensors.torch import load_file

GOLDEN = Path(__file__).parent / "golden"
DICTIONARY_LEARNING = {
    "autoencoder": "standard",
    "autoencoder_new": "standard",
    "autoencoder_topk": "topk",
    "batch_topk": "jumprelu",
    "batch_topk_unfinished": "jumprelu",
    "matryoshka": "jumprelu",
    "gated": "gated",
    "jumprelu": "jumprelu",
}
SPARSIFY = {  # architecture, and whether there are an output of its own and a skip path
    "sae": ("topk", False, False),
    "sae_expansion": ("topk", False, False),
    "groupmax": ("groupmax", False, False),
    "transcoder": ("topk", True, False),
    "skip_transcoder": ("topk", True, True),
    "run/layers.3.mlp": ("topk", False, False),
    "skip_without_transcode": ("topk", True, True),
}
TRANSCODERS = {  # SAELens's architectures, by which the cases are named, in our terms: architecture and skip path
    "transcoder": ("standard", False),
    "skip_transcoder": ("standard", True),
    "jumprelu_transcoder": ("jumprelu", False),
    "jumprelu_skip_transcoder": ("jumprelu", True),
}


def assert_equal(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 * max(1.0, expected.abs().max().item()))


def assert_same_function(sae: SAE, io: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        latents = sae.encode(io["x"])
        assert_equal(latents, io["acts"])
        assert torch.equal(latents != 0, io["acts"] != 0)
        assert_equal(sae(io["x"]), io["out"])
        assert_equal(sae.encode_sparse(io["x"]).to_dense(), io["acts"])


@pytest.mark.parametrize(("case", "architecture"), DICTIONARY_LEARNING.items())
def test_dictionaries_of_dictionary_learning_give_its_numbers(case: str, architecture: str):
    folder = GOLDEN / "dictionary_learning" / case
    sae = SAE.load(folder)
    assert sae.architecture == architecture
    assert_same_function(sae, load_file(folder / "io.safetensors"))


def test_a_dictionary_of_dictionary_learning_names_its_model_and_hook_point():
    metadata = SAE.load(GOLDEN / "dictionary_learning/batch_topk").metadata
    assert metadata["model_name"] == "EleutherAI/pythia-70m-deduped"
    assert metadata["hook_name"] == "blocks.3.hook_resid_post"
    assert metadata["context_size"] == 128


@pytest.mark.parametrize(("case", "kind"), SPARSIFY.items())
def test_coders_of_sparsify_give_its_numbers(case: str, kind: tuple[str, bool, bool]):
    folder = GOLDEN / "sparsify" / case
    sae = SAE.load(folder)
    config = dataclasses.asdict(sae.config)
    assert (sae.architecture, config["d_out"] is not None, config["skip"]) == kind
    assert_same_function(sae, load_file(folder / "io.safetensors"))


def test_a_coder_of_sparsify_takes_its_hook_point_from_its_folder_and_its_model_from_the_run():
    sae = read_sae(LocalFiles(GOLDEN / "sparsify/run"), "layers.3.mlp")
    assert sae.metadata["hf_hook_name"] == "layers.3.mlp"
    assert sae.metadata["hook_name"] == "blocks.3.hook_mlp_out"
    assert sae.metadata["model_name"] == "EleutherAI/pythia-160m"
    assert sae.metadata["context_size"] == 2048


def foreign(folder: Path, tmp_path: Path) -> tuple[LocalFiles, dict[str, Any]]:
    """The case's files in a folder that is called like their repository, since some formats say things only there."""
    case = json.loads((folder / "case.json").read_text())
    repository = "somewhere" if "facts" in case else case["repository"]
    shutil.copytree(folder / "files", tmp_path / repository)
    return LocalFiles(tmp_path / repository), case


@pytest.mark.parametrize("name", sorted(folder.name for folder in (GOLDEN / "foreign").iterdir()))
def test_files_of_publications_give_the_numbers_of_saelens(name: str, tmp_path: Path):
    source, case = foreign(GOLDEN / "foreign" / name, tmp_path)
    assert find_loader(source, case["path"]) == f"sae-pretrained:{case['loader']}"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sae = read_sae(source, case["path"], overrides=case.get("facts"))
    assert any("decoders added up" in str(warning.message) for warning in caught) == case.get("sums_decoders", False)
    architecture, skips = TRANSCODERS.get(case["architecture"], (case["architecture"], False))
    config = dataclasses.asdict(sae.config)
    assert (sae.architecture, config.get("skip", False)) == (architecture, skips)
    assert (config.get("d_out") is not None) == (case["architecture"] in TRANSCODERS)
    assert_same_function(sae, load_file(GOLDEN / "foreign" / name / "io.safetensors"))
