"""What every architecture promises of its class, its config, its forward pass and its copies.

What it promises of training is in `architecture_training`, of files in `architecture_files`, and of transcoders and several
sites, where it claims them, in `architecture_shapes`. Each check is small, and its docstring says what usually is the matter
when it fails.
"""

from __future__ import annotations

import copy
import inspect
import pickle
import types
import typing
from contextlib import suppress
from typing import Any, Literal, cast

import torch
from torch import Tensor

from sae_core.codes import SparseCodes
from sae_core.config import Schedule, describe_fields, structure, unstructure
from sae_core.errors import ConfigError, ShapeError
from sae_core.plugins.errors import one_line
from sae_core.protocols import ActivationBatch
from sae_core.sae import SAE, StepContext
from sae_core.testing import architecture_files, architecture_shapes, architecture_training, kit
from sae_core.testing.kit import Check, Subject
from sae_core.testing.small import batch_for, is_finite, pairs_for, same, trained

__all__ = [
    "CHECKS",
    "check_class",
    "check_config",
    "check_config_is_used",
    "check_copies",
    "check_dtypes",
    "check_gradient_to_input",
    "check_latents_add_up",
    "check_latents_are_distinct",
    "check_pickling",
    "check_repeatable",
    "check_rows_are_independent",
    "check_seed",
    "check_shapes",
    "check_sparse_is_dense",
    "check_state_dict",
    "check_wrong_input",
]


def check_class(subject: Subject) -> None:
    """The name leads to a documented SAE class that knows its name, and a small instance of it can be made.

    `architecture` must be the bare registered name: it is what cfg.json says and what `SAE.load` looks up.
    """
    sae_class = cast("type[SAE]", subject.cls)
    name = subject.contribution.spec.name
    assert not inspect.isabstract(sae_class), f"{sae_class.__name__} does not implement all abstract methods of SAE"
    assert "architecture" in vars(sae_class), f"{sae_class.__name__} does not set `architecture` itself"
    assert sae_class.architecture == name, (
        f"{sae_class.__name__}.architecture is {sae_class.architecture!r}, registered as {name!r}"
    )
    kit.check_class(subject)


def check_config(subject: Subject) -> None:
    """The config is a frozen dataclass that refuses what it does not know, survives a round trip, and explains itself.

    Make every field with `sae_core.config.option(help=...)` and check values in ``__post_init__`` with `require`.
    """
    kit.check_options(subject)
    config = subject.new().config
    assert structure(unstructure(config), type(config)) == config, "structure(unstructure(config)) is another config"
    wrongs: list[dict[str, Any]] = [{"d_in": 0}, {"d_sae": -1}, {"d_in": "16"}]
    for wrong in wrongs:
        try:
            subject.new(**wrong)
        except ConfigError:
            continue
        raise AssertionError(f"the config {wrong} was accepted")


def check_config_is_used(subject: Subject) -> None:
    """Every field of the config makes a difference to the start, to training or to outputs, or is refused where it makes none.

    A field that takes a schedule must follow it: read it with `value_at(field, context.progress)`. What has no effect with the
    other fields as they are is refused in ``__post_init__``. Lists, mappings and texts are not tried.
    """
    config = subject.new().config
    hints = typing.get_type_hints(type(config))
    before = _behaviour(subject)
    for described in describe_fields(type(config)):
        if described.name in ("d_in", "d_sae"):
            continue
        value = getattr(config, described.name)
        plain, schedules = _other_values(hints[described.name], value)
        for tried in (plain, schedules):
            accepted: list[Any] = []
            for other in tried:
                try:
                    after = _behaviour(subject, **{described.name: other})
                except ConfigError:
                    continue
                except Exception as error:
                    said = f"{described.name}: {other!r} instead of {value!r} raises {one_line(error)}"
                    raise AssertionError(said) from error
                if other is not None:  # which may stand for the value that is there
                    accepted.append(other)
                if not _alike(before, after):
                    break
            else:
                assert not accepted, (
                    f"{described.name}: {' or '.join(map(repr, accepted))} instead of {value!r} is accepted and changes nothing"
                )


def _other_values(hint: Any, value: Any) -> tuple[list[Any], list[Any]]:
    """Values of a field to try instead of `value`: plain ones, and schedules that start at it."""
    arms = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    plain: list[Any] = []
    schedules: list[Any] = []
    for arm in arms:
        if typing.get_origin(arm) is Literal:
            plain += [choice for choice in typing.get_args(arm) if choice != value]
        elif arm is bool:
            plain += [choice for choice in (True, False) if choice != value]
        elif arm in (int, float):
            plain += _other_numbers(arm, value)
        elif arm is Schedule and isinstance(value, int | float):
            schedules += [{"from": value, "to": other} for other in _other_numbers(float, value)]
    if type(None) in arms and value is not None:
        plain.append(None)
    return plain, schedules


def _other_numbers(arm: type, value: Any) -> list[Any]:
    number = value if isinstance(value, int | float) else 4
    tried = (
        [number / 2, number * 2, number + 1, 0.5, 1, 0] if arm is float else [number // 2, number * 2, number + 1, 1, 0]
    )
    return [arm(each) for each in dict.fromkeys(tried) if isinstance(value, bool) or each != value]


def _behaviour(subject: Subject, **changes: Any) -> list[Tensor]:
    """All that can be seen of an SAE: how it starts, a few steps of training, what it then gives."""
    sae: SAE = subject.new(**changes)
    seen = [tensor.clone() for tensor in sae.tensors().values()]
    batch = pairs_for(sae, 64)
    sae.fit_normalization(batch)
    if sae.starts_from_data:
        sae.start_from(*_first(sae, batch))
    sae.start_at(torch.linspace(-0.5, 0.5, sae.d_out, dtype=sae.dtype))
    dead = torch.arange(0, sae.d_sae, 3)
    for step in range(3):
        sae.train()
        sae.zero_grad()
        out = sae.training_step(batch, StepContext(progress=(step + 1) / 4, dead=dead if step else None, density=0.2))
        out.loss.backward()
        seen += [out.loss.detach(), out.reconstruction.detach()]
        with torch.no_grad():
            for parameter in sae.parameters():
                if parameter.grad is not None:
                    parameter.sub_(0.01 * parameter.grad)
            sae.after_step()
    seen += [tensor.clone() for tensor in sae.tensors().values()]
    x = batch_for(sae, 32)
    with torch.no_grad():
        seen += [sae.eval().encode(x), sae(x)]
        with suppress(ShapeError):
            seen.append(sae(x.view(32, 2, -1)))  # attention heads, where they are joined
        for counts_latents in (True, False):  # whatever is special about latents below zero
            for name, tensor in sae.tensors().items():
                if tensor.dim() == 1 and tensor.is_floating_point() and (sae.axis(name).latent == 0) == counts_latents:
                    tensor.sub_(3)
            seen.append(sae.encode(x))
    return seen


def _first(sae: SAE, batch: Tensor | ActivationBatch) -> tuple[Tensor, Tensor]:
    """What `start_from` is called with."""
    inputs, targets = (batch.inputs, batch.targets) if isinstance(batch, ActivationBatch) else (batch, None)
    prepared = sae.prepare(inputs)
    return prepared.z, prepared.z if sae.reconstructs_input else sae.target_rows(prepared, targets)


def _alike(before: list[Tensor], after: list[Tensor]) -> bool:
    return len(before) == len(after) and all(
        a.shape == b.shape and torch.equal(a, b) for a, b in zip(before, after, strict=True)
    )


def check_seed(subject: Subject) -> None:
    """Parameters depend on the seed alone.

    `reset_parameters` must draw from its generator and from nothing else, and set every parameter: nothing may be left
    as `torch.empty` made it.
    """
    before = torch.get_rng_state()
    one, again, other = subject.new(seed=1), subject.new(seed=1), subject.new(seed=2)
    assert torch.equal(before, torch.get_rng_state()), "making an SAE used the global random generator"
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), f"{name!r} differs between two SAEs of one seed"
        is_finite(tensor, f"{name!r} of a new SAE")
    assert any(not torch.equal(t, other.state_dict()[n]) for n, t in one.state_dict().items()), "seeds 1 and 2 agree"
    marked = subject.new()
    for parameter in marked.parameters():
        torch.nn.init.constant_(parameter, 7.25)
    marked.reset_parameters(torch.Generator().manual_seed(1))
    for name, parameter in marked.named_parameters():
        assert torch.equal(parameter, one.get_parameter(name)), f"reset_parameters does not set all of {name!r}"


def check_shapes(subject: Subject) -> None:
    """Any leading shape goes in, and latents and outputs keep it; zero rows are rows too."""
    sae = trained(subject)
    for leading in ((), (1,), (5,), (2, 3), (0,)):
        x = batch_for(sae, torch.Size(leading).numel()).view(*leading, sae.d_in)
        for what, compute, width in (
            ("encode(x)", sae.encode, sae.d_sae),
            ("encode_sparse(x).to_dense()", lambda x: sae.encode_sparse(x).to_dense(), sae.d_sae),
            ("decode(encode(x), x)", lambda x: sae.decode(sae.encode(x), x), sae.d_out),
            ("sae(x)", sae, sae.d_out),
        ):
            tensor, expected = compute(x), (*leading, width)
            assert tensor.shape == expected, f"{what} of {tuple(x.shape)} is {tuple(tensor.shape)}, not {expected}"
            is_finite(tensor, what)


def check_sparse_is_dense(subject: Subject) -> None:
    """`encode_sparse` and `encode` say the same, and `decode` takes both.

    Latents should depend on the input, and not all of them should be active everywhere.
    """
    sae = trained(subject)
    x = batch_for(sae, 32)
    dense, sparse = sae.encode(x), sae.encode_sparse(x)
    assert isinstance(sparse, SparseCodes), f"encode_sparse gave {type(sparse).__name__}"
    same(sparse.to_dense(), dense, "encode_sparse(x).to_dense() and encode(x)")
    same(sae.decode(sparse, x), sae.decode(dense, x), "decode of sparse and of dense latents")
    same(sae.decode(dense, x), sae(x), "decode(encode(x), x) and sae(x)")
    assert bool((dense != 0).any()), "no latent is active on any input"
    assert not torch.equal(dense[0], dense[1]), "two different inputs have the same latents"


def check_latents_add_up(subject: Subject) -> None:
    """What two halves of the latents decode to adds up to what all do, as latents that lie on several devices need.

    `decode_rows` is a sum over latents beside what it gives when none is active. What acts on the sum, as a nonlinearity or a
    norm, belongs to a normalisation; what makes a latent's part depend on other latents belongs to `encode_rows`.
    """
    sae = trained(subject)
    x = batch_for(sae, 32)
    dense = sae.encode(x)
    first = (torch.arange(sae.d_sae) < sae.d_sae // 2).to(dense.dtype)
    none = sae.decode(torch.zeros_like(dense), x)
    apart = sum((sae.decode(dense * part, x) - none for part in (first, 1 - first)), none)
    same(
        apart, sae.decode(dense, x), "what two halves of the latents decode to, added up, and what all decode to", 1e-4
    )


def check_latents_are_distinct(subject: Subject) -> None:
    """Sparse codes name each latent at most once a row, in training too.

    `SparseCodes` does not look, since that costs more than the rest: whoever makes one by hand must not give a latent twice.
    """
    sae = trained(subject)
    x = batch_for(sae, 32)
    codes = [("encode_sparse(x)", sae.encode_sparse(x))]
    found = sae.train().training_step(pairs_for(sae, 32)).codes
    if isinstance(found, SparseCodes):
        codes.append(("the codes of the objective", found))
    for what, sparse in codes:
        entries = sparse.row_ids() * sparse.d_sae + sparse.indices
        assert bool((sparse.indices >= 0).all() & (sparse.indices < sae.d_sae).all()), (
            f"{what} name latents that are not there"
        )
        assert entries.unique().numel() == entries.numel(), f"{what} name a latent twice in one row"


def check_rows_are_independent(subject: Subject) -> None:
    """In eval mode what a row becomes does not depend on the rows beside it; with `reads_sequences`, on other sequences.

    Whatever selects over the batch in training must use something fixed, like a threshold, in eval mode.
    """
    sae = trained(subject)
    x = batch_for(sae, 24)
    if sae.reads_sequences:
        x = x.view(6, 4, -1)
        together = sae(x)
        same(torch.stack([sae(sequence) for sequence in x]), together, "sae(x) one sequence at a time and all at once")
        same(sae(x.view(2, 3, 4, -1)).flatten(0, 1), together, "sae(x) with and without a leading shape")
        same(sae(x.flip(0)).flip(0), together, "sae(x) with the sequences in another order")
        return
    together = sae(x)
    same(torch.cat([sae(part) for part in x.split(7)]), together, "sae(x) in parts and at once")
    same(torch.stack([sae(row) for row in x]), together, "sae(x) row by row and at once")
    same(sae(x.view(4, 6, -1)).flatten(0, 1), together, "sae(x) with and without a leading shape")
    same(sae(x.flip(0)).flip(0), together, "sae(x) with the rows in another order")


def check_repeatable(subject: Subject) -> None:
    """In eval mode the same input gives the same output, and neither the input nor the SAE is changed by it."""
    sae = trained(subject)
    x = batch_for(sae, 16)
    kept, state = x.clone(), copy.deepcopy(sae.state_dict())
    first = sae(x)
    sae.decode(sae.encode(x), x)
    sae.encode_sparse(x)
    assert torch.equal(x, kept), "the input was changed in place"
    assert torch.equal(first, sae(x)), "the same input gave two outputs"
    for name, tensor in sae.state_dict().items():
        assert torch.equal(tensor, state[name]), f"{name!r} changed in eval mode"


def check_wrong_input(subject: Subject) -> None:
    """An input of the wrong width or type is refused with a ShapeError."""
    sae = subject.new()
    for wrong in (torch.zeros(3, sae.d_in + 1), torch.zeros(3, sae.d_in, dtype=torch.long)):
        try:
            sae(wrong)
        except ShapeError:
            continue
        raise AssertionError(f"an input of shape {tuple(wrong.shape)} and dtype {wrong.dtype} was accepted")


def check_dtypes(subject: Subject) -> None:
    """Outputs have the dtype of the parameters, and inputs of another precision are cast.

    Buffers and constants made inside the forward pass must take the dtype of the parameters.
    """
    for dtype in (torch.float64, torch.bfloat16):
        sae = trained(subject).to(dtype)
        x = batch_for(sae, 8)
        for what, tensor in (("encode(x)", sae.encode(x)), ("sae(x)", sae(x)), ("sae(x.half())", sae(x.half()))):
            assert tensor.dtype == dtype, f"{what} of a {dtype} SAE has dtype {tensor.dtype}"
            is_finite(tensor, f"{what} of a {dtype} SAE")


def check_gradient_to_input(subject: Subject) -> None:
    """Gradients reach the input, as attribution and splicing into a model need."""
    sae = trained(subject)
    x = batch_for(sae, 8).requires_grad_()
    sae(x).square().sum().backward()
    assert x.grad is not None, "the output does not depend on the input as far as autograd knows"
    is_finite(x.grad, "the gradient of the input")
    assert bool((x.grad != 0).any()), "the gradient of the input is zero"


def check_state_dict(subject: Subject) -> None:
    """A state_dict holds all there is: another instance that loads it does the same, in training too."""
    sae, other = trained(subject), subject.new(seed=5)
    other.load_state_dict(sae.state_dict())
    x = batch_for(sae, 16)
    same(other.eval()(x), sae(x), "sae(x) after load_state_dict", 0.0)
    sae.train()
    other.train()
    first, second = sae.training_step(pairs_for(sae)).loss, other.training_step(pairs_for(sae)).loss
    same(second, first, "the loss after load_state_dict", 0.0)


def check_copies(subject: Subject) -> None:
    """`copy.deepcopy` gives an independent SAE that does the same, as averaging weights and sweeps need."""
    sae = trained(subject)
    x = batch_for(sae, 8)
    expected = sae(x)
    copied = copy.deepcopy(sae)
    same(copied(x), expected, "the output of a copy", 0.0)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    same(sae(x), expected, "the output of the original after its copy was changed", 0.0)


def check_pickling(subject: Subject) -> None:
    """`pickle` takes an SAE, as `torch.save` and processes that are spawned do.

    No lambda and no local class may be among the attributes.
    """
    sae = trained(subject)
    x = batch_for(sae, 8)
    again = cast("SAE", pickle.loads(pickle.dumps(sae)))
    same(again(x), sae(x), "the output after pickle", 0.0)
    assert again.config == sae.config, "the config after pickle is another one"


CHECKS: tuple[Check, ...] = (
    check_class,
    check_config,
    check_config_is_used,
    check_seed,
    check_shapes,
    check_sparse_is_dense,
    check_latents_add_up,
    check_latents_are_distinct,
    check_rows_are_independent,
    check_repeatable,
    check_wrong_input,
    check_dtypes,
    check_gradient_to_input,
    check_state_dict,
    check_copies,
    check_pickling,
    *architecture_training.CHECKS,
    *architecture_files.CHECKS,
    *architecture_shapes.CHECKS,
)
