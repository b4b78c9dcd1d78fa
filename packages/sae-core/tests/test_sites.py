"""Sites: named slices of columns, their norms, and what SAEs say they read and write."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_core import SAE, create
from sae_core.errors import ConfigError
from sae_core.normalization import Normalization
from sae_core.sites import Sites
from torch import Tensor

widths = st.dictionaries(st.text(max_size=5), st.integers(1, 6), min_size=1, max_size=5)
some = settings(max_examples=25, deadline=None)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@some
@given(widths)
def test_slices_lie_side_by_side_in_the_order_of_the_names(sites: dict[str, int]) -> None:
    made = Sites(sites)
    slices = made.slices()
    assert list(slices) == list(sites)
    assert made.total == sum(sites.values())
    assert made.sizes == [part.stop - part.start for part in slices.values()] == list(sites.values())
    columns = torch.arange(made.total)
    assert torch.equal(torch.cat([columns[part] for part in slices.values()]), columns)


@some
@given(widths, st.integers(0, 1000))
def test_norms_of_sites_add_up_and_the_joint_norm_is_the_root_of_their_squares(
    sites: dict[str, int], seed: int
) -> None:
    made = Sites(sites)
    W = drawn(3, made.total, seed=seed)
    parts = torch.stack([W[:, part].square().sum(-1).sqrt() for part in made.slices().values()])
    torch.testing.assert_close(made.per_site_norms(W), parts)
    torch.testing.assert_close(made.norms(W), parts.sum(0))
    torch.testing.assert_close(made.norms(W, "joint"), parts.square().sum(0).sqrt())


@pytest.mark.parametrize("kind", ["sum_of_sites", "joint"])
def test_a_row_of_zeros_has_the_norm_zero_and_no_gradient(kind: Any) -> None:
    W = torch.zeros(2, 5, requires_grad=True)
    norms = Sites({"a": 2, "b": 3}).norms(W, kind)
    norms.sum().backward()
    assert norms.tolist() == [0.0, 0.0]
    assert torch.equal(W.grad, torch.zeros(2, 5))


def test_without_names_there_is_one_unnamed_site() -> None:
    assert dict(Sites.of({}, 7, "reads").widths) == {"": 7}
    assert dict(Sites.of({"a": 3, "b": 4}, 7, "reads").widths) == {"a": 3, "b": 4}


def test_widths_that_do_not_fit_are_refused_with_the_numbers() -> None:
    with pytest.raises(ConfigError, match=r"reads: widths \{'a': 3, 'b': 3\} add up to 6, not to 7"):
        Sites.of({"a": 3, "b": 3}, 7, "reads")
    with pytest.raises(ConfigError, match="there must be at least one"):
        Sites({})
    with pytest.raises(ConfigError, match="width of 'b' must be positive, not 0"):
        Sites({"a": 3, "b": 0})


A, B = {"a": 4, "b": 2}, {"u": 1, "v": 4}


@pytest.mark.parametrize(
    ("config", "reads", "writes"),
    [
        ({}, {"": 6}, {"": 6}),
        ({"d_out": 5}, {"": 6}, {"": 5}),
        ({"reads": A}, A, A),
        ({"reads": A, "writes": A}, A, A),
        ({"reads": A, "d_out": 5}, A, {"": 5}),
        ({"writes": B, "d_out": 5, "skip": True}, {"": 6}, B),
        ({"reads": A, "writes": B, "d_out": 5}, A, B),
    ],
)
def test_an_sae_says_what_it_reads_and_writes(
    config: dict[str, Any], reads: dict[str, int], writes: dict[str, int]
) -> None:
    sae = create("standard", d_in=6, d_sae=12, **config)
    assert (list(sae.reads.items()), list(sae.writes.items())) == (list(reads.items()), list(writes.items()))
    assert (sae.d_in, sae.d_out) == (6, sum(writes.values()))
    assert sae.encoder.shape == (12, 6)
    assert sae.encoder.is_contiguous()
    assert sae.W_enc.shape == (6, 12)
    assert sae.W_enc.data_ptr() == sae.encoder.data_ptr()
    assert sae(torch.ones(3, 6)).shape == (3, sae.d_out)


@pytest.mark.parametrize(
    ("architecture", "fields"), [("matching_pursuit", {}), ("temporal", {"n_heads": 2, "bottleneck_factor": 2})]
)
def test_architectures_outside_the_linear_frame_read_and_write_one_site(
    architecture: str, fields: dict[str, Any]
) -> None:
    sae = create(architecture, d_in=6, d_sae=12, **fields)
    assert dict(sae.reads) == dict(sae.writes) == {"": 6}


@pytest.mark.parametrize(
    "name", ["layer_norm", "constant_norm_rescale", "expected_average_only_in", "covariance_whitening"]
)
def test_sites_are_normalised_as_if_each_were_alone(name: Any) -> None:
    x = torch.cat([drawn(50, 4, seed=1) * 3 + 1, drawn(50, 3, seed=2) * 100], -1)
    whole = Normalization(name, Sites({"a": 4, "b": 3})).double()
    whole.fit([x[:20], x[20:]])
    z, units = whole(x)
    for part, done in zip(x.split([4, 3], -1), z.split([4, 3], -1), strict=True):
        alone = Normalization(name, part.shape[-1]).double()
        alone.fit([part])
        torch.testing.assert_close(done, alone(part)[0])
    torch.testing.assert_close(units.undo(z), x, rtol=1e-4, atol=1e-4)
    if whole.folds:
        fixed = whole.fixed_map()
        centred = x - fixed.shift
        torch.testing.assert_close(z, centred @ fixed.matrix if fixed.matrix.dim() == 2 else centred * fixed.matrix)
        assert whole.uniform_scale is None  # each site has its own
        torch.testing.assert_close(whole.restore(z), x)


def test_latents_of_a_crosscoder_are_ranked_by_the_norms_of_its_sites_added_up() -> None:
    """(3, 4 | 0) has the larger joint norm, (2 | 4) the larger sum."""
    chosen: list[list[int]] = []
    for kind in ("joint", "sum_of_sites"):
        sae: SAE[Any] = create(
            "topk", d_in=3, d_sae=2, k=1, reads={"a": 2, "b": 1}, decoder_norm=kind, apply_b_dec_to_input=False
        )
        with torch.no_grad():
            sae.encoder.copy_(torch.ones(2, 3))
            sae.W_dec.copy_(torch.tensor([[3.0, 4.0, 0.0], [2.0, 0.0, 4.0]]))
        codes = sae.encode_sparse(torch.ones(1, 3))
        chosen.append(codes.indices.tolist())
        assert codes.values.item() == pytest.approx(3 * {"joint": 5.0, "sum_of_sites": 6.0}[kind])
    assert chosen == [[0], [1]]
