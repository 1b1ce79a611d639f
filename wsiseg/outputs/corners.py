"""Corners of regions in a label image: where a boundary turns or a third label meets it.

Knows labels only, nothing of regions as a whole. Around a grid point lie four pixels

    a b
    c d

and the boundary of a region is followed with the region on the right-hand side: its top edge
goes east, its right edge south, its bottom edge west, its left edge north.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

UInt8 = npt.NDArray[np.uint8]
Int = npt.NDArray[np.int64]
Int32 = npt.NDArray[np.int32]
Bool = npt.NDArray[np.bool_]
Labels = npt.NDArray[np.integer[Any]]

EAST, SOUTH, WEST, NORTH = range(4)

A, B, C, D = range(4)
_BESIDE = (B, A, D, C)  # the pixel left or right of each
_OVER = (C, D, A, B)  # the pixel above or below each
_ACROSS = (D, C, B, A)  # the pixel diagonally across

# For each pixel (entered going, left going): the turn where only that pixel is in the region, the
# turn where only that pixel is not, and the straight passages along its own row and column.
_CONVEX = ((SOUTH, WEST), (WEST, NORTH), (EAST, SOUTH), (NORTH, EAST))
_REFLEX = ((EAST, NORTH), (SOUTH, EAST), (NORTH, WEST), (WEST, SOUTH))


@dataclass(frozen=True)
class Corners:
    """Corners in reading order of their points, all arrays of one length.

    Attributes:
        x, y: the grid point, int32.
        enter, leave: directions along the boundary, uint8.
        pinch: whether the region's pixel has a pixel of equal label diagonally across and both
            others differ from it.
    """

    x: Int32
    y: Int32
    enter: UInt8
    leave: UInt8
    pinch: Bool

    def __len__(self) -> int:
        return len(self.x)

    def take(self, which: Int | Bool) -> Corners:
        """Those of the given numbers, or where a mask is true."""
        return Corners(
            self.x[which],
            self.y[which],
            self.enter[which],
            self.leave[which],
            self.pinch[which],
        )

    @classmethod
    def concatenate(cls, parts: Sequence[Corners]) -> Corners:
        """The corners of all parts, one after the other."""
        return cls(
            np.concatenate([p.x for p in parts]),
            np.concatenate([p.y for p in parts]),
            np.concatenate([p.enter for p in parts]),
            np.concatenate([p.leave for p in parts]),
            np.concatenate([p.pinch for p in parts]),
        )


@dataclass(frozen=True)
class Packed:
    """Corners that lie close together in less memory: 5 bytes each up to 65,535 px apart.

    Attributes:
        left, top: what x and y are counted from.
        x, y: of the smallest unsigned type that holds them.
        turn: uint8, entered + 4 * left + 16 * pinch.
    """

    left: int
    top: int
    x: Labels
    y: Labels
    turn: UInt8

    @classmethod
    def of(cls, corners: Corners) -> Packed:
        """The same corners."""
        left, top = (int(v.min(initial=np.iinfo(np.int32).max)) for v in (corners.x, corners.y))
        turn = corners.enter + np.uint8(4) * corners.leave + np.uint8(16) * corners.pinch
        return cls(left, top, _small(corners.x, left), _small(corners.y, top), turn)

    def take(self, which: Int | Bool) -> Packed:
        """Those of the given numbers, or where a mask is true."""
        return Packed(self.left, self.top, self.x[which], self.y[which], self.turn[which])

    def corners(self) -> Corners:
        """As they were."""
        x, y = (v.astype(np.int32) for v in (self.x, self.y))
        x += np.int32(self.left)
        y += np.int32(self.top)
        return Corners(x, y, self.turn % 4, self.turn // 4 % 4, self.turn >= 16)


def _small(values: Int32, least: int) -> Labels:
    """Values less the least of them, of as few bytes as they need."""
    values = values - np.int32(least)
    return values.astype(np.min_scalar_type(int(values.max(initial=0))))


def find_corners(labels: Labels, top: int) -> tuple[Corners, Int]:
    """Corners of all regions of a value that is not 0 on the grid lines between rows of an image.

    Args:
        labels: (h, w) uint8 or int32; the first row is the one above grid line `top`. The sides of
            the image count as value 0; the lines above its first and below its last row are left
            out.
        top: y of the grid line below the first row.

    Returns:
        The corners, and for each a pixel of its region as flat index into `labels`.
    """
    height, width = labels.shape
    padded = np.zeros((height, width + 2), labels.dtype)
    padded[:, 1:-1] = labels
    beside = padded[:, 1:] != padded[:, :-1]
    over = padded[1:] != padded[:-1]
    spots = beside[1:] | beside[:-1]
    spots &= over[:, 1:] | over[:, :-1]
    rows, columns = np.nonzero(spots)
    around = [padded[rows + i, columns + j] for i in (0, 1) for j in (0, 1)]
    kinds = list(_kinds(around))
    spot = np.concatenate([np.flatnonzero(kind.where) for kind in kinds])
    sizes = [np.count_nonzero(kind.where) for kind in kinds]
    order = np.argsort(spot, kind="stable")
    spot = spot[order]
    pixel = np.repeat([kind.pixel for kind in kinds], sizes)[order]
    corners = Corners(
        columns[spot].astype(np.int32),
        (rows[spot] + top).astype(np.int32),
        np.repeat(np.array([kind.turn[0] for kind in kinds], np.uint8), sizes)[order],
        np.repeat(np.array([kind.turn[1] for kind in kinds], np.uint8), sizes)[order],
        np.concatenate([kind.pinch[kind.where] for kind in kinds])[order],
    )
    return corners, (rows[spot] + pixel // 2) * width + columns[spot] + pixel % 2 - 1


class _Kind(NamedTuple):
    """One kind of corner: at which points it is, how it turns, one pixel of its region."""

    where: Bool
    turn: tuple[int, int]
    pixel: int
    pinch: Bool


def _kinds(around: list[Labels]) -> Iterator[_Kind]:
    """All kinds of corners, given the four labels around each point."""
    never = np.zeros(len(around[A]), bool)
    for pixel in (A, B, C, D):
        own, across = around[pixel], around[_ACROSS[pixel]]
        side, over = around[_BESIDE[pixel]], around[_OVER[pixel]]
        alone = (own != 0) & (own != side) & (own != over)
        yield _Kind(alone, _CONVEX[pixel], pixel, own == across)
        missing = (own != across) & (side == over) & (side == across) & (side != 0)
        yield _Kind(missing, _REFLEX[pixel], _ACROSS[pixel], never)
    for first, second, go in ((A, B, WEST), (C, D, EAST), (A, C, SOUTH), (B, D, NORTH)):
        own, (p, q) = around[first], (around[_ACROSS[second]], around[_ACROSS[first]])
        passed = (own != 0) & (own == around[second]) & (p != q) & (p != own) & (q != own)
        yield _Kind(passed, (go, go), first, never)
