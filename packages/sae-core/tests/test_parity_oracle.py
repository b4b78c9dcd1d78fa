"""SAELens itself opens what we save, and returns what we return.

Needs a Python that can import sae_lens: set SAE_CORE_ORACLE_SAE_LENS to its path. `golden/check_ours_opens_in_sae_lens.py`
runs under it.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_core import ActivationBatch, create
from safetensors.torch import load_file, save_file

ORACLE = os.environ.get("SAE_CORE_ORACLE_SAE_LENS")
SCRIPT = Path(__file__).parent / "golden" / "check_ours_opens_in_sae_lens.py"
HEADS = {"n_heads": 2, "bottleneck_factor": 2}
OURS: dict[str, tuple[str, dict[str, Any], str]] = {  # folder: architecture, config, SAELens's class
    "standard": ("standard", {}, "StandardSAE"),
    "standard_layer_norm": ("standard", {"normalize_activations": "layer_norm"}, "StandardSAE"),
    "standard_whitened": ("standard", {"normalize_activations": "covariance_whitening"}, "StandardSAE"),
    "gated": ("gated", {"apply_b_dec_to_input": False}, "GatedSAE"),
    "topk": ("topk", {"k": 3}, "TopKSAE"),
    "topk_scaled": ("topk", {"k": 3, "normalize_activations": "expected_average_only_in"}, "TopKSAE"),
    "topk_plain": ("topk", {"k": 3, "rescale_acts_by_decoder_norm": False}, "TopKSAE"),
    "abstopk": ("abstopk", {"k": 3}, "AbsTopKSAE"),
    "batchtopk": ("batchtopk", {"k": 3}, "JumpReLUSAE"),
    "batchtopk_whitened": ("batchtopk", {"k": 3, "normalize_activations": "covariance_whitening"}, "JumpReLUSAE"),
    "matryoshka": ("matryoshka_batchtopk", {"k": 3, "matryoshka_widths": [4, 8]}, "JumpReLUSAE"),
    "jumprelu": ("jumprelu", {}, "JumpReLUSAE"),
    "jumprelu_constant_norm": ("jumprelu", {"normalize_activations": "constant_norm_rescale"}, "JumpReLUSAE"),
    "matching_pursuit": ("matching_pursuit", {}, "MatchingPursuitSAE"),
    "matching_pursuit_scaled": (
        "matching_pursuit",
        {"normalize_activations": "expected_average_only_in", "residual_threshold": 0.5},
        "MatchingPursuitSAE",
    ),
    "temporal": ("temporal", {"kval_topk": 4} | HEADS, "TemporalSAE"),
    "temporal_scaled": ("temporal", {"normalize_activations": "expected_average_only_in"} | HEADS, "TemporalSAE"),
    "transcoder": ("standard", {"d_out": 6}, "Transcoder"),
    "skip_transcoder": ("standard", {"d_out": 6, "skip": True}, "SkipTranscoder"),
    "jumprelu_transcoder": ("jumprelu", {"d_out": 6}, "JumpReLUTranscoder"),
    "jumprelu_skip_transcoder": ("jumprelu", {"d_out": 6, "skip": True}, "JumpReLUSkipTranscoder"),
    "batchtopk_transcoder": ("batchtopk", {"d_out": 6, "k": 3}, "JumpReLUTranscoder"),
    "matryoshka_skip_transcoder": (
        "matryoshka_batchtopk",
        {"d_out": 6, "skip": True, "k": 3, "matryoshka_widths": [4, 8]},
        "JumpReLUSkipTranscoder",
    ),
    "transcoder_scaled": (
        "standard",
        {"d_out": 6, "skip": True, "normalize_activations": "expected_average_only_in"},
        "SkipTranscoder",
    ),
}


@pytest.mark.slow
@pytest.mark.skipif(ORACLE is None, reason="set SAE_CORE_ORACLE_SAE_LENS to a Python that can import sae_lens")
@torch.no_grad()
def test_sae_lens_opens_what_we_save_and_returns_the_same(tmp_path: Path) -> None:
    random = torch.Generator().manual_seed(5)
    expected: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for seed, (folder, (architecture, config, _)) in enumerate(OURS.items()):
        sae = create(architecture, d_in=8, d_sae=16, seed=seed, **config)
        for name, parameter in sae.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.5)
            if name == "threshold":
                parameter.abs_()
        sae.after_step()
        for name, buffer in sae.named_buffers():
            if name == "topk_threshold":
                buffer.fill_(0.4)
        x = torch.randn(2, 5, 8, generator=random) * 2 + 1
        targets = None if sae.reconstructs_input else torch.randn(500, 6, generator=random) * 3
        sae.fit_normalization(ActivationBatch(torch.randn(500, 8, generator=random) * 2 + 1, targets))
        sae.eval().save(tmp_path / folder)
        save_file({"x": x}, tmp_path / folder / "x.safetensors")
        expected[folder] = sae.encode(x), sae(x)
    assert ORACLE is not None
    ran = subprocess.run(
        [ORACLE, str(SCRIPT), *(str(tmp_path / folder) for folder in OURS)], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    reports = {Path(line["folder"]).name: line for line in map(json.loads, ran.stdout.splitlines())}
    for folder, (_, _, class_name) in OURS.items():
        theirs = load_file(tmp_path / folder / "sae_lens.safetensors")
        assert reports[folder]["class"] == class_name
        assert reports[folder]["l0"] > 0
        latents, output = expected[folder]
        for what, ours in (("acts", latents), ("out", output)):
            torch.testing.assert_close(theirs[what], ours, rtol=1e-5, atol=1e-5, msg=f"{folder}: {what}")
