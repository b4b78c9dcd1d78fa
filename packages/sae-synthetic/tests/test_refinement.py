"""Leave-one-out pruning: against a loop over entries, worked by hand, and refused where nothing tells what to drop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_core import SAE, SparseCodes, create
from sae_core.errors import ConfigError, ShapeError
from sae_synthetic import prune_codes
from torch import Tensor


def _random_sae(seed: int, **config: Any) -> SAE:
    sae = create("topk", d_in=6, d_sae=12, k=5, decoder_init_norm=0.7, seed=seed, dtype="float64", **config)
    with torch.no_grad():
        dict(sae.named_parameters())["W_dec"].mul_(
            torch.rand(12, 1, generator=torch.Generator().manual_seed(seed)) + 0.5
        )
    return sae


def _by_hand(sae: SAE, x: Tensor, least: float) -> Tensor:
    """The same, row by row and entry by entry, from errors alone."""
    f = sae.encode(x)
    for row in range(len(f)):
        parts = sae.decode(f[row].diag()) - sae.decode(torch.zeros_like(f[:1]))
        wanted = least * float(parts.square().sum()) / max(int((f[row] != 0).sum()), 1)
        while True:
            error = float((sae.decode(f)[row] - x[row]).square().sum())
            costs: dict[int, float] = {}
            for j in f[row].nonzero().squeeze(1).tolist():
                without = f.clone()
                without[row, j] = 0
                costs[j] = float((sae.decode(without)[row] - x[row]).square().sum()) - error
            if not costs or min(costs.values()) >= wanted:
                break
            f[row, min(costs, key=costs.__getitem__)] = 0
    return f


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10_000), least=st.floats(0.02, 1.0), rescale=st.booleans())
@torch.no_grad()
def test_the_least_useful_entry_goes_first_until_all_are_useful(seed: int, least: float, rescale: bool) -> None:
    sae = _random_sae(seed, rescale_acts_by_decoder_norm=rescale)
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    torch.testing.assert_close(prune_codes(sae, x, least=least).to_dense(), _by_hand(sae, x, least))


def test_of_two_latents_that_say_the_same_one_stays() -> None:
    sae = create("topk", d_in=2, d_sae=3, k=2, apply_b_dec_to_input=False)
    directions = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    with torch.no_grad():
        for name in ("W_dec", "encoder"):
            dict(sae.named_parameters())[name].copy_(directions)
    codes = SparseCodes.from_dense(torch.tensor([[1.0, 1.0, 0.0], [0.5, 0.5, 0.0]]))
    x = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    assert prune_codes(sae, x, codes).to_dense().count_nonzero(dim=1).tolist() == [1, 2]  # two halves are both needed


@pytest.mark.parametrize("normalize", ["layer_norm", "constant_norm_rescale"])
def test_shapes_and_values_stay_under_every_normalisation(normalize: str) -> None:
    sae = _random_sae(3, normalize_activations=normalize)
    x = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 9 + 2
    codes, pruned = sae.encode_sparse(x), prune_codes(sae, x, least=0.3)
    assert pruned.shape == codes.shape == (2, 3, 12)
    before, after = codes.to_dense(), pruned.to_dense()
    assert bool(((after == before) | (after == 0)).all())
    assert 0 < int((after != 0).sum()) < int((before != 0).sum())
    torch.testing.assert_close(after, prune_codes(sae, x, codes, least=0.3).to_dense())


def test_rows_without_an_active_latent_stay_empty() -> None:
    sae = _random_sae(0)
    empty = SparseCodes.from_dense(torch.zeros(3, 12, dtype=torch.float64))
    assert prune_codes(sae, torch.ones(3, 6, dtype=torch.float64), empty).values.numel() == 0


def test_what_cannot_be_pruned_is_refused() -> None:
    sae, x = _random_sae(0), torch.ones(3, 6, dtype=torch.float64)
    for least in (0.0, -0.1, 1.5):
        with pytest.raises(ConfigError, match=r"least must be in \(0, 1\]"):
            prune_codes(sae, x, least=least)
    with pytest.raises(ShapeError, match=r"codes \(2, 12\) are not \(3, 12\)"):
        prune_codes(sae, x, sae.encode_sparse(x[:2]))
    with pytest.raises(ConfigError, match="a transcoder's target is not known"):
        prune_codes(create("topk", d_in=6, d_sae=12, k=5, d_out=4), torch.ones(3, 6))
