"""`HuggingFaceSource`: the activations of any Hugging Face model, shuffled, as an `ActivationSource`.

Documents are packed into windows of tokens, windows are run through the model `batch_prompts` at a time and only as far as
the last hooked module, positions that the token policy leaves out are dropped, and what remains passes through a shuffle
buffer of fixed size. Memory is the model, one batch of windows and the buffer, however long the run.

Several places may be read in one pass, and several written to by the dictionary (a transcoder's targets): their activations
lie side by side in a row, so one shuffle keeps them together. A second model, a fine-tuned one say, reads the same windows.

Several passes over a text may keep the activations of the first one in memory (`cache_activations`). They are kept in the
order and precision in which they go to the buffer, so that batches are the same bits with and without.
"""

# R windows (rows), C positions in a window, P = R * C, W width of all sites side by side

from __future__ import annotations

import hashlib
import logging
import platform
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, final

import torch
from sae_core import SAE
from sae_core.config import absolute_paths, check_fields, option, require, structure, unstructure
from sae_core.data.shuffle import ShuffleBuffer
from sae_core.errors import ConfigError, DataError
from sae_core.protocols import ActivationBatch, Memory
from torch import Tensor, nn

from sae_lm.batches import Batches, Chunk, Parts, Passes
from sae_lm.hooks import HookPoint, capture, find_module
from sae_lm.inputs import evaluating, explaining_memory, flatten_positions, model_inputs, positions_of, to_device
from sae_lm.model import LanguageModel, is_transformer_lens, load, load_tokenizer, place, weights_size
from sae_lm.names import transformer_lens_name
from sae_lm.places import SECOND
from sae_lm.pretokenized import check_policy
from sae_lm.text import Part, TextConfig, documents, require_held_out
from sae_lm.tokens import TokenPolicy, TokenRules, Windows, WindowStream, preview, resolve

__all__ = [
    "HeldOutConfig",
    "HuggingFaceSource",
    "HuggingFaceSourceConfig",
    "Site",
    "columns_of",
    "few_numbers",
    "pick",
    "side_by_side",
]

log = logging.getLogger(__name__)


@final
@dataclass(frozen=True, slots=True)
class Site:
    """A place in one of the models: its name as the config writes it, which model, and the hook point in it.

    >>> Site.parse("second/model.layers.9:input")
    Site(name='second/model.layers.9:input', second=True, point=HookPoint(module='model.layers.9', at='input'))
    """

    name: str
    second: bool
    point: HookPoint

    @classmethod
    def parse(cls, text: str) -> Site:
        """Read the written form. Raises ConfigError where it is none."""
        second = text.startswith(SECOND)
        point = HookPoint.parse(text.removeprefix(SECOND))
        return cls(f"{SECOND if second else ''}{point}", second, point)


@dataclass(frozen=True, kw_only=True)
class HuggingFaceSourceConfig:
    """Which activations of which model on which text."""

    model: str = option(
        help="Hub name, local folder or .gguf file, or package:NAME/FILE, a file in an installed package",
        may_be_path=True,
    )
    hook: str | None = option(
        default=None,
        help="module path, e.g. model.layers.9, for the module's output; model.layers.9:input for its input. Short for reads "
        "with this one place, in the second model too if there is one",
    )
    reads: tuple[str, ...] = option(
        default=(), help="several places to read, side by side; second/X is X in the second model"
    )
    writes: tuple[str, ...] = option(
        default=(), help="places that the dictionary writes to: targets of a transcoder, from the same pass"
    )
    head: int | None = option(
        default=None, help="the one head to take of places with heads of their own; by default they are joined"
    )
    second_model: str | None = option(
        default=None,
        help="another model with the same tokenizer, say a fine-tuned one, that reads the same windows",
        may_be_path=True,
    )
    second_revision: str | None = option(default=None, help="branch, tag or commit of the second model")
    revision: str | None = option(default=None, help="branch, tag or commit of a Hub model")
    model_class: str = option(
        default="AutoModelForCausalLM",
        help="class of transformers that loads the model; or TransformerLens's HookedTransformer or TransformerBridge, whose "
        "hook names are places too",
    )
    tokenizer: str | None = option(
        default=None,
        help="another place to take the tokenizer from; none: documents are token ids already",
        may_be_path=True,
    )
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = option(
        default="float32", help="precision in which the model runs; auto: that of its checkpoint"
    )
    device: str = option(
        default="auto", help="where the model runs: cpu, cuda, cuda:1, mps; auto: cuda if there is one"
    )
    model_options: dict[str, Any] = option(
        default_factory=dict,
        help="more arguments for from_pretrained, say attn_implementation, or device_map to spread the model over devices",
    )
    text: TextConfig = option(default_factory=TextConfig, help="where documents come from")
    tokens: TokenPolicy = option(
        default_factory=TokenPolicy, help="how documents become windows, and which tokens count"
    )
    context_size: int = option(default=128, help="tokens in a window, special tokens included")
    batch_prompts: int = option(default=32, help="windows that run through the model at once")
    buffer_rows: int = option(
        default=65_536, help="activations in the shuffle buffer, allocated at once; several processes share them out"
    )
    buffer_device: str = option(default="model", help="where the buffer is; model: where the activations are")
    sequences: bool = option(
        default=False,
        help="hand out whole windows in their order, for dictionaries that read sequences: full windows only, without what "
        "exclude_first and exclude_last leave out and without an excluded BOS at the start",
    )
    prefetch: int | None = option(
        default=None,
        help="batches of windows that a thread runs ahead; if not given, 2 where the model is on a GPU and 0 on a CPU",
    )
    activation_dtype: Literal["model", "float32", "bfloat16", "float16"] = option(
        default="model", help="precision of the activations handed out; model: that in which the model gives them"
    )
    epochs: int = option(default=1, help="passes over the text")
    on_exhausted: Literal["stop", "cycle", "error"] = option(
        default="stop",
        help="when more is asked for than these passes give: end training there, go on with further passes, or fail",
    )
    cache_activations: bool = option(
        default=False,
        help="keep the activations of the first pass in memory, so that later passes need not run the model",
    )
    cache_limit_gb: float = option(
        default=8.0, help="give up caching, and run the model in every pass, when the cache grows beyond this"
    )
    seed: int = option(default=0, help="seed of the shuffling")

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("context_size", "batch_prompts", "buffer_rows", "epochs"):
            require(getattr(self, name) > 0, f"{name} must be positive, not {getattr(self, name)}")
        require(self.cache_limit_gb > 0, f"cache_limit_gb must be positive, not {self.cache_limit_gb}")
        require(
            not self.cache_activations or self.epochs > 1 or self.on_exhausted == "cycle",
            "cache_activations: there is no second pass to use the cache; set epochs or on_exhausted: cycle",
        )
        require(self.prefetch is None or self.prefetch >= 0, f"prefetch must not be negative, it is {self.prefetch}")
        require((self.hook is None) != (not self.reads), "name the place to read with hook, or several with reads")
        for field in ("reads", "writes"):
            sites = [site.name for site in map(Site.parse, getattr(self, field))]
            twice = [name for name in sites if sites.count(name) > 1]
            require(not twice, f"{field}: {twice[:1]} stands there twice")
        sites = [*self.read_sites, *self.write_sites]
        uses_second = any(site.second for site in sites)
        require(not uses_second or self.second_model is not None, "a place in second/ needs a second_model")
        require(self.second_model is None or uses_second, "second_model: no place of it is read; write second/HOOK")
        require(self.second_model is not None or self.second_revision is None, "second_revision needs a second_model")
        require(
            "device_map" not in self.model_options or self.device == "auto",
            "device: with model_options: device_map the model is placed by that; leave out one of them",
        )

    @property
    def read_sites(self) -> list[Site]:
        """The places that are read, in order."""
        if self.hook is None:
            return [Site.parse(text) for text in self.reads]
        both = [self.hook, SECOND + self.hook] if self.second_model is not None else [self.hook]
        return [Site.parse(text) for text in both]

    @property
    def write_sites(self) -> list[Site]:
        """The places that are written to, in order."""
        return [Site.parse(text) for text in self.writes]


@dataclass(frozen=True, kw_only=True)
class HeldOutConfig:
    """How much held-out text dictionaries are measured on during training."""

    tokens: int = option(default=4_096, help="positions to measure on, about")
    batch_prompts: int = option(default=8, help="windows that run through the model at once")

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("tokens", "batch_prompts"):
            require(getattr(self, name) > 0, f"eval: {name} must be positive, not {getattr(self, name)}")


@final
class HuggingFaceSource:
    """Activations of places in a model, shuffled.

    `model`, `tokenizer` and `second_model` may be given as objects; the config's `model` is then only the name they go by. A
    given model stays on its device and is left as it was found; while it runs here it is in eval mode. Otherwise the model
    is loaded on first use.

    Batches are (batch_size, width of all `sites`), or `ActivationBatch` with targets of `target_sites` where the config has
    `writes`; with `sequences`, (sequences, `sequence_length`, width). Rows left over at the end that do not fill a batch are
    not handed out. Rows are the windows' positions that count. A hooked tensor must be (windows, positions, …), or have
    these two joined; further dimensions, as of attention heads, are joined into the width.
    """

    config_class: ClassVar[type[HuggingFaceSourceConfig]] = HuggingFaceSourceConfig
    held_out_class: ClassVar[type[HeldOutConfig]] = HeldOutConfig

    def __init__(
        self,
        config: HuggingFaceSourceConfig,
        *,
        model: nn.Module | None = None,
        tokenizer: Any | None = None,
        second_model: nn.Module | None = None,
    ) -> None:
        self.config = absolute_paths(config)
        self.point = config.read_sites[0].point
        self._given = (model, tokenizer)
        self._given_second = second_model
        self.model_in_use = threading.RLock()
        """Held while a model runs: what is read ahead by a thread must not meet the hooks of an evaluation."""
        # What is stored of a position: what is read, then what is only written, side by side.
        self._stored = list(dict.fromkeys([*config.read_sites, *config.write_sites]))

    @cached_property
    def language_model(self) -> LanguageModel:
        """The model and its tokenizer, loaded when first asked for."""
        model, tokenizer = self._given
        if model is not None:
            found = LanguageModel(model, tokenizer)
        else:
            config = self.config
            found = self._load(config.model, config.revision, with_tokenizer="tokenizer" not in self.__dict__)
            if "tokenizer" in self.__dict__:  # read before, and reading it again can take long
                found = replace(found, tokenizer=self.tokenizer)
        self._check(found.model, self.config.model, second=False)
        return found

    @cached_property
    def second_language_model(self) -> LanguageModel:
        """The second model, loaded when first asked for. Raises ConfigError when its tokenizer gives other ids."""
        name = self.config.second_model
        require(name is not None, "there is no second_model")
        if self._given_second is not None:
            found = LanguageModel(self._given_second, None)
        else:
            found = self._load(str(name), self.config.second_revision, with_tokenizer=True)
            _check_same_tokenizer(self.tokenizer, found.tokenizer, str(name))
        self._check(found.model, str(name), second=True)
        return found

    def _load(self, name: str, revision: str | None, *, with_tokenizer: bool) -> LanguageModel:
        config = self.config
        with explaining_memory(
            f"the model {name}", "dtype to bfloat16, or spread it with model_options: {device_map: auto}"
        ):
            return load(
                name, revision=revision, model_class=config.model_class, dtype=config.dtype, device=config.device,
                tokenizer=config.tokenizer, with_tokenizer=with_tokenizer, options=config.model_options,
            )  # fmt: skip

    def _check(self, model: nn.Module, name: str, *, second: bool) -> None:
        for site in self._stored:
            if site.second == second:
                find_module(model, site.point.module)
        positions, size = positions_of(model), self.config.context_size
        require(
            positions is None or size <= positions,
            f"context_size: {size} tokens are beyond the {positions} positions of {name}",
        )

    @cached_property
    def tokenizer(self) -> Any | None:
        """The tokenizer; the model is not loaded for it."""
        model, tokenizer = self._given
        if model is not None:
            return tokenizer
        if "language_model" in self.__dict__:
            return self.language_model.tokenizer
        config = self.config
        return load_tokenizer(
            config.model, revision=config.revision, model_class=config.model_class, tokenizer=config.tokenizer
        )

    @cached_property
    def rules(self) -> TokenRules:
        """The token policy, fixed for this model's tokenizer."""
        return resolve(self.config.tokens, self.tokenizer, self.config.context_size)

    @cached_property
    def _sample(self) -> dict[str, Tensor]:
        """The activation of one token at every place, which tells widths and precision; no more is run than that takes."""
        return self.capture(self.one_token)

    @property
    def one_token(self) -> Windows:
        """A window of one token, the BOS where there is one: enough to learn widths and precision from."""
        tokens_RC = torch.tensor([[0 if self.rules.bos_id is None else self.rules.bos_id]])
        everything = torch.ones_like(tokens_RC, dtype=torch.bool)
        return Windows(tokens_RC, everything, everything)

    @property
    def sites(self) -> Mapping[str, int]:
        """Width of every place that is read, in the order of the columns."""
        return {site.name: self._sample[site.name].shape[-1] for site in self.config.read_sites}

    @property
    def target_sites(self) -> Mapping[str, int]:
        """Width of every place that is written to, in the order of the targets' columns; empty where there are none."""
        return {site.name: self._sample[site.name].shape[-1] for site in self.config.write_sites}

    @property
    def stored_sites(self) -> Mapping[str, int]:
        """Width of everything that `activations` gives side by side: what is read, then what is only written to."""
        return {site.name: self._sample[site.name].shape[-1] for site in self._stored}

    @property
    def d_in(self) -> int:
        """Width of the activations that are read."""
        return sum(self.sites.values())

    @property
    def sequence_length(self) -> int | None:
        """Positions of the sequences that are handed out; None where it is single rows."""
        return self._span.stop - self._span.start if self.config.sequences else None

    @property
    def _span(self) -> slice:
        """The positions of a window that a sequence has."""
        policy, rules = self.config.tokens, self.rules
        first = max(policy.exclude_first, 1 if rules.bos == "window" and policy.exclude_bos else 0)
        return slice(first, self.config.context_size - policy.exclude_last)

    def windows(self, part: Part, *, rows: int | None = None, state: Mapping[str, Any] | None = None) -> WindowStream:
        """Windows of the training text or of the text held out from it, `rows` (by default `batch_prompts`) at a time."""
        text = self.config.text
        if text.kind == "pretokenized":
            check_policy(Path(str(text.path)), self.rules, text.held_out)
        return WindowStream(
            documents(text, part, start=None if state is None else state.get("position")),
            self.rules,
            rows=rows or self.config.batch_prompts,
            tokenizer=self.tokenizer,
            state=state,
            packing="rows" if text.kind == "pretokenized" else None,
        )

    def preview(self, rows: int = 2) -> str:
        """The first windows of the training text as text, tokens that do not count in square brackets."""
        windows = next(self.windows("train", rows=rows), None)
        if windows is None:
            raise DataError(_no_rows(self.config))
        return preview(windows, self.tokenizer, rows=rows)

    def capture(self, windows: Windows) -> dict[str, Tensor]:
        """(windows * positions, width) activations of every position at every place, from one pass of each model."""
        config = self.config
        found: dict[str, Tensor] = {}
        with (
            self.model_in_use,
            explaining_memory(
                f"{len(windows)} windows of {windows.tokens.shape[1]} tokens",
                "batch_prompts, context_size or the model's dtype",
            ),
        ):
            for second in (False, True):
                sites = [site for site in self._stored if site.second == second]
                if not sites:
                    continue
                at = self.second_language_model if second else self.language_model
                args, kwargs = model_inputs(at.model, windows, at.device)
                with torch.no_grad(), evaluating(at.model):
                    captured = capture(at.model, [site.point for site in sites], *args, **kwargs)
                for site in sites:
                    found[site.name] = flatten_positions(
                        captured[str(site.point)], windows.tokens, site.point, config.head
                    )
        return found

    def activations(self, windows: Windows) -> Tensor:
        """(positions that count, width) activations of `windows`, in the order of the windows; places side by side."""
        return side_by_side(self.by_site(windows, _counting(windows)))

    def chosen(self, windows: Windows) -> Tensor:
        """Numbers of the positions that are handed out: (positions that count,), or (sequences, positions) of full windows."""
        if not self.config.sequences:
            return _counting(windows)
        positions = windows.tokens.shape[1]
        full_F = windows.attended.all(1).nonzero().squeeze(1)
        full_F = full_F if positions == self.config.context_size else full_F[:0]
        return full_F.unsqueeze(1) * positions + torch.arange(self.config.context_size)[self._span]

    def by_site(self, windows: Windows, chosen: Tensor) -> dict[str, Tensor]:
        """(*chosen, width) activations of the chosen positions at every place, in the precision that is handed out."""
        captured = self.capture(windows)
        found: dict[str, Tensor] = {}
        for site in self._stored:
            rows = captured[site.name]
            if chosen.numel() < windows.tokens.numel():
                rows = rows[to_device(chosen.flatten(), rows.device)]
            if self.config.activation_dtype != "model":
                rows = rows.to(getattr(torch, self.config.activation_dtype))
            found[site.name] = rows.reshape(*chosen.shape, rows.shape[1:].numel())
        return found

    def _sequences(self, windows: Windows) -> Tensor:
        """(full windows, positions * width): a sequence a row."""
        chosen = self.chosen(windows)
        if not len(chosen):
            return torch.empty(0, chosen.shape[1] * sum(self.stored_sites.values()), dtype=self._dtype)
        return side_by_side(self.by_site(windows, chosen)).flatten(1)

    @cached_property
    def _dtype(self) -> torch.dtype:
        return side_by_side(self.by_site(self.one_token, torch.tensor([0]))).dtype

    def batches(self, batch_size: int) -> Batches:
        """Shuffled batches of `batch_size` activations, until the passes over the text are used up; `Resumable`.

        Raises ConfigError when the buffer is too small for a batch, DataError when the held-out part is empty, when the text
        does not give one batch, or at the end when the config says so.
        """
        return Batches(self._passes, self._batch_rows(batch_size))

    def parts(self, batch_size: int, rank: int, ranks: int) -> Parts:
        """The share of one of several processes: it runs the model on every `ranks`-th `batch_prompts` windows."""
        return Parts(self._passes, self._batch_rows(batch_size), rank, ranks)

    def fingerprint(self) -> str:
        """Of the first windows and of a few of each tensor's numbers of the models."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        first = next(self.windows("train"), None)
        found = hashlib.sha256(b"" if first is None else first.tokens.numpy().tobytes())
        models = [self.language_model, *([self.second_language_model] if self.config.second_model else [])]
        for each in models:
            found.update(few_numbers(each.model))
        return found.hexdigest()[:12]

    def _batch_rows(self, batch_size: int) -> int:
        positions = self.sequence_length or 1
        require(
            batch_size >= positions,
            f"batch_size: {batch_size} positions do not hold one sequence of {positions}; raise it",
        )
        return batch_size // positions

    @property
    def _passes(self) -> Passes:
        config = self.config
        positions = self.sequence_length or 1
        require_held_out(config.text)
        return Passes(
            name=config.text.description,
            open=self._open_pass,
            new_buffer=lambda rows, seed: self._new_buffer(rows, positions, seed),
            buffer_rows=config.buffer_rows // positions,
            seed=config.seed,
            hand_out=lambda rows: pick(rows, self.stored_sites, self.sites, self.target_sites, self.sequence_length),
            largest_chunk=config.batch_prompts if config.sequences else config.batch_prompts * config.context_size,
            epochs=config.epochs,
            on_exhausted=config.on_exhausted,
            empty=_no_rows(config),
            positions=positions,
            keep_bytes=config.cache_limit_gb * 1e9 if config.cache_activations else 0.0,
            prefetch=self._prefetch() if config.prefetch is None else config.prefetch,
        )

    # What it costs.

    def to_load(self) -> list[Memory]:
        """The models, counted from their configs; nothing where these do not tell, and for models that were given."""
        config = self.config
        names = {"model": (config.model, config.revision, self._given[0])}
        if config.second_model is not None:
            names["second model"] = (config.second_model, config.second_revision, self._given_second)
        found: list[Memory] = []
        for what, (name, revision, given) in names.items():
            size = None
            if given is None:
                options = (config.model_class, config.dtype, config.model_options)
                size = weights_size(name, revision, *options)
            if size is not None:
                found.append(Memory(what, size, place(config.device).type))
        return found

    def to_run(self, batch_size: int) -> list[Memory]:
        """The shuffle buffer, the activations of one pass of the model, and those of the first pass where they are kept."""
        config = self.config
        sample = side_by_side(self.by_site(self.one_token, torch.tensor([0])))
        row = sample.shape[-1] * sample.element_size()
        at = self.language_model.device.type
        buffer_at = at if config.buffer_device == "model" else place(config.buffer_device).type
        pass_rows = config.batch_prompts * config.context_size
        matrices = [weights for weights in self.language_model.model.parameters() if weights.dim() > 1]
        widest = max((weights.numel() // len(weights) for weights in matrices), default=sample.shape[-1])
        found = [
            Memory("shuffle buffer", config.buffer_rows * row, buffer_at),
            Memory("a pass of the model", pass_rows * (8 * row + 4 * widest * sample.element_size()), at),
        ]
        if config.cache_activations:
            found.append(Memory("activations of the first pass, at most", int(config.cache_limit_gb * 1e9), at))
        return found

    def seconds_per_sample(self) -> float:
        """How long the model takes for a position that counts, on two batches of windows."""
        stream = self.windows("train", rows=self.config.batch_prompts)
        warm = next(stream, None)
        if warm is None:
            raise DataError(_no_rows(self.config))
        self.activations(warm)
        timed = next(stream, warm)
        started = time.perf_counter()
        rows = len(self.activations(timed).cpu())  # which waits for the device
        return (time.perf_counter() - started) / max(rows, 1)

    def _prefetch(self) -> int:
        return 2 if self.language_model.device.type == "cuda" else 0

    def _new_buffer(self, rows: int, positions: int, seed: int) -> ShuffleBuffer:
        config = self.config
        sample = side_by_side(self.by_site(self.one_token, torch.tensor([0])))
        device = sample.device if config.buffer_device == "model" else place(config.buffer_device)
        with explaining_memory(f"a shuffle buffer of {rows * positions:,} activations", "buffer_rows"):
            return ShuffleBuffer(rows, sample.shape[1] * positions, seed=seed, dtype=sample.dtype, device=device)

    def _open_pass(
        self, place_: Mapping[str, Any] | None, first: int, wanted: Callable[[int], bool]
    ) -> Iterator[Chunk]:
        stream = self.windows("train", state=place_)
        for number, windows in enumerate(stream, 0 if place_ is None else first):
            if number < first or not wanted(number):  # tokenised and not run
                continue
            rows = self.activations(windows) if not self.config.sequences else self._sequences(windows)
            if self.config.buffer_device != "model":
                rows = rows.to(place(self.config.buffer_device))
            yield Chunk(number, rows, stream.mark().state_dict)

    def held_out(self, config: HeldOutConfig) -> Callable[[SAE[Any]], Mapping[str, float]]:
        """A function that says what a dictionary in training does to the model's predictions on held-out text.

        Raises DataError when no text is held out.
        """
        from sae_lm.held_out import held_out

        return held_out(self, config)

    def metadata(self) -> dict[str, Any]:
        """What the activations are: keys that SAELens uses too, and under ``sae_lm`` all that evaluation needs."""
        config, rules = self.config, self.rules
        reads, writes = config.read_sites, config.write_sites
        facts: dict[str, Any] = {
            "model_name": config.model,
            "model_class_name": config.model_class,
            "hook_name": reads[0].name if len(reads) == 1 else None,
            "hook_head_index": config.head,
        }
        if writes:
            facts["hook_name_out"] = writes[0].name if len(writes) == 1 else None
            facts["hook_head_index_out"] = config.head
        return {
            **facts,
            "dataset_path": config.text.description,
            "context_size": config.context_size,
            "seqpos_slice": _slice(rules.policy),
            "prepend_bos": rules.bos != "none",
            "exclude_special_tokens": list(rules.excluded_ids) or False,
            "sequence_separator_token": "eos" if rules.eos_id is not None else None,
            "disable_concat_sequences": rules.policy.packing in ("document", "rows"),
            "sae_lm": {
                "source": unstructure(config),
                "model_revision": self.language_model.revision,
                "second_model_revision": self.second_language_model.revision if config.second_model else None,
                "hook_point": self._described(reads[0]),
                "sites": {site.name: self._described(site) for site in self._stored},
                "tokens": rules.metadata(),
                "python": platform.python_version() if config.text.kind == "stdlib" else None,
            },
        }

    def _described(self, site: Site) -> dict[str, Any]:
        found = self.second_language_model if site.second else self.language_model
        is_lens = is_transformer_lens(found.model)
        other = str(site.point) if is_lens else transformer_lens_name(found.model_type, site.point)
        return {"module": site.point.module, "at": site.point.at, "transformer_lens": other}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any], **changes: Any) -> HuggingFaceSource:
        """The source that an SAE was trained on, with some config fields changed.

        Raises ConfigError when the metadata do not say.
        """
        ours = metadata.get("sae_lm")
        if not isinstance(ours, Mapping) or "source" not in ours:
            raise ConfigError(
                "the SAE's metadata do not say what it was trained on: there is no 'sae_lm' with a 'source'"
            )
        return cls(structure({**ours["source"], **changes}, HuggingFaceSourceConfig, where="metadata: sae_lm.source"))


def few_numbers(model: nn.Module) -> bytes:
    """A few numbers of each tensor of a model: another model, or another checkpoint of it, has others."""
    found: list[bytes] = []
    for name, tensor in model.named_parameters():
        found.append(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        if tensor.device.type != "meta" and tensor.numel():
            some = tensor.detach()[(0,) * (tensor.dim() - 1)][..., :16]
            found.append(some.contiguous().view(torch.uint8).cpu().numpy().tobytes() if tensor.dim() else b"")
    return b" ".join(found)


def side_by_side(found: Mapping[str, Tensor]) -> Tensor:
    """The tensors of all places joined along their width, on the first one's device."""
    parts = list(found.values())
    return parts[0] if len(parts) == 1 else torch.cat([part.to(parts[0].device) for part in parts], dim=-1)


def _counting(windows: Windows) -> Tensor:
    # Found on the CPU, where the mask is: selecting by a mask on the device would have to wait for it.
    return windows.kept.flatten().nonzero().squeeze(1)


def columns_of(sites: Mapping[str, int]) -> dict[str, slice]:
    """The columns of every site in rows that have them side by side.

    >>> columns_of({"a": 2, "b": 3})
    {'a': slice(0, 2, None), 'b': slice(2, 5, None)}
    """
    found: dict[str, slice] = {}
    start = 0
    for name, width in sites.items():
        found[name] = slice(start, start + width)
        start += width
    return found


def pick(
    rows: Tensor,
    stored: Mapping[str, int],
    reads: Mapping[str, int],
    writes: Mapping[str, int],
    sequence_length: int | None = None,
) -> Tensor | ActivationBatch:
    """A batch of the sites in `reads`, with the sites in `writes` as targets, out of rows with all `stored` sites.

    `rows` is (batch, width), or (batch, sequence_length * width), which becomes (batch, sequence_length, width).
    """
    if sequence_length is not None:
        rows = rows.reshape(len(rows), sequence_length, -1)
    if not writes and list(reads) == list(stored):
        return rows
    columns = columns_of(stored)

    def joined(names: Sequence[str]) -> Tensor:
        if list(names) == list(stored)[: len(names)]:
            return rows[..., : columns[names[-1]].stop].contiguous()
        return torch.cat([rows[..., columns[name]] for name in names], dim=-1)

    inputs = joined(list(reads))
    return ActivationBatch(inputs, joined(list(writes))) if writes else inputs


def _check_same_tokenizer(first: Any | None, second: Any | None, name: str) -> None:
    """Raise ConfigError when the two tokenizers give a token different ids."""
    if first is None or second is None:
        return
    ids: Mapping[str, int] = second.get_vocab()
    for token, number in sorted(first.get_vocab().items(), key=lambda item: item[1]):
        if ids.get(token) != number:
            raise ConfigError(
                f"second_model: {name} has another tokenizer: {token!r} is {number} in the first model's and "
                f"{ids.get(token, 'not there')} in its own"
            )


def _slice(policy: TokenPolicy) -> list[int | None]:
    """The arguments of the slice of positions that count, as SAELens writes them."""
    first, last = policy.exclude_first or None, -policy.exclude_last or None
    return [None] if first is None and last is None else [first, last]


def _no_rows(config: HuggingFaceSourceConfig) -> str:
    part = f" beside the {config.text.held_out:.0%} held out for evaluation" if config.text.held_out else ""
    if config.sequences:
        return f"text: {config.text.description} gives no full window of {config.context_size} tokens{part}"
    return f"text: {config.text.description} gives no token to train on{part}; is it empty?"
