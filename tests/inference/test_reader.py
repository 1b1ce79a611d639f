"""Reading ahead: order, bound, errors and the end of the threads."""

import threading
import time

import numpy as np
import pytest
from inference_fakes import MemorySlide, random_slide

from wsiseg.errors import SlideReadError
from wsiseg.geometry import Box, Grid, Point
from wsiseg.inference.reader import TileReader


def reader(slide: MemorySlide, *, workers: int = 3, ahead: int = 5) -> TileReader:
    return TileReader(slide, slide.grid(0.5), tile_px=16, workers=workers, ahead=ahead)


def threads() -> int:
    return sum(t.name.startswith("tiles") for t in threading.enumerate())


def test_tiles_come_in_order_and_each_is_read_once() -> None:
    slide = random_slide(100, 80)
    places = [Point(x, y) for y in range(-8, 80, 16) for x in range(-8, 100, 16)]
    with reader(slide) as r:
        tiles = list(r.tiles(places))
    assert threads() == 0
    assert sorted(slide.reads) == sorted(places)
    for place, tile in zip(places, tiles, strict=True):
        assert (tile == slide.read(Box(*place, 16, 16), slide.grid(0.5))).all()


def test_at_most_so_many_tiles_are_read_in_advance() -> None:
    slide = random_slide(400, 16)
    with reader(slide, ahead=4) as r:
        tiles = r.tiles(Point(16 * k, 0) for k in range(25))
        for taken in range(1, 10):
            next(tiles)
            time.sleep(0.01)
            assert len(slide.reads) <= taken + 4
        assert len(slide.reads) >= 9
    assert threads() == 0


class BrokenSlide(MemorySlide):
    def read(self, box: Box, grid: Grid) -> np.ndarray:
        if box.x == 48:
            raise SlideReadError("broken there")
        return super().read(box, grid)


def test_an_error_comes_in_its_turn_and_ends_the_threads() -> None:
    slide = BrokenSlide(np.zeros((16, 400, 3), np.uint8))
    came: list[np.ndarray] = []
    with pytest.raises(SlideReadError, match="broken there"), reader(slide) as r:
        came.extend(r.tiles(Point(16 * k, 0) for k in range(25)))
    assert len(came) == 3
    assert threads() == 0
    assert len(slide.reads) < 12


def test_an_interruption_ends_the_threads() -> None:
    slide = random_slide(4000, 16)

    def interrupted() -> None:
        with reader(slide) as r:
            next(r.tiles(Point(16 * k, 0) for k in range(250)))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert threads() == 0
    assert len(slide.reads) < 20


class OddSlide(MemorySlide):
    def read(self, box: Box, grid: Grid) -> np.ndarray:
        return np.zeros((box.height, box.width, 4), np.uint8)


def test_pixels_of_another_shape_are_an_error() -> None:
    with (
        pytest.raises(SlideReadError, match=r"\(16, 16, 4\)"),
        reader(OddSlide(np.zeros((9, 9, 3)))) as r,
    ):
        list(r.tiles([Point(0, 0)]))
