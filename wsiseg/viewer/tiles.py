"""A slide and its mask as tiles for the browser. Knows no HTTP.

Both are pyramids of 512 px tiles. Places are in level-0 pixels of the slide's frame; each level
states how many of them one of its pixels covers along x and y.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from wsiseg.errors import OutputError, SlideError
from wsiseg.geometry import Box, Grid, Size
from wsiseg.outputs.mask_reader import TILE_PX, MaskReader
from wsiseg.outputs.run_folder import SlideResult
from wsiseg.slides import Slide
from wsiseg.viewer.damage import open_mask
from wsiseg.viewer.locate import find_slide

JPEG_QUALITY = 90


class SlideView:
    """The open slide and mask of a result; any number of threads may read it.

    What cannot be opened is left out, and said in `problems`: a mask is shown without its slide,
    and a slide without its mask.
    """

    def __init__(
        self, result: SlideResult, folders: Sequence[Path], *, nearby: Sequence[Path] = ()
    ) -> None:
        self.result = result
        self.problems = [result.error] if result.error else []
        self.slide: Slide | None = None
        self.mask: MaskReader | None = None
        try:
            self.slide = find_slide(result, folders, nearby=nearby)
        except SlideError as e:
            self.problems.append(f"The slide cannot be shown: {e}")
        try:
            self.mask = open_mask(result)
        except OutputError as e:
            self.problems.append(f"The mask cannot be shown: {e}")
        self._grids = [] if self.slide is None else _grids(self.slide)

    def close(self) -> None:
        """Release the files."""
        if self.slide is not None:
            self.slide.close()
        if self.mask is not None:
            self.mask.close()

    def info(self) -> dict[str, Any]:
        """What the page needs to know, as plain data."""
        result = self.result
        items = () if result.classes is None else tuple(result.classes.values())
        return {
            "name": result.slide or result.stem,
            "stem": result.stem,
            "status": result.status,
            "problems": self.problems,
            "size": result.size,
            "mpp": result.mpp,
            "tile_px": TILE_PX,
            "slide_levels": [_level(grid.size, grid.downsample) for grid in self._grids],
            "mask_levels": self._mask_levels(),
            "mask_mpp": result.mask_mpp,
            "classes": [
                {
                    "value": value,
                    "name": item.name,
                    "color": list(item.colour),
                    "background": item.background,
                    "mm2": result.areas_mm2.get(item.name),
                    "objects": (result.objects or {}).get(item.name),
                }
                for value, item in items
            ],
            "model": result.model,
            "model_sha256": result.model_sha256,
            "licence": result.licence,
            "tissue": result.tissue,
        }

    def slide_tile(self, level: int, column: int, row: int) -> bytes:
        """A tile of the slide as JPEG.

        Raises:
            IndexError: there is no such tile.
            SlideReadError: the slide is damaged there.
        """
        if self.slide is None or not 0 <= level < len(self._grids):
            raise IndexError(f"no level {level}")
        grid = self._grids[level]
        box = Box(column * TILE_PX, row * TILE_PX, TILE_PX, TILE_PX).intersection(grid.box)
        if column < 0 or row < 0 or box.is_empty():
            raise IndexError(f"no tile {column}, {row}")
        data = io.BytesIO()
        image = Image.fromarray(self.slide.read(box, grid))
        image.save(data, "JPEG", quality=JPEG_QUALITY)
        return data.getvalue()

    def mask_tile(self, level: int, column: int, row: int) -> bytes:
        """The labels of a tile of the mask, a byte a pixel, row by row.

        Raises:
            IndexError: there is no such tile.
            OutputError: the mask is damaged there.
        """
        if self.mask is None:
            raise IndexError("no mask")
        return self.mask.tile(level, column, row).tobytes()

    def _mask_levels(self) -> list[dict[str, Any]]:
        if self.mask is None or self.result.size is None:
            return []
        whole = self.mask.sizes[0]
        ratio = [full / part for full, part in zip(self.result.size, whole, strict=True)]
        return [
            _level(size, (ratio[0] * 2**k, ratio[1] * 2**k))
            for k, size in enumerate(self.mask.sizes)
        ]


def _grids(slide: Slide) -> list[Grid]:
    """Level 0 and its halves, until one tile holds everything."""
    grids = [slide.grid(slide.mpp)]
    while max(grids[-1].size) > TILE_PX:
        grids.append(slide.grid(slide.mpp * 2 ** len(grids)))
    return grids


def _level(size: Size, downsample: tuple[float, float]) -> dict[str, Any]:
    return {"size": list(size), "downsample": list(downsample)}
