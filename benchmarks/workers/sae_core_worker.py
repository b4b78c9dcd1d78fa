"""This project, as a benchmark worker."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from protocol import Job, Spec, quantile_shift, serve
from sae_core import ActivationBatch, TrainConfig, Trainer, create
from sae_core.ops.memory import large_memory_is_kept

_for_the_process = ExitStack()


def build(spec: Spec, x: torch.Tensor) -> Job:
    """A trainer whose step is timed, or an SAE in eval mode whose forward is."""
    options: dict[str, Any] = {}
    if spec.architecture in ("topk", "batchtopk", "matryoshka_batchtopk"):
        options["k"] = spec.k
    if spec.architecture == "matryoshka_batchtopk":
        options["matryoshka_widths"] = list(spec.widths)
    parts = {str(site): spec.d_in // max(spec.sites, spec.layers) for site in range(max(spec.sites, spec.layers))}
    if spec.layers > 1:
        widths = {"reads": parts, "writes": {f"out {site}": width for site, width in parts.items()}}
        made_of = {"activation": spec.architecture, **widths, **options}
        sae = create("cross_layer_transcoder", d_in=spec.d_in, d_sae=spec.d_sae, seed=0, **made_of)
    else:
        options |= {"d_out": spec.d_out, "skip": spec.skip, **({"reads": parts} if spec.sites > 1 else {})}
        sae = create(spec.architecture, d_in=spec.d_in, d_sae=spec.d_sae, seed=0, **options)
    if spec.density is not None:
        with torch.no_grad():
            _make_sparse(sae, x[:64], spec.density)
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
        encoder_product="full" if spec.product == "full" else "auto",
        log_every_steps=2,
        progress_bar=False,
    )
    _for_the_process.enter_context(large_memory_is_kept())  # as Trainer.fit does around its steps
    trainer = Trainer(sae, [], config)
    sae.train()
    last: list[Any] = [None]

    def step(batch: torch.Tensor) -> None:
        last[0] = None
        given = batch if spec.d_out is None else ActivationBatch(batch, batch.flip(-1)[:, : spec.d_out])
        last[0] = trainer.step(given).l0.float().mean()

    return Job(step, lambda: float(last[0]))


def _make_sparse(sae: Any, x: torch.Tensor, density: float) -> None:
    """Thresholds or biases such that this fraction of latents is active."""
    if sae.architecture == "cross_layer_transcoder":
        if sae.config.activation == "jumprelu":
            parts = x.split(list(sae.reads.values()), dim=-1)
            for part, encoder, threshold in zip(parts, sae.encoder, sae.threshold, strict=True):
                threshold.fill_(quantile_shift(part @ encoder.T, density))
        return
    centre = sae.b_dec if sae.config.apply_b_dec_to_input else 0
    shift = quantile_shift((x - centre) @ sae.W_enc, density)
    if sae.architecture == "jumprelu":
        sae.threshold.fill_(shift)
        return
    for name in ("b_enc", "b_gate"):
        if hasattr(sae, name):
            getattr(sae, name).fill_(-shift)


if __name__ == "__main__":
    serve(build)
