"""Features of tiles, encoded once and kept while a window needs them. Knows no slide formats.

What is encoded when, kept how long and, where memory is short, encoded again is settled before
the work starts (`schedule`): a list of *loads* in the order in which windows first need them.
Each load is one tile encoded once. Without shortage the loads are exactly the distinct tiles.

Memory bound: `FeatureStore` holds at most `capacity` tiles that later windows need, the tiles of
the windows in hand and one batch of tiles ahead of them, in one block of memory a feature map.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import overload

import numpy as np
import numpy.typing as npt
import torch

from wsiseg.inference.plan import Plan
from wsiseg.models.base import Features
from wsiseg.models.segmenter import Segmenter

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Schedule:
    """Which tile each load encodes, and which loads each window takes.

    Attributes:
        tiles: (L,) index of the tile of each load, in the order of the loads.
        window_loads: (N, T) the load of each window's tiles.
        last_window: (L,) the last window that takes each load.
        recomputed: loads of tiles that had been encoded before and were dropped for memory.
    """

    tiles: Ints
    window_loads: Ints
    last_window: Ints
    recomputed: int

    @cached_property
    def _ends(self) -> tuple[Ints, Ints]:
        """Loads in the order of their last windows, and how many end by each window."""
        counts = np.bincount(self.last_window, minlength=len(self.window_loads))
        return np.argsort(self.last_window, kind="stable"), counts.cumsum()

    def ended(self, start: int, stop: int) -> Ints:
        """The loads whose last window is one of [start, stop)."""
        order, ends = self._ends
        return order[(ends[start - 1] if start else 0) : ends[stop - 1]]

    def slots(self, *, batch_size: int, group: int) -> int:
        """The most loads held at one time, for batches of tiles and groups of windows."""
        loaded = released = most = 0
        for start, stop in groups(len(self.window_loads), group):
            need = int(self.window_loads[start:stop].max()) + 1
            while loaded < need:
                loaded = min(loaded + batch_size, len(self.tiles))
            most = max(most, loaded - released)
            released += len(self.ended(start, stop))
        return most


def groups(count: int, size: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of consecutive groups of at most `size` out of `count`."""
    for start in range(0, count, size):
        yield start, min(start + size, count)


def schedule(plan: Plan, *, capacity: int) -> Schedule:
    """The loads for a plan when `capacity` tiles can be kept between one window and the next.

    When more would have to be kept, those that are needed latest are dropped (Belady's rule,
    IBM Systems Journal 5 (1966): the fewest loads possible).
    """
    uses = _uses(plan)
    cursor = np.zeros(len(plan.tiles), np.int64)
    loads: list[int] = []
    last: list[int] = []
    live: dict[int, int] = {}
    latest: list[tuple[int, int]] = []
    window_loads = np.empty_like(plan.window_tiles)
    for window, row in enumerate(plan.window_tiles.tolist()):
        for k, tile in enumerate(row):
            if tile not in live:
                live[tile] = len(loads)
                loads.append(tile)
                last.append(window)
            load = window_loads[window, k] = live[tile]
            last[load] = window
            cursor[tile] += 1
            if cursor[tile] == len(uses[tile]):
                del live[tile]
            else:
                heapq.heappush(latest, (-uses[tile][cursor[tile]], tile))
        while len(live) > capacity:
            when, tile = heapq.heappop(latest)
            if tile in live and uses[tile][cursor[tile]] == -when:
                del live[tile]
    distinct = len(set(loads))
    return Schedule(
        np.array(loads, np.int64), window_loads, np.array(last, np.int64), len(loads) - distinct
    )


def _uses(plan: Plan) -> list[list[int]]:
    """The windows that need each tile, in order."""
    uses: list[list[int]] = [[] for _ in range(len(plan.tiles))]
    for window, row in enumerate(plan.window_tiles.tolist()):
        for tile in row:
            uses[tile].append(window)
    return uses


def tile_bytes(segmenter: Segmenter, dtype: torch.dtype) -> int:
    """Bytes of one tile's features, kept as `dtype`."""
    side = segmenter.info.tile_px
    values = sum(s.channels * (side // s.stride) ** 2 for s in segmenter.map_specs)
    return values * torch.empty((), dtype=dtype).element_size()


class FeatureStore:
    """The features that windows still need, by load number, in the order that they have in memory.

    The maps of a tile lie in one row of a block: channel by channel on a CPU, whose results must
    not depend on which batch came first; elsewhere as in the first batch, or pixel by pixel.
    """

    def __init__(self, size: int, *, dtype: torch.dtype, device: torch.device) -> None:
        """A store of at most `size` tiles, whose memory is taken when the first ones come."""
        self._free = list(range(size - 1, -1, -1))
        self._slots: dict[int, int] = {}
        self._dtype, self._device = dtype, device
        self._blocks: tuple[torch.Tensor, ...] = ()
        self._shapes: list[torch.Size] = []
        self._by_pixel: list[bool] = []

    def __len__(self) -> int:
        return len(self._slots)

    def put(self, loads: range, features: Features) -> None:
        """Keep the features of a batch, one (B, channels, h, w) tensor a map."""
        if not self._blocks:
            size = len(self._free)
            self._shapes = [f.shape[1:] for f in features]
            on_cpu = self._device.type == "cpu"
            self._by_pixel = [not on_cpu and _pixel_by_pixel(f) for f in features]
            self._blocks = tuple(
                torch.empty((size, f[0].numel()), dtype=self._dtype, device=self._device)
                for f in features
            )
        slots = [self._free.pop() for _ in loads]
        self._slots.update(zip(loads, slots, strict=True))
        index = self._index(slots)
        for block, feature, by_pixel in zip(self._blocks, features, self._by_pixel, strict=True):
            rows = (feature.permute(0, 2, 3, 1) if by_pixel else feature).flatten(1)
            block.index_copy_(0, index, rows.to(self._dtype))

    def windows(self, loads: Ints) -> Features:
        """(B, R, K, channels, h, w) features of windows from their loads (B, R * K).

        On a CPU a map is put together when it is asked for, which must be before the next `put`.
        """
        slots = [self._slots[int(load)] for load in loads.ravel()]
        gather = partial(self._gather, self._index(slots), len(loads))
        maps = _Maps(gather, range(len(self._blocks)))
        return maps if self._device.type == "cpu" else tuple(maps)

    def _gather(self, index: torch.Tensor, count: int, number: int) -> torch.Tensor:
        """One map of `count` windows, whose tiles are in the slots of `index`."""
        c, h, w = self._shapes[number]
        rows = self._blocks[number].index_select(0, index)
        side = round((len(index) // count) ** 0.5)
        if self._by_pixel[number]:
            return rows.reshape(count, side, side, h, w, c).permute(0, 1, 2, 5, 3, 4)
        return rows.reshape(count, side, side, c, h, w)

    def _index(self, slots: list[int]) -> torch.Tensor:
        """Slots on the device, without waiting for it."""
        index = torch.tensor(slots)
        if self._device.type == "cuda":
            index = index.pin_memory()
        return index.to(self._device, non_blocking=True)

    def release(self, loads: Ints) -> None:
        """Forget loads that no later window takes."""
        self._free.extend(self._slots.pop(int(load)) for load in loads)


class _Maps(Sequence[torch.Tensor]):
    """Feature maps, each made by `make(number)` whenever it is asked for."""

    def __init__(self, make: Callable[[int], torch.Tensor], numbers: range) -> None:
        self._make, self._numbers = make, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> torch.Tensor: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[torch.Tensor]: ...

    def __getitem__(self, index: int | slice) -> torch.Tensor | Sequence[torch.Tensor]:
        if isinstance(index, slice):
            return _Maps(self._make, self._numbers[index])
        return self._make(self._numbers[index])


def _pixel_by_pixel(maps: torch.Tensor) -> bool:
    """Whether (B, channels, h, w) maps have the channels of a pixel side by side."""
    return not maps.is_contiguous() and maps.is_contiguous(memory_format=torch.channels_last)
