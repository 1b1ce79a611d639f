"""Interrupted and continued: the same bits, nothing computed twice, nothing foreign continued."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from inference_fakes import MemorySlide, MemoryTissue, noise_model, random_slide

from wsiseg.canvas import Canvas
from wsiseg.errors import CanvasError, LeaseLostError, ModelError, SlideReadError
from wsiseg.geometry import Box, Grid, Size
from wsiseg.inference.engine import Engine, Stopwatch, WindowFeatures
from wsiseg.inference.features import groups, schedule
from wsiseg.inference.job import PredictOptions, prepare
from wsiseg.inference.plan import plan
from wsiseg.inference.predict import begin, carry_out
from wsiseg.inference.resume import plan_left, schedule_left, windows_left
from wsiseg.models.segmenter import Segmenter

OPTIONS = PredictOptions(overlap_px=32, batch_size=4, workers=2, resume=True)
CHUNK = 64


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wsiseg.inference.predict.CHUNK_PX", CHUNK)


def planes(canvas: Canvas) -> list[bytes]:
    box = canvas.grid.box
    return [canvas.labels(box).tobytes(), canvas.confidence(box).tobytes()]


def stop_at(tiles: int, error: BaseException) -> Callable[[int, int], None]:
    def progress(done: int, total: int) -> None:
        if done >= tiles:
            raise error

    return progress


def interrupt(
    path: Path, tiles: int = 60, *, slide: MemorySlide | None = None, **changes: Any
) -> MemorySlide:
    """Leave a canvas that is done in part."""
    slide = slide or random_slide(300, 250)
    work = begin(slide, noise_model(), path, options=replace(OPTIONS, **changes))
    with pytest.raises(KeyboardInterrupt):
        carry_out(work, stop_at(tiles, KeyboardInterrupt()))
    return slide


@pytest.mark.parametrize("memory", [1.0, 0.01])
def test_the_same_bits_and_nothing_twice(tmp_path: Path, memory: float) -> None:
    options = replace(OPTIONS, memory_gib=memory)
    slide, model = random_slide(300, 250), noise_model()
    whole = carry_out(begin(slide, model, tmp_path / "whole", options=options))
    for tiles, fewest in ((40, 0), (90, 1), (110, 5)):
        interrupt(tmp_path / "c", tiles, memory_gib=memory)
        left = Canvas.open(tmp_path / "c")
        assert 0 < left.done_count < 20
        again = noise_model()
        work = begin(slide, again, tmp_path / "c", options=options)
        assert work.note == f"continuing: {left.done_count} of 20 chunks were done"
        canvas = carry_out(work)
        assert planes(canvas) == planes(whole)
        layout = prepare(slide.grid(0.5), model, options=options).layout
        needed = {
            place
            for place in layout.places(0, len(layout.windows))
            if not all(left.is_done(*key) for key in layout.window_chunks(place, CHUNK))
        }
        timings = canvas.record["timings"]
        assert timings["windows"] == len(needed) <= len(layout.windows) - fewest
        assert timings["chunks_continued"] == left.done_count
        seen: Any = again.extractor.seen
        windows = windows_left(layout, left, group=1)
        assert set(layout.places(0, len(layout.windows))) >= needed
        wanted = {layout.tile_place(int(t)) for t in layout.window_tiles[windows].ravel()}
        assert sorted(set(seen)) == sorted(wanted)
        assert len(seen) == len(wanted)
        canvas.remove()


def test_a_complete_canvas_needs_nothing(tmp_path: Path) -> None:
    slide, model = random_slide(300, 250), noise_model()
    whole = planes(carry_out(begin(slide, model, tmp_path / "c", options=OPTIONS)))
    seen: Any = model.extractor.seen
    seen.clear()
    work = begin(slide, model, tmp_path / "c", options=OPTIONS)
    assert work.note == "continuing: 20 of 20 chunks were done"
    canvas = carry_out(work)
    assert planes(canvas) == whole
    assert seen == []
    assert canvas.record["status"] == "ok"


def other_model() -> Segmenter:
    model = noise_model()
    model.info = replace(model.info, sha256="1" * 64)
    return model


def other_slide() -> MemorySlide:
    slide = random_slide(300, 250)
    slide.quickhash = "1" * 64
    return slide


MASK = MemoryTissue(np.eye(250, 300, dtype=bool).cumsum(1).astype(bool))
OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "overlap": ({"options": {"overlap_px": 48}}, "other settings"),
    "precision": ({"options": {"precision": "bf16"}}, "other settings"),
    "seed": ({"options": {"seed": 1}}, "other settings"),
    "tta": ({"options": {"tta": True}}, "other settings"),
    "tissue": ({"tissue": MASK}, "other settings"),
    "model": ({"model": other_model()}, "another model"),
    "slide": (
        {"slide": other_slide()},
        "another slide, or another resolution, frame or reader of it",
    ),
    "version": ({"version": "0"}, "another version of wsiseg or of what computes"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_a_canvas_of_something_else_is_not_continued(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes, words = OTHERS[case]
    slide = interrupt(tmp_path / "c")
    if "version" in changes:
        monkeypatch.setattr("wsiseg.inference.record.__version__", changes["version"])
    work = begin(
        changes.get("slide", slide),
        changes.get("model", noise_model()),
        tmp_path / "c",
        options=replace(OPTIONS, **changes.get("options", {})),
        tissue=changes.get("tissue"),
    )
    assert work.note == f"beginning anew: c was left by {words}"
    assert work.canvas.done_count == 0


def test_another_version_of_the_runtime_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wsiseg.inference.engine.CompiledExtractor", type(noise_model().extractor))
    monkeypatch.setattr("wsiseg.inference.record.version", lambda name: f"{name} 2026.4")
    slide = interrupt(tmp_path / "c")
    assert Canvas.open(tmp_path / "c").record["versions"]["openvino"] == "openvino 2026.4"
    monkeypatch.setattr("wsiseg.inference.record.version", lambda name: f"{name} 2026.5")
    work = begin(slide, noise_model(), tmp_path / "c", options=OPTIONS)
    assert (
        work.note == "beginning anew: c was left by another version of wsiseg or of what computes"
    )


def test_what_changes_only_the_speed_does_not_matter(tmp_path: Path) -> None:
    slide = interrupt(tmp_path / "c")
    options = replace(OPTIONS, batch_size=2, workers=1, memory_gib=2.0)
    work = begin(slide, noise_model(), tmp_path / "c", options=options)
    assert work.note.startswith("continuing: ")
    assert work.canvas.record["parameters"]["batch_size"] == 2


def test_a_canvas_is_replaced_where_none_is_to_be_continued(tmp_path: Path) -> None:
    slide = interrupt(tmp_path / "c")
    work = begin(slide, noise_model(), tmp_path / "c", options=replace(OPTIONS, resume=False))
    assert (work.note, work.canvas.done_count) == ("", 0)


def spoil(path: Path, how: str) -> None:
    chunk = next(p for p in sorted((path / "labels" / "c").rglob("*")) if p.is_file())
    if how == "noise":
        chunk.write_bytes(b"\x00" * 40)
    elif how == "missing":
        chunk.unlink()
    elif how == "another":
        other = [p for p in sorted((path / "labels" / "c").rglob("*")) if p.is_file()][1]
        chunk.write_bytes(other.read_bytes())
    elif how == "record":
        (path / "zarr.json").write_text((path / "zarr.json").read_text()[:300])
    else:
        (path / "confidence" / "zarr.json").write_text("{}")


@pytest.mark.parametrize("how", ["record", "plane"])
def test_a_damaged_canvas_is_begun_anew(tmp_path: Path, how: str) -> None:
    slide = interrupt(tmp_path / "c")
    spoil(tmp_path / "c", how)
    work = begin(slide, noise_model(), tmp_path / "c", options=OPTIONS)
    assert work.note.startswith("beginning anew: c is damaged (")
    assert "\n" not in work.note
    assert carry_out(work).record["status"] == "ok"


@pytest.mark.parametrize("name", ["zarr.json", "done/zarr.json", "confidence/zarr.json"])
def test_a_canvas_that_cannot_be_read_now_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    slide, plain = interrupt(tmp_path / "c"), Path.read_bytes
    done = Canvas.open(tmp_path / "c").done_count

    def read(path: Path) -> bytes:
        if path == tmp_path / "c" / name:
            raise OSError(errno.EIO, "Input/output error")
        return plain(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", read)
        with pytest.raises(
            CanvasError, match=r"c: cannot be read \(Input/output error\), and is left"
        ):
            begin(slide, noise_model(), tmp_path / "c", options=OPTIONS)
    work = begin(slide, noise_model(), tmp_path / "c", options=OPTIONS)
    assert work.note == f"continuing: {done} of 20 chunks were done"


def test_unfinished_files_that_cannot_be_removed_are_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slide, plain = interrupt(tmp_path / "c"), Path.unlink
    theirs, mine = (tmp_path / "c" / "done" / f"{k}.01234567.partial" for k in (0, 1))
    theirs.touch()
    mine.touch()

    def unlink(path: Path, missing_ok: bool = False) -> None:
        if path == theirs:
            raise PermissionError(errno.EPERM, "Operation not permitted")
        plain(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink)
    work = begin(slide, noise_model(), tmp_path / "c", options=OPTIONS)
    assert work.note.startswith("continuing: ")
    assert (theirs.exists(), mine.exists()) == (True, False)


@pytest.mark.parametrize("how", ["noise", "missing", "another"])
def test_damaged_chunks_are_done_again(tmp_path: Path, how: str) -> None:
    whole = carry_out(begin(random_slide(300, 250), noise_model(), tmp_path / "w", options=OPTIONS))
    slide = interrupt(tmp_path / "c")
    before = Canvas.open(tmp_path / "c").done_count
    spoil(tmp_path / "c", how)
    work = begin(slide, noise_model(), tmp_path / "c", options=OPTIONS)
    done = f"continuing: {before - 1} of 20 chunks were done"
    assert work.note == f"{done}, damaged ones done again: 1"
    assert planes(carry_out(work)) == planes(whole)


def test_a_loss_of_power_costs_only_what_the_disk_had_not_taken(tmp_path: Path) -> None:
    whole = carry_out(begin(random_slide(300, 250), noise_model(), tmp_path / "w", options=OPTIONS))
    slide = interrupt(tmp_path / "c", 90)
    left = Canvas.open(tmp_path / "c")
    columns = sum(left.is_done(0, c) for c in range(left.chunk_columns))
    assert columns == left.chunk_columns
    (tmp_path / "c" / "done" / "c" / "0" / "0").write_bytes(b"")  # has its name but no content
    work = begin(slide, noise_model(), tmp_path / "c", options=OPTIONS)
    assert work.note == f"continuing: {left.done_count - columns} of 20 chunks were done"
    assert planes(carry_out(work)) == planes(whole)
    for chunk in (tmp_path / "c" / "labels" / "c").rglob("*"):
        if chunk.is_file():
            chunk.write_bytes(b"")
    work = begin(slide, noise_model(), tmp_path / "c", options=OPTIONS)
    assert work.note == "beginning anew: c is damaged (all 20 chunks)"


class Torn(MemorySlide):
    def read(self, box: Box, grid: Grid) -> np.ndarray:
        if box.y > 150:
            raise SlideReadError("torn.svs: the tile cannot be read")
        return super().read(box, grid)


def test_errors_leave_the_canvas_where_anything_is_done(tmp_path: Path) -> None:
    pixels = random_slide(300, 250).pixels
    work = begin(Torn(pixels), noise_model(), tmp_path / "c", options=OPTIONS)
    with pytest.raises(SlideReadError):
        carry_out(work)
    assert Canvas.open(tmp_path / "c").done_count
    assert not list((tmp_path / "c").glob("spill*"))
    work = begin(random_slide(300, 250), noise_model(), tmp_path / "c", options=OPTIONS)
    assert work.note.startswith("continuing")
    with pytest.raises(ModelError):
        carry_out(work, stop_at(10, ModelError("no numbers")))
    assert Canvas.open(tmp_path / "c").done_count
    work.canvas.remove()
    work = begin(random_slide(300, 250), noise_model(), tmp_path / "c", options=OPTIONS)
    with pytest.raises(KeyboardInterrupt):
        carry_out(work, stop_at(1, KeyboardInterrupt()))
    assert list(tmp_path.iterdir()) == [], "nothing was done"


@pytest.mark.parametrize("error", [LeaseLostError("taken over"), KeyboardInterrupt()])
def test_the_canvas_of_another_process_is_left_alone(tmp_path: Path, error: BaseException) -> None:
    interrupt(tmp_path / "c")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    slide, options = random_slide(300, 250), replace(OPTIONS, resume=False)
    lost = False

    def check() -> None:
        if lost:
            raise LeaseLostError("taken over")

    def progress(done: int, total: int) -> None:
        nonlocal lost
        if done >= 60:
            lost = True
            raise error

    lost = True
    with pytest.raises(LeaseLostError):
        begin(slide, noise_model(), tmp_path / "c", options=options, check=check)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    lost = False
    work = begin(slide, noise_model(), tmp_path / "c", options=options, check=check)
    with pytest.raises(type(error)):
        carry_out(work, progress)
    assert Canvas.open(tmp_path / "c").done_count, "not removed"


def test_the_record_of_another_process_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = False

    def check() -> None:
        if lost:
            raise LeaseLostError("taken over")

    def progress(done: int, total: int) -> None:
        nonlocal lost
        lost = done == total

    slide = random_slide(300, 250)
    work = begin(slide, noise_model(), tmp_path / "c", options=OPTIONS, check=check)
    with pytest.raises(LeaseLostError):
        carry_out(work, progress)
    assert "status" not in Canvas.open(tmp_path / "c").record
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    lost, plain = False, Canvas.recheck

    def recheck(canvas: Canvas) -> int:  # takes long
        nonlocal lost
        lost = True
        return plain(canvas)

    monkeypatch.setattr(Canvas, "recheck", recheck)
    with pytest.raises(LeaseLostError):
        begin(slide, noise_model(), tmp_path / "c", options=OPTIONS, check=check)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("capacity", [10, 1000])
def test_batches_that_are_left_are_those_of_the_whole(tmp_path: Path, capacity: int) -> None:
    batch, group = 10, 3
    grid = Grid.at_mpp(Size(500, 400), 0.5, 0.5)
    layout = plan(grid, None, window_px=96, tile_px=32, overlap_px=32)
    loads = schedule(layout, capacity=capacity)
    whole = [tuple(loads.tiles[a:b]) for a, b in groups(len(loads.tiles), batch)]
    canvas = Canvas.create(
        tmp_path / "c", grid=layout.grid, classes=noise_model().info.classes, record={}, chunk_px=64
    )
    for row, column in canvas.chunks():
        if row < 4 or (row, column) == (5, 5):
            box = canvas.chunk_box(row, column)
            blank = np.zeros((box.height, box.width), np.uint8)
            canvas.write_chunk(row, column, blank, blank)
    windows = windows_left(layout, canvas, group=group)
    assert 0 < len(windows) < len(layout.windows)
    sub, left = plan_left(layout, windows), schedule_left(loads, windows, batch=batch)
    assert left is not None
    for start, stop in groups(len(windows), group):
        same = windows[start:stop]
        assert same[0] % group == 0
        assert (np.diff(same) == 1).all(), "groups are whole"
    batches = [tuple(left.tiles[a:b]) for a, b in groups(len(left.tiles), batch)]
    assert set(batches) < set(whole)
    assert len(batches) < len(whole)
    assert (left.tiles[left.window_loads] == layout.window_tiles[windows]).all()
    features = WindowFeatures(Engine(noise_model()), sub, left, batch_size=batch, group=group)
    tiles = iter([np.zeros((32, 32, 3), np.uint8)] * len(left.tiles))
    for start, stop in groups(len(windows), group):
        list(features.take(start, stop, tiles, Stopwatch()))
        features.windows(start, stop)
    assert features.encoded == len(left.tiles)
    assert len(features._store) == 0, "everything is released"
