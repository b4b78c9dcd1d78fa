"""`Watch`: every rank says once a second that it lives and how far it is, so that one that died or hangs can be named.

The messages go through the store of `torch.distributed`, by a thread of its own. A rank that has not been heard for a while is
gone (killed, frozen, its machine lost). One that lives, but does not come to an exchange for which this rank has been waiting
for `timeout` seconds, hangs. Whoever finds out first leaves the finding in the store, so that all name the same rank. The
lowest rank that is left prints it. Where the main thread is stuck in a collective, the thread ends the process.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Final, final

if TYPE_CHECKING:
    from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]

__all__ = ["Watch"]

_EVERY: Final = 1.0  # seconds between two signs of life
_SILENT: Final = 20.0  # seconds without one after which a rank is gone, or the timeout where that is less
_GRACE: Final = 15.0  # seconds that the main thread has to end by itself


@final
class Watch:
    """Signs of life of rank `rank` of `size`, through `store`, which nobody else uses."""

    def __init__(self, store: Store, rank: int, size: int, timeout: float = 50.0) -> None:
        self._store, self.rank, self.size = store, rank, size
        self.timeout = timeout
        self.expected = False  # whether ranks are in training steps, where nothing takes long
        self._done = 0  # exchanges
        self._since: float | None = None  # when this rank began to wait in one
        self._beat = 0
        self._heard: dict[int, tuple[str, float]] = {}
        self._who = f"{socket.gethostname()} process {os.getpid()}"
        self._found: str | None = None
        self._first_is_gone = False  # and does not say what happened
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._watch, name="watch over ranks", daemon=True)
        self._sign()
        self._thread.start()

    @property
    def silent(self) -> float:
        """Seconds without a sign of life after which a rank is gone."""
        return min(_SILENT, self.timeout)

    def enter(self) -> None:
        """This rank waits for the others from now on."""
        self._done += 1
        self._since = time.monotonic()

    def leave(self) -> None:
        """It waits no longer."""
        self._since = None

    def verdict(self, fallback: str) -> str:
        """After an exchange failed: which rank is the cause, as soon as that is known."""
        deadline = time.monotonic() + self.silent + 5 * _EVERY
        while self._found is None and time.monotonic() < deadline:
            time.sleep(0.1)
            self._look()
        return self._found or f"rank {self.rank}: an exchange with the other ranks failed: {fallback}"

    def post(self, message: str) -> None:
        """Leave for the others why this rank failed, unless there is an earlier finding."""
        with suppress(RuntimeError), self._lock:
            self._store.compare_set("finding", "", f"{self.rank}\nsaid\n{message}")

    def end(self, *, wait_for_first: bool = False) -> None:
        """Stop. With `wait_for_first`, not before the first rank has had the time to say what happened.

        The first rank may hold the store, and waits a little for those that still look into it.
        """
        if wait_for_first and self.rank:
            self._wait_for(["ended"], _GRACE)
            time.sleep(0.2)
        self._ended.set()
        self._thread.join(timeout=5)
        with suppress(RuntimeError):
            self._store.set("ended" if self.rank == 0 else f"left {self.rank}", "1")
        if self.rank == 0:
            self._wait_for([f"left {rank}" for rank in range(1, self.size)], 3.0)

    def _wait_for(self, keys: list[str], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        with suppress(RuntimeError):
            while time.monotonic() < deadline:
                with self._lock:
                    if self._store.check(keys):
                        return
                time.sleep(0.1)

    # The thread.

    def _watch(self) -> None:
        ends_at: float | None = None
        awake = time.monotonic()
        while not self._ended.wait(_EVERY):
            asleep, awake = time.monotonic() - awake, time.monotonic()
            if (
                asleep > self.silent / 4 + _EVERY
            ):  # stopped and continued, as the others probably were: everybody's time starts anew
                self._heard.clear()
                self._since = None if self._since is None else awake
            self._sign()
            self._look()
            if self._found is not None:
                ends_at = ends_at or time.monotonic() + (_GRACE if self._since is None else _EVERY * 3)
                if time.monotonic() > ends_at:
                    self._give_up(self._found)

    def _sign(self) -> None:
        self._beat += 1
        with suppress(RuntimeError), self._lock:
            self._store.set(f"rank {self.rank}", f"{self._beat}\n{self._done}\n{int(self.expected)}\n{self._who}")

    def _look(self) -> None:
        """Find out who has gone or hangs, if anybody; what others have found counts first."""
        if self._found is not None:
            return
        try:
            with self._lock:
                if self._store.check(["finding"]):
                    rank, how, message = self._store.get("finding").decode().split("\n", 2)
                    self._first_is_gone = rank == "0" and how == "found"
                    self._found = message if int(rank) == self.rank else f"rank {rank}: {message}"
                    return
                others = [
                    (rank, self._store.get(f"rank {rank}").decode())
                    for rank in range(self.size)
                    if rank != self.rank and self._store.check([f"rank {rank}"])
                ]
        except RuntimeError:  # the store has gone, and where there is no agent the first rank held it
            self._first_is_gone = True
            self._found = "rank 0 has gone, and with it the store through which ranks find each other"
            return
        now = time.monotonic()
        waited = 0.0 if self._since is None or not self.expected else now - self._since
        for rank, sign in others:
            beat, done, expected, who = sign.split("\n")
            before, heard = self._heard.get(rank, ("", now))
            if beat != before:
                self._heard[rank], heard = (beat, now), now
            if now - heard > self.silent:
                self._accuse(rank, f"has ended or is frozen: no sign of life for {now - heard:.0f} seconds ({who})")
            elif (
                waited > self.timeout
                and int(done) < self._done
                and expected == "1"
                and now - heard < self.silent / 2  # one that has been silent for longer is soon known to be gone
            ):
                self._accuse(rank, f"hangs: the others have waited for it for {waited:.0f} seconds ({who})")

    def _accuse(self, rank: int, what: str) -> None:
        with suppress(RuntimeError), self._lock:
            self._store.compare_set("finding", "", f"{rank}\nfound\n{what}")

    def _give_up(self, found: str) -> None:
        if self.rank == 0 or (self._first_is_gone and self.rank == 1):
            sys.stderr.write(f"sae-core: error: {found}\n")
            sys.stderr.flush()
        os._exit(1)
