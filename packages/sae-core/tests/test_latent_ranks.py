"""Latents that are shared out over ranks: the choice, the loss and the gradients of one process that has them all."""

from __future__ import annotations

import errno
import os
import threading
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sae_core import SAE, TrainConfig, Trainer, create
from sae_core.codes import SparseCodes
from sae_core.config import structure
from sae_core.errors import ConfigError, FormatError
from sae_core.format.slices import crc32_moved
from sae_core.latent_ranks import latents_over
from sae_core.ops.batch_topk import BatchTopK
from sae_core.ops.encode import encode_entries
from sae_core.ops.product import EncoderProduct
from sae_core.ops.screening import encoder_products
from sae_core.ops.select import AbsTopK, GroupMax, Selection, TopK
from sae_core.sae import StepContext
from sae_core.testing.rank_threads import ThreadRanks, on_ranks
from sae_core.training.checkpoint import read_checkpoint
from sae_core.training.trainer import Progress
from torch import Tensor

SELECTIONS: dict[str, Any] = {"topk": TopK, "abstopk": AbsTopK, "batchtopk": BatchTopK, "groupmax": GroupMax}


@given(data=st.data())
def test_a_selection_over_ranks_is_that_of_one_process_ties_included(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(sorted(SELECTIONS)))
    size, rows = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 6))
    groups = data.draw(st.integers(1, 4)) * size
    d_sae = groups * data.draw(st.integers(1, 5))
    k = groups if kind == "groupmax" else data.draw(st.integers(1, d_sae))
    few = data.draw(st.integers(1, 6))  # different values, so that many are equal
    drawn = torch.Generator().manual_seed(data.draw(st.integers(0, 2**16)))
    pre_RF = torch.randint(-few, few + 1, (rows, d_sae), generator=drawn).float()
    scale_F = torch.randint(0, 3, (d_sae,), generator=drawn).float() if data.draw(st.booleans()) else None

    def select(selected: slice) -> SparseCodes:
        scale = None if scale_F is None else scale_F[selected]
        selection: Selection = SELECTIONS[kind](k, scale)
        zeros = torch.zeros(pre_RF[:, selected].shape[1])
        return encode_entries(torch.eye(rows), None, pre_RF[:, selected].T.contiguous(), zeros, selection)

    def on_rank(ranks: ThreadRanks) -> Tensor:
        width = d_sae // ranks.size
        with latents_over(ranks), encoder_products("full"):
            return _kept(select(slice(ranks.rank * width, (ranks.rank + 1) * width)))

    with encoder_products("full"):
        expected = _kept(select(slice(0, d_sae)))
    assert torch.equal(torch.cat(on_ranks(size, on_rank), dim=1), expected)


def _kept(codes: SparseCodes) -> Tensor:
    """(rows, d_sae): whether an entry was kept, and its value beside that, since it may be zero."""
    shape = (codes.rows, codes.d_sae)
    kept, values = torch.zeros(shape), torch.zeros(shape)
    kept[codes.row_ids(), codes.indices] = 1.0
    values[codes.row_ids(), codes.indices] = codes.values
    return kept + 100 * values


D_IN, D_SAE, ROWS = 12, 64, 48
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "standard": ("standard", {}),
    "standard, p < 1": ("standard", {"lp_norm": 0.5, "lp_norm_keeps_scale": True}),
    "topk": ("topk", {"k": 7}),
    "topk, few to a rank": ("topk", {"k": 40}),
    "topk transcoder": ("topk", {"k": 7, "d_out": 9, "skip": True}),
    "topk crosscoder": ("topk", {"k": 7, "reads": {"a": 5, "b": 7}}),
    "batchtopk": ("batchtopk", {"k": 7}),
    "batchtopk, k not whole": ("batchtopk", {"k": 3.7, "rescale_acts_by_decoder_norm": False}),
    "jumprelu": ("jumprelu", {"jumprelu_bandwidth": 0.3, "pre_act_loss_coefficient": 0.1}),
    "jumprelu, tanh": ("jumprelu", {"jumprelu_bandwidth": 0.3, "jumprelu_sparsity_loss_mode": "tanh"}),
    "jumprelu, quadratic": (
        "jumprelu",
        {"jumprelu_bandwidth": 0.3, "jumprelu_sparsity_loss_mode": "quadratic", "target_l0": 5.0},
    ),
    "abstopk": ("abstopk", {"k": 7}),
    "groupmax": ("groupmax", {"k": 8}),
    "gated": ("gated", {}),
    "gated transcoder": ("gated", {"d_out": 9, "skip": True, "freeze_decoder_in_aux": True}),
    "matryoshka": ("matryoshka_batchtopk", {"k": 7, "matryoshka_widths": [5, 20, 40]}),
    "matryoshka, losses of levels": (
        "matryoshka_batchtopk",
        {"k": 7, "matryoshka_widths": [5, 20, 40], "use_matryoshka_aux_loss": True},
    ),
    "layer_norm": ("topk", {"k": 7, "normalize_activations": "layer_norm"}),
}


def _sae(form: str) -> SAE:
    architecture, fields = FORMS[form]
    sae = create(architecture, d_in=D_IN, d_sae=D_SAE, seed=3, decoder_init_norm=0.7, dtype="float64", **fields)
    with torch.no_grad():
        sae.get_parameter("b_dec").copy_(torch.linspace(-0.3, 0.3, sae.d_out))
        if "threshold" in dict(sae.named_parameters()):
            sae.get_parameter("threshold").fill_(0.05)
    return sae.train()


def _batch(sae: SAE) -> tuple[Tensor, Tensor | None]:
    drawn = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, D_IN, generator=drawn, dtype=torch.float64)
    return x, None if sae.reconstructs_input else torch.randn(ROWS, sae.d_out, generator=drawn, dtype=torch.float64)


DEAD = torch.tensor([3, 4, 5, 30])  # with four ranks, two hold none of them


def _step(sae: SAE) -> dict[str, Tensor]:
    """Losses, the output, gradients and counts of a step, and what follows it in eval mode."""
    from sae_core.protocols import ActivationBatch

    here = [number - sae.latent_range.start for number in DEAD.tolist() if number in sae.latent_range]
    context = StepContext(progress=0.5, dead=torch.tensor(here, dtype=torch.long), dead_elsewhere=len(DEAD) - len(here))
    output = sae.training_step(ActivationBatch(*_batch(sae)), context)
    output.loss.backward()
    with latents_over(sae.ranks):
        found = {"l0": output.codes.l0(), "fired": output.codes.firing_counts()}
    found |= {"reconstruction": output.reconstruction.detach(), "loss": output.loss.detach()}
    found |= {f"loss {name}": value.detach() for name, value in output.losses.items()}
    found |= {f"metric {name}": value.detach() for name, value in output.metrics.items()}
    for name, parameter in sae.named_parameters():
        found[f"weight {name}"] = parameter.detach()
        found[f"gradient {name}"] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    found |= {f"buffer {name}": buffer for name, buffer in sae.named_buffers()}
    with torch.no_grad():
        found["output"] = sae.eval()(_batch(sae)[0])
        found["latents"] = sae.encode(_batch(sae)[0])
    return found


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("form", FORMS)
def test_a_step_over_ranks_is_that_of_one_process(form: str, size: int) -> None:
    def on_rank(ranks: ThreadRanks) -> tuple[range, dict[str, Tensor]]:
        with latents_over(ranks):
            sae = _sae(form)
        return sae.latent_range, _step(sae)

    whole = _sae(form)
    expected = _step(whole)
    found = on_ranks(size, on_rank)
    assert [latents.start for latents, _ in found] == list(range(0, D_SAE, D_SAE // size))
    for latents, step in found:
        assert step.keys() == expected.keys()
        for name, value in step.items():
            wanted = expected[name]
            kind, _, tensor = name.partition(" ")
            if (kind in ("weight", "gradient", "buffer") and whole.axis(tensor).latent == 0) or name == "fired":
                wanted = wanted[latents.start : latents.stop]
            elif name == "latents":
                wanted = wanted[:, latents.start : latents.stop]
            exact = kind == "weight" or name in ("l0", "fired")
            tolerance = 0.0 if exact else 1e-10
            assert value.shape == wanted.shape, name
            assert torch.allclose(value, wanted, rtol=tolerance, atol=tolerance), name


def test_what_cannot_be_shared_out_is_refused() -> None:
    def refused(match: str, architecture: str, **fields: Any) -> None:
        def on_rank(ranks: ThreadRanks) -> None:
            with latents_over(ranks), pytest.raises(ConfigError, match=match):
                create(architecture, d_in=4, **fields).encode(torch.ones(1, 4))

        on_ranks(3, on_rank)

    refused("d_sae = 16 latents cannot be shared out evenly over 3 ranks", "topk", d_sae=16, k=2)
    refused("d_sae = 2 latents cannot", "standard", d_sae=2)
    refused("matching_pursuit: latents of this architecture cannot be shared out", "matching_pursuit", d_sae=6)
    refused("k = 2 groups of latents cannot be shared out evenly over 3 ranks", "groupmax", d_sae=6, k=2)


def test_a_selection_that_does_not_know_of_ranks_is_refused() -> None:
    class First:
        def __call__(self, product: EncoderProduct) -> SparseCodes:
            ones = torch.ones(product.rows, 1)
            return SparseCodes.regular(ones, ones.long(), product.d_sae)

    def on_rank(ranks: ThreadRanks) -> None:
        with latents_over(ranks), pytest.raises(ConfigError, match="First: this selection does not say"):
            encode_entries(torch.ones(1, 2), None, torch.ones(3, 2), torch.zeros(3), First())

    on_ranks(2, on_rank)


def test_a_dictionary_beside_one_that_is_shared_out_is_whole() -> None:
    whole = create("topk", d_in=4, d_sae=8, k=2)
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    expected = whole(x)

    def on_rank(ranks: ThreadRanks) -> None:
        with latents_over(ranks):
            assert torch.equal(whole(x), expected)
        assert not ranks.calls

    on_ranks(2, on_rank)


SAVED = ["standard", "topk crosscoder", "topk transcoder", "jumprelu", "batchtopk", "gated", "matryoshka", "groupmax"]


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("form", [*SAVED, "whitened"])
def test_ranks_write_the_bytes_that_one_process_writes_and_read_their_own(form: str, size: int, tmp_path: Path) -> None:
    def made() -> SAE:
        if form != "whitened":
            return _sae(form)
        sae = create("batchtopk", d_in=D_IN, d_sae=D_SAE, k=5, seed=1, normalize_activations="covariance_whitening")
        sae.fit_normalization(torch.randn(300, D_IN, generator=torch.Generator().manual_seed(1)))
        return sae.train()

    def on_rank(ranks: ThreadRanks) -> list[tuple[range, dict[str, Tensor]]]:
        with latents_over(ranks):
            sae = made()
            for _ in range(2):  # a new folder, and one that is there
                assert sae.save(tmp_path / "ranks") == tmp_path / "ranks"
            loaded = SAE.load(tmp_path / "ranks", dtype=sae.dtype)
            trained = SAE.load(tmp_path / "ranks", form="training", dtype=sae.dtype)
        assert (loaded.d_sae, loaded.config.d_sae, loaded.latent_range) == (D_SAE // size, D_SAE, sae.latent_range)
        return [(each.latent_range, each.state_dict()) for each in (loaded, trained)]

    made().save(tmp_path / "one")
    parts = on_ranks(size, on_rank)
    for path in sorted((tmp_path / "one").iterdir()):
        assert (tmp_path / "ranks" / path.name).read_bytes() == path.read_bytes(), path.name
    assert [path.name for path in sorted((tmp_path / "ranks").iterdir())] == [
        path.name for path in sorted((tmp_path / "one").iterdir())
    ]
    loaded, trained = (SAE.load(tmp_path / "one", form=kind, dtype=made().dtype) for kind in ("inference", "training"))
    for rank in parts:
        for whole, (latents, tensors) in zip((loaded, trained), rank, strict=True):
            for name, expected in whole.state_dict().items():
                axis = whole.latent_dimension(name)
                wanted = expected if axis is None else expected.narrow(axis, latents.start, len(latents))
                assert torch.equal(tensors[name], wanted), name


def test_what_one_rank_cannot_write_is_raised_by_all_and_leaves_what_was_there(tmp_path: Path) -> None:
    create("standard", d_in=4, d_sae=8, seed=5).save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def bad_on_one(ranks: ThreadRanks) -> str:
        with latents_over(ranks):
            sae = create("standard", d_in=4, d_sae=8)
        if ranks.rank == 1:
            sae.get_parameter("W_dec").data[0, 0] = torch.nan
        with pytest.raises(FormatError) as caught:
            sae.save(tmp_path)
        return str(caught.value)

    def disk_full_on_one(ranks: ThreadRanks) -> str:
        with latents_over(ranks):
            sae = create("standard", d_in=4, d_sae=8)
        with pytest.raises(FormatError) as caught:
            sae.save(tmp_path)
        return str(caught.value)

    def pwrite(file: int, data: Any, start: int) -> int:
        if threading.current_thread().name == "rank 1":
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(file, data, start)

    assert all("'W_dec' holds NaN" in message for message in on_ranks(2, bad_on_one))
    real = os.pwrite
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "pwrite", pwrite)
        messages = on_ranks(2, disk_full_on_one)
    assert all(message.startswith("rank 1: ") and "the disk is full" in message for message in messages), messages
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@given(data=st.data())
def test_checksums_of_pieces_make_that_of_the_whole(data: st.DataObject) -> None:
    pieces = data.draw(st.lists(st.binary(max_size=40), max_size=6))
    total, after = 0, sum(map(len, pieces))
    for piece in pieces:
        after -= len(piece)
        total ^= crc32_moved(zlib.crc32(piece), after)
    assert total == zlib.crc32(b"".join(pieces))


def _checkpoint_of(form: str, folder: Path) -> Path:
    """What training in one process has saved in the middle of a step, with dead latents and everything else that is kept."""
    settings: dict[str, Any] = {
        "gradient_accumulation_steps": 3,
        "dead_after_samples": 2 * ROWS,
        "dead_refresh_steps": 1,
    }
    if form == "jumprelu":
        settings |= {"target_l0": 5.0}
    config = TrainConfig(total_samples=8 * ROWS, batch_size=ROWS, log_every_steps=3, progress_bar=False, **settings)
    drawn = torch.Generator().manual_seed(1)
    batches = [torch.randn(ROWS, D_IN, generator=drawn) for _ in range(8)]

    def stop(progress: Progress) -> None:
        if progress.trainer.steps == 7:
            progress.trainer.stop()

    sae = _sae(form)
    with torch.no_grad():
        sae.get_parameter("b_enc")[::3] = -10.0
    trainer = Trainer(sae, batches, config, [stop])
    trainer.fit()
    state = trainer.learner.state_dict()
    assert state["n_dead"] > 4
    assert state["gathered_rows"]
    return trainer.save(folder)


@pytest.mark.parametrize("form", ["topk", "jumprelu", "layer_norm"])
def test_a_checkpoint_is_the_same_however_many_ranks_read_and_write_it(form: str, tmp_path: Path) -> None:
    path = _checkpoint_of(form, tmp_path / "one")
    expected = {each.name: each.read_bytes() for each in path.iterdir()}

    def on_rank(ranks: ThreadRanks) -> None:
        with latents_over(ranks):
            state = read_checkpoint(path)
            config = structure(state["configs"][""], TrainConfig)
            trainer = Trainer(create(dtype="float64", **state["initial"][""]), [torch.zeros(ROWS, D_IN)] * 8, config)
        trainer.load_state_dict(state)
        assert trainer.learner.dead.samples_since_fired.shape == (D_SAE // ranks.size,)
        trainer.save(tmp_path / f"over {ranks.size}")

    for size in (4, 2, 1):
        on_ranks(size, on_rank)
        again = tmp_path / f"over {size}"
        assert {each.name: each.read_bytes() for each in again.iterdir()} == expected
        path = again
