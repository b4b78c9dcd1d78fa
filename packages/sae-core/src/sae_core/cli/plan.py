"""``sae-core plan RUN.yaml``: what a run will take, before it begins."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, ClassVar, final

if TYPE_CHECKING:
    from sae_core.planning import Plan as Found

__all__ = ["Plan"]


@final
class Plan:
    """Say how much memory, disk and time a run takes, and whether that is there."""

    help: ClassVar[str] = "What a run will take: memory, disk and time"

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Declare the options."""
        parser.add_argument("run", metavar="RUN.yaml", help="the run file")
        parser.add_argument(
            "--set",
            dest="overrides",
            metavar="KEY=VALUE",
            action="append",
            default=[],
            help="change one setting of the run file, say train.batch_size=4096; may be repeated",
        )
        parser.add_argument("--json", action="store_true", help="print one JSON object, sizes in bytes")

    def run(self, args: argparse.Namespace) -> int:
        """Print the plan; 1 when the run cannot fit."""
        from sae_core.planning import plan
        from sae_core.run import read_run

        found = plan(read_run(args.run, args.overrides))
        print(_as_json(found) if args.json else _as_text(found))
        return 1 if found.problems else 0


def _as_json(found: Found) -> str:
    return json.dumps(
        {
            "memory": [entry._asdict() for entry in found.memory],
            "needed": {device: found.needed(device) for device in {entry.device for entry in found.memory}},
            "available": found.available,
            "disk": dict(found.disk),
            "free_disk": found.free_disk,
            "samples": found.samples,
            "seconds": found.seconds,
            "problems": found.problems,
            "processes": found.processes,
            "traffic": dict(found.traffic),
        },
        indent=2,
    )


def _as_text(found: Found) -> str:
    from sae_core.cli.tables import table

    parts: list[str] = []
    for device in dict.fromkeys(entry.device for entry in found.memory):
        rows = [[entry.what, _size(entry.bytes)] for entry in found.memory if entry.device == device]
        rows.append(["together", _size(found.needed(device))])
        if device in found.available:
            rows.append(["can be had", _size(found.available[device])])
        parts.append(table([f"MEMORY ON {device.upper()}", ""], rows))
    if found.traffic:
        rows = [[what, _size(size)] for what, size in found.traffic]
        parts.append(table([f"TRAFFIC OF A STEP, TO EACH OF {found.processes} PROCESSES", ""], rows))
    if found.disk:
        rows = [[what, _size(size)] for what, size in found.disk]
        rows.append(["together", _size(sum(size for _, size in found.disk))])
        rows.append(["free", _size(found.free_disk or 0)])
        parts.append(table(["DISK", ""], rows))
    if found.seconds:
        rows = [[what, _time(seconds)] for what, seconds in found.seconds.items()]
        rows.append(["together, one after the other", _time(sum(found.seconds.values()))])
        parts.append(table([f"TIME FOR {found.samples:,} SAMPLES", ""], rows))
    verdict = [f"It cannot run: {problem}." for problem in found.problems] or ["It fits."]
    return "\n\n".join([*parts, *verdict])


def _size(size: int) -> str:
    """``1.5 GiB``.

    >>> _size(3 * 2**29), _size(5 * 2**20)
    ('1.5 GiB', '5 MiB')
    """
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def _time(seconds: float) -> str:
    """``2 h 05 min``.

    >>> _time(7500), _time(90), _time(0.4)
    ('2 h 05 min', '1 min 30 s', '0.4 s')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"
