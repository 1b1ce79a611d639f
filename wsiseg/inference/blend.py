"""Window probabilities blended into labels, chunk by chunk. Knows no networks and no slides.

A pixel's probabilities are the mean over its windows, weighted by a smooth weight that is never
zero, so that a window's edge, where the network sees least, counts least. The mean is kept up to
date window by window, mean += w / (sum of weights) * (p - mean): the sum of w p over the sum of w,
but where all windows agree on a pixel it is their value bit for bit. When the last window that
touches a chunk has been added, the chunk is written and forgotten.

Of a network that gives a map of borders beside its classes, that map is blended in the same way and
kept beside the labels.

Memory bound: the accumulators of the chunks that are begun and not finished, one float32 a pixel
for each map and one for the weights. What exceeds `memory_bytes` is kept in files beside the
canvas, least recently used first, and read back bit for bit.

The sums are kept on the device that the probabilities come from. Where that is no CPU, only labels
and confidences leave it, and threads write them while the device goes on.
"""

from __future__ import annotations

import secrets
import shutil
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from wsiseg.canvas import Canvas
from wsiseg.canvas_store import unwritable
from wsiseg.errors import CanvasError, ModelError
from wsiseg.geometry import Box, Point
from wsiseg.inference.contracts import TissueLike
from wsiseg.inference.plan import Plan
from wsiseg.inference.transfer import on_its_way
from wsiseg.inference.writing import Writer

Floats = npt.NDArray[np.float32]
UInt8 = npt.NDArray[np.uint8]
Key = tuple[int, int]
WAITING = 64
"""Finished chunks that may wait to be written."""


def window_weight(window_px: int) -> Floats:
    """(window, window) float32 weights: the product of two raised cosines, sin^2(pi (i + 1/2) / n).

    They are never 0 but have no floor: with one of 0.001 the probability jumped 1.8 times as much
    across the borders of windows as elsewhere, where next to nothing was found.
    """
    axis = np.sin(np.pi * (np.arange(window_px) + 0.5) / window_px) ** 2
    return np.outer(axis, axis).astype(np.float32)


def accumulator_bytes(map_count: int, chunk_px: int) -> int:
    """Bytes of the accumulator of one whole chunk."""
    return 4 * (map_count + 1) * chunk_px * chunk_px


class Accumulators:
    """Float32 arrays by chunk, of which at most `memory_bytes` are in memory (and at least one).

    Attributes:
        spilled: how many times an array was written to disk.
    """

    def __init__(
        self, folder: Path, *, memory_bytes: int, device: torch.device | None = None
    ) -> None:
        """Arrays that do not fit go to `folder`, which is made then and removed by `close`."""
        self._folder, self._limit, self._device = folder, memory_bytes, device
        self._live: OrderedDict[Key, Tensor] = OrderedDict()
        self._on_disk: dict[Key, tuple[int, ...]] = {}
        self._bytes = 0
        self.spilled = 0

    def get(self, key: Key, shape: tuple[int, ...]) -> Tensor:
        """The array of a chunk, for changing in place; zeros of `shape` at the first call."""
        if key in self._live:
            self._live.move_to_end(key)
            return self._live[key]
        array = self._load(key) if key in self._on_disk else self._zeros(shape)
        self._live[key] = array
        self._bytes += array.nbytes
        while self._bytes > self._limit and len(self._live) > 1:
            self._spill(*self._live.popitem(last=False))
        return array

    def _zeros(self, shape: tuple[int, ...]) -> Tensor:
        return torch.zeros(shape, dtype=torch.float32, device=self._device)

    def pop(self, key: Key) -> Tensor:
        """The array of a chunk, which is forgotten."""
        array = self._live.pop(key)
        self._bytes -= array.nbytes
        return array

    def close(self) -> None:
        """Forget all arrays and remove their files."""
        self._live.clear()
        self._on_disk.clear()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _path(self, key: Key) -> Path:
        return self._folder / f"{key[0]}-{key[1]}.f32"

    def _spill(self, key: Key, array: Tensor) -> None:
        try:
            self._folder.mkdir(exist_ok=True)
            self._path(key).write_bytes(array.cpu().numpy().data)  # tofile loses the reason
        except OSError as e:
            raise unwritable(self._folder, e) from e
        self._on_disk[key] = tuple(array.shape)
        self._bytes -= array.nbytes
        self.spilled += 1

    def _load(self, key: Key) -> Tensor:
        shape = self._on_disk.pop(key)
        try:
            array = np.fromfile(self._path(key), np.float32).reshape(shape)
            self._path(key).unlink()
        except (OSError, ValueError) as e:
            raise CanvasError(f"{self._path(key)}: cannot read back ({e})") from e
        return torch.from_numpy(array).to(self._device)


class Blender:
    """Blends the windows of a plan into a canvas.

    Attributes:
        spilled: how many times an accumulator was written to disk for lack of memory.
        whole: whether finished chunks come to `write` with all probabilities from any device.
    """

    whole = False

    def __init__(
        self,
        plan: Plan,
        class_count: int,
        canvas: Canvas,
        *,
        tissue: TissueLike | None = None,
        memory_bytes: int = 1 << 29,
        device: torch.device | None = None,
    ) -> None:
        """Pixels outside `tissue` are written as 0 (None: all pixels are tissue).

        The plan holds all windows that touch a chunk which is not done in the canvas; files that
        an interrupted run left beside it are removed.
        Where the canvas has borders, a map of those comes after the `class_count` of the classes.
        """
        self._plan, self._classes, self._canvas = plan, class_count, canvas
        self._maps = class_count + int(canvas.has_border)
        self._tissue = tissue
        counts = plan.windows_per_chunk(canvas.chunk_px)
        self._left = {key: n for key, n in counts.items() if not canvas.is_done(*key)}
        for left_behind in canvas.path.glob("spill*"):
            shutil.rmtree(left_behind, ignore_errors=True)
        folder = canvas.path / f"spill-{secrets.token_hex(4)}"
        self._device = device or torch.device("cpu")
        self._store = Accumulators(folder, memory_bytes=memory_bytes, device=self._device)
        self._weight = torch.from_numpy(window_weight(plan.window_px)).to(self._device)
        self._writer = None if self._device.type == "cpu" else Writer(WAITING)

    @property
    def spilled(self) -> int:
        """How many times an accumulator went to disk."""
        return self._store.spilled

    def add(self, probabilities: Tensor, windows: Sequence[Point]) -> None:
        """Add windows, each exactly once, in any order; to chunks that are done they add nothing.

        Args:
            probabilities: (B, C[+1], window, window) float32 on any device, finite.
            windows: B places of windows of the plan.

        Raises:
            CanvasError: the canvas or the files beside it cannot be written.
            ModelError: values of a chunk are no numbers; of what a thread writes, that is raised
                by a later call or by `finish`.
        """
        for values, place in zip(probabilities.float().to(self._device), windows, strict=True):
            for key in self._plan.window_chunks(place, self._canvas.chunk_px):
                if key in self._left:
                    self._add_to_chunk(key, values, place)

    def finish(self) -> None:
        """End the work: every window of the plan has been added.

        Raises:
            CanvasError: some window is missing.
            ModelError: values of a chunk are no numbers.
        """
        if self._writer is not None:
            self._writer.finish()
        self.close()
        if self._left:
            raise CanvasError(f"{self._canvas.path}: {len(self._left)} chunks lack windows")

    def close(self) -> None:
        """Drop what is not finished, and its files."""
        if self._writer is not None:
            self._writer.close()
        self._store.close()

    def write(self, row: int, column: int, state: Floats) -> None:
        """Turn a finished chunk (maps + 1, h, w), means and sum of weights, into labels."""
        self._put((row, column), *self._planes(torch.from_numpy(state)))

    def _planes(self, state: Tensor) -> list[Tensor]:
        """Of a finished chunk: whether its means are numbers, 1 where seen, labels, confidence, and
        borders if there are any."""
        best = state[0].clone()
        labels = torch.zeros(best.shape, dtype=torch.uint8, device=best.device)
        for index in range(1, self._classes):  # argmax, the first of equals, in less time
            values = state[index]
            later = _greater(values, best).mul_(index)
            torch.maximum(labels, later, out=labels)
            torch.maximum(best, values, out=best)  # keeps what is no number
        maps = [best, state[-2]] if self._canvas.has_border else [best]
        sums = torch.stack([m.sum() for m in maps])  # of numbers up to 1, so one that is none shows
        good = torch.isfinite(sums).all()
        return [good, state[-1] > 0, labels.add_(1), *(_bytes(m) for m in maps)]

    def _put(self, key: Key, *planes: Tensor) -> None:
        """Write the planes of a finished chunk, 0 where nothing was seen or is to be.

        Raises:
            ModelError: its means are no numbers; it is not done then.
        """
        good, seen, labels, best, *border = (p.numpy() for p in planes)
        if not good:
            box = self._canvas.chunk_box(*key)
            raise ModelError(
                f"{self._canvas.path}: the model gave values that are no numbers in the chunk at"
                f" ({box.x}, {box.y}); try --precision fp32, or another model"
            )
        if self._tissue is not None:
            seen = seen & self._tissue.region(self._canvas.chunk_box(*key), self._canvas.grid)
        self._canvas.write_chunk(*key, labels * seen, best * seen, *(b * seen for b in border))

    def _finish_chunk(self, key: Key, state: Tensor) -> None:
        if self._writer is None or self.whole:
            self.write(*key, state.cpu().numpy())
            return
        planes = [on_its_way(p) for p in self._planes(state)]
        self._writer.give(partial(self._put_later, key, planes))

    def _put_later(self, key: Key, planes: list[tuple[Tensor, Any]]) -> None:
        """Write planes once they are there."""
        for _, ready in planes:
            if ready is not None:
                ready.synchronize()
        self._put(key, *(plane for plane, _ in planes))

    def _add_to_chunk(self, key: Key, values: Tensor, place: Point) -> None:
        chunk = self._canvas.chunk_box(*key)
        shape = (self._maps + 1, chunk.height, chunk.width)
        state = self._store.get(key, shape)
        common = chunk.intersection(self._plan.window_box(place))
        inside = Box(common.x - chunk.x, common.y - chunk.y, common.width, common.height).slices
        window = Box(common.x - place.x, common.y - place.y, common.width, common.height).slices
        weights = state[-1][inside].add_(self._weight[window])
        means = state[:-1][(slice(None), *inside)]
        means.lerp_(values[(slice(None), *window)], self._weight[window] / weights)
        self._left[key] -= 1
        if not self._left[key]:
            del self._left[key]
            self._finish_chunk(key, self._store.pop(key))


def _greater(a: Tensor, b: Tensor) -> Tensor:
    """uint8, 1 where a > b; numpy compares four times as fast as torch does on a CPU."""
    if a.device.type == "cpu":
        return torch.from_numpy(np.greater(a.numpy(), b.numpy()).view(np.uint8))
    return (a > b).view(torch.uint8)


def _bytes(probabilities: Tensor) -> Tensor:
    """Probabilities x 255, rounded."""
    return (probabilities * 255).round_().clamp_(0, 255).to(torch.uint8)
