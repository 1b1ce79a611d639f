"""4-connected regions of equal label in an image that comes band by band, top to bottom.

Knows labels only: no classes, no units, no files. A band is split into runs of equal pixels in its
rows; runs that touch make the parts of the band, and parts of neighbouring bands that touch make
the regions. Regions and their order depend on the image, not on the height of the bands.

Memory bound: one band, its runs, and about 50 bytes for each part.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

Bool = npt.NDArray[np.bool_]
Int = npt.NDArray[np.int64]
Int32 = npt.NDArray[np.int32]
Labels = npt.NDArray[np.integer[Any]]


def connected(a: Int, b: Int, n: int) -> Int32:
    """Component of each of n nodes under the edges a-b."""
    graph = coo_matrix((np.ones(len(a), np.int8), (a, b)), shape=(n, n))
    return np.asarray(connected_components(graph, directed=False)[1], np.int32)


def find_runs(labels: Labels) -> tuple[Int, Int32]:
    """Runs of equal pixels in the rows of a band (h, w), and the 4-connected part of each run.

    Returns:
        (flat index of the first pixel of each run, part of each run).
    """
    height, width = labels.shape
    change = np.ones(labels.shape, bool)
    np.not_equal(labels[:, 1:], labels[:, :-1], out=change[:, 1:])
    starts = np.flatnonzero(change)
    flat = labels.ravel()
    # Two runs of neighbouring rows touch exactly where one of them starts over the other.
    down = starts[starts < (height - 1) * width]
    down = down[flat[down] == flat[down + width]]
    up = starts[starts >= width]
    up = up[flat[up] == flat[up - width]]
    upper = run_of(starts, np.concatenate([down, up - width]))
    lower = run_of(starts, np.concatenate([down + width, up]))
    return starts, connected(upper, lower, len(starts))


def run_of(starts: Int, pixels: Int) -> Int:
    """The run in which each pixel (flat index) lies."""
    return np.searchsorted(starts, pixels, side="right") - 1


class Band(NamedTuple):
    """The runs of a band.

    Attributes:
        labels: (h, w) the band.
        starts: flat index in the band of the first pixel of each run.
        parts: part of each run, numbered through all bands.
    """

    labels: Labels
    starts: Int
    parts: Int

    def at(self, pixels: Int) -> Int:
        """The parts in which pixels (flat indices in the band) lie."""
        return self.parts[run_of(self.starts, pixels)]

    def row(self, index: int) -> Int:
        """(w,) the parts along a row."""
        height, width = self.labels.shape
        return self.at(np.arange(width) + index % height * width)

    def paint(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """(h, w) image of a value for each run."""
        lengths = np.diff(self.starts, append=self.labels.size)
        return np.repeat(values, lengths).reshape(self.labels.shape)


class RegionScan:
    """Regions of an image whose bands are added one by one.

    Attributes, after `finish`; regions are numbered by their first pixel in reading order:
        region: region of each part.
        value: label of each region.
        area: pixels of each region.
        cut: which regions are at an edge of the image.
        head: the part of each region that holds its first pixel.
        first: index of that pixel, y * width + x.
    """

    def __init__(self) -> None:
        self.region: Int = np.zeros(0, np.int64)
        self.value: Int = np.zeros(0, np.int64)
        self.area: Int = np.zeros(0, np.int64)
        self.cut: Bool = np.zeros(0, bool)
        self.head: Int = np.zeros(0, np.int64)
        self.first: Int = np.zeros(0, np.int64)
        self.above: Band | None = None
        self._offsets = [0]
        self._pixels = 0
        self._parts: list[Int] = []  # (3, n): value, area and first pixel of the parts of a band
        self._seams: list[Int] = [np.zeros((2, 0), np.int64)]
        self._at_edge: list[Int] = []  # parts at the top or the sides of the image

    def add(self, labels: Labels) -> Band:
        """Take the next band (h, w) of any integer type; `above` is then its last row."""
        starts, ids = find_runs(labels)
        band = Band(labels, starts, ids.astype(np.int64) + self._offsets[-1])
        count = int(ids.max()) + 1
        first = np.empty(count, np.int64)
        first[ids[::-1]] = starts[::-1]  # the smallest is written last
        value = labels.ravel()[first].astype(np.int64)
        area = np.bincount(ids, np.diff(starts, append=labels.size), count).astype(np.int64)
        self._parts.append(np.stack([value, area, first + self._pixels]))
        column = np.arange(len(labels)) * labels.shape[1]
        self._at_edge += [band.at(column), band.at(column + labels.shape[1] - 1)]
        if self.above is None:
            self._at_edge.append(band.row(0))
        else:
            same = self.above.labels[-1] == labels[0]
            pairs = np.stack([self.above.row(0)[same], band.row(0)[same]])
            self._seams.append(np.unique(pairs, axis=1))
        last = np.array(labels[-1:])
        begins, _ = find_runs(last)
        self.above = Band(last, begins, band.row(-1)[begins])
        self._offsets.append(self._offsets[-1] + count)
        self._pixels += labels.size
        return band

    def again(self, index: int, labels: Labels) -> Band:
        """The runs of a band that was added, the same as `add` gave."""
        starts, ids = find_runs(labels)
        return Band(labels, starts, ids.astype(np.int64) + self._offsets[index])

    def finish(self) -> None:
        """Join the parts to regions; all bands have been added."""
        value, area, first = np.concatenate(self._parts, axis=1)
        self._parts.clear()
        pairs = np.concatenate(self._seams, axis=1)
        joined = connected(pairs[0], pairs[1], len(value))
        order = np.argsort(first)  # no two are equal
        _, heads, back = np.unique(joined[order], return_index=True, return_inverse=True)
        rank = np.empty(len(heads), np.int64)
        rank[np.argsort(heads)] = np.arange(len(heads))
        self.region = np.empty(len(value), np.int64)
        self.region[order] = rank[back]
        self.head = order[np.sort(heads)]
        self.value, self.first = value[self.head], first[self.head]
        self.area = np.bincount(self.region, area, len(heads)).astype(np.int64)
        self.cut = np.zeros(len(heads), bool)
        bottom = [] if self.above is None else [self.above.parts]
        self.cut[self.region[np.concatenate([*self._at_edge, *bottom])]] = True
        self._at_edge.clear()
