"""This project, as a benchmark worker."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from protocol import Job, Spec, quantile_shift, serve
from sae_core import TrainConfig, Trainer, create
from sae_core.ops.memory import large_memory_is_kept

_for_the_process = ExitStack()


def build(spec: Spec, x: torch.Tensor) -> Job:
    """A trainer whose step is timed, or an SAE in eval mode whose forward is."""
    options: dict[str, Any] = {}
    if spec.architecture in ("topk", "batchtopk", "matryoshka_batchtopk"):
        options["k"] = spec.k
    if spec.architecture == "matryoshka_batchtopk":
        options["matryoshka_widths"] = list(spec.widths)
    sae = create(spec.architecture, d_in=spec.d_in, d_sae=spec.d_sae, seed=0, **options)
    if spec.density is not None:
        with torch.no_grad():
            shift = quantile_shift((x[:64] - sae.b_dec) @ sae.W_enc, spec.density)
            if spec.architecture == "jumprelu":
                sae.threshold.fill_(shift)
            else:
                for name in ("b_enc", "b_gate"):
                    if hasattr(sae, name):
                        getattr(sae, name).fill_(-shift)
    if spec.task == "inference":
        sae.eval()
        held: list[Any] = [x]

        def forward(batch: torch.Tensor) -> None:
            held[0] = batch
            with torch.no_grad():
                sae(batch)

        return Job(forward, lambda: float(sae.encode_sparse(held[0]).l0().float().mean()))
    config = TrainConfig(
        total_samples=10**9,
        batch_size=spec.batch,
        lr=1e-5,
        encoder_product="bfloat16" if spec.product == "bfloat16" else "full",
        log_every_steps=2,
        progress_bar=False,
    )
    _for_the_process.enter_context(large_memory_is_kept())  # as Trainer.fit does around its steps
    trainer = Trainer(sae, [], config)
    sae.train()
    last: list[Any] = [None]

    def step(batch: torch.Tensor) -> None:
        last[0] = None
        last[0] = trainer.step(batch).l0.float().mean()

    return Job(step, lambda: float(last[0]))


if __name__ == "__main__":
    serve(build)
