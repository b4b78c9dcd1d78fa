"""`HuggingFaceColumns`: activations of models that read no text: pictures, sound, whatever a data set has in its columns.

A row of the data set is one input. Its columns go to the model as the arguments of `forward` that the config names,
``pixel_values`` for one, stacked `batch_rows` rows at a time; the model stops behind the last hooked module. The activation's
second dimension are the positions, patches or frames, and each position is a row for the dictionary. Part of the data set's
rows is held out, by a hash of their content, and `sae-core eval` measures on those.
"""

# R rows of the data set, C positions of a row, W width

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any, ClassVar, Literal, cast, final

import torch
from sae_core.config import absolute_paths, check_fields, option, require, structure, unstructure
from sae_core.data.shuffle import ShuffleBuffer
from sae_core.errors import ConfigError, DataError, did_you_mean
from sae_core.protocols import ActivationBatch
from torch import Tensor, nn

from sae_lm.batches import Batches, Chunk, Parts, Passes
from sae_lm.hooks import HookPoint, capture
from sae_lm.inputs import evaluating, explaining_memory, to_device
from sae_lm.model import NO_TOKENIZER, LanguageModel, load, place
from sae_lm.source import Site, few_numbers, pick, side_by_side
from sae_lm.text import DatasetConfig, Part, open_dataset, skipped

__all__ = ["ColumnsConfig", "HuggingFaceColumns"]


@dataclass(frozen=True, kw_only=True)
class ColumnsConfig:
    """Which activations of which model on which rows."""

    model: str = option(help="Hub name or local folder", may_be_path=True)
    hook: str | None = option(
        default=None,
        help="module path, e.g. encoder.layer.3, for the module's output; with :input behind it, for its input",
    )
    reads: tuple[str, ...] = option(default=(), help="several places to read, side by side")
    writes: tuple[str, ...] = option(default=(), help="places that the dictionary writes to: targets of a transcoder")
    inputs: dict[str, str] = option(
        help="ARGUMENT: COLUMN, what goes into the model's forward, e.g. {pixel_values: pixel_values}"
    )
    mask: str | None = option(
        default=None, help="column with a 0 or 1 for each position; where it is 0 the position does not count"
    )
    data: DatasetConfig = option(help="the data set: path, split, name, streaming, revision, data_files, data_dir")
    held_out: float = option(default=0.05, help="fraction of the rows kept for evaluation, chosen by hash")
    model_class: str = option(default="AutoModel", help="class of transformers that loads the model")
    revision: str | None = option(default=None, help="branch, tag or commit of a Hub model")
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = option(
        default="float32", help="precision in which the model runs; auto: that of its checkpoint"
    )
    device: str = option(default="auto", help="where the model runs; auto: cuda if there is one")
    model_options: dict[str, Any] = option(default_factory=dict, help="more arguments for from_pretrained")
    channels: Literal["first", "last"] = option(
        default="last",
        help="where the width is: the last dimension of an activation; or the second one, as convolutions have it",
    )
    exclude_first: int = option(
        default=0, help="leave out this many positions at the start of every row, a class token say"
    )
    exclude_last: int = option(default=0, help="leave out this many positions at the end of every row")
    batch_rows: int = option(default=16, help="rows of the data set that run through the model at once")
    buffer_rows: int = option(
        default=65_536, help="activations in the shuffle buffer, allocated at once; several processes share them out"
    )
    buffer_device: str = option(default="model", help="where the buffer is; model: where the activations are")
    prefetch: int | None = option(
        default=None,
        help="batches that a thread runs ahead; if not given, 2 where the model is on a GPU and 0 on a CPU",
    )
    activation_dtype: Literal["model", "float32", "bfloat16", "float16"] = option(
        default="model", help="precision of the activations handed out"
    )
    epochs: int = option(default=1, help="passes over the data set")
    on_exhausted: Literal["stop", "cycle", "error"] = option(
        default="stop", help="when more is asked for than these passes give: end training there, go on, or fail"
    )
    seed: int = option(default=0, help="seed of the shuffling")

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("batch_rows", "buffer_rows", "epochs"):
            require(getattr(self, name) > 0, f"{name} must be positive, not {getattr(self, name)}")
        for name in ("exclude_first", "exclude_last"):
            require(getattr(self, name) >= 0, f"{name} must not be negative, it is {getattr(self, name)}")
        require(self.prefetch is None or self.prefetch >= 0, f"prefetch must not be negative, it is {self.prefetch}")
        require(0 <= self.held_out < 1, f"held_out is a fraction in [0, 1), not {self.held_out}")
        require((self.hook is None) != (not self.reads), "name the place to read with hook, or several with reads")
        require(bool(self.inputs), "inputs: name at least one argument of the model and its column")
        second = [site.name for site in [*self.read_sites, *self.write_sites] if site.second]
        require(not second, f"{second[:1]}: there is no second model here")

    @property
    def read_sites(self) -> list[Site]:
        """The places that are read, in order."""
        return [Site.parse(text) for text in (self.reads or (str(self.hook),))]

    @property
    def write_sites(self) -> list[Site]:
        """The places that are written to, in order."""
        return [Site.parse(text) for text in self.writes]


@final
class HuggingFaceColumns:
    """Activations at places of a model that reads columns of a data set, shuffled.

    Batches are (batch_size, width of all `sites`), or `ActivationBatch` with targets of `target_sites` where the config has
    `writes`. A given `model` stays on its device and is left as it was found. Raises DataError for a column that is not there,
    for a row that is null and for rows that cannot be stacked, and names the row.
    """

    config_class: ClassVar[type[ColumnsConfig]] = ColumnsConfig

    def __init__(self, config: ColumnsConfig, *, model: nn.Module | None = None) -> None:
        self.config = absolute_paths(config)
        self._given = model
        self._stored = list(dict.fromkeys([*config.read_sites, *config.write_sites]))

    @cached_property
    def language_model(self) -> LanguageModel:
        """The model, loaded when first asked for."""
        if self._given is not None:
            return LanguageModel(self._given, None)
        config = self.config
        with explaining_memory(f"the model {config.model}", "dtype to bfloat16"):
            return load(
                config.model, revision=config.revision, model_class=config.model_class, dtype=config.dtype,
                device=config.device, tokenizer=NO_TOKENIZER, with_tokenizer=False, options=config.model_options,
            )  # fmt: skip

    @cached_property
    def _sample(self) -> dict[str, Tensor]:
        """The activations of the first row, which tell widths, positions and precision."""
        first = next(self._rows("all", 0), None)
        if first is None:
            raise DataError(f"data: {self.config.data.path} has no row")
        return self._run([first])[0]

    @property
    def sites(self) -> Mapping[str, int]:
        """Width of every place that is read, in the order of the columns."""
        return {site.name: self._sample[site.name].shape[-1] for site in self.config.read_sites}

    @property
    def target_sites(self) -> Mapping[str, int]:
        """Width of every place that is written to; empty where there are none."""
        return {site.name: self._sample[site.name].shape[-1] for site in self.config.write_sites}

    @property
    def d_in(self) -> int:
        """Width of the activations that are read."""
        return sum(self.sites.values())

    def batches(self, batch_size: int) -> Batches:
        """Shuffled batches of `batch_size` activations, until the passes over the data set are used up; `Resumable`.

        Raises ConfigError when the buffer is too small for a batch, DataError when no row is held out though some should be.
        """
        return Batches(self._passes, batch_size)

    def parts(self, batch_size: int, rank: int, ranks: int) -> Parts:
        """The share of one of several processes: it runs the model on every `ranks`-th `batch_rows` rows of the data set."""
        return Parts(self._passes, batch_size, rank, ranks)

    def fingerprint(self) -> str:
        """Of the first row and of a few of each tensor's numbers of the model."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        _, first = next(self._rows("all", 0), (0, dict[str, Tensor]()))
        found = hashlib.sha256(few_numbers(self.language_model.model))
        for name in sorted(first):
            found.update(first[name].contiguous().view(torch.uint8).numpy().tobytes())
        return found.hexdigest()[:12]

    @property
    def _passes(self) -> Passes:
        config = self.config
        if config.held_out and next(self._rows("held_out", 0), None) is None:
            raise DataError(
                f"data: none of the rows of {config.data.path} falls into the {config.held_out:g} held out for evaluation; "
                "raise held_out, or set held_out: 0 to keep none"
            )
        stored = {site.name: self._sample[site.name].shape[-1] for site in self._stored}
        on_gpu = self.language_model.device.type == "cuda"
        return Passes(
            name=config.data.path,
            open=self._open_pass,
            new_buffer=self._new_buffer,
            buffer_rows=config.buffer_rows,
            seed=config.seed,
            hand_out=lambda rows: pick(rows, stored, self.sites, self.target_sites),
            largest_chunk=config.batch_rows * len(next(iter(self._sample.values()))),
            epochs=config.epochs,
            on_exhausted=config.on_exhausted,
            empty=f"data: {config.data.path} gives no position to train on",
            prefetch=config.prefetch if config.prefetch is not None else 2 if on_gpu else 0,
        )

    def held_out_batches(self) -> Iterator[ActivationBatch]:
        """The activations of the rows that are held out, in their order: inputs, and targets where there are some."""
        reads, writes = ([site.name for site in sites] for sites in (self.config.read_sites, self.config.write_sites))
        for rows in _in_groups(self._rows("held_out", 0), self.config.batch_rows):
            found = self._counting(rows)
            inputs = side_by_side({name: found[name] for name in reads})
            targets = side_by_side({name: found[name] for name in writes}) if writes else None
            yield ActivationBatch(inputs, targets)

    def metadata(self) -> dict[str, Any]:
        """What the activations are: keys that SAELens uses too, and under ``sae_lm`` all that evaluation needs."""
        reads, writes = self.config.read_sites, self.config.write_sites
        return {
            "model_name": self.config.model,
            "model_class_name": self.config.model_class,
            "hook_name": reads[0].name if len(reads) == 1 else None,
            **({"hook_name_out": writes[0].name if len(writes) == 1 else None} if writes else {}),
            "dataset_path": self.config.data.path,
            "sae_lm": {"columns": unstructure(self.config), "model_revision": self.language_model.revision},
        }

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any], **changes: Any) -> HuggingFaceColumns:
        """The source that an SAE was trained on, with some settings changed. Raises ConfigError when they do not say."""
        ours = metadata.get("sae_lm")
        if not isinstance(ours, Mapping) or "columns" not in ours:
            raise ConfigError("the SAE's metadata name no columns of a data set that it was trained on")
        settings = cast("Mapping[str, Any]", ours["columns"])
        return cls(structure({**settings, **changes}, ColumnsConfig, where="metadata: sae_lm.columns"))

    def _new_buffer(self, rows: int, seed: int) -> ShuffleBuffer:
        config, sample = self.config, self._joined(self._sample)
        device = sample.device if config.buffer_device == "model" else place(config.buffer_device)
        with explaining_memory(f"a shuffle buffer of {rows:,} activations", "buffer_rows"):
            return ShuffleBuffer(rows, sample.shape[1], seed=seed, dtype=sample.dtype, device=device)

    def _open_pass(
        self, place_: Mapping[str, Any] | None, first: int, wanted: Callable[[int], bool]
    ) -> Iterator[Chunk]:
        start, at = (0, 0) if place_ is None else (int(place_["row"]), first)
        for number, rows in enumerate(_in_groups(self._rows("train", start), self.config.batch_rows), at):
            if number < first or not wanted(number):
                continue
            joined = self._joined(self._counting(rows))
            if self.config.buffer_device != "model":
                joined = joined.to(place(self.config.buffer_device))
            behind = {"row": rows[-1][0] + 1}
            yield Chunk(number, joined, behind.copy)

    def _rows(self, part: Part, start: int) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Rows of a part from the row numbered `start` on, each with its number."""
        config = self.config
        data: Any = open_dataset(config.data, "data")
        columns = [*config.inputs.values(), *([config.mask] if config.mask else [])]
        wanted: list[str] = list(dict.fromkeys(columns))
        if data.column_names is not None:
            for column in wanted:
                known = ", ".join(data.column_names)
                near = did_you_mean(column, data.column_names)
                if column not in data.column_names:
                    raise DataError(f"data: {config.data.path} has no column {column!r}{near} (columns: {known})")
            data = data.select_columns(wanted)
        for number, row in enumerate(skipped(data, start).with_format("torch"), start):
            found: dict[str, Tensor] = {}
            for column in wanted:
                value = row.get(column)
                if not isinstance(value, Tensor):
                    kind = "null" if value is None else type(value).__name__
                    raise DataError(
                        f"data: {config.data.path} row {number}: column {column!r} holds {kind}, not numbers"
                    )
                found[column] = value
            if part == "all" or _is_held_out(found, config.held_out) == (part == "held_out"):
                yield number, found

    def _counting(self, rows: list[tuple[int, dict[str, Tensor]]]) -> dict[str, Tensor]:
        """(positions that count, width) activations of some rows at every place."""
        found, kept_RC = self._run(rows)
        at = kept_RC.flatten().nonzero().squeeze(1)
        return {
            name: activation[to_device(at, activation.device)] if len(at) < len(activation) else activation
            for name, activation in found.items()
        }

    def _joined(self, found: Mapping[str, Tensor]) -> Tensor:
        rows = side_by_side({site.name: found[site.name] for site in self._stored})
        return (
            rows if self.config.activation_dtype == "model" else rows.to(getattr(torch, self.config.activation_dtype))
        )

    def _run(self, rows: list[tuple[int, dict[str, Tensor]]]) -> tuple[dict[str, Tensor], Tensor]:
        """(rows * positions, width) activations of every position, and (rows, positions) which of them count."""
        config, at = self.config, self.language_model
        dtype = next((each.dtype for each in at.model.parameters() if each.is_floating_point()), torch.float32)
        arguments: dict[str, Tensor] = {}
        for argument, column in config.inputs.items():
            value = self._stacked(rows, column)
            arguments[argument] = to_device(value.to(dtype) if value.is_floating_point() else value, at.device)
        with (
            explaining_memory(f"{len(rows)} rows of {config.data.path}", "batch_rows or the model's dtype"),
            torch.no_grad(),
            evaluating(at.model),
        ):
            captured = capture(at.model, [site.point for site in self._stored], **arguments)
        found = {site.name: self._positions(captured[str(site.point)], len(rows), site.point) for site in self._stored}
        positions = {name: activation.shape[1] for name, activation in found.items()}
        first = next(iter(positions.values()))
        if set(positions.values()) != {first}:
            raise DataError(f"hook: the places have different numbers of positions: {positions}")
        kept_RC = torch.ones(len(rows), first, dtype=torch.bool)
        if config.mask is not None:
            mask_RC = self._stacked(rows, config.mask)
            if tuple(mask_RC.shape) != tuple(kept_RC.shape):
                raise DataError(
                    f"data: the mask {config.mask!r} has shape {tuple(mask_RC.shape)}, the activations {tuple(kept_RC.shape)}"
                )
            kept_RC = mask_RC != 0
        kept_RC[:, : config.exclude_first] = False
        kept_RC[:, max(0, first - config.exclude_last) :] = False
        return {name: activation.flatten(0, 1) for name, activation in found.items()}, kept_RC

    def _positions(self, activation: Tensor, rows: int, point: HookPoint) -> Tensor:
        """(rows, positions, width), whatever else the activation's shape splits."""
        if activation.shape[0] != rows or activation.dim() < 2:
            raise DataError(f"hook: {point} has shape {tuple(activation.shape)} for {rows} rows of the data set")
        if self.config.channels == "first":
            return activation.flatten(2).transpose(1, 2) if activation.dim() > 2 else activation.unsqueeze(1)
        return activation.unsqueeze(1) if activation.dim() == 2 else activation.flatten(1, -2)

    def _stacked(self, rows: list[tuple[int, dict[str, Tensor]]], column: str) -> Tensor:
        values = [row[column] for _, row in rows]
        for (number, _), value in zip(rows, values, strict=True):
            if value.shape != values[0].shape:
                raise DataError(
                    f"data: {self.config.data.path} row {number}: column {column!r} has shape {tuple(value.shape)}, row "
                    f"{rows[0][0]} {tuple(values[0].shape)}; make them alike, or set batch_rows: 1"
                )
        return torch.stack(values)


def _in_groups(
    rows: Iterator[tuple[int, dict[str, Tensor]]], size: int
) -> Iterator[list[tuple[int, dict[str, Tensor]]]]:
    while group := list(islice(rows, size)):
        yield group


def _is_held_out(row: Mapping[str, Tensor], fraction: float) -> bool:
    """Whether a row is among the `fraction` kept for evaluation; a matter of its content alone."""
    if not fraction:
        return False
    digest = hashlib.blake2b(digest_size=8)
    for name in sorted(row):
        digest.update(row[name].contiguous().numpy().tobytes())
    return int.from_bytes(digest.digest(), "big") < fraction * 2**64
