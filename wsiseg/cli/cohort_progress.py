"""Progress of a cohort on stderr: a line that stays on a terminal, a line now and then elsewhere.

Knows slides by name only.
"""

from __future__ import annotations

import shutil
import sys
import time
from typing import Any

from tqdm import tqdm

from wsiseg.cli.progress import format_seconds
from wsiseg.cli.say import say
from wsiseg.inference.cohort import ELSEWHERE, FAILED, Outcome

NAMED = 4
"""So many running slides are named at most."""


class CohortProgress:
    """Counts slides that are done, failed and running, and estimates the time that is left."""

    def __init__(self, total: int, *, every_s: float = 15.0) -> None:
        """Of `total` slides; where no terminal is, a line comes every `every_s` seconds at most."""
        self._total, self._every_s = total, every_s
        self._statuses: dict[str, str] = {}
        self._running: dict[str, float] = {}
        self._worked = 0
        self._began = self._told = time.monotonic()
        self._line: tqdm[Any] | None = None

    def running(self, stem: str, share: float) -> None:
        """A slide is at work, and `share` of it, from 0 to 1, is done."""
        self._running[stem] = share

    def stopped(self, stem: str) -> None:
        """A slide is not at work any more, and not done."""
        self._running.pop(stem, None)

    def drop(self) -> None:
        """One that was counted is no slide of its own."""
        self._total -= 1

    def ended(self, outcome: Outcome) -> None:
        """A slide came to an end."""
        stem = outcome.task.stem
        self.stopped(stem)
        self._statuses[stem] = outcome.status
        self._worked += outcome.status not in (FAILED, ELSEWHERE) and not outcome.earlier

    def text(self) -> str:
        """The state in words, in one line."""
        found = list(self._statuses.values())
        failed, elsewhere = found.count(FAILED), found.count(ELSEWHERE)
        done = len(found) - failed - elsewhere
        parts = [f"{done} of {self._total} slides done"]
        parts += [f"{failed} failed"] * bool(failed)
        parts += [f"{elsewhere} {ELSEWHERE}"] * bool(elsewhere)
        if self._running:
            named = [f"{k} {100 * v:.0f}%" for k, v in list(self._running.items())[:NAMED]]
            named += ["..."] * (len(self._running) > NAMED)
            parts.append(f"{len(self._running)} running ({', '.join(named)})")
        left = self._seconds_left(self._total - len(found))
        return ", ".join(parts + ([] if left is None else [f"about {format_seconds(left)} left"]))

    def show(self) -> None:
        """Show the state: at once on a terminal, else if it is time for a line."""
        if sys.stderr.isatty():
            if self._line is None:
                self._line = tqdm(bar_format="{desc}", file=sys.stderr, leave=False)
            width = shutil.get_terminal_size().columns - 1
            self._line.set_description_str(self.text()[:width])
            return
        self.tell()

    def tell(self) -> None:
        """Print the state as a line of its own, if it is time for one."""
        if time.monotonic() - self._told >= self._every_s:
            self._told = time.monotonic()
            say(f"wsiseg: {self.text()}", err=True)

    def clear(self) -> None:
        """Make room for other text; the state comes back when it is shown next."""
        if self._line is not None:
            self._line.close()
            self._line = None

    def end(self) -> None:
        """Show no more; of several slides the last state stays as a line."""
        self.clear()
        if self._total > 1:
            took = format_seconds(time.monotonic() - self._began)
            say(f"wsiseg: {self.text()}, in {took}", err=True)

    def _seconds_left(self, slides: int) -> float | None:
        """From the slides that were worked on so far; None while there is too little to tell."""
        parts = sum(self._running.values())
        worked = self._worked + parts
        if slides < 1 or worked < 0.05:
            return None
        return (time.monotonic() - self._began) * (slides - parts) / worked
