"""Plans against a slow version that looks at every pixel."""

import numpy as np
import pytest
from inference_fakes import MemoryTissue

from wsiseg.errors import ModelError, UsageError
from wsiseg.geometry import Grid, Point, Size
from wsiseg.inference.plan import BLOCK_COLUMNS, Plan, axis_places, plan

WINDOW, TILE = 48, 16


def grid_of(width: int, height: int) -> Grid:
    return Grid.at_mpp(Size(width, height), 0.5, 0.5)


def make(grid: Grid, tissue: MemoryTissue | None = None, overlap: int = 16) -> Plan:
    return plan(grid, tissue, window_px=WINDOW, tile_px=TILE, overlap_px=overlap)


def slow_windows(grid: Grid, mask: np.ndarray, overlap: int) -> set[tuple[int, int]]:
    """Every window place, pixel by pixel along each axis, that holds a tissue pixel."""

    def axis(size: int) -> list[int]:
        found, place = [], 0
        while place + WINDOW < size:
            found.append(place)
            place += WINDOW - overlap
        return [*found, max(0, size - WINDOW)]

    return {
        (x, y)
        for x in axis(grid.size.width)
        for y in axis(grid.size.height)
        if any(
            mask[j, i]
            for j in range(y, min(y + WINDOW, grid.size.height))
            for i in range(x, min(x + WINDOW, grid.size.width))
        )
    }


SIZES = [1, 15, 47, 48, 49, 79, 80, 81, 96, 131]


@pytest.mark.parametrize("width", SIZES)
@pytest.mark.parametrize("overlap", [0, 16, 24, 32, 45])
def test_every_pixel_is_in_a_window_and_the_last_one_is_flush(width: int, overlap: int) -> None:
    grid = grid_of(width, 60)
    layout = make(grid, overlap=overlap)
    seen = np.zeros((60, width), bool)
    for x, y in layout.windows:
        assert x >= 0
        assert x + WINDOW <= max(width, WINDOW), "inside, unless the slide is smaller"
        seen[layout.window_box(Point(int(x), int(y))).slices] = True
    assert seen.all()
    assert layout.windows[:, 0].max() == max(0, width - WINDOW)
    assert len({tuple(w) for w in layout.windows.tolist()}) == len(layout.windows)


@pytest.mark.parametrize("seed", range(8))
def test_windows_and_tiles_are_those_of_the_slow_version(seed: int) -> None:
    random = np.random.default_rng(seed)
    width, height = (int(v) for v in random.integers(10, 220, 2))
    overlap = int(random.integers(0, WINDOW - 8))
    mask = np.zeros((height, width), bool)
    for _ in range(3):
        y, x = int(random.integers(0, height)), int(random.integers(0, width))
        mask[y : y + int(random.integers(1, 20)), x : x + int(random.integers(1, 20))] = True
    grid = grid_of(width, height)
    layout = make(grid, MemoryTissue(mask), overlap)
    windows = [tuple(w) for w in layout.windows.tolist()]
    assert set(windows) == slow_windows(grid, mask, overlap)
    assert len(windows) == len(set(windows))
    steps = range(0, WINDOW, TILE)
    expected = {(x + i, y + j) for x, y in windows for j in steps for i in steps}
    assert {tuple(t) for t in layout.tiles.tolist()} == expected
    assert len(layout.tiles) == len(expected)
    for (x, y), row in zip(windows, layout.window_tiles, strict=True):
        assert [layout.tile_place(int(t)) for t in row] == [
            (x + i, y + j) for j in steps for i in steps
        ]


def test_windows_share_every_tile_at_strides_of_whole_tiles_and_none_at_half() -> None:
    size = WINDOW + 4 * 32
    shared = make(grid_of(size, size), overlap=16)
    assert len(shared.windows) == 25
    assert len(shared.tiles) == (size // TILE) ** 2
    assert shared.tiles_without_sharing == 25 * 9
    alone = make(grid_of(WINDOW + 24, WINDOW), overlap=24)
    assert len(alone.tiles) == alone.tiles_without_sharing == 18


def test_order_is_by_blocks_of_columns_and_the_same_every_time() -> None:
    grid = grid_of(WINDOW + 32 * (BLOCK_COLUMNS + 3), WINDOW + 32 * 4)
    layout = make(grid)
    block = layout.windows[:, 0] // 32 // BLOCK_COLUMNS
    order = np.lexsort((layout.windows[:, 0], layout.windows[:, 1], block))
    assert (order == np.arange(len(order))).all()
    assert (make(grid).windows == layout.windows).all()


@pytest.mark.parametrize("chunk", [20, 32, 64, 500])
def test_chunk_counts_are_those_of_the_slow_version(chunk: int) -> None:
    layout = make(grid_of(150, 110), overlap=20)
    slow: dict[tuple[int, int], int] = {}
    for x, y in layout.windows.tolist():
        touched = {
            (j // chunk, i // chunk)
            for j in range(y, min(y + WINDOW, 110))
            for i in range(x, min(x + WINDOW, 150))
        }
        for key in touched:
            slow[key] = slow.get(key, 0) + 1
    assert layout.windows_per_chunk(chunk) == slow
    assert 1 <= layout.live_chunks(chunk) <= len(slow)


def test_what_is_live_in_a_block_does_not_grow_with_the_height() -> None:
    width = WINDOW + 32 * (BLOCK_COLUMNS - 1)
    live = [make(grid_of(width, height)).live_chunks(32) for height in (600, 2400)]
    assert live[0] == live[1]


def test_no_tissue_gives_no_windows() -> None:
    layout = make(grid_of(100, 100), MemoryTissue(np.zeros((100, 100), bool)))
    assert len(layout.windows) == len(layout.tiles) == layout.tiles_without_sharing == 0
    assert layout.windows_per_chunk(32) == {}


def test_axis_places() -> None:
    assert axis_places(47, 48, 32) == [0]
    assert axis_places(48, 48, 32) == [0]
    assert axis_places(49, 48, 32) == [0, 1]
    assert axis_places(80, 48, 32) == [0, 32]
    assert axis_places(81, 48, 32) == [0, 32, 33]


@pytest.mark.parametrize("overlap", [-1, 46, 48, 100])
def test_impossible_overlap(overlap: int) -> None:
    with pytest.raises(UsageError, match=f"overlap of {overlap} px: must be from 0 to 45"):
        make(grid_of(100, 100), overlap=overlap)


def test_impossible_window() -> None:
    with pytest.raises(ModelError, match="no multiple"):
        plan(grid_of(9, 9), None, window_px=50, tile_px=16)
