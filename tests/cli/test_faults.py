"""What can happen during a run: nothing that is finished is lost, and the same command goes on."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapely
import tifffile
import torch
from click.testing import CliRunner
from openslide import OpenSlideCache
from tiny_run import ENDINGS, Bright, Pixels, Run, names, outputs_of, rows, slides
from torch import Tensor

from wsiseg.canvas import Canvas
from wsiseg.cli import cli
from wsiseg.geometry import Box, Grid
from wsiseg.inference.engine import Engine
from wsiseg.lease import Locks
from wsiseg.models.base import Features
from wsiseg.slides.openslide_backend import OpenSlideBackend
from wsiseg.slides.slide import Slide

NOBODY = 65534
RESULTS = (".mask.ome.tif", ".geojson")


def results(out: Path, *stems: str) -> list[bytes]:
    return [(out / f"{stem}{ending}").read_bytes() for stem in stems for ending in RESULTS]


def check_whole_or_absent(out: Path, *stems: str) -> None:
    """No output under its final name but beside its record, no other leftovers."""
    for stem in stems:
        there = {e for e in ENDINGS if (out / f"{stem}{e}").exists()}
        assert there in (set(), set(ENDINGS)), there
    known = {f"{stem}{e}" for stem in stems for e in (*ENDINGS, ".canvas", ".lock")}
    assert set(names(out)) <= known | {"run.json", "summary.csv", ".run.lock"}


@contextmanager
def after(chunks: int, action: Callable[[], None], patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Do something once when so many chunks are done."""
    plain, left = Canvas.write_chunk, [chunks]

    def write(canvas: Canvas, *values: Any) -> None:
        plain(canvas, *values)
        left[0] -= 1
        if left[0] == 0:
            action()

    with patch.context() as inner:
        inner.setattr(Canvas, "write_chunk", write)
        yield


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 4 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True, check=False)
    except OSError as e:
        pytest.skip(f"no small disk can be mounted here ({e})")
    if done.returncode:
        pytest.skip(f"no small disk can be mounted here ({done.stderr.strip()})")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def leave_free(disk: Path, size: int) -> Path:
    """Fill a disk but for so many bytes."""
    balloon = disk / "balloon"
    free = os.statvfs(disk)
    with balloon.open("wb") as file:
        file.write(bytes(free.f_bavail * free.f_bsize - size))
    return balloon


def test_a_full_disk_at_any_moment(run: Run, tmp_path: Path, small_disk: Path) -> None:
    folder, whole = slides(tmp_path / "in", "a", "b"), tmp_path / "whole"
    assert run(folder, "--out", whole)[0] == 0
    out, expected = small_disk / "out", results(whole, "a", "b")
    met: set[str] = set()
    for kib in (0, 40, 340, 440, 480):
        out.mkdir()
        balloon = leave_free(small_disk, kib << 10)
        code, _, err = run(folder, "--out", out)
        assert code == 1
        check_whole_or_absent(out, "a", "b")
        errors = [line for line in err.splitlines() if line.startswith("wsiseg: error: ")]
        for line in errors[: 2 if (out / "summary.csv").exists() else -1]:
            assert "No space left on device); check free space and permissions" in line
            assert "/a." in line or "/b." in line, "the slide is named"
        met |= {line.split(": ")[2].rpartition("/")[2] for line in errors}
        if (out / "summary.csv").exists():
            found = {stem: row["status"] for stem, row in rows(out).items()}
            assert "failed" in found.values() or "does not tell of this run" in errors[-1]
        done = Canvas.open(out / "a.canvas").done_count if (out / "a.canvas").exists() else 0
        balloon.unlink()
        code, text, err = run(folder, "--out", out)
        assert (code, err) == (0, "")
        assert names(out) == outputs_of("a", "b")
        assert results(out, "a", "b") == expected
        assert {row["status"] for row in rows(out).values()} == {"ok"}
        assert not done or f"a: continuing: {done} of 20 chunks were done" in text
        shutil.rmtree(out)
    assert met >= {"a.lock", "a.canvas", "a.png", "summary.csv"}, "every place was met"


@pytest.fixture
def common_folder() -> Iterator[Path]:
    """A folder of somebody whom permissions bind; for root, that is nobody."""
    folder = Path(tempfile.mkdtemp())
    root = hasattr(os, "geteuid") and os.geteuid() == 0
    if root:
        "".encode("ascii")  # loads the codec now: nobody may not look into a home folder's Python
        os.chown(folder, NOBODY, NOBODY)
        os.seteuid(NOBODY)
    yield folder
    if root:
        os.seteuid(0)
    shutil.rmtree(folder)


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
@pytest.mark.parametrize("closed", ["out", "out/a.canvas/labels/c/3", "in/b.png"])
def test_a_permission_that_is_lost(
    run: Run, common_folder: Path, monkeypatch: pytest.MonkeyPatch, closed: str
) -> None:
    folder, out = slides(common_folder / "in", "a", "b"), common_folder / "out"
    assert run(folder, "--out", common_folder / "whole")[0] == 0
    path = common_folder / closed
    mode = 0o500 if closed.startswith("out") else 0

    def close() -> None:
        if closed.endswith("3"):
            path.mkdir(exist_ok=True)
        path.chmod(mode)

    with after(5, close, monkeypatch):
        code, _, err = run(folder, "--out", out)
    check_whole_or_absent(out, "a", "b")
    assert code == 1
    assert "Permission denied" in err
    assert ("summary.csv: does not tell of this run" in err) == (closed == "out")
    assert (out / "a.json").exists() == (closed == "in/b.png"), "what can be done is done"
    path.chmod(0o700)
    code, text, err = run(folder, "--out", out)
    assert (code, err) == (0, "")
    done = {"out": "a: continuing: 20 of 20", "in/b.png": "a: outputs are complete"}
    assert done.get(closed, "a: continuing: ") in text
    assert names(out) == outputs_of("a", "b")
    assert results(out, "a", "b") == results(common_folder / "whole", "a", "b")


def tiled(path: Path, seed: int) -> None:
    """A slide that is read bit by bit, each tile at the same place in the file."""
    pixels = np.random.default_rng(seed).integers(0, 256, (250, 300, 3), np.uint8)
    tifffile.imwrite(path, pixels, tile=(32, 32), photometric="rgb")


@pytest.mark.parametrize("what", ["truncated", "gone", "replaced", "touched"])
def test_a_slide_that_changes_while_it_is_read(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for seed, stem in enumerate("ab"):
        tiled(folder / f"{stem}.tif", seed)
    slide, kept = folder / "a.tif", (folder / "a.tif").read_bytes()
    assert run(folder, "--out", tmp_path / "whole")[0] == 0
    tiled(tmp_path / "other.tif", 7)
    plain = OpenSlideBackend.__init__

    def forgetful(backend: OpenSlideBackend, path: Path) -> None:
        plain(backend, path)
        backend._slide.set_cache(OpenSlideCache(0))  # as where a slide is larger than its cache

    monkeypatch.setattr(OpenSlideBackend, "__init__", forgetful)

    def change() -> None:
        if what in ("truncated", "gone"):
            os.truncate(slide, 9000)
        if what == "gone":
            slide.unlink()
        elif what == "replaced":
            (tmp_path / "other.tif").replace(slide)
        elif what == "touched":
            os.utime(slide, (1, 1))

    with after(4, change, monkeypatch):
        code, _, err = run(slide, folder / "b.tif", "--out", out, "--workers", 1)
    check_whole_or_absent(out, "a", "b")
    assert (out / "b.json").exists(), "the others are done"
    fails = {
        "truncated": "the file is damaged, copy it again",
        "gone": "the file is gone, put it back and go on",
        "replaced": "was replaced by another slide while it was read",
    }
    assert code == int(what in fails)
    assert fails.get(what, "") in err
    assert (str(slide) in err) == (what in fails)
    assert (out / "a.canvas").exists() == (what in ("truncated", "gone"))
    slide.write_bytes(kept)
    code, text, _ = run(folder, "--out", out)
    assert code == 0
    assert ("a: continuing: " in text) == (what in ("truncated", "gone"))
    assert names(out) == outputs_of("a", "b")
    assert results(out, "a", "b") == results(tmp_path / "whole", "a", "b")


def test_a_canvas_that_cannot_be_read_for_a_while(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out, plain = slides(tmp_path / "in", "a", "b"), tmp_path / "out", Path.read_bytes
    with after(5, lambda: signal.raise_signal(signal.SIGINT), monkeypatch):
        assert run(folder, "--out", out)[0] == 130

    def read(path: Path) -> bytes:
        if path == out / "a.canvas" / "zarr.json":
            raise OSError(errno.ESTALE, "Stale file handle")
        return plain(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", read)
        code, _, err = run(folder, "--out", out)
    assert code == 1
    assert f"wsiseg: error: {out / 'a.canvas'}: cannot be read (Stale file handle)" in err
    assert {k: r["status"] for k, r in rows(out).items()} == {"a": "failed", "b": "ok"}
    code, text, err = run(folder, "--out", out)
    assert (code, err) == (0, "")
    assert "a: continuing: 5 of 20 chunks were done" in text
    assert names(out) == outputs_of("a", "b")


def test_polygons_that_cannot_be_made(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out = slides(tmp_path / "in", "a", "b"), tmp_path / "out"
    plain, left = shapely.coverage_simplify, ["TopologyException: side location\nconflict"]

    def simplify(*args: Any, **more: Any) -> Any:
        if left:
            raise shapely.GEOSException(left.pop())
        return plain(*args, **more)

    monkeypatch.setattr(shapely, "coverage_simplify", simplify)
    code, _, err = run(folder, "--out", out)
    assert code == 1
    check_whole_or_absent(out, "a", "b")
    line = "the polygons cannot be made (GEOSException: TopologyException: side location conflict)"
    assert f"wsiseg: error: {out / 'a.geojson'}: {line}; start" in err
    assert {k: r["status"] for k, r in rows(out).items()} == {"a": "failed", "b": "ok"}
    advised = ["export", str(out / "a.canvas"), "--out", str(tmp_path / "e"), "--only"]
    assert CliRunner().invoke(cli, [*advised, "mask,overview"]).exit_code == 0
    assert names(tmp_path / "e") == ["a.json", "a.mask.ome.tif", "a.overview.png"]
    code, text, err = run(folder, "--out", out, "--tolerance", "2")
    assert (code, err) == (0, "")
    assert "a: continuing: 20 of 20 chunks were done" in text
    assert names(out) == outputs_of("a", "b")


class LibraryError(Exception):
    """One that nobody has heard of."""


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (LibraryError("odd\nfile"), "cannot read the tile at (0, 96) (LibraryError: odd file)"),
        (KeyError("tag"), "cannot read the tile at (0, 96) (KeyError: 'tag')"),
        (MemoryError(), "out of memory; try a lower --memory"),
    ],
)
def test_a_reader_thread_that_raises(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, line: str
) -> None:
    folder, out = slides(tmp_path / "in", "a", "b"), tmp_path / "out"
    assert run(folder, "--out", tmp_path / "whole")[0] == 0
    plain, before = Slide.read, threading.enumerate()

    def read(slide: Slide, box: Box, grid: Grid) -> Any:
        if slide.path.stem == "a" and (box.x, box.y, box.width) == (0, 96, 32):
            raise error
        return plain(slide, box, grid)

    with monkeypatch.context() as patch:
        patch.setattr(Slide, "read", read)
        code, _, err = run(folder, "--out", out)
    assert code == 1
    assert f"wsiseg: error: {folder / 'a.png'}: {line}" in err
    left = [t.name for t in threading.enumerate() if t not in before]
    assert not [name for name in left if name.startswith(("tiles", "lease"))]
    assert {k: r["status"] for k, r in rows(out).items()} == {"a": "failed", "b": "ok"}
    code, text, _ = run(folder, "--out", out)
    assert code == 0
    assert "a: continuing: " in text
    assert results(out, "a", "b") == results(tmp_path / "whole", "a", "b")


def test_values_that_are_no_numbers(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out = slides(tmp_path / "in", "a", "b"), tmp_path / "out"
    assert run(folder, "--out", tmp_path / "whole")[0] == 0

    def forward(model: Any, images: Tensor, places: Any, seed: int) -> Features:
        return (images * float("nan") if places[0] == (160, 128) else images,)

    with monkeypatch.context() as patch:
        patch.setattr(Pixels, "forward", forward)
        code, _, err = run(folder, "--out", out)
    assert code == 1
    for stem in "ab":
        text = f"{folder / stem}.png: model tiny gave values that are no numbers in the window at"
        assert f"{text} (128, 64)" in err
    assert names(out) == ["a.canvas", "b.canvas", "run.json", "summary.csv"]
    assert {r["status"] for r in rows(out).values()} == {"failed"}
    code, text, _ = run(folder, "--out", out)
    assert code == 0
    assert "a: continuing: " in text
    assert "b: continuing: " in text
    assert results(out, "a", "b") == results(tmp_path / "whole", "a", "b")


class Short:
    """A device that computes batches, with the memory for so many tiles and windows."""

    def __init__(self, patch: pytest.MonkeyPatch, *, tiles: int, windows: int) -> None:
        self.tiles, self.windows = tiles, windows
        self.asked: list[int] = []
        patch.setattr(Engine, "batches", True)
        encode, classify = Pixels.forward, Bright.forward

        def tile(model: Any, images: Tensor, places: Any, seed: int) -> Features:
            self.asked.append(len(images))
            if len(images) > self.tiles:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
            return encode(model, images, places, seed)

        def window(model: Any, features: Features) -> Tensor:
            if len(features[0]) > self.windows:
                raise RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")
            return classify(model, features)

        patch.setattr(Pixels, "forward", tile)
        patch.setattr(Bright, "forward", window)


def test_out_of_gpu_memory_the_batch_is_halved_and_that_is_said_once(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out = slides(tmp_path / "in", "a", "b"), tmp_path / "out"
    device = Short(monkeypatch, tiles=99, windows=99)
    batch = ("--batch-size", 36)
    assert run(folder, "--out", tmp_path / "whole", *batch)[0] == 0
    assert max(device.asked) == 36
    device.tiles, device.windows = 10, 1
    stop = after(5, lambda: signal.raise_signal(signal.SIGINT), monkeypatch)
    with warnings.catch_warnings(), stop:
        warnings.simplefilter("always")
        code, _, err = run(folder, "--out", out, *batch)
    assert code == 130
    said = "wsiseg: warning: cpu: out of memory with 36 tiles at a time; going on with half as many"
    assert err.startswith(said)
    assert err.count("out of memory") == 1
    device.asked.clear()
    code, text, _ = run(folder, "--out", out, *batch)
    assert code == 0
    assert "a: continuing: 5 of 20 chunks were done" in text
    assert max(device.asked) == 9, "what fits is remembered from slide to slide"
    assert results(out, "a", "b") == results(tmp_path / "whole", "a", "b")
    timings = json.loads((out / "b.json").read_text())["timings"]
    assert (timings["tiles_at_a_time"], timings["windows_at_a_time"]) == (9, 1)


def test_a_gpu_without_memory_for_a_single_tile(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out = slides(tmp_path / "in", "a"), tmp_path / "out"
    device = Short(monkeypatch, tiles=4, windows=9)

    def shrink() -> None:
        device.tiles = 0

    with warnings.catch_warnings(), after(5, shrink, monkeypatch):
        warnings.simplefilter("always")
        code, _, err = run(folder, "--out", out, "--batch-size", 8)
    assert code == 1
    assert f"{folder / 'a.png'}: cpu: out of memory; end what else uses it and start" in err
    assert (out / "a.canvas").exists()
    device.tiles = 4
    code, text, _ = run(folder, "--out", out, "--batch-size", 8)
    assert code == 0
    assert "a: continuing: " in text


@pytest.mark.parametrize("step", ["load_model", "prepare"])
def test_a_model_that_does_not_fit_is_said_in_one_line(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def full(*args: object, **more: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(f"wsiseg.cli.predict_run.{step}", full)
    code, _, err = run(slides(tmp_path / "in", "a"), "--out", tmp_path / "out")
    assert code == 1
    assert err.startswith("wsiseg: error: cpu: out of memory; end what else uses it")
    assert err.count("\n") == 1


@pytest.mark.parametrize("days", [-1, 1])
def test_a_clock_that_is_set_during_the_run(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, days: int
) -> None:
    folder, out = slides(tmp_path / "in", "a", "b"), tmp_path / "out"
    real, jump = time.time, days * 86400.0

    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime.now(tz) + timedelta(days=days)

    def turn() -> None:
        monkeypatch.setattr(time, "time", lambda: real() + jump)
        monkeypatch.setattr(time, "time_ns", lambda: int((real() + jump) * 1e9))
        monkeypatch.setattr("wsiseg.outputs.run_files.datetime", Clock)
        os.utime(out / "a.lock", (real() + jump, real() + jump))
        assert Locks().take(out / "a.lock") is None, "a live lock stays its holder's"

    with after(5, turn, monkeypatch):
        assert run(folder, "--out", out)[0] == 0
    assert names(out) == outputs_of("a", "b")
    (one,) = json.loads((out / "run.json").read_text())["runs"]
    spent = datetime.fromisoformat(one["ended"]) - datetime.fromisoformat(one["began"])
    assert timedelta(0) <= spent < timedelta(hours=1)
    for stem in "ab":
        assert 0 <= float(rows(out)[stem]["seconds"]) < 3600
        timings = json.loads((out / f"{stem}.json").read_text())["timings"]
        parts = [timings[k] for k in ("read", "encode", "head", "blend")]
        assert min(parts) >= 0
        assert sum(parts) <= timings["total"] + 0.01 < 3600
    code, text, _ = run(folder, "--out", out)
    assert code == 0
    assert text.count("outputs are complete, skipped") == 2
