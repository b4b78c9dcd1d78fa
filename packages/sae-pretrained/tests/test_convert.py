"""SAEs written for other libraries: the same function when read back, by us and by those libraries themselves.

The originals run under a Python of their own, if an environment variable names it: SAE_CORE_ORACLE_DL for dictionary-learning,
SAE_CORE_ORACLE_SP for sparsify, SAE_CORE_ORACLE_SL for sae-lens.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_core import SAE, create
from sae_core.cli import main
from sae_core.errors import ConfigError, FormatError
from sae_core.format.convert import convert
from safetensors.torch import load_file, save_file
from torch import Tensor

D, F = 8, 24
GOLDEN = Path(__file__).parent / "golden"


def made(architecture: str, **config: Any) -> SAE:
    """An SAE all of whose parameters are random, also those that start at zero."""
    sae = create(architecture, d_in=D, d_sae=F, **config).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            drawn = 0.5 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(drawn.abs() if name == "threshold" else drawn)
    sae.metadata |= {
        "model_name": "EleutherAI/pythia-70m",
        "hook_name": "blocks.3.hook_resid_post",
        "context_size": 128,
    }
    return sae


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "standard": ("standard", {}),
    "standard_uncentred": ("standard", {"apply_b_dec_to_input": False}),
    "standard_scaled": (
        "standard",
        {"normalize_activations": "constant_scalar_rescale", "activation_normalization_factor": 0.3},
    ),
    "gated": ("gated", {}),
    "gated_uncentred": ("gated", {"apply_b_dec_to_input": False}),
    "topk": ("topk", {"k": 5}),
    "topk_uncentred": ("topk", {"k": 5, "apply_b_dec_to_input": False, "rescale_acts_by_decoder_norm": False}),
    "groupmax": ("groupmax", {"k": 4, "rescale_acts_by_decoder_norm": False}),
    "groupmax_uncentred": ("groupmax", {"k": 4, "apply_b_dec_to_input": False}),
    "abstopk": ("abstopk", {"k": 5}),
    "jumprelu": ("jumprelu", {}),
    "jumprelu_uncentred": ("jumprelu", {"apply_b_dec_to_input": False}),
    "batchtopk": ("batchtopk", {"k": 5}),
    "matching_pursuit": ("matching_pursuit", {}),
    "transcoder": ("standard", {"d_out": D}),
    "skip_transcoder": ("standard", {"d_out": D, "skip": True}),
    "jumprelu_transcoder": ("jumprelu", {"d_out": 5}),
    "batchtopk_transcoder": ("batchtopk", {"d_out": 5, "k": 5, "skip": True}),
    "topk_transcoder": ("topk", {"d_out": D, "k": 5}),
    "topk_skip_transcoder": ("topk", {"d_out": D, "k": 5, "skip": True}),
    "groupmax_skip_transcoder": ("groupmax", {"d_out": D, "k": 4, "skip": True}),
    "gated_transcoder": ("gated", {"d_out": D}),
    "crosscoder": ("standard", {"reads": {"a": 3, "b": 5}}),
}
SHARED = ("standard", "gated", "topk", "jumprelu", "batchtopk")
ARCHITECTURES = {
    "sae_lens": (
        *SHARED,
        "abstopk",
        "matching_pursuit",
        "standard transcoder",
        "jumprelu transcoder",
        "batchtopk transcoder",
    ),
    "dictionary_learning": SHARED,
    "sparsify": ("topk", "groupmax", "topk transcoder", "groupmax transcoder"),
}


def kind(case: str) -> str:
    """The architecture, and what it is used as."""
    architecture, config = CASES[case]
    return architecture + (" transcoder" if "d_out" in config else " crosscoder" if "reads" in config else "")


EXPRESSIBLE = {to: [case for case in CASES if kind(case) in known] for to, known in ARCHITECTURES.items()}
PAIRS = [(to, case) for to, cases in EXPRESSIBLE.items() for case in cases]


def inputs() -> Tensor:
    return 2.0 * torch.randn(9, D, generator=torch.Generator().manual_seed(1))


def outputs(sae: SAE) -> dict[str, Tensor]:
    with torch.no_grad():
        return {"acts": sae.encode(inputs()), "out": sae(inputs())}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert expected["acts"].count_nonzero() > 0
    for name in ("acts", "out"):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("to", "case"), PAIRS)
def test_what_is_written_is_the_same_function_when_read_back(to: str, case: str, tmp_path: Path):
    architecture, config = CASES[case]
    sae = made(architecture, **config)
    convert(sae, to, tmp_path / "out")
    again = SAE.load(tmp_path / "out")
    assert_same(outputs(again), outputs(sae))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("to", ARCHITECTURES)
def test_what_a_format_cannot_express_is_refused_and_nothing_is_left(to: str, tmp_path: Path):
    refused = [case for case in CASES if case not in EXPRESSIBLE[to]]
    assert len(refused) >= 2
    for case in refused:
        architecture, config = CASES[case]
        with pytest.raises(FormatError, match=f"{to} cannot express"):
            convert(made(architecture, **config), to, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_normalisations_of_each_row_are_refused_where_the_format_has_none(tmp_path: Path):
    for to in ("dictionary_learning", "sparsify"):
        with pytest.raises(FormatError, match="normalize_activations: layer_norm"):
            convert(made("topk", k=3, normalize_activations="layer_norm"), to, tmp_path / "out")
    with pytest.raises(FormatError, match="undo it on the outputs"):
        convert(made("standard", d_out=D, normalize_activations="layer_norm"), "sae_lens", tmp_path / "out")


def test_a_transcoder_to_another_width_is_refused_by_sparsify(tmp_path: Path):
    with pytest.raises(FormatError, match="from width 8 to another, 5"):
        convert(made("topk", d_out=5, k=3), "sparsify", tmp_path / "out")


def test_half_precision_comes_out_in_float32_only_where_biases_have_to_move(tmp_path: Path):
    convert(made("jumprelu", dtype="bfloat16", apply_b_dec_to_input=False), "dictionary_learning", tmp_path / "same")
    assert SAE.load(tmp_path / "same").dtype == torch.bfloat16
    moved = made("jumprelu", dtype="bfloat16")
    convert(moved, "dictionary_learning", tmp_path / "moved")
    again = SAE.load(tmp_path / "moved")
    assert again.dtype == torch.float32
    assert_same(outputs(again), outputs(moved.float()))


def test_attention_heads_are_noted(tmp_path: Path):
    notes = convert(made("standard", reshape_activations="hook_z"), "dictionary_learning", tmp_path / "out")
    assert any("heads concatenated" in note for note in notes)


def test_base_model_and_hook_point_go_along_where_the_format_has_a_place_for_them(tmp_path: Path):
    sae = made("topk", k=3)
    convert(sae, "dictionary_learning", tmp_path / "dl")
    metadata = SAE.load(tmp_path / "dl").metadata
    assert {key: metadata[key] for key in ("model_name", "hook_name", "context_size")} == {
        "model_name": "EleutherAI/pythia-70m",
        "hook_name": "blocks.3.hook_resid_post",
        "context_size": 128,
    }
    assert any("no place for base model" in note for note in convert(sae, "sparsify", tmp_path / "sp"))


def test_nothing_is_ever_overwritten(tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/precious.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is there already"):
        convert(made("standard"), "sae_lens", tmp_path / "out")
    assert (tmp_path / "out/precious.txt").read_text() == "mine"


def test_values_that_are_not_finite_are_not_written(tmp_path: Path):
    sae = made("standard")
    with torch.no_grad():
        sae.W_dec[3, 2] = float("nan")
    with pytest.raises(FormatError, match="'W_dec' holds NaN"):
        convert(sae, "dictionary_learning", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_command_converts_and_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    arguments = ["--to", "dictionary_learning", "--output", str(tmp_path / "out")]
    assert main(["convert", str(GOLDEN / "sparsify/sae"), *arguments]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/out: topk, 24 latents, dictionary_learning\n"
    assert json.loads((tmp_path / "out/config.json").read_text())["trainer"]["dict_class"] == "AutoEncoderTopK"
    assert main(["convert", str(GOLDEN / "sparsify/sae"), *arguments]) == 1
    assert "is there already" in capsys.readouterr().err


ORACLES = {
    "dictionary_learning": (
        "SAE_CORE_ORACLE_DL",
        """
from dictionary_learning.utils import load_dictionary
dictionary, _ = load_dictionary(folder, device="cpu")
acts = dictionary.encode(x)
out = dictionary.decode(acts)
""",
    ),
    "sparsify": (
        "SAE_CORE_ORACLE_SP",
        """
from sparsify import SparseCoder
coder = SparseCoder.load_from_disk(folder)
top_acts, top_indices, pre = coder.encode(x)
acts = torch.zeros_like(pre).scatter(-1, top_indices, top_acts)
out = coder(x).sae_out
""",
    ),
    "sae_lens": (
        "SAE_CORE_ORACLE_SL",
        """
from sae_lens import SAE
sae = SAE.load_from_disk(folder)
acts = sae.encode(x)
out = sae(x)
""",
    ),
}
RUN = """
import json, os, sys
os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
import torch
from safetensors.torch import load_file, save_file
for folder in sys.argv[2:]:
    x = load_file(sys.argv[1])["x"]
    with torch.no_grad():
{body}
    save_file({{"acts": acts.contiguous(), "out": out.contiguous()}}, folder + "/said.safetensors")
"""


@pytest.mark.parametrize("to", ORACLES)
def test_the_original_library_computes_the_same_from_what_is_written(to: str, tmp_path: Path):
    variable, body = ORACLES[to]
    if variable not in os.environ:
        pytest.skip(f"{variable} names no Python that has the library")
    expected: dict[str, dict[str, Tensor]] = {}
    for case in EXPRESSIBLE[to]:
        architecture, config = CASES[case]
        sae = made(architecture, **config)
        convert(sae, to, tmp_path / case)
        expected[case] = outputs(sae)
    save_file({"x": inputs()}, tmp_path / "x.safetensors")
    script = RUN.format(body="".join(f"        {line}\n" for line in body.strip().splitlines()))
    folders = [str(tmp_path / case) for case in expected]
    done = subprocess.run(
        [os.environ[variable], "-c", script, str(tmp_path / "x.safetensors"), *folders],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for case, values in expected.items():
        assert_same(load_file(tmp_path / case / "said.safetensors"), values)


@pytest.mark.parametrize("case", ["dictionary_learning/autoencoder", "sparsify/sae"])
def test_saving_over_the_folder_that_was_loaded_is_refused_where_that_would_destroy_it(case: str, tmp_path: Path):
    folder = Path(shutil.copytree(Path(__file__).parent / "golden" / case, tmp_path / "loaded"))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    sae = SAE.load(folder)
    with pytest.raises(FormatError, match="not saved: it holds"):
        sae.save(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    sae.save(folder, overwrite=True)
    again = SAE.load(folder, format="sae_lens")
    x = torch.randn(5, sae.d_in, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(again(x), sae(x))
