"""Writes synthetic slides as pyramidal TIFF, with their truth. Knows how to pack, not to paint.

Memory bound: two tile rows (256 px) per level of the pyramid, 0.4 GB for a slide of 50,000 px
width, whatever its height. Reduced levels are encoded beside level 0 into temporary files in the
folder of the output, and copied behind it at the end.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO

import imagecodecs
import numpy as np
import numpy.typing as npt
import tifffile

from wsiseg.errors import OutputError, UsageError
from wsiseg.geometry import Box, Size
from wsiseg.slides.phantom_render import render_phantom

__all__ = ["render_phantom", "write_phantom"]

UInt8 = npt.NDArray[np.uint8]
Progress = Callable[[int, int], None]
_TILE_PX = 256
_LAST_LEVEL_PX = 512
_REPEAT_PX = 1024
_QUALITY = 85


def write_phantom(
    path: str | Path,
    size: Size,
    *,
    mpp: float = 0.5,
    seed: int = 0,
    truth: str | Path | None = None,
    progress: Progress | None = None,
) -> None:
    """Write a synthetic H&E colon slide.

    The slide is a tiled JPEG TIFF with levels by x2 down to 512 px, the resolution in its tags.
    The truth is a tiled DEFLATE TIFF of the same levels, uint8: 0 glass, 1 stroma, 2 gland with
    its lumen. The same arguments give the same pixels.

    Args:
        path: the slide to write.
        size: level 0 in pixels.
        mpp: micrometres per pixel, 0.1 .. 4.
        seed: a whole number >= 0 that decides everything.
        truth: the truth to write, None for none.
        progress: called with (tile rows done, tile rows) after each.

    Raises:
        UsageError: a size, mpp or seed that cannot be.
        OutputError: a file cannot be written; nothing is left behind then.
    """
    path, size = Path(path), Size(*size)
    truth = None if truth is None else Path(truth)
    _check(path, size, mpp=mpp, seed=seed, truth=truth)
    try:
        with ExitStack() as stack:
            image = _Pyramid(path, size, _ImageCodec(), stack)
            marks = None if truth is None else _Pyramid(truth, size, _LabelCodec(), stack)
            rows = _tile_rows(size, mpp=mpp, seed=seed)
            for done, (rgb, labels) in enumerate(rows, start=1):
                image.add_row(rgb)
                if marks is not None:
                    marks.add_row(labels)
                if progress is not None:
                    progress(done, -(-size.height // _TILE_PX))
            for pyramid in (image, marks):
                if pyramid is not None:
                    pyramid.save(mpp)
            for pyramid in (image, marks):
                if pyramid is not None:
                    pyramid.publish()
    except OSError as e:
        raise OutputError(f"{path}: cannot be written ({e.strerror or e})") from e


def _check(path: Path, size: Size, *, mpp: float, seed: int, truth: Path | None) -> None:
    if min(size) < 1 or max(size) > 1_000_000:
        raise UsageError(f"a slide of {size.width} x {size.height} px cannot be; use 1 .. 1000000")
    if not 0.1 <= mpp <= 4:
        raise UsageError(f"a phantom is painted at 0.1 to 4 um per pixel, not {mpp}")
    if seed < 0:
        raise UsageError(f"the seed must be 0 or more, not {seed}")
    for file in (path, truth):
        if file is not None and not file.absolute().parent.is_dir():
            raise OutputError(f"{file}: the folder does not exist; make it first")
        if file is not None and file.is_dir():
            raise OutputError(f"{file}: is a folder; give a file name")
    if truth is not None and truth.absolute() == path.absolute():
        raise UsageError("the slide and its truth need two file names")


def _tile_rows(size: Size, *, mpp: float, seed: int) -> Iterator[tuple[UInt8, UInt8]]:
    """Rows of tiles of level 0, padded to whole tiles: (256, w, 3) RGB and (256, w) labels."""
    width = -(-size.width // _TILE_PX) * _TILE_PX
    rgb = np.empty((_TILE_PX, width, 3), np.uint8)
    labels = np.empty((_TILE_PX, width), np.uint8)
    for y in range(0, size.height, _TILE_PX):
        for x in range(0, width, _REPEAT_PX):
            part = Box(x, y, min(_REPEAT_PX, width - x), _TILE_PX)
            columns = slice(part.x, part.right)
            rgb[:, columns], labels[:, columns] = render_phantom(part, size, mpp=mpp, seed=seed)
        yield rgb, labels


class _ImageCodec:
    """JPEG tiles of RGB. Tiles that occur often (glass) are encoded once."""

    def __init__(self) -> None:
        self._kept: dict[bytes, bytes] = {}

    def encode(self, tile: UInt8) -> bytes:
        key = tile.tobytes() if tile[::32, ::32].min() > 225 else None
        if key is not None and key in self._kept:
            return self._kept[key]
        data = bytes(
            imagecodecs.jpeg8_encode(
                tile,
                level=_QUALITY,
                colorspace="RGB",
                outcolorspace="YCBCR",
                subsampling="420",
            )
        )
        if key is not None and len(self._kept) < 64:
            self._kept[key] = data
        return data

    @staticmethod
    def halve(rows: UInt8) -> UInt8:
        """Means of 2 x 2 pixels, rounded."""
        wide = rows.astype(np.uint16)
        total = wide[::2] + wide[1::2]
        return np.asarray((total[:, ::2] + total[:, 1::2] + 2) >> 2, np.uint8)

    shape: tuple[int, ...] = (3,)
    tags = {  # noqa: RUF012
        "photometric": "ycbcr",
        "compression": "jpeg",
        "subsampling": (2, 2),
    }


class _LabelCodec:
    """DEFLATE tiles of labels."""

    def encode(self, tile: UInt8) -> bytes:
        return bytes(imagecodecs.zlib_encode(tile.tobytes(), level=6))

    @staticmethod
    def halve(rows: UInt8) -> UInt8:
        """Every second pixel."""
        return rows[::2, ::2]

    shape: tuple[int, ...] = ()
    tags = {"photometric": "minisblack", "compression": "adobe_deflate"}  # noqa: RUF012


class _Pyramid:
    """A TIFF pyramid that is filled row of tiles by row of tiles."""

    def __init__(
        self, path: Path, size: Size, codec: _ImageCodec | _LabelCodec, stack: ExitStack
    ) -> None:
        self._path = path
        self._part = path.with_name(f".{path.name}.part")
        self._codec = codec
        self._sizes = [size]
        while max(self._sizes[-1]) > _LAST_LEVEL_PX:
            last = self._sizes[-1]
            self._sizes.append(Size(-(-last.width // 2), -(-last.height // 2)))
        folder = path.absolute().parent
        temporary = (tempfile.TemporaryFile(dir=folder) for _ in self._sizes)  # noqa: SIM115
        self._spools: list[IO[bytes]] = [stack.enter_context(file) for file in temporary]
        self._lengths: list[list[int]] = [[] for _ in self._sizes]
        self._held: list[UInt8 | None] = [None for _ in self._sizes]
        self._rows_done = [0 for _ in self._sizes]
        stack.callback(self._part.unlink, missing_ok=True)

    def add_row(self, rows: UInt8) -> None:
        """Take the next 256 rows of level 0, padded to whole tiles."""
        self._add(0, rows)

    def save(self, mpp: float) -> None:
        """Write all levels under a temporary name."""
        big = sum(map(sum, self._lengths)) > 3 << 30
        with tifffile.TiffWriter(self._part, bigtiff=big) as tiff:
            for level, size in enumerate(self._sizes):
                per_cm = 1e4 / (mpp * self._sizes[0].width / size.width)
                tiff.write(
                    self._tiles(level),
                    shape=(size.height, size.width, *self._codec.shape),
                    dtype=np.uint8,
                    tile=(_TILE_PX, _TILE_PX),
                    resolution=(per_cm, per_cm),
                    resolutionunit="CENTIMETER",
                    subfiletype=1 if level else 0,
                    software="wsiseg",
                    metadata=None,
                    **self._codec.tags,
                )

    def publish(self) -> None:
        """Give the file its name."""
        self._part.replace(self._path)

    def _add(self, level: int, rows: UInt8) -> None:
        size = self._sizes[level]
        rows = _pad(rows, size, self._rows_done[level])
        self._rows_done[level] += _TILE_PX
        for x in range(0, rows.shape[1], _TILE_PX):
            data = self._codec.encode(np.ascontiguousarray(rows[:, x : x + _TILE_PX]))
            self._spools[level].write(data)
            self._lengths[level].append(len(data))
        if level + 1 == len(self._sizes):
            return
        half = self._codec.halve(rows)
        held, self._held[level] = self._held[level], None
        if held is not None:
            self._add(level + 1, np.concatenate([held, half]))
        elif self._rows_done[level] >= size.height:
            self._add(level + 1, np.concatenate([half, half]))
        else:
            self._held[level] = half.copy()

    def _tiles(self, level: int) -> Iterator[bytes]:
        spool = self._spools[level]
        spool.seek(0)
        for length in self._lengths[level]:
            yield spool.read(length)


def _pad(rows: UInt8, size: Size, done: int) -> UInt8:
    """The rows cut to the level and padded to whole tiles with its last row and column."""
    height = min(_TILE_PX, size.height - done)
    width = math.ceil(size.width / _TILE_PX) * _TILE_PX
    if height == _TILE_PX and size.width == rows.shape[1] == width:
        return rows
    y = np.minimum(np.arange(_TILE_PX), height - 1)
    x = np.minimum(np.arange(width), size.width - 1)
    return rows[y][:, x]
