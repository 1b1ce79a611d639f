"""Locks between processes that share a folder, on any file system. Knows nothing of slides.

A lock is a file, made with O_CREAT | O_EXCL, that says who holds it (host, process, a random token)
and for what, and carries a number that the holder counts up while it lives. No clocks are compared:
who finds a lock watches it by his own monotonic clock, and if it has not changed for the time of a
lease its holder is gone. A holder on this machine whose process has ended is gone at once.

Who ends the tenure of a token T, its holder or one who takes over, must first make the file
`.NAME.T` with O_EXCL and then still find T in the lock: only one can. A taker writes his own lock
into that file and renames it over the old one. If he dies in between, any other does the rename for
him, after watching that file in the same way. The holder counts in the file that he has open, never
by its name, so one who was halted and wakes up cannot touch the lock of another.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from wsiseg.errors import LeaseLostError

LEASE_S = 60.0
_BEATS = 6
"""How many times a lease is renewed before it would end."""
_FLAGS = os.O_RDWR | getattr(os, "O_BINARY", 0)
_HELD: set[str] = set()
"""Tokens of this process."""


class Lease(AbstractContextManager["Lease"]):
    """A lock that is held, renewed by a thread until it is released."""

    def __init__(self, path: Path, number: int, who: Mapping[str, Any], *, lease_s: float) -> None:
        """Take charge of the open lock file `number`, in which `who` stands."""
        self.path = path
        self._file, self._who, self._token, self._lease_s = number, who, who["token"], lease_s
        self._beat, self._lost, self._end = 0, False, threading.Event()
        self._renewed = _awake()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name=f"lease {path.name}", daemon=True)
        self._thread.start()

    def __exit__(self, *error: object) -> None:
        self.release()

    def check(self) -> None:
        """Make sure that the lock is still held, before something that only its holder may do.

        Raises:
            LeaseLostError: it is not.
        """
        if _awake() - self._renewed > self._lease_s / 2:
            self._renew()
        if self._lost:
            raise LeaseLostError(
                f"{self.path}: another process took over while this one stood still"
            )

    def release(self) -> None:
        """End the lease; the lock goes, unless another process has it or it cannot be removed."""
        if self._end.is_set():
            return
        self._end.set()
        self._thread.join()
        os.close(self._file)
        _HELD.discard(self._token)
        claim = _claim_path(self.path, self._token)
        with suppress(OSError):  # another one is at it, or the folder takes no change any more
            os.close(_create(claim, _text(_who(), 0)))
            if _token(_read(self.path)) == self._token:
                self.path.unlink(missing_ok=True)
            claim.unlink(missing_ok=True)

    def _run(self) -> None:
        while not (self._lost or self._end.wait(self._lease_s / _BEATS)):
            self._renew()

    def _renew(self) -> None:
        with self._lock, suppress(OSError):  # a file system that is away is so for the others too
            self._lost = _token(_read(self.path)) != self._token
            self._beat += 1
            os.lseek(self._file, 0, os.SEEK_SET)
            os.write(self._file, _text(self._who, self._beat))
            os.fsync(self._file)
            self._renewed = _awake()


class Locks:
    """Takes locks, and remembers since when those of others have not changed."""

    def __init__(self, *, lease_s: float = LEASE_S) -> None:
        self._lease_s = lease_s
        self._seen: dict[Path, tuple[bytes, float]] = {}
        self._lively: set[Path] = set()

    def take(self, path: Path, matter: str = "") -> Lease | None:
        """The lock at `path`, held for `matter`, if it is free or its holder is known to be gone.

        Raises:
            OSError: the folder cannot be written.
        """
        who = _who(matter)
        _HELD.add(who["token"])  # before it can be read
        lease = None
        try:
            lease = self._take_free(path, who) or self._take_over(path, who)
        finally:
            if lease is None:
                _HELD.discard(who["token"])
        return lease

    def settle(self, path: Path, matter: str = "") -> Lease | None:
        """The lock at `path`, waiting as long as it takes to know whether its holder lives.

        That is at most a lease from the first time that this lock was found taken.

        Raises:
            OSError: the folder cannot be written.
        """
        self._lively.discard(path)
        while True:
            lease = self.take(path, matter)
            if lease is not None or path in self._lively:
                return lease
            time.sleep(min(1.0, self._lease_s / 20))

    def wait(self, path: Path) -> Lease:
        """The lock at `path`, which nobody holds for long.

        Raises:
            OSError: the folder cannot be written.
        """
        while (lease := self.take(path)) is None:
            time.sleep(0.02)
        return lease

    def holder(self, path: Path) -> tuple[str, str]:
        """Who holds the lock at `path`, to be shown, and what for; that is empty if not known."""
        who = _parse(_read(path)) or {"pid": "unknown", "host": "another machine"}
        return f"process {who['pid']} on {who['host']}", str(who.get("matter", ""))

    def _hold(self, path: Path, number: int, who: Mapping[str, Any]) -> Lease | None:
        """The lease of an open lock, if `who` stands in it."""
        os.lseek(number, 0, os.SEEK_SET)
        if {_token(os.read(number, 4096)), _token(_read(path))} != {who["token"]}:
            os.close(number)
            return None
        self._seen.pop(path, None)
        return Lease(path, number, who, lease_s=self._lease_s)

    def _is_gone(self, path: Path, found: bytes) -> bool:
        """Whether the writer of a lock or claim is known not to live any more."""
        now = time.monotonic()
        before, since = self._seen.get(path, (None, now))
        if before != found:
            if before is not None and _token(before) == _token(found):
                self._lively.add(path)
            self._seen[path] = (found, now)
            since = now
        return now - since >= self._lease_s or _has_ended(_parse(found))

    def _take_free(self, path: Path, who: Mapping[str, Any]) -> Lease | None:
        try:
            return self._hold(path, _create(path, _text(who, 0)), who)
        except FileExistsError:
            return None

    def _take_over(self, path: Path, who: Mapping[str, Any]) -> Lease | None:
        """End the tenure of one who is gone and begin one's own."""
        found = _read(path)
        if found is None or not self._is_gone(path, found):
            return None
        claim = _claim_path(path, _token(found))
        try:
            number = _create(claim, _text(who, 0))
        except FileExistsError:
            return self._take_over(path, who) if self._help(path, claim) else None
        os.close(number)  # some systems rename no open file
        if _read(path) == found:
            with suppress(OSError):  # what stands there afterwards tells whether it was done
                claim.replace(path)
        claim.unlink(missing_ok=True)
        try:
            return self._hold(path, os.open(path, _FLAGS), who)
        except FileNotFoundError:
            return None

    def _help(self, path: Path, claim: Path) -> bool:
        """Do the rename of a taker who died before it; whether there was one."""
        text = _read(claim)
        if text is None or not self._is_gone(claim, text):
            return False
        del self._seen[claim]
        if _claim_path(path, _token(_read(path))) != claim:
            claim.unlink(missing_ok=True)
            return True
        with suppress(FileNotFoundError):  # another one did it
            claim.replace(path)
        return True


def sweep(folder: Path) -> None:
    """Remove what processes that were killed while they took or released locks left in a folder."""
    for end in ("[0-9a-f]" * 16, "empty"):
        for claim in folder.glob(f".*.lock.{end}"):
            lock = claim.with_name(claim.stem[1:])
            with suppress(OSError):  # another user's, or a folder
                if _claim_path(lock, _token(_read(lock))) != claim:
                    claim.unlink(missing_ok=True)


def _claim_path(path: Path, token: str | None) -> Path:
    return path.with_name(f".{path.name}.{token or 'empty'}")


def _create(path: Path, text: bytes) -> int:
    """Make a file that must not be there, and keep it open."""
    number = os.open(path, _FLAGS | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        os.write(number, text)
        os.fsync(number)
    except OSError:
        os.close(number)
        path.unlink(missing_ok=True)
        raise
    return number


def _who(matter: str = "") -> dict[str, Any]:
    """Who takes a lock now, with a new token, and what for."""
    host, pid, token = socket.gethostname(), os.getpid(), secrets.token_hex(8)
    return {"host": host, "machine": _machine(), "pid": pid, "token": token, "matter": matter}


def _text(who: Mapping[str, Any], beat: int) -> bytes:
    """What stands in a lock; of the same length for every beat."""
    return (json.dumps({**who, "beat": f"{beat:012d}"}) + "\n").encode()


@cache
def _machine() -> str:
    """What tells this run of this machine, and of its container, from others; "" if unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _awake() -> float:
    """Seconds of a clock that cannot be set, and if there is one, that suspension does not stop."""
    clock = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if clock is None else time.clock_gettime(clock)


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _parse(text: bytes | None) -> dict[str, Any] | None:
    """What stands in a lock; None of one that is not there or not written yet."""
    try:
        who = json.loads(text or b"")
    except ValueError:
        return None
    return who if isinstance(who, dict) and {"host", "machine", "pid", "token"} <= {*who} else None


def _token(text: bytes | None) -> str | None:
    token = str((_parse(text) or {}).get("token", ""))
    return token if token.isalnum() else None


def _has_ended(who: dict[str, Any] | None) -> bool:
    """Whether the process was on this machine and has ended; False where that cannot be told."""
    if who is None or os.name != "posix" or not isinstance(who["pid"], int):
        return False
    if (who["host"], who["machine"]) != (socket.gethostname(), _machine()) or who["pid"] < 1:
        return False
    if who["pid"] == os.getpid():
        return who["token"] not in _HELD
    try:
        os.kill(who["pid"], 0)
    except (OSError, OverflowError) as e:
        return isinstance(e, ProcessLookupError)
    return False
