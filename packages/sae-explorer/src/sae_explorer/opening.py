"""From what a user names to dictionaries with their studies, and the model behind them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, final

from sae_core import SAE
from sae_core.config import require, structure
from sae_core.errors import ConfigError
from sae_core.sae import load_named
from sae_core.yaml_text import set_by_override
from sae_lm.lens import Lens
from sae_lm.model import place
from sae_lm.origin import known_settings, source_of
from sae_lm.source import HuggingFaceSource, HuggingFaceSourceConfig
from sae_lm.studies import StudyConfig, StudyFolder, settings_from, study

from sae_explorer.reading import Studied

__all__ = ["Opened", "open_studied"]


@final
@dataclass(frozen=True, eq=False)
class Opened:
    """Dictionaries by name, and the source that holds their model; None where it was not asked for."""

    studied: Mapping[str, Studied]
    source: HuggingFaceSource | None


def open_studied(
    named: Sequence[str] | Mapping[str, SAE[Any]],
    *,
    studies: Sequence[str] = (),
    tokens: int | None = None,
    text: str | None = None,
    device: str = "auto",
    overrides: Sequence[str] = (),
    with_model: bool = True,
    say: Callable[[str], object] = print,
) -> Opened:
    """Dictionaries with their studies: each a path or RELEASE:ID, to load or loaded already; `studies` in the same order, or
    SAE/study.

    A study that is not there is made first. `overrides` change the source's settings, or with ``study.`` in front the
    study's. Raises ConfigError for dictionaries of different models, before any study is made.
    """
    names = list(named)
    require(len(studies) in (0, len(names)), f"--study: {len(studies)} folders for {len(names)} dictionaries")
    require(len(set(names)) == len(names), "explore: a dictionary is named twice")
    config, settings = settings_from(overrides, tokens)
    saes = named if isinstance(named, Mapping) else {name: load_named(name, device=place(device)) for name in named}
    folders = {name: Path(studies[n]) if studies else _study_folder(name) for n, name in enumerate(names)}
    found = {name: StudyFolder(folder) for name, folder in folders.items() if (folder / "index.json").exists()}
    _require_one_model(saes, found, settings)
    source: HuggingFaceSource | None = None
    for name in names:
        if name not in found:
            made = _make_study(name, saes[name], folders[name], config, settings, text, device, say)
            source = source or made
            found[name] = StudyFolder(folders[name])
    if source is None and with_model:
        known: dict[str, Any] = {**found[names[0]].index["source"], "device": device}
        for override in settings:
            set_by_override(known, override)
        source = HuggingFaceSource(structure(known, HuggingFaceSourceConfig, where="the study's source"))
    lens = _lens(source) if with_model and source is not None else None
    return Opened({name: Studied(name, saes[name], found[name], lens=lens) for name in names}, source)


def _require_one_model(saes: Mapping[str, SAE[Any]], found: Mapping[str, StudyFolder], settings: Sequence[str]) -> None:
    """Several dictionaries share a model, as their studies say, or where there is none, what they were trained on."""
    if len(saes) < 2:
        return
    models: dict[str, tuple[str, ...]] = {}
    for name, sae in saes.items():
        known = (
            dict(cast("Mapping[str, Any]", found[name].index["source"]))
            if name in found
            else known_settings(sae.metadata)
        )
        if name not in found:
            for override in settings:
                set_by_override(known, override)
        require("model" in known, f"explore: {name} does not say of which model it is; give --set model=NAME")
        models[name] = tuple(str(known.get(key) or HuggingFaceSourceConfig.__dataclass_fields__[key].default)
                             for key in ("model", "revision", "model_class"))  # fmt: skip
    require(
        len(set(models.values())) == 1,
        "explore: the dictionaries are of different models: "
        + ", ".join(f"{name} of {model[0]}" for name, model in models.items()),
    )


def _study_folder(name: str) -> Path:
    if Path(name).is_dir():
        return Path(name) / "study"
    return Path("studies") / "".join(c if c.isalnum() or c in "-._" else "_" for c in name)


def _make_study(
    name: str,
    sae: SAE[Any],
    folder: Path,
    config: StudyConfig,
    settings: Sequence[str],
    text: str | None,
    device: str,
    say: Callable[[str], object],
) -> HuggingFaceSource:
    """Study a dictionary; what its activations came from holds the model."""
    from tqdm.auto import tqdm

    source, places, _ = source_of({name: sae}, overrides=settings, text=text, device=device, command="study")
    say(
        f"{folder}: no study yet; studying {sae.d_sae:,} latents on {config.tokens:,} positions (Ctrl-C keeps the state)"
    )
    with tqdm(total=config.tokens, unit="token", disable=None) as bar:
        study(
            sae, source, folder, config, at=places[name], facts={"sae_path": name},
            progress=lambda done: bar.update(done - bar.n),
        )  # fmt: skip
    return source


def _lens(source: HuggingFaceSource) -> Lens | None:
    try:
        return Lens.of(source.language_model.model)
    except ConfigError:  # a model without an unembedding: there are no logits to show
        return None
