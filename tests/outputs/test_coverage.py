"""Coverages simplified in groups against all at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import shapely
from output_canvases import MakeCanvas, UInt8, blobs

from wsiseg.outputs import coverage, polygons
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
    shapes = trace(make_canvas(islands(), chunk_px=64)).polygons
    whole = shapely.coverage_simplify(shapes, tolerance)
    parts = coverage.simplify(shapes, tolerance, vertices=vertices)
    assert len(np.unique(coverage.groups(shapely.bounds(shapes).T))) >= 4
    assert shapely.equals_exact(parts, whole).all()
    assert shapely.coverage_is_valid(parts)


@pytest.mark.parametrize("corners", [1, 600, 10**6])
@pytest.mark.parametrize("piece", [{}, {"band_px": 50, "strip_px": 130}])
def test_regions_are_simplified_as_they_are_traced(
    make_canvas: MakeCanvas,
    piece: dict[str, int],
    corners: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same regions in the same order as all traced first, then all simplified at once."""
    monkeypatch.setattr(coverage, "CELL_PX", 8)
    by_region, batches = polygons.by_region, 0

    def counted(*arguments: Any) -> Iterator[Any]:
        nonlocal batches
        for batch in by_region(*arguments, batch_corners=corners):
            batches += 1
            yield batch

    monkeypatch.setattr(polygons, "by_region", counted)
    canvas = make_canvas(islands(), chunk_px=64)
    for smallest in (0, 40):
        plain = trace(canvas, min_area_px=smallest)
        batches = 0
        simple = trace(canvas, **piece, min_area_px=smallest, tolerance_px=3.0)
        assert batches == 1 if corners == 10**6 else batches >= 4
        whole = shapely.coverage_simplify(plain.polygons, 3.0)
        assert shapely.equals_exact(simple.polygons, whole).all()
        for name in ("values", "areas_px", "confidences", "dropped"):
            assert (getattr(simple, name) == getattr(plain, name)).all()


@pytest.mark.parametrize("size", [1, 2, 7, 100])
def test_batches_divide_no_group(size: int) -> None:
    group = np.random.default_rng(2).integers(0, 9, 60)
    group[group == 4] = 5  # one that is empty
    order = np.lexsort((np.arange(60), group)).astype(np.int32)
    batches = [order[i : i + size] for i in range(0, 60, size)]
    shapes = [(np.array([str(n) for n in b], object), b) for b in map(np.sort, batches)]
    found = list(polygons.by_group(shapes, group))
    assert sorted(np.concatenate([owner for _, owner in found]).tolist()) == list(range(60))
    held = [set(group[owner].tolist()) for _, owner in found]
    assert sum(map(len, held)) == len(set(group.tolist()))
    assert 2 <= len(found) <= len(batches) + 1
    for names, owner in found:
        assert names.tolist() == [str(n) for n in owner]


def test_bounds_of_different_groups_lie_apart() -> None:
    rng = np.random.default_rng(1)
    x, y = rng.integers(0, 3000, (2, 80))
    width, height = rng.integers(1, 200, (2, 80))
    shapes = shapely.box(x, y, x + width, y + height)
    group = coverage.groups(shapely.bounds(shapes).T)
    assert 3 < len(np.unique(group)) < 80
    assert sorted(np.unique(group)) == list(range(group.max() + 1))
    for a, one in enumerate(shapes):
        for b, other in enumerate(shapes):
            assert group[a] == group[b] or not one.intersects(other)


def test_nothing_to_simplify() -> None:
    assert len(coverage.simplify(np.zeros(0, object), 1.0)) == 0
    assert len(coverage.groups(np.zeros((4, 0)))) == 0
