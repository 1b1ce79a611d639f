"""The time that a run may take, counted over all its parts. Knows no tasks."""

from __future__ import annotations

import math
import time

import torch

from wsiseg.training.processes import Processes


class Clock:
    """Counts from when it is made."""

    def __init__(self, minutes: float, spent_s: float = 0.0) -> None:
        """For `minutes` in all (0 = without end), of which a run that goes on has spent some."""
        self._limit_s = 60 * minutes if minutes else math.inf
        self._began = time.monotonic() - spent_s

    @property
    def spent_s(self) -> float:
        """Seconds of the run so far."""
        return time.monotonic() - self._began

    @property
    def left_s(self) -> float:
        """Seconds that are left, infinite without an end."""
        return max(0.0, self._limit_s - self.spent_s)

    def share(self, processes: Processes, device: torch.device) -> float:
        """Share of the time that is gone, 0 .. 1, the same in all processes; 0 without an end."""
        if self._limit_s == math.inf:
            return 0.0
        return processes.value(min(1.0, self.spent_s / self._limit_s), device)
