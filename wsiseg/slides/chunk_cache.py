"""Decoded chunks shared by threads, least recently used out first. Knows no files."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from math import prod

import numpy as np
import numpy.typing as npt

UInt8 = npt.NDArray[np.uint8]
Key = tuple[int, int]
Shape = tuple[int, ...]


class ChunkCache:
    """Keeps decoded chunks in a block of memory; any thread may ask.

    The block is got once and divided into places, which are used again: to let the system find and
    clear new pages for every chunk takes nearly as long as to decode it. A chunk that several
    threads want at once is decoded by the first and awaited by the others.

    Memory bound: the places that fit into `limit_bytes`, of which only those are touched that were
    ever needed; beside it, chunks that threads hold while all places are held.
    """

    def __init__(self, limit_bytes: int, chunk_bytes: int) -> None:
        """For chunks of at most `chunk_bytes`."""
        self.places = limit_bytes // chunk_bytes
        self._block = np.empty((self.places, chunk_bytes), np.uint8)
        self._free = list(range(self.places))[::-1]
        self._entries: OrderedDict[Key, _Entry] = OrderedDict()
        self._lock = threading.Lock()

    @contextmanager
    def chunk(self, key: Key, shape: Shape, decode: Callable[[UInt8], object]) -> Iterator[UInt8]:
        """The chunk of a key, not to be written to, for the time of a `with` block.

        The chunk that is kept, else an array of that shape, once `decode` has filled it.

        Raises:
            BaseException: whatever `decode` raised, in every thread that waited for it; nothing is
                kept then, and the next call decodes anew.
        """
        with self._lock:
            entry = self._entries.get(key)
            begun = entry is not None
            if entry is None:
                entry = self._entries[key] = self._new(shape)
            self._entries.move_to_end(key)
            entry.holders += 1
        try:
            if not begun:
                self._fill(key, entry, decode)
            entry.ready.result()
            yield entry.pixels
        finally:
            with self._lock:
                entry.holders -= 1
                if entry.place is None and self._entries.get(key) is entry:
                    del self._entries[key]
                elif entry.failed and not entry.holders and entry.place is not None:
                    self._free.append(entry.place)

    def _new(self, shape: Shape) -> _Entry:
        """An entry in a free place, or that of the chunk not held that was used longest ago."""
        if not self._free:
            oldest = next((k for k, e in self._entries.items() if not e.holders), None)
            if oldest is None:
                return _Entry(None, np.empty(shape, np.uint8))
            place = self._entries.pop(oldest).place
        else:
            place = self._free.pop()
        return _Entry(place, self._block[place, : prod(shape)].reshape(shape))

    def _fill(self, key: Key, entry: _Entry, decode: Callable[[UInt8], object]) -> None:
        try:
            decode(entry.pixels)
        except BaseException as e:
            with self._lock:
                entry.failed = True
                if self._entries.get(key) is entry:
                    del self._entries[key]
            entry.ready.set_exception(e)
        else:
            entry.ready.set_result(None)


class _Entry:
    """A chunk and the place of its pixels in the block; None: pixels of its own."""

    def __init__(self, place: int | None, pixels: UInt8) -> None:
        self.place = place
        self.pixels = pixels
        self.ready: Future[None] = Future()
        self.holders = 0
        self.failed = False
