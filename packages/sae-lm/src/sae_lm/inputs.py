"""What a model is given for a batch of windows, and what its activations are afterwards: one row a position.

Nothing here asks which model it is. What differs between models is read off them: the arguments that `forward` takes, the
size of the embedding table, the number of positions.
"""

from __future__ import annotations

import inspect
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from sae_core.errors import ConfigError, DataError
from torch import Tensor, nn

from sae_lm.hooks import HookPoint
from sae_lm.tokens import Windows

__all__ = ["evaluating", "explaining_memory", "flatten_positions", "model_inputs", "positions_of", "to_device"]


def model_inputs(model: nn.Module, windows: Windows, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments that run `model` on `windows`, without a key-value cache where it has one.

    The decoder of an encoder-decoder reads the same tokens as its encoder. Raises DataError for ids that the model has no
    embedding for.
    """
    vocabulary = _vocabulary(model)
    smallest, largest = int(windows.tokens.min()), int(windows.tokens.max())
    if smallest < 0:
        raise DataError(f"text: token id {smallest} is negative")
    if vocabulary is not None and largest >= vocabulary:  # on a GPU it would end the process
        raise DataError(f"text: token id {largest}, but the model knows {vocabulary} tokens")
    parameters = inspect.signature(model.forward).parameters
    tokens_RC = to_device(windows.tokens, device)
    kwargs: dict[str, Any] = {}
    if "use_cache" in parameters:
        kwargs["use_cache"] = False
    if "attention_mask" in parameters and not bool(windows.attended.all()):
        kwargs["attention_mask"] = to_device(windows.attended.long(), device)
    if "decoder_input_ids" in parameters:
        kwargs["decoder_input_ids"] = tokens_RC
        if "attention_mask" in kwargs and "decoder_attention_mask" in parameters:
            kwargs["decoder_attention_mask"] = kwargs["attention_mask"]
    if "input_ids" in parameters:
        return (), {"input_ids": tokens_RC, **kwargs}
    return (tokens_RC,), kwargs  # a model that is not transformers's: whatever its first argument is called


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`. To a GPU it goes by way of pinned memory, so that the copy waits for nothing."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def flatten_positions(activation: Tensor, tokens_RC: Tensor, point: HookPoint, head: int | None = None) -> Tensor:
    """(windows * positions, d_in): one row a position, whatever else the activation's shape splits.

    With `head`, that one of (windows, positions, heads, d_head) alone. Raises DataError when the leading dimensions are not
    the windows and positions of `tokens_RC`, ConfigError when there is no such head.
    """
    rows, positions = tokens_RC.shape
    shape = tuple(activation.shape)
    if shape[:2] != (rows, positions) and shape[:1] != (rows * positions,):
        raise DataError(
            f"hook: the {point.at} of {point.module!r} has shape {shape} for tokens of shape {(rows, positions)}; it must "
            "begin with the same two dimensions, or with both joined"
        )
    if head is not None:
        leading = 2 if shape[:2] == (rows, positions) else 1
        if len(shape) != leading + 2:
            raise ConfigError(
                f"head: the {point.at} of {point.module!r} has shape {shape}, in which there are no heads"
            )
        if not 0 <= head < shape[leading]:
            raise ConfigError(f"head: {head} of {point.module!r}, which has heads 0 to {shape[leading] - 1}")
        activation = activation.select(leading, head)
    return activation.reshape(rows * positions, -1)


@contextmanager
def evaluating(model: nn.Module) -> Generator[None, None, None]:
    """Within the context the model is in eval mode; afterwards every module of it is in the mode it was in.

    >>> model = nn.Sequential(nn.Dropout())
    >>> with evaluating(model):
    ...     model[0].training
    False
    >>> model[0].training
    True
    """
    training = [module for module in model.modules() if module.training]
    if training:
        model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def explaining_memory(what: str, knobs: str) -> Generator[None, None, None]:
    """Turn running out of memory within the context into a ConfigError that says which settings to lower.

    >>> with explaining_memory("the buffer", "buffer_rows"):
    ...     raise MemoryError
    Traceback (most recent call last):
    sae_core.errors.ConfigError: out of memory for the buffer; lower buffer_rows
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        is_memory = isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)
        if not is_memory:
            raise
        raise ConfigError(f"out of memory for {what}; lower {knobs}") from error


def positions_of(model: nn.Module) -> int | None:
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
    padding = [table.padding_idx for table in tables if table.padding_idx is not None and table is not _table(model)]
    return size - (max(padding) + 1 if padding else 0)


def _table(model: nn.Module) -> nn.Module | None:
    """The table of token embeddings, None for a model that does not say."""
    embeddings: Any = getattr(model, "get_input_embeddings", None)
    try:
        table: Any = embeddings() if callable(embeddings) else None
    except (AttributeError, NotImplementedError):  # a model without one table for all its inputs
        return None
    return table


def _vocabulary(model: nn.Module) -> int | None:
    """Number of token ids that the model can take, None for a model that does not say."""
    table = _table(model)
    return table.num_embeddings if isinstance(table, nn.Embedding) else None
