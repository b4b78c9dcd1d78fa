"""The bare truncated forward pass: the model's first layers on the same windows, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from lm_protocol import LMSpec, serve


def build(spec: LMSpec) -> Callable[[], int]:
    """A step runs as many windows as it takes to fill a batch."""
    import datasets
    import transformers

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(spec.model, dtype=torch.float32).eval().model
    model.layers, model.norm = model.layers[: spec.layer + 1], torch.nn.Identity()
    rows = torch.tensor(datasets.load_from_disk(str(Path(spec.data) / "rows"))["input_ids"][:])

    def windows() -> Iterator[torch.Tensor]:
        while True:
            yield from (part for part in rows.split(spec.prompts) if len(part) == spec.prompts)

    stream, left = windows(), [0]
    counted = spec.context - 1  # BOS is no activation for the others

    @torch.no_grad()
    def step() -> int:
        while left[0] < spec.batch:
            left[0] += len(model(input_ids=next(stream), use_cache=False).last_hidden_state) * counted
        left[0] -= spec.batch
        return spec.batch

    return step


if __name__ == "__main__":
    serve(build)
