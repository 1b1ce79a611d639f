"""What may be continued, and what is left of it to do. Knows no slides, networks or pixels.

A canvas is continued only by the very work that began it: same slide, model, settings and versions.
Windows are left out where all chunks that they touch are done; the others come in the same order,
so a chunk that is not done gets the same windows in the same order as without interruption. On
devices that compute batches, whose sums may depend on what is computed together, the batches that
are left are the same ones too.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from wsiseg.canvas import FORMAT, Canvas
from wsiseg.canvas_store import DAMAGES, META, RECORD
from wsiseg.classes import Classes
from wsiseg.errors import CanvasError, OutputError
from wsiseg.inference.contracts import SlideLike, TissueLike
from wsiseg.inference.features import Schedule
from wsiseg.inference.plan import Plan

Ints = npt.NDArray[np.int64]
SPEED_ONLY = ("batch_size", "workers", "memory_gib")
"""Parameters that never change what is computed on a CPU."""
GONE = (FileNotFoundError, NotADirectoryError)
"""What says that a file of a canvas is not there; other errors of the system may pass."""
VERSIONS = ("wsiseg", "torch", "numpy", "openvino")
ORIGIN = ("place", "content")
"""Of a slide: where its file lies, and what is in it."""
WORDS = {
    "versions": "another version of wsiseg or of what computes",
    "slide": "another slide, or another resolution, frame or reader of it",
    "model": "another model",
    "settings": "other settings",
}


def check_target(path: Path) -> None:
    """Refuse to replace anything that is not a canvas, damaged or whole, or an empty folder.

    Raises:
        CanvasError: as said.
    """
    if not path.exists() or (path.is_dir() and (_may_be_canvas(path) or not any(path.iterdir()))):
        return
    raise CanvasError(f"{path}: exists and is not a canvas; choose another name or remove it")


def _may_be_canvas(path: Path) -> bool:
    """Whether a folder states that it is a canvas, or states what cannot be read."""
    if not (path / META).is_file():
        return False
    try:
        stated = json.loads((path / META).read_bytes())
    except DAMAGES:
        return True
    attributes = stated.get("attributes") if isinstance(stated, dict) else None
    return isinstance(attributes, dict) and RECORD in attributes


def identity(
    record: Mapping[str, Any],
    *,
    layout: Plan,
    classes: Classes,
    chunk_px: int,
    tissue: TissueLike | None,
    batches: Schedule | None,
) -> dict[str, str]:
    """What a canvas is of: a sha256, as hex, of each part (the keys of `WORDS`).

    Args:
        record: of the canvas, with slide, model, parameters and versions.
        layout: all windows.
        classes: of its labels.
        chunk_px: side of its chunks.
        tissue: where it is looked.
        batches: what is encoded when, on a device where that can change the result; else None.
    """
    parameters = dict(record["parameters"])
    device = str(parameters.pop("device")).partition(":")[0]
    speed_only = SPEED_ONLY if batches is None else SPEED_ONLY[1:]
    settings = {k: v for k, v in parameters.items() if k not in speed_only}
    mask = b"" if tissue is None else np.packbits(np.asarray(tissue.mask, bool)).tobytes()
    shape = None if tissue is None else list(tissue.mask.shape)
    loads = b"" if batches is None else batches.tiles.tobytes()
    grid = layout.grid
    parts: dict[str, Any] = {
        "versions": [FORMAT, {k: record["versions"].get(k) for k in VERSIONS}],
        "slide": [record["slide"], list(grid.level0), grid.level0_mpp],
        "model": [record["model"], classes.to_list()],
        "settings": [settings, device, chunk_px, shape, _sha(mask), _sha(loads)],
    }
    return {k: _sha(json.dumps(v, sort_keys=True).encode()) for k, v in parts.items()}


def origin(slide: SlideLike) -> dict[str, str]:
    """Which slide a canvas is of: a sha256, as hex, of each part (`ORIGIN`).

    One of both stays the same where the file is replaced, and where it is seen by another path.
    """
    parts = (os.fsencode(os.path.realpath(slide.path)), str(slide.quickhash).encode())
    return dict(zip(ORIGIN, map(_sha, parts), strict=True))


def take_up(path: Path, wanted: Mapping[str, str]) -> tuple[Canvas | None, int, str]:
    """The canvas of an earlier run, if it is of the same work; damaged chunks are not done.

    Args:
        path: of the canvas.
        wanted: its `identity`, with the `origin` of its slide.

    Returns:
        The canvas, or None; how many of its chunks are done; in one line, where there is one that
        is not continued, why, and where chunks are damaged, how many.

    Raises:
        CanvasError: it cannot be read now, but may be whole.
        OutputError: it is of a slide that lies elsewhere and has this one's name.
    """
    if not path.is_dir() or not any(path.iterdir()):
        return None, 0, ""
    try:
        canvas = Canvas.open(path, writable=True)
        found = canvas.record.get("identity")
        known = found if isinstance(found, Mapping) else {}
        if all(known.get(part, wanted[part]) != wanted[part] for part in ORIGIN):
            raise OutputError(
                f"{path}: was begun for another slide of that name; choose another --out, or"
                " remove it if that slide is not to be gone on with"
            )
        other = [word for part, word in WORDS.items() if known.get(part) != wanted[part]]
        if other:
            return None, 0, f"beginning anew: {path.name} was left by {other[0]}"
        damaged = canvas.recheck()
        if damaged and not canvas.done_count:
            return None, 0, f"beginning anew: {path.name} is damaged (all {damaged} chunks)"
        note = f"damaged ones done again: {damaged}" if damaged else ""
        return canvas, canvas.done_count, note
    except CanvasError as e:
        if isinstance(e.__cause__, OSError) and not isinstance(e.__cause__, GONE):
            raise CanvasError(
                f"{path}: cannot be read ({e.__cause__.strerror or e.__cause__}), and is left as it"
                " is; check disk and permissions, then start the same command again, or remove it"
                " to begin anew"
            ) from e
        return None, 0, f"beginning anew: {path.name} is damaged ({e})"


def windows_left(layout: Plan, canvas: Canvas, *, group: int) -> Ints:
    """Which windows touch a chunk that is not done, filled up to whole groups of `group`."""
    needed = [
        any(not canvas.is_done(*key) for key in layout.window_chunks(place, canvas.chunk_px))
        for place in layout.places(0, len(layout.windows))
    ]
    groups = np.unique(np.flatnonzero(needed) // group)
    every = np.arange(len(needed), dtype=np.int64)
    return every[np.isin(every // group, groups)]


def plan_left(layout: Plan, windows: Ints) -> Plan:
    """The plan of some of the windows, in the same order."""
    tiles = layout.window_tiles[windows]
    return replace(layout, windows=layout.windows[windows], window_tiles=tiles)


def schedule_left(loads: Schedule, windows: Ints, *, batch: int) -> Schedule | None:
    """The part of a schedule that some of the windows need, in whole batches of `batch` loads.

    What a batch brings that no window takes is dropped with the window that brought it.
    """
    if not len(windows):
        return None
    every = np.arange(len(loads.tiles), dtype=np.int64)
    needed = np.unique(loads.window_loads[windows] // batch)
    chosen = every[np.isin(every // batch, needed)]
    taken = np.searchsorted(chosen, loads.window_loads[windows])
    brought = np.maximum.accumulate(taken.max(axis=1))
    last = np.searchsorted(brought, np.arange(len(chosen)) // batch * batch)
    np.maximum.at(last, taken, np.arange(len(windows))[:, None])
    tiles = loads.tiles[chosen]
    return Schedule(tiles, taken, last, len(tiles) - len(np.unique(tiles)))


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
