"""Further images beside those of the data set: background, partly annotated ones, and glass.

A model that has seen only one tissue paints its classes over others; what is known to hold none
of them can be shown to it, at the resolution that it has on slides. Annotations of another data
set, of another scanner perhaps, can say of some pixels what they are here, and leave out the rest.
Images of a laboratory seldom show the edge of the tissue, and glass looks like a lumen; glass can
be laid over a part of any patch. Knows no networks.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from wsiseg.classes import IGNORE, Classes
from wsiseg.datasets.augment import AugmentConfig, at_mpp, random_patch
from wsiseg.datasets.base import LabelledDataset
from wsiseg.datasets.table import DATASETS, dataset_mapping, open_dataset
from wsiseg.errors import ConfigError
from wsiseg.names import as_written
from wsiseg.training.contents import checksum_of
from wsiseg.training.tiles import SourceConfig, TilePool, load_pools, warn_of_small

UInt8 = npt.NDArray[np.uint8]
UNDRAWN = 64
"""Added to the class of pixels of objects whose borders nobody drew, where borders are learnt."""


@dataclass(frozen=True)
class AnnotatedConfig:
    """Annotated images of another data set, some of whose classes say what a pixel is here."""

    dataset: str
    """As `--dataset`: a name, or a YAML file."""
    path: str
    """Its folder, relative to the folder of the data set that is trained on (`..` is allowed)."""
    background: tuple[str, ...] = ()
    """Names of its classes that are background here."""
    classes: Mapping[str, str] = field(default_factory=dict)
    """Names of its classes, and of those of this model that they are here. What is named neither
    here nor in `background` takes no part; borders of objects are not learnt from it."""
    part: str = ""
    """Its part; empty: the one to train on."""
    weight: float = 1.0
    """Share of the patches, against the weights of sources and of other annotated images."""

    def __post_init__(self) -> None:
        if not (self.background or self.classes):
            raise ConfigError(
                f"background.annotated {self.dataset}: name its background classes, or classes"
            )
        if twice := [n for n in self.background if n in self.classes]:
            raise ConfigError(
                f"background.annotated {self.dataset}: {twice[0]!r} is background and a class"
            )
        if not 0 < self.weight < float("inf"):
            raise ConfigError(f"background.annotated {self.dataset}: weight must be above 0")


@dataclass(frozen=True)
class BackgroundConfig:
    """Which images, and how often they are shown; how often glass is."""

    sources: tuple[SourceConfig, ...] = ()
    """Globs below the folder of the data set (`..` is allowed): nothing but background."""
    annotated: tuple[AnnotatedConfig, ...] = ()
    """Annotated images of other data sets."""
    share: float = 0.1
    """Share of the training patches that are cut from both."""
    glass: float = 0.0
    """Share of the patches a part of which, beyond a wavy line, is covered with glass."""

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ConfigError(f"background.share {self.share}: must be above 0 and below 1")
        if not 0 <= self.glass < 1:
            raise ConfigError(f"background.glass {self.glass}: must be from 0 to below 1")


class AnnotatedPool:
    """Annotated images in memory, with the classes of the data set to train on, or ignored."""

    def __init__(
        self, config: AnnotatedConfig, root: Path, classes: Classes, *, mpp: float, borders: bool
    ) -> None:
        """Read all of them and bring them to `mpp`.

        With `borders` objects are marked with `UNDRAWN`. `contents` are the checksums of those
        with labels, `terms` those of the data set.

        Raises:
            ConfigError: no such class, there or here.
            DatasetError, UsageError: the data set cannot be opened.
        """
        described = dataset_mapping(config.dataset)
        part = config.part or DATASETS[described["name"]].part
        beside = Path(*as_written(root, config.path))
        folder = beside if beside.is_dir() else root / config.path
        dataset = open_dataset(described, folder, part)
        table = np.full(256, IGNORE, np.uint8)
        table[: len(dataset.classes)] = _labels(config, dataset.classes, classes, borders=borders)
        if dataset.measuring:
            warnings.warn(
                f"background.annotated {config.dataset}: {part} is for measuring; do not measure "
                "on it now",
                stacklevel=2,
            )
        ratio = dataset.mpp / mpp
        self._pairs: list[tuple[UInt8, UInt8]] = []
        self.contents: list[str] = []
        for item in (dataset[i] for i in range(len(dataset))):
            mask = table[item.mask]
            self._pairs.append(at_mpp(item.image, mask, ratio))
            if (mask != IGNORE).any():
                self.contents.append(checksum_of(item.image))
        self.terms = dataset.terms
        self.names = [f"{config.path}:{name}" for name in dataset.names]

    def patch(
        self, size_px: tuple[int, int], rng: np.random.Generator, augment: AugmentConfig
    ) -> tuple[UInt8, UInt8]:
        """A patch (height, width, 3) and its mask, mirrored beyond the image's edges."""
        image, mask = self._pairs[int(rng.integers(len(self._pairs)))]
        return random_patch(image, mask, size_px, rng=rng, config=augment)


def _labels(config: AnnotatedConfig, theirs: Classes, ours: Classes, *, borders: bool) -> list[int]:
    """What each of their classes is here."""
    where = f"background.annotated {config.dataset}"
    first = next(c.name for c in ours if c.background)
    same = {**dict.fromkeys(config.background, first), **config.classes}
    for name, known in [(n, theirs) for n in same] + [(n, ours) for n in same.values()]:
        if name not in known.names:
            raise ConfigError(f"{where}: no class {name!r}; there are " + ", ".join(known.names))
    labels = [IGNORE] * len(theirs)
    for name, own in same.items():
        label = ours.names.index(own)
        undrawn = borders and not ours.items[label].background
        labels[theirs.names.index(name)] = label + UNDRAWN * undrawn
    return labels


class Background:
    """Background images in memory, glass, and the label of all their pixels."""

    def __init__(
        self,
        pool: TilePool | None,
        names: list[str],
        config: BackgroundConfig,
        *,
        label: int,
        annotated: Sequence[AnnotatedPool] = (),
    ) -> None:
        """Patches are cut from `annotated` and from `pool`, if there is one, of files `names`."""
        self._pool, self._annotated, self._label = pool, annotated, label
        self.names = [*names, *(name for a in annotated for name in a.names)]
        self.contents = [c for a in annotated for c in a.contents]
        self.terms = [a.terms for a in annotated]
        self.share = config.share if pool or annotated else 0.0
        self.glass = config.glass
        weights = [sum(s.weight for s in config.sources), *(a.weight for a in config.annotated)]
        self._ends = np.cumsum(weights) / (sum(weights) or 1.0)

    @classmethod
    def load(
        cls,
        config: BackgroundConfig,
        dataset: LabelledDataset,
        *,
        mpp: float,
        memory_gb: float = 2.0,
        borders: bool = False,
    ) -> Background | None:
        """What a configuration says; None where it names no images and wants no glass.

        Of the images of `sources`, as they are decoded, at most `memory_gb` (10^9 bytes) are
        held; those of `annotated` are held all, at the training resolution, with `UNDRAWN` on
        their objects if there are `borders` to be learnt.

        Raises:
            ConfigError: the data set has no background class, or no folder; no such class of
                annotated images.
            DatasetError: a source matches no file, or none that can be used.
        """
        if not (config.sources or config.annotated or config.glass):
            return None
        labels = [k for k, c in enumerate(dataset.classes) if c.background]
        root = dataset.folder
        if not labels:
            raise ConfigError("background: only for a data set with a background class")
        if not (config.sources or config.annotated):
            return cls(None, [], config, label=labels[0])
        if root is None:
            raise ConfigError("background.sources: only for a data set in a folder")
        pool, names = None, []
        if config.sources:
            pool = load_pools(config.sources, root, mpp=mpp, memory_gb=memory_gb).training
            names = [name for group in pool.names(root) for name in group]
        annotated = [
            AnnotatedPool(a, root, dataset.classes, mpp=mpp, borders=borders)
            for a in config.annotated
        ]
        return cls(pool, names, config, label=labels[0], annotated=annotated)

    def warn_of_small(self, size_px: tuple[int, int], scale: tuple[float, float]) -> None:
        """Warn of sources whose images are too small for patches of (height, width), magnified
        within `scale`."""
        warn_of_small([self._pool], max(size_px), scale)

    def patch(
        self, size_px: tuple[int, int], rng: np.random.Generator, augment: AugmentConfig
    ) -> tuple[UInt8, UInt8]:
        """A patch (height, width, 3) at a random place, scale, flip and turn; its mask."""
        if self._pool is None and not self._annotated:
            raise ConfigError("background: there are no images to cut patches from")
        chosen = 0
        if self._annotated:
            chosen = int(np.searchsorted(self._ends, rng.random(), side="right"))
        if chosen == 0 and self._pool is not None:
            height, width = size_px
            image = self._pool.crop(max(size_px), rng, scale=augment.scale)[:height, :width]
            return image, np.full(size_px, self._label, np.uint8)
        return self._annotated[chosen - 1].patch(size_px, rng, augment)

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
