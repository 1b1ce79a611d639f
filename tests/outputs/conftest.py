"""Small canvases with known labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from output_canvases import CLASSES, RECORD, MakeCanvas, UInt8

from wsiseg.canvas import Canvas
from wsiseg.geometry import Grid, Size


@pytest.fixture
def make_canvas(tmp_path: Path) -> MakeCanvas:
    """Canvas at 0.5 um/px with the given labels, level 0 at twice the resolution."""

    def make(
        labels: UInt8,
        *,
        confidence: UInt8 | None = None,
        level0: Size | None = None,
        chunk_px: int = 512,
        name: str = "slide.canvas",
        **record: Any,
    ) -> Canvas:
        height, width = labels.shape
        level0 = level0 or Size(2 * width, 2 * height)
        grid = Grid(level0, 0.25, 0.5, Size(width, height))
        canvas = Canvas.create(
            tmp_path / name,
            grid=grid,
            classes=CLASSES,
            record={**RECORD, **record},
            chunk_px=chunk_px,
        )
        if confidence is None:
            confidence = np.where(labels > 0, 204, 0).astype(np.uint8)
        for row, column in canvas.chunks():
            at = canvas.chunk_box(row, column).slices
            canvas.write_chunk(row, column, labels[at], confidence[at])
        return canvas

    return make
