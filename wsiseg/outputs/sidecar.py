"""The record beside the outputs: what was made, from what, by what. Knows no pixels but counts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from wsiseg import __version__
from wsiseg.atomic import staged
from wsiseg.canvas import Canvas

FORMAT = 1
OPENING = '{\n  "format": '
"""How every file begins."""


class ClassArea(NamedTuple):
    """What a class covers.

    Attributes:
        name: of the class.
        mm2: square millimetres.
        percent: of everything analysed (tissue); 0 where nothing was.
    """

    name: str
    mm2: float
    percent: float


def class_areas(canvas: Canvas) -> list[ClassArea]:
    """Area and share of each class, in the order of the classes; one pass over the labels."""
    areas = canvas.areas_mm2()
    total = sum(areas.values())
    return [ClassArea(name, a, 100 * a / total if total else 0.0) for name, a in areas.items()]


def write_sidecar(
    path: str | Path,
    canvas: Canvas,
    *,
    areas: Sequence[ClassArea] | None = None,
    files: Mapping[str, str] | None = None,
    polygons: Mapping[str, Any] | None = None,
) -> None:
    """Write `<slide>.json`.

    Args:
        path: the file; it appears when it is complete.
        canvas: its record gives slide, model, parameters, status, timings and versions.
        areas: what `class_areas` gave; counted when left out.
        files: kind to name of the output files beside this one.
        polygons: options and report of the GeoJSON.

    Raises:
        OutputError: the file cannot be written.
    """
    text = json.dumps(sidecar(canvas, areas, files, polygons), indent=2, ensure_ascii=False)
    with staged(Path(path)) as (temporary,):
        temporary.write_text(text + "\n", encoding="utf-8")


def sidecar(
    canvas: Canvas,
    areas: Sequence[ClassArea] | None = None,
    files: Mapping[str, str] | None = None,
    polygons: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The content of `<slide>.json` as plain data."""
    grid, record = canvas.grid, canvas.record
    areas = class_areas(canvas) if areas is None else areas
    slide = record.get("slide", {})
    return {
        "format": FORMAT,
        "status": record.get("status", "ok"),
        "slide": slide,
        "model": record.get("model", {}),
        "classes": canvas.classes.to_list(),
        "mask": {
            "mpp": [grid.mpp_x, grid.mpp_y],
            "downsample": list(grid.downsample),
            "size": list(grid.size),
            "level0_size": list(grid.level0),
            "frame": slide.get("frame", "qupath"),
        },
        "areas_mm2": {a.name: round(a.mm2, 6) for a in areas},
        **({"objects": record["objects"]} if canvas.has_objects else {}),
        "polygons": dict(polygons) if polygons is not None else None,
        "files": dict(files or {}),
        "parameters": record.get("parameters", {}),
        "versions": {**record.get("versions", {}), "wsiseg": __version__},
        "timings": record.get("timings", {}),
    }
