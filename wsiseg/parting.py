"""Touching objects of an image that comes band by band are parted. Knows no units and no files."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from wsiseg.joining import Contacts, join, neighbours
from wsiseg.regions import RegionScan

Bool = npt.NDArray[np.bool_]
Int = npt.NDArray[np.int64]
Int32 = npt.NDArray[np.int32]
UInt8 = npt.NDArray[np.uint8]
Border = npt.NDArray[Any]
_NONE = np.int32(np.iinfo(np.int32).max)


class Parting:
    """Touching objects parted; the rule is that of `wsiseg.objects.separate`.

    First all bands are given to `add_cores` in order. After `finish_cores`, `core_numbers` gives
    the numbers of the cores of a band; a band with `reach_px` rows more on either side goes through
    `grow`, and its own rows, in order, through `add_grown`. After `finish`, `numbers` makes objects
    of what that gave.

    Attributes:
        reach_px: how many pixels objects grow.
        joins: whether objects are joined, for which `add_grown` takes the border again.
        labels: after `finish`, (n + 1,) uint8 label on disk of each object; 0 for number 0.
    """

    def __init__(
        self,
        front: Bool,
        *,
        threshold: float,
        min_core_px: float,
        reach_px: int,
        cut_share: float = 1.0,
        join_px: float = 0.0,
    ) -> None:
        """For labels `front` (256,); the rest as in `ObjectsConfig`, in pixels."""
        self.reach_px, self.joins = reach_px, join_px > 0
        self.labels: UInt8 = np.zeros(1, np.uint8)
        self._front, self._threshold = front, threshold
        self._min_core_px, self._cut_share = min_core_px, cut_share
        self._join_px = join_px
        self._cores, self._rest = RegionScan(), RegionScan()
        self._core: Int32 = np.zeros(0, np.int32)  # number of each region's core, 0 = none
        self._core_count = 0
        self._contacts = Contacts()  # of drafts
        self._areas: Int = np.zeros(0, np.int64)  # pixels of each core, grown
        self._above: tuple[UInt8, Int32, UInt8 | None] | None = None  # last row of a band
        self._of_core: Int32 = np.zeros(1, np.int32)  # object of each core
        self._of_rest: Int32 = np.zeros(0, np.int32)  # object of each part of the rest

    def add_cores(self, labels: UInt8, border: Border | None) -> None:
        """Take the next band: labels (h, w) and border probabilities, float or uint8 x 255."""
        self._cores.add(self._core_labels(labels, border))
        if border is None:
            self._min_core_px = 0.0
            self.joins = False  # no two regions of a label are neighbours

    def finish_cores(self) -> None:
        """Settle which cores there are; all bands have been added."""
        scan = self._cores
        scan.finish()
        least = self._min_core_px * np.where(scan.cut, self._cut_share, 1.0)
        kept = (scan.value > 0) & (scan.area >= least)
        self._core = np.where(kept, np.cumsum(kept), 0).astype(np.int32)
        self._core_count = int(kept.sum())
        self._areas = np.zeros(self._core_count + 1, np.int64)

    def core_numbers(self, index: int, labels: UInt8, border: Border | None) -> Int32:
        """(h, w) numbers 1.. of the cores of the band that was added as number `index`."""
        band = self._cores.again(index, self._core_labels(labels, border))
        cores: Int32 = band.paint(self._core[self._cores.region[band.parts]])
        return cores

    def _core_labels(self, labels: UInt8, border: Border | None) -> UInt8:
        core = self._front[labels]
        if border is not None:
            core &= border < self._threshold * (255 if border.dtype == np.uint8 else 1)
        return labels * core

    def grow(self, labels: UInt8, cores: Int32) -> Int32:
        """Cores (h, w) grown over pixels of their labels, `reach_px` steps.

        At every step a pixel beside cores of its label takes the smallest of their numbers.
        """
        width = labels.shape[1] + 2
        label = np.pad(labels, 1).ravel()
        grown = np.pad(cores, 1).ravel()
        free = self._front[label] & (grown == 0)
        todo = np.flatnonzero(free)
        for _ in range(self.reach_px):
            best = np.full(len(todo), _NONE)
            for step in (-width, -1, 1, width):
                beside = grown[todo + step]
                beside[(beside == 0) | (label[todo + step] != label[todo])] = _NONE
                np.minimum(best, beside, out=best)
            reached = todo[best < _NONE]
            if not len(reached):
                break
            grown[reached] = best[best < _NONE]
            free[reached] = False
            todo = _neighbours(reached, width, free)
        return np.ascontiguousarray(grown.reshape(-1, width)[1:-1, 1:-1])

    def add_grown(self, labels: UInt8, grown: Int32, border: Border | None) -> Int32:
        """Take the next band, grown, and give its draft for `numbers`, (h, w) int32.

        In a draft, numbers above 0 are cores and those below 0 parts of what no core reached.

        Args:
            labels: (h, w).
            grown: (h, w).
            border: (h, w) as for `add_cores`; needed only where objects are joined.
        """
        missed = self._front[labels] & (grown == 0)
        band = self._rest.add(labels * missed)
        draft = grown
        if missed.any():
            draft = np.where(missed, -1 - band.paint(band.parts), grown).astype(np.int32)
        strength = None
        if self.joins:
            assert border is not None
            self._areas += np.bincount(grown.ravel(), minlength=len(self._areas))
            strength = _as_bytes(border)
        if self._above is not None:
            over, top, edge = self._above
            both = None
            if edge is not None and strength is not None:
                both = np.concatenate([edge, strength[:1]])
            seam = np.concatenate([over, labels[:1]]), np.concatenate([top, draft[:1]])
            self._touch(*seam, both, only_down=True)
        self._touch(labels, draft, strength)
        last = None if strength is None else np.array(strength[-1:])
        self._above = np.array(labels[-1:]), np.array(draft[-1:]), last
        return draft

    def _touch(
        self, labels: UInt8, draft: Int32, strength: UInt8 | None, *, only_down: bool = False
    ) -> None:
        """Note where numbers of one label are neighbours, if wanted only those below each other."""
        if strength is None and draft.min() >= 0:
            return
        first, second = neighbours(labels, draft)
        if only_down:
            down = second - first == labels.shape[1]
            first, second = first[down], second[down]
        a, b = draft.ravel()[first], draft.ravel()[second]
        if strength is not None:
            between = strength.ravel()
            self._contacts.add(a, b, np.maximum(between[first], between[second]))
        else:
            met = (a < 0) != (b < 0)
            self._contacts.add(a[met], b[met])

    def finish(self) -> None:
        """Settle the objects; all bands have been added."""
        rest, cores = self._rest, self._cores
        rest.finish()
        table = self._contacts.table()
        of_both = (table[0] < 0) & (table[1] > 0)
        owner = np.full(len(rest.value), _NONE, np.int64)
        np.minimum.at(owner, rest.region[-1 - table[0, of_both]], table[1, of_both])
        alone = np.flatnonzero((rest.value > 0) & (owner == _NONE))
        kept = self._core > 0
        order = np.argsort(np.concatenate([cores.first[kept], rest.first[alone]]))
        number = np.empty(len(order), np.int32)
        number[order] = np.arange(1, len(order) + 1)
        value = np.concatenate([[0], cores.value[kept], rest.value[alone]])
        self.labels = value[np.concatenate([[0], order + 1])].astype(np.uint8)
        self._of_core = np.concatenate([[0], number[: self._core_count]]).astype(np.int32)
        region = np.zeros(len(owner), np.int32)
        owned = owner < _NONE
        region[owned] = self._of_core[owner[owned]]
        region[alone] = number[self._core_count :]
        self._of_rest = region[rest.region]
        if self.joins:
            self._join(table)

    def _join(self, table: Int) -> None:
        """Make one of objects that are hardly two."""
        objects = np.sort(self.numbers(table[:2].astype(np.int32)), axis=0)
        areas = np.zeros(len(self.labels), np.int64)
        np.add.at(areas, self._of_core, self._areas)
        np.add.at(areas, self._of_rest[self._rest.head], self._rest.area)
        into = join(areas, np.concatenate([objects, table[2:]]), self._join_px)
        kept = into == np.arange(len(into))
        number = (np.cumsum(kept) - 1).astype(np.int32)[into]
        self.labels = self.labels[kept]
        self._of_core, self._of_rest = number[self._of_core], number[self._of_rest]

    def numbers(self, draft: Int32) -> Int32:
        """(h, w) int32 objects of a band, of what `add_grown` gave for it."""
        missed = draft < 0
        objects = self._of_core[np.where(missed, 0, draft)]
        if missed.any():
            objects[missed] = self._of_rest[-1 - draft[missed]]
        return objects


def _as_bytes(border: Border) -> UInt8:
    """Probabilities of a border as uint8 x 255."""
    return border if border.dtype == np.uint8 else np.rint(border * 255).astype(np.uint8)


def _neighbours(pixels: Int, width: int, free: Bool) -> Int:
    """The free pixels beside some pixels, each once; all as flat indices."""
    found = []
    for step in (-width, -1, 1, width):
        beside = pixels + step
        beside = beside[free[beside]]
        free[beside] = False  # so that the next steps do not find it again
        found.append(beside)
    every = np.concatenate(found)
    free[every] = True
    return every
