"""SAELens's names of transcoders, which here are architectures with `d_out`: in its files, and for those who ask for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_core import SAE, create
from sae_core.errors import UnknownNameError
from sae_core.format.sae_lens_names import from_sae_lens, said_here, to_sae_lens
from safetensors.torch import load_file, save_file

X = torch.randn(9, 6, generator=torch.Generator().manual_seed(0))
NAMES = {
    "transcoder": ("standard", False),
    "skip_transcoder": ("standard", True),
    "jumprelu_transcoder": ("jumprelu", False),
    "jumprelu_skip_transcoder": ("jumprelu", True),
}


@pytest.mark.parametrize("theirs", NAMES)
def test_names_go_both_ways(theirs: str) -> None:
    ours, skip = NAMES[theirs]
    cfg = {"d_in": 6, "d_sae": 12, "d_out": 5}
    read = from_sae_lens(theirs, cfg)
    assert read == (ours, {**cfg, "skip": skip, "apply_b_dec_to_input": False})
    name, written = to_sae_lens(*read)
    assert name == theirs
    assert "skip" not in written
    assert from_sae_lens(name, written) == read


@pytest.mark.parametrize(
    ("architecture", "cfg"),
    [
        ("standard", {"d_in": 6}),
        ("jumprelu", {"d_in": 6, "d_out": None}),
        ("topk", {"d_in": 6, "d_out": 5, "skip": True}),
        ("gated", {"d_in": 6, "d_out": 5}),
    ],
)
def test_what_sae_lens_has_no_name_for_keeps_ours(architecture: str, cfg: dict[str, Any]) -> None:
    assert to_sae_lens(architecture, cfg) == (architecture, cfg)
    assert from_sae_lens(architecture, cfg) == (architecture, cfg)
    assert said_here(architecture) == ""


@pytest.mark.parametrize(("theirs", "skip"), [(name, skip) for name, (_, skip) in NAMES.items()])
def test_whoever_asks_for_a_name_of_sae_lens_is_told_what_to_write(theirs: str, skip: bool) -> None:
    fields = r"with d_out=\.\.\., skip=True$" if skip else r"with d_out=\.\.\.$"
    with pytest.raises(UnknownNameError, match=f"write architecture '{NAMES[theirs][0]}' {fields}"):
        create(theirs, d_in=6, d_sae=12, d_out=5)


def test_other_unknown_names_are_not_said_to_be_sae_lenss() -> None:
    with pytest.raises(UnknownNameError) as raised:
        create("jumprelu_transcodr", d_in=6, d_sae=12, d_out=5)
    assert "SAELens" not in str(raised.value)


NESTED = {"k": 3, "matryoshka_widths": [4, 8]}


@pytest.mark.parametrize(
    ("architecture", "config", "saved_as"),
    [
        ("standard", {}, "transcoder"),
        ("standard", {"skip": True}, "skip_transcoder"),
        ("jumprelu", {}, "jumprelu_transcoder"),
        ("jumprelu", {"skip": True}, "jumprelu_skip_transcoder"),
        ("batchtopk", {"k": 3}, "jumprelu_transcoder"),
        ("batchtopk", {"k": 3, "skip": True}, "jumprelu_skip_transcoder"),
        ("matryoshka_batchtopk", NESTED, "jumprelu_transcoder"),
        ("matryoshka_batchtopk", NESTED | {"skip": True}, "jumprelu_skip_transcoder"),
        ("topk", {"k": 3, "skip": True}, "topk"),
        ("gated", {}, "gated"),
    ],
)
@torch.no_grad()
def test_transcoders_are_saved_under_sae_lenss_names_where_it_has_one(
    architecture: str, config: dict[str, Any], saved_as: str, tmp_path: Path
) -> None:
    sae = create(architecture, d_in=6, d_sae=12, d_out=5, **config).eval()
    random = torch.Generator().manual_seed(1)
    for name, tensor in (*sae.named_parameters(), *sae.named_buffers()):
        tensor.copy_(torch.rand(tensor.shape, generator=random) - (0.5 if "threshold" not in name else 0.0))
    folder = sae.save(tmp_path / "sae")
    cfg = json.loads((folder / "cfg.json").read_text())
    assert (cfg["architecture"], cfg["d_out"]) == (saved_as, 5)
    assert cfg["apply_b_dec_to_input"] is False
    assert ("skip" in cfg) == (saved_as == "topk")
    assert cfg["metadata"]["training_architecture"] == architecture
    tensors = {name: tuple(tensor.shape) for name, tensor in load_file(folder / "sae_weights.safetensors").items()}
    biases = {"b_gate": (12,), "b_mag": (12,), "r_mag": (12,)} if architecture == "gated" else {"b_enc": (12,)}
    thresholds = {"threshold": (12,)} if "jumprelu" in saved_as else {}
    skips = {"W_skip": (5, 6)} if config.get("skip") else {}
    assert tensors == {"W_enc": (6, 12), "W_dec": (12, 5), "b_dec": (5,), **biases, **thresholds, **skips}
    loaded = SAE.load(folder)
    torch.testing.assert_close(loaded(X), sae(X))
    torch.testing.assert_close(loaded.encode(X), sae.encode(X))
    assert bool(sae.encode(X).any())


@pytest.mark.parametrize("theirs", NAMES)
def test_a_file_with_a_name_of_sae_lens_opens_as_the_architecture_it_is(theirs: str, tmp_path: Path) -> None:
    random = torch.Generator().manual_seed(2)
    shapes = {"W_enc": (6, 12), "b_enc": (12,), "W_dec": (12, 5), "b_dec": (5,)}
    ours, skip = NAMES[theirs]
    shapes |= {"threshold": (12,)} if ours == "jumprelu" else {}
    shapes |= {"W_skip": (5, 6)} if skip else {}
    t = {name: torch.rand(shape, generator=random) - 0.3 for name, shape in shapes.items()}
    cfg = {"architecture": theirs, "d_in": 6, "d_sae": 12, "d_out": 5, "apply_b_dec_to_input": False,
           "metadata": {"sae_lens_version": "6.54.12"}}  # fmt: skip
    save_file(t, tmp_path / "sae_weights.safetensors")
    (tmp_path / "cfg.json").write_text(json.dumps(cfg))
    sae = SAE.load(tmp_path)
    assert (sae.architecture, getattr(sae.config, "skip", None)) == (ours, skip)
    h = X @ t["W_enc"] + t["b_enc"]
    f = h.relu() * (h > t["threshold"]) if ours == "jumprelu" else h.relu()
    y = f @ t["W_dec"] + t["b_dec"]
    torch.testing.assert_close(sae(X), y + X @ t["W_skip"].T if skip else y)
