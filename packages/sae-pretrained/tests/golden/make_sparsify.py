"""Write `sparsify/`: tiny dictionaries saved by EleutherAI's sparsify, and what they return.

Run once with the Python of an environment that holds eai-sparsify 1.3.3:

    python make_sparsify.py

Every folder holds `cfg.json` and `sae.safetensors` as ``SparseCoder.save_to_disk`` wrote them and `io.safetensors`: `x`, `acts`
(the selected activations put in their places) and `out` of the coder loaded again. One more, `run/layers.3.mlp`, lies in a
run's folder with that run's config.json.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # its kernels need a GPU

import torch
from safetensors.torch import save_file
from sparsify import SparseCoder
from sparsify.config import SparseCoderConfig

ROOT = Path(__file__).parent / "sparsify"
D_IN = 8
CASES = {
    "sae": SparseCoderConfig(num_latents=24, k=4),
    "sae_expansion": SparseCoderConfig(expansion_factor=2, k=4, multi_topk=True, normalize_decoder=False),
    "transcoder": SparseCoderConfig(num_latents=24, k=4, transcode=True),
    "skip_transcoder": SparseCoderConfig(num_latents=24, k=4, transcode=True, skip_connection=True),
    "groupmax": SparseCoderConfig(num_latents=24, k=4, activation="groupmax"),
    "run/layers.3.mlp": SparseCoderConfig(num_latents=16, k=2),
    "skip_without_transcode": SparseCoderConfig(num_latents=24, k=4, skip_connection=True),
}


@torch.no_grad()
def make(name: str, config: SparseCoderConfig, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    coder = SparseCoder(D_IN, config)
    for _, parameter in sorted(coder.named_parameters()):
        parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    coder.save_to_disk(ROOT / name)
    if config.skip_connection and not config.transcode:  # a file older than that key
        path = ROOT / name / "cfg.json"
        path.write_text(
            json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != "transcode"})
        )
    coder = SparseCoder.load_from_disk(ROOT / name)
    x = 2.0 * torch.randn(6, D_IN, generator=generator)
    top_acts, top_indices, pre_acts = coder.encode(x)
    acts = torch.zeros_like(pre_acts).scatter(-1, top_indices, top_acts)
    out = coder.decode(top_acts, top_indices)
    if coder.W_skip is not None:
        out = out + x @ coder.W_skip.mT
    save_file({"x": x, "acts": acts, "out": out.contiguous()}, ROOT / name / "io.safetensors")


if __name__ == "__main__":
    shutil.rmtree(ROOT, ignore_errors=True)
    for seed, (case, settings) in enumerate(CASES.items()):
        make(case, settings, seed)
    run = {"model": "EleutherAI/pythia-160m", "dataset": "EleutherAI/SmolLM2-135M-10B", "ctx_len": 2048, "lr": None}
    (ROOT / "run" / "config.json").write_text(json.dumps(run))
