"""Slides and labels for the benchmarks, made cheaply from one small painted block.

Only speed and memory are measured on them, so the same block may stand in many places.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import imagecodecs
import numpy as np
import numpy.typing as npt
import tifffile
from scipy.ndimage import gaussian_filter
from stand_in_classes import CLASSES

from wsiseg.canvas import Canvas
from wsiseg.geometry import Box, Grid, Size
from wsiseg.slides.phantom import render_phantom

UInt8 = npt.NDArray[np.uint8]
TILE_PX, STEP = 256, 4
BLOCK_PX = 1024
GLASS = 243
CHUNK_PX = 512


def write_sparse_slide(path: Path, size: Size, *, mpp: float = 0.5) -> None:
    """A slide of glass with tissue on about 30 % of it: a tiled JPEG TIFF with levels by four.

    The tissue is one painted block repeated inside bands across the slide, one after the other from
    top to bottom, so that a slide twice as high is about the same slide twice. What repeats is
    encoded once.
    """
    block = tissue_block(mpp)
    sizes = [size]
    while max(sizes[-1]) > 4 * TILE_PX:
        sizes.append(Size(-(-sizes[-1].width // STEP), -(-sizes[-1].height // STEP)))
    with tifffile.TiffWriter(path, bigtiff=True) as tiff:
        for level, extent in enumerate(sizes):
            per_cm = 1e4 / (mpp * size.width / extent.width)
            tiff.write(
                _tiles(block, extent, STEP**level),
                shape=(extent.height, extent.width, 3),
                dtype=np.uint8,
                tile=(TILE_PX, TILE_PX),
                photometric="ycbcr",
                compression="jpeg",
                subsampling=(2, 2),
                resolution=(per_cm, per_cm),
                resolutionunit="CENTIMETER",
                subfiletype=1 if level else 0,
                metadata=None,
            )


def tissue_block(mpp: float) -> UInt8:
    """(BLOCK_PX, BLOCK_PX, 3) uint8 RGB from the middle of a synthetic slide."""
    size = Size(4 * BLOCK_PX, 4 * BLOCK_PX)
    box = Box(3 * BLOCK_PX // 2, 3 * BLOCK_PX // 2, BLOCK_PX, BLOCK_PX)
    return render_phantom(box, size, mpp=mpp, seed=0)[0]


def is_tissue(x: npt.NDArray[np.int64], y: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Which blocks (column, row) are tissue: 3 of every 8 columns by 4 of every 5 rows."""
    return (x % 8 >= 1) & (x % 8 < 4) & (y % 5 < 4)


def _tiles(block: UInt8, extent: Size, downsample: int) -> Iterator[bytes]:
    """Encoded tiles of one level, row by row; equal ones are encoded once."""
    small = block.reshape(
        BLOCK_PX // downsample, downsample, BLOCK_PX // downsample, downsample, 3
    ).mean(axis=(1, 3))
    small = np.asarray(small + 0.5, np.uint8)
    side = len(small)
    kept: dict[tuple[bool, int, int], bytes] = {}
    for y in range(0, extent.height, TILE_PX):
        for x in range(0, extent.width, TILE_PX):
            if side % TILE_PX:  # a tile holds parts of several blocks
                yield _jpeg(_tile(small, x, y))
                continue
            tissue = bool(is_tissue(np.array(x // side), np.array(y // side)))
            key = (tissue, x % side, y % side) if tissue else (tissue, 0, 0)
            if key not in kept:
                kept[key] = _jpeg(_tile(small, x, y))
            yield kept[key]


def _tile(small: UInt8, x: int, y: int) -> UInt8:
    """The tile of a level that begins at (x, y), from the block at that level."""
    side = len(small)
    columns, rows = np.arange(x, x + TILE_PX), np.arange(y, y + TILE_PX)
    tissue = is_tissue(columns[None] // side, rows[:, None] // side)
    if not tissue.any():
        return np.full((TILE_PX, TILE_PX, 3), GLASS, np.uint8)
    pixels = small[np.ix_(rows % side, columns % side)]
    return np.where(tissue[..., None], pixels, np.uint8(GLASS))


def _jpeg(tile: UInt8) -> bytes:
    return bytes(
        imagecodecs.jpeg8_encode(
            tile, level=85, colorspace="RGB", outcolorspace="YCBCR", subsampling="420"
        )
    )


def dense_labels(side: int, *, scale_px: float = 24.0) -> UInt8:
    """(side, side) labels 1..6 in ragged patches everywhere, which repeat without a seam."""
    rng = np.random.default_rng(0)
    fields = [
        gaussian_filter(rng.standard_normal((side, side), np.float32), scale_px, mode="wrap")
        for _ in range(len(CLASSES))
    ]
    return np.argmax(fields, axis=0).astype(np.uint8) + np.uint8(1)


def sparse_labels(side: int, *, one_piece: bool = False) -> UInt8:
    """(side, side) labels of tissue on about 30 %: patches of classes inside, 0 outside.

    The tissue of one block repeated is islands, with `one_piece` joined by bridges of a hundredth
    of its side.
    """
    block = dense_labels(side)
    axis = np.arange(side) * 8 // side
    inside = (axis[:, None] < 5) & (axis[None] >= 1) & (axis[None] < 5)
    if one_piece:
        bridge = np.arange(side) % (side // 2) < side // 100
        inside |= bridge[:, None] | bridge[None]
    return block * inside


def fill_canvas(path: Path, size: Size, block: UInt8, *, mpp: float = 0.5) -> Canvas:
    """A complete canvas whose labels are a square block repeated; its side is whole chunks.

    Confidences are 200 where there is a label.
    """
    canvas = Canvas.create(
        path, grid=Grid.at_mpp(size, mpp, mpp), classes=CLASSES, record={}, chunk_px=CHUNK_PX
    )
    side = len(block)
    for row, column in canvas.chunks():
        box = canvas.chunk_box(row, column)
        y, x = box.y % side, box.x % side
        labels = block[y : y + box.height, x : x + box.width]
        canvas.write_chunk(row, column, labels, (labels > 0) * np.uint8(200))
    canvas.update_record(status="ok")
    return canvas
