"""circuit-tracer's files, both ways: transcoders of one layer, and cross-layer transcoders as a whole.

Where SAE_CORE_ORACLE_CT names a Python that has circuit-tracer, that library reads what is written here, too.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from sae_core import SAE, create
from sae_core.errors import ConfigError, FormatError
from sae_core.format.convert import convert
from safetensors.torch import load_file, save_file
from torch import Tensor

D, F, L = 6, 10, 3
HOOKS = {"feature_input_hook": "hook_resid_mid", "feature_output_hook": "hook_mlp_out"}
SITES = {
    "reads": {f"blocks.{n}.hook_resid_mid": D for n in range(L)},
    "writes": {f"blocks.{n}.hook_mlp_out": D for n in range(L)},
}


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def filled(sae: SAE[Any], lowest: float = 0.05) -> SAE[Any]:
    """Arbitrary weights; thresholds from `lowest` on."""
    with torch.no_grad():
        for seed, (name, parameter) in enumerate(sae.named_parameters()):
            values = drawn(seed, *parameter.shape) * 0.6
            parameter.copy_(values.abs() + lowest if name.startswith("threshold") else values)
    sae.metadata |= {
        "model_name": "google/gemma-2-2b",
        "hook_name": "blocks.4.hook_resid_mid",
        "hook_name_out": "blocks.4.hook_mlp_out",
    }
    return sae.eval()


def cross_layer(lowest: float = 0.05, **config: Any) -> SAE[Any]:
    return filled(create("cross_layer_transcoder", d_in=L * D, d_sae=L * F, **SITES, **config), lowest)


def published(folder: Path, *, thresholds: bool, lowest: float = 0.1) -> dict[str, Tensor]:
    """A cross-layer transcoder as circuit-tracer's own `to_safetensors` lays it out."""
    tensors: dict[str, Tensor] = {}
    for n in range(L):
        encoder = {f"W_enc_{n}": drawn(n, F, D), f"b_enc_{n}": drawn(n + 10, F), f"b_dec_{n}": drawn(n + 20, D)}
        if thresholds:
            encoder[f"threshold_{n}"] = torch.linspace(lowest, 1, F)
        decoder = {f"W_dec_{n}": drawn(n + 30, F, L - n, D)}
        save_file(encoder, folder / f"W_enc_{n}.safetensors")
        save_file(decoder, folder / f"W_dec_{n}.safetensors")
        tensors |= encoder | decoder
    (folder / "config.yaml").write_text(
        yaml.safe_dump(
            {"model_kind": "cross_layer_transcoder", "model_name": "google/gemma-2-2b", "scan": "me/it", **HOOKS}
        )
    )
    return tensors


@pytest.mark.parametrize(("thresholds", "lowest"), [(False, 0.0), (True, 0.1), (True, -0.8)])
def test_the_whole_of_a_published_one_computes_its_formulas(tmp_path: Path, thresholds: bool, lowest: float) -> None:
    t, x = published(tmp_path, thresholds=thresholds, lowest=lowest), drawn(99, 7, L * D) * 2
    sae = SAE.load(tmp_path)
    pre = [x[:, n * D : (n + 1) * D] @ t[f"W_enc_{n}"].T + t[f"b_enc_{n}"] for n in range(L)]
    acts = [torch.where(h > t[f"threshold_{n}"], h, 0.0) if thresholds else h.relu() for n, h in enumerate(pre)]
    out = [sum((acts[n] @ t[f"W_dec_{n}"][:, to - n] for n in range(to + 1)), t[f"b_dec_{to}"]) for to in range(L)]
    assert (torch.cat(acts, 1) < 0).any() == (lowest < 0)
    torch.testing.assert_close(sae.encode(x), torch.cat(acts, dim=1))
    torch.testing.assert_close(sae(x), torch.cat(out, dim=1))
    assert (dict(sae.reads), dict(sae.writes)) == (SITES["reads"], SITES["writes"])
    assert sae.metadata["model_name"] == "google/gemma-2-2b"
    one = SAE.load(tmp_path, overrides=None, format="mntss_clt_layer_transcoder")
    torch.testing.assert_close(one(x), sae(x))
    again = SAE.load(sae.save(tmp_path / "ours"))
    torch.testing.assert_close(again(x), sae(x))


def test_a_single_layer_is_still_a_view_with_the_same_latents(tmp_path: Path) -> None:
    from sae_core.format.files import LocalFiles
    from sae_core.format.read import read_sae

    published(tmp_path, thresholds=True, lowest=-0.8)
    x = drawn(99, 7, L * D) * 2
    whole = SAE.load(tmp_path)
    view = read_sae(LocalFiles(tmp_path), "1", overrides={"decoder": 2})
    torch.testing.assert_close(view.encode(x[:, D : 2 * D]), whole.encode(x)[:, F : 2 * F])


def test_a_set_with_a_file_missing_or_thresholds_in_some_layers_alone_is_refused(tmp_path: Path) -> None:
    t = published(tmp_path, thresholds=True)
    with pytest.raises(ConfigError, match="rows= cannot be used with the whole"):
        SAE.load(tmp_path, rows=[1])
    save_file({name: t[name] for name in ("W_enc_1", "b_enc_1", "b_dec_1")}, tmp_path / "W_enc_1.safetensors")
    with pytest.raises(FormatError, match=r"layers \[0, 2\] have thresholds and the others have none"):
        SAE.load(tmp_path)
    (tmp_path / "W_enc_2.safetensors").unlink()
    with pytest.raises(FormatError, match="writes to 3 layers, but 2 layers have files"):
        SAE.load(tmp_path)


# -- writing -----------------------------------------------------------------------------------------------------------

WRITTEN: dict[str, SAE[Any]] = {
    "cross-layer": cross_layer(),
    "cross-layer, negative thresholds": cross_layer(-0.7, apply_relu=False),
    "cross-layer, negative thresholds under a ReLU": cross_layer(-0.7),
    "cross-layer, scaled": cross_layer(
        normalize_activations="constant_scalar_rescale", activation_normalization_factor=0.4
    ),
    "cross-layer, batchtopk": cross_layer(activation="batchtopk", k=4),
    "relu": filled(create("standard", d_in=D, d_sae=F, d_out=D)),
    "relu, skip": filled(create("standard", d_in=D, d_sae=F, d_out=D, skip=True)),
    "jumprelu": filled(create("jumprelu", d_in=D, d_sae=F, d_out=D)),
    "jumprelu, negative thresholds": filled(
        create("jumprelu", d_in=D, d_sae=F, d_out=D, apply_relu=False, skip=True), -0.7
    ),
    "topk, signed": filled(create("topk", d_in=D, d_sae=F, d_out=D, k=F - 2, apply_relu=False)),
    "batchtopk": filled(create("batchtopk", d_in=D, d_sae=F, d_out=D, k=4)),
}


@pytest.mark.parametrize("case", WRITTEN)
def test_what_is_written_is_the_same_function_when_read_back(case: str, tmp_path: Path) -> None:
    sae = WRITTEN[case]
    notes = convert(sae, "circuit_tracer", tmp_path / "out")
    config = yaml.safe_load((tmp_path / "out/config.yaml").read_text())
    assert {key: config[key] for key in HOOKS} == HOOKS
    assert config["model_name"] == "google/gemma-2-2b"
    assert any("'k' is for readers" in note for note in notes) == (case == "topk, signed")
    again, x = SAE.load(tmp_path / "out"), drawn(98, 9, sae.d_in) * 2
    with torch.no_grad():
        assert sae.encode(x).count_nonzero() > 0
        torch.testing.assert_close(again.encode(x), sae.encode(x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(again(x), sae(x), rtol=1e-5, atol=1e-5)
    if "cross" not in case:
        assert (tmp_path / "out/layer_4.safetensors").exists()
        assert again.metadata["hook_name_out"] == "blocks.4.hook_mlp_out"


def test_what_the_format_cannot_express_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    nowhere = filled(create("standard", d_in=D, d_sae=F, d_out=D))
    nowhere.metadata["hook_name"] = "model.layers.3"
    others = {f"blocks.{n}.hook_resid_mid": D for n in (2, 3, 4)}
    refused: dict[str, SAE[Any]] = {
        "cannot express an SAE": filled(create("standard", d_in=D, d_sae=F)),
        "transcoder of architecture 'gated'": filled(create("gated", d_in=D, d_sae=F, d_out=D)),
        "topk with apply_relu": filled(create("topk", d_in=D, d_sae=F, d_out=D, k=3)),
        "from width 6 to another, 5": filled(create("jumprelu", d_in=D, d_sae=F, d_out=5)),
        "normalize_activations: layer_norm": cross_layer(normalize_activations="layer_norm"),
        "without the layer it belongs to": nowhere,
        "activation: topk, only jumprelu": cross_layer(activation="topk", k=3),
        "layers of several widths": filled(
            create("cross_layer_transcoder", d_in=8, d_sae=4, reads={"a": 4, "b": 4}, writes={"a": 3, "b": 3})
        ),
        "its layers are the model's from 0 on": filled(
            create("cross_layer_transcoder", d_in=L * D, d_sae=L * F, reads=others, writes=SITES["writes"])
        ),
        "several sites": filled(create("standard", d_in=D, d_sae=F, reads={"a": 2, "b": 4}, d_out=D)),
    }
    for said, sae in refused.items():
        with pytest.raises(FormatError, match=said):
            convert(sae, "circuit_tracer", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_latents_below_zero_are_refused_by_formats_that_cut_them_off(tmp_path: Path) -> None:
    signed = filled(create("topk", d_in=D, d_sae=F, k=3, apply_relu=False))
    for to in ("sae_lens", "dictionary_learning", "sparsify"):
        with pytest.raises(FormatError, match=f"{to} cannot express apply_relu: false"):
            convert(signed, to, tmp_path / "out")


def test_sites_that_are_no_hook_points_are_written_with_a_note_and_read_back(tmp_path: Path) -> None:
    sites = {"first": D, "second": D}
    sae = filled(create("cross_layer_transcoder", d_in=2 * D, d_sae=2 * F, reads=sites, writes=sites))
    notes = convert(sae, "circuit_tracer", tmp_path / "out")
    assert sum("config.yaml lacks feature_" in note for note in notes) == 2
    x = drawn(3, 5, 2 * D)
    torch.testing.assert_close(SAE.load(tmp_path / "out")(x), sae(x), rtol=1e-5, atol=1e-5)


RUN = """
import sys, torch
from safetensors.torch import load_file, save_file
from circuit_tracer.transcoder.cross_layer_transcoder import load_clt
from circuit_tracer.transcoder.single_layer_transcoder import load_relu_transcoder
for folder in sys.argv[1:]:
    x = load_file(folder + "/x.safetensors")["x"]
    with torch.no_grad():
        if x.dim() == 3:
            coder = load_clt(folder + "/out", device=torch.device("cpu"), dtype=torch.float32, lazy_decoder=False)
            out = coder(x)
        else:
            coder = load_relu_transcoder(folder + "/out/layer_4.safetensors", 4, torch.device("cpu"), lazy_decoder=False)
            out = coder(x)
    save_file({"out": out.contiguous()}, folder + "/said.safetensors")
"""


@pytest.mark.skipif(
    "SAE_CORE_ORACLE_CT" not in os.environ, reason="SAE_CORE_ORACLE_CT names no Python with circuit-tracer"
)
def test_circuit_tracer_computes_the_same_from_what_is_written(tmp_path: Path) -> None:
    expected: dict[str, Tensor] = {}
    for number, (case, sae) in enumerate(WRITTEN.items()):
        if case == "topk, signed":
            continue
        folder, x = tmp_path / str(number), drawn(98, 9, sae.d_in) * 2
        convert(sae, "circuit_tracer", folder / "out")
        by_layer = x.view(9, L, D).transpose(0, 1).contiguous() if "cross" in case else x
        save_file({"x": by_layer}, folder / "x.safetensors")
        out = sae(x).detach()
        expected[str(folder)] = out.view(9, L, D).transpose(0, 1) if "cross" in case else out
    done = subprocess.run(
        [os.environ["SAE_CORE_ORACLE_CT"], "-c", RUN, *expected], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for folder, out in expected.items():
        torch.testing.assert_close(load_file(f"{folder}/said.safetensors")["out"], out, rtol=1e-4, atol=1e-5)
