"""PanNuke: nuclei of five kinds in 19 tissues, three folds of arrays that stay on disk.

Source: Gamper et al., PanNuke dataset extension, insights and baselines (arXiv:2003.10778).
256 px images at 0.25 um per pixel (40x).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from tokenize import TokenError
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from wsiseg.classes import Classes, TissueClass
from wsiseg.datasets.base import Int32, LabelledDataset, LabelledImage, UInt8
from wsiseg.errors import DatasetError, UsageError

MPP = 0.25
BACKGROUND = 5
CLASSES = Classes(
    (
        TissueClass("Neoplastic", (200, 60, 60)),
        TissueClass("Inflammatory", (70, 90, 200)),
        TissueClass("Connective", (90, 170, 90)),
        TissueClass("Dead", (120, 90, 60)),
        TissueClass("Epithelial", (230, 150, 50)),
        TissueClass("Background", (205, 205, 215), background=True),
    )
)
LOW_DATA = {"lowdata-train": ("fold1", 448), "lowdata-test": ("fold3", 1132)}
"""Parts of the low-data protocol: the fold that each is drawn from, and how many images.

The nuclei paper trains on up to 448 images and measures on 1,132, without public lists of them:
which images these are is ours. They are drawn by a fixed seed, from different folds; fold 2 is
left for pretraining. Order is that of the draw, so the first 28, 56, 112 or 224 are themselves
fair samples, each within the next."""
LOW_DATA_SEED = 448
PARTS = ("fold1", "fold2", "fold3", *LOW_DATA)
LAYOUT = (
    "a folder with 'Fold 1/images/fold1/images.npy', 'Fold 1/images/fold1/types.npy' and "
    "'Fold 1/masks/fold1/masks.npy' (the same for 2 and 3), or with fold1/images.npy, types.npy "
    "and masks.npy, as the archives at warwick.ac.uk/fac/cross_fac/tia/data/pannuke unpack"
)


@dataclass(frozen=True)
class PanNukeConfig:
    """Options of the data set."""

    tissues: tuple[str, ...] = ()
    """Only images of these tissues, named as in types.npy, such as Breast; empty: all."""


class Fold(NamedTuple):
    """The arrays of a fold, of which only what is asked for is read from disk.

    Attributes:
        images: (N, H, W, 3), values 0..255.
        masks: (N, H, W, 6), object numbers by channel, 0 = none; the last is background.
        types: (N,) names of tissues.
        folder: where the images are, for messages.
    """

    images: npt.NDArray[Any]
    masks: npt.NDArray[Any]
    types: npt.NDArray[np.str_]
    folder: Path


class PanNuke(LabelledDataset):
    """A fold, or a part of the low-data protocol: label k is channel k of the masks.

    PanNuke does not say which patient or slide an image is from: each is a group of its own, so
    a split within a fold may part images of one patient. Where channels overlap the later one
    counts, for label and object alike. Objects are numbered 1..n over all channels.

    Attributes:
        tissues: the tissue of each image.
    """

    classes = CLASSES
    mpp = MPP
    terms = "CC BY-NC-SA 4.0 (PanNuke)"

    def __init__(self, root: str | Path, part: str, config: PanNukeConfig | None = None) -> None:
        """Map the arrays of a part.

        Args:
            root: folder with the folds.
            part: fold1, fold2, fold3, lowdata-train or lowdata-test.
            config: options; default those of PanNukeConfig.

        Raises:
            UsageError: no such part or tissue.
            DatasetError: the folder does not hold the part in one of the two layouts, or arrays
                that are damaged or do not fit one another.
        """
        config = config or PanNukeConfig()
        if part not in PARTS:
            raise UsageError(f"PanNuke has no part {part!r}; it has {', '.join(PARTS)}")
        fold, count = LOW_DATA.get(part, (part, 0))
        self.measuring = part == "lowdata-test"
        self.fold = open_fold(Path(root), fold)
        order = np.arange(len(self.fold.types))
        if count:
            order = _draw(self.fold, count, part)
        if config.tissues:
            order = order[_of_tissues(self.fold, config.tissues)[order]]
        if not len(order):
            wanted = ", ".join(config.tissues) or "any tissue"
            raise DatasetError(f"{root}: PanNuke {part} has no image of {wanted}")
        self.indices = tuple(order.tolist())
        self.names = tuple(f"{fold}_{i:04d}" for i in self.indices)
        self.groups = self.names
        self.tissues = tuple(str(t) for t in self.fold.types[order])

    def __getitem__(self, index: int) -> LabelledImage:
        image = self._image(self.indices[index])
        mask, instances = self._labels(index)
        return LabelledImage(self.names[index], image, mask, self.groups[index], instances)

    def mask(self, index: int) -> UInt8:
        """(H, W) mask of an image; the image itself is not read."""
        return self._labels(index)[0]

    def _image(self, number: int) -> UInt8:
        """(H, W, 3) uint8 RGB, from whole numbers of any type."""
        pixels = np.asarray(self.fold.images[number])
        if pixels.dtype == np.uint8:
            return pixels.copy()
        low, high = float(pixels.min()), float(pixels.max())
        if not (low >= 0 and 1 < high <= 255):
            raise DatasetError(
                f"{self.fold.folder}: image {number} has values from {low:g} to {high:g}; "
                "expected 0 to 255"
            )
        return (pixels + 0.5).astype(np.uint8)

    def _labels(self, index: int) -> tuple[UInt8, Int32]:
        """(H, W) labels and object numbers."""
        number = self.indices[index]
        channels = np.asarray(self.fold.masks[number])
        if not (channels.min() >= 0 and channels.max() < 1 << 31):
            raise DatasetError(f"{self.fold.folder}: the masks of image {number} are no numbers")
        return labels_of(channels)


def labels_of(channels: npt.NDArray[Any]) -> tuple[UInt8, Int32]:
    """Labels and object numbers of a stack of channels.

    Args:
        channels: (H, W, 6) object numbers, as in masks.npy.

    Returns:
        (H, W) uint8 labels 0..5, and (H, W) int32 numbers 1..n with 0 = background: by channel,
        then by number in the channel.
    """
    mask = np.full(channels.shape[:2], BACKGROUND, np.uint8)
    key = np.zeros(channels.shape[:2], np.int64)
    step = int(channels[..., :BACKGROUND].max()) + 1
    for k in range(BACKGROUND):
        plane = channels[..., k].astype(np.int64)
        inside = plane > 0
        mask[inside] = k
        key[inside] = plane[inside] + k * step
    known = np.unique(key[key > 0])
    numbers = np.searchsorted(known, key) + (key > 0)
    return mask, numbers.astype(np.int32)


def open_fold(root: Path, fold: str) -> Fold:
    """The arrays of a fold, memory-mapped, in the layout of the archives or the flat one.

    Raises:
        DatasetError: missing or damaged files, shapes that are not those of PanNuke.
    """
    if not root.is_dir():
        raise DatasetError(f"{root}: no such folder; PanNuke is {LAYOUT}")
    outer = root / f"Fold {fold[-1]}"
    images, masks = outer / "images" / fold, outer / "masks" / fold
    if not outer.is_dir():
        images = masks = root / fold
    found = Fold(
        _map(images / "images.npy"),
        _map(masks / "masks.npy"),
        _map(images / "types.npy").astype(np.str_),
        images,
    )
    shape, labels, types = found.images.shape, found.masks.shape, found.types.shape
    if len(shape) != 4 or shape[3] != 3 or labels != (*shape[:3], 6) or types != shape[:1]:
        raise DatasetError(
            f"{images}: images {shape}, masks {labels} and types {types} do not fit; expected "
            "(N, 256, 256, 3), (N, 256, 256, 6) and (N,)"
        )
    if {found.images.dtype.kind, found.masks.dtype.kind} - set("uif"):
        raise DatasetError(f"{images}: images and masks must be numbers")
    return found


def _map(path: Path) -> npt.NDArray[Any]:
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except FileNotFoundError as e:
        raise DatasetError(f"{path}: not there; PanNuke is {LAYOUT}") from e
    except (OSError, ValueError, EOFError, RecursionError, TypeError, TokenError) as e:
        raise DatasetError(f"{path}: not a readable array ({e}); unpack the archive again") from e


def _draw(fold: Fold, count: int, part: str) -> npt.NDArray[np.int64]:
    """`count` images of a fold, the same in every call."""
    total = len(fold.types)
    if total < count:
        raise DatasetError(
            f"{fold.folder}: {part} takes {count} images, but the fold has {total}; "
            "get the whole fold"
        )
    order = np.random.default_rng(LOW_DATA_SEED).permutation(total)
    return order[:count]


def _of_tissues(fold: Fold, tissues: tuple[str, ...]) -> npt.NDArray[np.bool_]:
    known = np.unique(fold.types).tolist()
    for tissue in tissues:
        if tissue not in known:
            raise UsageError(f"PanNuke has no tissue {tissue!r} here; it has {', '.join(known)}")
    return np.isin(fold.types, tissues)
