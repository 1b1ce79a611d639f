"""Whether a finished canvas is still what was written, as copies may lack files of it.

A chunk whose file is missing reads as 0, not analysed. What the model gave has checksums. What
post-processing made of it has none, but is 0 just where that is; and chunks that are not done are
0 in all planes, so a lost row of `done` shows, too.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from wsiseg.canvas import Canvas
from wsiseg.errors import CanvasError

UInt8 = npt.NDArray[np.uint8]
Key = tuple[int, int]
CLEANS = ("min_area_um2", "max_hole_um2")
"""Settings of post-processing that replace labels, where they are not 0."""


def damaged_chunks(canvas: Canvas) -> int:
    """How many chunks of a finished canvas are damaged or missing, in any plane.

    Raises:
        CanvasError: it lacks a plane of what the model gave.
    """
    done = {key for key in canvas.chunks() if canvas.is_done(*key)}
    damaged = canvas.recheck()  # those are not done from here on
    if not _has_planes(canvas):
        return canvas.chunk_rows * canvas.chunk_columns
    front = _front(canvas)
    for key in canvas.chunks():
        if canvas.is_done(*key) == (key in done):  # not counted yet
            damaged += not _agrees(canvas, key, front)
    least = canvas.record.get("chunks", canvas.record.get("status") == "ok")
    return max(damaged, int(least) - len(done))


def _has_planes(canvas: Canvas) -> bool:
    """Whether there is what post-processing made, by what the record tells of it."""
    settings = canvas.record.get("parameters", {}).get("objects") or {}
    cleaned = canvas.final == "cleaned" or not any(settings.get(name) for name in CLEANS)
    return cleaned and (canvas.has_objects or "objects" not in canvas.record)


def _agrees(canvas: Canvas, key: Key, front: npt.NDArray[np.bool_]) -> bool:
    """Whether the planes of a chunk tell the same, and nothing where it is not done."""
    box = canvas.chunk_box(*key)
    try:
        given, labels = canvas.labels(box, given=True), canvas.labels(box)
        if not canvas.is_done(*key) and (given.any() or canvas.confidence(box).any()):
            return False
        if not np.array_equal(given > 0, labels > 0):
            return False
        return not canvas.has_objects or np.array_equal(canvas.objects(box) > 0, front[labels])
    except CanvasError:
        return False


def _front(canvas: Canvas) -> npt.NDArray[np.bool_]:
    """(256,) which values on disk are of classes that are not background."""
    front = np.zeros(256, bool)
    front[[value for value, item in canvas.classes.values() if not item.background]] = True
    return front
