"""Chunks written beside the work: several, bounds, errors; a canvas is the same either way."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from test_blend import CHUNK, CLASSES, layout_of, random_field

from wsiseg.canvas import Canvas
from wsiseg.errors import CanvasError, ModelError
from wsiseg.inference.blend import Blender
from wsiseg.inference.writing import Writer


def test_everything_is_written_several_at_a_time() -> None:
    together = threading.Barrier(4)
    writer = Writer(8)
    for _ in range(8):
        writer.give(lambda: together.wait(10) and None)
    writer.finish()
    writer.close()
    done: list[int] = []
    writer = Writer(3)
    for k in range(20):
        writer.give(lambda k=k: done.append(k))  # type: ignore[misc]
    writer.finish()
    writer.close()
    assert sorted(done) == list(range(20))


def test_what_waits_is_bounded() -> None:
    gate, begun = threading.Event(), threading.Event()
    writer = Writer(2)

    def slow() -> None:
        begun.set()
        assert gate.wait(10)

    writer.give(slow)
    writer.give(lambda: None)
    blocked = threading.Thread(target=writer.give, args=(lambda: None,))
    blocked.start()
    assert begun.wait(10)
    blocked.join(0.1)
    assert blocked.is_alive()
    gate.set()
    blocked.join(10)
    assert not blocked.is_alive()
    writer.finish()
    writer.close()


def test_an_error_is_raised_and_what_was_not_begun_is_dropped() -> None:
    def bad() -> None:
        raise CanvasError("no space")

    writer = Writer(4)
    writer.give(bad)
    with pytest.raises(CanvasError, match="no space"):
        writer.finish()
    writer.close()
    gate, done = threading.Event(), []
    writer = Writer(4, threads=1)
    writer.give(lambda: gate.wait(10) and None)
    writer.give(lambda: done.append(1))
    threading.Timer(0.1, gate.set).start()
    writer.close()
    assert done == []


def test_a_canvas_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = layout_of(300, 280)
    field = torch.from_numpy(random_field(2, 300, 280))
    found = []
    for name in ("plain", "threaded"):
        canvas = Canvas.create(
            tmp_path / name, grid=layout.grid, classes=CLASSES, record={}, chunk_px=CHUNK
        )
        blender = Blender(layout, 2, canvas, memory_bytes=1)
        if name == "threaded":
            blender._writer = Writer(2)
        for k in range(len(layout.windows)):
            places = layout.places(k, k + 1)
            box = layout.window_box(places[0])
            window = torch.zeros(1, 2, layout.window_px, layout.window_px)
            window[:, :, : box.height, : box.width] = field[(slice(None), *box.slices)]
            blender.add(window, places)
        blender.finish()
        found.append((canvas.labels(canvas.grid.box), canvas.confidence(canvas.grid.box)))
    assert (found[0][0] == found[1][0]).all()
    assert (found[0][1] == found[1][1]).all()


@pytest.mark.parametrize("border", [False, True])
def test_a_chunk_without_numbers_is_not_done(border: bool, tmp_path: Path) -> None:
    layout = layout_of(300, 280)
    canvas = Canvas.create(
        tmp_path / "c", grid=layout.grid, classes=CLASSES, record={}, chunk_px=CHUNK, border=border
    )
    blender = Blender(layout, 2, canvas)
    blender._writer = Writer(100)
    maps = 2 + border
    values = torch.full((len(layout.windows), maps, layout.window_px, layout.window_px), 0.5)
    values[0, -1, 3, 4] = float("nan")

    def blend() -> None:
        blender.add(values, layout.places(0, len(values)))
        blender.finish()

    with pytest.raises(ModelError, match=r"no numbers in the chunk at \(0, 0\); try"):
        blend()
    blender.close()
    assert not Canvas.open(tmp_path / "c").is_done(0, 0)
