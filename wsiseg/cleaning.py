"""Small regions of an image that comes band by band give way to the label around them.

Knows labels and pixels: no units, no files. What is small, and of which labels, is for the caller
to say (`wsiseg.objects`).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from wsiseg.regions import Band, RegionScan

Bool = npt.NDArray[np.bool_]
Int = npt.NDArray[np.int64]
UInt8 = npt.NDArray[np.uint8]


class Cleaning:
    """Small regions of some values take over the label around them; the rule is that of
    `wsiseg.objects.clean_labels`.

    All bands are given to `add` in order, then, after `finish`, to `apply`.
    """

    def __init__(
        self,
        wanted: Bool,
        area_px: float,
        *,
        fallback: int,
        spare_cut: bool = False,
        cut_share: float = 1.0,
    ) -> None:
        """Regions of values `wanted` (256,) below `area_px`, if `spare_cut` only whole ones.

        At the edge of the image `cut_share` of the area is enough.
        """
        self.area_px, self._cut_share = area_px, cut_share
        self._wanted, self._fallback, self._spare_cut = wanted, fallback, spare_cut
        self._scan = RegionScan()
        self._parents: list[Int] = []  # part beside the first pixel of each part, or -1
        self._cut: list[Int] = []  # parts beside a 0
        self._labels = np.zeros(0, np.uint8)  # new label of each region

    def add(self, labels: UInt8) -> None:
        """Take the next band."""
        above = self._scan.above
        band = self._scan.add(labels)
        self._parents.append(_beside(band, above))
        if self._spare_cut:
            self._cut.append(_cut(band, above))

    def finish(self) -> None:
        """Settle the new labels; all bands have been added."""
        scan = self._scan
        scan.finish()
        least = self.area_px * np.where(scan.cut, self._cut_share, 1.0)
        small = self._wanted[scan.value] & (scan.area < least)
        if self._spare_cut:
            small[scan.cut] = False
            small[scan.region[np.concatenate(self._cut)]] = False
        parents = np.concatenate(self._parents)[scan.head]
        gone = small & (parents >= 0)
        target = np.arange(len(small))
        target[gone] = scan.region[parents[gone]]  # always an earlier region, so no circles
        while not np.array_equal(target, target[target]):
            target = target[target]
        label = scan.value[target]
        if self._fallback:
            label[small[target]] = self._fallback
        self._labels = label.astype(np.uint8)

    def apply(self, index: int, labels: UInt8) -> UInt8:
        """The band that was added as number `index`, cleaned."""
        band = self._scan.again(index, labels)
        cleaned: UInt8 = band.paint(self._labels[self._scan.region[band.parts]])
        return cleaned


def _beside(band: Band, above: Band | None) -> Int:
    """For each part of a band the part left of its first pixel, else above it, else -1.

    Parts of value 0 do not count.
    """
    width = band.labels.shape[1]
    flat = band.labels.ravel()
    runs = np.unique(band.parts, return_index=True)[1]  # the first run of each part
    first = band.starts[runs]
    parent = np.full(len(first), -1, np.int64)
    if above is not None:
        top = np.flatnonzero(first < width)
        over = top[above.labels[0, first[top]] > 0]
        parent[over] = above.at(first[over])
    inner = np.flatnonzero(first >= width)
    over = inner[flat[first[inner] - width] > 0]
    parent[over] = band.at(first[over] - width)
    inner = np.flatnonzero(first % width > 0)
    left = inner[flat[first[inner] - 1] > 0]
    parent[left] = band.parts[runs[left] - 1]
    return parent


def _cut(band: Band, above: Band | None) -> Int:
    """Parts of a band, or of the row above it, beside a 0."""
    zero = band.labels == 0
    found = [np.zeros(0, np.int64)]
    if above is not None:
        found += [band.row(0)[above.labels[0] == 0], above.row(0)[zero[0]]]
    if zero.any():
        near = np.zeros_like(zero)
        near[1:] |= zero[:-1]
        near[:-1] |= zero[1:]
        near[:, 1:] |= zero[:, :-1]
        near[:, :-1] |= zero[:, 1:]
        found.append(band.at(np.flatnonzero(near & ~zero)))
    return np.unique(np.concatenate(found))
