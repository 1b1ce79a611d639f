"""Resampling of images along exact sampling positions. Knows arrays only, no slides.

Every output pixel is a weighted sum of source pixels whose places and weights follow from its own
absolute index, so its value does not depend on the box it is computed in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import sparse

UInt8 = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Taps:
    """Source pixels of a run of output pixels along one axis.

    Attributes:
        start: first source pixel that is needed.
        stop: one past the last.
        index: (K, n) int64, source pixel minus `start` of each of the K taps.
        weight: (K, n) float32, summing to 1 over the taps.
    """

    start: int
    stop: int
    index: npt.NDArray[np.int64]
    weight: npt.NDArray[np.float32]

    def is_copy(self) -> bool:
        """Whether output pixels are the source pixels themselves."""
        return len(self.index) == 1 and self.stop - self.start == self.index.shape[1]

    def block(self) -> int:
        """The number of source pixels that each output pixel is the mean of; 0 where it is not one
        power of two, up to 16, for all, or they do not lie side by side.
        """
        k, n = self.index.shape
        whole = self.stop - self.start == k * n and k in (1, 2, 4, 8, 16)
        return k if whole and bool((self.weight == 1 / k).all()) else 0


def axis_taps(first: int, count: int, *, scale: float, offset: float, limit: int) -> Taps:
    """The taps of output pixels first .. first + count - 1.

    Output pixel j covers [offset + j * scale, offset + (j + 1) * scale) of the source. Shrinking
    (scale >= 1) averages the covered area; enlarging interpolates between pixel centres.

    Args:
        first: absolute index of the first output pixel.
        count: number of output pixels, at least 1.
        scale: source pixels per output pixel.
        offset: place of output pixel 0 in the source.
        limit: number of source pixels; taps beyond are clamped to the edge.
    """
    begin = first + offset
    if scale == 1 and float(begin).is_integer() and 0 <= begin <= limit - count:
        same = np.arange(count)[None]
        return Taps(int(begin), int(begin) + count, same, np.ones(same.shape, np.float32))
    j = np.arange(first, first + count, dtype=np.float64)
    if scale >= 1:
        low, high = offset + j * scale, offset + (j + 1) * scale
        base = np.floor(low + 1e-6).astype(np.int64)
        index = base + np.arange(math.ceil(scale) + 1)[:, None]
        weight = np.minimum(high, index + 1) - np.maximum(low, index)
        weight[weight < 1e-6] = 0
        weight[index >= limit] = 0
        weight[0][weight.sum(0) == 0] = 1
    else:
        centre = offset + (j + 0.5) * scale - 0.5
        base = np.floor(centre).astype(np.int64)
        index = base + np.arange(2)[:, None]
        weight = np.stack([1 - (centre - base), centre - base])
    weight /= weight.sum(0)
    index = np.clip(index, 0, limit - 1)
    used = weight.any(1)
    index, weight = index[used], weight[used]
    start, stop = int(index.min()), int(index.max()) + 1
    return Taps(start, stop, index - start, weight.astype(np.float32))


def resample(image: UInt8, x: Taps, y: Taps) -> UInt8:
    """Resample an image that begins at (x.start, y.start) of the source.

    Args:
        image: (y.stop - y.start, x.stop - x.start, 3) uint8.
        x: taps along x.
        y: taps along y.

    Returns:
        (n_y, n_x, 3) uint8, rounded to nearest.
    """
    if x.is_copy() and y.is_copy():
        return image
    if x.block() and y.block():
        return _block_means(image, x.block(), y.block())
    rows = _weighted(image.reshape(len(image), -1).astype(np.float32), y)
    rows = rows.reshape(len(rows), -1, 3).transpose(1, 0, 2)
    columns = _weighted(np.ascontiguousarray(rows).reshape(rows.shape[0], -1), x)
    columns += np.float32(0.5)
    pixels = columns.astype(np.uint8).reshape(columns.shape[0], -1, 3)
    return np.ascontiguousarray(pixels.transpose(1, 0, 2))


def _block_means(image: UInt8, across: int, down: int) -> UInt8:
    """Means of blocks of at most 256 pixels, rounded half up: in whole numbers, so exact."""
    rows = image[::down].astype(np.uint16)
    for i in range(1, down):
        rows += image[i::down]
    total = rows[:, ::across].copy()
    for i in range(1, across):
        total += rows[:, i::across]
    total += across * down // 2
    total >>= (across * down).bit_length() - 1
    return total.astype(np.uint8)


def _weighted(rows: npt.NDArray[np.float32], taps: Taps) -> npt.NDArray[np.float32]:
    """Weighted sums of the rows of a 2-D array, (n, width) float32."""
    count, n = taps.index.shape
    places = np.arange(0, count * n + 1, count)
    matrix = sparse.csr_matrix(
        (taps.weight.T.ravel(), taps.index.T.ravel(), places), shape=(n, taps.stop - taps.start)
    )
    return np.asarray(matrix @ rows, np.float32)
