"""BCSS: regions of breast cancer slides, in patches or whole, read as they are asked for.

Knows no networks. The whole data set is never in memory: a patch is cut from its decoded region,
of which the most recently used are kept under a bound.
Source: Amgad et al., Structured crowdsourcing enables convolutional segmentation of histology
images (Bioinformatics 2019); patches as in PathSegDiff (arXiv:2504.06950).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from wsiseg.classes import IGNORE, Classes, TissueClass
from wsiseg.datasets.base import LabelledDataset, LabelledImage, UInt8
from wsiseg.datasets.bcss_files import check_codes, find_rois, read_image, read_mask
from wsiseg.datasets.cache import ArrayCache
from wsiseg.errors import ConfigError, DatasetError, UsageError
from wsiseg.geometry import Box, Size

PARTS = ("train", "test")
CLASSES = Classes(
    (
        TissueClass("Tumour", (200, 60, 60)),
        TissueClass("Stroma", (90, 170, 90)),
        TissueClass("Inflammatory", (70, 90, 200)),
        TissueClass("Necrosis", (120, 90, 60)),
        TissueClass("Other", (205, 205, 215), background=True),
    )
)


@dataclass(frozen=True)
class BCSSConfig:
    """Options of the data set."""

    mpp: float = 0.5
    """Micrometres per pixel to read at; the official files have 0.25."""
    images: Literal["auto", "colour_normalised", "original"] = "auto"
    """Which images: rgbs_colorNormalized, rgbs, or the first of these that is there."""
    patch_px: int = 800
    """Side of a patch, in pixels of `mpp`; less where the region is smaller."""
    stride_px: int = 400
    """Distance of patches. The original says that they overlap, not how much: half is ours."""
    max_ignored: float = 0.9
    """Patches with a larger share outside the annotated region are left out."""
    cut: Literal["auto", "patches", "rois"] = "auto"
    """Patches or whole regions; auto: patches to train on, and whole regions of the test part,
    where each pixel is measured once."""
    cache_mb: int = 1024
    """Decoded regions that are kept, in MiB (4 bytes a pixel of `mpp`). One region at the
    resolution of its file comes on top while it is read."""

    def __post_init__(self) -> None:
        if not 0 < self.mpp < float("inf"):
            raise ConfigError(f"bcss.mpp {self.mpp}: must be above 0")
        if not 1 <= self.stride_px <= self.patch_px:
            raise ConfigError("bcss: stride_px must be from 1 to patch_px, or pixels are left out")
        if not 0 <= self.max_ignored <= 1 or self.cache_mb < 0:
            raise ConfigError("bcss: max_ignored must be from 0 to 1, cache_mb not below 0")


class Cut(NamedTuple):
    """A patch, or a whole region.

    Attributes:
        roi: number of the region.
        box: in pixels of the resolution that is read.
    """

    roi: int
    box: Box


class BCSS(LabelledDataset):
    """One part of BCSS: tumour, stroma, inflammatory, necrosis, other; outside the region 255.

    Groups are patients (TCGA-xx-xxxx). The parts differ by institution: 106 regions to train on,
    and 45 of OL, LL, E2, EW, GM and S3 to measure.
    """

    classes = CLASSES
    terms = "CC0-1.0 (BCSS)"

    def __init__(self, root: str | Path, part: str, config: BCSSConfig | None = None) -> None:
        """Find the regions of a part and, for patches, read the masks once.

        Args:
            root: folder with the official files.
            part: train or test.
            config: options; default those of BCSSConfig.

        Raises:
            UsageError: no such part.
            DatasetError: the folder does not hold the part in the official layout, codes that
                mean something else, damaged masks, no patch with enough annotation.
        """
        config = config or BCSSConfig()
        if part not in PARTS:
            raise UsageError(f"BCSS has no part {part!r}; it has {', '.join(PARTS)}")
        self.config, self.mpp, self.measuring = config, config.mpp, part == "test"
        self.rois = find_rois(Path(root), part, images=config.images, mpp=config.mpp)
        check_codes(Path(root))
        self.cache = ArrayCache(config.cache_mb << 20)
        whole = config.cut == "rois" or (config.cut == "auto" and part == "test")
        self.cuts = self._whole() if whole else self._patches()
        if not self.cuts:
            raise DatasetError(
                f"{root}: no patch of BCSS {part} has {1 - config.max_ignored:.0%} of its pixels "
                "annotated; raise max_ignored"
            )
        self.groups = tuple(self.rois[c.roi].patient for c in self.cuts)
        self.names = tuple(
            self.rois[c.roi].name + ("" if whole else f"_x{c.box.x}_y{c.box.y}") for c in self.cuts
        )

    def __getitem__(self, index: int) -> LabelledImage:
        roi, box = self.cuts[index]
        image = self._read(roi, "image")[box.slices].copy()
        return LabelledImage(self.names[index], image, self.mask(index), self.groups[index])

    def mask(self, index: int) -> UInt8:
        """(H, W) mask of an image; its RGB is not read."""
        roi, box = self.cuts[index]
        return self._read(roi, "mask")[box.slices].copy()

    @property
    def files(self) -> tuple[int, ...]:
        """Number of the region of each image: patches of one region are best read together."""
        return tuple(c.roi for c in self.cuts)

    def _read(self, number: int, what: Literal["image", "mask"]) -> UInt8:
        """A whole region at `mpp`, through the cache."""
        roi = self.rois[number]
        pixels = roi.scaled.width * roi.scaled.height
        if what == "mask":
            return self.cache.get((number, what), pixels, lambda: read_mask(roi))
        return self.cache.get((number, what), 3 * pixels, lambda: read_image(roi))

    def _whole(self) -> list[Cut]:
        return [Cut(i, Box(0, 0, *roi.scaled)) for i, roi in enumerate(self.rois)]

    def _patches(self) -> list[Cut]:
        """The patches of all regions with enough annotation, from the masks alone."""
        found = []
        for number, roi in enumerate(self.rois):
            outside = self._read(number, "mask") == IGNORE
            for box in patch_boxes(roi.scaled, self.config.patch_px, self.config.stride_px):
                if outside[box.slices].mean() <= self.config.max_ignored:
                    found.append(Cut(number, box))
        return found


def patch_boxes(size: Size, patch_px: int, stride_px: int) -> list[Box]:
    """Patches that cover a size, row by row; the last of a row or column is moved inwards."""
    width, height = min(patch_px, size.width), min(patch_px, size.height)
    lefts = _starts(size.width - width, stride_px)
    return [
        Box(x, y, width, height) for y in _starts(size.height - height, stride_px) for x in lefts
    ]


def _starts(last: int, stride: int) -> list[int]:
    """0, stride, 2 stride, ... and `last`."""
    return [*range(0, last, stride), last]
