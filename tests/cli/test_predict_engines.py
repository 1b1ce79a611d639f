"""The engines: workers that are killed in the middle of a slide, and the same bytes at the end."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from wsiseg.canvas import Canvas
from wsiseg.cli import main
from wsiseg.errors import CanvasError
from wsiseg.geometry import Size
from wsiseg.slides.phantom import write_phantom

STEMS = ("a", "b", "c")
ENDINGS = (".geojson", ".json", ".mask.ome.tif", ".overview.png")
OPTIONS = ("--model", "stain-threshold", "--tissue", "none", "--tta", "--min-area", "500")
OPTIONS += ("--device", "cpu")
posix = pytest.mark.skipif(os.name != "posix", reason="needs signals")


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("slides")
    for k, stem in enumerate(STEMS):
        write_phantom(folder / f"{stem}.tif", Size(1300, 300), mpp=0.5, seed=k)
    return folder


@pytest.fixture(scope="module")
def plain(slides: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Outputs of one process."""
    out = tmp_path_factory.mktemp("plain")
    assert alone(slides, out) == 0
    return out


def alone(slides: Path, out: Path) -> int:
    """Exit code of the command in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["wsiseg", "predict", str(slides), "--out", str(out), *OPTIONS])
        with pytest.raises(SystemExit) as stop:
            main()
    return int(stop.value.code or 0)


@contextmanager
def started(slides: Path, out: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    """The command at work, with relative paths."""
    root = slides.parent
    words = ["predict", slides.name, "--out", str(out.relative_to(root)), *OPTIONS, *options]
    process = subprocess.Popen(
        [sys.executable, "-m", "wsiseg.cli", *words],
        cwd=root,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def at_work(out: Path, process: subprocess.Popen[str]) -> tuple[str, int]:
    """A slide of which some chunks are done and some are not, and its worker, which is halted."""
    while process.poll() is None:
        for lock in out.glob("[!.]*.lock"):
            try:
                number = json.loads(lock.read_text())["pid"]
                if not is_halfway(out / f"{lock.stem}.canvas"):
                    continue
                os.kill(number, signal.SIGSTOP)
            except (OSError, ValueError, CanvasError):
                continue
            if is_halfway(out / f"{lock.stem}.canvas"):
                return lock.stem, number
            os.kill(number, signal.SIGCONT)
        time.sleep(0.002)
    pytest.fail(f"ended before a worker could be killed: {process.communicate()}")


def is_halfway(path: Path) -> bool:
    if not path.is_dir():
        return False
    canvas = Canvas.open(path)
    return 0 < canvas.done_count < len(list(canvas.chunks()))


def check(out: Path, plain: Path) -> None:
    """Every slide is done, and as by one process."""
    names = sorted(["run.json", "summary.csv", *(s + e for s in STEMS for e in ENDINGS)])
    assert sorted(p.name for p in out.iterdir()) == names
    for stem in STEMS:
        for ending in (".mask.ome.tif", ".geojson"):
            name = stem + ending
            assert (out / name).read_bytes() == (plain / name).read_bytes(), name
    with (out / "summary.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["stem"], row["status"]) for row in rows] == [(stem, "ok") for stem in STEMS]
    (run,) = json.loads((out / "run.json").read_text())["runs"]
    assert run["counts"] == {"ok": len(STEMS)}
    assert run["model"]["name"] == "stain-threshold"
    assert run["ended"]


@posix
@pytest.mark.parametrize("engine", ["local", "ray"])
def test_a_killed_worker_loses_nothing(
    engine: str, slides: Path, plain: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with started(slides, out, "--engine", engine, "--processes", "2") as process:
        stem, number = at_work(out, process)
        if engine == "ray" and sys.platform == "linux":
            assert listening(process.pid) == {"127.0.0.1"}
        os.kill(number, signal.SIGKILL)
        text, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert f"wsiseg: warning: {slides / stem}.tif: its worker " in err
    assert "begun again, try 2 of 3" in err
    assert err.count("its worker ") == 1
    assert "wsiseg: 3 of 3 slides done, in " in err
    assert "Traceback" not in text + err
    assert "raylet" not in text + err
    assert f"{stem}: continuing: " in text
    assert sorted(line[0] for line in text.splitlines() if "tiles/s" in line) == list(STEMS)
    check(out, plain)


@posix
def test_stopping_ends_all_workers_and_frees_their_slides(slides: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with started(slides, out, "--processes", "2") as process:
        _, number = at_work(out, process)
        os.kill(number, signal.SIGCONT)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.splitlines()[-1] == "wsiseg: stopped"
    assert "Traceback" not in err
    with pytest.raises(ProcessLookupError):
        os.kill(number, 0)
    assert not list(out.glob("*.lock"))
    assert list(out.glob("*.canvas")), "what was done of them is kept"


def listening(root: int) -> set[str]:
    """Addresses on which a process and those that it started listen."""
    inodes = set()
    for folder in (Path("/proc") / str(n) for n in family(root)):
        for link in folder.glob("fd/*"):
            try:
                target = os.readlink(link)  # noqa: PTH115
            except OSError:
                continue
            if target.startswith("socket:["):
                inodes.add(target[8:-1])
    found = set()
    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
            cells = line.split()
            if cells[3] == "0A" and cells[9] in inodes:
                found.add(address(cells[1].partition(":")[0]))
    return found


def address(text: str) -> str:
    """An IPv4 address from its form in /proc/net; as it is where it is none."""
    if len(text) == 32 and not text.startswith("0000000000000000FFFF0000"):
        return text
    return ".".join(str(b) for b in reversed(bytes.fromhex(text[-8:])))


def family(root: int) -> set[int]:
    """A process and all below it."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found = {root}
    while more := {n for n, parent in parents.items() if parent in found} - found:
        found |= more
    return found
