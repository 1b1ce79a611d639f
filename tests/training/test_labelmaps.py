"""Distances of the objects of label maps against all pairs of pixels."""

from __future__ import annotations

import math

import numpy as np
import pytest
from label_map_makers import random_blobs, slow_hausdorff

from wsiseg.training.labelmaps import LabelMap, hausdorff


def test_objects_are_numbered_in_the_order_of_their_ids() -> None:
    got = LabelMap(np.array([[70_000, 70_000, 0], [9, 0, 300], [9, 9, 300]]))
    assert got.labels.tolist() == [[3, 3, 0], [1, 0, 2], [1, 1, 2]]
    assert (got.count, got.areas.tolist()) == (3, [2, 3, 2, 2])
    assert got.boxes[1:].tolist() == [[1, 2, 0, 1], [1, 2, 2, 2], [0, 0, 0, 1]]
    full = LabelMap(np.array([[4, 4], [7, 4]]))
    assert (full.labels.tolist(), full.areas.tolist()) == ([[1, 1], [2, 1]], [0, 3, 1])


@pytest.mark.parametrize("seed", range(20))
def test_every_pair_of_objects_against_all_pixel_distances(seed: int) -> None:
    rng = np.random.default_rng(100 + seed)
    first, second = (random_blobs(rng, (30, 40), 6) for _ in range(2))
    a, b = LabelMap(first), LabelMap(second)
    for i in range(1, a.count + 1):
        for j in range(1, b.count + 1):
            want = slow_hausdorff(a.labels == i, b.labels == j)
            assert hausdorff(a, i, b, j) == pytest.approx(want, abs=1e-9)


@pytest.mark.parametrize("turns", range(4))
def test_the_middle_of_a_bar_beside_two_dots_is_farthest(turns: int) -> None:
    dots, bar = (np.zeros((21, 20), np.int64) for _ in range(2))
    dots[[0, 20], 3] = 1
    bar[:, 8:11] = 1
    a, b = LabelMap(np.rot90(dots, turns)), LabelMap(np.rot90(bar, turns))
    assert hausdorff(a, 1, b, 1) == pytest.approx(math.hypot(10, 7))
