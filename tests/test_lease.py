"""Locks on a shared folder: one holder at a time, dead ones replaced, live ones left alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from wsiseg import lease as leases
from wsiseg.errors import LeaseLostError
from wsiseg.lease import Locks, sweep

SHORT = 0.4
OTHER = {"host": "elsewhere", "machine": "x", "pid": 1, "token": "abc", "beat": "0" * 12}


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def write(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**OTHER, **changes}) + "\n")


def taken_over(path: Path) -> None:
    """What another machine does with the lock of one who stands still."""
    write(path.with_name("new"))
    path.with_name("new").replace(path)


def test_one_holder_at_a_time(tmp_path: Path) -> None:
    path, mine, theirs = tmp_path / "a.lock", Locks(), Locks()
    with mine.take(path) or pytest.fail("not taken") as lease:
        lease.check()
        assert theirs.take(path) is None
        who, matter = theirs.holder(path)
        assert (str(os.getpid()) in who, matter) == (True, "")
        assert names(tmp_path) == ["a.lock"]
    assert names(tmp_path) == []
    again = theirs.take(path)
    assert again is not None
    again.release()
    again.release()
    assert names(tmp_path) == []


def test_what_a_lock_is_held_for_is_told_to_others(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    with Locks().take(path, "slide 1") or pytest.fail("not taken") as lease:
        lease._renew()
        assert Locks().holder(path)[1] == "slide 1"
    write(path)
    assert Locks().holder(path) == ("process 1 on elsewhere", "")


def test_a_live_lock_is_respected_however_long(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    with Locks(lease_s=SHORT).take(path) or pytest.fail("not taken"):
        before = path.read_bytes()
        began = time.monotonic()
        assert Locks(lease_s=SHORT).settle(path) is None
        assert time.monotonic() - began < 5
        assert len(path.read_bytes()) == len(before) != 0
        assert path.read_bytes() != before, "the heart beats"


@pytest.mark.parametrize("text", [json.dumps(OTHER), "", "{", "[1]", '{"token": "../x"}'])
def test_a_lock_that_does_not_change_is_taken_over_after_a_lease(tmp_path: Path, text: str) -> None:
    path, locks = tmp_path / "a.lock", Locks(lease_s=SHORT)
    path.write_text(text)
    os.utime(path, (0, 0))  # the clocks of others say nothing
    began = time.monotonic()
    assert locks.take(path) is None
    lease = locks.settle(path)
    assert lease is not None
    assert time.monotonic() - began >= SHORT
    lease.check()
    lease.release()
    assert names(tmp_path) == []


def test_a_dead_process_of_this_machine_is_replaced_at_once(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    code = (
        "import os, sys, pathlib\n"
        "from wsiseg.lease import Locks\n"
        "held = Locks().take(pathlib.Path(sys.argv[1]))\n"
        "os._exit(0 if held else 1)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=True)
    assert names(tmp_path) == ["a.lock"]
    lease = Locks().take(path)
    assert lease is not None
    lease.release()
    assert names(tmp_path) == []


def test_a_process_number_of_another_machine_says_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    for changes in ({"pid": 2**22 + 7}, {"pid": "x"}, {"pid": -1}, {"pid": 10**40}):
        write(path, **changes)
        assert Locks().take(path) is None
    write(path, host=leases.socket.gethostname(), machine=leases._machine(), pid=os.getpid())
    assert Locks().take(path) is not None, "an earlier process had our number"


def test_of_many_takers_one_wins(tmp_path: Path) -> None:
    for round_ in range(20):
        path = tmp_path / f"{round_}.lock"
        write(path, host=leases.socket.gethostname(), machine=leases._machine(), pid=2**22 + 7)
        start, won = threading.Barrier(6), []

        def run(path: Path = path, start: threading.Barrier = start, won: Any = won) -> None:
            start.wait()
            won.append(Locks().take(path))

        threads = [threading.Thread(target=run) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        held = [lease for lease in won if lease is not None]
        assert len(held) <= 1
        for lease in held or [Locks().wait(path)]:
            lease.check()
            lease.release()
    assert names(tmp_path) == []


def test_a_taker_who_dies_before_the_rename_is_helped(tmp_path: Path) -> None:
    path, locks = tmp_path / "a.lock", Locks(lease_s=SHORT)
    write(path)
    write(tmp_path / ".a.lock.abc", token="def")
    lease = None
    deadline = time.monotonic() + 20
    while lease is None and time.monotonic() < deadline:
        lease = locks.settle(path)
    assert lease is not None
    lease.release()
    assert names(tmp_path) == []


def test_a_holder_who_dies_while_he_releases_is_replaced_at_once(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    dead = {"host": leases.socket.gethostname(), "machine": leases._machine(), "pid": 2**22 + 7}
    write(path, **dead)
    write(tmp_path / ".a.lock.abc", token="def", **dead)
    lease = Locks().take(path)
    assert lease is not None
    lease.release()
    assert names(tmp_path) == []


def test_who_was_halted_loses_the_lock_and_harms_no_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.lock"
    halted = Locks(lease_s=SHORT).take(path)
    assert halted is not None
    halted._end.set()  # its thread stands still
    halted._thread.join()
    locks = Locks(lease_s=SHORT)
    taker = locks.settle(path)
    assert taker is not None
    text = path.read_bytes()
    with pytest.raises(LeaseLostError, match=r"took over while this one stood still$"):
        halted.check()
    halted._end.clear()
    halted.release()
    assert json.loads(path.read_bytes())["token"] == json.loads(text)["token"]
    taker.check()
    taker.release()
    assert names(tmp_path) == []


@pytest.mark.parametrize("days", [-1, 1, -20000])
def test_a_clock_that_is_set_does_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, days: int
) -> None:
    path, dead, real = tmp_path / "a.lock", tmp_path / "dead.lock", time.time
    write(dead)
    locks, began = Locks(lease_s=SHORT), time.monotonic()
    with Locks(lease_s=SHORT).take(path) or pytest.fail("not taken") as lease:
        assert locks.take(path) is None
        assert locks.take(dead) is None
        monkeypatch.setattr(time, "time", lambda: real() + days * 86400)
        monkeypatch.setattr(time, "time_ns", lambda: int((real() + days * 86400) * 1e9))
        for file in (path, dead):
            os.utime(file, (max(0, time.time()), max(0, time.time())))
        assert locks.take(dead) is None, "not before its time"
        assert locks.settle(path) is None, "a live one is not stolen"
        lease.check()
        taken = locks.settle(dead)
        assert taken is not None, "a dead one is not kept"
        assert SHORT <= time.monotonic() - began < 10
        taken.release()
    assert names(tmp_path) == []


def test_after_a_suspension_the_lock_is_looked_at_before_anything_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, awake = tmp_path / "a.lock", leases._awake
    halted = Locks().take(path)
    assert halted is not None
    taken_over(path)
    halted.check()
    monkeypatch.setattr(leases, "_awake", lambda: awake() + 3600)
    with pytest.raises(LeaseLostError):
        halted.check()
    halted.release()
    assert path.exists()


def test_a_lock_that_was_lost_is_known_on_a_full_disk_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> int:
        raise OSError(28, "No space left on device")

    halted = Locks().take(tmp_path / "a.lock")
    assert halted is not None
    taken_over(tmp_path / "a.lock")
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        halted._renew()
        with pytest.raises(LeaseLostError):
            halted.check()
    halted.release()


def test_a_lock_that_cannot_be_removed_hides_no_other_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def closed(*args: object, **more: object) -> None:
        raise PermissionError(13, "Permission denied")

    def fail() -> None:
        with Locks().take(tmp_path / "a.lock") or pytest.fail("not taken"):
            raise ValueError("what matters")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", closed)
        with pytest.raises(ValueError, match="what matters"):
            fail()
    lease = Locks(lease_s=SHORT).settle(tmp_path / "a.lock")
    assert lease is not None, "this process does not hold it any more"
    lease.release()


def test_leftovers_are_swept_but_not_claims_in_use(tmp_path: Path) -> None:
    used, old = f".a.lock.{'a' * 16}", f".a.lock.{'0' * 16}"
    write(tmp_path / "a.lock", token="a" * 16)
    for name in (used, old, ".a.lock.empty", f".gone.lock.{'a' * 16}"):
        write(tmp_path / name)
    sweep(tmp_path)
    assert names(tmp_path) == [used, "a.lock"]


@pytest.mark.parametrize("closed", ["unlink", "read_bytes"])
def test_what_is_no_claim_and_what_is_another_users_is_not_swept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, closed: str
) -> None:
    theirs, plain = f".b.lock.{'1' * 16}", getattr(Path, closed)
    kept = [".a.lock.b.geojson.01234567.part", ".yarn.lock.bak", theirs, "b.lock"]
    folders = [".a.lock.b.canvas.gone", f".d.lock.{'2' * 16}"]
    for name in (*kept, f".c.lock.{'0' * 16}"):
        write(tmp_path / name)
    for name in folders:
        (tmp_path / name).mkdir()

    def act(path: Path, **more: Any) -> Any:
        if path.name in (theirs, "b.lock"):
            raise PermissionError(13, "Permission denied")
        return plain(path, **more)

    monkeypatch.setattr(Path, closed, act)
    sweep(tmp_path)
    assert names(tmp_path) == sorted(kept + folders)


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        Locks().take(tmp_path / "gone" / "a.lock")
