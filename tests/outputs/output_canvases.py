"""Labels, classes and records for small canvases."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from wsiseg.canvas import Canvas
from wsiseg.classes import Classes, TissueClass

UInt8 = npt.NDArray[np.uint8]
MakeCanvas = Callable[..., Canvas]

CLASSES = Classes(
    (
        TissueClass("Other tissue", (190, 190, 190), background=True),
        TissueClass("Gland", (200, 0, 0)),
        TissueClass("Lymphocytes", (30, 80, 220)),
    )
)
RECORD: dict[str, Any] = {
    "slide": {
        "path": "slide.svs",
        "quickhash": "0123",
        "mpp": 0.25,
        "mpp_source": "properties",
        "vendor": "aperio",
        "frame": "qupath",
    },
    "model": {"name": "tiny", "sha256": "ab" * 32, "licence": "CC0-1.0"},
    "parameters": {"seed": 0},
    "status": "ok",
    "timings": {"inference": 1.5},
    "versions": {"torch": "2"},
}


def blobs(height: int, width: int, *, seed: int = 0, scale: float = 6.0) -> UInt8:
    """(h, w) uint8 smooth patches of values 0..3."""
    rng = np.random.default_rng(seed)
    planes = [ndimage.gaussian_filter(rng.random((height, width)), scale) for _ in range(4)]
    return np.stack(planes).argmax(0).astype(np.uint8)
