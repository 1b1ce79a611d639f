"""Runs a segmenter on tiles and windows at a chosen precision. Knows no slides and no blending.

Features are kept in the precision of the work: float32 for fp32, the half type otherwise.

On a CPU every tile and every window is computed by itself, tiles side by side, windows, which take
much more memory, one after the other. Kernels round differently at different batch sizes, so this
is what makes results the same bit for bit for any batch, order and overlap; it costs nothing, as
batches do not make a CPU faster. Other devices compute a batch together, or in parts where they
lack the memory; which those are is remembered as long as the model is.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from wsiseg.errors import ModelError, UsageError
from wsiseg.geometry import Point
from wsiseg.inference.features import FeatureStore, Schedule
from wsiseg.inference.memory import Parts, memory_said
from wsiseg.inference.plan import Plan
from wsiseg.inference.runtime import CompiledExtractor
from wsiseg.inference.side_by_side import side_by_side
from wsiseg.inference.transfer import on_its_way
from wsiseg.models.base import Features, to_tensor
from wsiseg.models.segmenter import Segmenter

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
AHEAD = 4
"""Groups of windows that may be queued on a CUDA device before the first is looked at."""
_PARTS: WeakKeyDictionary[nn.Module, dict[str, Parts]] = WeakKeyDictionary()
"""What the memory of a device holds, by extractor: learnt once a run."""


def resolve_precision(precision: str, device: torch.device) -> str:
    """ "fp32", "bf16" or "fp16" for a request that may be "auto".

    "auto" is bf16 on a CUDA device that has it (fp16 on an older one) and fp32 elsewhere.

    Raises:
        UsageError: an unknown precision, or one that the device does not have.
    """
    kind = device.type
    possible = {"cuda": ("fp32", "bf16", "fp16"), "cpu": ("fp32", "bf16")}.get(kind, ("fp32",))
    if precision == "auto":
        if kind != "cuda":
            return "fp32"
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if precision not in possible:
        raise UsageError(
            f"precision {precision!r} is not available on {kind}; take auto, {', '.join(possible)}"
        )
    return precision


class Stopwatch:
    """Seconds spent in each named part of a loop."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._began = time.perf_counter()

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Add the time of the block to `part`."""
        began = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - began
            self.seconds[part] = self.seconds.get(part, 0.0) + spent

    @property
    def total(self) -> float:
        """Seconds since the stopwatch was made."""
        return time.perf_counter() - self._began


class _Check(NamedTuple):
    """Whether windows have numbers: (B,) bool on the CPU, there once the event has come."""

    good: Tensor
    ready: Any
    places: Sequence[Point]


class Engine:
    """A segmenter in evaluation mode, without gradients, at one precision.

    Attributes:
        segmenter: the model.
        precision: "fp32", "bf16" or "fp16".
        runtime: "torch", or "openvino" for a segmenter of `to_openvino`.
        dtype: the type in which features are kept.
        device: where it runs.
        parts: how many tiles and windows are computed at a time.
    """

    def __init__(self, segmenter: Segmenter, *, precision: str = "auto", seed: int = 0) -> None:
        """Raises UsageError where the precision cannot be."""
        self.segmenter = segmenter.eval()
        self.device = segmenter.device
        self.precision = resolve_precision(precision, self.device)
        compiled = isinstance(segmenter.extractor, CompiledExtractor)
        self.runtime = "openvino" if compiled else "torch"
        self.dtype = DTYPES[self.precision]
        self._seed = seed
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # events, graphs and kernels take the current one
        self._checks: deque[_Check] = deque()
        known = _PARTS.setdefault(segmenter.extractor, {}) if self.batches else {}
        parts = Parts(self.device, together=self.batches)
        self.parts = known.setdefault(str(self.device), parts)

    @property
    def batches(self) -> bool:
        """Whether the device computes a batch together."""
        return self.device.type != "cpu"

    @contextmanager
    def _mode(self) -> Iterator[None]:
        """Without gradients and at the precision, for one thread."""
        full = self.precision == "fp32"
        half = nullcontext() if full else torch.autocast(self.device.type, dtype=self.dtype)
        with torch.inference_mode(), half:
            yield

    def encode(self, tiles: Sequence[npt.NDArray[np.uint8]], places: Sequence[Point]) -> Features:
        """Features of (tile, tile, 3) uint8 tiles at their places, one (B, ...) tensor a map."""
        with self._mode():
            return tuple(_joined(maps) for maps in zip(*self.parts_of(tiles, places), strict=True))

    def parts_of(
        self, tiles: Sequence[npt.NDArray[np.uint8]], places: Sequence[Point]
    ) -> list[Features]:
        """The same in the parts that they were computed in, which together are all of the tiles."""
        with self._mode():
            images = to_tensor(tiles, device=self.device)

            def encode(a: int, b: int) -> Features:
                with self._mode():  # of the thread that runs it
                    return self.segmenter.tile_features(images[a:b], places[a:b], self._seed)

            if self.batches or self.runtime != "torch":  # what is compiled runs once at a time
                return self.parts.run("tiles", len(images), encode)
            with memory_said(self.device):
                return side_by_side(len(images), lambda i: encode(i, i + 1))

    def classify(self, features: Features, places: Sequence[Point]) -> Tensor:
        """(B, C[+1], window, window) float32 probabilities of the windows at `places`.

        A CUDA device is not waited for: what it gave is looked at some calls later, or by `settle`.

        Raises:
            ModelError: the network gave values that are no numbers.
        """
        with self._mode():
            parts = self.parts.run(
                "windows",
                len(places),
                lambda a, b: self.segmenter.window_probabilities(
                    features if (a, b) == (0, len(places)) else tuple(m[a:b] for m in features)
                ),
            )
            probabilities = _joined(parts)
            classes, last = probabilities[:, 0], probabilities[:, -1]  # all of a pixel, its border
            good = torch.isfinite(classes.sum(dim=(1, 2)) + last.sum(dim=(1, 2)))
        self._checks.append(_check(good, places))
        self.settle(AHEAD if probabilities.is_cuda else 0)
        return probabilities

    def settle(self, ahead: int = 0) -> None:
        """Look at what `classify` gave, but for the last `ahead` calls.

        Raises:
            ModelError: values that are no numbers.
        """
        while len(self._checks) > ahead:
            good, ready, places = self._checks.popleft()
            if ready is not None:
                ready.synchronize()
            if not bool(good.all()):
                raise ModelError(self._not_numbers(places[good.tolist().index(False)]))

    def _not_numbers(self, place: Point) -> str:
        hint = "" if self.precision == "fp32" else "; try --precision fp32"
        return (
            f"model {self.segmenter.info.name} gave values that are no numbers in the window at"
            f" ({place.x}, {place.y}){hint or '; its weights are damaged'}"
        )


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(tuple(parts))


def _check(good: Tensor, places: Sequence[Point]) -> _Check:
    """What is to be looked at once the device has come so far."""
    return _Check(*on_its_way(good), places)


class WindowFeatures:
    """Features of groups of windows, encoding what is missing in full batches as they come.

    Memory bound: that of the schedule (`Schedule.slots`), allocated once.
    """

    def __init__(
        self, engine: Engine, layout: Plan, loads: Schedule, *, batch_size: int, group: int
    ) -> None:
        """For groups of at most `group` windows, taken in order."""
        self._engine, self._layout, self._loads = engine, layout, loads
        self._batch_size = batch_size
        self._store = FeatureStore(
            loads.slots(batch_size=batch_size, group=group),
            dtype=engine.dtype,
            device=engine.device,
        )
        self.encoded = 0

    def take(
        self, start: int, stop: int, tiles: Iterator[npt.NDArray[np.uint8]], watch: Stopwatch
    ) -> Iterator[int]:
        """Encode what windows [start, stop) need; gives the tiles encoded so far, batch by batch.

        Args:
            start: first window.
            stop: window after the last.
            tiles: pixels of the schedule's loads, in order.
            watch: takes the time of "read" and "encode".
        """
        need = int(self._loads.window_loads[start:stop].max()) + 1
        while self.encoded < need:
            first, last = self.encoded, min(self.encoded + self._batch_size, self.count)
            with watch("read"):
                batch = [next(tiles) for _ in range(first, last)]
            with watch("encode"):
                places = [self._layout.tile_place(int(t)) for t in self._loads.tiles[first:last]]
                for part in self._engine.parts_of(batch, places):
                    self._store.put(range(first, first + len(part[0])), part)
                    first += len(part[0])
            self.encoded = last
            yield last

    @property
    def count(self) -> int:
        """Tiles to encode in all."""
        return len(self._loads.tiles)

    def windows(self, start: int, stop: int) -> Features:
        """(B, R, K, channels, h, w) features of windows [start, stop), whose tiles were taken."""
        features = self._store.windows(self._loads.window_loads[start:stop])
        self._store.release(self._loads.ended(start, stop))
        return features
