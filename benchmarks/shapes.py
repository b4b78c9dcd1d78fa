"""What a step costs when a dictionary reads and writes other things than one site: transcoders, crosscoders, cross-layer ones.

    python benchmarks/shapes.py

Every shape is measured beside an SAE that it should not be slower than: a transcoder beside an SAE of its widths, a crosscoder
of S sites beside an SAE of S times the width, both with the same latents and the same k. A cross-layer transcoder of L layers
stands beside L transcoders of its layers, whose decoders are smaller: what it writes besides shows in "vs SAE".
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace

from compare import Contender, compare, machine
from tabulate import tabulate
from workers.protocol import Spec

ARCHITECTURES = ("topk", "batchtopk", "jumprelu", "standard")
SITES = 3


def main() -> None:
    """Measure all shapes and print the table."""
    parser = argparse.ArgumentParser(
        description="Steps of other shapes beside an SAE's.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--d-in", type=int, default=768)
    parser.add_argument("--d-sae", type=int, default=16384)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", action="append", help="just these architectures; may be repeated")
    arguments = parser.parse_args()
    print(f"{machine(arguments.threads)}; d_in {arguments.d_in}, d_sae {arguments.d_sae}, batch {arguments.batch}\n")
    for architecture in arguments.only or ARCHITECTURES:
        sae = Spec(
            architecture=architecture,
            task="training",
            d_in=arguments.d_in,
            d_sae=arguments.d_sae,
            k=arguments.k,
            batch=arguments.batch,
            threads=arguments.threads,
            density=None if "topk" in architecture else arguments.k / arguments.d_sae,
        )
        wide = replace(sae, d_in=SITES * sae.d_in)
        one = replace(sae, d_sae=sae.d_sae // SITES, k=max(sae.k // SITES, 1), d_out=sae.d_in)
        groups: list[dict[str, Spec]] = [
            {
                "SAE": sae,
                "transcoder": replace(sae, d_out=sae.d_in),
                "skip transcoder": replace(sae, d_out=sae.d_in, skip=True),
            },
            {f"SAE, {SITES} x d_in": wide, f"crosscoder, {SITES} sites": replace(wide, sites=SITES)},
        ]
        if architecture in ("topk", "batchtopk", "jumprelu"):
            layered = replace(wide, layers=SITES, d_out=wide.d_in, d_sae=SITES * one.d_sae)
            groups.append(
                {f"transcoder, d_sae / {SITES}": one, f"cross-layer transcoder, {SITES} layers": layered},
            )
        for group in groups:
            _measure(architecture, group, arguments.rounds)


def _measure(architecture: str, group: dict[str, Spec], rounds: int) -> None:
    names = list(group)
    contenders = [Contender("sae-core", sys.executable, spec, note=name) for name, spec in group.items()]
    measured = compare(contenders, rounds)
    base = measured[0]
    rows = [
        [architecture, name, f"{c.best:.3f}", f"{c.l0:.0f}", f"{c.peak_mib:.0f}", f"{c.best / base.best:.2f}"]
        for name, c in zip(names, measured, strict=True)
    ]
    print(tabulate(rows, headers=["what", "shape", "s a step", "L0", "peak MiB", f"vs {names[0]}"], tablefmt="github"))
    print(flush=True)


if __name__ == "__main__":
    main()
