from __future__ import annotations

import pytest

from wsiseg.geometry import Box, Grid, Size


def test_grid_covers_exactly_the_extent_of_level_0() -> None:
    grid = Grid.at_mpp(Size(1001, 777), 0.25, 0.5)
    assert grid.size == (500, 388)
    assert grid.to_level0(*grid.size) == (1001, 777)
    assert grid.mpp_x == pytest.approx(0.25 * 1001 / 500)
    assert grid.pixel_area_um2 * 500 * 388 == pytest.approx(1001 * 777 * 0.25**2)


def test_grid_of_a_tiny_slide_has_a_pixel() -> None:
    assert Grid.at_mpp(Size(1, 1), 0.25, 4.0).size == (1, 1)


@pytest.mark.parametrize("mpp", [0.0, -1.0, float("nan"), float("inf")])
def test_grid_refuses_impossible_resolutions(mpp: float) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        Grid.at_mpp(Size(10, 10), 0.5, mpp)


def test_boxes_intersect() -> None:
    assert Box(0, 0, 10, 10).intersection(Box(5, 7, 10, 10)) == (5, 7, 5, 3)
    assert Box(0, 0, 10, 10).intersection(Box(10, 0, 5, 5)).is_empty()
    assert Box(2, 3, 4, 5).slices == (slice(3, 8), slice(2, 6))
