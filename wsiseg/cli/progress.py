"""Progress of one slide on stderr: a bar on a terminal, a few plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

import click
from tqdm import tqdm


class TileProgress:
    """Shows tiles done, tiles per second and the time left; call it with (done, total)."""

    def __init__(self, name: str, *, every_s: float = 15.0) -> None:
        """On what is no terminal a line is printed at most every `every_s` seconds."""
        self._name, self._every_s = name, every_s
        self._bar: tqdm[Any] | None = None
        self._began = self._told = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        """Show that `done` of `total` tiles are encoded."""
        if sys.stderr.isatty():
            if self._bar is None:
                self._bar = tqdm(total=total, desc=self._name, unit="tile", file=sys.stderr)
            self._bar.update(done - self._bar.n)
            return
        now = time.monotonic()
        if done and now - self._told >= self._every_s:
            self._told = now
            rate = done / (now - self._began)
            left = format_seconds((total - done) / rate)
            click.echo(
                f"{self._name}: {done} of {total} tiles, {rate:.1f} tiles/s, {left} left", err=True
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
