"""Files of unlabelled tissue that crops are drawn from. Knows no folders and no networks.

Crop k of batch n is a function of (seed, n, k) alone, in whichever process it is made. Files that
are damaged in places, or gone bad since they were looked at, do not end a run.
"""

from __future__ import annotations

import itertools
import os
import threading
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from wsiseg.errors import DatasetError, SlideError, WsisegError
from wsiseg.training.threads import batch_threads
from wsiseg.training.tile_files import TissueFile
from wsiseg.training.tile_slides import SlideFile

UInt8 = npt.NDArray[np.uint8]
TRIES = 100
"""Places that are drawn for a crop before a source counts as one that cannot be read."""
UNREADABLE = (SlideError, DatasetError)
"""What files raise whose pixels cannot be read."""
SLACK = 1.02
"""Magnification beyond what is allowed by no more than this is not spoken of."""
_ADVICE = "exclude of its source leaves the file out of a new run"


class View(NamedTuple):
    """One of the crops of a file that are always the same; see `TissueFile.view`."""

    file: TissueFile
    number: int
    label: str


class TilePool:
    """Files to cut crops from, by source; sources are drawn by weight, their files alike."""

    def __init__(
        self,
        groups: Sequence[Sequence[TissueFile]],
        weights: Sequence[float],
        labels: Sequence[str] = (),
        sources: Sequence[str] = (),
    ) -> None:
        """`labels`: the class of each source's files, empty where it has none; `sources`: what
        each source is called in messages."""
        self.groups = groups
        self.labels = tuple(labels) or ("",) * len(groups)
        self.sources = tuple(sources) or ("",) * len(groups)
        self.weights = np.asarray(weights, np.float64) / float(np.sum(weights))
        self._warned: set[Path] = set()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return sum(len(g) for g in self.groups)

    def names(self, root: Path) -> list[list[str]]:
        """The files of each source, as paths from `root`."""
        return [[os.path.relpath(f.path, root) for f in group] for group in self.groups]

    def views(self, most: int) -> list[View]:
        """At most `most` views, evenly from all sources and over the files of each.

        An image has one. Of slides there are so many that their source has its share of `most`.
        """
        each = max(1, most // len(self.groups))
        return [
            View(file, number, label)
            for group, label in zip(self.groups, self.labels, strict=True)
            for file, count in _spread(group, each)
            for number in range(count)
        ]

    def read(
        self, views: Sequence[View], size_px: int, at_once: int
    ) -> Iterator[tuple[list[View], UInt8]]:
        """The views with their pixels (views, size, size, 3), of at most `at_once` together.

        What cannot be read is left out.

        Raises:
            SlideError, DatasetError: that is all of them.
        """
        failed: SlideError | DatasetError | None = None
        some = False
        for start in range(0, len(views), at_once):
            kept, pixels = [], []
            for view in views[start : start + at_once]:
                try:
                    pixels.append(view.file.view(size_px, view.number))
                    kept.append(view)
                except UNREADABLE as e:
                    failed = e
                    self._warn(view.file, e)
            if kept:
                some = True
                yield kept, np.stack(pixels)
        if failed is not None and not some:
            raise type(failed)(f"{failed}; {_ADVICE}") from failed

    def crop(self, size_px: int, rng: np.random.Generator, *, scale: tuple[float, float]) -> UInt8:
        """(size, size, 3) uint8: one random crop.

        Where a file cannot be read, it is warned of once, and file and place are drawn again.

        Raises:
            SlideError, DatasetError: none of TRIES places of a source can be read.
        """
        group = self.groups[int(rng.choice(len(self.groups), p=self.weights))]
        tries = 0
        while True:
            file = group[int(rng.integers(len(group)))]
            try:
                return file.crop(size_px, rng, scale=scale)
            except UNREADABLE as e:
                self._warn(file, e)
                tries += 1
                if tries == TRIES:
                    raise type(e)(f"{e}; nothing could be read in {TRIES} draws; {_ADVICE}") from e

    def _warn(self, file: TissueFile, error: WsisegError) -> None:
        """Say once of a file that it cannot be read everywhere."""
        with self._lock:
            known = file.path in self._warned
            self._warned.add(file.path)
        if not known:
            text = f"{error}; what cannot be read of it is passed over from now on; {_ADVICE}"
            warnings.warn(text, stacklevel=3)

    def batch(
        self,
        size_px: int,
        count: int,
        key: tuple[int, int],
        *,
        scale: tuple[float, float],
        share: tuple[int, int] = (0, 1),
    ) -> UInt8:
        """(crops, size, size, 3) uint8 random crops.

        Args:
            size_px: side of a crop.
            count: crops of the whole batch.
            key: (seed, number of the batch).
            scale: range of the magnification.
            share: (process, processes): which of the batch's crops to give.
        """
        numbers = range(count)[share[0] :: share[1]]
        rngs = (np.random.default_rng((*key, k)) for k in numbers)
        return np.stack([self.crop(size_px, rng, scale=scale) for rng in rngs])

    def batches(
        self,
        size_px: int,
        count: int,
        *,
        seed: int,
        start: int,
        scale: tuple[float, float],
        share: tuple[int, int] = (0, 1),
    ) -> Iterator[UInt8]:
        """Endless batches from number `start` on, made ahead in threads; see `batch`."""

        def make(number: int) -> UInt8:
            return self.batch(size_px, count, (seed, number), scale=scale, share=share)

        threads = batch_threads(share[1])
        with ThreadPoolExecutor(threads) as worker:
            following = start + threads + 1
            ahead = deque(worker.submit(make, n) for n in range(start, following))
            for number in itertools.count(following):
                batch = ahead.popleft().result()
                ahead.append(worker.submit(make, number))
                yield batch


def warn_of_small(
    pools: Iterable[TilePool | None], size_px: int, scale: tuple[float, float]
) -> None:
    """Say of which sources images are so small that crops are magnified beyond what was asked for.

    Reads no files. Of slides `SlideFile` says so; whatever the crop, they are never too small.

    Args:
        pools: the pools of a run; None for one that is not there.
        size_px: side of a crop.
        scale: range of the crops' magnification.
    """
    files: dict[str, list[TissueFile]] = {}
    for pool in pools:
        for source, group in zip(pool.sources, pool.groups, strict=True) if pool else ():
            files.setdefault(source, []).extend(group)
    for source, found in files.items():
        small = [f for f in found if f.short_px * scale[1] * SLACK < size_px]
        if small:
            least = min(small, key=lambda file: file.short_px)
            warnings.warn(
                f"source {source}: {len(small)} of {len(found)} images are too small for crops of "
                f"{size_px} px and are magnified up to {size_px / least.short_px:.2g} times, more "
                f"than the {scale[1]:g} of scale, so that nuclei look larger than on slides "
                f"({least.path.name}: {least.short_px:.0f} px at the mpp of the run); take smaller "
                "crops, leave such images out, or correct mpp of the source",
                stacklevel=2,
            )


def _spread(group: Sequence[TissueFile], most: int) -> list[tuple[TissueFile, int]]:
    """At most `most` files of a group, evenly over it, and how many views of each; slides share
    what is left of `most` after one of each file."""
    count = min(most, len(group))
    files = [group[i * len(group) // count] for i in range(count)]
    slides = [i for i, file in enumerate(files) if isinstance(file, SlideFile)]
    views = [1] * count
    for k, i in enumerate(slides):
        views[i] += (most - count + k) // len(slides)
    return list(zip(files, views, strict=True))
