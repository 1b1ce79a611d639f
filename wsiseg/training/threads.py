"""How many threads make batches. Knows nothing else."""

from __future__ import annotations

import os

LEAST, MOST = 2, 8
"""Threads that make batches. More would wait for one another, as parts of the work are Python."""


def batch_threads(processes: int = 1) -> int:
    """Threads that make batches in one of the processes of a machine.

    A GPU takes patches faster than two threads make them, so there are as many as cores, less the
    one that trains.

    Args:
        processes: how many share the machine's cores.
    """
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(LEAST, min(MOST, cores // processes - 1))
