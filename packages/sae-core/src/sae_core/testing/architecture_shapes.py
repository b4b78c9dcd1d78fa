"""What an architecture promises beyond reconstructing one input: transcoders, skip paths, several sites, where it claims them.

It claims them when its config takes the fields, as those of the linear frame do (`sae_core.architectures.linear`).
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sae_core.errors import ConfigError, ShapeError
from sae_core.plugins.errors import one_line
from sae_core.protocols import ActivationBatch
from sae_core.sae import SAE
from sae_core.sites import Sites
from sae_core.testing.architecture_files import check_saved
from sae_core.testing.architecture_training import check_gradients
from sae_core.testing.kit import Check, NotApplicable, Subject
from sae_core.testing.small import batch_for, pairs_for, train

__all__ = [
    "CHECKS",
    "check_sites",
    "check_skip",
    "check_transcoder",
]


def check_transcoder(subject: Subject) -> None:
    """With `d_out` it learns something other than its input, and is saved and loaded with it; without targets it is refused.

    Compare with the `target` that the objective is given, never with the input; what the auxiliary loss of dead latents is to
    explain is `residual`.
    """
    sae = _check_shape(subject, d_out=12)
    assert sae.d_out == 12, f"d_out 12 gives outputs of width {sae.d_out}"
    try:
        sae.training_step(batch_for(sae, 8))
    except ShapeError:
        return
    raise AssertionError("a transcoder trains without targets")


def check_skip(subject: Subject) -> None:
    """With `skip` the input reaches the output beside the latents, and latents alone are not decoded."""
    sae = _check_shape(subject, d_out=12, skip=True)
    x = batch_for(sae, 8)
    try:
        sae.decode(sae.encode(x))
    except ConfigError:
        return
    raise AssertionError("latents are decoded without the input, which the skip path reads")


def check_sites(subject: Subject) -> None:
    """With several sites to read, all of them are read and written, and each has a normalisation of its own."""
    width = subject.settings.get("d_in", 16)
    sae = _check_shape(subject, reads={"a": width - 7, "b": 7})
    x = batch_for(sae, 64).requires_grad_()
    sae.encode(x).sum().backward()
    assert x.grad is not None, "the latents do not depend on the input as far as autograd knows"
    for site, columns in Sites(sae.reads).slices().items():
        assert bool((x.grad[:, columns] != 0).any()), f"no latent reads the site {site!r}"
    for site, columns in Sites(sae.writes).slices().items():
        assert bool((sae.directions()[:, columns] != 0).any()), f"no latent writes the site {site!r}"


def _check_shape(subject: Subject, **shape: Any) -> SAE:
    """Gradients, learning and files in this shape; NotApplicable where it is refused."""
    said = ", ".join(f"{key}={value!r}" for key, value in shape.items())
    try:
        subject.new(**shape)
    except ConfigError as error:
        raise NotApplicable(f"{said} is refused") from error
    shaped = replace(subject, config={**subject.config, **shape})
    sae: SAE = shaped.new()
    try:
        check_gradients(shaped)
        batch = pairs_for(sae)
        inputs, targets = (batch.inputs, batch.targets) if isinstance(batch, ActivationBatch) else (batch, batch)
        assert targets is not None
        before = _error(sae, inputs, targets)
        train(sae, steps=20, lr=6e-3)
        after = _error(sae, inputs, targets)
        assert after < 0.9 * before, (
            f"twenty steps of training bring the squared error from {before:.3g} to {after:.3g}"
        )
        check_saved(sae, subject.folder / "plain", "")
        for name in ("layer_norm", "covariance_whitening"):
            with suppress(ConfigError):
                normalised: SAE = shaped.new(normalize_activations=name)
                normalised.fit_normalization(batch)
                train(normalised, steps=3)
                normalised.export()
                check_saved(normalised.eval(), subject.folder / name, f"normalize_activations {name}: ")
    except AssertionError as error:
        raise AssertionError(f"with {said}: {error}") from None
    except Exception as error:
        raise AssertionError(f"with {said}: {one_line(error)}") from error
    return sae


@torch.no_grad()
def _error(sae: SAE, inputs: Tensor, targets: Tensor) -> float:
    return float((sae.eval()(inputs) - targets).square().mean())


CHECKS: tuple[Check, ...] = (check_transcoder, check_skip, check_sites)
