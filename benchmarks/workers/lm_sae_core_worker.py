"""This project's source of activations, and its training on them, as a benchmark worker."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lm_protocol import LMSpec, serve
from sae_core import TrainConfig, Trainer, create
from sae_core.config import structure
from sae_core.ops.memory import large_memory_is_kept
from sae_core.protocols import ActivationBatch
from sae_lm import HuggingFaceSource, HuggingFaceSourceConfig

_for_the_process = ExitStack()


def build(spec: LMSpec) -> Callable[[], int]:
    """A step takes a batch from the source, and for training makes a step of the trainer with it."""
    training = spec.task == "training"
    settings: dict[str, Any] = {
        "model": spec.model, "hook": spec.hook, "device": "cpu", "context_size": spec.context, "batch_prompts": spec.prompts,
        "buffer_rows": spec.buffer_rows, "on_exhausted": "cycle", "tokens": {"eos": "none" if not training else "auto"},
        "text": {"kind": "dataset", "path": str(Path(spec.data) / ("text" if training else "rows")), "held_out": 0.0},
    }  # fmt: skip
    source = HuggingFaceSource(structure(settings, HuggingFaceSourceConfig))
    if not training:
        batches = source.batches(spec.batch)

        def read() -> int:
            batch = next(batches)
            return len(batch.inputs if isinstance(batch, ActivationBatch) else batch)

        return read
    sae = create("topk", d_in=source.d_in, d_sae=spec.d_sae, k=spec.k, seed=0)
    config = TrainConfig(total_samples=10**9, batch_size=spec.batch, lr=1e-4, progress_bar=False)
    _for_the_process.enter_context(large_memory_is_kept())  # as Trainer.fit does around its steps
    trainer = Trainer(sae, source, config)

    def step() -> int:
        trainer.step(next(trainer.stream))
        return spec.batch

    return step


if __name__ == "__main__":
    serve(build)
