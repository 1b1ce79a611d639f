"""Unlabelled tissue for pretraining: folders of images and slides, sampled as crops.

Knows no networks. Memory bound: images are held at the target mpp as they are read (3 bytes a
pixel); of a slide at most `SLIDE_PX` pixels are held, cut from tissue.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from wsiseg.datasets.augment import random_crop
from wsiseg.errors import ConfigError, DatasetError
from wsiseg.geometry import Box
from wsiseg.slides.slide import open_slide

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif"}
SLIDE_PX = 16_000_000
BLOCK_PX = 1024


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

    def __post_init__(self) -> None:
        if not self.path or Path(self.path).is_absolute():
            raise ConfigError(f"source path {self.path!r}: must be relative to the data folder")
        if not self.weight > 0 or (self.mpp is not None and not self.mpp > 0):
            raise ConfigError(f"source {self.path}: weight and mpp must be above 0")


class TilePool:
    """Images in memory, sampled by source weight."""

    def __init__(self, groups: Sequence[Sequence[Image.Image]], weights: Sequence[float]) -> None:
        self.groups = groups
        self.weights = np.asarray(weights, np.float64) / float(np.sum(weights))

    @classmethod
    def load(cls, sources: Sequence[SourceConfig], root: Path, *, mpp: float) -> TilePool:
        """Read all sources at the target resolution.

        Args:
            sources: what to read.
            root: folder that their paths are relative to.
            mpp: micrometres per pixel to bring images of known resolution to.

        Raises:
            DatasetError: a source matches no file, a file is not an image, slides show no tissue.
        """
        groups = [_load_source(source, root, mpp) for source in sources]
        return cls(groups, [s.weight for s in sources])

    def __len__(self) -> int:
        return sum(len(g) for g in self.groups)

    def batch(
        self, size_px: int, count: int, rng: np.random.Generator, *, scale: tuple[float, float]
    ) -> npt.NDArray[np.uint8]:
        """(count, size, size, 3) uint8 random crops."""
        crops = []
        for index in rng.choice(len(self.groups), size=count, p=self.weights):
            group = self.groups[int(index)]
            image = group[int(rng.integers(len(group)))]
            crops.append(random_crop(image, size_px, rng, scale=scale))
        return np.stack(crops)

    def batches(
        self, size_px: int, count: int, *, seed: int, start: int, scale: tuple[float, float]
    ) -> Iterator[npt.NDArray[np.uint8]]:
        """Endless batches made ahead in a thread; batch n depends only on (seed, n)."""

        def make(step: int) -> npt.NDArray[np.uint8]:
            return self.batch(size_px, count, np.random.default_rng((seed, step)), scale=scale)

        with ThreadPoolExecutor(max_workers=1) as worker:
            ahead = deque(worker.submit(make, n) for n in range(start, start + 2))
            for step in itertools.count(start + 2):
                batch = ahead.popleft().result()
                ahead.append(worker.submit(make, step))
                yield batch


def _load_source(source: SourceConfig, root: Path, mpp: float) -> list[Image.Image]:
    paths = sorted(
        p
        for p in root.glob(source.path)
        if p.is_file() and not (source.exclude and p.match(source.exclude))
    )
    if not paths:
        raise DatasetError(f"{root / source.path}: no such images; check the data folder and path")
    images: list[Image.Image] = []
    for path in paths:
        if path.suffix.lower() in IMAGE_SUFFIXES:
            images.append(_load_image(path, source.mpp, mpp))
        else:
            images.extend(_load_slide(path, source.mpp, mpp))
    if not images:
        raise DatasetError(f"{root / source.path}: no tissue found on these slides; leave them out")
    return images


def _load_image(path: Path, own_mpp: float | None, mpp: float) -> Image.Image:
    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    except (OSError, UnidentifiedImageError) as e:
        raise DatasetError(f"{path}: not a readable image ({e})") from e
    if own_mpp is None:
        return image
    ratio = own_mpp / mpp
    size = (max(1, round(image.width * ratio)), max(1, round(image.height * ratio)))
    return image.resize(size, Image.Resampling.BOX if ratio < 1 else Image.Resampling.BICUBIC)


def _load_slide(path: Path, own_mpp: float | None, mpp: float) -> list[Image.Image]:
    """Blocks of tissue of a slide, spread evenly over it."""
    from wsiseg.slides.tissue import find_tissue

    with open_slide(path, mpp=own_mpp) as slide:
        grid, tissue = slide.grid(mpp), find_tissue(slide, "auto")
        boxes = [
            Box(x, y, BLOCK_PX, BLOCK_PX).intersection(grid.box)
            for y in range(0, grid.size.height, BLOCK_PX)
            for x in range(0, grid.size.width, BLOCK_PX)
        ]
        boxes = [
            b
            for b in boxes
            if min(b.width, b.height) >= 256 and tissue.region(b, grid).mean() > 0.5
        ]
        step = max(1, -(-len(boxes) * BLOCK_PX * BLOCK_PX // SLIDE_PX))
        return [Image.fromarray(slide.read(b, grid)) for b in boxes[::step]]
