"""Work that threads of the CPU do side by side, each with a share of the cores. Knows no networks.

A network on one tile is a long row of small operators, each of which is handed to all cores and
waited for. Several tiles at a time, with fewer cores each, wait less: on two cores a tile of the
bundled model takes a fifth (fp32) to a third (bf16) less time, and other work on the machine
disturbs less.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from typing import TypeVar

import torch

T = TypeVar("T")
MOST = 4
"""Tiles at a time at most, as each needs memory for what its networks compute."""


def at_a_time() -> int:
    """How many are under way at a time, with the threads that torch has now."""
    return min(MOST, torch.get_num_threads())


def side_by_side(count: int, work: Callable[[int], T]) -> list[T]:
    """What `work(i)` gives for each i below `count`, in order, with the threads that torch has.

    Every one is computed with the same number of threads, so that its result does not depend on
    `count`. Once one has failed, or the wait was interrupted, no other is begun.

    Raises:
        BaseException: what the first of them raised, once the others under way have ended.
    """
    workers = at_a_time()
    with _threads(max(1, round(torch.get_num_threads() / workers))):
        if workers == 1:
            return [work(i) for i in range(count)]
        failed = threading.Event()

        def one(i: int) -> T | None:
            if failed.is_set():
                return None
            try:
                return work(i)
            except BaseException:
                failed.set()
                raise

        try:
            futures = [_pool(workers).submit(one, i) for i in range(count)]
            errors = [e for f in futures if (e := f.exception()) is not None]
        except BaseException:  # of this thread, which waits: Ctrl-C
            failed.set()
            raise
        if errors:
            raise errors[0]
        return [f.result() for f in futures]  # type: ignore[misc]


@lru_cache(maxsize=1)
def _pool(workers: int) -> ThreadPoolExecutor:
    """Threads that last as long as the process."""
    return ThreadPoolExecutor(workers, thread_name_prefix="wsiseg-tile")


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Operators take `count` threads within the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not live on in a child
