"""The stains of a slide, and the map that makes them a model's. Knows no networks and no formats.

The slide is looked at before the run: up to 64 tissue tiles, spread evenly, at the model's
resolution. Which ones depends on nothing but slide, tissue and resolution, so neither does the
result.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from wsiseg.config import to_mapping
from wsiseg.geometry import Box, Grid, Point
from wsiseg.inference.contracts import SlideLike, TissueLike
from wsiseg.inference.reader import TileReader
from wsiseg.models.segmenter import ModelInfo
from wsiseg.stain import StainBasis, estimate_stains, normalising_matrix, stained, thinned

UInt8 = npt.NDArray[np.uint8]
SAMPLE_PX = 256
SAMPLES = 64
_PIXELS = 6000
_WORKERS, _AHEAD = 2, 6
_LEAST_SHARE = 0.1


def stain_parameters(
    slide: SlideLike,
    info: ModelInfo,
    grid: Grid,
    *,
    thumbnail: UInt8,
    tissue: TissueLike | None,
) -> dict[str, Any]:
    """How a slide's tiles are normalised for a model, as plain data for the record.

    Returns:
        Nothing for a model without stain target; else `stain_source`, the slide's stains, and
        `stain_matrix`, to be applied to the optical density of its tiles; both None where the
        stains cannot be told and the tiles stay as they are.

    Raises:
        SlideError: the slide cannot be read.
    """
    if info.stain_target is None:
        return {}
    source = slide_stains(slide, grid, thumbnail=thumbnail, tissue=tissue)
    matrix = None if source is None else normalising_matrix(source, info.stain_target).tolist()
    return {"stain_source": to_mapping(source), "stain_matrix": matrix}


def slide_stains(
    slide: SlideLike,
    grid: Grid,
    *,
    thumbnail: UInt8,
    tissue: TissueLike | None,
) -> StainBasis | None:
    """The stains of a slide's tissue; None where there is too little, or they cannot be told.

    Args:
        slide: an open slide.
        grid: its pixels at the model's resolution.
        thumbnail: (h, w, 3) uint8, a small picture of all of it.
        tissue: where to look; None looks everywhere.

    Raises:
        SlideError: the slide cannot be read.
    """
    places = sample_places(grid, thumbnail, tissue=tissue)
    pixels = [np.empty((0, 3), np.uint8)]
    with TileReader(slide, grid, tile_px=SAMPLE_PX, workers=_WORKERS, ahead=_AHEAD) as reader:
        for place, tile in zip(places, reader.tiles(places), strict=True):
            box = _inside(grid, *place)
            tile = tile[: box.height, : box.width]
            chosen = stained(tile)
            if tissue is not None:
                chosen &= tissue.region(box, grid)
            pixels.append(thinned(tile[chosen], _PIXELS))
    return estimate_stains(np.concatenate(pixels))


def sample_places(grid: Grid, thumbnail: UInt8, *, tissue: TissueLike | None) -> list[Point]:
    """Up to 64 tiles, spread evenly over those with tissue (None: with stain in the thumbnail)."""
    stain = stained(thumbnail)
    found = [
        Point(x, y)
        for y in range(0, grid.size.height, SAMPLE_PX)
        for x in range(0, grid.size.width, SAMPLE_PX)
        if (
            _share(stain, grid, x, y) >= _LEAST_SHARE
            if tissue is None
            else tissue.covers(_inside(grid, x, y), grid)
        )
    ]
    count = min(SAMPLES, len(found))
    return [found[(2 * k + 1) * len(found) // (2 * count)] for k in range(count)]


def _inside(grid: Grid, x: int, y: int) -> Box:
    return Box(x, y, SAMPLE_PX, SAMPLE_PX).intersection(grid.box)


def _share(stain: npt.NDArray[np.bool_], grid: Grid, x: int, y: int) -> float:
    """Share of the small picture's pixels under a tile that are stained."""
    box, (height, width) = _inside(grid, x, y), stain.shape
    rows = slice(box.y * height // grid.size.height, -(-box.bottom * height // grid.size.height))
    columns = slice(box.x * width // grid.size.width, -(-box.right * width // grid.size.width))
    return float(stain[rows, columns].mean())
