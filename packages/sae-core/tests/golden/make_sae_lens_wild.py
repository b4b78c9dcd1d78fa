"""Write `sae_lens_files/wild/`: folders whose cfg.json leaves out, or adds, what published ones do, and SAELens's answers.

Run once with the Python of an environment that holds SAELens 6.54.12:

    PYTHONHASHSEED=0 python make_sae_lens_wild.py

Every folder holds `cfg.json` as written here, `sae_weights.safetensors` and `io.safetensors`: `x`, `acts` = encode(x) and
`out` = sae(x) of the SAE that SAELens loads from the folder.
"""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

warnings.simplefilter("ignore")
logging.disable(logging.WARNING)

from sae_lens.saes import SAE  # noqa: E402 - its import is what the filters above silence

ROOT = Path(__file__).parent / "sae_lens_files" / "wild"
D_IN, D_SAE = 8, 16
SIZES: dict[str, Any] = {"d_in": D_IN, "d_sae": D_SAE, "dtype": "float32"}
BESIDE = {
    "model_name": "pythia-70m-deduped",
    "hook_name": "blocks.3.hook_resid_post",
    "hook_layer": 3,
    "context_size": 128,
    "prepend_bos": True,
    "dataset_path": "monology/pile-uncopyrighted",
}
CONFIGS: dict[str, dict[str, Any]] = {
    "facts_beside_the_fields": {
        **SIZES,
        **BESIDE,
        "architecture": "jumprelu",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": "6.20.1"},
    },
    "topk_fields_missing": {**SIZES, "architecture": "topk", "k": 5, "metadata": {"sae_lens_version": "6.10.0"}},
    "topk_no_version": {**SIZES, **BESIDE, "architecture": "topk", "k": 5, "device": "cpu"},
    "topk_no_version_nested": {**SIZES, "architecture": "topk", "k": 5, "metadata": {"model_name": "gpt2-small"}},
    "topk_rescaled_no_version": {**SIZES, "architecture": "topk", "k": 5, "rescale_acts_by_decoder_norm": True},
    "abstopk_fields_missing": {**SIZES, "architecture": "abstopk", "k": 5, "sae_lens_version": "6.54.0"},
    "matching_pursuit_no_version": {
        **SIZES,
        "architecture": "matching_pursuit",
        "residual_threshold": 0.7,
        "max_iterations": 3,
        "stop_on_duplicate_support": False,
    },
    "matching_pursuit_fields_missing": {**SIZES, "architecture": "matching_pursuit", "sae_lens_version": "6.28.0"},
    "temporal_no_version": {
        **SIZES,
        "architecture": "temporal",
        "n_heads": 2,
        "bottleneck_factor": 2,
        "kval_topk": 4,
        "activation_normalization_factor": 0.5,
        "normalize_activations": "constant_scalar_rescale",
        "tied_weights": False,
    },
    "temporal_fields_missing": {
        **SIZES,
        "architecture": "temporal",
        "n_heads": 2,
        "bottleneck_factor": 2,
        "sae_lens_version": "6.28.0",
    },
    "transcoder_fields_missing": {
        **SIZES,
        "architecture": "transcoder",
        "d_out": 6,
        "apply_b_dec_to_input": False,  # True when missing, which SAELens then refuses
        "sae_lens_version": "6.28.0",
    },
    "standard_sizes_only": {**SIZES, "sae_lens_version": "6.0.0", "architecture": "standard"},
}


def main() -> None:
    shutil.rmtree(ROOT, ignore_errors=True)
    for seed, (name, cfg) in enumerate(CONFIGS.items()):
        folder = ROOT / name
        folder.mkdir(parents=True)
        (folder / "cfg.json").write_text(json.dumps(cfg, indent=1) + "\n")
        template = SAE.from_dict({"metadata": {}, **cfg})
        random = torch.Generator().manual_seed(seed)
        weights = {}
        for key, value in sorted(template.state_dict().items()):
            filled = torch.randn(value.shape, generator=random) * 0.5
            if key == "threshold":
                filled = filled.abs() + 0.05
            if key == "W_dec" and cfg["architecture"] == "matching_pursuit":
                filled = filled / filled.norm(dim=-1, keepdim=True)
            weights[key] = filled
        save_file(weights, folder / "sae_weights.safetensors")
        sae = SAE.load_from_disk(folder)
        shape = (2, 5, D_IN) if cfg["architecture"] == "temporal" else (6, D_IN)
        x = torch.randn(shape, generator=random) * 1.5
        with torch.no_grad():
            io = {"x": x, "acts": sae.encode(x).contiguous(), "out": sae(x).contiguous()}
        save_file(io, folder / "io.safetensors")


if __name__ == "__main__":
    main()
