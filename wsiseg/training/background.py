"""Images that show nothing but background, as negatives among the training patches.

A model that has seen only one tissue paints its classes over others; what is known to hold none
of them can be shown to it without annotations. Knows no networks.
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
    """Which images, and how often they are shown."""

    sources: tuple[SourceConfig, ...] = ()
    """Globs below the folder of the data set (`..` is allowed)."""
    share: float = 0.1
    """Share of the training patches that are cut from them."""

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ConfigError(f"background.share {self.share}: must be above 0 and below 1")


class Background:
    """Background images in memory and the label of all their pixels."""

    def __init__(self, pool: TilePool, share: float, label: int, names: list[str]) -> None:
        """`share` of the patches are of `pool`, whose files are `names`."""
        self._pool, self.share, self._label, self.names = pool, share, label, names

    @classmethod
    def load(
        cls,
        config: BackgroundConfig,
        dataset: LabelledDataset,
        *,
        mpp: float,
        memory_gb: float = 2.0,
    ) -> Background | None:
        """The images of a configuration; None where it names none.

        Of the images as they are decoded at most `memory_gb` (10^9 bytes) are held.

        Raises:
            ConfigError: the data set has no background class, or no folder.
            DatasetError: a source matches no file, or a file is no image.
        """
        if not config.sources:
            return None
        labels = [k for k, c in enumerate(dataset.classes) if c.background]
        root = dataset.folder
        if not labels or root is None:
            raise ConfigError("background: only for a data set in a folder, with background class")
        pool = load_pools(config.sources, root, mpp=mpp, memory_gb=memory_gb).training
        names = [name for group in pool.names(root) for name in group]
        return cls(pool, config.share, labels[0], names)

    def patch(
        self, size_px: tuple[int, int], rng: np.random.Generator, *, scale: tuple[float, float]
    ) -> tuple[UInt8, UInt8]:
        """A patch (height, width, 3) at a random place, scale, flip and quarter turn; its mask."""
        height, width = size_px
        image = self._pool.crop(max(size_px), rng, scale=scale)[:height, :width]
        return image, np.full(size_px, self._label, np.uint8)
