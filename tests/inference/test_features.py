"""The schedule of tile loads, and the store that follows it."""

from unittest import mock

import numpy as np
import pytest
import torch
from inference_fakes import MemoryTissue

from wsiseg.geometry import Grid, Size
from wsiseg.inference.features import FeatureStore, Schedule, groups, schedule
from wsiseg.inference.plan import Plan, plan
from wsiseg.inference.side_by_side import MOST


def layout_of(width: int, height: int, overlap: int = 32) -> Plan:
    grid = Grid.at_mpp(Size(width, height), 0.5, 0.5)
    random = np.random.default_rng(width)
    mask = random.random((height, width)) < 0.002
    return plan(grid, MemoryTissue(mask), window_px=48, tile_px=16, overlap_px=overlap)


def check(layout: Plan, loads: Schedule) -> None:
    """Every window takes the right tiles, from loads that exist in the order of first need."""
    assert (loads.tiles[loads.window_loads] == layout.window_tiles).all()
    first = [int(np.argmax((loads.window_loads == k).any(axis=1))) for k in range(len(loads.tiles))]
    assert first == sorted(first)
    for load in range(len(loads.tiles)):
        users = np.flatnonzero((loads.window_loads == load).any(axis=1))
        assert loads.last_window[load] == users.max()


def kept_between_windows(loads: Schedule) -> int:
    """The most loads that are needed both at or before a window and after it."""
    most = 0
    for window in range(len(loads.window_loads)):
        begun = np.unique(loads.window_loads[: window + 1])
        most = max(most, int((loads.last_window[begun] > window).sum()))
    return most


def slow_fewest_loads(layout: Plan, capacity: int) -> int:
    """Belady's rule, looking ahead through all windows each time."""
    rows = layout.window_tiles.tolist()
    live: set[int] = set()
    count = 0
    for i, row in enumerate(rows):
        count += len(set(row) - live)
        live |= set(row)
        later = {t: next((j for j in range(i + 1, len(rows)) if t in rows[j]), None) for t in live}
        wanted = sorted((j, t) for t, j in later.items() if j is not None)
        live = {t for _, t in wanted[:capacity]}
    return count


def test_with_room_each_tile_is_loaded_exactly_once() -> None:
    layout = layout_of(300, 260)
    loads = schedule(layout, capacity=10**9)
    check(layout, loads)
    assert sorted(loads.tiles.tolist()) == list(range(len(layout.tiles)))
    assert loads.recomputed == 0


@pytest.mark.parametrize("capacity", [0, 1, 7, 20, 45])
def test_short_memory_keeps_its_bound_and_loads_as_few_as_can_be(capacity: int) -> None:
    layout = layout_of(200, 160)
    loads = schedule(layout, capacity=capacity)
    check(layout, loads)
    assert kept_between_windows(loads) <= capacity
    assert loads.recomputed == len(loads.tiles) - len(layout.tiles)
    slow = slow_fewest_loads(layout, capacity)
    assert abs(len(loads.tiles) - slow) <= 0.02 * slow  # ties between equals may fall otherwise


@pytest.mark.parametrize(("batch", "group"), [(1, 1), (4, 1), (16, 3), (64, 7)])
def test_slots_are_enough_and_no_more(batch: int, group: int) -> None:
    layout = layout_of(200, 160)
    loads = schedule(layout, capacity=20)
    size = loads.slots(batch_size=batch, group=group)
    store = FeatureStore(size, dtype=torch.float32, device=torch.device("cpu"))
    loaded = most = 0
    for start, stop in groups(len(layout.windows), group):
        while loaded <= loads.window_loads[start:stop].max():
            end = min(loaded + batch, len(loads.tiles))
            values = torch.from_numpy(loads.tiles[loaded:end]).float()
            store.put(range(loaded, end), (values.view(-1, 1, 1, 1),))
            loaded = end
        most = max(most, len(store))
        (maps,) = store.windows(loads.window_loads[start:stop])
        assert maps.shape == (stop - start, 3, 3, 1, 1, 1)
        assert (maps.numpy().reshape(-1, 9) == layout.window_tiles[start:stop]).all()
        store.release(loads.ended(start, stop))
    assert len(store) == 0
    assert most == size


@pytest.mark.parametrize("first", [torch.contiguous_format, torch.channels_last])
def test_on_a_cpu_the_layout_does_not_depend_on_the_first_batch(first: torch.memory_format) -> None:
    store = FeatureStore(1, dtype=torch.float32, device=torch.device("cpu"))
    maps = torch.arange(24.0).view(1, 2, 3, 4)
    store.put(range(1), (maps.contiguous(memory_format=first),))
    (found,) = store.windows(np.zeros((1, 1), np.int64))
    assert found.is_contiguous()
    assert torch.equal(found[0, 0], maps)


def test_maps_of_a_window_are_put_together_when_they_are_asked_for() -> None:
    store = FeatureStore(4, dtype=torch.float32, device=torch.device("cpu"))
    maps = [torch.arange(4.0 * n).view(4, n, 1, 1) for n in (1, 2, 3)]
    store.put(range(4), tuple(maps))
    with mock.patch.object(store, "_gather", wraps=store._gather) as gather:
        found = store.windows(np.array([[3, 1, 0, 2]]))
        assert len(found) == 3
        assert gather.call_count == 0
        expected = [m[[3, 1, 0, 2]].view(1, 2, 2, -1, 1, 1) for m in maps]
        assert torch.equal(found[1], expected[1])
        assert gather.call_count == 1
        for some in (slice(None), slice(1, 3), slice(0, 0)):
            assert all(map(torch.equal, found[some], expected[some]))
            assert len(found[some]) == len(expected[some])
        assert torch.equal(found[-1], expected[-1])


def test_groups() -> None:
    assert list(groups(7, 3)) == [(0, 3), (3, 6), (6, 7)]
    assert list(groups(0, 3)) == []


@pytest.mark.parametrize(("overlap", "most"), [(256, 1.08), (512, 1.32)])
def test_few_tiles_of_the_full_size_network_are_encoded_twice(overlap: int, most: float) -> None:
    grid = Grid.at_mpp(Size(30_000, 40_000), 0.5, 0.5)
    layout = plan(grid, None, window_px=768, tile_px=256, overlap_px=overlap)
    tile = 6_033_408 * 4  # bytes, in float32
    loads = schedule(layout, capacity=(768 << 20) // tile - 9 - MOST)
    assert len(layout.tiles) < len(loads.tiles) < most * len(layout.tiles)
