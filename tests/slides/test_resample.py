"""Resampling against a slow obvious version."""

from __future__ import annotations

import numpy as np
import pytest

from wsiseg.slides.resample import axis_taps, resample


def source(height: int = 83, width: int = 97) -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, (height, width, 3)).astype(np.uint8)


def shrunk(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Means over areas, by cutting every pixel into as many parts as there are areas."""
    width, height = size
    big = np.repeat(np.repeat(image.astype(np.float64), height, 0), width, 1)
    h, w = image.shape[:2]
    return big.reshape(height, h, width, w, 3).mean((1, 3))


def taps(n: int, limit: int, first: int = 0, count: int | None = None, offset: float = 0):
    return axis_taps(first, count or n, scale=limit / n, offset=offset, limit=limit)


@pytest.mark.parametrize("size", [(48, 41), (40, 30), (13, 82), (1, 1)])
def test_shrinking_is_the_mean_of_the_area(size: tuple[int, int]) -> None:
    image = source()
    result = resample(image, taps(size[0], 97), taps(size[1], 83))
    assert result.shape == (size[1], size[0], 3)
    assert np.abs(result - shrunk(image, size)).max() <= 0.51


def test_same_resolution_is_a_copy() -> None:
    image = source()
    x, y = taps(97, 97), taps(83, 83)
    assert x.is_copy()
    assert np.array_equal(resample(image, x, y), image)


def test_enlarging_interpolates_between_centres() -> None:
    ramp = np.repeat(
        np.repeat(np.arange(0, 200, 20, dtype=np.uint8)[None, :], 4, 0)[..., None], 3, 2
    )
    result = resample(ramp, taps(20, 10), taps(4, 4))
    expected = np.clip((np.arange(20) + 0.5) / 2 - 0.5, 0, 9) * 20
    assert np.abs(result[0, :, 0] - expected).max() <= 0.5


@pytest.mark.parametrize("n", [40, 61, 150])
@pytest.mark.parametrize("offset", [0.0, 7.3])
def test_a_part_has_the_values_of_the_whole(n: int, offset: float) -> None:
    image = source(4, 97)
    y = taps(4, 4)

    def part(first: int, count: int) -> np.ndarray:
        x = axis_taps(first, count, scale=80 / n, offset=offset, limit=97)
        return resample(image[:, x.start : x.stop], x, y)

    whole = part(0, n)
    for first, count in [(0, 1), (5, 9), (n - 1, 1), (17, n - 17)]:
        assert np.array_equal(part(first, count), whole[:, first : first + count])


def test_taps_stay_inside() -> None:
    x = taps(33, 97, first=32, count=1)
    assert 0 <= x.start < x.stop == 97
    assert np.allclose(x.weight.sum(0), 1)
