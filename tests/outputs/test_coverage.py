"""Coverages simplified in groups against all at once."""

from __future__ import annotations

import numpy as np
import pytest
import shapely
from output_canvases import MakeCanvas, UInt8, blobs

from wsiseg.outputs import coverage
from wsiseg.outputs.polygons import trace


def islands() -> UInt8:
    """Patches of classes in islands of several sizes, some of which nearly touch."""
    labels = blobs(400, 500, scale=4)
    keep = np.zeros(labels.shape, bool)
    for y, x, side in ((0, 0, 90), (10, 200, 150), (170, 30, 120), (165, 380, 110), (300, 160, 60)):
        keep[y : y + side, x : x + side] = True
    keep[95, :195] = keep[300:, 480:] = True  # a thin line below the first, and a corner
    return np.where(keep, labels, 0).astype(np.uint8)


@pytest.mark.parametrize("vertices", [1, 500, 3000])
@pytest.mark.parametrize("tolerance", [0.7, 2.0, 20.0])
def test_groups_change_nothing(
    make_canvas: MakeCanvas, vertices: int, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coverage, "CELL_PX", 8)
    polygons = trace(make_canvas(islands(), chunk_px=64)).polygons
    whole = shapely.coverage_simplify(polygons, tolerance)
    parts = coverage.simplify(polygons, tolerance, vertices=vertices)
    assert len(np.unique(coverage.groups(polygons))) >= 4
    assert shapely.equals_exact(parts, whole).all()
    assert shapely.coverage_is_valid(parts)


def test_bounds_of_different_groups_lie_apart() -> None:
    rng = np.random.default_rng(1)
    x, y = rng.integers(0, 3000, (2, 80))
    width, height = rng.integers(1, 200, (2, 80))
    polygons = shapely.box(x, y, x + width, y + height)
    group = coverage.groups(polygons)
    assert 3 < len(np.unique(group)) < 80
    assert sorted(np.unique(group)) == list(range(group.max() + 1))
    for a, one in enumerate(polygons):
        for b, other in enumerate(polygons):
            assert group[a] == group[b] or not one.intersects(other)


def test_nothing_to_simplify() -> None:
    assert len(coverage.simplify(np.zeros(0, object), 1.0)) == 0
