"""What must hold for every architecture in every shape under every normalisation, whatever the weights and the batch.

Each test runs for all pairs of `TABLE` and `NORMALISATIONS`; hypothesis draws weights, batches and leading shapes. Weights
are drawn without regard to how training would have chosen them: biases, thresholds and norms are all different, so that
nothing cancels by luck.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sae_core import SAE, ActivationBatch, StepContext, create
from sae_core.errors import ConfigError, DataError, ShapeError
from torch import Tensor

D_IN, D_SAE, D_OUT = 6, 16, 5
READS = {"a": 4, "b": 2}
LINEAR: dict[str, dict[str, Any]] = {
    "standard": {},
    "gated": {},
    "topk": {"k": 4},
    "abstopk": {"k": 4},
    "groupmax": {"k": 4},
    "batchtopk": {"k": 2.5},
    "matryoshka_batchtopk": {"k": 3, "matryoshka_widths": [3, 8]},
    "jumprelu": {"jumprelu_bandwidth": 0.3},
}
SHAPES: dict[str, dict[str, Any]] = {
    "SAE": {},
    "transcoder": {"d_out": D_OUT},
    "skip transcoder": {"d_out": D_OUT, "skip": True},
    "crosscoder": {"reads": READS},
}
OTHERS: dict[str, dict[str, Any]] = {
    "matching_pursuit": {"max_iterations": 4},
    "temporal": {"kval_topk": 5, "n_heads": 2, "bottleneck_factor": 2},
}
TABLE: dict[str, tuple[str, dict[str, Any]]] = {  # what is tested: architecture and config
    f"{architecture} {shape}": (architecture, config | fields)
    for architecture, config in LINEAR.items()
    for shape, fields in SHAPES.items()
} | {architecture: (architecture, config) for architecture, config in OTHERS.items()}
NORMALISATIONS = (
    "none",
    "layer_norm",
    "constant_norm_rescale",
    "constant_scalar_rescale",
    "expected_average_only_in",
    "covariance_whitening",
)
REFUSED = {("matching_pursuit", "covariance_whitening"), ("temporal", "covariance_whitening")}
PAIRS = [(a, n) for a in TABLE for n in NORMALISATIONS if (a, n) not in REFUSED]
LINEAR_PAIRS = [(a, n) for a, n in PAIRS if a not in OTHERS]
seeds = st.integers(0, 2**20)
few = settings(max_examples=2, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
once = settings(few, max_examples=1)
every_pair = pytest.mark.parametrize(("kind", "normalisation"), PAIRS)


def drawn(kind: str, normalisation: str, seed: int, **changes: Any) -> SAE[Any]:
    """A float64 SAE with arbitrary weights in eval mode, its normalisations fitted."""
    architecture, config = TABLE[kind]
    config = config | {"normalize_activations": normalisation} | changes
    if normalisation == "constant_scalar_rescale":
        config["activation_normalization_factor"] = 0.7
    sae = create(architecture, d_in=D_IN, d_sae=D_SAE, dtype="float64", seed=seed, **config)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.5)
            if name == "threshold":
                parameter.abs_().add_(0.05)
        for name, buffer in sae.named_buffers():
            if name == "topk_threshold":
                buffer.fill_(0.3)
        sae.after_step()
    sae.fit_normalization(batch_for(sae, seed + 1, 64))
    return sae.eval()


def activations(seed: int, *leading: int) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(*leading, D_IN, generator=random, dtype=torch.float64) * 1.5 + 0.5


def batch_for(sae: SAE[Any], seed: int, rows: int = 9) -> ActivationBatch:
    x = activations(seed, rows)
    if sae.reconstructs_input:
        return ActivationBatch(x)
    random = torch.Generator().manual_seed(11)
    mixing = torch.randn(D_IN, D_OUT, generator=random, dtype=torch.float64)
    return ActivationBatch(x, (x @ mixing).relu())


def same(actual: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@every_pair
@given(seed=seeds)
@once
@torch.no_grad()
def test_sparse_codes_are_the_dense_latents_and_decode_to_the_output(kind: str, normalisation: str, seed: int) -> None:
    sae, x = drawn(kind, normalisation, seed), activations(seed + 2, 2, 4)
    codes, latents = sae.encode_sparse(x), sae.encode(x)
    assert codes.shape == latents.shape == (2, 4, D_SAE)
    same(codes.to_dense(), latents)
    same(sae.decode(codes, x=x), sae.decode(latents, x=x))
    same(sae.decode(latents, x=x), sae(x))


@every_pair
@given(seed=seeds)
@once
@torch.no_grad()
def test_latents_alone_decode_where_they_determine_the_output_and_are_refused_elsewhere(
    kind: str, normalisation: str, seed: int
) -> None:
    sae, x = drawn(kind, normalisation, seed), activations(seed + 2, 5)
    per_row = normalisation in ("layer_norm", "constant_norm_rescale") and sae.reconstructs_input
    if per_row or "skip" in kind:
        with pytest.raises(ConfigError, match="x=x"):
            sae.decode(sae.encode(x))
    elif kind != "temporal":  # there, latents alone are the novel part of the output
        same(sae.decode(sae.encode(x)), sae(x))
        same(sae.decode(sae.encode_sparse(x)), sae(x))


@every_pair
@given(seed=seeds, shape=st.lists(st.integers(1, 4), min_size=0, max_size=3))
@few
@torch.no_grad()
def test_any_leading_shape_gives_what_its_rows_give(kind: str, normalisation: str, seed: int, shape: list[int]) -> None:
    sae, x = drawn(kind, normalisation, seed), activations(seed + 2, *shape)
    for training in (False, True):
        sae.train(training)
        if kind == "temporal" and shape:  # its rows are the positions of sequences
            flat = torch.stack([sae.encode(sequence) for sequence in x.reshape(-1, shape[-1], D_IN)])
        else:
            flat = sae.encode(x.reshape(-1, D_IN))
        latents = sae.encode(x)
        assert latents.shape == (*shape, D_SAE)
        same(latents.reshape(-1, D_SAE), flat.reshape(-1, D_SAE))
        assert sae(x).shape == (*shape, sae.d_out)


@every_pair
@given(seed=seeds)
@once
@torch.no_grad()
def test_an_output_does_not_depend_on_what_else_is_in_the_batch(kind: str, normalisation: str, seed: int) -> None:
    sae, x = drawn(kind, normalisation, seed), activations(seed + 2, 3, 4)
    together, latents = sae(x), sae.encode(x)
    for i in range(3):
        same(sae(x[i]), together[i])
        same(sae.encode(x[i]), latents[i])
    if kind != "temporal":
        same(sae(x[1, 2]), together[1, 2])


@every_pair
@given(seed=seeds)
@once
def test_what_is_saved_and_loaded_computes_the_same(kind: str, normalisation: str, seed: int) -> None:
    sae, x = drawn(kind, normalisation, seed), activations(seed + 2, 3, 4)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        loaded = SAE.load(sae.save(Path(folder) / "sae"))
        assert not loaded.training
        assert loaded.metadata["training_architecture"] == TABLE[kind][0]
        assert (loaded.reads, loaded.writes) == (sae.reads, sae.writes)
        same(loaded(x), sae(x), 1e-6)
        same(loaded.encode(x), sae.encode(x), 1e-6)
        again = SAE.load(loaded.save(Path(folder) / "again"))
        same(again(x), loaded(x))
        assert again.metadata["training_architecture"] == TABLE[kind][0]


@pytest.mark.parametrize(("kind", "normalisation"), LINEAR_PAIRS)
@given(seed=seeds)
@once
@torch.no_grad()
def test_folding_in_place_changes_no_output(kind: str, normalisation: str, seed: int) -> None:
    sae, x = drawn(kind, normalisation, seed), activations(seed + 2, 3, 4)
    output, latents, norms = sae(x), sae.encode(x), sae.decoder_norms()
    rescaled = getattr(sae.config, "rescale_acts_by_decoder_norm", False)
    sae.fold_decoder_norm()
    same(sae.decoder_norms(), torch.ones(D_SAE, dtype=torch.float64))
    same(sae(x), output)
    same(sae.encode(x), latents if rescaled else latents * norms)
    latents = sae.encode(x)
    sae.fold_normalization()
    per_row = normalisation in ("layer_norm", "constant_norm_rescale")
    assert sae.config.normalize_activations == (normalisation if per_row else "none")
    same(sae(x), output)
    same(sae.encode(x), latents)


def normalised(x: Tensor, data: Tensor, name: str) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """One site by the formulas, and the way back; `data` is what statistics are taken from."""
    width = x.shape[-1]
    if name == "layer_norm":
        mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
        return (x - mean) / (std + 1e-5), lambda y: y * std + mean
    if name == "covariance_whitening":
        values, vectors = torch.linalg.eigh(torch.cov(data.T))
        root = (values.clamp(min=0) + 1e-3).sqrt()
        return (x - data.mean(0)) @ (vectors / root), lambda y: y @ (vectors * root).T + data.mean(0)
    factors = {
        "none": torch.ones(()),
        "constant_norm_rescale": width**0.5 / x.norm(dim=-1, keepdim=True),
        "constant_scalar_rescale": torch.tensor(0.7, dtype=torch.float64),
        "expected_average_only_in": width**0.5 / data.norm(dim=-1).mean(),
    }
    return x * factors[name], lambda y: y / factors[name]


def by_the_formulas(architecture: str, sae: SAE[Any], z: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, d_sae) latents as they are reported, and as they are decoded."""
    w = {name: tensor.detach() for name, tensor in sae.state_dict().items()}
    h = (z - w["b_dec"] if sae.config.apply_b_dec_to_input else z) @ w["encoder"].T
    if architecture == "gated":
        f = ((h + w["b_gate"]) > 0) * (h * w["r_mag"].exp() + w["b_mag"]).relu()
        return f, f
    h = h + w["b_enc"]
    if architecture == "standard":
        return h.relu(), h.relu()
    if architecture == "jumprelu":
        return h * (h > w["threshold"]), h * (h > w["threshold"])
    ranks = h * n
    if "batchtopk" in architecture:
        kept = ranks > 0.3
    elif architecture == "groupmax":
        groups = ranks.unflatten(-1, (4, -1))
        kept = (groups == groups.amax(-1, keepdim=True)).flatten(-2)
    else:
        sizes = ranks.abs() if architecture == "abstopk" else ranks
        kept = sizes >= sizes.topk(4).values[..., -1:]
    f = h * kept if architecture == "abstopk" else h.relu() * kept
    return f * n, f


@pytest.mark.parametrize(("kind", "normalisation"), LINEAR_PAIRS)
@given(seed=seeds)
@few
@torch.no_grad()
def test_activations_in_and_out_are_in_the_models_units(kind: str, normalisation: str, seed: int) -> None:
    """Every shape and normalisation against its formulas, written down without regard to how it is done."""
    sae, x = drawn(kind, normalisation, seed), activations(seed + 2, 7)
    data, targets = batch_for(sae, seed + 1, 64).inputs, batch_for(sae, seed + 1, 64).targets
    sizes = list(sae.reads.values())
    sites = [
        normalised(part, seen, normalisation)
        for part, seen in zip(x.split(sizes, -1), data.split(sizes, -1), strict=True)
    ]
    n = sum(part.norm(dim=-1) for part in sae.W_dec.split(list(sae.writes.values()), -1))
    reported, decoded = by_the_formulas(TABLE[kind][0], sae, torch.cat([z for z, _ in sites], -1), n)
    y = decoded @ sae.W_dec + sae.b_dec
    if "skip" in kind:
        y = y + x @ sae.W_skip.T
    if targets is None:
        y = torch.cat([undo(part) for (_, undo), part in zip(sites, y.split(sizes, -1), strict=True)], -1)
    elif normalisation in ("expected_average_only_in", "covariance_whitening"):
        y = normalised(targets, targets, normalisation)[1](y)
    same(sae.encode(x), reported, 1e-8)
    same(sae(x), y, 1e-8)


@every_pair
@given(seed=seeds)
@few
def test_gradients_are_the_slopes_of_the_loss(kind: str, normalisation: str, seed: int) -> None:
    """Finite differences in float64 along a random direction; thresholds, whose gradients are estimators, stay put."""
    sae = drawn(kind, normalisation, seed).train()
    batch, random = batch_for(sae, seed + 2, rows=12), torch.Generator().manual_seed(seed + 3)
    parameters = [p for name, p in sae.named_parameters() if name != "threshold"]
    directions = [torch.randn(p.shape, generator=random, dtype=p.dtype) for p in parameters]
    sae.training_step(batch).loss.backward()
    slope = sum(float((p.grad * d).sum()) for p, d in zip(parameters, directions, strict=True) if p.grad is not None)
    ahead, behind = (_loss_at(sae, parameters, directions, step, batch) for step in (1e-7, -1e-7))
    assert (ahead - behind) / 2e-7 == pytest.approx(slope, rel=1e-4, abs=1e-4)


def _loss_at(
    sae: SAE[Any], parameters: list[Any], directions: list[Tensor], step: float, batch: ActivationBatch
) -> float:
    with torch.no_grad():
        for parameter, direction in zip(parameters, directions, strict=True):
            parameter.add_(direction, alpha=step)
        loss = float(sae.training_step(batch).loss)
        for parameter, direction in zip(parameters, directions, strict=True):
            parameter.sub_(direction, alpha=step)
    return loss


@every_pair
@given(seed=seeds)
@once
def test_dense_and_sparse_forms_have_the_same_latents_loss_and_gradients(
    kind: str, normalisation: str, seed: int
) -> None:
    results: list[list[Tensor]] = []
    for sparse in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sae_core.ops.active.prefer_sparse", lambda sparse=sparse, **_: sparse)
            sae = drawn(kind, normalisation, seed)
            batch = batch_for(sae, seed + 2)
            latents = sae.encode(batch.inputs)
            loss = sae.train().training_step(batch, StepContext(dead=torch.tensor([1, 4, 6, 9]))).loss
            loss.backward()
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in sae.parameters()]
        results.append([latents.detach(), loss.detach(), *gradients])
    for sparse_result, dense_result in zip(*results, strict=True):
        same(sparse_result, dense_result)


@every_pair
def test_the_input_gets_the_slope_of_the_output(kind: str, normalisation: str) -> None:
    """Steering and attribution differentiate through an SAE."""
    sae, x = drawn(kind, normalisation, 3), activations(5, 2, 4).requires_grad_()
    direction, weight = activations(6, 2, 4), torch.linspace(-1, 1, 2 * 4 * sae.d_out, dtype=torch.float64)
    (sae(x).flatten() @ weight).backward()
    with torch.no_grad():
        ahead, behind = (float(sae(x + step * direction).flatten() @ weight) for step in (1e-7, -1e-7))
    assert x.grad is not None
    assert (ahead - behind) / 2e-7 == pytest.approx(float((x.grad * direction).sum()), rel=1e-4, abs=1e-4)


@every_pair
def test_no_rows_give_no_rows_and_zero_rows_stay_finite(kind: str, normalisation: str) -> None:
    sae = drawn(kind, normalisation, 4)
    nothing = torch.zeros(0, D_IN, dtype=torch.float64)
    assert sae(nothing).shape == (0, sae.d_out)
    assert sae.encode(nothing).shape == (0, D_SAE)
    assert sae.encode_sparse(nothing).to_dense().shape == (0, D_SAE)
    for training in (False, True):
        batch = batch_for(sae.train(training), 5, rows=4)
        batch.inputs[1] = 0.0
        assert torch.isfinite(sae(batch.inputs)).all()
        sae.zero_grad()
        sae.training_step(batch).loss.backward()
        assert all(torch.isfinite(p.grad).all() for p in sae.parameters() if p.grad is not None)


@every_pair
def test_a_zero_decoder_row_contributes_nothing_and_no_nan(kind: str, normalisation: str, tmp_path: Path) -> None:
    sae = drawn(kind, normalisation, 6)
    with torch.no_grad():
        sae.W_dec[3] = 0.0
    batch = batch_for(sae, 7)
    assert torch.isfinite(sae(batch.inputs)).all()
    sae.train().training_step(batch, StepContext(dead=torch.tensor([3, 5]))).loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in sae.parameters() if p.grad is not None)
    for name, buffer in sae.eval().named_buffers():
        if name == "topk_threshold":
            buffer.fill_(0.3)  # the step left it exactly at one of the latents
    same(SAE.load(sae.save(tmp_path / "sae"))(batch.inputs), sae(batch.inputs), 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("normalisation", ["none", "layer_norm", "expected_average_only_in"])
@pytest.mark.parametrize("kind", TABLE)
def test_every_precision_encodes_decodes_and_trains(kind: str, normalisation: str, dtype: torch.dtype) -> None:
    sae = drawn(kind, normalisation, 8).to(dtype)
    batch = batch_for(sae, 9, rows=12)
    batch = ActivationBatch(batch.inputs.to(dtype), None if batch.targets is None else batch.targets.to(dtype))
    assert sae(batch.inputs).dtype == sae.encode(batch.inputs).dtype == dtype
    assert torch.isfinite(sae.decode(sae.encode_sparse(batch.inputs), x=batch.inputs)).all()
    sae.train().training_step(batch, StepContext(dead=torch.tensor([3, 5]))).loss.backward()
    for name, parameter in sae.named_parameters():
        wanted = torch.float32 if name == "threshold" else dtype
        assert parameter.dtype == wanted
        assert parameter.grad is None or bool(torch.isfinite(parameter.grad).all())


@pytest.mark.parametrize(
    ("kind", "normalisation"),
    [(kind, "none") for kind in TABLE] + [(kind, "layer_norm") for kind in TABLE if not kind.endswith("coder")],
)
def test_training_makes_the_error_smaller(kind: str, normalisation: str) -> None:
    architecture, config = TABLE[kind]
    config = config | ({"l1_coefficient": 1e-3} if architecture in ("standard", "gated") else {})
    config |= {"l0_coefficient": 1e-3} if architecture == "jumprelu" else {}
    config |= {"decoder_init_norm": 1.0} if architecture == "temporal" else {}
    sae = create(
        architecture, d_in=D_IN, d_sae=D_SAE, seed=1, dtype="float64", normalize_activations=normalisation, **config
    )
    batches = [batch_for(sae, seed, rows=64) for seed in range(4)]
    optimizer = torch.optim.Adam(sae.parameters(), lr=3e-2)
    errors: list[float] = []
    for step in range(24):
        output = sae.training_step(batches[step % 4])
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        sae.after_step()
        errors.append(float(output.losses["mse"].detach()))
    assert sum(errors[-4:]) < 0.8 * sum(errors[:4])


@pytest.mark.parametrize(("kind", "normalisation"), sorted(REFUSED))
def test_a_normalisation_that_cannot_be_folded_is_refused_at_construction(kind: str, normalisation: str) -> None:
    with pytest.raises(ConfigError, match=r"normalize_activations.*cannot be folded"):
        drawn(kind, normalisation, 0)


@pytest.mark.parametrize("kind", TABLE)
def test_wrong_inputs_are_one_error_that_names_the_shape(kind: str) -> None:
    sae = drawn(kind, "none", 0)
    with pytest.raises(ShapeError, match=rf"\(3, {D_IN + 1}\).*{D_IN}"):
        sae.encode(torch.zeros(3, D_IN + 1))
    with pytest.raises(ShapeError, match="int64"):
        sae(torch.zeros(3, D_IN, dtype=torch.long))
    with pytest.raises(ShapeError, match="meta"):
        sae(torch.zeros(3, D_IN, device="meta"))
    with pytest.raises(ShapeError, match=str(D_SAE)):
        sae.decode(torch.zeros(3, D_SAE + 1))


@pytest.mark.parametrize(
    ("kind", "normalisation"), [(a, n) for a, n in PAIRS if a != "temporal" and "transcoder" not in a]
)
def test_attention_heads_are_joined_on_the_way_in_and_parted_on_the_way_out(kind: str, normalisation: str) -> None:
    plain = drawn(kind, normalisation, 2)
    heads = drawn(kind, normalisation, 2, reshape_activations="hook_z")
    x = activations(3, 2, 4)
    by_head = x.unflatten(-1, (2, 3))
    same(heads.encode(by_head), plain.encode(x))
    same(heads(by_head), plain(x).unflatten(-1, (2, 3)))
    same(heads.training_step(by_head).loss, plain.training_step(x).loss)
    with pytest.raises(ShapeError, match=r"\(2, 4, 2, 4\)"):
        heads.encode(torch.zeros(2, 4, 2, 4))


@pytest.mark.parametrize("kind", TABLE)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_number_in_the_input_is_an_error_that_names_its_row(kind: str, value: float) -> None:
    """Nothing is above a threshold if it is NaN, so the row would otherwise come out as an innocent b_dec."""
    sae, batch = drawn(kind, "none", 0), batch_for(drawn(kind, "none", 0), 1, rows=6)
    batch.inputs[4, 2] = value
    for call in (sae.encode, sae.encode_sparse, sae):
        with pytest.raises(DataError, match=r"1 of 6 input rows.*first is row 4"):
            call(batch.inputs)
    with pytest.raises(DataError, match="row 4"):
        sae.train().training_step(batch)
    with pytest.raises(DataError, match="row 0"):
        sae.to(torch.float16)(torch.full((2, D_IN), 1e5))


def bad(architecture: str, message: str, **fields: Any) -> Any:
    return pytest.param(architecture, fields, message, id=f"{architecture}-{'-'.join(fields)}")


@pytest.mark.parametrize(
    ("architecture", "fields", "message"),
    [
        bad("abstopk", r"k must lie in \[1, d_sae = 16\], not 17", k=17),
        bad("groupmax", r"k must divide d_sae = 16", k=5),
        bad("groupmax", r"k must lie in", k=0),
        bad("batchtopk", r"k must lie in \(0, d_sae = 16\]", k=16.5),
        bad("batchtopk", r"topk_threshold_lr", topk_threshold_lr=0.0),
        bad("matryoshka_batchtopk", r"must increase, not \[8, 3\]", matryoshka_widths=[8, 3]),
        bad("matryoshka_batchtopk", r"at least one width", matryoshka_widths=[]),
        bad("matryoshka_batchtopk", r"positive", matryoshka_widths=[0, 4]),
        bad("matryoshka_batchtopk", r"go beyond d_sae = 16", matryoshka_widths=[4, 17]),
        bad("jumprelu", r"target_l0 belongs to .*quadratic", target_l0=3.0),
        bad("jumprelu", r"target_l0 belongs to .*quadratic", jumprelu_sparsity_loss_mode="quadratic"),
        bad("jumprelu", r"target_l0 must lie in", jumprelu_sparsity_loss_mode="quadratic", target_l0=17.0),
        bad("jumprelu", r"jumprelu_tanh_scale is read only with", jumprelu_tanh_scale=2.0),
        bad("jumprelu", r"expected 'step' \| 'tanh' \| 'quadratic'|step", jumprelu_sparsity_loss_mode="stair"),
        bad("standard", r"lp_norm_keeps_scale has no effect", lp_norm_keeps_scale=True),
        bad("matching_pursuit", r"decoder_init_norm must be 1", decoder_init_norm=0.1),
        bad("matching_pursuit", r"max_iterations must be positive", max_iterations=0),
        bad("temporal", r"d_sae = 16 must be divisible by bottleneck_factor \* n_heads = 6", n_heads=3),
        bad("temporal", r"kval_topk", sae_diff_type="relu"),
        bad("temporal", r"reshape_activations must be none", reshape_activations="hook_z"),
        bad("standard", r"apply_b_dec_to_input must be false", d_out=D_OUT, apply_b_dec_to_input=True),
        bad("gated", r"reshape_activations must be none", d_out=D_OUT, reshape_activations="hook_z"),
        bad("jumprelu", r"d_out must be positive", d_out=0),
        bad("topk", r"skip: .* needs d_out", skip=True),
        bad("standard", r"reads: .*add up to 5, not to 6", reads={"a": 4, "b": 1}),
        bad("standard", r"writes: .*add up to 4, not to 5", d_out=D_OUT, writes={"a": 4}),
        bad("standard", r"writes: without d_out", reads=READS, writes={"a": 2, "b": 4}),
        bad("standard", r"decoder_norm: 'joint' makes no difference", decoder_norm="joint"),
        bad("standard", r"width of 'b' must be positive", reads={"a": 6, "b": 0}),
    ],
)
def test_an_impossible_config_is_refused_at_construction(
    architecture: str, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        create(architecture, d_in=D_IN, d_sae=D_SAE, **((LINEAR | OTHERS)[architecture] | fields))


TRANSCODERS = [kind for kind in TABLE if "transcoder" in kind]


@pytest.mark.parametrize("kind", TRANSCODERS)
def test_a_transcoder_without_targets_says_what_it_needs(kind: str) -> None:
    with pytest.raises(ShapeError, match=r"ActivationBatch\(inputs, targets\)"):
        drawn(kind, "none", 0).training_step(activations(1, 4))
    fresh = create(
        TABLE[kind][0], d_in=D_IN, d_sae=D_SAE, normalize_activations="expected_average_only_in", **TABLE[kind][1]
    )
    with pytest.raises(ShapeError, match=r"targets \(\.\.\., 5\) are needed to normalise them"):
        fresh.fit_normalization(activations(1, 4).float())


@pytest.mark.parametrize("kind", TRANSCODERS)
def test_larger_targets_leave_the_loss_of_a_normalised_transcoder_alone_and_make_its_output_larger(kind: str) -> None:
    small, large = drawn(kind, "expected_average_only_in", 3), drawn(kind, "expected_average_only_in", 3)
    batch = batch_for(small, 5, rows=40)
    assert batch.targets is not None
    scaled = ActivationBatch(batch.inputs, batch.targets * 1000.0)
    for sae, pairs in ((small, batch), (large, scaled)):
        sae.forget_statistics()
        sae.double().fit_normalization(pairs)
    with torch.no_grad():
        same(large(batch.inputs), small(batch.inputs) * 1000.0, 1e-7)
        same(large.encode(batch.inputs), small.encode(batch.inputs))
    context = StepContext(dead=torch.tensor([1, 4, 6]))
    losses = [sae.train().training_step(pairs, context) for sae, pairs in ((small, batch), (large, scaled))]
    assert losses[0].losses.keys() == losses[1].losses.keys()
    for name, loss in losses[0].losses.items():
        same(losses[1].losses[name], loss)
    for step in losses:
        step.loss.backward()
    for (name, ours), theirs in zip(small.named_parameters(), large.parameters(), strict=True):
        assert ours.grad is not None, name
        same(theirs.grad, ours.grad)


@pytest.mark.parametrize("architecture", LINEAR)
def test_every_site_is_normalised_by_factors_of_its_own(architecture: str) -> None:
    """Making one site a hundred times as large changes its own factor and output, and nothing else."""
    kind, x = f"{architecture} crosscoder", activations(2, 50)
    sae, other = drawn(kind, "expected_average_only_in", 1), drawn(kind, "expected_average_only_in", 1)
    larger = torch.cat([x[:, :4], 100.0 * x[:, 4:]], -1)
    for fitted, data in ((sae, x), (other, larger)):
        fitted.forget_statistics()
        fitted.double().fit_normalization(data)
        a, b = (part.scale for part in fitted.normalization.parts)
        assert float(a) == pytest.approx(2.0 / float(data[:, :4].norm(dim=-1).mean()), rel=1e-12)
        assert float(b) == pytest.approx(2.0**0.5 / float(data[:, 4:].norm(dim=-1).mean()), rel=1e-12)
    with torch.no_grad():
        same(other.encode(larger), sae.encode(x))
        same(other(larger)[:, :4], sae(x)[:, :4])
        same(other(larger)[:, 4:], 100.0 * sae(x)[:, 4:])
    same(other.train().training_step(larger).loss, sae.train().training_step(x).loss)


def test_a_temporal_sae_sees_only_the_past() -> None:
    sae = drawn("temporal", "none", 0, n_attn_layers=2)
    x = activations(1, 7)
    changed = x.clone()
    changed[4:] = activations(2, 3)
    with torch.no_grad():
        same(sae(changed)[:4], sae(x)[:4])
        assert not torch.allclose(sae(changed)[4:], sae(x)[4:])


def test_matching_pursuit_keeps_unit_rows_while_it_trains() -> None:
    sae = create("matching_pursuit", d_in=D_IN, d_sae=D_SAE, dtype="float64", max_iterations=3)
    optimizer = torch.optim.Adam(sae.parameters(), lr=0.1)
    for seed in range(3):
        sae.training_step(activations(seed, 20)).loss.backward()
        optimizer.step()
        sae.after_step()
    same(sae.W_dec.norm(dim=-1), torch.ones(D_SAE, dtype=torch.float64))
