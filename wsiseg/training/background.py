"""Negatives that need no annotation: images of nothing but background, and glass.

A model that has seen only one tissue paints its classes over others; what is known to hold none
of them can be shown to it. Images of a laboratory seldom show the edge of the tissue, and glass
looks like a lumen; glass can be laid over a part of any patch. Knows no networks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from wsiseg.datasets.base import LabelledDataset
from wsiseg.errors import ConfigError
from wsiseg.training.tiles import SourceConfig, TilePool, load_pools

UInt8 = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class BackgroundConfig:
    """Which images, and how often they are shown; how often glass is."""

    sources: tuple[SourceConfig, ...] = ()
    """Globs below the folder of the data set (`..` is allowed)."""
    share: float = 0.1
    """Share of the training patches that are cut from them."""
    glass: float = 0.0
    """Share of the patches a part of which, beyond a wavy line, is covered with glass."""

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ConfigError(f"background.share {self.share}: must be above 0 and below 1")
        if not 0 <= self.glass < 1:
            raise ConfigError(f"background.glass {self.glass}: must be from 0 to below 1")


class Background:
    """Background images in memory, glass, and the label of all their pixels."""

    def __init__(
        self, pool: TilePool | None, names: list[str], config: BackgroundConfig, *, label: int
    ) -> None:
        """Patches are cut from `pool`, if there is one, whose files are `names`."""
        self._pool, self.names, self._label = pool, names, label
        self.share = config.share if pool else 0.0
        self.glass = config.glass

    @classmethod
    def load(
        cls,
        config: BackgroundConfig,
        dataset: LabelledDataset,
        *,
        mpp: float,
        memory_gb: float = 2.0,
    ) -> Background | None:
        """What a configuration says; None where it names no images and wants no glass.

        Of the images as they are decoded at most `memory_gb` (10^9 bytes) are held.

        Raises:
            ConfigError: the data set has no background class, or no folder.
            DatasetError: a source matches no file, or a file is no image.
        """
        if not config.sources and not config.glass:
            return None
        labels = [k for k, c in enumerate(dataset.classes) if c.background]
        root = dataset.folder
        if not labels:
            raise ConfigError("background: only for a data set with a background class")
        if not config.sources:
            return cls(None, [], config, label=labels[0])
        if root is None:
            raise ConfigError("background.sources: only for a data set in a folder")
        pool = load_pools(config.sources, root, mpp=mpp, memory_gb=memory_gb).training
        names = [name for group in pool.names(root) for name in group]
        return cls(pool, names, config, label=labels[0])

    def patch(
        self, size_px: tuple[int, int], rng: np.random.Generator, *, scale: tuple[float, float]
    ) -> tuple[UInt8, UInt8]:
        """A patch (height, width, 3) at a random place, scale, flip and quarter turn; its mask."""
        if self._pool is None:
            raise ConfigError("background: there are no images to cut patches from")
        height, width = size_px
        image = self._pool.crop(max(size_px), rng, scale=scale)[:height, :width]
        return image, np.full(size_px, self._label, np.uint8)

    def with_glass(
        self, image: UInt8, mask: UInt8, rng: np.random.Generator
    ) -> tuple[UInt8, UInt8]:
        """A patch (H, W, 3) and its mask (H, W), a part of which glass covers."""
        cover = glass_cover(mask.shape, rng)
        colour = rng.uniform(225, 253) + rng.uniform(-4, 2, 3)
        glass = colour + rng.normal(0, rng.uniform(0.5, 3), image.shape)
        mixed = image + cover[..., None] * (glass - image)
        target = np.where(cover > 0.5, np.uint8(self._label), mask)
        return np.clip(mixed, 0, 255).astype(np.uint8), target


def glass_cover(shape: tuple[int, ...], rng: np.random.Generator) -> npt.NDArray[np.float32]:
    """(H, W) float32: how much glass covers each pixel, 0..1, beyond a wavy line.

    The line has any direction and crosses the patch away from its corners; three waves of random
    length bend it, and the glass sets in over 1 to 5 pixels.
    """
    height, width = shape
    angle = rng.uniform(0, 2 * np.pi)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    y, x = y - height / 2, x - width / 2
    across = x * np.float32(np.cos(angle)) + y * np.float32(np.sin(angle))
    along = y * np.float32(np.cos(angle)) - x * np.float32(np.sin(angle))
    reach = float(across.max())
    edge = np.full(shape, rng.uniform(-0.6, 0.7) * reach, np.float32)
    for _ in range(3):
        length, phase = rng.uniform(20, 200), rng.uniform(0, 2 * np.pi)
        edge += rng.uniform(0, 0.1) * length * np.sin(2 * np.pi * along / length + phase)
    cover: npt.NDArray[np.float32] = np.clip((across - edge) / rng.uniform(1, 5) + 0.5, 0, 1)
    return cover
