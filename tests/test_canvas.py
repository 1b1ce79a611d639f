from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from zarr.codecs import ZstdCodec

from wsiseg.canvas import Canvas
from wsiseg.canvas_store import Planes
from wsiseg.classes import Classes, TissueClass
from wsiseg.errors import CanvasError
from wsiseg.geometry import Box, Grid, Size

CLASSES = Classes(
    (TissueClass("Other", (9, 9, 9), background=True), TissueClass("Gland", (1, 2, 3)))
)


def make(folder: Path) -> Canvas:
    grid = Grid.at_mpp(Size(700, 300), 0.5, 0.5)
    return Canvas.create(
        folder / "a.canvas",
        grid=grid,
        classes=CLASSES,
        record={"slide": {"path": "a"}},
        chunk_px=256,
    )


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    canvas = make(tmp_path)
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, (300, 700), dtype=np.uint8)
    confidence = rng.integers(0, 256, (300, 700), dtype=np.uint8)
    assert (canvas.chunk_rows, canvas.chunk_columns) == (2, 3)
    for row, column in canvas.chunks():
        box = canvas.chunk_box(row, column)
        assert not canvas.is_done(row, column)
        canvas.write_chunk(row, column, labels[box.slices], confidence[box.slices])
    canvas.set_image("thumbnail", np.full((3, 7, 3), 5, np.uint8))
    canvas.update_record(status="ok")

    again = Canvas.open(canvas.path)
    assert all(again.is_done(r, c) for r, c in again.chunks())
    assert again.record == {"slide": {"path": "a"}, "status": "ok"}
    assert (again.grid, again.classes) == (canvas.grid, CLASSES)
    box = Box(100, 50, 555, 222)
    assert np.array_equal(again.labels(box), labels[box.slices])
    assert np.array_equal(again.confidence(box), confidence[box.slices])
    assert again.pixel_counts() == np.bincount(labels.ravel(), minlength=3).tolist()
    assert again.areas_mm2()["Gland"] == pytest.approx((labels == 2).sum() * 0.25e-6)
    thumbnail = again.image("thumbnail")
    assert thumbnail is not None
    assert thumbnail.shape == (3, 7, 3)
    assert again.image("tissue") is None


def test_unwritten_chunks_are_not_done_and_not_analysed(tmp_path: Path) -> None:
    canvas = make(tmp_path)
    canvas.write_chunk(0, 1, np.ones((256, 256), np.uint8), np.ones((256, 256), np.uint8))
    again = Canvas.open(canvas.path)
    assert [rc for rc in again.chunks() if again.is_done(*rc)] == [(0, 1)]
    assert again.labels(Box(0, 0, 256, 300)).max() == 0


def test_a_chunk_of_the_wrong_size_is_refused(tmp_path: Path) -> None:
    canvas = make(tmp_path)
    with pytest.raises(CanvasError, match="chunk"):
        canvas.write_chunk(1, 2, np.ones((256, 256), np.uint8), np.ones((256, 256), np.uint8))


def test_what_is_not_a_canvas_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(CanvasError, match="not a readable wsiseg canvas"):
            Canvas.open(path)


def test_remove(tmp_path: Path) -> None:
    canvas = make(tmp_path)
    canvas.remove()
    assert not canvas.path.exists()


def test_borders_and_objects_are_kept_only_where_asked_for(tmp_path: Path) -> None:
    plain = make(tmp_path)
    assert not plain.has_border
    assert sorted(p.name for p in plain.path.iterdir()) == [
        "confidence",
        "done",
        "labels",
        "zarr.json",
    ]
    chunk = np.ones((256, 256), np.uint8)
    with pytest.raises(CanvasError, match="chunk"):
        plain.write_chunk(0, 0, chunk, chunk, chunk)
    with pytest.raises(CanvasError, match="has no border"):
        plain.border(plain.grid.box)

    canvas = Canvas.create(
        tmp_path / "b.canvas", grid=plain.grid, classes=CLASSES, record={}, border=True
    )
    labels = np.ones((300, 512), np.uint8)
    with pytest.raises(CanvasError, match="chunk"):
        canvas.write_chunk(0, 0, labels, labels)
    canvas.write_chunk(0, 0, labels, labels, 7 * labels)
    box = Box(0, 0, 512, 300)
    assert (canvas.border(box) == 7).all()
    canvas.write_labels(box, 2 * labels)
    assert (canvas.labels(box) == 2).all()
    objects = np.arange(300 * 512, dtype=np.int32).reshape(300, 512)
    canvas.write_objects(box, objects)
    assert not canvas.has_objects, "not before the record says that all are there"
    canvas.update_record(objects={"Gland": 5})
    again = Canvas.open(canvas.path)
    assert again.has_border
    assert again.has_objects
    assert np.array_equal(again.objects(box), objects)
    assert again.colours(box)[0, :2].tolist() == [-2, 1]


def test_a_chunk_is_the_file_that_zarr_would_write(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    canvas = make(tmp_path)
    group = zarr.open_group(str(canvas.path), mode="r+")
    group.create_array(
        "twin",
        shape=(300, 700),
        chunks=group["labels"].chunks,
        dtype="uint8",
        fill_value=0,
        compressors=ZstdCodec(level=1),
    )
    empty = (0, 0)
    for row, column in canvas.chunks():
        box = canvas.chunk_box(row, column)
        labels = rng.integers(0, 3, (box.height, box.width)).astype(np.uint8)
        labels = labels * np.uint8((row, column) != empty)
        canvas.write_chunk(row, column, labels, labels)
        group["twin"][box.slices] = labels
    ours, theirs = (
        {p.relative_to(f): p.read_bytes() for p in f.rglob("*") if p.is_file()}
        for f in (canvas.path / "labels" / "c", canvas.path / "twin" / "c")
    )
    assert ours == theirs
    assert len(ours) == len(list(canvas.chunks())) - 1


def test_many_threads_write_chunks_of_one_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    columns, side = 48, 8
    grid = Grid.at_mpp(Size(columns * side, side), 0.5, 0.5)
    canvas = Canvas.create(
        tmp_path / "c", grid=grid, classes=CLASSES, record={}, chunk_px=side, border=True
    )
    plain, early = Planes.put_chunk, list[int]()

    def put_chunk(planes: Planes, name: str, index: tuple[int, int], values: Any) -> None:
        if name == "done":
            marked = np.flatnonzero(values[0]).tolist()
            folder = canvas.path / "border" / "c" / "0"
            early.extend(k for k in marked if not (folder / str(k)).is_file())
            time.sleep(0.001)  # the others come to this line meanwhile
        plain(planes, name, index, values)

    monkeypatch.setattr(Planes, "put_chunk", put_chunk)
    rng = np.random.default_rng(0)
    values = rng.integers(1, 3, (side, columns * side), dtype=np.uint8)

    def write(column: int) -> None:
        part = values[canvas.chunk_box(0, column).slices]
        canvas.write_chunk(0, column, part, part, part)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(columns)))
    again = Canvas.open(canvas.path, writable=True)
    assert not early, "a chunk is done before its pixels are there"
    assert again.done_count == columns
    assert again.recheck() == 0
    assert np.array_equal(again.labels(grid.box), values)


def test_a_chunk_may_become_empty(tmp_path: Path) -> None:
    canvas = make(tmp_path)
    box = canvas.chunk_box(0, 0)
    ones = np.ones((box.height, box.width), np.uint8)
    canvas.write_chunk(0, 0, ones, ones)
    canvas.write_chunk(0, 0, 0 * ones, 0 * ones)
    assert not canvas.labels(box).any()
    assert Canvas.open(canvas.path).is_done(0, 0)


def test_a_canvas_that_is_gone_is_not_begun_again(tmp_path: Path) -> None:
    canvas = make(tmp_path)
    box = canvas.chunk_box(0, 0)
    ones = np.ones((box.height, box.width), np.uint8)
    canvas.write_chunk(0, 0, ones, ones)
    Canvas.open(canvas.path).remove()
    with pytest.raises(CanvasError, match="cannot write"):
        canvas.write_chunk(0, 0, ones, ones)
    with pytest.raises(CanvasError, match="cannot write"):
        canvas.update_record(status="ok")
    assert list(tmp_path.iterdir()) == []


def test_what_it_states_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    canvas = make(tmp_path)
    before = (canvas.path / "zarr.json").read_bytes()
    found = []

    def late(path: Path) -> None:
        found.append((path.name, (canvas.path / "zarr.json").read_bytes() == before))
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("wsiseg.canvas_store.sync_file", late)
    with pytest.raises(CanvasError, match="No space left"):
        canvas.update_record(status="ok")
    ((name, unchanged),) = found
    assert name.startswith("zarr.json.")
    assert unchanged
    assert (canvas.path / "zarr.json").read_bytes() == before
    assert not list(canvas.path.rglob("*.partial"))


def test_two_writers_of_a_chunk_do_not_meet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    canvas = make(tmp_path)
    other = Canvas.open(canvas.path, writable=True)
    box = canvas.chunk_box(0, 0)
    ones = np.ones((box.height, box.width), np.uint8)
    plain, names = Path.write_bytes, []

    def write(path: Path, data: bytes) -> int:
        names.append(path.name)
        if len(names) == 1:
            other.write_chunk(0, 0, ones, ones)
        return plain(path, data)

    monkeypatch.setattr(Path, "write_bytes", write)
    canvas.write_chunk(0, 0, ones, ones)
    assert len(set(names)) == len(names) == 6
    assert (Canvas.open(canvas.path).labels(box) == 1).all()
