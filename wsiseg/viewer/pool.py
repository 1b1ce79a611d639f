"""Keeps the slides that are being looked at open, and not more. Knows no HTTP and no pixels."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from wsiseg.viewer.tiles import SlideView


class Pool:
    """Views by number: opened when first asked for, closed when others are looked at.

    A view is closed only when no thread reads it any more.
    """

    def __init__(self, opener: Callable[[int], SlideView], *, limit: int = 8) -> None:
        """Keep at most `limit` views that nobody reads, opened by `opener(number)`."""
        self._opener = opener
        self._limit = limit
        self._lock = threading.Lock()
        self._opening: dict[int, threading.Lock] = {}
        self._views: OrderedDict[int, SlideView] = OrderedDict()
        self._readers: dict[int, int] = {}

    @contextmanager
    def borrow(self, number: int, *, again: bool = False) -> Iterator[SlideView]:
        """The view of that number, which stays open inside the block.

        With `again` one that lacks its slide is opened anew: the slide may be there by now.
        """
        view = self._take(number, again)
        try:
            yield view
        finally:
            with self._lock:
                self._readers[number] -= 1
            self._shrink(self._limit)

    def close(self) -> None:
        """Close all views that nobody reads."""
        self._shrink(0)

    def _take(self, number: int, again: bool) -> SlideView:
        with self._lock:
            opening = self._opening.setdefault(number, threading.Lock())
            self._readers[number] = self._readers.get(number, 0) + 1
        try:
            with opening:  # one thread opens it, the others wait for that
                with self._lock:
                    view = self._views.get(number)
                    alone = self._readers[number] == 1
                    if again and alone and view is not None and view.slide is None:
                        self._views.pop(number).close()
                        view = None
                if view is None:
                    view = self._opener(number)
                with self._lock:
                    self._views[number] = view
                    self._views.move_to_end(number)
                return view
        except BaseException:
            with self._lock:
                self._readers[number] -= 1
            raise

    def _shrink(self, limit: int) -> None:
        """Close the views not looked at for longest, until `limit` are left."""
        with self._lock:
            idle = [n for n in self._views if not self._readers[n]]
            surplus = idle[: max(0, len(self._views) - limit)]
            views = [self._views.pop(n) for n in surplus]
        for view in views:
            view.close()
