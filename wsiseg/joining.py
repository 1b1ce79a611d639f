"""Neighbours that are hardly two become one. Knows no slides and no files.

How much two neighbours are two, their *distinctness*, is a length: the odds p / (1 - p) of the
mean probability p of a border along what they share, times the area of the smaller one, divided by
the length of what they share, in sides of pixels. So a gap in a border that is seen elsewhere does
not join what it parts (but one below the threshold that came before has joined it already), and
what lies deep behind a narrow contact is rather one of its own than a shallow part behind a wide
one. Regions joined by the mean strength of the boundary that they share, the weakest first, are
those of Arbelaez, Boundary extraction in natural images using ultrametric contour maps (CVPRW
2006); area and length are of our own, chosen on pairs of glands (docs/model-glas.md).
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from wsiseg.regions import connected

Int = npt.NDArray[np.int64]
Int32 = npt.NDArray[np.int32]
UInt8 = npt.NDArray[np.uint8]


class Contacts:
    """Where numbers of an image that comes in pieces are neighbours, and the border between.

    Memory bound: 32 bytes for each pair of numbers in a piece.
    """

    def __init__(self) -> None:
        self._pieces: list[Int] = [np.zeros((4, 0), np.int64)]

    def add(self, a: Int32, b: Int32, border: UInt8 | None = None) -> None:
        """Take the sides of a piece at which two numbers meet.

        Args:
            a: (n,) numbers on one side.
            b: (n,) those on the other.
            border: (n,) strength of the border there, 0 to 255; None where nobody asks for it.
        """
        if len(a):
            pairs = np.stack([np.minimum(a, b), np.maximum(a, b)]).astype(np.int64)
            strength = np.zeros(len(a), np.int64) if border is None else border.astype(np.int64)
            self._pieces.append(_summed(pairs, strength, np.ones(len(a), np.int64)))

    def table(self) -> Int:
        """(4, n): lower and higher number, sum of the strength and length in sides of pixels; a
        pair that met in several pieces comes several times."""
        return np.concatenate(self._pieces, axis=1)


def join(areas: Int, contacts: Int, below_px: float) -> Int32:
    """Which objects become one.

    Of all pairs of neighbours the least distinct one (of equal ones any, but always the same) is
    joined while its distinctness is under `below_px`. What both shared with a third counts as one
    border from then on. Memory: about 1.4 kB for each object with neighbours.

    Args:
        areas: (n + 1,) pixels of the objects 1..n.
        contacts: (4, m) as of `Contacts.table`, of objects; what meets itself is left out.
        below_px: distinctness in pixels.

    Returns:
        (n + 1,) int32: 0 for 0, else the smallest number of those that an object is one with.
    """
    around: dict[int, dict[int, _Shared]] = {}
    contacts = contacts[:, contacts[0] != contacts[1]]
    for a, b, strength, length in _summed(contacts[:2], contacts[2], contacts[3]).T.tolist():
        shared = _Shared(strength, length)
        around.setdefault(a, {})[b] = shared
        around.setdefault(b, {})[a] = shared
    area = areas.tolist()
    queue: list[tuple[float, int, int]] = []

    def value_of(a: int, b: int) -> float:
        shared = around[a][b]
        return distinctness(shared.strength, shared.length, min(area[a], area[b]))

    def propose(a: int, b: int) -> None:
        value = value_of(a, b)
        around[a][b].queued = value
        if value < below_px:
            heapq.heappush(queue, (value, min(a, b), max(a, b)))

    for a, beside in around.items():
        for b in beside:
            if a < b:
                propose(a, b)
    pairs = []
    while queue:
        value, a, b = heapq.heappop(queue)
        if b not in around.get(a, {}) or value != around[a][b].queued:
            continue  # one of both has become a part of another, or they share more since
        if value != value_of(a, b):
            propose(a, b)  # one of both has grown since: they are more distinct now
            continue
        if len(around[a]) < len(around[b]):
            a, b = b, a
        pairs.append((a, b))
        area[a] += area[b]
        for other, more in around.pop(b).items():
            del around[other][b]
            if other != a:
                shared = around[a].setdefault(other, _Shared(0, 0))
                around[other][a] = shared
                shared.strength += more.strength
                shared.length += more.length
                propose(a, other)
    one, two = np.array(pairs, np.int64).reshape(-1, 2).T
    group = connected(one, two, len(area))
    smallest = np.full(len(area), len(area), np.int32)
    np.minimum.at(smallest, group, np.arange(len(area), dtype=np.int32))
    return smallest[group]


@dataclass(slots=True)
class _Shared:
    """What two neighbours share.

    Attributes:
        strength: sum of the border's probability x 255.
        length: sides of pixels.
        queued: the distinctness that they were last queued with.
    """

    strength: int
    length: int
    queued: float = math.inf


def _summed(pairs: Int, strength: Int, length: Int) -> Int:
    """(4, n): each pair (2, m) of a lower and a higher number once, with its sums."""
    if not pairs.size:
        return np.zeros((4, 0), np.int64)
    least = pairs[0].min()
    span = pairs[1].max() - least + 1
    keys, at = np.unique((pairs[0] - least) * span + pairs[1] - least, return_inverse=True)
    sums = np.zeros((2, len(keys)), np.int64)
    np.add.at(sums[0], at, strength)
    np.add.at(sums[1], at, length)
    return np.concatenate([[keys // span + least, keys % span + least], sums])


def distinctness(strength: int, length: int, area: int) -> float:
    """How much two neighbours are two, in pixels; infinite where all between them is border.

    Args:
        strength: sum of the border's probability x 255 along what they share.
        length: of what they share, in sides of pixels.
        area: of the smaller one, in pixels.
    """
    rest = 255 * length - strength
    return strength * area / (rest * length) if rest else math.inf


def neighbours(labels: npt.NDArray[Any], numbers: Int32) -> tuple[Int, Int]:
    """The sides of pixels at which different numbers of one label meet.

    Args:
        labels: (h, w).
        numbers: (h, w); 0 on all pixels of a label that has none.

    Returns:
        Flat indices of the pixels on either side, (n,) each; the second is right of the first or
        below it.
    """
    width = numbers.shape[1]
    right = np.zeros(numbers.shape, bool)
    right[:, :-1] = (numbers[:, 1:] != numbers[:, :-1]) & (labels[:, 1:] == labels[:, :-1])
    down = (numbers[1:] != numbers[:-1]) & (labels[1:] == labels[:-1])
    beside, above = np.flatnonzero(right), np.flatnonzero(down)
    return np.concatenate([beside, above]), np.concatenate([beside + 1, above + width])
