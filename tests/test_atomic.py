"""Files appear whole: on the disk before they have their names."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from wsiseg import atomic
from wsiseg.atomic import staged
from wsiseg.errors import LeaseLostError, OutputError

POSIX = pytest.mark.skipif(os.name != "posix", reason="folders are opened as POSIX does")


def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is written through, removed and renamed from here on."""
    found: list[str] = []
    sync, replace, unlink = os.fsync, Path.replace, Path.unlink

    def synced(number: int) -> None:
        found.append(f"sync {Path(f'/proc/self/fd/{number}').readlink().name}")
        sync(number)

    def replaced(path: Path, target: Path) -> Path:
        found.append(f"name {target.name}")
        return replace(path, target)

    def unlinked(path: Path, missing_ok: bool = False) -> None:
        if path.exists():
            found.append(f"remove {path.name}")
        unlink(path, missing_ok=missing_ok)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", replaced)
    monkeypatch.setattr(Path, "unlink", unlinked)
    return found


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="names open files by /proc")
def test_content_is_on_the_disk_before_names_and_names_before_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "old").write_text("old")
    found = events(monkeypatch)
    with staged(folder / "a", folder / "b", stale=[folder / "old", folder / "none"]) as parts:
        for part in parts:
            part.write_text("new")
    whole = ["sync .a.part", "sync .b.part", "remove old", "name a", "name b", "sync out"]
    assert found == whole
    found.clear()
    with staged(folder / "a", durable=False) as (part,):
        part.write_text("cached")
    assert found == ["name a"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_disk_that_says_late_that_it_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def late(number: int) -> None:
        raise OSError(code, os.strerror(code))

    (tmp_path / "a").write_text("before")
    (tmp_path / "stale").write_text("before")
    monkeypatch.setattr(os, "fsync", late)
    with (
        pytest.raises(OutputError, match=os.strerror(code)),
        staged(tmp_path / "a", stale=[tmp_path / "stale"]) as (part,),
    ):
        part.write_text("after")
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == dict.fromkeys(
        ("a", "stale"), "before"
    )


@POSIX
def test_folders_that_cannot_be_written_through_are_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = os.fsync

    def files_only(number: int) -> None:
        if os.fstat(number).st_mode & 0o040000:
            raise OSError(errno.EINVAL, "Invalid argument")
        plain(number)

    monkeypatch.setattr(os, "fsync", files_only)
    with staged(tmp_path / "a") as (part,):
        part.write_text("whole")
    atomic.sync_tree(tmp_path)
    assert (tmp_path / "a").read_text() == "whole"


def test_who_lost_the_lock_gives_no_file_its_name(tmp_path: Path) -> None:
    def lost() -> None:
        raise LeaseLostError("taken over")

    (tmp_path / "a[1]").write_text("before")
    (tmp_path / "stale").write_text("before")
    for kept in (".a[1].part", ".a[1].b.12345678.part", ".a1.12345678.part"):
        (tmp_path / kept).write_text("of others")
    for left in (".a[1].12345678.part", "..a[1].12345678.part.part"):
        (tmp_path / left).write_text("of an earlier holder")
    before = {p.name for p in tmp_path.iterdir() if not p.read_text().startswith("of an earlier")}
    parts: list[Path] = []

    def write(check: Callable[[], None]) -> None:
        with staged(tmp_path / "a[1]", stale=[tmp_path / "stale"], check=check) as (part,):
            parts.append(part)
            assert {p.name for p in tmp_path.iterdir()} == before
            part.write_text("after")

    with pytest.raises(LeaseLostError):
        write(lost)
    assert {p.name for p in tmp_path.iterdir()} == before
    assert (tmp_path / "a[1]").read_text() == "before"
    write(lambda: None)
    assert len(set(parts)) == 2
    assert not (tmp_path / "stale").exists()
    assert (tmp_path / "a[1]").read_text() == "after"
