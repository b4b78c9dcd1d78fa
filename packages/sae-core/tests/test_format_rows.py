from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_core import SAE, create
from sae_core.errors import ConfigError, FormatError
from safetensors.torch import load_file, save_file

X = torch.randn(7, 6, generator=torch.Generator().manual_seed(0))
ROWS = [9, 0, 4]


SHAPES: dict[str, dict[str, Any]] = {
    "SAE": {},
    "transcoder": {"d_out": 5},
    "skip transcoder": {"d_out": 5, "skip": True},
    "crosscoder": {"reads": {"a": 4, "b": 2}},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("architecture", "fields"), [("standard", {}), ("gated", {}), ("jumprelu", {"jumprelu_init_threshold": 0.02})]
)
def test_rows_loads_some_latents_with_the_values_they_have_among_all(
    tmp_path: Path, architecture: str, fields: dict[str, Any], shape: str
) -> None:
    fields = fields | SHAPES[shape]
    whole = create(architecture, d_in=6, d_sae=12, seed=1, **fields).eval()
    some = SAE.load(whole.save(tmp_path / "sae"), rows=ROWS)
    assert (some.d_sae, some.metadata["rows"]) == (3, ROWS)
    torch.testing.assert_close(some.encode(X), whole.encode(X)[:, ROWS])
    assert torch.equal(some.W_dec, whole.W_dec[ROWS])
    assert torch.equal(some.b_dec, whole.b_dec)
    assert bool(some.encode(X).any())
    assert (some.reads, some.writes) == (whole.reads, whole.writes)
    if shape == "skip transcoder":
        assert torch.equal(some.W_skip, whole.W_skip)


@pytest.mark.parametrize(
    ("architecture", "fields"),
    [
        ("topk", {"k": 2}),
        ("topk", {"k": 2, "d_out": 5, "skip": True}),
        ("groupmax", {"k": 2}),
        ("abstopk", {"k": 2, "reads": {"a": 4, "b": 2}}),
        ("matching_pursuit", {}),
        ("temporal", {"n_heads": 2, "bottleneck_factor": 2, "kval_topk": 2}),
    ],
)
def test_rows_is_refused_where_latents_compete(tmp_path: Path, architecture: str, fields: dict[str, Any]) -> None:
    sae = create(architecture, d_in=6, d_sae=12, **fields)
    with pytest.raises(ConfigError, match="its latents compete"):
        SAE.load(sae.save(tmp_path / "sae"), rows=ROWS)


def test_rows_outside_the_dictionary_and_tensors_that_do_not_fit_it_are_refused(tmp_path: Path) -> None:
    folder = create("standard", d_in=6, d_sae=12).save(tmp_path / "sae")
    for rows in ([12], [13]):
        with pytest.raises(ConfigError, match=rf"rows must lie in \[0, d_sae = 12\), not {rows[0]}"):
            SAE.load(folder, rows=rows)
    tensors = load_file(folder / "sae_weights.safetensors")
    save_file(tensors | {"b_enc": torch.zeros(13)}, folder / "sae_weights.safetensors")
    with pytest.raises(FormatError, match="'b_enc' has shape"):
        SAE.load(folder, rows=ROWS)


def test_some_latents_can_be_saved_and_loaded_again(tmp_path: Path) -> None:
    whole = create("jumprelu", d_in=6, d_sae=12, seed=1).eval()
    some = SAE.load(whole.save(tmp_path / "whole"), rows=ROWS)
    again = SAE.load(some.save(tmp_path / "some"))
    assert torch.equal(again.encode(X), some.encode(X))
    assert again.metadata["rows"] == ROWS
    assert dataclasses.asdict(again.config)["d_sae"] == 3
