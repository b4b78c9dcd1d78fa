"""``download`` and ``verify``: an SAE comes whole or not at all, and a copy can be checked again later."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from sae_core.errors import ConfigError
from sae_core.plugins import get_registry
from sae_core.protocols import CatalogueEntry

from sae_pretrained.cli.common import as_json, catalogues_of, print_facts, print_json, size
from sae_pretrained.hub import HubFiles
from sae_pretrained.verify import CHECKSUMS_FILE, Verified, sha256_of, verify_path

if TYPE_CHECKING:
    from sae_core import SAE

__all__ = ["download", "verify"]


def download(args: argparse.Namespace) -> int:
    """Fetch all files of one SAE, load it strictly, and write it out if asked."""
    output = Path(args.output) if args.output else None
    if args.dtype and output is None:
        raise ConfigError("--dtype is the precision of what --output writes; give --output DIR too")
    if output is not None and output.exists() and any(output.iterdir() if output.is_dir() else [output]):
        raise ConfigError(f"{output} exists already; choose another --output, or remove it first")
    entry, verified, used = _fetch(args, args.revision, refresh=args.refresh)
    if output is not None:
        if args.dtype:
            from sae_core.sae import as_dtype

            verified.sae.to(as_dtype(args.dtype))
        verified.sae.save(output)
        names = sorted(path.name for path in output.iterdir())
        sums = "".join(f"{sha256_of(output / name)}  {name}\n" for name in names)
        (output / CHECKSUMS_FILE).write_text(sums, encoding="utf-8")
    sizes = {name: path.stat().st_size for name, path in used.items()}
    if args.json:
        files = [{"name": name, "size": sizes[name], "path": str(path)} for name, path in used.items()]
        print_json({**as_json(entry), **_described(verified), "files": files, "output": args.output})
        return 0
    for name, path in used.items():
        print(f"{name}  {size(sizes[name])}\n  {path}")
    print()
    _print(verified)
    if output is not None:
        print(f"\nwritten to {output}; SAE.load({str(output)!r}) reads it")
    return 0


def verify(args: argparse.Namespace) -> int:
    """Check a local copy, or the cached copy of a published SAE."""
    path = Path(args.target)
    if args.sae_id is not None:
        if args.format is not None:
            raise ConfigError("--format is for local copies; the format of a published SAE is in its catalogue")
        args.release = args.target
        verified = _fetch(args, None, refresh=False)[1]
    else:
        verified = verify_path(path, args.format)
    if args.json:
        print_json(_described(verified))
    else:
        _print(verified)
    return 0


def _fetch(
    args: argparse.Namespace, revision: str | None, *, refresh: bool
) -> tuple[CatalogueEntry, Verified, dict[str, Path]]:
    """One published SAE, its files fetched, checked and loaded; and which files these are."""
    from sae_core.format.read import read_sae
    from sae_core.pretrained import describe_origin, find_entry, format_of

    from sae_pretrained.verify import RecordingSource, blob_findings, try_out

    entry, catalogue = find_entry(args.release, args.sae_id, catalogues_of(args))
    entry = replace(entry, revision=revision or entry.revision)
    source = catalogue.files(entry)
    if refresh:
        if not isinstance(source, HubFiles):
            raise ConfigError(f"--refresh is for repositories on the Hub; {source.location} is none")
        source = HubFiles(entry.repo_id, entry.revision, refresh=True)
    recorded = RecordingSource(source)
    name = format_of(recorded, entry)
    sae = cast("SAE[Any]", read_sae(recorded, entry.path, format=name, overrides=dict(entry.overrides) or None))
    sae.metadata = describe_origin(entry, catalogue, source, sae.metadata)
    findings = [*blob_findings(recorded.used), *try_out(sae, source.location)]
    return entry, Verified(where=source.location, format=name, sae=sae, findings=findings), recorded.used


def _described(verified: Verified) -> dict[str, Any]:
    sae = verified.sae
    return {
        "where": verified.where,
        "format": verified.format,
        "architecture": get_registry().lasting_name("architecture", type(sae)),
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "d_out": sae.d_out,
        "dtype": str(sae.dtype).removeprefix("torch."),
        "findings": verified.findings,
    }


def _print(verified: Verified) -> None:
    described = _described(verified)
    findings = described.pop("findings")
    print_facts(described)
    print()
    for finding in findings:
        print(f"ok  {finding}")
