"""Progress of one slide or data set on stderr: a bar on a terminal, a few plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

from tqdm import tqdm

from wsiseg.cli.say import say


class Progress:
    """Shows units done, units per second and the time left; call it with (done, total)."""

    def __init__(self, name: str, *, unit: str = "tile", every_s: float = 15.0) -> None:
        """On what is no terminal a line is printed at most every `every_s` seconds."""
        self._name, self._unit, self._every_s = name, unit, every_s
        self._bar: tqdm[Any] | None = None
        self._began = self._told = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        """Show that `done` of `total` units are done."""
        if sys.stderr.isatty():
            if self._bar is None:
                self._bar = tqdm(total=total, desc=self._name, unit=self._unit, file=sys.stderr)
            self._bar.update(done - self._bar.n)
            return
        now = time.monotonic()
        if done and now - self._told >= self._every_s:
            self._told = now
            rate = done / (now - self._began)
            left = format_seconds((total - done) / rate)
            say(
                f"{self._name}: {done} of {total} {self._unit}s, {rate:.1f} {self._unit}s/s, "
                f"{left} left",
                err=True,
            )

    def close(self) -> None:
        """End the bar."""
        if self._bar is not None:
            self._bar.close()


def format_seconds(seconds: float) -> str:
    """A duration to read: 4.2 s, 3 min 20 s, 2 h 05 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
