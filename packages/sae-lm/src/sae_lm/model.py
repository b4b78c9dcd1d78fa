"""Loading a language model and its tokenizer, from wherever they are.

A model is named by its Hub name, by a local folder or .gguf file, or as ``package:NAME/FILE``: a file or folder carried
inside an installed Python distribution, which is found without importing it. It is loaded by a class of transformers, or
by TransformerLens's HookedTransformer; that one's hook points are modules too, so all the rest works on both.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from sae_core.config import require
from sae_core.errors import ConfigError, MissingDependencyError, did_you_mean
from sae_core.parallel.joining import is_first
from sae_core.sae import as_device
from torch import Tensor, nn

__all__ = ["LanguageModel", "ModelFiles", "load", "load_tokenizer", "locate", "next_token_logits", "weights_size"]

NO_TOKENIZER = "none"
HOOKED_TRANSFORMER = "HookedTransformer"
TRANSFORMER_BRIDGE = "TransformerBridge"


@final
@dataclass(frozen=True, eq=False)
class LanguageModel:
    """A model in eval mode, its tokenizer (None if it has none), and the revision that was loaded."""

    model: nn.Module
    tokenizer: Any | None
    revision: str | None = None

    @property
    def device(self) -> torch.device:
        """Where the model's inputs belong."""
        embeddings: Any = getattr(self.model, "get_input_embeddings", None)
        try:
            table = embeddings() if callable(embeddings) else None
        except (AttributeError, NotImplementedError):  # a model without one table for all its inputs
            table = None
        of: nn.Module = table if isinstance(table, nn.Module) else self.model
        return next((parameter.device for parameter in of.parameters()), torch.device("cpu"))

    @property
    def model_type(self) -> str | None:
        """The family's name as transformers spells it, or None for a model that is not one of theirs."""
        return getattr(getattr(self.model, "config", None), "model_type", None)


@final
@dataclass(frozen=True)
class ModelFiles:
    """Where `from_pretrained` looks: a Hub name or folder, and a GGUF file in it; `version` is a distribution's."""

    place: str
    gguf_file: str | None = None
    version: str | None = None


def locate(name: str) -> ModelFiles:
    """Find what `name` means, without the network. Raises ConfigError for a package or file that is not there.

    >>> locate("openai-community/gpt2")
    ModelFiles(place='openai-community/gpt2', gguf_file=None, version=None)
    >>> locate("package:no-such-distribution/model.gguf")
    Traceback (most recent call last):
    sae_core.errors.ConfigError: model 'package:no-such-distribution/model.gguf': no package 'no-such-distribution' is installed
    """
    if name.startswith("package:"):
        path, version = _in_package(name)
    else:
        path, version = Path(name).expanduser(), None
        if path.suffix == ".gguf" and not path.is_file():
            raise ConfigError(f"model {name!r}: there is no such file")
    is_local = name.startswith((".", "~")) or path.is_absolute() or len(path.parts) > 2
    if is_local and not path.exists():
        near = did_you_mean(path.name, [each.name for each in path.parent.glob("*")]) if path.parent.is_dir() else ""
        raise ConfigError(f"model {name!r}: there is no such folder{near}")
    if path.is_file():
        if path.suffix != ".gguf":
            raise ConfigError(f"model {name!r} is a file, but not a .gguf file; name the folder that holds the model")
        return ModelFiles(str(path.parent), path.name, version)
    return ModelFiles(str(path) if path.is_dir() else name, None, version)


def _in_package(name: str) -> tuple[Path, str | None]:
    package, _, inner = name.removeprefix("package:").partition("/")
    version = None
    candidates: list[Path] = []
    try:
        distribution = importlib.metadata.distribution(package)
        version = distribution.version
        candidates = [Path(str(distribution.locate_file(file))) for file in distribution.files or []]
    except (importlib.metadata.PackageNotFoundError, ValueError):
        pass
    module = package.replace("-", "_")
    spec = importlib.util.find_spec(module) if module.isidentifier() else None  # finds; does not import
    folders = [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec is not None else []
    if version is None and not folders:
        raise ConfigError(f"model {name!r}: no package {package!r} is installed")
    for folder in folders:
        if (folder / inner).exists():
            return folder / inner, version
    tail = Path(inner).parts
    for file in candidates:
        if tail and file.parts[-len(tail) :] == tail and file.is_file():
            return file, version
    carried = sorted(
        {file.name for file in [*candidates, *(f for d in folders for f in d.iterdir())] if _is_model(file)}
    )
    raise ConfigError(
        f"model {name!r}: package {package!r} carries no {inner!r}{did_you_mean(inner, carried)} "
        f"(model files it carries: {', '.join(carried) or 'none'})"
    )


def _is_model(file: Path) -> bool:
    return file.suffix in (".gguf", ".safetensors")


def load(
    name: str,
    *,
    revision: str | None = None,
    model_class: str = "AutoModelForCausalLM",
    dtype: str = "float32",
    device: str = "auto",
    tokenizer: str | None = None,
    with_tokenizer: bool = True,
    options: Mapping[str, Any] | None = None,
) -> LanguageModel:
    """Load a model for reading activations.

    `dtype` is a torch dtype's name, or ``auto`` for that of the checkpoint; `device` ``auto`` is a CUDA device where there
    is one. `tokenizer` names another place to take the tokenizer from, or ``none``; `with_tokenizer` False loads the model
    alone. `options` are more arguments for ``from_pretrained``; a model that they spread over devices (``device_map``), or
    one that is quantised, is left where it is. Raises ConfigError when transformers cannot load what is asked for,
    MissingDependencyError when a GGUF file needs libraries that are not installed.
    """
    if model_class in (HOOKED_TRANSFORMER, TRANSFORMER_BRIDGE):
        return _load_hooked(name, model_class, revision, dtype, device, tokenizer, options or {})
    import transformers

    factory: Any = getattr(transformers, model_class, None)
    if not hasattr(factory, "from_pretrained"):
        autos = [known for known in dir(transformers) if known.startswith("AutoModel")]
        raise ConfigError(
            f"model_class: transformers has no model class {model_class!r}{did_you_mean(model_class, autos)}"
        )
    if not is_first():
        transformers.utils.logging.disable_progress_bar()
    files = locate(name)
    arguments: dict[str, Any] = {} if revision is None else {"revision": revision}
    if files.gguf_file is not None:
        _require_gguf(name)
        arguments["gguf_file"] = files.gguf_file
    at = place(device)
    tokens = None
    if with_tokenizer:
        tokens = load_tokenizer(name, revision=revision, model_class=model_class, tokenizer=tokenizer)
    try:
        model: Any = factory.from_pretrained(
            files.place, dtype="auto" if dtype == "auto" else getattr(torch, dtype), **arguments, **(options or {})
        )
    except (OSError, ValueError, KeyError, ImportError, TypeError) as error:
        raise ConfigError(_cannot_load(name, error)) from error
    if not getattr(model, "is_quantized", False) and getattr(model, "hf_device_map", None) is None:
        model = model.to(at)
    commit = getattr(model.config, "_commit_hash", None)
    return LanguageModel(model.eval().requires_grad_(False), tokens, commit or files.version or revision)


def weights_size(
    name: str, revision: str | None, model_class: str, dtype: str, options: Mapping[str, Any]
) -> int | None:
    """Bytes of a model's parameters, counted from its config alone; None where that does not tell.

    Raises ConfigError where there is no such model.
    """
    import transformers

    factory: Any = getattr(transformers, model_class, None)
    if not hasattr(factory, "from_config") or "quantization_config" in options:
        return None
    files = locate(name)
    arguments: dict[str, Any] = {} if revision is None else {"revision": revision}
    if files.gguf_file is not None:
        arguments["gguf_file"] = files.gguf_file
    try:
        config: Any = transformers.AutoConfig.from_pretrained(files.place, **arguments)
        with torch.device("meta"):
            model: Any = factory.from_config(config)
    except (OSError, ValueError, KeyError, ImportError, TypeError) as error:
        raise ConfigError(_cannot_load(name, error)) from error
    said = getattr(config, "dtype", None) if dtype == "auto" else getattr(torch, dtype)
    size = (said if isinstance(said, torch.dtype) else torch.float32).itemsize
    return size * sum(parameter.numel() for parameter in model.parameters())


def load_tokenizer(
    name: str, *, revision: str | None = None, model_class: str = "AutoModelForCausalLM", tokenizer: str | None = None
) -> Any | None:
    """The tokenizer alone of what `load` would load with these arguments; None for ``tokenizer: none``.

    Raises ConfigError when there is none to be loaded.
    """
    if tokenizer == NO_TOKENIZER:
        return None
    import transformers

    if model_class in (HOOKED_TRANSFORMER, TRANSFORMER_BRIDGE):
        require(tokenizer is None, f"tokenizer: {model_class} brings its own; leave it out")
    if model_class == HOOKED_TRANSFORMER:
        name = _official_name(name)
    files = locate(name if tokenizer is None else tokenizer)
    arguments: dict[str, Any] = {}
    if tokenizer is None and revision is not None:
        arguments["revision"] = revision
    if files.gguf_file is not None:
        _require_gguf(name)
        arguments["gguf_file"] = files.gguf_file
    try:
        return transformers.AutoTokenizer.from_pretrained(files.place, **arguments)
    except (OSError, ValueError, KeyError, ImportError) as error:
        what = name if tokenizer is None else tokenizer
        note = "" if _unreachable(what, error) else " (its tokenizer; with tokenizer: none, documents are token ids)"
        raise ConfigError(_cannot_load(what, error) + note) from error


def _official_name(name: str) -> str:
    """The Hub name behind one of TransformerLens's short names."""
    try:
        from transformer_lens.loading_from_pretrained import get_official_model_name
    except ImportError as error:
        raise _needs_transformer_lens(error, HOOKED_TRANSFORMER) from error
    try:
        return get_official_model_name(name)
    except ValueError as error:
        raise ConfigError(f"model {name!r}: {error}") from error


def _needs_transformer_lens(error: ImportError, model_class: str) -> MissingDependencyError:
    return MissingDependencyError(
        f"model_class: {model_class} needs TransformerLens: {error}; install sae-lm[transformer-lens]"
    )


def _cannot_load(name: str, error: BaseException) -> str:
    """Why a model cannot be had, and what to do about it where that is known."""
    text = " ".join(str(error).split())  # some messages have lines of their own
    hint = ""
    if "gated" in text or "401" in text or "403" in text:
        hint = "; ask for access on the model's page, and log in with `hf auth login` or set HF_TOKEN"
    elif _unreachable(name, error):
        return (
            f"model {name!r} cannot be loaded: it is not on this machine, and the Hub cannot be reached or HF_HUB_OFFLINE is "
            f"set; fetch the model once while online, or name a local folder ({type(error).__name__}: {text[:80]}…)"
        )
    return f"model {name!r} cannot be loaded: {type(error).__name__}: {text}{hint}"


def _unreachable(name: str, error: BaseException) -> bool:
    """Whether a model of the Hub is missing because the Hub is out of reach."""
    text = str(error).lower()
    is_local = name.startswith("package:") or Path(name).expanduser().exists()
    return not is_local and (is_offline() or "offline" in text or "couldn't connect" in text)


def is_offline() -> bool:
    """Whether the Hub's library was told not to use the network."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _load_hooked(
    name: str,
    model_class: str,
    revision: str | None,
    dtype: str,
    device: str,
    tokenizer: str | None,
    options: Mapping[str, Any],
) -> LanguageModel:
    """One of TransformerLens's models with the weights as they are: nothing folded, nothing centred."""
    require(dtype != "auto", f"dtype: auto is not for {model_class}; name one")
    require(tokenizer is None, f"tokenizer: {model_class} brings its own; leave it out")
    arguments: dict[str, Any] = {**({} if revision is None else {"revision": revision}), **options}
    try:
        if model_class == HOOKED_TRANSFORMER:
            from transformer_lens import HookedTransformer

            build: Any = HookedTransformer.from_pretrained_no_processing
        else:
            from transformer_lens.model_bridge import TransformerBridge

            build = TransformerBridge.boot_transformers
    except ImportError as error:
        raise _needs_transformer_lens(error, model_class) from error
    try:
        model: Any = build(name, device=place(device), dtype=getattr(torch, dtype), **arguments)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(_cannot_load(name, error)) from error
    return LanguageModel(model.eval().requires_grad_(False), model.tokenizer, revision)


def next_token_logits(model: nn.Module, output: Any, tokens_RC: Tensor) -> Tensor | None:
    """(windows, positions, vocabulary) logits in what `model` returned for `tokens_RC`, None if it predicts no next token."""
    logits = output if is_transformer_lens(model) else getattr(output, "logits", None)
    other_kind = any(kind in type(output).__name__ for kind in ("MaskedLM", "Classifier"))
    # The decoder of an encoder-decoder predicts text that its encoder has read.
    other_kind |= bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    if not isinstance(logits, Tensor) or logits.shape[:2] != tokens_RC.shape or other_kind:
        return None
    return logits


def is_transformer_lens(model: nn.Module) -> bool:
    """Whether the model is one of TransformerLens's, whose outputs are bare logits and whose hook points are modules."""
    return type(model).__module__.partition(".")[0] == "transformer_lens"


def place(device: str) -> torch.device:
    """A device by name. Raises ConfigError for one that is not there.

    >>> place("cpu")
    device(type='cpu')
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return as_device(device)


def _require_gguf(name: str) -> None:
    missing = [library for library in ("accelerate", "gguf") if importlib.util.find_spec(library) is None]
    if missing:
        raise MissingDependencyError(
            f"model {name!r}: reading a GGUF file needs {' and '.join(missing)}; install sae-lm[gguf]"
        )
