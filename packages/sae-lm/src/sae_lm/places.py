"""Where in a model a dictionary reads and writes, found from what it says of itself.

An SAE's metadata name its hook point in one vocabulary or another: a module path of a Hugging Face model (`sae_lm`'s own, or
``hf_hook_name``), or a hook name of TransformerLens. `route_of` gives the places in the model at hand, whichever of the two
it is, and what lies between the activation there and what the dictionary was trained on: one head of several, heads that
are joined, or a mean over features that the training model's prepared weights did not have.

Written out, a route is a hook point, several with commas, and behind an arrow where a dictionary writes elsewhere:
``model.layers.9``; ``model.layers.3, model.layers.9``; ``model.layers.9.mlp:input -> model.layers.9.mlp``. A place in a second
model has ``second/`` before it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, cast, final

from sae_core import SAE
from sae_core.config import require
from sae_core.errors import ConfigError, DataError, did_you_mean
from torch import Tensor, nn

from sae_lm.hooks import HookPoint, find_module
from sae_lm.model import is_transformer_lens
from sae_lm.names import module_path

__all__ = ["SECOND", "Place", "Route", "preparation", "route_of", "says_place", "widths_of"]

SECOND = "second/"
"""Before the name of a place: in the second model."""

# What TransformerLens's preparations of weights do to activations. Those of which nothing reaches a hook point need nothing.
_HARMLESS = frozenset(
    {
        "center_unembed",
        "dtype",
        "device",
        "revision",
        "n_ctx",
        "trust_remote_code",
        "default_padding_side",
        "torch_dtype",
    }
)
_WRITTEN = frozenset(
    {"hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out", "hook_embed"}
)


@final
@dataclass(frozen=True, kw_only=True)
class Place:
    """A hook point, and how an activation there becomes the rows that a dictionary was trained on.

    `width` is that of the rows. `head` picks one of several heads, (…, heads, width); with None they are joined. `centred`:
    the mean over features is taken away, and put back when the activation is replaced. `second`: in the second model.
    """

    point: HookPoint
    width: int
    head: int | None = None
    centred: bool = False
    second: bool = False

    @property
    def name(self) -> str:
        """The hook point, and before it in which model if that is the second one."""
        return f"{SECOND if self.second else ''}{self.point}"

    def read(self, activation: Tensor) -> Tensor:
        """(…, width) rows of an activation. Raises DataError when the activation has another width."""
        x = self._own(activation)
        return x - x.mean(-1, keepdim=True) if self.centred else x

    def write(self, activation: Tensor, rows: Tensor) -> Tensor:
        """The activation with `rows`, of the shape that `read` gives, in their place; precision and device stay its own."""
        own = self._own(activation)
        rows = rows.to(own.device)
        if self.centred:  # what changes is added, so that rows which do not change leave the activation's very bits
            rows = own + (rows - self.read(activation))
        rows = rows.to(own.dtype)
        if self.head is None:
            return rows.reshape(activation.shape)
        changed = activation.clone()
        changed[..., self.head, :] = rows
        return changed

    def _own(self, activation: Tensor) -> Tensor:
        shape = tuple(activation.shape)
        if self.head is not None:
            if activation.dim() < 2 or shape[-1] != self.width or not 0 <= self.head < shape[-2]:
                raise DataError(
                    f"hook: {self.point} has shape {shape}, but the SAE reads head {self.head} of (…, heads, {self.width})"
                )
            return activation[..., self.head, :]
        size, dims = 1, 0
        while size < self.width and dims < len(shape):
            dims += 1
            size *= shape[-dims]
        if size != self.width or dims == 0:
            raise DataError(f"hook: {self.point} has shape {shape}, but the SAE's width there is {self.width}")
        return activation.flatten(-dims) if dims > 1 else activation


@final
@dataclass(frozen=True)
class Route:
    """The places that a dictionary reads, in the order of its columns, and those it writes. Written as the module says."""

    reads: tuple[Place, ...]
    writes: tuple[Place, ...]

    @property
    def in_place(self) -> bool:
        """Whether it writes where it reads."""
        return self.reads == self.writes

    def __str__(self) -> str:
        reads = ", ".join(place.name for place in self.reads)
        return reads if self.in_place else f"{reads} -> {', '.join(place.name for place in self.writes)}"


def widths_of(sae: SAE[Any]) -> tuple[Mapping[str, int], Mapping[str, int]]:
    """The widths of the sites that a dictionary reads, and of those that it writes."""
    return sae.reads, sae.writes


def says_place(sae: SAE[Any]) -> bool:
    """Whether a dictionary says where it belongs, by its metadata or by the names of its sites."""
    reads, _ = widths_of(sae)
    return "" not in reads or any(isinstance(sae.metadata.get(key), str) for key in ("hook_name", "hf_hook_name"))


def route_of(sae: SAE[Any], model: nn.Module, at: str | None = None, *, second_model: nn.Module | None = None) -> Route:
    """Where `sae` belongs in `model`, and in `second_model`: where `at` says, or else where its metadata do.

    Raises ConfigError when neither says, when the model has no such place, or when the model was prepared for the SAE in a
    way that cannot be imitated here.
    """
    reads, writes = widths_of(sae)
    models = _Models(model, second_model)
    if at is not None:
        before, arrow, after = at.partition("->")
        read = _points(before, models, at)
        written = _points(after, models, at) if arrow else read
        require(
            bool(arrow) or sae.reconstructs_input,
            f"splice at {at!r}: this dictionary writes elsewhere than it reads; say where: '{at} -> PLACE'",
        )
    else:
        read = _from_metadata(sae, models, list(reads), "")
        written = read if sae.reconstructs_input else _from_metadata(sae, models, list(writes), "_out")
    for count, points, what in ((len(reads), read, "reads"), (len(writes), written, "writes")):
        require(
            count == len(points),
            f"splice: the dictionary {what} {count} place(s), but {len(points)} are named: "
            f"{', '.join(str(point) for _, point in points)}",
        )
    prepared = preparation(sae.metadata, model)
    head = sae.metadata.get("hook_head_index")
    head_out = head if sae.reconstructs_input else sae.metadata.get("hook_head_index_out")

    def places(points: list[_Spot], widths: Mapping[str, int], head: Any, name: Any) -> tuple[Place, ...]:
        own = head if isinstance(head, int) else None
        centred = prepared and _last(name) in _WRITTEN
        # A model that has the hook under the very name it had in training was made as that one was.
        return tuple(
            Place(point=point, width=width, head=own, centred=centred and str(point) != name, second=second)
            for (second, point), width in zip(points, widths.values(), strict=True)
        )

    inputs = places(read, reads, head, sae.metadata.get("hook_name"))
    if sae.reconstructs_input and read == written:
        return Route(inputs, inputs)
    return Route(inputs, places(written, writes, head_out, sae.metadata.get("hook_name_out")))


def preparation(metadata: Mapping[str, Any], model: nn.Module) -> bool:
    """Whether activations of `model` must lose their mean over features to be those that the SAE was trained on.

    TransformerLens centres the weights that write to GPT-2's residual stream (``center_writing_weights``), and what they
    write has mean zero over features. All parts of such a model read it through a LayerNorm, so nothing else changes. A
    model of TransformerLens was loaded with these settings or without; there the activations are taken as they are.
    Raises ConfigError for a preparation that changes activations in another way.
    """
    settings = cast("Mapping[str, Any]", metadata.get("model_from_pretrained_kwargs") or {})
    if is_transformer_lens(model):
        return False
    active = {name for name, value in settings.items() if value not in (None, False)} - _HARMLESS
    name = _last(metadata.get("hook_name"))
    if name in _WRITTEN:
        active.discard("fold_ln")  # moves weights from norms into what reads the stream; the stream stays the same
    unknown = sorted(active - {"center_writing_weights"})
    if unknown:
        raise ConfigError(
            f"the SAE was trained on a model prepared with {', '.join(f'{key}={settings[key]!r}' for key in unknown)}, which "
            f"{type(model).__name__} is not; load the model with model_class: HookedTransformer"
        )
    return "center_writing_weights" in active


def _last(name: Any) -> str:
    return name.rpartition(".")[2] if isinstance(name, str) else ""


_Spot: TypeAlias = tuple[bool, HookPoint]
"""Whether it is in the second model, and where there."""


@final
@dataclass(frozen=True, eq=False)
class _Models:
    """The model, and the second one if there is one."""

    first: nn.Module
    second: nn.Module | None

    def of(self, name: str) -> tuple[bool, nn.Module, str]:
        """Which model a place is in, and its name there. Raises ConfigError for the second one where there is none."""
        if not name.startswith(SECOND):
            return False, self.first, name
        if self.second is None:
            raise ConfigError(
                f"{name} is a place in a second model, and here there is only one: {type(self.first).__name__}"
            )
        return True, self.second, name.removeprefix(SECOND)


def _points(text: str, models: _Models, whole: str) -> list[_Spot]:
    names = [name.strip() for name in text.split(",")]
    require(all(names), f"splice at {whole!r}: write PLACE, or PLACE -> PLACE; several places with commas")
    found: list[_Spot] = []
    for full in names:
        second, model, name = models.of(full)
        point = HookPoint.parse(name)
        translated = None if _has(model, point.module) else _translated(name, model)
        if translated is None:
            find_module(model, point.module)  # raises, and says what is near
        found.append((second, translated or point))
    return found


def _from_metadata(sae: SAE[Any], models: _Models, sites: list[str], end: str) -> list[_Spot]:
    named = [sites] if sites != [""] else [[name] for name in _named(sae.metadata, end)]
    if not named:
        argument = f"hook_name{end}"
        raise ConfigError(
            f"the SAE's metadata name no hook point (no {argument}); say where it belongs: 'path.of.a.module[:input]'"
            + (" -> 'another'" if end else "")
        )
    translate = not isinstance(sae.metadata.get(f"hf_hook_name{end}"), str)
    for find in (_inside, _translated) if translate else (_inside,):
        for names in named:
            spots = [(second, find(name, model)) for second, model, name in map(models.of, names)]
            if all(point is not None for _, point in spots):
                return [(second, point) for second, point in spots if point is not None]
    tried = " or ".join(", ".join(names) for names in named)
    _, model, name = models.of(named[-1][0])
    missing = HookPoint.parse(name).module
    raise ConfigError(
        f"{type(model).__name__} has no module {tried}{did_you_mean(missing, [n for n, _ in model.named_modules()])}"
    )


def _named(metadata: Mapping[str, Any], end: str) -> list[str]:
    """The names of a place that the metadata give."""
    return [
        name for name in (metadata.get(f"hook_name{end}"), metadata.get(f"hf_hook_name{end}")) if isinstance(name, str)
    ]


def _inside(name: str, model: nn.Module) -> HookPoint | None:
    """The place of this name, also where the language model is the whole or a part of a larger model, and where a path
    begins inside the base model, as sparsify writes it: layers.3 for model.layers.3."""
    point = HookPoint.parse(name)
    inner = point.module.removeprefix("model.").removeprefix("language_model.")
    others = [f"model.{inner}", f"model.language_model.{inner}", inner] if point.module.startswith("model.") else []
    for module in (point.module, *others):
        if _has(model, module):
            return replace(point, module=module)
    ends = [module for module, _ in model.named_modules() if module.endswith(f".{point.module}")]
    return replace(point, module=ends[0]) if len(ends) == 1 else None


def _translated(name: str, model: nn.Module) -> HookPoint | None:
    """The place with this TransformerLens name in a model of transformers."""
    point = module_path(getattr(getattr(model, "config", None), "model_type", None), name)
    return point if point is not None and _has(model, point.module) else None


def _has(model: nn.Module, module: str) -> bool:
    try:
        find_module(model, module)
    except ConfigError:
        return False
    return True
