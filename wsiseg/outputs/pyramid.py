"""The mask as a pyramid that QuPath, OpenSlide, tiffslide and tifffile open. Knows no polygons.

One file with two ways to its reduced levels: as SubIFDs of the first page, which OME readers
(Bio-Formats, QuPath) follow, and again as further pages marked as reduced images, which
OpenSlide and libtiff readers follow. Labels are stored as they are (palette, no predictor, no
lossy compression), so every reader that gives values gives the labels.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import IO, Any
from xml.sax.saxutils import quoteattr

import imagecodecs
import numpy as np
import numpy.typing as npt
import tifffile

from wsiseg import __version__
from wsiseg.atomic import staged
from wsiseg.canvas import Canvas
from wsiseg.errors import UsageError
from wsiseg.geometry import Box, Size

UInt8 = npt.NDArray[np.uint8]
TILE_PX = 512

# name: (tifffile's name, encoder of one tile). deflate is the zlib stream of TIFF's code 8.
_CODECS: dict[str, tuple[str, Callable[..., Any]]] = {
    "deflate": ("zlib", partial(imagecodecs.deflate_encode, level=6)),
    "lzw": ("lzw", imagecodecs.lzw_encode),
    "zstd": ("zstd", partial(imagecodecs.zstd_encode, level=3)),
}
COMPRESSIONS = tuple(_CODECS)


def write_pyramid(path: str | Path, canvas: Canvas, *, compression: str = "deflate") -> None:
    """Write the labels of a canvas as `<slide>.mask.ome.tif`.

    BigTIFF, uint8, one sample, 512 px tiles; levels by 2 (nearest: a reduced level holds only
    labels that are there) down to 512 px or less; palette of the class colours, with value 0
    (not analysed) white like the glass of a slide.

    Memory bound: a few rows of tiles of the full width, whatever the height. The compressed
    reduced levels wait in a temporary file.

    Args:
        path: the file; it appears when it is complete.
        canvas: the labels.
        compression: deflate, lzw or zstd (which Bio-Formats and so QuPath may not read).

    Raises:
        UsageError: another compression.
        OutputError: the file cannot be written.
    """
    if compression not in _CODECS:
        raise UsageError(f"compression {compression!r}: choose from {', '.join(COMPRESSIONS)}")
    if compression == "zstd":
        warnings.warn("zstd masks do not open in QuPath's Bio-Formats; deflate does", stacklevel=2)
    path = Path(path)
    with (
        staged(path) as (temporary,),
        tempfile.TemporaryFile(dir=temporary.parent) as spool,
        ThreadPoolExecutor(2) as pool,
    ):
        _write(temporary, canvas, compression, _Cascade(canvas, compression, spool, pool))


def level_sizes(size: Size) -> list[Size]:
    """Sizes of all levels: halved, rounded up, until both sides are 512 px or less."""
    sizes = [size]
    while max(sizes[-1]) > TILE_PX:
        sizes.append(Size(-(-sizes[-1].width // 2), -(-sizes[-1].height // 2)))
    return sizes


def _write(path: Path, canvas: Canvas, compression: str, cascade: _Cascade) -> None:
    sizes = level_sizes(canvas.grid.size)
    colours = canvas.classes.lookup()
    colours[0] = 255
    common: dict[str, Any] = {
        "dtype": np.uint8,
        "tile": (TILE_PX, TILE_PX),
        "photometric": "palette",
        "colormap": colours.T.astype(np.uint16) * 257,
        "compression": _CODECS[compression][0],
        "resolutionunit": "CENTIMETER",
        "metadata": None,
    }

    def page(level: int, tiles: Iterable[bytes], **more: Any) -> None:
        width, height = sizes[level]
        mpp_x = canvas.grid.mpp_x * sizes[0].width / width
        mpp_y = canvas.grid.mpp_y * sizes[0].height / height
        resolution = (1e4 / mpp_x, 1e4 / mpp_y)
        tiff.write(iter(tiles), shape=(height, width), resolution=resolution, **common, **more)

    with tifffile.TiffWriter(path, bigtiff=True, ome=False, byteorder="<") as tiff:
        page(
            0,
            cascade.full_size(),
            subifds=len(sizes) - 1,
            description=_ome_xml(canvas).encode(),
            software=f"wsiseg {__version__}",
        )
        for level in range(1, len(sizes)):  # these become the SubIFDs
            page(level, cascade.reduced(level), subfiletype=1)
        for level in range(1, len(sizes)):
            page(level, cascade.reduced(level), subfiletype=1)


def _ome_xml(canvas: Canvas) -> str:
    grid = canvas.grid
    name = str(canvas.record.get("slide", {}).get("path", canvas.path.stem))
    return (
        '<?xml version="1.0" encoding="UTF-8"?>'
        '<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" '
        'xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance" '
        'xsi:schemaLocation="http://www.openmicroscopy.org/Schemas/OME/2016-06 '
        'http://www.openmicroscopy.org/Schemas/OME/2016-06/ome.xsd" '
        f'Creator="wsiseg {__version__}">'
        f'<Image ID="Image:0" Name={quoteattr(name)}>'
        '<Pixels ID="Pixels:0" DimensionOrder="XYCZT" Type="uint8" '
        f'SizeX="{grid.size.width}" SizeY="{grid.size.height}" SizeC="1" SizeZ="1" SizeT="1" '
        f'PhysicalSizeX="{grid.mpp_x!r}" PhysicalSizeXUnit="µm" '
        f'PhysicalSizeY="{grid.mpp_y!r}" PhysicalSizeYUnit="µm" BigEndian="false">'
        '<Channel ID="Channel:0:0" Name="class" SamplesPerPixel="1"/>'
        '<TiffData IFD="0" PlaneCount="1"/>'
        "</Pixels></Image></OME>"
    )


class _Cascade:
    """Compressed tiles of all levels from one pass over the canvas.

    Reading `full_size` to its last tile also fills the reduced levels, a row of tiles at a time:
    each complete row of tiles of a level gives half a row of the next.
    """

    def __init__(
        self, canvas: Canvas, compression: str, spool: IO[bytes], pool: ThreadPoolExecutor
    ) -> None:
        self._canvas = canvas
        self._encode = _CODECS[compression][1]
        self._spool = spool
        self._pool = pool
        self._sizes = level_sizes(canvas.grid.size)
        self._waiting: list[list[UInt8]] = [[] for _ in self._sizes]
        self._index: list[list[tuple[int, int]]] = [[] for _ in self._sizes]
        self._plain: dict[int, bytes] = {}

    def full_size(self) -> Iterator[bytes]:
        """Tiles of level 0, row by row."""
        width, height = self._canvas.grid.size
        for y in range(0, height, TILE_PX):
            rows = self._canvas.labels(Box(0, y, width, min(TILE_PX, height - y)))
            tiles = self._tiles(rows)
            self._reduce(1, rows)
            if y + TILE_PX >= height:
                for level in range(1, len(self._sizes)):
                    self._flush(level)
            yield from tiles  # last: the reader may stop at the last tile

    def reduced(self, level: int) -> Iterator[bytes]:
        """Tiles of a reduced level, once level 0 has been read."""
        for offset, count in self._index[level]:
            self._spool.seek(offset)
            yield self._spool.read(count)

    def _reduce(self, level: int, rows: UInt8) -> None:
        if level < len(self._sizes):
            self._waiting[level].append(rows[::2, ::2].copy())
            if sum(len(r) for r in self._waiting[level]) == TILE_PX:
                self._flush(level)

    def _flush(self, level: int) -> None:
        if not self._waiting[level]:
            return
        rows = np.concatenate(self._waiting[level])
        self._waiting[level].clear()
        for tile in self._tiles(rows):
            offset = self._spool.seek(0, 2)
            self._index[level].append((offset, self._spool.write(tile)))
        self._reduce(level + 1, rows)

    def _tiles(self, rows: UInt8) -> Iterator[bytes]:
        starts = range(0, rows.shape[1], TILE_PX)
        return self._pool.map(self._tile, (rows[:, x : x + TILE_PX] for x in starts))

    def _tile(self, part: UInt8) -> bytes:
        """One tile, compressed; padded with 0 at the right and bottom edges of the image."""
        full = part.shape == (TILE_PX, TILE_PX)
        value = int(part[0, 0])
        if full and bool((part == value).all()):
            if value not in self._plain:
                self._plain[value] = bytes(self._encode(np.ascontiguousarray(part)))
            return self._plain[value]
        tile = part if full else np.zeros((TILE_PX, TILE_PX), np.uint8)
        if not full:
            tile[: part.shape[0], : part.shape[1]] = part
        return bytes(self._encode(np.ascontiguousarray(tile)))
