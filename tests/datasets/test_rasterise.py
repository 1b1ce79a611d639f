from __future__ import annotations

import numpy as np
import pytest
from rasterio.features import rasterize
from shapely.geometry import Polygon

from wsiseg.datasets.rasterise import edges_of, fill, has_area
from wsiseg.geometry import Box


def slow(rings: list[np.ndarray], box: Box) -> np.ndarray:
    """Even-odd, pixel by pixel: edges crossed by a ray to the left from the centre."""
    result = np.zeros((box.height, box.width), bool)
    for row in range(box.height):
        for column in range(box.width):
            x, y = box.x + column + 0.5, box.y + row + 0.5
            for ring in rings:
                for (ax, ay), (bx, by) in zip(ring, np.roll(ring, -1, axis=0), strict=True):
                    if (ay <= y) != (by <= y):
                        top = (ax, ay, bx, by) if ay < by else (bx, by, ax, ay)
                        at = top[0] + (y - top[1]) * ((top[2] - top[0]) / (top[3] - top[1]))
                        result[row, column] ^= at <= x
    return result


@pytest.mark.parametrize("seed", range(8))
def test_against_every_pixel_and_edge(seed: int) -> None:
    """Random rings, self-crossing, with holes and coordinates on centres, cut by the box."""
    rng = np.random.default_rng(seed)
    rings = [rng.uniform(-5, 35, (rng.integers(3, 12), 2)) for _ in range(1 + seed % 3)]
    if seed % 2:
        rings = [np.round(2 * ring) / 2 for ring in rings]
    box = Box(3, 2, 20, 26)
    np.testing.assert_array_equal(fill(edges_of(rings), box), slow(rings, box))


def test_against_rasterio() -> None:
    rng = np.random.default_rng(1)
    angles = np.sort(rng.uniform(0, 2 * np.pi, 60))
    radii = rng.uniform(20, 45, 60)
    shell = np.stack([50 + radii * np.cos(angles), 48 + radii * np.sin(angles)], 1)
    hole = np.array([[45.3, 44.1], [58.2, 46.7], [50.9, 57.4]])
    mine = fill(edges_of([shell, hole]), Box(0, 0, 100, 97))
    theirs = rasterize([Polygon(shell, [hole])], out_shape=(97, 100))
    np.testing.assert_array_equal(mine, theirs)
    assert 1000 < mine.sum() < 6000
    assert not mine[49, 51]


def test_neighbours_share_no_pixel_and_leave_none() -> None:
    rng = np.random.default_rng(2)
    border = np.stack([np.round(rng.uniform(5, 15, 21) * 2) / 2, np.arange(21.0)], 1)
    left = np.concatenate([border, [[0, 20], [0, 0]]])
    right = np.concatenate([border[::-1], [[20, 0], [20, 20]]])
    box = Box(0, 0, 20, 20)
    total = fill(edges_of([left]), box).astype(int) + fill(edges_of([right]), box)
    assert (total == 1).all()


def test_parts_join_and_degenerate_rings_are_empty() -> None:
    ring = np.array([[1.2, 1.0], [30.0, 4.0], [17.0, 29.0]])
    whole = fill(edges_of([ring]), Box(0, 0, 32, 32))
    left = fill(edges_of([ring]), Box(0, 0, 13, 32))
    right = fill(edges_of([ring]), Box(13, 0, 19, 32))
    np.testing.assert_array_equal(whole, np.concatenate([left, right], 1))
    flat = np.array([[1.0, 5.0], [9.0, 5.0], [4.0, 5.0]])
    assert not fill(edges_of([flat]), Box(0, 0, 10, 10)).any()
    assert not fill(edges_of([ring]), Box(100, 100, 5, 5)).any()


def test_rings_without_area() -> None:
    square = np.array([[0, 0], [4, 0], [4, 4], [0, 4]], float)
    assert has_area(square + 1e5)
    assert has_area(np.array([[0, 0], [4, 4], [4, 0], [0, 4]], float))  # adds up to 0
    assert has_area(square * (1e308 / 4))
    assert not has_area(square * 0 + 3)
    assert not has_area(np.outer([0, 1, 2.3, 0.7], [1, 3]) + 1e4)
