"""SAEs are copied, pickled, sent to other processes and kept as state, whatever they are made of, and stay what they are."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_core import SAE, ActivationBatch, create
from sae_core.errors import ConfigError
from safetensors.torch import load_file, save_file
from torch import Tensor

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "standard": ("standard", {}),
    "gated": ("gated", {}),
    "topk": ("topk", {"k": 4}),
    "abstopk": ("abstopk", {"k": 4}),
    "groupmax": ("groupmax", {"k": 4}),
    "batchtopk": ("batchtopk", {"k": 3}),
    "matryoshka_batchtopk": ("matryoshka_batchtopk", {"k": 3, "matryoshka_widths": [4, 8]}),
    "jumprelu": ("jumprelu", {}),
    "matching_pursuit": ("matching_pursuit", {"max_iterations": 4}),
    "temporal": ("temporal", {"n_heads": 2, "bottleneck_factor": 2}),
    "skip transcoder": ("topk", {"k": 4, "d_out": 5, "skip": True}),
    "crosscoder": ("jumprelu", {"reads": {"a": 4, "b": 2}}),
}
NORMALISATIONS = (
    "none",
    "layer_norm",
    "constant_norm_rescale",
    "constant_scalar_rescale",
    "expected_average_only_in",
    "covariance_whitening",
)
REFUSED = {("matching_pursuit", "covariance_whitening"), ("temporal", "covariance_whitening")}
PAIRS = [(kind, n) for kind in KINDS for n in NORMALISATIONS if (kind, n) not in REFUSED]
every_pair = pytest.mark.parametrize(("kind", "normalisation"), PAIRS)
X = torch.randn(20, 6, generator=torch.Generator().manual_seed(0)) * 2 + 1
T = torch.randn(20, 5, generator=torch.Generator().manual_seed(1)) * 3


def new(kind: str, normalisation: str, seed: int = 0) -> SAE[Any]:
    architecture, config = KINDS[kind]
    factor = {"activation_normalization_factor": 0.7} if normalisation == "constant_scalar_rescale" else {}
    return create(architecture, d_in=6, d_sae=16, seed=seed, normalize_activations=normalisation, **factor, **config)


def pairs(sae: SAE[Any]) -> ActivationBatch:
    return ActivationBatch(X, None if sae.reconstructs_input else T)


def trained(kind: str, normalisation: str) -> SAE[Any]:
    """After a step of training, so that buffers have moved and parameters hold gradients; in train mode, with metadata."""
    sae = new(kind, normalisation).train()
    sae.metadata["hook_name"] = "blocks.3.hook_resid_pre"
    sae.fit_normalization(pairs(sae))
    sae.training_step(pairs(sae)).loss.backward()
    with torch.no_grad():
        for parameter in sae.parameters():
            if parameter.grad is not None:
                parameter.sub_(0.01 * parameter.grad)
        sae.after_step()
    return sae


@torch.no_grad()
def is_the_same(copied: SAE[Any], sae: SAE[Any]) -> None:
    assert type(copied) is type(sae)
    assert (copied.config, copied.metadata, copied.training) == (sae.config, sae.metadata, sae.training)
    state, expected = copied.state_dict(), sae.state_dict()
    assert list(state) == list(expected)
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor), name
        assert state[name].data_ptr() != tensor.data_ptr(), name
    assert [(n, p.requires_grad) for n, p in copied.named_parameters()] == [
        (n, p.requires_grad) for n, p in sae.named_parameters()
    ]
    assert torch.equal(copied.training_step(pairs(copied)).loss, sae.training_step(pairs(sae)).loss)
    assert torch.equal(copied.eval()(X), sae.eval()(X))
    output = sae(X)
    for tensor in copied.state_dict().values():
        tensor.zero_()
    assert torch.equal(sae(X), output)


def pickled(sae: SAE[Any]) -> SAE[Any]:
    return pickle.loads(pickle.dumps(sae))


def saved_by_torch(sae: SAE[Any]) -> SAE[Any]:
    buffer = io.BytesIO()
    torch.save(sae, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


WAYS: dict[str, Callable[[SAE[Any]], SAE[Any]]] = {
    "copy.deepcopy": copy.deepcopy,
    "pickle": pickled,
    "torch.save": saved_by_torch,
}


@every_pair
@pytest.mark.parametrize("way", WAYS)
def test_a_copy_is_the_same_and_independent(way: str, kind: str, normalisation: str) -> None:
    sae = trained(kind, normalisation)
    is_the_same(WAYS[way](sae), sae)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("normalisation", ["expected_average_only_in", "covariance_whitening"])
def test_a_copy_of_an_sae_without_statistics_has_none_either_and_takes_its_own(way: str, normalisation: str) -> None:
    sae = new("skip transcoder", normalisation)
    copied = WAYS[way](sae)
    with pytest.raises(ConfigError, match=r"sae\.fit_normalization\(batch\)"):
        copied(X)
    copied.fit_normalization(pairs(copied))
    assert copied(X).isfinite().all()
    assert not sae.normalization.fitted


@every_pair
def test_the_state_goes_through_a_safetensors_file(kind: str, normalisation: str, tmp_path: Path) -> None:
    """Which takes neither tensors that are not contiguous nor tensors that share memory."""
    sae, fresh = trained(kind, normalisation).eval(), new(kind, normalisation, seed=5).eval()
    save_file(sae.state_dict(), tmp_path / "state.safetensors")
    fresh.load_state_dict(load_file(tmp_path / "state.safetensors"))
    assert torch.equal(fresh(X), sae(X))
    assert fresh.normalization.fitted
    assert fresh.target_normalization is None or fresh.target_normalization.fitted


def files(folder: Path) -> tuple[str, dict[str, Tensor]]:
    return (folder / "cfg.json").read_text(), load_file(folder / "sae_weights.safetensors")


def test_a_spawned_process_takes_an_sae_as_argument(tmp_path: Path) -> None:
    """It saves what it was given; the files are those that this process writes. One process is asked for all of them."""
    saes = [trained(kind, normalisation) for kind, normalisation in PAIRS]
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        theirs = [pool.submit(SAE.save, sae, tmp_path / "theirs" / str(i)) for i, sae in enumerate(saes)]
        for i, (sae, future) in enumerate(zip(saes, theirs, strict=True)):
            cfg, tensors = files(future.result(timeout=300))
            expected_cfg, expected = files(sae.save(tmp_path / "ours" / str(i)))
            assert cfg == expected_cfg
            assert tensors.keys() == expected.keys()
            assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())
