"""Corners in less memory are the same corners."""

from __future__ import annotations

import numpy as np
import pytest

from wsiseg.outputs.corners import Corners, Packed


@pytest.mark.parametrize(("spread", "size"), [(255, 3), (256, 5), (65_535, 5), (65_536, 9)])
@pytest.mark.parametrize("count", [0, 1, 500])
def test_packed_and_back(spread: int, size: int, count: int) -> None:
    rng = np.random.default_rng(0)
    corners = Corners(
        *rng.integers(1_900_000_000, 1_900_000_000 + spread, (2, count)).astype(np.int32),
        *rng.integers(0, 4, (2, count)).astype(np.uint8),
        rng.random(count) < 0.5,
    )
    if count > 1:
        corners.x[:2] = corners.y[:2] = 1_900_000_000, 1_900_000_000 + spread
    chosen = rng.permutation(count)[: count // 2]
    packed = Packed.of(corners)
    for again, wanted in (
        (packed.corners(), corners),
        (packed.take(chosen).corners(), corners.take(chosen)),
    ):
        for name in ("x", "y", "enter", "leave", "pinch"):
            found = getattr(again, name)
            assert found.dtype == getattr(wanted, name).dtype
            assert (found == getattr(wanted, name)).all()
    if count > 1:
        assert sum(a.itemsize for a in (packed.x, packed.y, packed.turn)) == size
