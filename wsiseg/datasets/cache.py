"""Decoded images kept in memory under a bound, the least recently used given up first.

Knows no files and no data set.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable

import numpy as np
import numpy.typing as npt

UInt8 = npt.NDArray[np.uint8]


class ArrayCache:
    """Arrays by key; those held never take more than `limit` bytes. Several threads may ask.

    Room for an array is made before it is decoded. One array is decoded at a time, so none is
    ever decoded twice at once; a thread that finds its array held waits for a running decode.
    """

    def __init__(self, limit: int) -> None:
        """An empty cache of at most `limit` bytes; with 0 nothing is kept."""
        self.limit = limit
        self.held = 0
        self._arrays: OrderedDict[Hashable, UInt8] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, nbytes: int, decode: Callable[[], UInt8]) -> UInt8:
        """The array of a key, decoded if it is not held; not to be written to.

        Args:
            key: names the array.
            nbytes: bytes of the array; one larger than the whole cache is decoded, not kept.
            decode: makes the array.
        """
        with self._lock:
            if key in self._arrays:
                self._arrays.move_to_end(key)
                return self._arrays[key]
            keep = nbytes <= self.limit
            while keep and self.held + nbytes > self.limit:
                _, gone = self._arrays.popitem(last=False)
                self.held -= gone.nbytes
                del gone
            array = decode()
            if keep:
                self._arrays[key] = array
                self.held += array.nbytes
            return array
