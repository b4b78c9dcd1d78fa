"""Is this copy of an SAE whole? Everything that can be said without the model it belongs to.

A copy is checked against its recorded checksums (those of the Hub's cache, or a ``SHA256SUMS`` beside it), read strictly by
its loader, which refuses missing, left over, misshapen and non-finite tensors, and run once on a few rows.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, final

from sae_core.errors import FormatError
from sae_core.format.files import inside
from sae_core.format.pair import read_claim, tensor_problem
from sae_core.format.trouble import trouble
from sae_core.protocols import FileSource

from sae_pretrained.transfer import checksum_problem, states_checksum

if TYPE_CHECKING:
    from sae_core.sae import SAE

__all__ = ["CHECKSUMS_FILE", "RecordingSource", "Verified", "blob_findings", "sha256_of", "try_out", "verify_path"]

CHECKSUMS_FILE = "SHA256SUMS"
_SUMS_LINE = re.compile(r"(?P<sum>[0-9a-fA-F]{64}) [ *](?P<name>\S.*)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Verified:
    """What was checked about an SAE, one sentence each, and the SAE."""

    where: str
    format: str
    sae: SAE[Any]
    findings: list[str] = field(default_factory=list[str])


@final
class RecordingSource:
    """Another source, and the names of the files that were taken from it."""

    def __init__(self, source: FileSource) -> None:
        self._source = source
        self.used: dict[str, Path] = {}

    @property
    def location(self) -> str:
        """That of the other source."""
        return self._source.location

    def files(self) -> Sequence[str]:
        """Those of the other source."""
        return self._source.files()

    def exists(self, name: str) -> bool:
        """As the other source says."""
        return self._source.exists(name)

    def path(self, name: str) -> Path:
        """The other source's path; the name is remembered."""
        self.used[name] = self._source.path(name)
        return self.used[name]

    def read_range(self, name: str, start: int, stop: int) -> bytes:
        """From the other source; the name is remembered, for the file is needed."""
        self.path(name)
        return self._source.read_range(name, start, stop)


def verify_path(path: Path, format: str | None = None) -> Verified:
    """Check a local folder or file. Raises FormatError that says what is wrong and in which file."""
    from sae_core.format.files import LocalFiles
    from sae_core.format.read import find_loader, read_sae

    folder = "" if path.is_dir() else path.name
    home = path if path.is_dir() else path.parent
    source = RecordingSource(LocalFiles(home))
    name = format or find_loader(source, folder)
    source.used.clear()  # asking every loader looks at files that the SAE is not made of
    recorded = _check_sums(home)
    findings = [f"{file}: SHA-256 as recorded in {CHECKSUMS_FILE}" for file in recorded]
    findings += _checksums_in_weights(home)
    sae = cast("SAE[Any]", read_sae(source, folder, format=name))
    if recorded and (missing := [file for file in source.used if file not in recorded]):
        raise FormatError(
            f"{home / CHECKSUMS_FILE}: it has no checksum of {missing[0]}, from which this SAE was read; write it again"
        )
    findings += blob_findings(source.used)
    if not findings:
        findings = ["no checksum is recorded for this copy: whether its numbers are those that were saved is unchecked"]
    return Verified(where=str(path), format=name, sae=sae, findings=[*findings, *try_out(sae, str(path))])


def blob_findings(used: Mapping[str, Path]) -> list[str]:
    """Compare files of the Hub's cache with the checksums that their blobs have as names.

    Raises FormatError for one that is damaged; nothing is said of files that are not in that cache.
    """
    said: list[str] = []
    for name, file in used.items():
        blob = file.resolve()
        if blob.parent.name == "blobs":
            if problem := checksum_problem(blob, blob.name):
                raise FormatError(f"{name}: the cached copy is damaged: {problem}; delete {blob} and download it again")
            known = states_checksum(blob.name)
            said.append(
                f"{name}: checksum as the Hub states it"
                if known
                else f"{name}: unchecked, its server states no checksum"
            )
    return said


def try_out(sae: SAE[Any], where: str) -> list[str]:
    """Encode and decode a few random rows; FormatError if the result is not finite or of the wrong shape."""
    import torch

    parameters = list(sae.state_dict().values())
    count = sum(tensor.numel() for tensor in parameters)
    said = [f"every tensor is used, of the right shape, and finite: {len(parameters)} tensors, {count:,} numbers"]
    said.append("the config is complete, and has no key that is not understood")
    x = torch.randn(4, sae.d_in, generator=torch.Generator().manual_seed(0)).to(sae.device, sae.dtype)
    with torch.no_grad():
        y, codes = sae(x), sae.encode_sparse(x)
    if y.shape != (4, sae.d_out) or not bool(y.isfinite().all()) or not bool(codes.values.isfinite().all()):
        raise FormatError(f"{where}: its tensors are finite, but for ordinary inputs its outputs are not")
    return [*said, "encodes and decodes random rows to finite numbers"]


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with trouble(path, "reading"), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_sums(folder: Path) -> dict[str, str]:
    """Compare the files with SHA256SUMS, as ``sha256sum -c`` does; gives what is recorded there, by name."""
    sums = folder / CHECKSUMS_FILE
    if not sums.is_file():
        return {}
    with trouble(sums, "reading"):
        lines = sums.read_text(encoding="utf-8").splitlines()
    recorded: dict[str, str] = {}
    for number, line in enumerate(filter(str.strip, lines), start=1):
        found = _SUMS_LINE.fullmatch(line)
        if found is None:
            raise FormatError(
                f"{sums}: line {number} is {line!r}, expected a SHA-256, two spaces and the name of a file"
            )
        recorded[inside(found["name"])] = found["sum"].lower()
    for name, wanted in recorded.items():
        file = folder / name
        if not file.is_file():
            raise FormatError(f"{sums}: it names {name!r}, which is not in this folder")
        found_sum = sha256_of(file)
        if found_sum != wanted:
            why = (
                f"written after {CHECKSUMS_FILE}, and whole by the checksums in its weights: {CHECKSUMS_FILE} is of an earlier "
                "save; write it again, or delete it"
                if file.stat().st_mtime > sums.stat().st_mtime and _whole_by_itself(folder)
                else "damaged or changed"
            )
            raise FormatError(f"{file}: {why}: SHA-256 {found_sum} instead of {wanted} ({CHECKSUMS_FILE})")
    return recorded


def _whole_by_itself(folder: Path) -> bool:
    try:
        return bool(_checksums_in_weights(folder))
    except FormatError:
        return False


def _checksums_in_weights(folder: Path) -> list[str]:
    """Compare tensors with the checksums that ``sae.save`` writes beside them. Raises FormatError for damage."""
    weights = folder / "sae_weights.safetensors"
    if not weights.is_file() or (claim := read_claim(weights)) is None:
        return []
    if problem := tensor_problem(weights):
        raise FormatError(f"{weights}: damaged: {problem}")
    return [f"every tensor has the checksum it was saved with: {len(claim.sums)} tensors"]
