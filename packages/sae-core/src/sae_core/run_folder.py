"""The folder of one run: who may write into it, and what of an older run stays until a new one has ended well.

A run locks its folder, and the lock goes with the process: a killed run leaves a file that says who it was, not a lock. A run
that replaces an older one is written into ``OUTPUT/.new`` and takes its place at the very end, so that the folder always
holds one run, whole, and never the parts of two. The exchange can be interrupted anywhere: whoever locks the folder next
finishes it.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Generator, Iterable
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, final

from sae_core.durable import sync_folder
from sae_core.errors import FormatError
from sae_core.format.files import CONFIG_FILE, TRAINING_FILE, WEIGHTS_FILE
from sae_core.format.trouble import explained

__all__ = [
    "CHECKPOINTS",
    "COMPARISON",
    "INTERRUPTED",
    "LOG",
    "MEMBERS",
    "NEW",
    "REPORT",
    "RUN_FILE",
    "RunFolder",
    "locked",
]

RUN_FILE: Final = "run.yaml"
LOG: Final = "log.jsonl"
CHECKPOINTS: Final = "checkpoints"
INTERRUPTED: Final = "interrupted"
MEMBERS: Final = "saes"
COMPARISON: Final = "comparison.json"
REPORT: Final = "report.html"
NEW: Final = ".new"
_OLD, _MOVED, _LOCK = ".old", ".old.moved", ".lock"
_FINISHED = (CONFIG_FILE, COMPARISON)  # written last, by runs of one dictionary and of several
_PARTS = (
    *_FINISHED, WEIGHTS_FILE, TRAINING_FILE, RUN_FILE, LOG, REPORT, "tensorboard", "wandb", INTERRUPTED, MEMBERS, CHECKPOINTS,
)  # fmt: skip
"""Everything a run writes; nothing else in the folder is ever touched. What marks a finished run goes first."""


@final
class RunFolder:
    """A locked output folder. `root` is what the user named, `work` where the run is written."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._finish_exchange()
        self.work = root

    @property
    def finished(self) -> bool:
        """Whether `work` holds a run that ended well."""
        return any((self.work / name).exists() for name in _FINISHED)

    @property
    def has_checkpoints(self) -> bool:
        """Whether `work` holds a run that can go on."""
        folder = self.work / CHECKPOINTS
        return folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir())

    def of(self, name: str) -> Path:
        """Where the dictionary `name` of the run is written."""
        return self.work / MEMBERS / name if name else self.work

    def for_new_run(self, *, overwrite: bool) -> None:
        """Choose where a new run is written. Raises FormatError where there is one worth keeping, unless `overwrite`."""
        if self.finished and not overwrite:
            raise FormatError(f"{self.root}: already holds an SAE; choose another output or pass --overwrite")
        if self.has_checkpoints and not overwrite:
            raise FormatError(
                f"{self.root}: holds a run that has not ended; go on with --resume, start anew with --overwrite, or choose "
                "another output"
            )
        if self.finished or self.has_checkpoints:
            self.work = self.root / NEW

    def clear(self) -> None:
        """Remove what earlier attempts left where the new run is written."""
        shutil.rmtree(self.root / NEW, ignore_errors=True)
        _remove_parts(self.work)
        self.work.mkdir(exist_ok=True)

    def go_on(self) -> None:
        """Work on what was interrupted: the run that was to replace an older one, if there is such a one."""
        if (self.root / NEW / RUN_FILE).exists():
            self.work = self.root / NEW

    def reopen(self, members: Iterable[str]) -> None:
        """Make a finished run unfinished, as it is going to be trained further; its checkpoints hold what it was."""
        (self.work / COMPARISON).unlink(missing_ok=True)
        for member in members:
            for name in (CONFIG_FILE, WEIGHTS_FILE, TRAINING_FILE):
                (self.of(member) / name).unlink(missing_ok=True)

    def end(self) -> None:
        """The run has ended well: what only interrupted runs leave goes, and a run beside an older one takes its place."""
        shutil.rmtree(self.work / INTERRUPTED, ignore_errors=True)
        for member in (self.work / MEMBERS).glob(f"*/{INTERRUPTED}"):
            shutil.rmtree(member, ignore_errors=True)
        for name in _PARTS:  # files that a killed process had not yet renamed into place
            for leftover in (*self.work.glob(f".{name}.*"), *self.work.glob(f"{MEMBERS}/*/.{name}.*")):
                leftover.unlink()
        if self.work == self.root:
            return
        (self.root / _OLD).mkdir()  # from here on the exchange will be finished
        self._finish_exchange()
        self.work = self.root

    def _finish_exchange(self) -> None:
        """Move the old run away, then the new one up. The names of two folders tell how far it is."""
        new, old, moved = self.root / NEW, self.root / _OLD, self.root / _MOVED
        if old.exists():
            for name in _PARTS:
                if (self.root / name).exists():
                    (self.root / name).rename(old / name)
            sync_folder(self.root)
            old.rename(moved)
        if moved.exists():
            for name in reversed(_PARTS):
                if (new / name).exists():
                    (new / name).rename(self.root / name)
            sync_folder(self.root)
            shutil.rmtree(new, ignore_errors=True)
            shutil.rmtree(moved)


@contextmanager
def locked(root: Path) -> Generator[RunFolder]:
    """The folder `root`, made if need be and locked against other runs.

    Raises FormatError when it cannot be written to, or when another run has it; the message names host and process.
    """
    try:
        existed = root.exists()
        root.mkdir(parents=True, exist_ok=True)
        handle = _lock(root / _LOCK)
    except FormatError:  # another run has it
        raise
    except (OSError, ValueError) as error:
        raise FormatError(f"{root}: cannot be the output of a run: {explained(error, 'writing')}") from None
    try:
        yield RunFolder(root)
    finally:
        with suppress(OSError):
            (root / _LOCK).unlink()
        os.close(handle)
        if not existed:
            with suppress(OSError):  # not empty
                root.rmdir()


def _lock(path: Path) -> int:
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if not _taken(handle, path):
                break
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # the holder unlinked the file while we opened it
    os.ftruncate(handle, 0)
    os.write(handle, json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode() + b"\n")
    return handle


def _taken(handle: int, path: Path) -> bool:
    """Take the lock. False when it is ours, True when the file has gone meanwhile; FormatError when a run holds it."""
    try:
        import fcntl  # not on every platform

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held = False
    except BlockingIOError:
        held = True
    except (ImportError, OSError):  # a file system without locks: go by whether the process is alive
        held = _alive(_holder(handle))
    if held:
        holder = _holder(handle)
        raise FormatError(
            f"{path.parent}: a run of process {holder.get('pid', '?')} on host {holder.get('host', '?')} is writing there; "
            "wait for it, stop it, or choose another output"
        )
    try:
        return os.stat(path).st_ino != os.fstat(handle).st_ino
    except FileNotFoundError:
        return True


def _holder(handle: int) -> dict[str, object]:
    os.lseek(handle, 0, os.SEEK_SET)
    try:
        found = json.loads(os.read(handle, 4096) or b"{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _alive(holder: dict[str, object]) -> bool:
    pid = holder.get("pid")
    if not isinstance(pid, int) or pid == os.getpid():
        return False
    if holder.get("host") != socket.gethostname():
        return True  # nobody here can know
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _remove_parts(folder: Path) -> None:
    for name in _PARTS:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
