"""`HuggingFaceSource`: the activations of any Hugging Face model, shuffled, as an `ActivationSource`.

Documents are packed into windows of tokens, windows are run through the model `batch_prompts` at a time and only as far as
the hooked module, positions that the token policy leaves out are dropped, and what remains passes through a shuffle buffer
of fixed size. Memory is the model, one batch of windows and the buffer, however long the run.

Several passes over a text may keep the activations of the first one in memory (`cache_activations`). They are kept in the
order and precision in which they go to the buffer, so that batches are the same bits with and without.
"""

# R windows (rows), C positions in a window, D d_in

from __future__ import annotations

import inspect
import itertools
import logging
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Literal, final

import torch
from sae_core.config import option, require, structure, unstructure
from sae_core.data.shuffle import ShuffleBuffer, shuffled
from sae_core.errors import ConfigError, DataError
from torch import Tensor, nn

from sae_lm.hooks import HookPoint, capture, find_module
from sae_lm.model import LanguageModel, is_transformer_lens, load, load_tokenizer
from sae_lm.names import transformer_lens_name
from sae_lm.text import Part, TextConfig, documents, require_held_out
from sae_lm.tokens import TokenPolicy, TokenRules, Windows, WindowStream, preview, resolve

__all__ = ["HuggingFaceSource", "HuggingFaceSourceConfig", "flatten_positions", "model_inputs"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class HuggingFaceSourceConfig:
    """Which activations of which model on which text."""

    model: str = option(
        help="Hub name, local folder or .gguf file, or package:NAME/FILE, a file in an installed package"
    )
    hook: str = option(
        help="module path, e.g. model.layers.9, for the module's output; model.layers.9:input for its input"
    )
    revision: str | None = option(default=None, help="branch, tag or commit of a Hub model")
    model_class: str = option(
        default="AutoModelForCausalLM",
        help="class of transformers that loads the model; or TransformerLens's HookedTransformer, whose hook names are "
        "module paths too",
    )
    tokenizer: str | None = option(
        default=None, help="another place to take the tokenizer from; none: documents are token ids already"
    )
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = option(
        default="float32", help="precision in which the model runs; auto: that of its checkpoint"
    )
    device: str = option(
        default="auto", help="where the model runs: cpu, cuda, cuda:1, mps; auto: cuda if there is one"
    )
    text: TextConfig = option(default_factory=TextConfig, help="where documents come from")
    tokens: TokenPolicy = option(
        default_factory=TokenPolicy, help="how documents become windows, and which tokens count"
    )
    context_size: int = option(default=128, help="tokens in a window, special tokens included")
    batch_prompts: int = option(default=32, help="windows that run through the model at once")
    buffer_rows: int = option(
        default=65_536, help="activations in the shuffle buffer, allocated at once on the model's device"
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
        for name in ("context_size", "batch_prompts", "buffer_rows", "epochs"):
            require(getattr(self, name) > 0, f"{name} must be positive, not {getattr(self, name)}")
        require(self.cache_limit_gb > 0, f"cache_limit_gb must be positive, not {self.cache_limit_gb}")
        require(
            not self.cache_activations or self.epochs > 1 or self.on_exhausted == "cycle",
            "cache_activations: there is no second pass to use the cache; set epochs or on_exhausted: cycle",
        )
        HookPoint.parse(self.hook)


@final
class HuggingFaceSource:
    """Activations of one place in one model, shuffled.

    `model` and `tokenizer` may be given as objects; the config's `model` is then only the name they go by, and a given
    model stays on its device, in eval mode. Otherwise the model is loaded on first use. Batches are (batch_size, d_in) on
    the model's device; rows left over at the end that do not fill a batch are not handed out.

    Rows are the windows' positions that count. A hooked tensor must be (windows, positions, …), or have these two joined;
    further dimensions, as of attention heads, are joined into d_in.
    """

    config_class: ClassVar[type[HuggingFaceSourceConfig]] = HuggingFaceSourceConfig

    def __init__(
        self, config: HuggingFaceSourceConfig, *, model: nn.Module | None = None, tokenizer: Any | None = None
    ) -> None:
        self.config = config
        self.point = HookPoint.parse(config.hook)
        self._given = (model, tokenizer)
        self._resume: Mapping[str, Any] | None = None
        self._run: _Run | None = None

    @cached_property
    def language_model(self) -> LanguageModel:
        """The model and its tokenizer, loaded when first asked for."""
        model, tokenizer = self._given
        if model is not None:
            found = LanguageModel(model.eval(), tokenizer)
        else:
            config = self.config
            found = load(
                config.model,
                revision=config.revision,
                model_class=config.model_class,
                dtype=config.dtype,
                device=config.device,
                tokenizer=config.tokenizer,
                with_tokenizer="tokenizer" not in self.__dict__,
            )
            if "tokenizer" in self.__dict__:  # read before, and reading it again can take long
                found = replace(found, tokenizer=self.tokenizer)
        find_module(found.model, self.point.module)
        positions = _positions(found.model)
        require(
            positions is None or self.config.context_size <= positions,
            f"context_size: {self.config.context_size} tokens are beyond the {positions} positions of {self.config.model}",
        )
        return found

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
    def _sample(self) -> Tensor:
        """The activation of one token, which tells width and precision; no more of the model runs than that takes."""
        tokens_RC = torch.tensor([[0 if self.rules.bos_id is None else self.rules.bos_id]])
        everything = torch.ones_like(tokens_RC, dtype=torch.bool)
        return self.activations(Windows(tokens_RC, everything, everything))

    @property
    def d_in(self) -> int:
        """Width of the activations."""
        return self._sample.shape[-1]

    def windows(self, part: Part, *, rows: int | None = None, state: Mapping[str, Any] | None = None) -> WindowStream:
        """Windows of the training text or of the text held out from it, `rows` (by default `batch_prompts`) at a time."""
        return WindowStream(
            documents(self.config.text, part),
            self.rules,
            rows=rows or self.config.batch_prompts,
            tokenizer=self.tokenizer,
            state=state,
        )

    def preview(self, rows: int = 2) -> str:
        """The first windows of the training text as text, tokens that do not count in square brackets."""
        windows = next(self.windows("train", rows=rows), None)
        if windows is None:
            raise DataError(_no_rows(self.config))
        return preview(windows, self.tokenizer, rows=rows)

    @torch.inference_mode()
    def activations(self, windows: Windows) -> Tensor:
        """(positions that count, d_in) activations of `windows`, in the order of the windows."""
        model = self.language_model.model
        args, kwargs = model_inputs(model, windows, self.language_model.device)
        activation = capture(model, [self.point], *args, **kwargs)[str(self.point)]
        rows_PD = flatten_positions(activation, windows.tokens, self.point)
        # Found on the CPU, where the mask is: selecting by a mask on the device would have to wait for it.
        counting_K = windows.kept.flatten().nonzero().squeeze(1)
        if len(counting_K) < len(rows_PD):
            rows_PD = rows_PD[counting_K.to(rows_PD.device, non_blocking=True)]
        if self.config.activation_dtype != "model":
            rows_PD = rows_PD.to(getattr(torch, self.config.activation_dtype))
        return rows_PD

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        """Shuffled batches (batch_size, d_in), until the passes over the text are used up.

        Raises ConfigError when the buffer is too small for a batch, DataError when the text does not give one batch, or
        at the end when the config says so.
        """
        config = self.config
        at_once = config.batch_prompts * config.context_size
        require(
            config.buffer_rows >= at_once + batch_size,
            f"buffer_rows: {config.buffer_rows} cannot hold a batch of {batch_size} beside the {at_once} activations that "
            f"arrive at once (batch_prompts x context_size); set it to {4 * (at_once + batch_size)} or so",
        )
        require_held_out(config.text)
        sample = self._sample
        buffer = ShuffleBuffer(
            config.buffer_rows, sample.shape[1], seed=config.seed, dtype=sample.dtype, device=sample.device
        )
        self._run = _Run(self, buffer, self._resume)
        self._resume = None
        for batch in shuffled(buffer, self._run.chunks(), batch_size=batch_size, largest_chunk=at_once):
            if len(batch) == batch_size:
                yield batch
        self._run.end(batch_size)

    def metadata(self) -> dict[str, Any]:
        """What the activations are: keys that SAELens uses too, and under ``sae_lm`` all that evaluation needs."""
        config, rules = self.config, self.rules
        return {
            "model_name": config.model,
            "model_class_name": config.model_class,
            "hook_name": str(self.point),
            "hook_head_index": None,
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
                "hook_point": {
                    "module": self.point.module,
                    "at": self.point.at,
                    "transformer_lens": self._transformer_lens_name(),
                },
                "tokens": rules.metadata(),
                "python": platform.python_version() if config.text.kind == "stdlib" else None,
            },
        }

    def _transformer_lens_name(self) -> str | None:
        if is_transformer_lens(self.language_model.model):
            return str(self.point)
        return transformer_lens_name(self.language_model.model_type, self.point)

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

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch: pass, windows, and the buffer's rows. Small beside the buffer."""
        if self._run is not None:
            return self._run.state_dict()
        return dict(self._resume or {})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next call of `batches` go on exactly where the saved state stood."""
        self._run, self._resume = None, state or None


@final
class _Run:
    """One run over the text: which pass it is in, how far, and the cache."""

    def __init__(self, source: HuggingFaceSource, buffer: ShuffleBuffer, state: Mapping[str, Any] | None) -> None:
        self._source = source
        self._buffer = buffer
        self._epoch = 0
        self._done = 0  # batches of windows of this pass that are in the buffer or were handed out
        self._stream: WindowStream | None = None
        self._start: Mapping[str, Any] | None = None
        self._cache: list[Tensor] | None = None
        self._rows = 0
        if state is not None:
            self._epoch, self._done, self._rows = int(state["epoch"]), int(state["done"]), int(state["rows"])
            self._start = state["stream"]
            buffer.load_state_dict(state["buffer"])

    def state_dict(self) -> dict[str, Any]:
        return {
            "epoch": self._epoch,
            "done": self._done,
            "rows": self._rows,
            "stream": None if self._stream is None else self._stream.state_dict(),
            "buffer": self._buffer.state_dict(),
        }

    def chunks(self) -> Iterator[Tensor]:
        """Activations in the order of the text, pass after pass."""
        config = self._source.config
        for epoch in itertools.count(self._epoch):
            if epoch >= config.epochs:
                if config.on_exhausted != "cycle":
                    return
                log.info("%s; going over it again (on_exhausted: cycle)", self._used_up())
            yield from self._pass() if self._cache is None else self._cached_pass(self._cache)
            if self._rows == 0:
                raise DataError(_no_rows(config))
            self._epoch, self._done, self._start, self._stream = epoch + 1, 0, None, None

    def end(self, batch_size: int) -> None:
        """What is said, or raised, when all passes are handed out and another batch is asked for."""
        if self._rows < batch_size:
            raise DataError(f"{self._used_up()}, fewer than one batch of {batch_size}")
        if self._source.config.on_exhausted == "error":
            raise DataError(
                f"{self._used_up()}, and more are asked for; raise epochs, or set on_exhausted to cycle or stop"
            )
        log.warning("%s; training ends here (on_exhausted: stop)", self._used_up())

    def _used_up(self) -> str:
        text = self._source.config.text.description
        return f"{text} is used up after {self._epoch} pass(es) and {self._rows:,} activations"

    def _pass(self) -> Iterator[Tensor]:
        """Run the model over the text, from where the run stands, and fill the cache if this is a whole pass."""
        source, config = self._source, self._source.config
        whole = self._done == 0
        self._stream = source.windows("train", state=self._start)
        if self._start is None:  # a pass that was served from the cache knows only how far it got
            for _ in range(self._done):
                next(self._stream, None)
        later = self._epoch + 1 < config.epochs or config.on_exhausted == "cycle"
        cache: list[Tensor] | None = [] if config.cache_activations and whole and later else None
        size = 0
        for windows in self._stream:
            chunk = source.activations(windows)
            if cache is not None:
                cache.append(chunk)
                size += chunk.nbytes
                if size > config.cache_limit_gb * 1e9:
                    cache = None
                    log.warning(
                        "the activation cache grew beyond %g GB; every pass will run the model (cache_limit_gb)",
                        config.cache_limit_gb,
                    )
            self._done += 1
            self._rows += len(chunk)
            yield chunk
        self._cache = cache

    def _cached_pass(self, cache: list[Tensor]) -> Iterator[Tensor]:
        self._stream = None
        for chunk in cache:
            self._done += 1
            self._rows += len(chunk)
            yield chunk


def model_inputs(model: nn.Module, windows: Windows, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments that run `model` on `windows`, without a key-value cache where it has one."""
    vocabulary = _vocabulary(model)
    if int(windows.tokens.min()) < 0:
        raise DataError(f"text: token id {int(windows.tokens.min())} is negative")
    if vocabulary is not None and int(windows.tokens.max()) >= vocabulary:  # on a GPU it would end the process
        raise DataError(f"text: token id {int(windows.tokens.max())}, but the model knows {vocabulary} tokens")
    parameters = inspect.signature(model.forward).parameters
    tokens_RC = windows.tokens.to(device, non_blocking=True)
    kwargs: dict[str, Any] = {}
    if "use_cache" in parameters:
        kwargs["use_cache"] = False
    if "attention_mask" in parameters and not bool(windows.attended.all()):
        kwargs["attention_mask"] = windows.attended.to(device, torch.long, non_blocking=True)
    if "input_ids" in parameters:
        return (), {"input_ids": tokens_RC, **kwargs}
    return (tokens_RC,), kwargs  # a model that is not transformers's: whatever its first argument is called


def _vocabulary(model: nn.Module) -> int | None:
    """Number of token ids that the model can take, None for a model that does not say."""
    table = _table(model)
    return table.num_embeddings if isinstance(table, nn.Embedding) else None


def _positions(model: nn.Module) -> int | None:
    """Number of tokens that a window may have, None for a model that does not say.

    Some models number positions from behind the padding's own; these have fewer than their table has rows.
    """
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if callable(getattr(config, "get_text_config", None)) else config
    size = getattr(config, "max_position_embeddings", None)
    if not isinstance(size, int):
        size = getattr(getattr(model, "cfg", None), "n_ctx", None)
        return size if isinstance(size, int) else None
    tables = [
        module for module in model.modules() if isinstance(module, nn.Embedding) and module.num_embeddings == size
    ]
    names = [table.padding_idx for table in tables if table.padding_idx is not None and table is not _table(model)]
    return size - (max(names) + 1 if names else 0)


def _table(model: nn.Module) -> nn.Module | None:
    """The table of token embeddings, None for a model that does not say."""
    embeddings: Any = getattr(model, "get_input_embeddings", None)
    table: Any = embeddings() if callable(embeddings) else None
    return table


def _slice(policy: TokenPolicy) -> list[int | None]:
    """The arguments of the slice of positions that count, as SAELens writes them."""
    first, last = policy.exclude_first or None, -policy.exclude_last or None
    return [None] if first is None and last is None else [first, last]


def _no_rows(config: HuggingFaceSourceConfig) -> str:
    part = f" beside the {config.text.held_out:.0%} held out for evaluation" if config.text.held_out else ""
    return f"text: {config.text.description} gives no token to train on{part}; is it empty?"


def flatten_positions(activation: Tensor, tokens_RC: Tensor, point: HookPoint) -> Tensor:
    """(windows * positions, d_in): one row a position, whatever else the activation's shape splits.

    Raises DataError when the leading dimensions are not the windows and positions of `tokens_RC`.
    """
    rows, positions = tokens_RC.shape
    shape = tuple(activation.shape)
    if shape[:2] != (rows, positions) and shape[:1] != (rows * positions,):
        raise DataError(
            f"hook: the {point.at} of {point.module!r} has shape {shape} for tokens of shape {(rows, positions)}; it must "
            "begin with the same two dimensions, or with both joined"
        )
    return activation.reshape(rows * positions, -1)
