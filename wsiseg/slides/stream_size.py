"""What a compressed image states of itself, before it is decoded. Knows no files.

ITU-T T.81 (JPEG) annex B: the frame header; ITU-T T.800 (JPEG 2000) annex A: the SIZ segment.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from wsiseg.geometry import Size

_JPEG, _JPEG2000 = b"\xff\xd8", b"\xff\x4f\xff\x51"  # start of image; start of stream, and SIZ
SCAN = 0xDA
_NO_FRAME = (0xC4, 0xC8, 0xCC)  # of C0 .. CF: Huffman tables, reserved, arithmetic coding


def stated_size(data: bytes) -> Size | None:
    """Width and height of a JPEG or JPEG 2000 stream; None of others, and where it states none."""
    if data.startswith(_JPEG):
        return _jpeg_size(data)
    place = data.find(_JPEG2000, 0, 1 << 16)
    if place < 0 or len(data) < place + 24:
        return None
    right, bottom, left, top = struct.unpack_from(">4I", data, place + 8)
    return Size(right - left, bottom - top)


def jpeg_segments(data: bytes) -> Iterator[tuple[int, int]]:
    """Marker and place of each segment up to the first scan; ends early where there is none."""
    place = 2
    while place + 2 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if marker == 0xFF:  # fill
            place += 1
            continue
        yield marker, place
        if marker == SCAN:
            return
        if 0xD0 <= marker <= 0xD9 or marker == 0x01:  # without a length
            place += 2
        else:
            place += 2 + max(2, int.from_bytes(data[place + 2 : place + 4], "big"))


def _jpeg_size(data: bytes) -> Size | None:
    for marker, place in jpeg_segments(data):
        if 0xC0 <= marker <= 0xCF and marker not in _NO_FRAME and place + 9 <= len(data):
            height, width = struct.unpack_from(">HH", data, place + 5)
            return Size(width, height)
    return None
