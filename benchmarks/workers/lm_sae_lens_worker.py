"""SAELens 6's ActivationsStore, and its trainer on it, as a benchmark worker."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lm_protocol import LMSpec, serve
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.load_model import load_model
from sae_lens.registry import get_sae_training_class
from sae_lens.training.activations_store import ActivationsStore
from sae_lens.training.sae_trainer import SAETrainer


def build(spec: LMSpec) -> Callable[[], int]:
    """A step takes a batch from the store, and for training makes a step of the trainer with it."""
    import datasets

    training = spec.task == "training"
    torch.manual_seed(0)
    model: Any = load_model("AutoModelForCausalLM", spec.model, device="cpu", hook_names=[spec.hook])
    d_in = model.model.config.hidden_size
    store = ActivationsStore(
        model=model,
        dataset=datasets.load_from_disk(str(Path(spec.data) / ("text" if training else "rows"))),
        streaming=False,
        hook_name=spec.hook,
        hook_head_index=None,
        context_size=spec.context,
        d_in=d_in,
        n_batches_in_buffer=max(2, spec.buffer_rows // spec.context),
        total_training_tokens=10**9,
        store_batch_size_prompts=spec.prompts,
        train_batch_size_tokens=spec.batch,
        prepend_bos=True,
        normalize_activations="none",
        device=torch.device("cpu"),
        dtype="float32",
        exclude_special_tokens=torch.tensor([model.tokenizer.bos_token_id]),
    )
    if not training:
        return lambda: len(next(store))
    sae_class, config_class = get_sae_training_class("topk")
    sae: Any = sae_class(config_class(d_in=d_in, d_sae=spec.d_sae, k=spec.k, dtype="float32", device="cpu"))
    config = SAETrainerConfig(
        total_training_samples=10**9,
        train_batch_size_samples=spec.batch,
        lr=1e-4,
        lr_end=1e-5,
        logger=LoggingConfig(log_to_wandb=False),
    )
    trainer: Any = SAETrainer(config, sae, iter([]))

    def step() -> int:
        batch = next(store)
        trainer.step(batch)
        trainer.n_training_steps += 1
        return len(batch)

    return step


if __name__ == "__main__":
    serve(build)
