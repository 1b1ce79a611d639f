"""Where the chunks (TIFF tiles) of a pyramid lie and how they are decoded. Knows no OpenSlide.

TIFF 6.0 section 15 (tiles), Adobe's TIFF Technical Note 2 (JPEG, compression 7: tables shared by
the chunks of a level, colours as PhotometricInterpretation says and not as the stream seems), and
Aperio's JPEG 2000 code streams (compression 33003: YCbCr, 33005: RGB).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import imagecodecs
import numpy as np
import numpy.typing as npt
import simplejpeg
import tifffile

from wsiseg.errors import SlideError
from wsiseg.geometry import Box, Size
from wsiseg.slides.backend_base import TIFF_ERRORS, NotThisBackend, UInt8
from wsiseg.slides.stream_size import jpeg_segments, stated_size
from wsiseg.slides.tiff_check import check_tiff

_JPEG, _J2K_YCBCR, _J2K_RGB = 7, 33003, 33005
_RGB, _YCBCR = 2, 6
_APP0, _APP14 = 0xE0, 0xEE
_MAX_CHUNK_PX = 4096
# Tags that must have one value, or be absent where a default is given with None.
_REQUIRED: dict[str, tuple[object, ...]] = {
    "BitsPerSample": ((8, 8, 8), 8),
    "SamplesPerPixel": (3,),
    "PlanarConfiguration": (1, None),
    "SampleFormat": ((1, 1, 1), 1, None),
    "FillOrder": (1, None),
    "Orientation": (1, None),
    "ImageDepth": (1, None),
    "TileDepth": (1, None),
    "Compression": (_JPEG, _J2K_YCBCR, _J2K_RGB),
    "PhotometricInterpretation": (_RGB, _YCBCR),
}


class ChunkError(Exception):
    """A chunk that cannot be decoded (inside this room only)."""


@dataclass(frozen=True)
class ChunkTable:
    """The chunks of a level.

    Attributes:
        size: size of the level.
        chunk: size of every chunk; those at the right and bottom edge reach beyond the level.
        offsets: (n,) int64, place of each chunk in the file, row by row.
        lengths: (n,) int64, bytes of each chunk.
        compression: 7, 33003 or 33005.
        photometric: 2 (RGB) or 6 (YCbCr).
        jpeg_tables: what the JPEG streams of the level share; None where each is whole.
    """

    size: Size
    chunk: Size
    offsets: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]
    compression: int
    photometric: int
    jpeg_tables: bytes | None

    @property
    def is_jpeg(self) -> bool:
        """Whether the chunks are JPEG streams, else JPEG 2000 code streams."""
        return self.compression == _JPEG

    @property
    def columns(self) -> int:
        """Chunks in a row."""
        return -(-self.size.width // self.chunk.width)

    def box(self, number: int) -> Box:
        """The pixels of a chunk that lie inside the level."""
        row, column = divmod(number, self.columns)
        whole = Box(column * self.chunk.width, row * self.chunk.height, *self.chunk)
        return whole.intersection(Box(0, 0, *self.size))

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the pixels of a chunk."""
        return (self.chunk.height, self.chunk.width, 3)

    def decode(self, data: bytes, pixels: UInt8) -> None:
        """Fill `pixels`, uint8 of `shape`, with the RGB of the bytes of a chunk.

        Whatever libjpeg warns of is an error, as it is to OpenSlide.

        Raises:
            ChunkError: they cannot be decoded, or are of another size.
        """
        try:
            if self.is_jpeg:
                simplejpeg.decode_jpeg(self._whole_jpeg(data), "RGB", buffer=pixels, strict=True)
                return
            if stated_size(data) != self.chunk:
                raise ChunkError("a stream of another size")
            found = imagecodecs.jpeg2k_decode(data)
        except (RuntimeError, ValueError, TypeError, MemoryError) as e:
            raise ChunkError(str(e)) from e
        if found.shape != self.shape or found.dtype != np.uint8:
            raise ChunkError(f"a chunk holds {found.dtype} {found.shape}, not uint8 {self.shape}")
        pixels[:] = _from_ycbcr(found) if self.compression == _J2K_YCBCR else found

    def _whole_jpeg(self, data: bytes) -> bytes:
        """The stream with the tables of its level and with its colours as the tag says.

        Raises:
            ChunkError: it has another size, or says itself that its colours are others.
        """
        scan = data.find(b"\xff\xda")
        head = _whole_head(data[: scan + 2], self.jpeg_tables, self.photometric, self.chunk)
        return head + data[scan + 2 :]


@lru_cache(maxsize=256)  # most chunks of a level begin alike
def _whole_head(head: bytes, tables: bytes | None, photometric: int, chunk: Size) -> bytes:
    """What a JPEG stream is to begin with, up to the marker of its scan.

    Adobe's marker (T.872, 6.5.3) tells libjpeg how colours are stored; a later one would be
    believed instead, and JFIF's says YCbCr.

    Raises:
        ChunkError: a marker says something else, the size is another, or there is no scan.
    """
    ycbcr = photometric == _YCBCR
    whole = head[:2] + (tables[2:-2] if tables else b"") + head[2:]
    place = 0
    for marker, place in jpeg_segments(whole):
        name = whole[place + 4 : place + 9]
        if marker == _APP0 and name == b"JFIF\0" and not ycbcr:
            raise ChunkError("a stream of other colours")
        if (
            marker == _APP14
            and name == b"Adobe"
            and whole[place + 15 : place + 16] != bytes([ycbcr])
        ):
            raise ChunkError("a stream of other colours")
    if place != len(whole) - 2 or stated_size(whole) != chunk:
        raise ChunkError("a stream of another size, or without a scan")
    return whole[:-2] + b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0" + bytes([ycbcr]) + whole[-2:]


def read_tables(path: Path) -> list[ChunkTable]:
    """The levels of a TIFF that can be read chunk by chunk, in the order of the file.

    Raises:
        NotThisBackend: it is no TIFF that can be read, or lacks some chunk: what a viewer shows
            there is a matter of its own.
    """
    try:
        check_tiff(path)
        with tifffile.TiffFile(path) as tiff:
            pages = [page for page in tiff.pages if page.is_tiled]
            if any(0 in page.databytecounts or 0 in page.dataoffsets for page in pages):
                raise NotThisBackend
            return [_table(page) for page in pages if _qualifies(page)]
    except (SlideError, tifffile.TiffFileError, *TIFF_ERRORS) as e:
        raise NotThisBackend from e


def _qualifies(page: tifffile.TiffPage) -> bool:
    for name, allowed in _REQUIRED.items():
        tag = page.tags.get(name)
        if (None if tag is None else tag.value) not in allowed:
            return False
    if not (0 < page.tilewidth <= _MAX_CHUNK_PX and 0 < page.tilelength <= _MAX_CHUNK_PX):
        return False
    count = -(-page.imagewidth // page.tilewidth) * -(-page.imagelength // page.tilelength)
    return bool(len(page.dataoffsets) == len(page.databytecounts) == count)


def _table(page: tifffile.TiffPage) -> ChunkTable:
    return ChunkTable(
        size=Size(page.imagewidth, page.imagelength),
        chunk=Size(page.tilewidth, page.tilelength),
        offsets=np.asarray(page.dataoffsets, np.int64),
        lengths=np.asarray(page.databytecounts, np.int64),
        compression=int(page.compression),
        photometric=int(page.photometric),
        jpeg_tables=page.jpegtables,
    )


@lru_cache(maxsize=1)
def _chroma_tables() -> tuple[npt.NDArray[np.int16], ...]:
    """What chroma adds to red (256,), green (256, 256) by [Cb, Cr], blue (256,): JFIF 1.02.

    Green is summed in 1/65536, as decoders do, which settles ties as OpenSlide does.
    """
    c = np.arange(256) - 128.0
    red, blue = np.round(1.402 * c), np.round(1.772 * c)
    by_cb, by_cr = (np.round(65536 * f * c).astype(np.int64) for f in (-0.34414, -0.71414))
    green = (by_cb[:, None] + by_cr[None, :] + 32768) >> 16
    return red.astype(np.int16), green.astype(np.int16), blue.astype(np.int16)


def _from_ycbcr(pixels: UInt8) -> UInt8:
    red, green, blue = _chroma_tables()
    y, cb, cr = pixels[..., 0].astype(np.int16), pixels[..., 1], pixels[..., 2]
    rgb = np.stack([y + red[cr], y + green[cb, cr], y + blue[cb]], -1)
    return np.clip(rgb, 0, 255).astype(np.uint8)
