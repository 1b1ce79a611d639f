"""The cache of decoded chunks: its bound, its order, threads and errors."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import numpy as np
import pytest

from wsiseg.slides.chunk_cache import ChunkCache

SHAPE = (10, 10, 3)


def fill(value: int) -> Callable[[np.ndarray], None]:
    return lambda pixels: pixels.fill(value)


def value_of(cache: ChunkCache, number: int, decode: Callable[[np.ndarray], object]) -> int:
    with cache.chunk((0, number), SHAPE, decode) as chunk:
        assert chunk.shape == SHAPE
        assert (chunk == chunk[0, 0, 0]).all()
        return int(chunk[0, 0, 0])


def test_the_least_recently_used_goes_first() -> None:
    cache = ChunkCache(3 * 300 + 299, 300)
    made: list[int] = []

    def get(n: int) -> int:
        def decode(pixels: np.ndarray) -> None:
            made.append(n)
            pixels.fill(n)

        return value_of(cache, n, decode)

    assert cache.places == 3
    assert [get(n) for n in (1, 2, 3, 1, 4, 1, 3, 2)] == [1, 2, 3, 1, 4, 1, 3, 2]
    assert made == [1, 2, 3, 4, 2]


@pytest.mark.parametrize("places", [0, 1, 3])
def test_what_is_held_is_not_written_over(places: int) -> None:
    cache = ChunkCache(places * 300, 300)
    with ExitStack() as stack:
        held = [stack.enter_context(cache.chunk((0, n), SHAPE, fill(n))) for n in range(7)]
        again = stack.enter_context(cache.chunk((0, 6), SHAPE, fill(99)))
        assert [int(chunk.max()) for chunk in held] == list(range(7))
        assert again is held[6]
    kept = sum(value_of(cache, n, fill(50)) != 50 for n in range(7))
    assert kept <= places
    assert [value_of(cache, n, fill(n)) for n in range(10, 20)] == list(range(10, 20))


def test_smaller_chunks_share_the_places() -> None:
    cache = ChunkCache(600, 300)
    with cache.chunk((1, 0), (5, 4, 3), fill(3)) as small, cache.chunk((0, 0), SHAPE, fill(4)) as c:
        assert small.shape == (5, 4, 3)
        assert (small.min(), small.max(), c.min(), c.max()) == (3, 3, 4, 4)


def test_threads_wait_for_the_one_that_decodes() -> None:
    cache, begun, go = ChunkCache(10_000, 300), threading.Event(), threading.Event()
    calls: list[int] = []

    def slow(pixels: np.ndarray) -> None:
        calls.append(1)
        begun.set()
        assert go.wait(10)
        pixels.fill(7)

    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(value_of, cache, 0, slow)]
        assert begun.wait(10)
        waiting += [pool.submit(value_of, cache, 0, slow) for _ in range(3)]
        assert value_of(cache, 1, fill(1)) == 1
        go.set()
        assert all(future.result(10) == 7 for future in waiting)
    assert len(calls) == 1


def test_an_error_reaches_all_that_wait_and_its_place_is_used_again() -> None:
    cache, begun, go = ChunkCache(300, 300), threading.Event(), threading.Event()

    def fail(_: np.ndarray) -> None:
        begun.set()
        assert go.wait(10)
        raise OSError("gone")

    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(value_of, cache, 0, fail)]
        assert begun.wait(10)
        waiting.append(pool.submit(value_of, cache, 0, fail))
        go.set()
        for future in waiting:
            with pytest.raises(OSError, match="gone"):
                future.result(10)
    assert [value_of(cache, n, fill(n + 3)) for n in (0, 0, 1)] == [3, 3, 4]
    with (
        cache.chunk((0, 1), SHAPE, fill(9)) as kept,
        cache.chunk((0, 2), SHAPE, fill(8)) as beside,
    ):
        assert (kept.max(), beside.max()) == (4, 8)


def test_many_threads_and_few_places() -> None:
    cache, rng = ChunkCache(5 * 300, 300), np.random.default_rng(0)

    def decode(number: int) -> Callable[[np.ndarray], None]:
        def work(pixels: np.ndarray) -> None:
            if number % 7 == 6 and rng.random() < 0.5:
                raise OSError("gone")
            pixels.fill(number)

        return work

    def get(number: int) -> bool:
        try:
            return value_of(cache, number, decode(number)) == number
        except OSError:
            return number % 7 == 6

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(get, np.random.default_rng(1).integers(0, 30, 4000).tolist()))
    assert len(cache._free) + len(cache._entries) == 5
