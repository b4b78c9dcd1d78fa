"""From which density on the dense form of a step is the faster one: the measurement behind `sae_core.ops.dispatch`.

    python benchmarks/crossover.py --d-sae 4096 --d-sae 16384

One row a density: seconds of encode, decode and their backward pass, in the sparse and in the dense form, in turn. Numbers
of `sae_core.ops.dispatch` are set by hand from this table, never at run time.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from compare import machine
from sae_core.codes import Codes
from sae_core.ops.active import encode_active
from sae_core.ops.decode import decode
from tabulate import tabulate

DENSITIES = (0.005, 0.02, 0.05, 0.1, 0.2)


def step_time(form: Callable[[], Codes], W_dec: torch.Tensor, leaves: list[torch.Tensor]) -> float:
    """Seconds of one forward and backward pass."""
    started = time.perf_counter()
    y = decode(form().map(torch.relu), W_dec)
    torch.autograd.grad(y.square().sum(), leaves)
    return time.perf_counter() - started


def measure(d_in: int, d_sae: int, batch: int, density: float, rounds: int) -> tuple[float, float]:
    """Seconds of the sparse and of the dense form."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, d_in, generator=generator)
    encoder = torch.randn(d_sae, d_in, generator=generator) / d_in**0.5
    W_dec = encoder.clone().requires_grad_()
    pre = x[:256] @ encoder.t()
    encoder.requires_grad_()
    b_enc = torch.full((d_sae,), -float(pre.flatten().kthvalue(int(pre.numel() * (1 - density))).values))
    b_enc.requires_grad_()

    def form(assumed: float) -> Callable[[], Codes]:
        return lambda: encode_active(x, None, encoder, b_enc, 0.0, density=assumed)

    best = [float("inf")] * 2
    for _ in range(rounds + 1):
        for position, assumed in enumerate((0.0, 1.0)):
            best[position] = min(best[position], step_time(form(assumed), W_dec, [encoder, b_enc, W_dec]))
    return best[0], best[1]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Where the dense form of a step becomes the faster one.")
    parser.add_argument("--d-in", type=int, default=768)
    parser.add_argument("--d-sae", type=int, action="append", help="may be repeated; default 4096 and 16384")
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows: list[list[str]] = []
    for d_sae in arguments.d_sae or (4096, 16384):
        for density in DENSITIES:
            sparse, dense = measure(arguments.d_in, d_sae, arguments.batch, density, arguments.rounds)
            rows.append([str(d_sae), f"{density:.1%}", f"{sparse:.3f}", f"{dense:.3f}", f"{dense / sparse:.2f}"])
            print(*rows[-1], flush=True)
    print(f"\n{machine(arguments.threads)}; d_in {arguments.d_in}, batch {arguments.batch}\n")
    headers = ["d_sae", "density", "sparse s", "dense s", "dense / sparse"]
    print(tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True, colalign=["right"] * 5))


if __name__ == "__main__":
    main()
