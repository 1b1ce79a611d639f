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


def test_a_copy_begins_at_the_offset_and_ends_at_the_edge() -> None:
    for first, count, offset in ((0, 97, 0), (5, 20, 3), (90, 4, 3.0), (96, 1, 0)):
        x = axis_taps(first, count, scale=1.0, offset=offset, limit=97)
        assert (x.start, x.stop) == (first + offset, first + offset + count)
        assert x.is_copy()
        assert np.array_equal(x.index, [range(count)])
        assert np.array_equal(x.weight, [[1] * count])
    beyond = axis_taps(95, 4, scale=1.0, offset=0, limit=97)
    assert (beyond.start, beyond.stop, beyond.is_copy()) == (95, 97, False)
    between = axis_taps(5, 4, scale=1.0, offset=0.5, limit=97)
    assert np.array_equal(between.weight, np.full((2, 4), 0.5))


@pytest.mark.parametrize(("across", "down"), [(2, 2), (4, 4), (16, 16), (2, 1), (1, 4), (3, 3)])
def test_whole_blocks_have_the_exact_mean(across: int, down: int) -> None:
    image = source(5 * down + 3, 7 * across + 2)
    image[:down, :across] = 255
    x = axis_taps(0, 7, scale=float(across), offset=1.0, limit=image.shape[1])
    y = axis_taps(1, 4, scale=float(down), offset=2.0, limit=image.shape[0])
    part = image[y.start : y.stop, x.start : x.stop]
    blocks = part.astype(int).reshape(4, down, 7, across, 3).sum((1, 3))
    area = across * down
    result = resample(part, x, y)
    assert np.array_equal(result, (2 * blocks + area) // (2 * area))
    assert (x.block(), y.block()) == ((across, down) if area != 9 else (0, 0))


@pytest.mark.parametrize("scale", [2.0, 4.0])
def test_blocks_are_what_the_weights_say(scale: float) -> None:
    image = source(64, 64)
    x = axis_taps(0, int(64 / scale), scale=scale, offset=0, limit=64)
    assert x.block() == scale
    rows = np.einsum("kn,knwc->nwc", x.weight, image[x.index].astype(np.float64))
    means = np.einsum("kn,hknc->hnc", x.weight, rows[:, x.index])
    assert np.array_equal(resample(image, x, x), np.floor(means + 0.5).astype(np.uint8))


@pytest.mark.parametrize(("scale", "offset"), [(2.0, 0.5), (1.9993, 0.0), (2.0, 95.0)])
def test_no_blocks_where_weights_differ(scale: float, offset: float) -> None:
    assert axis_taps(0, 3, scale=scale, offset=offset, limit=97).block() == 0


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
