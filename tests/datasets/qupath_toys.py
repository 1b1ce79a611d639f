"""Slides with annotations as QuPath exports them, made for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from wsiseg.datasets.qupath import QuPathDataset
from wsiseg.geometry import Size

SIZE = Size(200, 120)
SMALL = {"mpp": 0.5, "patch_px": 64}


def slide(root: Path, name: str = "s.tif", mpp: float | None = 0.5, size: Size = SIZE) -> Path:
    """A plain TIFF whose pixels tell where they are."""
    root.mkdir(exist_ok=True)
    y, x = np.mgrid[: size.height, : size.width]
    pixels = np.stack([x % 256, y % 256, (x + y) % 256], 2).astype(np.uint8)
    dpi = 25_400 / mpp if mpp else 72
    Image.fromarray(pixels).save(root / name, dpi=(dpi, dpi))
    return root / name


def rectangle(x: float, y: float, width: float, height: float) -> list[list[float]]:
    return [[x, y], [x + width, y], [x + width, y + height], [x, y + height], [x, y]]


def feature(
    class_name: str | None, *rings: list[list[float]], kind: str = "annotation", **more: Any
) -> dict[str, Any]:
    classification = (
        {"classification": {"name": class_name, "color": [10, 20, 30]}} if class_name else {}
    )
    return {
        "type": "Feature",
        "geometry": {"type": "Polygon", "coordinates": list(rings)},
        "properties": {"objectType": kind, **classification, **more},
    }


def write(path: Path, data: Any) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(data))
    return path


def collection(*features: dict[str, Any]) -> dict[str, Any]:
    return {"type": "FeatureCollection", "features": list(features)}


TWO = (
    feature("Tumour", rectangle(10, 10, 40, 30)),
    feature("Stroma", rectangle(70, 20, 50, 50), rectangle(80, 30, 10, 10)),
)


def whole(data: QuPathDataset, size: Size = SIZE) -> np.ndarray:
    """The masks of all patches in their places, 255 elsewhere."""
    sheet = np.full((size.height + 64, size.width + 64), 255, np.uint8)
    for i, name in enumerate(data.names):
        x, y = (int(t[1:]) for t in name.split("_")[-2:])
        sheet[y : y + 64, x : x + 64] = data.mask(i)
    assert (sheet[size.height :] == 255).all()
    assert (sheet[:, size.width :] == 255).all()
    return sheet[: size.height, : size.width]
