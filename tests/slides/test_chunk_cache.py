"""The cache of decoded chunks: its bound, its order, threads and errors."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from wsiseg.slides.chunk_cache import ChunkCache


def chunk(value: int) -> np.ndarray:
    return np.full((10, 10, 3), value, np.uint8)


def test_the_least_recently_used_goes_first() -> None:
    cache = ChunkCache(3 * 300)
    made: list[int] = []

    def get(n: int) -> int:
        return int(cache.get((0, n), lambda: made.append(n) or chunk(n))[0, 0, 0])  # type: ignore[func-returns-value]

    assert [get(n) for n in (1, 2, 3, 1, 4, 1, 3, 2)] == [1, 2, 3, 1, 4, 1, 3, 2]
    assert made == [1, 2, 3, 4, 2]
    assert cache.held_bytes == 900
    cache.clear()
    assert cache.held_bytes == 0
    assert get(1) == 1
    assert made[-1] == 1


def test_the_bound_holds_even_for_one_chunk() -> None:
    cache = ChunkCache(299)
    assert cache.get((0, 1), lambda: chunk(1)).shape == (10, 10, 3)
    assert cache.held_bytes == 0


def test_threads_wait_for_the_one_that_decodes() -> None:
    cache, begun, go = ChunkCache(10_000), threading.Event(), threading.Event()
    calls: list[int] = []

    def slow() -> np.ndarray:
        calls.append(1)
        begun.set()
        assert go.wait(10)
        return chunk(7)

    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(cache.get, (0, 0), slow)]
        assert begun.wait(10)
        waiting += [pool.submit(cache.get, (0, 0), slow) for _ in range(3)]
        assert cache.get((0, 1), lambda: chunk(1))[0, 0, 0] == 1
        go.set()
        assert all(future.result(10)[0, 0, 0] == 7 for future in waiting)
    assert len(calls) == 1


def test_an_error_reaches_all_that_wait_and_is_not_kept() -> None:
    cache, begun, go = ChunkCache(10_000), threading.Event(), threading.Event()

    def fail() -> np.ndarray:
        begun.set()
        assert go.wait(10)
        raise OSError("gone")

    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(cache.get, (0, 0), fail)]
        assert begun.wait(10)
        waiting.append(pool.submit(cache.get, (0, 0), fail))
        go.set()
        for future in waiting:
            with pytest.raises(OSError, match="gone"):
                future.result(10)
    assert cache.get((0, 0), lambda: chunk(3))[0, 0, 0] == 3
