"""The cross-layer transcoder: worked by hand, against a dense twin full of zeros, saved, folded and copied."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_core import SAE, ActivationBatch, StepContext, create
from sae_core.architectures.cross_layer_transcoder import CrossLayerTranscoder
from sae_core.codes import SparseCodes
from sae_core.data.wiring import fields_for
from sae_core.errors import ConfigError
from sae_core.ops.screening import encoder_products, tallied
from sae_core.ops.ste import jump
from sae_core.testing import run_checks
from torch import Tensor

READS, WRITES = {"a": 4, "b": 3, "c": 5}, {"x": 2, "y": 4, "z": 3}
D_SAE, PER, ROWS = 24, 8, 40
KINDS: dict[str, dict[str, Any]] = {
    "jumprelu": {"pre_act_loss_coefficient": 0.2},
    "jumprelu summed norms": {"decoder_norm": "sum_of_sites", "jumprelu_ste_to_input": True},
    "jumprelu below zero": {"apply_relu": False},
    "topk": {"activation": "topk", "k": 5},
    "topk below zero": {"activation": "topk", "k": 20, "apply_relu": False},
    "topk each layer": {"activation": "topk", "k": 2, "k_counts": "each_layer"},
    "topk by pre-activation": {"activation": "topk", "k": 5, "rescale_acts_by_decoder_norm": False},
    "batchtopk": {"activation": "batchtopk", "k": 3.5},
    "batchtopk each layer": {"activation": "batchtopk", "k": 1.5, "k_counts": "each_layer"},
}
NORMALISATIONS = ("layer_norm", "constant_scalar_rescale", "expected_average_only_in", "covariance_whitening")


def made(kind: str = "jumprelu", seed: int = 0, **changes: Any) -> CrossLayerTranscoder:
    """With arbitrary weights in float64; every bias, threshold and norm is another."""
    config = {"reads": READS, "writes": WRITES, **KINDS[kind], **changes}
    sae = create("cross_layer_transcoder", d_in=12, d_sae=D_SAE, dtype="float64", **config)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=random, dtype=torch.float64) * 0.5)
            if name.startswith("threshold") and kind != "jumprelu below zero":
                parameter.abs_().add_(0.05)
        for name, buffer in sae.named_buffers():
            if name == "topk_threshold":
                buffer.copy_(torch.rand(buffer.shape, generator=random, dtype=torch.float64))
    assert isinstance(sae, CrossLayerTranscoder)
    return sae.eval()


def pairs(seed: int = 1, rows: int = ROWS) -> ActivationBatch:
    random = torch.Generator().manual_seed(seed)
    draw = lambda width: torch.randn(rows, width, generator=random, dtype=torch.float64)  # noqa: E731
    return ActivationBatch(draw(12) * 1.5 + 0.5, draw(9))


# -- the dense twin: all blocks in two matrices with their zeros, and nothing of the package's own ops -------------------


def dense(sae: CrossLayerTranscoder) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Encoder (d_in, d_sae), its bias, decoder (d_sae, d_out) and its bias, with gradient to the blocks."""
    W_enc = torch.block_diag(*(encoder.t() for encoder in sae.encoder))
    rows = [torch.cat([W.new_zeros(PER, 9 - W.shape[1]), W], dim=1) for W in sae.W_dec]
    return W_enc, torch.cat(list(sae.b_enc)), torch.cat(rows), torch.cat(list(sae.b_dec))


def twin_norms(sae: CrossLayerTranscoder, W_dec: Tensor) -> Tensor:
    if sae.config.decoder_norm == "joint":
        return W_dec.norm(dim=1)
    return sum((part.norm(dim=1) for part in W_dec.split([2, 4, 3], dim=1)), torch.zeros(()))


def kept(sae: CrossLayerTranscoder, ranks: Tensor, k: float) -> Tensor:
    """Which entries of (rows, d_sae) a selection keeps."""
    groups = [ranks] if sae.config.k_counts == "all_layers" else list(ranks.split(PER, dim=1))
    masks: list[Tensor] = []
    for group in groups:
        if sae.config.activation == "topk":
            masks.append(torch.zeros_like(group, dtype=torch.bool).scatter(1, group.topk(int(k), dim=1).indices, True))
        else:
            least = group.flatten().topk(int(k * len(group))).values[-1]
            masks.append((group >= least) & (group > 0))
    return torch.cat(masks, dim=1)


def twin_step(sae: CrossLayerTranscoder, batch: ActivationBatch, context: StepContext) -> tuple[Tensor, Tensor]:
    """Loss and latents, by the formulas."""
    config = sae.config
    assert batch.targets is not None
    W_enc, b_enc, W_dec, b_dec = dense(sae)
    h = batch.inputs @ W_enc + b_enc
    norms = twin_norms(sae, W_dec)
    if config.activation == "jumprelu":
        thresholds = torch.cat(list(sae.threshold))
        f = jump(h, thresholds, config.jumprelu_bandwidth, to_input=config.jumprelu_ste_to_input)
        y = f @ W_dec + b_dec
        size = f if config.apply_relu else torch.where(h < 0, -f, f)
        penalty = torch.tanh(config.jumprelu_tanh_scale * size * norms).sum(1).mean()
        loss = (y - batch.targets).square().sum(1).mean() + cast("float", config.l0_coefficient) * penalty
        if config.pre_act_loss_coefficient and context.dead is not None:
            short = ((thresholds - h).relu() * norms.detach())[:, context.dead]
            loss = loss + config.pre_act_loss_coefficient * short.sum(1).mean()
        return loss, f
    units = norms.detach() if config.rescale_acts_by_decoder_norm else torch.ones_like(norms)
    mask = kept(sae, h.detach() * units, cast("float", config.k))
    f = torch.where(mask, h.relu() if config.apply_relu else h, 0.0)
    y = f @ W_dec + b_dec
    loss = (y - batch.targets).square().sum(1).mean()
    if context.dead is not None:
        predicted, n, most = torch.zeros_like(y), 0, 0
        for layer, width in enumerate((4, 3, 5)):
            mine = context.dead[context.dead // PER == layer]
            if not mine.numel():
                continue
            best = min(width // 2, mine.numel())
            chosen = (h[:, mine].detach() * units[mine]).topk(best, dim=1).indices
            some = torch.zeros(len(h), mine.numel(), dtype=torch.bool).scatter(1, chosen, True)
            predicted = predicted + torch.where(some, h[:, mine], 0.0) @ W_dec[mine]
            n, most = n + mine.numel(), most + width // 2
        loss = loss + min(n / most, 1.0) * (predicted - (batch.targets - y).detach()).square().sum(1).mean()
    return loss, f * units


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("density", [None, 0.01])
@given(seed=st.integers(0, 2**20))
@settings(max_examples=2, deadline=None)
def test_loss_latents_and_gradients_are_those_of_a_dense_twin(kind: str, density: float | None, seed: int) -> None:
    sae, batch = made(kind, seed).train(), pairs(seed + 1)
    context = StepContext(dead=torch.tensor([1, 2, 5, 17, 20]), density=density)
    found = sae.training_step(batch, context)
    found.loss.backward()
    gradients = {name: parameter.grad for name, parameter in sae.named_parameters()}
    sae.zero_grad(set_to_none=True)
    loss, latents = twin_step(sae, batch, context)
    loss.backward()
    torch.testing.assert_close(found.loss, loss)
    torch.testing.assert_close(cast("SparseCodes", found.codes).to_dense(), latents)
    for name, parameter in sae.named_parameters():
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(gradients[name], expected, rtol=1e-8, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


def test_sparse_and_dense_forms_of_a_wide_dictionary_agree() -> None:
    """At this width and density a step lists entries; a first step without a known density does not."""
    sae = create(
        "cross_layer_transcoder", d_in=8, d_sae=600, reads={"a": 4, "b": 4}, writes={"x": 3, "y": 3}, dtype="float64",
        jumprelu_init_threshold=0.3, decoder_init_norm=0.2,
    )  # fmt: skip
    random = torch.Generator().manual_seed(0)
    batch = ActivationBatch(*(torch.randn(30, width, generator=random, dtype=torch.float64) for width in (8, 6)))
    sparse, full = (sae.training_step(batch, StepContext(density=density)) for density in (0.01, None))
    assert isinstance(sparse.codes, SparseCodes)
    assert not isinstance(full.codes, SparseCodes)
    assert sparse.codes.values.numel() < 0.5 * 30 * 600
    torch.testing.assert_close(sparse.loss, full.loss)
    ours, theirs = (torch.autograd.grad(step.loss, list(sae.parameters())) for step in (sparse, full))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


# -- worked by hand ----------------------------------------------------------------------------------------------------


def by_hand(**config: Any) -> CrossLayerTranscoder:
    """Two layers of width 1 with one latent each: the first writes 3 and 4, the second writes 10 to its own layer."""
    sae = create("cross_layer_transcoder", d_in=2, d_sae=2, reads={"a": 1, "b": 1}, writes={"x": 1, "y": 1}, **config)
    assert isinstance(sae, CrossLayerTranscoder)
    with torch.no_grad():
        for parameter, values in (
            (sae.encoder[0], [[2.0]]), (sae.encoder[1], [[1.0]]), (sae.b_enc[0], [-1.0]), (sae.b_enc[1], [0.5]),
            (sae.W_dec[0], [[3.0, 4.0]]), (sae.W_dec[1], [[10.0]]), (sae.b_dec[0], [0.25]), (sae.b_dec[1], [-0.25]),
        ):  # fmt: skip
            parameter.copy_(torch.tensor(values))
        for threshold in sae.threshold:
            threshold.fill_(0.5)
    return sae


def test_a_latent_of_the_first_layer_writes_to_both_and_one_of_the_second_to_its_own() -> None:
    sae = by_hand().eval()
    x = torch.tensor([[1.0, 2.0], [1.0, -9.0], [0.0, 2.0]])  # h = (1, 2.5), (1, -8.5), (-1, 2.5)
    assert sae.encode(x).tolist() == [[1.0, 2.5], [1.0, 0.0], [0.0, 2.5]]
    assert sae(x).tolist() == [[3.25, 28.75], [3.25, 3.75], [0.25, 24.75]]
    assert sae.decoder_norms().tolist() == [5.0, 10.0]


def test_the_loss_adds_the_squared_errors_of_layers_and_a_smooth_count_of_joint_norms() -> None:
    sae = by_hand(l0_coefficient=2.0, jumprelu_tanh_scale=0.1).train()
    batch = ActivationBatch(torch.tensor([[1.0, -9.0]]), torch.tensor([[1.25, 1.75]]))
    step = sae.training_step(batch)  # y = (3.25, 3.75)
    assert step.losses["mse"].item() == pytest.approx(8.0)
    assert step.losses["l0"].item() == pytest.approx(2.0 * torch.tanh(torch.tensor(0.1 * 1.0 * 5.0)).item())


def test_over_all_layers_the_latent_that_writes_most_is_kept_and_in_each_layer_its_own() -> None:
    x = torch.tensor([[2.0, 0.5]])  # h = (3, 1); times norms (15, 10)
    over_all = by_hand(activation="topk", k=1).eval()
    assert over_all.encode(x).tolist() == [[15.0, 0.0]]
    assert over_all(x).tolist() == [[9.25, 11.75]]
    in_each = by_hand(activation="topk", k=1, k_counts="each_layer").eval()
    assert in_each.encode(x).tolist() == [[15.0, 10.0]]
    assert in_each(x).tolist() == [[9.25, 21.75]]


def test_the_running_threshold_is_the_mean_of_the_smallest_latents_that_stayed() -> None:
    sae = by_hand(activation="batchtopk", k=1, topk_threshold_lr=0.5).train()
    targets = torch.zeros(2, 2)
    sae.training_step(ActivationBatch(torch.tensor([[2.0, 0.5], [0.0, -9.0]]), targets))  # keeps 15 and 10
    assert sae.topk_threshold is not None
    assert sae.topk_threshold.tolist() == [10.0]
    sae.training_step(ActivationBatch(torch.tensor([[2.0, 1.5], [0.0, -9.0]]), targets))  # keeps 15 and 20
    assert sae.topk_threshold.item() == pytest.approx((0.25 * 10 + 0.5 * 15) / 0.75)
    each = by_hand(activation="batchtopk", k=0.5, k_counts="each_layer").train()
    each.training_step(ActivationBatch(torch.tensor([[2.0, 0.5], [0.0, -9.0]]), targets))
    assert each.topk_threshold is not None
    assert each.topk_threshold.tolist() == pytest.approx([15.0, 10.0])


# -- what every dictionary promises ------------------------------------------------------------------------------------


CHECKED = {name: config for name, config in KINDS.items() if name in ("topk", "batchtopk each layer")}
SEES_LESS = {"check_learns": "the kit's targets at a layer depend on later layers, which are not read there"}


@pytest.mark.parametrize("kind", CHECKED)
def test_it_conforms(kind: str) -> None:
    config = CHECKED[kind] | {"reads": {"a": 5, "b": 6, "c": 5}, "writes": WRITES, "d_sae": 63}
    results = run_checks("architecture", "cross_layer_transcoder", config=config, expected_failures=SEES_LESS)
    assert [result for result in results if not result.ok] == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("normalisation", ["none", *NORMALISATIONS])
def test_saved_folded_copied_and_pickled_it_computes_the_same(kind: str, normalisation: str, tmp_path: Path) -> None:
    more = {"activation_normalization_factor": 0.7} if normalisation == "constant_scalar_rescale" else {}
    sae, batch = made(kind, normalize_activations=normalisation, **more), pairs()
    sae.fit_normalization(batch)
    x = batch.inputs
    latents, output = sae.encode(x), sae(x)
    assert 0 < latents.count_nonzero() < latents.numel()
    others = {
        "loaded": SAE.load(sae.save(tmp_path / "saved")),
        "copied": copy.deepcopy(sae),
        "pickled": pickle.loads(pickle.dumps(sae)),
        "folded": copy.deepcopy(sae),
    }
    others["folded"].fold_normalization()
    assert others["folded"].normalization.folds is False
    assert others["loaded"].dtype == torch.float64
    for how, other in others.items():
        torch.testing.assert_close(other.encode(x), latents, rtol=1e-6, atol=1e-6, msg=lambda m, h=how: f"{h}: {m}")
        torch.testing.assert_close(other(x), output, rtol=1e-6, atol=1e-6, msg=lambda m, h=how: f"{h}: {m}")
    again = SAE.load(others["loaded"].save(tmp_path / "again"))
    torch.testing.assert_close(again(x), others["loaded"](x), rtol=0, atol=0)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "topk by pre-activation"])
def test_folded_decoder_norms_are_one_and_leave_the_outputs_alone(kind: str) -> None:
    sae, x = made(kind), pairs().inputs
    output, latents, norms = sae(x), sae.encode(x), sae.decoder_norms().detach()
    sae.fold_decoder_norm()
    torch.testing.assert_close(sae.decoder_norms(), torch.ones_like(norms))
    torch.testing.assert_close(sae(x), output)
    torch.testing.assert_close(sae.encode(x), latents * norms if "jumprelu" in kind else latents)


def test_folding_norms_where_they_do_not_rank_is_refused() -> None:
    with pytest.raises(ConfigError, match="would change which are kept"):
        made("topk by pre-activation").fold_decoder_norm()


def test_batchtopk_is_saved_as_thresholds(tmp_path: Path) -> None:
    loaded = SAE.load(made("batchtopk").save(tmp_path / "saved"))
    assert isinstance(loaded, CrossLayerTranscoder)
    assert (loaded.config.activation, loaded.config.k) == ("jumprelu", None)
    assert loaded.metadata["training_architecture"] == "cross_layer_transcoder"


@pytest.mark.parametrize("other", ["cross_layer_transcoder", "standard", "gated"])
def test_directions_of_some_latents_and_norms_of_all_are_those_of_the_whole(
    other: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sae_core.dictionary._DIRECTIONS_AT_ONCE", 3)
    sae = made("topk") if other == "cross_layer_transcoder" else create(other, d_in=5, d_sae=8)
    whole = sae.directions()
    assert whole.shape == (sae.d_sae, sae.d_out)
    torch.testing.assert_close(sae.directions(torch.tensor([4, 1])), whole[[4, 1]])
    torch.testing.assert_close(sae.direction_norms(), whole.norm(dim=-1))


def test_no_tensor_has_the_decoders_zeros(tmp_path: Path) -> None:
    """Six layers: all that exists, in training and in files, is 21 of 36 blocks."""
    layers, width, per = 6, 16, 32
    names = {str(layer): width for layer in range(layers)}
    sae = create("cross_layer_transcoder", d_in=96, d_sae=layers * per, reads=names, writes=names)
    decoder = [tuple(tensor.shape) for name, tensor in sae.tensors().items() if name.startswith("W_dec")]
    assert decoder == [(per, width * (layers - layer)) for layer in range(layers)]
    assert sum(rows * columns for rows, columns in decoder) == 21 * per * width
    largest = max(tensor.nbytes for tensor in sae.tensors().values())
    seen: list[int] = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = function(*args, **(kwargs or {}))
            seen.extend(
                each.numel() for each in (out if isinstance(out, tuple) else (out,)) if isinstance(each, Tensor)
            )
            return out

    x = torch.randn(4, 96, generator=torch.Generator().manual_seed(0))
    with Sizes():
        sae.training_step(ActivationBatch(x, x)).loss.backward()
        sae.save(tmp_path / "saved")
    assert max(seen) <= largest < 4 * sae.d_sae * sae.d_out


def test_leading_shapes_are_kept_and_decoding_sparse_and_dense_latents_agrees() -> None:
    for kind in KINDS:
        sae, x = made(kind), pairs().inputs.view(5, 8, 12)
        codes = sae.encode_sparse(x)
        assert codes.shape == (5, 8, D_SAE)
        torch.testing.assert_close(codes.to_dense(), sae.encode(x))
        torch.testing.assert_close(sae.decode(codes), sae(x))
        torch.testing.assert_close(sae.decode(sae.encode(x)), sae(x))


def test_half_precision_keeps_thresholds_and_runs_its_large_products_low() -> None:
    sae = made().to(torch.bfloat16)
    assert {threshold.dtype for threshold in sae.threshold} == {torch.float32}
    assert sae.dtype == torch.bfloat16
    exact = made("topk").float().train()
    batch = ActivationBatch(*(part.float() for part in (pairs().inputs, cast("Tensor", pairs().targets))))
    with encoder_products("screened"), tallied() as tally:
        screened = exact.training_step(batch, StepContext())
    assert tally.rows
    torch.testing.assert_close(screened.loss, exact.training_step(batch).loss)


class Layers:
    """A source of three pairs of sites."""

    sites = READS
    target_sites = WRITES

    def batches(self, batch_size: int) -> Any:
        raise NotImplementedError


def test_a_source_with_one_site_in_and_out_for_every_layer_gives_it_its_widths() -> None:
    fields = fields_for(cast("Any", Layers()), CrossLayerTranscoder)
    sae = create("cross_layer_transcoder", d_sae=D_SAE, **fields)
    assert (dict(sae.reads), dict(sae.writes), sae.d_out) == (READS, WRITES, 9)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"writes": {}}, "writes: the sites written are missing"),
        ({"writes": {"x": 4}}, "reads names 3 sites and writes 1"),
        ({"d_sae": 25}, "d_sae = 25 latents cannot be shared out evenly among 3 layers"),
        ({"d_out": 8}, "add up to 9, not to 8"),
        ({"d_in": 11}, "add up to 12, not to 11"),
        ({"k": 3}, "k is not read with activation: jumprelu"),
        ({"aux_loss_coefficient": 0.5}, "aux_loss_coefficient is not read with activation: jumprelu"),
        ({"activation": "topk"}, "k is needed with activation: topk"),
        ({"activation": "topk", "k": 2.5}, "k must be a whole number"),
        ({"activation": "topk", "k": 9, "k_counts": "each_layer"}, r"k must lie in \(0, 8\]"),
        ({"activation": "topk", "k": 2, "l0_coefficient": 0.3}, "l0_coefficient is not read with activation: topk"),
        ({"activation": "batchtopk", "k": 2, "apply_relu": False}, "batchtopk keeps positive latents alone"),
        ({"apply_b_dec_to_input": True}, "apply_b_dec_to_input must be false"),
        ({"rescale_acts_by_decoder_norm": True}, "rescale_acts_by_decoder_norm is not read"),
    ],
)
def test_configs_that_mean_nothing_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        create("cross_layer_transcoder", **{"d_in": 12, "d_sae": D_SAE, "reads": READS, "writes": WRITES} | changes)


def test_some_latents_alone_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="rows= cannot be used with architecture 'cross_layer_transcoder'"):
        SAE.load(made().save(tmp_path / "saved"), rows=[0, 1])
