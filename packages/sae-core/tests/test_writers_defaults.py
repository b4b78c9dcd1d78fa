"""A file means what its writer meant: fields that cfg.json lacks, facts beside the fields, and what the caller adds.

`golden/sae_lens_defaults.json` holds the defaults of SAELens's own config classes, version by version; the folders
``wild/*`` of `golden/sae_lens_files` are compared with SAELens's answers in `test_golden_files`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_core import SAE, create
from sae_core.errors import ConfigError, FormatError
from sae_core.format.files import LocalFiles
from sae_core.format.hook_names import spell_hook_name
from sae_core.format.sae_lens import SaeLensLoader
from safetensors.torch import save_file

DEFAULTS = json.loads((Path(__file__).parent / "golden" / "sae_lens_defaults.json").read_text())
CASES = [(version, name) for version, classes in DEFAULTS.items() for name in classes]


def folder_of(path: Path, cfg: dict[str, Any]) -> Path:
    path.mkdir()
    (path / "cfg.json").write_text(json.dumps(cfg))
    d_in, d_sae = cfg.get("d_in", 4), cfg.get("d_sae", 8)
    random = torch.Generator().manual_seed(0)
    tensors = {
        "W_enc": torch.randn(d_in, d_sae, generator=random),
        "W_dec": torch.randn(d_sae, d_in, generator=random),
        "b_enc": torch.randn(d_sae, generator=random),
        "b_dec": torch.randn(d_in, generator=random),
    }
    if cfg.get("architecture") == "jumprelu":
        tensors["threshold"] = torch.rand(d_sae, generator=random)
    save_file(tensors, path / "sae_weights.safetensors")
    return path


@pytest.mark.parametrize(("version", "name"), CASES)
def test_a_missing_field_has_the_default_of_the_version_that_wrote_the_file(
    tmp_path: Path, version: str, name: str
) -> None:
    needed = {"d_in": 4, "d_sae": 8}
    refused = {"apply_b_dec_to_input": False} if name.endswith("transcoder") else {}  # SAELens refuses its own default
    cfg = {"architecture": name, "metadata": {"sae_lens_version": version}, **needed}
    path = folder_of(tmp_path / "sae", cfg)
    config = SaeLensLoader().load(LocalFiles(path), weights=False).config
    expected = {"rescale_acts_by_decoder_norm": False} if name in ("topk", "abstopk") else {}
    expected |= DEFAULTS[version][name] | needed | refused
    assert {key: config.get(key, expected[key]) for key in expected} == expected
    assert set(config) >= set(expected)


@pytest.mark.parametrize("stated", [{}, {"sae_lens_version": "5.11.0"}, {"metadata": {"sae_lens_version": "4.4.5"}}])
def test_a_file_that_states_no_version_of_6_keeps_its_fields(tmp_path: Path, stated: dict[str, Any]) -> None:
    path = folder_of(
        tmp_path / "sae", {"architecture": "topk", "d_in": 4, "d_sae": 8, "k": 3, "dtype": "float32", **stated}
    )
    sae = SAE.load(path)
    assert (sae.config.k, sae.config.rescale_acts_by_decoder_norm) == (3, False)  # pyright: ignore[reportAttributeAccessIssue]
    assert int(sae.encode_sparse(torch.randn(50, 4)).l0().max()) <= 3
    assert "k" not in sae.metadata


def test_a_misspelt_field_of_a_flat_config_is_no_fact(tmp_path: Path) -> None:
    path = folder_of(tmp_path / "sae", {"d_in": 4, "d_sae": 8, "normalise_activations": "layer_norm", "lr": 1e-3})
    with pytest.raises(FormatError, match=r"unknown key 'normalise_activations'.*did you mean 'normalize_activations'"):
        SAE.load(path)
    sae = SAE.load(path, overrides={"ignore_keys": ["normalise_activations"]})
    assert sae.metadata["lr"] == 1e-3


CURRENT = {"architecture": "jumprelu", "d_in": 4, "d_sae": 8, "metadata": {"sae_lens_version": "6.20.1"}}


def test_facts_beside_the_fields_are_facts_as_if_they_stood_under_metadata(tmp_path: Path) -> None:
    facts = {"model_name": "tiny", "hook_name": "blocks.3.hook_resid_post", "context_size": 128, "hook_layer": 3}
    sae = SAE.load(folder_of(tmp_path / "sae", {**CURRENT, **facts}))
    assert {key: sae.metadata[key] for key in facts} == facts


def test_a_fact_that_contradicts_the_metadata_is_named(tmp_path: Path) -> None:
    cfg = {**CURRENT, "model_name": "a", "metadata": {"sae_lens_version": "6.20.1", "model_name": "b"}}
    path = folder_of(tmp_path / "sae", cfg)
    with pytest.raises(FormatError, match="'model_name' is 'a', but 'b' under 'metadata'"):
        SAE.load(path)
    assert SAE.load(path, overrides={"ignore_keys": ["model_name"]}).metadata["model_name"] == "b"


def test_a_key_that_nobody_knows_is_refused_unless_the_caller_declares_it_harmless(tmp_path: Path) -> None:
    path = folder_of(tmp_path / "sae", {**CURRENT, "colour": "red"})
    with pytest.raises(FormatError, match=r"unknown key 'colour'.*ignore_keys=\['colour'\]"):
        SAE.load(path)
    assert "colour" not in SAE.load(path, overrides={"ignore_keys": ["colour"]}).metadata


def test_an_unknown_fact_is_an_error_and_known_ones_go_where_they_belong(tmp_path: Path) -> None:
    path = folder_of(tmp_path / "sae", CURRENT)
    with pytest.raises(ConfigError, match="unknown fact 'hook_nmae'; did you mean 'hook_name'"):
        SAE.load(path, overrides={"hook_nmae": "blocks.1.hook_resid_post"})
    sae = SAE.load(path, overrides={"hook_name": "blocks.1.hook_resid_post", "apply_b_dec_to_input": False})
    assert sae.metadata["hook_name"] == "blocks.1.hook_resid_post"
    assert sae.config.apply_b_dec_to_input is False
    with pytest.raises(ConfigError, match="ignore_keys must be a list"):
        SAE.load(path, overrides={"ignore_keys": "colour"})


def test_hook_points_are_spelt_the_same_whichever_way_they_come_in(tmp_path: Path) -> None:
    cfg = {**CURRENT, "metadata": {"sae_lens_version": "6.20.1", "hf_hook_name": "model.layers.1.mlp.output"}}
    path = folder_of(tmp_path / "sae", cfg)
    assert SAE.load(path).metadata["hf_hook_name"] == "model.layers.1.mlp"
    given = SAE.load(path, overrides={"hf_hook_name": "model.layers.1.self_attn.o_proj.input"})
    assert given.metadata["hf_hook_name"] == "model.layers.1.self_attn.o_proj:input"


@pytest.mark.parametrize(
    "name",
    ["blocks.3.hook_mlp_out", "transformer.h.3", "esm.encoder.layer.0.output", "model.layers.2:input", "layers.7"],
)
def test_names_that_are_modules_already_stay_as_they_are(name: str) -> None:
    assert spell_hook_name(name) == name


def test_what_we_save_holds_every_field(tmp_path: Path) -> None:
    """So that no reader has to know our defaults."""
    sae = create("topk", d_in=4, d_sae=8, k=2, rescale_acts_by_decoder_norm=False)
    cfg = json.loads((sae.save(tmp_path / "sae") / "cfg.json").read_text())
    assert {"k", "rescale_acts_by_decoder_norm", "apply_b_dec_to_input", "normalize_activations"} <= set(cfg)
