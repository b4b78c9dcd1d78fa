"""What every architecture promises of files, and of folding, which files rely on."""

from __future__ import annotations

import copy
from pathlib import Path

import torch

from sae_core.errors import ConfigError
from sae_core.sae import SAE
from sae_core.testing.kit import Check, NotApplicable, Subject
from sae_core.testing.small import batch_for, pairs_for, same, train, trained

__all__ = [
    "CHECKS",
    "NORMALIZATIONS",
    "check_folding",
    "check_save_and_load",
    "check_saved",
    "check_saving_normalised",
    "check_some_latents",
]

NORMALIZATIONS = ("layer_norm", "expected_average_only_in", "covariance_whitening")
"""One that differs from row to row, one factor, one map with a shift."""


def check_save_and_load(subject: Subject) -> None:
    """What is saved is what was there: `SAE.load` gives the same latents and outputs.

    `export` must name every tensor that the forward pass needs, and must not change the SAE that it exports.
    """
    sae = trained(subject)
    loaded = check_saved(sae, subject.folder / "saved", "")
    x = batch_for(sae, 32)
    again = SAE.load(loaded.save(subject.folder / "again"))
    same(again(x), loaded(x), "sae(x) after saving what was loaded", 1e-5)


def check_saving_normalised(subject: Subject) -> None:
    """The same with input normalisations of every kind, or they are refused, when the SAE is made or when it is saved.

    `export` must fold normalisations that are fixed maps into the weights, shift and all (`sae_core.folding`), or keep a single
    factor (`SAE.kept_as_factor`), which refuses what is none.
    """
    for name in NORMALIZATIONS:
        try:
            sae: SAE = subject.new(normalize_activations=name)
        except ConfigError:
            continue
        sae.fit_normalization(pairs_for(sae))
        train(sae, steps=3)
        try:
            sae.export()
        except ConfigError:
            continue
        check_saved(sae.eval(), subject.folder / name, f"normalize_activations {name}: ")


def check_saved(sae: SAE, folder: Path, where: str) -> SAE:
    """What `SAE.load` makes of a saved SAE in eval mode, once it was seen to do the same."""
    x = batch_for(sae, 32)
    state = copy.deepcopy(sae.state_dict())
    loaded = SAE.load(sae.save(folder))
    for name, tensor in sae.state_dict().items():
        assert torch.equal(tensor, state[name]), f"{where}saving changed {name!r}"
    same(loaded.encode(x), sae.encode(x), f"{where}encode(x) after SAE.load", 1e-4)
    same(loaded(x), sae(x), f"{where}sae(x) after SAE.load", 1e-4)
    return loaded


def check_some_latents(subject: Subject) -> None:
    """With `independent_latents`, some latents loaded alone have the values that they have among all.

    They have not where latents compete, as in a top-k or a softmax: then `independent_latents` must stay False. An own tensor
    with one entry a latent says so in `AXES`.
    """
    sae = trained(subject)
    folder = sae.save(subject.folder / "saved")
    whole = SAE.load(folder)
    if not whole.independent_latents:
        raise NotApplicable(f"latents of {whole.architecture} are not independent")
    rows = [sae.d_sae - 1, 0, sae.d_sae // 2, 5]
    some, x = SAE.load(folder, rows=rows), batch_for(sae, 32)
    assert some.d_sae == len(rows), f"SAE.load(rows={rows}) has {some.d_sae} latents"
    same(some.encode(x), whole.encode(x)[:, rows], f"latents {rows} loaded alone and among all", 1e-4)
    kept = torch.zeros(sae.d_sae, dtype=torch.bool)
    kept[rows] = True
    same(some(x), whole.decode(whole.encode(x) * kept, x), f"what latents {rows} decode to alone and among all", 1e-4)


def check_folding(subject: Subject) -> None:
    """Folding decoder norms or a normalisation leaves outputs as they were, or is refused with a ConfigError.

    A class that says `folds` promises it: the input is read by `pre` alone, and where decoder rows shrink by their norms, what
    `AXES` calls with_norm grows by them. An own tensor in units of latents that is not called so breaks it.
    """
    sae = trained(subject)
    x = batch_for(sae, 32)
    before, latents = sae(x), sae.encode(x)
    try:
        sae.fold_decoder_norm()
    except ConfigError:
        pass
    else:
        same(sae(x), before, "sae(x) after fold_decoder_norm", 1e-4)
        assert torch.equal(sae.encode(x) != 0, latents != 0), "other latents are active after fold_decoder_norm"
        if len(sae.writes) == 1:
            norms = sae.directions().norm(dim=-1)
            same(norms, (norms > 0).to(norms.dtype), "the norms of directions() after fold_decoder_norm and one", 1e-4)
    for name in NORMALIZATIONS:
        try:
            sae = subject.new(normalize_activations=name)
        except ConfigError:
            continue
        if not sae.normalization.folds:
            continue
        sae.fit_normalization(pairs_for(sae))
        train(sae, steps=3)
        before, latents = sae.eval()(x), sae.encode(x)
        try:
            sae.fold_normalization()
        except ConfigError:
            continue
        same(sae(x), before, f"normalize_activations {name}: sae(x) after fold_normalization", 1e-4)
        same(sae.encode(x), latents, f"normalize_activations {name}: encode(x) after fold_normalization", 1e-4)
        assert sae.config.normalize_activations == "none", "fold_normalization leaves the normalisation in the config"


CHECKS: tuple[Check, ...] = (check_save_and_load, check_saving_normalised, check_some_latents, check_folding)
