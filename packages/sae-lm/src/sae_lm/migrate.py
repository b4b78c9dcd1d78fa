"""SAELens's runner configs as run files: what means the same is kept, what does not is named.

A config of its language-model runner (6.x, JSON) says in about seventy fields what a run file says in fewer. `migrate` maps
each field to the setting that means the same, in the units of ours (samples instead of steps), and keeps a list of those that
have no counterpart or mean something a little different. No field is passed over in silence: one that this module does not
know is named too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, cast, final

from sae_core.config import require
from sae_core.errors import ConfigError
from sae_core.plugins import get_registry

from sae_lm.origin import hub_name

__all__ = ["Migration", "migrate"]

_SAELENS_ONLY = {
    "dtype": "the SAE has the run file's dtype; activations keep the model's precision",
    "device": "the run file's device",
}
# Fields that have no effect in SAELens, or none that a run could miss.
_WITHOUT_EFFECT = frozenset(
    {
        "hook_eval", "dataset_trust_remote_code", "is_dataset_tokenized", "verbose", "sae_lens_version",
        "sae_lens_training_version", "dead_feature_threshold", "activations_mixing_fraction", "act_store_device", "dtype",
        "llm_device", "prefetch_llm_batches", "architecture", "checkpoint_path", "n_batches_for_norm_estimate",
    }
)  # fmt: skip
_NO_COUNTERPART = {
    "autocast_lm": "source.dtype: bfloat16 runs the model in bfloat16",
    "compile_llm": "the model is not compiled", "compile_sae": "the SAE is not compiled",
    "llm_compilation_mode": "the model is not compiled", "sae_compilation_mode": "the SAE is not compiled",
    "use_cached_activations": "cache activations with sae-core lm cache, and name that source",
    "cached_activations_path": "cache activations with sae-core lm cache, and name that source",
    "resume_from_checkpoint": "sae-core train RUN.yaml --resume",
    "lr_scheduler_name": "the rate is constant between warm-up and decay", "n_restart_cycles": "there are no restarts",
    "lr_end": "the rate decays to zero", "feature_sampling_window": "densities are measured at evaluation",
    "model_kwargs": "the model is called without more arguments",
    "use_chat_formatting": "a column of messages is formatted by the tokenizer's chat template",
    "save_final_checkpoint": "train.checkpoint_every_samples keeps states to go on from",
}  # fmt: skip
_DEFAULTS: Mapping[str, Any] = {
    "autocast_lm": False, "compile_llm": False, "compile_sae": False, "llm_compilation_mode": None,
    "sae_compilation_mode": None, "use_cached_activations": False, "cached_activations_path": None,
    "resume_from_checkpoint": None, "lr_scheduler_name": "constant", "n_restart_cycles": 1,
    "model_kwargs": {}, "use_chat_formatting": False, "save_final_checkpoint": False,
    "feature_sampling_window": 2000,
}  # fmt: skip


@final
@dataclass(frozen=True)
class Migration:
    """A run file's contents, and what of the config it does not say: field and why."""

    run: dict[str, Any]
    left_out: dict[str, str] = field(default_factory=dict[str, str])


def migrate(config: Mapping[str, Any]) -> Migration:
    """A run file for SAELens's runner config. Raises ConfigError for something that is none.

    >>> migrate({"model_name": "gpt2"})
    Traceback (most recent call last):
    sae_core.errors.ConfigError: migrate: this is no runner config of SAELens 6: there is no 'sae' in it
    """
    left = dict(config)
    sae = left.pop("sae", None)
    if not isinstance(sae, Mapping):
        raise ConfigError("migrate: this is no runner config of SAELens 6: there is no 'sae' in it")
    for name in ("model_name", "hook_name", "training_tokens"):
        require(name in left, f"migrate: the config has no {name!r}")
    out: dict[str, str] = {}
    batch = int(left.pop("train_batch_size_tokens", 4096))
    total = int(left.pop("training_tokens"))
    steps = max(total // batch, 1)
    eval_prompts = left.pop("eval_batch_size_prompts", None) or left.get("store_batch_size_prompts", 32)
    eval_tokens = int(left.pop("n_eval_batches", 10)) * int(eval_prompts) * int(left.get("context_size", 128))
    run: dict[str, Any] = {
        "seed": left.pop("seed", 42),
        "output": left.pop("output_path", None) or "output",
        "device": left.pop("device", "auto"),
        "sae": _sae(cast("Mapping[str, Any]", sae), steps, out),
        "source": _source(left, batch, out),
        "train": {
            "total_samples": total,
            "batch_size": batch,
            "lr": left.pop("lr", 3e-4),
            "lr_warmup_samples": int(left.pop("lr_warm_up_steps", 0)) * batch,
            "lr_decay_samples": int(left.pop("lr_decay_steps", 0)) * batch,
            "dead_after_samples": int(left.pop("dead_feature_window", 1000)) * batch,
        },
    }
    if left.pop("autocast", False):
        run["train"]["precision"] = "bfloat16"
    if (start := left.pop("from_pretrained_path", None)) is not None:
        run["sae"]["start"] = start
    checkpoints = int(left.pop("n_checkpoints", 0))
    if checkpoints:
        run["train"]["checkpoint_every_samples"] = -(-total // (checkpoints + 1))
    for name in ("adam_beta1", "adam_beta2"):
        if name in left:
            run["train"][name] = float(left.pop(name))
    _logger(left.pop("logger", None), run, out, batch=batch, eval_tokens=eval_tokens, eval_prompts=int(eval_prompts))
    for name in list(left):
        if name in _WITHOUT_EFFECT:
            del left[name]
        elif name in _NO_COUNTERPART:
            value = left.pop(name)
            if value != _DEFAULTS.get(name):
                out[name] = _NO_COUNTERPART[name]
    out |= dict.fromkeys(left, "unknown here")
    return Migration(run, out)


def _sae(config: Mapping[str, Any], steps: int, out: dict[str, str]) -> dict[str, Any]:
    given = dict(config)
    name = given.pop("architecture", None)
    if not isinstance(name, str):
        raise ConfigError("migrate: sae has no 'architecture'")
    given.pop("d_in", None)  # the source's width
    given.pop("metadata", None)
    known = get_registry().usable("architecture", name).config_class
    require(is_dataclass(known), f"migrate: {name!r} has no config")
    names = {one.name for one in fields(known)}
    made: dict[str, Any] = {"architecture": name}
    for key in list(given):
        if not key.endswith("_warm_up_steps"):
            continue
        warm, coefficient = int(given.pop(key) or 0), key.replace("_warm_up_steps", "_coefficient")
        if warm and coefficient in given:
            over = min(warm / steps, 1.0)
            given[coefficient] = {"from": 0.0, "to": given[coefficient], "over": round(over, 6)}
    for key, value in given.items():
        if key in names:
            made[key] = value
        elif key in _SAELENS_ONLY:
            continue
        elif value not in (None, False, [], {}):
            out[f"sae.{key}"] = f"{name} has no such field here"
    return made


def _source(left: dict[str, Any], batch: int, out: dict[str, str]) -> dict[str, Any]:
    model, kind = str(left.pop("model_name")), left.pop("model_class_name", "HookedTransformer")
    lens = kind == "HookedTransformer"
    size = int(left.pop("context_size", 128))
    prompts = int(left.pop("store_batch_size_prompts", 32))
    batches = int(left.pop("n_batches_in_buffer", 20))
    source: dict[str, Any] = {
        "name": "huggingface",
        "model": model if lens else hub_name(model) or model,
        "hook": left.pop("hook_name"),
        "context_size": size,
        "batch_prompts": prompts,
        "buffer_rows": max(batches * size, 4 * (prompts * size + batch)),
    }
    if kind != "AutoModelForCausalLM":
        source["model_class"] = kind
    if kind not in ("AutoModelForCausalLM", "HookedTransformer"):
        out["model_class_name"] = f"{kind} is not among the classes that are known to work"
    prepared = dict(left.pop("model_from_pretrained_kwargs", None) or {})
    changed = {key: value for key, value in prepared.items() if value not in (None, False)}
    if changed:
        out["model_from_pretrained_kwargs"] = f"the model's weights are left as they are, without {', '.join(changed)}"
    if isinstance(head := left.pop("hook_head_index", None), int):
        source["head"] = head
    dataset = left.pop("dataset_path", "")
    text: dict[str, Any] = {"kind": "dataset", "path": dataset} if dataset else {"kind": "stdlib"}
    if left.pop("streaming", True) and dataset:
        text["streaming"] = True
    source["text"] = text
    tokens: dict[str, Any] = {"bos": "window" if left.pop("prepend_bos", True) else "none"}
    separator = left.pop("sequence_separator_token", "bos")
    tokens["eos"] = "document" if separator in ("eos", "sep") else "none"
    if separator == "bos" and tokens["bos"] == "window":
        out["sequence_separator_token"] = (
            "no BOS is put between documents; tokens: {bos: document} puts it there instead"
        )
    elif isinstance(separator, int):
        tokens |= {"eos": "document", "eos_token": separator}
    if left.pop("disable_concat_sequences", False):
        tokens["packing"] = "document"
    excluded = left.pop("exclude_special_tokens", False)
    if isinstance(excluded, list):
        tokens["exclude_tokens"] = excluded
    elif not excluded:  # SAELens trains on BOS and EOS unless told otherwise
        tokens |= {"exclude_bos": False, "exclude_eos": False}
    first, last = ([*(left.pop("seqpos_slice", None) or []), None, None])[:2]
    if last is None and isinstance(first, int) and first < 0:
        out["seqpos_slice"] = "positions are left out at the start (exclude_first) and the end (exclude_last) only"
    elif isinstance(last, int) and last >= 0:
        if first is None:
            first, last = None, last - size
        else:
            last = last - size
    if isinstance(first, int) and first > 0:
        tokens["exclude_first"] = first
    if isinstance(last, int) and last < 0:
        tokens["exclude_last"] = -last
    return {**source, "tokens": tokens}


def _logger(
    logger: Any, run: dict[str, Any], out: dict[str, str], *, batch: int, eval_tokens: int, eval_prompts: int
) -> None:
    settings = cast("Mapping[str, Any]", logger) if isinstance(logger, Mapping) else {}
    if settings.get("log_to_wandb", False):
        wandb = {
            "project": settings.get("wandb_project", "sae_lens_training"),
            "entity": settings.get("wandb_entity"),
            "run_name": settings.get("run_name"),
        }
        run["loggers"] = [{"name": "wandb", **{key: value for key, value in wandb.items() if value is not None}}]
        every = int(settings.get("wandb_log_frequency", 10)) * int(settings.get("eval_every_n_wandb_logs", 100))
        if eval_tokens > 0:  # it evaluates during training where it logs to W&B
            run["eval"] = {"every_samples": every * batch, "tokens": eval_tokens, "batch_prompts": eval_prompts}
    if isinstance(every := settings.get("wandb_log_frequency"), int):
        run["train"]["log_every_steps"] = every
