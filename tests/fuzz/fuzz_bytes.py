"""Damage to the bytes of a file, of any kind and of TIFF directories. Knows no wsiseg."""

from __future__ import annotations

import random
import struct
from typing import NamedTuple

NUMBERS = (0, 1, 2, 7, 255, 256, 65535, 65536, 10**6, 2**24, 2**31 - 1, 2**31, 2**32 - 1)
"""Values for header fields, of which most are absurd in most of them."""
TAGS = (256, 257, 258, 259, 262, 270, 273, 277, 278, 279, 282, 284, 296, 317, 322, 323, 324, 325)
"""The TIFF tags that decide how much is read, and from where."""
TYPES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 16: 8, 17: 8}
"""Bytes of the TIFF field types."""


def damage(data: bytes, rng: random.Random) -> bytes:
    """Bytes with one to three of: cut, flipped bits, overwritten, spliced, doubled."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        data = rng.choice((_cut, _flip, _flip, _flip, _fill, _splice, _double, _number))(data, rng)
    return data


def _cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def _flip(data: bytes, rng: random.Random) -> bytes:
    if not data:
        return data
    changed = bytearray(data)
    near = rng.choice((len(data), min(len(data), 512)))  # half of them in the header
    for _ in range(rng.choice((1, 1, 4, 32))):
        changed[rng.randrange(near)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _fill(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data) + 1)
    length = rng.choice((1, 4, 16, 400))
    return data[:start] + rng.choice((b"\0", b"\xff", b"A")) * length + data[start + length :]


def _splice(data: bytes, rng: random.Random) -> bytes:
    """Copy a piece of the file over another place of it."""
    start, place = rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)
    piece = data[start : start + rng.choice((4, 64, 1000))]
    return data[:place] + piece + data[place + len(piece) :]


def _double(data: bytes, rng: random.Random) -> bytes:
    """Insert a piece of the file again, so that all that follows moves."""
    start = rng.randrange(len(data) + 1)
    stop = min(len(data), start + rng.choice((1, 12, 500)))
    return data[:stop] + data[start:stop] + data[stop:]


def _number(data: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(data) + 1)
    form = rng.choice(("<H", "<I", "<Q", ">I"))
    value = rng.choice(NUMBERS) % (1 << 8 * struct.calcsize(form))
    number = struct.pack(form, value)
    return data[:place] + number + data[place + len(number) :]


class Directory(NamedTuple):
    """A TIFF directory: places of its entries, and of the pointer to the next one."""

    place: int
    entries: list[int]
    following: int


class Tiff:
    """The directories of a TIFF in memory, to be changed; little-endian, classic or BigTIFF."""

    def __init__(self, data: bytes) -> None:
        self.data = bytearray(data)
        self.big = data[2] == 43
        self.offset = "<Q" if self.big else "<I"
        self.directories: list[Directory] = []
        place = self._get(self.offset, 8 if self.big else 4)
        while place:
            self.directories.append(self._directory(place))
            place = self._get(self.offset, self.directories[-1].following)

    def _get(self, form: str, place: int) -> int:
        value: int = struct.unpack_from(form, self.data, place)[0]
        return value

    def put(self, form: str, place: int, value: int) -> None:
        """Write a number, as much of it as fits."""
        struct.pack_into(form, self.data, place, value % (1 << 8 * struct.calcsize(form)))

    def _directory(self, place: int) -> Directory:
        form, entry = ("<Q", 20) if self.big else ("<H", 12)
        first = place + struct.calcsize(form)
        entries = [first + i * entry for i in range(self._get(form, place))]
        return Directory(place, entries, first + len(entries) * entry)

    def entry(self, directory: Directory, tag: int) -> int | None:
        """The place of the entry of a tag."""
        return next((e for e in directory.entries if self._get("<H", e) == tag), None)

    def set_value(self, entry: int, value: int) -> None:
        """Give the entry one number, kept as a LONG so that large ones fit."""
        self.put("<H", entry + 2, 16 if self.big else 4)
        self.put(self.offset, entry + 4, 1)
        self.put(self.offset, entry + (12 if self.big else 8), value)


def damage_tiff(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """A TIFF with one to three fields of its directories changed, and what was done."""
    tiff = Tiff(data)
    done = [_damage_directory(tiff, rng) for _ in range(rng.choice((1, 1, 2, 3)))]
    return bytes(tiff.data), ", ".join(done)


def _damage_directory(tiff: Tiff, rng: random.Random) -> str:
    directory = rng.choice(tiff.directories)
    known = [e for e in directory.entries if tiff._get("<H", e) in TAGS] or directory.entries
    entry = rng.choice(known)
    tag = tiff._get("<H", entry)
    what = rng.randrange(8)
    if what == 0:
        target = rng.choice([directory.place, *(d.place for d in tiff.directories), 7, 2**31])
        tiff.put(tiff.offset, directory.following, target)
        return f"next directory at {target}"
    if what == 1:
        tiff.put("<H", entry, rng.choice((0, 40000, 65535, rng.choice(TAGS))))
        return f"tag {tag} missing"
    if what == 2:
        tiff.put("<H", entry + 2, rng.choice((0, 1, 2, 5, 7, 12, 13, 99)))
        return f"tag {tag} of another type"
    if what == 3:
        count = rng.choice(NUMBERS)
        tiff.put(tiff.offset, entry + 4, count)
        return f"tag {tag} with {count} values"
    if what == 4:
        tiff.put(tiff.offset, entry + (12 if tiff.big else 8), rng.choice(NUMBERS))
        return f"tag {tag} elsewhere"
    if what == 5:
        tiff.put("<Q" if tiff.big else "<H", directory.place, rng.choice((0, 1, 65535, 2**40)))
        return "absurd number of entries"
    value = rng.choice(NUMBERS)
    tiff.set_value(entry, value)
    return f"tag {tag} = {value}"
