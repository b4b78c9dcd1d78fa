"""Write the scores that SAELens gives a small SAE on fixed samples, as golden files.

Run with the Python of an environment that holds SAELens, in this folder:

    python make_sae_lens_scores.py

`sae_lens_sae/` is the SAE as SAELens saves it; `scores.safetensors` holds the true directions, the samples, and matrices
whose matching is known; `scores.json` what SAELens says of them.
"""

from __future__ import annotations

import json
import warnings
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import save_file

warnings.simplefilter("ignore")

from sae_lens import TopKSAE, TopKSAEConfig  # noqa: E402 - its import is what the filter above silences
from sae_lens import synthetic as S  # noqa: E402

HERE = Path(__file__).parent
FEATURES, WIDTH, LATENTS, ROWS = 20, 12, 16, 600


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class FixedSamples:
    """Stands where SAELens expects a generator, and returns the samples in order."""

    def __init__(self, samples: torch.Tensor) -> None:
        self.samples, self.given = samples, 0

    def sample(self, batch_size: int) -> torch.Tensor:
        self.given += batch_size
        return self.samples[self.given - batch_size : self.given]


features = S.FeatureDictionary(FEATURES, WIDTH, bias=0.5, seed=1)
samples = torch.relu(normal(ROWS, FEATURES, seed=2) - 1.2)
samples[::50] = 0.0
sae = TopKSAE(TopKSAEConfig(d_in=WIDTH, d_sae=LATENTS, k=3))
with torch.no_grad():  # two of three latents are near true features, the others anywhere; one can never fire
    directions = torch.cat([features.feature_vectors[:11] + 0.15 * normal(11, WIDTH, seed=3), normal(5, WIDTH, seed=4)])
    sae.W_dec.copy_(torch.nn.functional.normalize(directions, dim=1))
    sae.W_enc.copy_(sae.W_dec.T)
    sae.b_enc[15] = -100.0
    sae.b_dec.copy_(features.bias)
sae.save_model(HERE / "sae_lens_sae")
result = S.eval_sae_on_synthetic_data(sae, features, FixedSamples(samples), num_samples=ROWS, batch_size=128)
wide_a, wide_b = normal(30, 10, seed=5), normal(50, 10, seed=6)
ordering_a, ordering_b = normal(12, 6, seed=7), normal(9, 6, seed=8)

save_file(
    {
        "feature_vectors": features.feature_vectors.detach().contiguous(),
        "bias": features.bias.detach(),
        "samples": samples,
        "wide_a": wide_a,
        "wide_b": wide_b,
        "ordering_a": ordering_a,
        "ordering_b": ordering_b,
        "ordering": S.find_best_feature_ordering(ordering_a, ordering_b),
    },
    HERE / "scores.safetensors",
)
numbers = {
    "sae_lens": version("sae-lens"),
    "evaluation": result.to_log_dict(),
    "mcc": S.mean_correlation_coefficient(wide_a, wide_b),
    "uniqueness": S.feature_uniqueness(wide_a, wide_b),
}
(HERE / "scores.json").write_text(json.dumps(numbers, indent=1) + "\n")
