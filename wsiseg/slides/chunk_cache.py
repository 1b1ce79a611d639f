"""Decoded chunks shared by threads, least recently used out first. Knows no files."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future

import numpy as np
import numpy.typing as npt

UInt8 = npt.NDArray[np.uint8]
Key = tuple[int, int]


class ChunkCache:
    """Keeps decoded chunks up to a number of bytes; any thread may ask.

    A chunk that several threads want at once is decoded by the first and awaited by the others.

    Memory bound: `limit_bytes`, beside the chunks that threads are decoding or copying from.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._kept: OrderedDict[Key, UInt8] = OrderedDict()
        self._coming: dict[Key, Future[UInt8]] = {}
        self._bytes = 0
        self._lock = threading.Lock()

    @property
    def held_bytes(self) -> int:
        """Bytes of the chunks that are kept."""
        return self._bytes

    def get(self, key: Key, decode: Callable[[], UInt8]) -> UInt8:
        """The chunk of a key, not to be written to: the one that is kept, else what `decode` gives.

        Raises:
            BaseException: whatever `decode` raised, in every thread that waited for it; nothing is
                kept then, and the next call decodes anew.
        """
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
            coming = self._coming.get(key)
            if coming is None:
                own = self._coming[key] = Future()
        if coming is not None:
            return coming.result()
        try:
            pixels = decode()
        except BaseException as e:
            with self._lock:
                del self._coming[key]
            own.set_exception(e)
            raise
        self._keep(key, pixels)
        own.set_result(pixels)
        return pixels

    def clear(self) -> None:
        """Let all chunks go."""
        with self._lock:
            self._kept.clear()
            self._bytes = 0

    def _keep(self, key: Key, pixels: UInt8) -> None:
        with self._lock:
            del self._coming[key]
            self._kept[key] = pixels
            self._bytes += pixels.nbytes
            while self._bytes > self._limit:
                self._bytes -= self._kept.popitem(last=False)[1].nbytes
