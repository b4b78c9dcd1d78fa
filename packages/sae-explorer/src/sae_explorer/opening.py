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
from sae_lm.origin import source_of
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
    names: Sequence[str],
    *,
    studies: Sequence[str] = (),
    tokens: int | None = None,
    text: str | None = None,
    device: str = "auto",
    overrides: Sequence[str] = (),
    with_model: bool = True,
    say: Callable[[str], object] = print,
) -> Opened:
    """Load dictionaries, each a path or RELEASE:ID, with their studies: `studies` in the same order, or SAE/study.

    A study that is not there is made first. `overrides` change the source's settings, or with ``study.`` in front the
    study's. Raises ConfigError for dictionaries of different models.
    """
    require(len(studies) in (0, len(names)), f"--study: {len(studies)} folders for {len(names)} dictionaries")
    require(len(set(names)) == len(names), "explore: a dictionary is named twice")
    config, settings = settings_from(overrides, tokens)
    source: HuggingFaceSource | None = None
    found: list[tuple[str, SAE[Any], StudyFolder]] = []
    for number, name in enumerate(names):
        sae = load_named(name, device=place(device))
        folder = Path(studies[number]) if studies else _study_folder(name)
        if not (folder / "index.json").exists():
            source = _make_study(name, sae, folder, config, settings, source, text, device, say)
        found.append((name, sae, StudyFolder(folder)))
    models = {name: _model_of(folder) for name, _, folder in found}
    require(
        len({str(model) for model in models.values()}) == 1,
        "explore: the dictionaries are of different models: "
        + ", ".join(f"{name} of {model[0]}" for name, model in models.items()),
    )
    if source is None and with_model:
        known: dict[str, Any] = {**found[0][2].index["source"], "device": device}
        for override in settings:
            set_by_override(known, override)
        source = HuggingFaceSource(structure(known, HuggingFaceSourceConfig, where="the study's source"))
    lens = _lens(source) if with_model and source is not None else None
    return Opened({name: Studied(name, sae, folder, lens=lens) for name, sae, folder in found}, source)


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
    source: HuggingFaceSource | None,
    text: str | None,
    device: str,
    say: Callable[[str], object],
) -> HuggingFaceSource:
    from tqdm.auto import tqdm

    made, places, _ = source_of({name: sae}, overrides=settings, text=text, device=device, command="study")
    say(
        f"{folder}: no study yet; studying {sae.d_sae:,} latents on {config.tokens:,} positions (Ctrl-C keeps the state)"
    )
    with tqdm(total=config.tokens, unit="token", disable=None) as bar:
        study(
            sae, made, folder, config, at=places[name], facts={"sae_path": name},
            progress=lambda done: bar.update(done - bar.n),
        )  # fmt: skip
    return made if source is None else source


def _model_of(folder: StudyFolder) -> tuple[Any, ...]:
    source = cast("Mapping[str, Any]", folder.index["source"])
    return tuple(source.get(key) for key in ("model", "revision", "model_class"))


def _lens(source: HuggingFaceSource) -> Lens | None:
    try:
        return Lens.of(source.language_model.model)
    except ConfigError:  # a model without an unembedding: there are no logits to show
        return None
