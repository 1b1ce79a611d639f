"""Regions traced while a canvas is filled are those of the complete canvas."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapely
from output_canvases import CLASSES, RECORD, UInt8, blobs

from wsiseg.canvas import Canvas
from wsiseg.errors import CanvasError
from wsiseg.geometry import Box, Grid, Size
from wsiseg.outputs.geojson import PolygonOptions, write_geojson
from wsiseg.outputs.polygons import trace
from wsiseg.outputs.tracing import Tracing

LABELS = blobs(90, 130, scale=4)
OPTIONS = PolygonOptions(min_area_um2=3.0, band_px=32)


def empty(path: Path) -> Canvas:
    size = Size(LABELS.shape[1], LABELS.shape[0])
    grid = Grid(size, 0.5, 0.5, size)
    return Canvas.create(path, grid=grid, classes=CLASSES, record=RECORD, chunk_px=32)


def fill(canvas: Canvas, key: tuple[int, int], labels: UInt8 = LABELS) -> None:
    part = labels[canvas.chunk_box(*key).slices]
    canvas.write_chunk(*key, part, np.where(part > 0, 200, 0).astype(np.uint8))


@pytest.mark.parametrize("order", [1, -1])
def test_a_canvas_that_is_being_filled(tmp_path: Path, order: int) -> None:
    canvas = empty(tmp_path / "c")
    keys = [key for key in canvas.chunks() if key != (1, 2)]  # (1, 2) stays as it is
    with Tracing() as tracing:
        tracing.follow(canvas, OPTIONS, keys)
        for key in keys[::order]:
            fill(canvas, key)
            time.sleep(0.01)
        found = tracing.regions()
    tolerance_px = OPTIONS.tolerance_um / 0.5
    whole = trace(canvas, min_area_px=OPTIONS.min_area_um2 / 0.25, tolerance_px=tolerance_px)
    assert found is not None
    assert len(found) == len(whole) > 5
    assert shapely.equals_exact(found.polygons, whole.polygons).all()
    assert (found.confidences == whole.confidences).all()
    write_geojson(tmp_path / "a.geojson", canvas, OPTIONS, regions=found)
    write_geojson(tmp_path / "b.geojson", canvas, OPTIONS)
    assert (tmp_path / "a.geojson").read_bytes() == (tmp_path / "b.geojson").read_bytes()
    exact = trace(canvas, min_area_px=OPTIONS.min_area_um2 / 0.25)  # is simplified when written
    write_geojson(tmp_path / "c.geojson", canvas, OPTIONS, regions=exact)
    assert (tmp_path / "a.geojson").read_bytes() == (tmp_path / "c.geojson").read_bytes()


def test_it_is_at_work_before_the_canvas_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first band is read before the last one is there."""
    canvas, read = empty(tmp_path / "c"), threading.Event()
    plain = Canvas.colours

    def colours(self: Canvas, box: Box) -> Any:
        read.set()
        return plain(self, box)

    monkeypatch.setattr(Canvas, "colours", colours)
    keys = list(canvas.chunks())
    with Tracing() as tracing:
        tracing.follow(canvas, OPTIONS, keys)
        for key in keys[:5]:
            assert not read.is_set()
            fill(canvas, key)
            if key[1] < 4:
                time.sleep(0.1)
        assert read.wait(10)
        for key in keys[5:]:
            fill(canvas, key)
        assert tracing.regions() is not None


def test_it_ends_with_its_context(tmp_path: Path) -> None:
    canvas = empty(tmp_path / "c")
    with Tracing() as tracing:
        tracing.follow(canvas, OPTIONS, list(canvas.chunks()))
        fill(canvas, (0, 0))
    assert not [t for t in threading.enumerate() if t.name == "tracing"]
    with Tracing() as tracing:
        assert tracing.regions() is None


def test_an_error_is_that_of_who_asks(tmp_path: Path) -> None:
    canvas = empty(tmp_path / "c")
    for key in canvas.chunks():
        fill(canvas, key)
    for chunk in (canvas.path / "labels" / "c" / "0").iterdir():
        chunk.write_bytes(b"no chunk")
    with Tracing() as tracing:
        tracing.follow(canvas, OPTIONS, list(canvas.chunks()))
        with pytest.raises(CanvasError, match="Zstd"):
            tracing.regions()
