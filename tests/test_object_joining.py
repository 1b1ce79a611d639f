from __future__ import annotations

import heapq
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from scipy import ndimage

from wsiseg.joining import Contacts, distinctness, join, neighbours
from wsiseg.objects import ObjectsConfig, separate

Array = npt.NDArray[Any]


def part(labels: Array, border: Array, config: ObjectsConfig) -> Array:
    return separate(labels, border, background=(1,), mpp=1.0, config=config)


def blobs(seed: int) -> tuple[Array, Array]:
    """Labels 0 to 3 and a border, both in blobs."""
    rng = np.random.default_rng(seed)
    smooth = ndimage.gaussian_filter(rng.normal(size=(4, 40, 37)), (0, 2, 2))
    border = ndimage.gaussian_filter(rng.random((40, 37)), 1)
    border = np.rint(255 * (border - border.min()) / np.ptp(border)) / 255
    return smooth.argmax(0).astype(np.uint8), border.astype(np.float32)


def slow_join(labels: Array, objects: Array, border: Array, below: float) -> Array:
    """All pairs are measured anew on the pixels after every join."""
    objects = objects.astype(int)
    strength = np.rint(border * 255).astype(int)
    while True:
        weakest = (below, 0, 0)
        for a, b in combinations([n for n in np.unique(objects) if n], 2):
            between: list[int] = []
            for axis in (0, 1):
                n = labels.shape[axis] - 1
                one, two = [np.take(objects, range(s, s + n), axis) for s in (0, 1)]
                left, right = [np.take(strength, range(s, s + n), axis) for s in (0, 1)]
                here, there = [np.take(labels, range(s, s + n), axis) for s in (0, 1)]
                at = ((one == a) & (two == b) | (one == b) & (two == a)) & (here == there)
                between += np.maximum(left, right)[at].tolist()
            if between:
                area = min((objects == a).sum(), (objects == b).sum())
                mean = sum(between) / len(between) / 255
                value = mean / (1 - mean) * area / len(between)
                weakest = min(weakest, (value, a, b))
        if not weakest[1]:
            break
        objects[objects == weakest[2]] = weakest[1]
    return np.unique(objects, return_inverse=True)[1].reshape(objects.shape)


@pytest.mark.parametrize("seed", range(8))
def test_joined_objects_are_those_of_a_slow_obvious_version(seed: int) -> None:
    labels, border = blobs(seed)
    config = ObjectsConfig(border_threshold=0.401, min_core_um2=3, reach_um=2)
    apart = part(labels, border, config)
    joined = part(labels, border, replace(config, join_um=9.0))
    assert 0 < joined.max() < apart.max()
    assert np.array_equal(joined, slow_join(labels, apart, border, 9.0))
    stored = np.rint(border * 255).astype(np.uint8)
    assert np.array_equal(part(labels, stored, replace(config, join_um=9.0)), joined)


def two_halves(line: Array) -> tuple[Array, Array]:
    """A square of glands with a border of given strengths (20,) down its middle."""
    labels = np.full((20, 21), 2, np.uint8)
    border = np.zeros(labels.shape, np.float32)
    border[:, 10] = line
    return labels, border


def test_a_gap_in_a_border_joins_nothing_that_it_parts() -> None:
    line = np.full(20, 0.8)
    line[8:11] = 0.12
    labels, border = two_halves(line)
    plain = ObjectsConfig(border_threshold=0.3)
    assert part(labels, border, plain).max() == 1, "one leak joins"
    low = ObjectsConfig(border_threshold=0.1, join_um=5.0)
    assert part(labels, border, low).max() == 2


def test_a_weak_border_with_one_strong_pixel_parts_nothing() -> None:
    line = np.full(20, 0.15)
    line[5] = 0.9
    labels, border = two_halves(line)
    low = ObjectsConfig(border_threshold=0.1, join_um=5.0)
    assert part(labels, border, replace(low, join_um=0.0)).max() == 2
    assert part(labels, border, low).max() == 1


def test_a_narrow_contact_joins_less_than_a_wide_one() -> None:
    labels, border = two_halves(np.full(20, 0.4))
    low = ObjectsConfig(border_threshold=0.1, join_um=8.0)
    assert part(labels, border, low).max() == 1, "10 pixels deep, odds of 2 to 3"
    labels[3:-3, 10] = 1
    assert part(labels, border, low).max() == 2


def test_distinctness_is_in_micrometres() -> None:
    labels, border = two_halves(np.full(20, 0.4))
    config = ObjectsConfig(border_threshold=0.1, join_um=8.0)
    for mpp, count in ((1.0, 1), (1.3, 2)):
        assert separate(labels, border, background=(1,), mpp=mpp, config=config).max() == count


def test_the_least_distinct_are_joined_first() -> None:
    areas = np.array([0, 100, 100, 100])
    table = np.array([[1, 2], [2, 3], [20, 90], [1, 1]])
    assert distinctness(20, 1, 100) == pytest.approx(100 * 20 / 235)
    assert join(areas, table, 60).tolist() == [0, 1, 1, 1]
    assert join(areas, table, 50).tolist() == [0, 1, 1, 3]
    strong_end = np.array([[1, 2, 1], [2, 3, 3], [20, 90, 150], [1, 1, 1]])
    assert join(areas, strong_end, 44).tolist() == [0, 1, 1, 3], "100 * 240 / (270 * 2) = 44.4"
    assert join(areas, strong_end, 45).tolist() == [0, 1, 1, 1]


def test_a_whole_border_is_never_joined() -> None:
    assert join(np.array([0, 9, 9]), np.array([[1], [2], [255], [1]]), 1e9).tolist() == [0, 1, 2]


def test_an_object_that_grew_is_harder_to_join() -> None:
    areas = np.array([0, 50, 50, 200])
    table = np.array([[1, 2], [2, 3], [0, 100], [10, 1]])
    value = distinctness(100, 1, 50)
    assert join(areas, table[:, 1:], value * 1.5).tolist() == [0, 1, 2, 2]
    assert join(areas, table, value * 1.5).tolist() == [0, 1, 1, 3]


def test_contacts_of_a_pair_in_several_pieces_add_up() -> None:
    contacts = Contacts()
    a, b = np.array([5, -3, 5], np.int32), np.array([-3, 5, 7], np.int32)
    contacts.add(a, b, np.array([10, 20, 30], np.uint8))
    contacts.add(b, a)
    contacts.add(a[:0], b[:0])
    assert contacts.table().T.tolist() == [
        [-3, 5, 30, 2],
        [5, 7, 30, 1],
        [-3, 5, 0, 2],
        [5, 7, 0, 1],
    ]


def test_neighbours_are_sides_of_pixels_of_one_label() -> None:
    labels = np.array([[2, 2, 3], [2, 1, 3]], np.uint8)
    numbers = np.array([[1, 2, 3], [1, 0, 4]], np.int32)
    first, second = neighbours(labels, numbers)
    assert list(zip(first.tolist(), second.tolist(), strict=True)) == [(0, 1), (2, 5)]
    column = neighbours(labels[:, 2:].copy(), numbers[:, 2:].copy())
    assert [c.tolist() for c in column] == [[0], [1]]


@pytest.mark.parametrize("shape", [(1, 21), (21, 1)])
def test_a_single_row_or_column_is_joined(shape: tuple[int, int]) -> None:
    labels, border = np.full(shape, 2, np.uint8), np.zeros(shape)
    border.ravel()[10] = 0.4
    low = ObjectsConfig(border_threshold=0.1, join_um=8.0)
    assert part(labels, border, low).max() == 1
    assert part(labels, border, replace(low, join_um=5.0)).max() == 2


def test_without_borders_nothing_is_joined() -> None:
    labels = np.array([[2, 2, 3, 1, 2]], np.uint8)
    got = separate(labels, None, background=(1,), mpp=1.0, config=ObjectsConfig(join_um=1e6))
    assert got.tolist() == [[1, 1, 2, 0, 3]]


def count_pushes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that gets an entry at every push to a heap."""
    pushes: list[int] = []
    push = heapq.heappush
    monkeypatch.setattr(heapq, "heappush", lambda h, v: (pushes.append(1), push(h, v)))
    return pushes


def test_a_long_chain_and_a_hub_take_a_few_steps_a_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    pushes = count_pushes(monkeypatch)
    n = 20_000
    row, one = np.arange(1, n), np.ones(n - 1, np.int64)
    areas = np.ones(n + 1, np.int64)
    assert (join(areas, np.stack([row, row + 1, 0 * one, one]), 1)[1:] == 1).all()
    hub = np.stack([one, row + 1, row % 200, one])
    areas[1] = n
    joined = join(areas, hub, distinctness(100, 1, 1))
    assert (joined == 1).sum() == 1 + sum(r % 200 < 100 for r in row)
    assert len(pushes) < 6 * n


def test_specks_along_a_shared_edge_take_a_few_steps_a_pair(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pushes = count_pushes(monkeypatch)
    n, large = 400, 10**9
    one = np.ones(n, np.int64)
    # Each speck joins the first object and makes it more distinct from the second, just before
    # these two would be joined.
    value = [distinctness(250 * (k + 1), 1000 + k, large) for k in range(n)]
    areas = np.array([0, large, large, *(int(254 * v) - 1 for v in value)])
    speck = np.arange(3, n + 3)
    to_both = [np.stack([one, speck, one, one]), np.stack([2 * one, speck, 250 * one, one])]
    table = np.concatenate([[[1], [2], [250], [1000]], *to_both], axis=1)
    assert join(areas, table, value[-1]).tolist() == [0, 1, 2] + [1] * n
    assert len(pushes) < 6 * n
