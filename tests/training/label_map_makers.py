"""Small label maps, and their distances by all pairs of pixels, for the tests of objects."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.spatial.distance import cdist

Labels = npt.NDArray[np.int64]


def boxes(*items: tuple[int, int, int, int, int], size: tuple[int, int] = (20, 30)) -> Labels:
    """A map of size (width, height) with rectangles (id, x, y, width, height)."""
    labels = np.zeros(size[::-1], np.int64)
    for number, x, y, width, height in items:
        labels[y : y + height, x : x + width] = number
    return labels


def random_blobs(rng: np.random.Generator, size: tuple[int, int], count: int) -> Labels:
    """Discs and rings of random place and size over one another: broken, holed, touching."""
    labels = np.zeros(size, np.int64)
    y, x = np.mgrid[: size[0], : size[1]]
    for k in rng.permutation(count) + 1:
        radius = rng.uniform(1, 9)
        distance = np.hypot(y - rng.uniform(0, size[0]), x - rng.uniform(0, size[1]))
        labels[(distance < radius) & (distance >= radius * rng.choice([0, 0, 0.6]))] = k
    return labels


def slow_hausdorff(a: npt.NDArray[np.bool_], b: npt.NDArray[np.bool_]) -> float:
    distances = cdist(np.argwhere(a), np.argwhere(b))
    return float(max(distances.min(axis=1).max(), distances.min(axis=0).max()))
