"""Files of circuit-tracer's per-layer transcoders, such as mwhanna's for Qwen3: ``layer_{n}.safetensors``, one a layer.

The repository's ``config.yaml`` names the base model and the hook points; ``wandb-config.yaml`` (or ``wanb-config.yaml``, as
some repositories spell it) is the record of the training run. A single file without either loads where the caller names this
format and gives the facts ``hook_name`` and ``hook_name_out``.

The six facts:

- Weights: ``W_enc`` (d_sae, d_in) is transposed, ``W_dec`` (d_sae, d_out) and ``W_skip`` (d_out, d_in) lie as ours do.
- b_dec before encoding: not subtracted.
- ReLU and TopK: ReLU; JumpReLU if there is a tensor ``activation_function.threshold``; TopK if there is a tensor ``k``.
  circuit-tracer's TopK has no ReLU and keeps the k largest even where they are negative: ``apply_relu: false`` here.
- Threshold: stored as it is. circuit-tracer's JumpReLU has no ReLU either, so that a negative threshold lets negative latents
  through: where there is one, ``apply_relu: false``.
- Input normalisation: none. The input is what the MLP reads, after its norm's weights, so the base model must not be loaded
  with those folded into the MLP.
- Decoder norm: whatever the file has.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, final

from sae_core.errors import FormatError
from sae_core.protocols import FileSource, LoadedSAE

from sae_pretrained.loaders.common import Facts, Settings, assemble, layer_of, place, read_yaml, safetensors_bag

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["MwhannaTranscoderLoader", "below_zero"]

_FILE = re.compile(r"(?:^|/)layer_\d+\.safetensors$")
_RUN_FILES = ("wandb-config.yaml", "wanb-config.yaml")


@final
class MwhannaTranscoderLoader:
    """Reads per-layer transcoders in circuit-tracer's layout."""

    def matches(self, source: FileSource, folder: str = "") -> bool:
        """A file layer_{n}.safetensors in a repository with config.yaml or the run's config, or a folder with just one."""
        known = any(source.exists(name) for name in ("config.yaml", *_RUN_FILES))
        return known and _the_file(source, folder) is not None

    def hint(self, source: FileSource, folder: str = "") -> str | None:
        """For a file of this name in a folder that says nothing of the model."""
        if _FILE.search(folder) is None or not source.exists(folder):
            return None
        return "format='mwhanna_transcoder' and the facts hook_name and hook_name_out"

    def load(
        self,
        source: FileSource,
        folder: str = "",
        *,
        weights: bool = True,
        overrides: Mapping[str, Any] | None = None,
        rows: Sequence[int] | None = None,
    ) -> LoadedSAE:
        """Read the file `folder`; `rows` are the latents to load, None for all."""
        folder = _the_file(source, folder) or folder
        facts = Facts(overrides, "mwhanna_transcoder")
        sizes, found = _run(source, folder, facts)
        bag = safetensors_bag(source, folder, sizes=sizes, rows=rows, weights=weights)
        tensors = {
            "W_enc": bag.take("W_enc", "d_sae d_in").t(),
            "b_enc": bag.take("b_enc", "d_sae"),
            "W_dec": bag.take("W_dec", "d_sae d_out"),
            "b_dec": bag.take("b_dec", "d_out"),
        }
        config: dict[str, Any] = {key: bag.sizes[key] for key in ("d_in", "d_out", "d_sae")}
        config["apply_b_dec_to_input"] = False
        architecture = "standard"
        if bag.has("W_skip"):
            tensors["W_skip"] = bag.take("W_skip", "d_out d_in")
            config["skip"] = True
        if bag.has("activation_function.threshold"):
            name = "activation_function.threshold"
            threshold = bag.take(name, "d_sae" if bag.ndim(name) == 1 else "1 d_sae")
            tensors["threshold"] = threshold.reshape(-1)
            architecture = "jumprelu"
            config |= below_zero(tensors["threshold"])
        elif bag.has("k"):
            k = bag.number("k")
            config |= {"k": int(k or 0), "rescale_acts_by_decoder_norm": False, "apply_relu": False}
            architecture = "topk"
        layer = layer_of(folder)
        metadata = {
            "model_name": found.get("model_name"),
            "hook_name": f"blocks.{layer}.{found.get('feature_input_hook', 'mlp.hook_in')}",
            "hook_name_out": f"blocks.{layer}.{found.get('feature_output_hook', 'hook_mlp_out')}",
            "context_size": found.get("context_size"),
            "model_from_pretrained_kwargs": {"fold_ln": False},
        }
        return assemble(architecture, config, tensors, facts.metadata(metadata), bag)


def below_zero(*thresholds: Tensor) -> dict[str, Any]:
    """The config field for thresholds of which some are below zero, with which circuit-tracer keeps negative latents."""
    some = any(not threshold.is_meta and bool((threshold < 0).any()) for threshold in thresholds)
    return {"apply_relu": False} if some else {}


def _the_file(source: FileSource, folder: str) -> str | None:
    """`folder` if it is a layer's file, or the only one in it."""
    if _FILE.search(folder) is not None:
        return folder if source.exists(folder) else None
    inside = folder.strip("/") + "/" if folder.strip("/") else ""
    found = [name for name in source.files() if re.fullmatch(re.escape(inside) + r"layer_\d+\.safetensors", name)]
    return found[0] if len(found) == 1 else None


def _run(source: FileSource, folder: str, facts: Facts) -> tuple[dict[str, int], dict[str, Any]]:
    """Widths that the run's record states, and facts from both files."""
    sizes: dict[str, int] = {}
    found: dict[str, Any] = {}
    run = next((name for name in _RUN_FILES if source.exists(name)), None)
    if run is not None:
        # a record of everything the run was started with, of which the widths and the context size concern us
        record = Settings(read_yaml(source, run), place(source, "", run))
        width = record.section("d_model").integer("value")
        sizes = {"d_in": width, "d_out": width, "d_sae": record.section("d_feature").integer("value")}
        if "batch_size" in record:
            found["context_size"] = record.section("batch_size").get("value", int)
    if source.exists("config.yaml"):
        settings = Settings(read_yaml(source, "config.yaml"), place(source, "", "config.yaml"))
        for key in ("model_name", "feature_input_hook", "feature_output_hook"):
            if (value := settings.get(key, str, nullable=True)) is not None:
                found[key] = value
        settings.ignore("names of the set and of its members", "model_kind scan transcoders repo_id revision")
        settings.finish(facts.ignore_keys)
    if not found and not sizes:
        given = facts.metadata({})
        if missing := [name for name in ("hook_name", "hook_name_out") if name not in given]:
            raise FormatError(
                f"{place(source, folder)}: neither config.yaml nor {' nor '.join(_RUN_FILES)} says what it reads and predicts; "
                f"load with the fact{'s' if len(missing) > 1 else ''} {' and '.join(missing)} (and model_name)"
            )
    return sizes, found
