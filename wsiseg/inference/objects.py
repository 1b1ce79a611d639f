"""Post-processing of a canvas: specks and holes go, objects come apart. Knows no networks.

The result is that of `wsiseg.objects` on the whole image. Memory bound: a few bands of the width of
the slide (about 40 bytes a pixel of one), about 50 bytes for each region in a band and, where
objects are joined, 1.4 kB for each of them that has neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from wsiseg.canvas import Canvas
from wsiseg.geometry import Box
from wsiseg.models.segmenter import ModelInfo
from wsiseg.objects import ObjectsConfig, cleanings, parting
from wsiseg.parting import Parting

Int32 = npt.NDArray[np.int32]
UInt8 = npt.NDArray[np.uint8]


def wants_objects(info: ModelInfo) -> bool:
    """Whether a model asks for any post-processing."""
    return info.border or info.objects != ObjectsConfig()


def make_objects(
    canvas: Canvas,
    config: ObjectsConfig,
    *,
    band_px: int | None = None,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Clean the labels of a complete canvas and, where it has borders, make its objects.

    Their number by class goes into the record as `objects`. The confidences stay those of the
    network's own labels.

    Args:
        canvas: open for writing.
        config: what the model asks for; the defaults on a canvas without borders change nothing.
        band_px: rows at a time, a whole number of chunks; None takes one. Does not change the
            result.
        check: called before anything is written; what it raises ends the work.

    Raises:
        CanvasError: the canvas cannot be written.
    """
    background = [value for value, item in canvas.classes.values() if item.background]
    mpp = math.sqrt(canvas.grid.pixel_area_um2)
    bands = list(_bands(canvas, band_px or canvas.chunk_px))
    for cleaning in cleanings(background, mpp, config):
        for box in bands:
            cleaning.add(canvas.labels(box))
        cleaning.finish()
        for index, box in enumerate(bands):
            labels = cleaning.apply(index, canvas.labels(box))
            check()
            canvas.write_labels(box, labels)
    if canvas.has_border:
        _part(canvas, parting(background, mpp, config), bands, check)


def _bands(canvas: Canvas, band_px: int) -> Iterator[Box]:
    width, height = canvas.grid.size
    for y in range(0, height, band_px):
        yield Box(0, y, width, min(band_px, height - y))


def _part(canvas: Canvas, work: Parting, bands: list[Box], check: Callable[[], None]) -> None:
    """The objects of a canvas, in three passes over its bands."""
    for box in bands:
        work.add_cores(canvas.labels(box), canvas.border(box))
    work.finish_cores()
    for box, top, labels, cores in _windows(canvas, work, bands):
        own = slice(box.y - top, box.bottom - top)
        grown = work.grow(labels, cores)[own]
        border = canvas.border(box) if work.joins else None
        found = work.add_grown(labels[own], grown, border)
        check()
        canvas.write_objects(box, found)
    work.finish()
    for box in bands:
        found = work.numbers(canvas.objects(box))
        check()
        canvas.write_objects(box, found)
    counts = np.bincount(work.labels[1:], minlength=256)
    items = canvas.classes.values()
    check()
    canvas.update_record(
        objects={item.name: int(counts[v]) for v, item in items if not item.background}
    )


def _windows(
    canvas: Canvas, work: Parting, bands: list[Box]
) -> Iterator[tuple[Box, int, UInt8, Int32]]:
    """Each band with the y, labels and cores of it and of the rows that its objects reach into."""
    width, height = canvas.grid.size
    start, following = 0, 0
    labels, cores = np.zeros((0, width), np.uint8), np.zeros((0, width), np.int32)
    for box in bands:
        top, bottom = max(0, box.y - work.reach_px), min(height, box.bottom + work.reach_px)
        labels, cores, start = labels[top - start :], cores[top - start :], top
        while start + len(labels) < bottom:
            band = canvas.labels(bands[following])
            numbers = work.core_numbers(following, band, canvas.border(bands[following]))
            labels, cores = np.concatenate([labels, band]), np.concatenate([cores, numbers])
            following += 1
        yield box, top, labels[: bottom - top], cores[: bottom - top]
