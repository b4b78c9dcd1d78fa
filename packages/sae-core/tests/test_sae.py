from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from sae_core import SAE, ActivationBatch, DenseCodes, SparseCodes, create
from sae_core.errors import ConfigError, SaeCoreError, ShapeError, UnknownNameError
from sae_core.sae import SAEConfig


def test_topk_by_hand() -> None:
    sae = create("topk", d_in=2, d_sae=3, k=1, rescale_acts_by_decoder_norm=False)
    with torch.no_grad():
        sae.W_enc.copy_(torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]]))
        sae.W_dec.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]]))
        sae.b_enc.copy_(torch.tensor([0.0, 0.5, 0.0]))
        sae.b_dec.copy_(torch.tensor([1.0, 1.0]))
    x = torch.tensor([[3.0, 2.0], [-4.0, -4.0]])  # centred: (2, 1) and (-5, -5)
    assert sae.encode(x).tolist() == [[0.0, 0.0, 3.0], [0.0, 0.0, 0.0]]
    assert sae(x).tolist() == [[2.5, 2.5], [1.0, 1.0]]


def test_jumprelu_passes_only_what_is_strictly_above_its_threshold() -> None:
    sae = create("jumprelu", d_in=1, d_sae=3)
    with torch.no_grad():
        sae.W_enc.copy_(torch.ones(1, 3))
        sae.threshold.copy_(torch.tensor([1.0, 2.0, 0.0]))
    assert sae.encode(torch.tensor([[2.0], [-1.0]])).tolist() == [[2.0, 0.0, 2.0], [0.0, 0.0, 0.0]]


@pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu"])
def test_one_seed_gives_the_same_parameters_and_another_seed_others(architecture: str) -> None:
    fields = {"k": 2} if architecture == "topk" else {}
    first, again, other = (create(architecture, d_in=4, d_sae=8, seed=seed, **fields) for seed in (1, 1, 2))
    assert torch.equal(first.W_dec, again.W_dec)
    assert not torch.equal(first.W_dec, other.W_dec)


def test_creating_an_sae_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    create("topk", d_in=4, d_sae=8, k=2)
    assert torch.rand(1) == expected


@pytest.mark.parametrize(
    ("architecture", "fields", "message"),
    [
        ("topk", {"d_in": 4, "d_sae": 8, "kk": 3}, "unknown key 'kk'; did you mean 'k'"),
        ("topk", {"d_in": 4, "d_sae": 8, "k": 9}, r"k must lie in \[1, d_sae = 8\], not 9"),
        ("topk", {"d_in": 4, "d_sae": 8, "k": 0}, r"k must lie in \[1, d_sae = 8\], not 0"),
        ("topk", {"d_in": 4, "d_sae": 8, "k": {"from": 20, "to": 4}}, "not 20"),
        ("standard", {"d_in": 4, "d_sae": 0}, "d_sae must be positive, not 0"),
        ("standard", {"d_in": -1, "d_sae": 8}, "d_in must be positive, not -1"),
        ("standard", {"d_in": 4}, "missing key 'd_sae'"),
        ("standard", {"d_in": 4, "d_sae": 8, "normalize_activations": "layernorm"}, "layernorm"),
        ("standard", {"d_in": 4, "d_sae": 8, "reshape_activations": "hook_zz"}, "hook_zz"),
        ("standard", {"d_in": 4, "d_sae": 8, "decoder_init_norm": 0.0}, "decoder_init_norm"),
        ("standard", {"d_in": 4, "d_sae": 8, "lp_norm": 0.0}, "lp_norm must be positive"),
        ("standard", {"d_in": 4, "d_sae": 8, "activation_normalization_factor": 2.0}, "constant_scalar_rescale"),
        ("jumprelu", {"d_in": 4, "d_sae": 8, "jumprelu_bandwidth": 0.0}, "jumprelu_bandwidth must be positive"),
    ],
)
def test_impossible_settings_are_refused_naming_the_field(
    architecture: str, fields: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        create(architecture, **fields)


def test_an_unknown_architecture_says_what_is_near() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'topk'"):
        create("tpok", d_in=4, d_sae=8)


@pytest.mark.parametrize("dtype", ["int32", "float31", torch.int64, "float8_e4m3fn"])
def test_a_dtype_that_is_not_floating_point_is_refused(dtype: object) -> None:
    with pytest.raises(ConfigError, match="is not a floating point type"):
        create("topk", d_in=4, d_sae=8, k=2, dtype=dtype)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(3, 5), r"input of shape \(3, 5\), but the last dimension must be 4"),
        (torch.zeros(3, 4, dtype=torch.int64), "dtype torch.int64; floating point is needed"),
        (torch.zeros(()), "last dimension must be 4"),
        (torch.zeros(3, 4, device="meta"), "input is on meta, the SAE on cpu"),
        ([1.0, 2.0], "input must be a tensor, not list"),
        (torch.ones(3, 4).to_sparse(), r"input has layout torch.sparse_coo; pass it dense"),
    ],
)
def test_unusable_input_is_refused(x: torch.Tensor, message: str) -> None:
    sae = create("topk", d_in=4, d_sae=8, k=2)
    for call in (sae, sae.encode, sae.encode_sparse, sae.training_step):
        with pytest.raises(ShapeError, match=message):
            call(x)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": None}, "seed must be a whole number of 64 bits, not None"),
        ({"seed": 2**70}, "seed must be a whole number"),
        ({"device": None}, "device 'None' cannot be used here"),
        ({"architecture": None}, "architecture must be a name, as 'topk', not None"),
        ({"d_in": 10**9, "d_sae": 10**9}, "d_in = 1000000000 and d_sae = 1000000000 cannot be"),
    ],
)
def test_what_no_sae_can_be_made_of_is_one_error(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        create(**{"architecture": "topk", "d_in": 4, "d_sae": 8, "k": 2, **arguments})


def test_every_input_has_its_own_target() -> None:
    sae = create("topk", d_in=4, d_out=3, d_sae=8, k=2)
    for shape in [(1, 3), (3,), (4, 3), (1, 3, 3)]:  # the first two would be broadcast: the target of one row for all
        with pytest.raises(ShapeError, match=r"targets of leading shape .*, but inputs of \(3,\); every input"):
            sae.training_step(ActivationBatch(torch.ones(3, 4), torch.ones(shape)))
    with pytest.raises(ShapeError, match=r"a batch of shape \(0, 4\) has no row to train on"):
        sae.training_step(ActivationBatch(torch.ones(0, 4), torch.ones(0, 3)))


@pytest.mark.parametrize("fields", [{}, {"normalize_activations": "layer_norm"}, {"d_out": 3, "skip": True}])
def test_latents_are_decoded_with_the_input_that_they_come_from(fields: dict[str, Any]) -> None:
    sae = create("topk", d_in=4, d_sae=8, k=2, **fields)
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sae.decode(sae.encode_sparse(x), x=x), sae(x))
    for other in (x.reshape(6, 4), x.transpose(0, 1), x[:1], x[0]):
        for latents in (sae.encode(x), sae.encode_sparse(x)):
            with pytest.raises(ShapeError, match=r"latents of leading shape \(2, 3\), but x has"):
                sae.decode(latents, x=other)


def test_latents_of_another_dictionary_are_refused() -> None:
    sae = create("topk", d_in=4, d_sae=8, k=2)
    with pytest.raises(ShapeError, match="last dimension must be 8"):
        sae.decode(torch.zeros(2, 9))
    with pytest.raises(ShapeError, match="codes of a dictionary of 9 latents, this one has 8"):
        sae.decode(SparseCodes.from_dense(torch.zeros(2, 9)))


def test_heads_are_joined_and_separated_again() -> None:
    flat, heads = (create("standard", d_in=6, d_sae=12, reshape_activations=mode) for mode in ("none", "hook_z"))
    x = torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(0))
    assert heads(x).shape == (5, 2, 3)
    assert torch.equal(heads(x).flatten(-2), flat(x.flatten(-2)))
    assert torch.equal(heads(x.flatten(-2)), flat(x.flatten(-2)))
    with pytest.raises(ShapeError, match="last dimension must be 6"):
        heads(torch.zeros(5, 4, 3))


@pytest.mark.parametrize("name", ["layer_norm", "constant_norm_rescale"])
def test_decoding_alone_asks_for_the_input_where_units_depend_on_it(name: str) -> None:
    sae = create("standard", d_in=4, d_sae=8, normalize_activations=name)
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ConfigError, match=r"sae\.decode\(latents, x=x\)"):
        sae.decode(sae.encode(x))
    torch.testing.assert_close(sae.decode(sae.encode(x), x=x), sae(x))


def test_half_precision_input_is_cast_and_the_output_has_the_parameters_precision() -> None:
    sae = create("topk", d_in=4, d_sae=8, k=2)
    x = torch.ones(2, 4, dtype=torch.bfloat16)
    assert torch.equal(sae(x), sae(x.float()))
    assert sae(x).dtype == torch.float32


def test_thresholds_keep_float32_in_a_bfloat16_sae() -> None:
    sae = create("jumprelu", d_in=4, d_sae=8, dtype="bfloat16", jumprelu_init_threshold=0.0123)
    assert (sae.W_enc.dtype, sae.threshold.dtype) == (torch.bfloat16, torch.float32)
    assert sae.threshold[0].item() == pytest.approx(0.0123, rel=1e-6)


def test_a_copied_sae_is_independent() -> None:
    sae = create("topk", d_in=4, d_sae=8, k=2)
    other = copy.deepcopy(sae)
    with torch.no_grad():
        other.W_dec.zero_()
    assert sae.W_dec.abs().sum() > 0


def test_a_zero_decoder_row_contributes_nothing_instead_of_nan() -> None:
    sae = create("topk", d_in=4, d_sae=8, k=8)
    with torch.no_grad():
        sae.W_dec[3] = 0.0
        sae.b_enc.fill_(1.0)
    x = torch.ones(2, 4)
    assert sae(x).isfinite().all()
    assert sae.encode(x)[:, 3].eq(0).all()
    assert sae.training_step(x).loss.isfinite()


def test_a_ranking_by_decoder_norm_prefers_the_longer_contribution() -> None:
    for rescale, chosen in ((True, 1), (False, 0)):
        sae = create("topk", d_in=1, d_sae=2, k=1, rescale_acts_by_decoder_norm=rescale, apply_b_dec_to_input=False)
        with torch.no_grad():
            sae.W_enc.copy_(torch.tensor([[2.0, 1.0]]))
            sae.W_dec.copy_(torch.tensor([[1.0], [10.0]]))
        assert sae.encode_sparse(torch.ones(1, 1)).indices.tolist() == [chosen]


def test_codes_of_a_wide_sparse_dictionary_are_sparse_and_of_a_dense_one_dense() -> None:
    x = torch.randn(600, 16, generator=torch.Generator().manual_seed(0))
    for shift, kind in ((-50.0, SparseCodes), (0.0, DenseCodes)):
        sae = create("standard", d_in=16, d_sae=1024, decoder_init_norm=1.0)
        with torch.no_grad():
            sae.b_enc.fill_(shift)
        assert isinstance(sae.encode_rows(sae.prepare(x)), kind)


def test_every_config_field_has_a_meaning_to_show() -> None:
    for architecture in ("standard", "topk", "jumprelu"):
        config_class = type(create(architecture, d_in=4, d_sae=128).config)
        assert issubclass(config_class, SAEConfig)
        assert all(field.metadata.get("help") for field in dataclasses.fields(config_class))


def test_errors_share_one_root() -> None:
    with pytest.raises(SaeCoreError):
        create("topk", d_in=4, d_sae=8, k=2)(torch.zeros(1, 3))
    assert issubclass(ShapeError, ValueError)
    assert isinstance(SAE.load, type(lambda: None))
