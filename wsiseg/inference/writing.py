"""Finished chunks brought to the disk beside the work that makes more. Knows no networks."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class Writer:
    """Does what it is given in threads of its own, in any order and several at a time.

    Memory bound: what is given waits, at most `limit` at a time.
    """

    def __init__(self, limit: int, threads: int = 4) -> None:
        self._limit = limit
        self._waiting: deque[Future[None]] = deque()
        self._pool = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="writer")

    def give(self, write: Callable[[], None]) -> None:
        """Have something written; raises what an earlier one raised."""
        while self._waiting and (self._waiting[0].done() or len(self._waiting) >= self._limit):
            self._waiting.popleft().result()
        self._waiting.append(self._pool.submit(write))

    def finish(self) -> None:
        """Wait until all is written; raises what the first given of those that failed raised."""
        while self._waiting:
            self._waiting.popleft().result()

    def close(self) -> None:
        """Drop what was not begun and wait for what was."""
        self._waiting.clear()
        self._pool.shutdown(wait=True, cancel_futures=True)
