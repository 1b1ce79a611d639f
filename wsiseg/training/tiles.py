"""Unlabelled tissue for pretraining: folders of images and slides, sampled as crops.

Knows no networks. Images are held out by group, so that what is measured on them was not trained
on; crop k of batch n is a function of (seed, n, k) alone, in whichever process it is made.
"""

from __future__ import annotations

import itertools
import os
import re
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from wsiseg.errors import ConfigError, DatasetError, WsisegError
from wsiseg.training.tile_files import (
    ImageCache,
    ImageFile,
    OpenSlides,
    SlideFile,
    TissueFile,
    is_slide,
)

UInt8 = npt.NDArray[np.uint8]
WORKERS = 2
"""Threads that make batches."""
AHEAD = 3
"""Batches that are made before they are asked for."""


@dataclass(frozen=True)
class SourceConfig:
    """One source of unlabelled tissue."""

    path: str
    """Glob below the data folder, of images or slides."""
    mpp: float | None = None
    """Micrometres per pixel of the images; None: unknown, used as they are (slides: their own)."""
    weight: float = 1.0
    """Share of the crops that come from this source, against the other sources' weights."""
    exclude: str = ""
    """Glob of file names to leave out (annotations, test images)."""
    group: str = ""
    """Regular expression in the file name; files in which it finds the same are held out together
    (its first bracket, if it has one). Empty: each file by itself."""
    label: str = ""
    """Class of all files of the source, for measuring the encoder only; empty: none."""

    def __post_init__(self) -> None:
        if not self.path or Path(self.path).is_absolute():
            raise ConfigError(f"source path {self.path!r}: must be relative to the data folder")
        if not self.weight > 0 or (self.mpp is not None and not self.mpp > 0):
            raise ConfigError(f"source {self.path}: weight and mpp must be above 0")
        try:
            re.compile(self.group)
        except re.error as e:
            raise ConfigError(f"source {self.path}: group is not a regular expression ({e})") from e

    def group_of(self, path: Path) -> str:
        """The group of a file; its name where the expression finds nothing."""
        found = re.search(self.group, path.name) if self.group else None
        if found is None:
            return path.name
        return str(found.group(1) if found.re.groups else found.group(0))


class TilePool:
    """Files to cut crops from, by source; sources are drawn by weight, their files alike."""

    def __init__(
        self,
        groups: Sequence[Sequence[TissueFile]],
        weights: Sequence[float],
        labels: Sequence[str] = (),
    ) -> None:
        """`labels`: the class of each source's files, empty where it has none."""
        self.groups = groups
        self.labels = tuple(labels) or ("",) * len(groups)
        self.weights = np.asarray(weights, np.float64) / float(np.sum(weights))

    def __len__(self) -> int:
        return sum(len(g) for g in self.groups)

    def names(self, root: Path) -> list[list[str]]:
        """The files of each source, as paths from `root`."""
        return [[os.path.relpath(f.path, root) for f in group] for group in self.groups]

    def some(self, most: int) -> list[tuple[TissueFile, str]]:
        """At most `most` files with their labels, evenly from all sources and over each."""
        each = max(1, most // len(self.groups))
        return [
            (group[i * len(group) // min(each, len(group))], label)
            for group, label in zip(self.groups, self.labels, strict=True)
            for i in range(min(each, len(group)))
        ]

    def crop(self, size_px: int, rng: np.random.Generator, *, scale: tuple[float, float]) -> UInt8:
        """(size, size, 3) uint8: one random crop."""
        group = self.groups[int(rng.choice(len(self.groups), p=self.weights))]
        return group[int(rng.integers(len(group)))].crop(size_px, rng, scale=scale)

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

        with ThreadPoolExecutor(max_workers=WORKERS) as worker:
            ahead = deque(worker.submit(make, n) for n in range(start, start + AHEAD))
            for number in itertools.count(start + AHEAD):
                batch = ahead.popleft().result()
                ahead.append(worker.submit(make, number))
                yield batch


class Pools(NamedTuple):
    """What is trained on, and what is kept for measuring; None where nothing is held out."""

    training: TilePool
    held_out: TilePool | None
    slides: OpenSlides

    @property
    def measured(self) -> TilePool:
        """What is measured on: what is held out, else the training images."""
        return self.training if self.held_out is None else self.held_out

    @property
    def held_out_images(self) -> int:
        """Number of held-out images and slides."""
        return 0 if self.held_out is None else len(self.held_out)


def load_pools(
    sources: Sequence[SourceConfig],
    root: Path,
    *,
    mpp: float,
    validation_share: float = 0.0,
    seed: int = 0,
    memory_gb: float = 4.0,
) -> Pools:
    """Find the files of all sources, the tissue of their slides, and divide them.

    Of each source the groups that hold out `validation_share` of them, rounded up, are drawn by
    the seed, but never more than half; one with a single group is trained on. A file that several
    sources name, and a group that their expressions find, is on one side for all of them. Files in
    which an expression finds nothing are warned of.

    Args:
        sources: what to read.
        root: folder that their paths are relative to.
        mpp: micrometres per pixel to bring images of known resolution to.
        validation_share: share of the groups to hold out; 0 = none.
        seed: seed of the division.
        memory_gb: bound on the decoded images that are held, in 10^9 bytes.

    Raises:
        DatasetError: a source matches no file, a file is not an image, slides show no tissue.
        SlideError: a slide cannot be read.
    """
    cache, slides = ImageCache(round(memory_gb * 1e9)), OpenSlides()
    files: dict[tuple[Path, float | None], TissueFile] = {}
    sides: dict[Path, bool] = {}
    groups_held: dict[str, bool] = {}
    training: list[list[TissueFile]] = []
    held: list[list[TissueFile]] = []
    try:
        for source in sources:
            for path in (paths := _paths(source, root)):
                if (path, source.mpp) not in files:
                    files[path, source.mpp] = _open(path, source.mpp, mpp, cache, slides)
            own = _with_tissue([files[p, source.mpp] for p in paths], root / source.path)
            _warn_of_groups(source, paths)
            rng = np.random.default_rng((seed, 7))
            _divide(own, source, sides, groups_held, validation_share, rng)
            training.append([f for f in own if not sides[f.path]])
            held.append([f for f in own if sides[f.path]])
            if not training[-1]:
                raise DatasetError(
                    f"{root / source.path}: all its files are held out through another source; "
                    "merge the two or set validation_share to 0"
                )
    except WsisegError:
        slides.close()
        raise
    return Pools(_pool(sources, training), _pool(sources, held) if any(held) else None, slides)


def _with_tissue(files: Sequence[TissueFile], where: Path) -> list[TissueFile]:
    own = [f for f in files if not isinstance(f, SlideFile) or len(f.blocks)]
    if not own:
        raise DatasetError(f"{where}: no tissue found on these slides; leave them out")
    return own


def _pool(sources: Sequence[SourceConfig], groups: Sequence[Sequence[TissueFile]]) -> TilePool:
    """The pool of the sources that have files."""
    pairs = [(s, g) for s, g in zip(sources, groups, strict=True) if g]
    return TilePool(
        [g for _, g in pairs], [s.weight for s, _ in pairs], [s.label for s, _ in pairs]
    )


def _warn_of_groups(source: SourceConfig, paths: Sequence[Path]) -> None:
    """Say of how many files of a source its expression tells no group."""
    lost = [p for p in paths if source.group and not re.search(source.group, p.name)]
    if lost:
        warnings.warn(
            f"source {source.path}: group {source.group!r} finds nothing in {len(lost)} of "
            f"{len(paths)} names, such as {lost[0].name}; each of them is held out by itself, and "
            "copies of it or images of its patient may be trained on",
            stacklevel=2,
        )


def _divide(
    files: Sequence[TissueFile],
    source: SourceConfig,
    sides: dict[Path, bool],
    groups_held: dict[str, bool],
    share: float,
    rng: np.random.Generator,
) -> None:
    """Say of each file that is not in `sides` yet whether it is held out, and of each group that
    an expression found and is not in `groups_held` yet."""
    keys = {f.path: source.group_of(f.path) for f in files}
    groups = sorted(set(keys.values()))
    settled = groups_held if source.group else {}
    left = [key for key in groups if key not in settled]
    count = min(int(np.ceil(share * len(groups))), len(groups) // 2)
    count -= sum(settled.get(key, False) for key in groups)
    chosen = {left[int(i)] for i in rng.permutation(len(left))[: max(0, count)]}
    settled |= {key: key in chosen for key in left}
    for path, key in keys.items():
        sides.setdefault(path, settled[key])


def _paths(source: SourceConfig, root: Path) -> list[Path]:
    try:
        paths = sorted(
            p
            for p in root.glob(source.path)
            if p.is_file() and not (source.exclude and p.match(source.exclude))
        )
    except (ValueError, NotImplementedError) as e:
        raise ConfigError(f"source path {source.path!r}: not a pattern of files ({e})") from e
    if not paths:
        raise DatasetError(f"{root / source.path}: no such images; check the data folder and path")
    return paths


def _open(
    path: Path, own_mpp: float | None, mpp: float, cache: ImageCache, slides: OpenSlides
) -> TissueFile:
    if is_slide(path):
        return SlideFile(path, own_mpp, mpp, slides)
    return ImageFile(path, 1.0 if own_mpp is None else own_mpp / mpp, cache)
