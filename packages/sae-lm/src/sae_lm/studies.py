"""A study of a dictionary: what each latent is about, from one pass over text, in a folder that others can read.

`study` runs text through the model as far as the dictionary reads, and keeps for each latent its top examples, a random sample
of all its activations in bands from strong to weak, a histogram, its density, the latents that fire together with it, and the
tokens that it promotes and suppresses. Memory is bounded by settings and the number of latents, whatever the text's length. The
state is written every few minutes; a study that was stopped goes on from there, to the same bits.

`StudyFolder` reads the result. The files are described in docs/study.md.
"""

# F d_sae, K examples of a latent, L positions of a snippet, C positions of a window

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast, final

import torch
from sae_core import SAE
from sae_core.codes import SparseCodes
from sae_core.config import check_fields, option, require, structure, unstructure
from sae_core.errors import ConfigError, DataError, FormatError
from sae_core.training.facts import named_architecture
from sae_core.yaml_text import set_by_override
from torch import Tensor

from sae_lm.collect import BIN_EDGES, CoFiring, Kept, SnippetReader, Totals, first_position, hashed, peaks
from sae_lm.hooks import capture
from sae_lm.inputs import model_inputs
from sae_lm.latents import scattered
from sae_lm.lens import Lens, logit_lens
from sae_lm.places import Route, route_of
from sae_lm.results import write_atomically
from sae_lm.source import HuggingFaceSource
from sae_lm.splicing import evaluating
from sae_lm.text import Part
from sae_lm.tokens import Windows

__all__ = ["STUDY_FORMAT", "STUDY_VERSION", "Example", "StudyConfig", "StudyFolder", "settings_from", "study"]

STUDY_FORMAT = "sae-study"
STUDY_VERSION = 1
_STATE, _TOKENS = "state.safetensors", "windows.part"


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """How much a study looks at, and how much it keeps."""

    tokens: int = option(default=200_000, help="positions to look at, about")
    top: int = option(default=16, help="examples of the largest activations, for each latent")
    sampled: int = option(default=20, help="examples drawn at random from all windows in which a latent is active")
    bands: int = option(
        default=5, help="bands of equal size, from strong to weak, that the random examples are sorted into"
    )
    snippet: int = option(default=32, help="positions around an example's peak whose activations are kept")
    partners: int = option(default=16, help="latents that fire together with it, for each latent")
    cofiring_positions: int = option(
        default=20_000, help="positions at which pairs of active latents are counted, about"
    )
    cofiring_pairs: int = option(
        default=4_000_000, help="pairs counted at once, at most; the rarest are given up beyond"
    )
    logits: int = option(default=10, help="tokens that each latent promotes and suppresses; 0 for none")
    seed: int = option(default=0, help="seed of the random choices")
    save_minutes: float = option(default=5.0, help="minutes between saved states")

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("tokens", "top", "bands", "snippet", "cofiring_pairs"):
            require(getattr(self, name) > 0, f"{name} must be positive, not {getattr(self, name)}")
        for name in ("sampled", "partners", "cofiring_positions", "logits", "save_minutes"):
            require(getattr(self, name) >= 0, f"{name} must not be negative, it is {getattr(self, name)}")
        require(
            self.sampled % self.bands == 0, f"sampled: {self.sampled} examples do not fill {self.bands} bands equally"
        )

    def memory(self, d_sae: int) -> int:
        """Bytes kept for a dictionary of `d_sae` latents while the study runs, beside the model and one batch."""
        example = 8 + 8 + 8 + 4 + 2 * self.snippet
        return d_sae * ((self.top + self.sampled) * example + 4 * (len(BIN_EDGES) - 1) + 40) + 16 * self.cofiring_pairs


def settings_from(overrides: Sequence[str], tokens: int | None = None) -> tuple[StudyConfig, list[str]]:
    """The study that changes of settings, ``key=value``, ask for with ``study.`` before the key, and all other changes.

    >>> config, others = settings_from(["study.top=4", "model=gpt2"], tokens=1000)
    >>> config.top, config.tokens, others
    (4, 1000, ['model=gpt2'])
    """
    own: dict[str, Any] = {} if tokens is None else {"tokens": tokens}
    others: list[str] = []
    for override in overrides:
        if override.startswith("study."):
            set_by_override(own, override.removeprefix("study."))
        else:
            others.append(override)
    return structure(own, StudyConfig, where="study"), others


@torch.no_grad()
def study(
    sae: SAE[Any],
    source: HuggingFaceSource,
    folder: str | Path,
    config: StudyConfig | None = None,
    *,
    at: str | None = None,
    part: Part = "all",
    batch_prompts: int = 8,
    facts: Mapping[str, Any] | None = None,
    progress: Callable[[int], object] | None = None,
) -> Path:
    """Study `sae` on the source's text and write the result to `folder`; return the index's path.

    The dictionary may be of any kind; its place is what `at` says, or else its metadata, or else the source's hook point. If
    the folder holds the state of a study with the same settings that was stopped, this goes on from there. `facts` are kept in
    the index. `progress` is called with the number of positions after each batch.

    Raises ConfigError when the folder holds another study, DataError when the text gives no position.
    """
    config = config or StudyConfig()
    folder = Path(folder)
    model = source.language_model.model
    named = any(isinstance(sae.metadata.get(key), str) for key in ("hook_name", "hf_hook_name"))
    route = route_of(sae, model, at or (None if named or not sae.reconstructs_input else str(source.point)))
    architecture = named_architecture(sae)
    settings = {
        "study": {k: v for k, v in unstructure(config).items() if k != "save_minutes"},
        "place": str(route),
        "part": part,
        "source": {k: v for k, v in unstructure(source.config).items() if k not in ("device", "batch_prompts")},
        "sae": {"architecture": architecture, "config": unstructure(sae.config), "weights": _fingerprint(sae)},
        "batch_prompts": batch_prompts,
    }
    run = _Run(sae, source, route, config, folder, settings, batch_prompts, part)
    run.collect(progress)
    return run.finish(dict(facts or {}))


@final
class _Run:
    """One study: the collectors, and where in the text it stands."""

    def __init__(
        self,
        sae: SAE[Any],
        source: HuggingFaceSource,
        route: Route,
        config: StudyConfig,
        folder: Path,
        settings: Mapping[str, Any],
        batch_prompts: int,
        part: Part,
    ) -> None:
        self.sae, self.source, self.route, self.config, self.folder = sae, source, route, config, folder
        self.settings = json.loads(json.dumps(settings, default=str))
        self.model, self.device = source.language_model.model, source.language_model.device
        self.size = source.rules.context_size
        snippet, d_sae, device = min(config.snippet, self.size), sae.d_sae, sae.device
        rate = min(1.0, config.cofiring_positions / config.tokens)
        self.totals = Totals(d_sae, device)
        self.best = Kept(d_sae, config.top, snippet, device)
        self.sample = Kept(d_sae, config.sampled, snippet, device)
        self.cofiring = CoFiring(d_sae, rate, config.cofiring_pairs, config.seed, device)
        self.positions = self.windows = 0
        state = self._read_state()
        self.stream = source.windows(part, rows=batch_prompts, state=state)
        self.tokens = folder / _TOKENS

    def collect(self, progress: Callable[[int], object] | None) -> None:
        """Run text until enough positions were seen, saving the state now and then and when interrupted."""
        saved = time.monotonic()
        try:
            while self.positions < self.config.tokens and (batch := next(self.stream, None)) is not None:
                self._add(batch)
                if progress is not None:
                    progress(self.positions)
                if time.monotonic() - saved > 60 * self.config.save_minutes:
                    self._save_state()
                    saved = time.monotonic()
        except KeyboardInterrupt:
            self._save_state()
            raise
        if not self.positions:
            raise DataError("study: the text gives no token that counts")

    def finish(self, facts: Mapping[str, Any]) -> Path:
        """Write all files, the index last, and remove what was only for going on."""
        from safetensors.torch import save

        examples, used = self._examples()
        numbers, contents = torch.unique(examples["window"][examples["window"] >= 0], return_inverse=True)
        examples["window"][examples["window"] >= 0] = contents
        stored = torch.from_file(str(self.tokens), size=self.windows * self.size, dtype=torch.int32).view(-1, self.size)
        windows = stored[numbers].clone()
        latents = self._latents()
        files = {
            "latents.safetensors": save({name: value.contiguous() for name, value in latents.items()}),
            "examples.safetensors": save({name: value.contiguous() for name, value in examples.items()}),
            "windows.safetensors": save({"tokens": windows, "number": numbers}),
        }
        ids = set(windows[windows >= 0].unique().tolist())
        for name in ("promoted_tokens", "suppressed_tokens"):
            if name in latents:
                ids |= set(latents[name].unique().tolist())
        texts = _texts(self.source.tokenizer, sorted(ids))
        files["tokens.json"] = json.dumps(texts, ensure_ascii=False).encode()
        for name, content in files.items():
            write_atomically(self.folder / name, content)
        index = {
            "format": STUDY_FORMAT,
            "version": STUDY_VERSION,
            **facts,
            **self.settings,
            "d_sae": self.sae.d_sae,
            "metadata": self.sae.metadata,
            "text": self.source.config.text.description,
            "positions": self.positions,
            "windows": self.windows,
            "context_size": self.size,
            "cofiring": {"positions": int(self.cofiring.seen[0]), "largest_count_given_up": self.cofiring.given_up},
            "active_latents": used,
            "files": {n: {"bytes": len(c), "sha256": hashlib.sha256(c).hexdigest()} for n, c in files.items()},
        }
        path = write_atomically(self.folder / "index.json", json.dumps(index, indent=2, default=str).encode())
        for name in (_STATE, _TOKENS):
            (self.folder / name).unlink(missing_ok=True)
        return path

    def _add(self, batch: Windows) -> None:
        codes = self._codes(batch)
        found = peaks(codes)
        first = self.windows
        reader = SnippetReader(codes, self.best.snippets.shape[-1])
        self.totals.add(codes, found)
        self.best.offer(found, found.values.abs().double(), first, reader)
        numbers = (found.windows + first) * self.sae.d_sae + found.latents
        self.sample.offer(found, hashed(numbers, self.config.seed), first, reader)
        if self.config.cofiring_positions:
            self.cofiring.add(codes, first)
        stored = torch.full((len(batch), self.size), -1, dtype=torch.int32)
        stored[:, : batch.tokens.shape[1]] = torch.where(batch.attended, batch.tokens, -1).int()
        with self.tokens.open("ab") as file:
            file.write(stored.numpy().tobytes())
        self.windows += len(batch)
        self.positions += int(batch.kept.sum())

    def _codes(self, batch: Windows) -> SparseCodes:
        """The latents of a batch of windows (windows, context size); where positions do not count, none is active."""
        args, kwargs = model_inputs(self.model, batch, self.device)
        activations = capture(self.model, list(dict.fromkeys(p.point for p in self.route.reads)), *args, **kwargs)
        rows = [place.read(activations[str(place.point)]).reshape(-1, place.width) for place in self.route.reads]
        x = torch.cat([part.to(self.sae.device, self.sae.dtype) for part in rows], dim=-1)
        if len(x) != batch.tokens.numel():
            raise DataError(f"study: {self.route} has {len(x)} positions for tokens {tuple(batch.tokens.shape)}")
        kept = batch.kept.flatten().nonzero().squeeze(1).to(x.device)
        with evaluating(self.sae):
            if self.sae.reads_sequences:
                from sae_lm.latents import select_rows

                whole = self.sae.encode_sparse(x.view(*batch.tokens.shape, -1))
                codes = select_rows(whole.reshape(whole.rows), kept)
            else:
                codes = self.sae.encode_sparse(x[kept])
        length = batch.tokens.shape[1]
        at = kept // length * self.size + kept % length  # shorter windows are padded to the full size
        return scattered(codes, at, (len(batch), self.size)).detach()

    def _latents(self) -> dict[str, Tensor]:
        totals = self.totals
        found = {
            "count": totals.count,
            "windows": totals.windows,
            "density": (totals.count.double() / self.positions).float(),
            "mean_active": (totals.sum / totals.count.clamp_min(1)).float(),
            "largest": totals.largest,
            "histogram": totals.histogram,
            "histogram_edges": BIN_EDGES,
        }
        if self.config.cofiring_positions and self.config.partners:
            partners, counts, jaccard = self.cofiring.partners(self.config.partners)
            found |= {"partners": partners, "partner_counts": counts, "partner_jaccard": jaccard}
            found["cofiring_count"] = self.cofiring.alone
        if self.config.logits:
            try:
                lens = logit_lens(self.sae, Lens.of(self.model), k=self.config.logits)
            except ConfigError:  # an encoder, or a place outside of the residual stream: there are no such tokens
                pass
            else:
                found |= {
                    "promoted_tokens": lens.promoted.int(),
                    "promoted_logits": lens.promoted_logits,
                    "suppressed_tokens": lens.suppressed.int(),
                    "suppressed_logits": lens.suppressed_logits,
                }
        return {name: value.cpu() for name, value in found.items()}

    def _examples(self) -> tuple[dict[str, Tensor], int]:
        """Top and random examples side by side (F, K): band 0 are the top ones, 1 the strongest of the random ones."""
        sample, config = self.sample, self.config
        strength = torch.where(sample.windows >= 0, sample.values.abs(), -1.0)
        order = strength.argsort(dim=1, descending=True, stable=True)

        def sorted_(kept: Tensor) -> Tensor:
            index = order if kept.dim() == 2 else order.unsqueeze(-1).expand_as(kept)
            return kept.gather(1, index)

        count = (sample.windows >= 0).sum(1, keepdim=True)
        rank = torch.arange(config.sampled, device=count.device).expand(len(count), -1)
        band = torch.where(rank < count, rank * config.bands // count.clamp_min(1) + 1, -1)
        top = torch.where(self.best.windows >= 0, 0, -1)
        parts = {
            name: torch.cat([getattr(self.best, field), sorted_(getattr(sample, field))], dim=1).cpu()
            for name, field in (
                ("window", "windows"), ("position", "positions"), ("value", "values"), ("snippet", "snippets")
            )
        }  # fmt: skip
        parts["band"] = torch.cat([top, band], dim=1).to("cpu", torch.int8)
        starts = first_position(parts["position"].clamp_min(0), self.size, self.best.snippets.shape[-1])
        parts["snippet_start"] = torch.where(parts["window"] >= 0, starts, -1).int()
        parts["position"] = parts["position"].int()
        return parts, int((self.totals.count > 0).sum())

    def _save_state(self) -> None:
        from safetensors.torch import save

        tensors = {
            f"{name}/{key}": value.cpu().contiguous()
            for name, part in self._parts().items()
            for key, value in part.state_dict().items()
        }
        facts = {
            "settings": self.settings, "positions": self.positions, "windows": self.windows,
            "stream": _flattened(self.stream.state_dict(), tensors),
        }  # fmt: skip
        write_atomically(self.folder / _STATE, save(tensors, {"study": json.dumps(facts)}))

    def _read_state(self) -> Mapping[str, Any] | None:
        """Take up what the folder holds: the state of this very study, or nothing."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if (self.folder / "index.json").exists():
            raise ConfigError(f"study: {self.folder} holds a finished study; name another folder, or remove it")
        path = self.folder / _STATE
        if not path.exists():
            (self.folder / _TOKENS).write_bytes(b"")
            return None
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            facts, keys = json.loads(file.metadata()["study"]), list(file.keys())
            if facts["settings"] != self.settings:
                changed = sorted(k for k in self.settings if self.settings[k] != facts["settings"].get(k))
                raise ConfigError(
                    f"study: {self.folder} holds a study with other settings ({', '.join(changed)}); go on with those, or name "
                    "another folder"
                )
            for name, part in self._parts().items():
                part.load_state_dict(
                    {k.partition("/")[2]: file.get_tensor(k) for k in keys if k.startswith(f"{name}/")}
                )
            stream = _restored(facts["stream"], file.get_tensor)
        self.positions, self.windows = int(facts["positions"]), int(facts["windows"])
        stored = self.folder / _TOKENS
        length = self.windows * self.size * 4
        if not stored.exists() or stored.stat().st_size < length:
            raise FormatError(
                f"{stored}: the tokens of the windows seen are missing; remove {self.folder} and start again"
            )
        with stored.open("r+b") as file:
            file.truncate(length)  # windows of after the state was saved are seen again
        return cast("Mapping[str, Any]", stream)

    def _parts(self) -> dict[str, Any]:
        return {"totals": self.totals, "best": self.best, "sample": self.sample, "cofiring": self.cofiring}


@final
@dataclass(frozen=True)
class Example:
    """One example of a latent: token ids and texts of a snippet, the latent's activation at each, and which is the peak.

    `band` is 0 for the latent's top examples, 1 for the strongest of its random ones, and so on. `window` and `start` say where
    in the study's windows the snippet is.
    """

    band: int
    value: float
    tokens: tuple[int, ...]
    texts: tuple[str, ...]
    activations: tuple[float, ...]
    peak: int
    window: int
    start: int


@final
class StudyFolder:
    """Reads a study's folder; files are opened when they are first needed. Raises FormatError for a folder that holds none."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self.index: dict[str, Any] = json.loads((self.path / "index.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise FormatError(f"{self.path}: holds no finished study: {error}") from None
        if self.index.get("format") != STUDY_FORMAT or self.index.get("version") != STUDY_VERSION:
            raise FormatError(
                f"{self.path}: index.json is of format {self.index.get('format')!r}, version {self.index.get('version')}; "
                f"this reads {STUDY_FORMAT!r}, version {STUDY_VERSION}"
            )

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return int(self.index["d_sae"])

    @cached_property
    def latents(self) -> dict[str, Tensor]:
        """Statistics of all latents: (d_sae,) or (d_sae, …), as docs/study.md names them."""
        return self._tensors("latents.safetensors")

    @cached_property
    def tokens(self) -> dict[int, str]:
        """The text of every token that occurs in examples and among promoted and suppressed tokens."""
        return {int(token): text for token, text in json.loads((self.path / "tokens.json").read_text("utf-8")).items()}

    def examples(self, latent: int) -> Iterator[Example]:
        """A latent's examples: the top ones, then those of each band. Raises ConfigError for a latent that is not there."""
        require(0 <= latent < self.d_sae, f"study: there is no latent {latent}; the dictionary has {self.d_sae}")
        found = {name: tensor[latent] for name, tensor in self._examples.items()}
        for number in range(len(found["band"])):
            window = int(found["window"][number])
            if window < 0:
                continue
            start = int(found["snippet_start"][number])
            activations = found["snippet"][number].tolist()
            tokens = self._windows["tokens"][window, start : start + len(activations)].tolist()
            inside = [n for n, token in enumerate(tokens) if token >= 0]
            yield Example(
                band=int(found["band"][number]),
                value=float(found["value"][number]),
                tokens=tuple(tokens[n] for n in inside),
                texts=tuple(self.tokens.get(tokens[n], "") for n in inside),
                activations=tuple(float(activations[n]) for n in inside),
                peak=int(found["position"][number]) - start,
                window=window,
                start=start,
            )

    def promoted(self, latent: int) -> list[tuple[str, float]]:
        """The tokens that a latent promotes most, with what it adds to their logits; empty where the study has none."""
        return self._logits("promoted", latent)

    def suppressed(self, latent: int) -> list[tuple[str, float]]:
        """The tokens that a latent suppresses most."""
        return self._logits("suppressed", latent)

    def partners(self, latent: int) -> list[tuple[int, int, float]]:
        """Latents that are active together with it: latent, number of positions, Jaccard index."""
        if "partners" not in self.latents:
            return []
        columns = (self.latents[name][latent].tolist() for name in ("partners", "partner_counts", "partner_jaccard"))
        return [(int(p), int(c), float(j)) for p, c, j in zip(*columns, strict=True) if p >= 0]

    @cached_property
    def _examples(self) -> dict[str, Tensor]:
        return self._tensors("examples.safetensors")

    @cached_property
    def _windows(self) -> dict[str, Tensor]:
        return self._tensors("windows.safetensors")

    def _logits(self, kind: str, latent: int) -> list[tuple[str, float]]:
        if f"{kind}_tokens" not in self.latents:
            return []
        tokens, logits = (
            self.latents[f"{kind}_tokens"][latent].tolist(),
            self.latents[f"{kind}_logits"][latent].tolist(),
        )
        return [(self.tokens.get(token, ""), float(logit)) for token, logit in zip(tokens, logits, strict=True)]

    def _tensors(self, name: str) -> dict[str, Tensor]:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.path / name, "pt") as file:
                return {key: file.get_tensor(key) for key in list(file.keys())}
        except (OSError, SafetensorError) as error:
            raise FormatError(f"{self.path / name}: {error}") from None


def _fingerprint(sae: SAE[Any]) -> str:
    """Tells dictionaries with other weights apart."""
    digest = hashlib.sha256()
    for name, tensor in sorted(sae.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


_TENSOR = "tensor of the file"


def _flattened(value: Any, tensors: dict[str, Tensor]) -> Any:
    """`value` with every tensor in it moved to `tensors`, and its name there in its place."""
    if isinstance(value, Tensor):
        name = f"stream/{len(tensors)}"
        tensors[name] = value.cpu().contiguous().clone()
        return {_TENSOR: name}
    if isinstance(value, Mapping):
        return {key: _flattened(one, tensors) for key, one in cast("Mapping[str, Any]", value).items()}
    if isinstance(value, list | tuple):
        return [_flattened(one, tensors) for one in cast("Sequence[Any]", value)]
    return value


def _restored(value: Any, tensor: Callable[[str], Tensor]) -> Any:
    """The other way round."""
    if isinstance(value, dict):
        named = cast("dict[str, Any]", value)
        if set(named) == {_TENSOR}:
            return tensor(named[_TENSOR])
        return {key: _restored(one, tensor) for key, one in named.items()}
    return [_restored(one, tensor) for one in cast("list[Any]", value)] if isinstance(value, list) else value


def _texts(tokenizer: Any, ids: Sequence[int]) -> dict[str, str]:
    if tokenizer is None:
        return {str(token): str(token) for token in ids}
    return {str(token): str(tokenizer.decode([token])) for token in ids}
