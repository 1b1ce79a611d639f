"""The contract of labelled images, and how they are divided. Knows no particular data set."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from wsiseg.classes import IGNORE, Classes
from wsiseg.datasets.checks import plain, warn_of_tiny
from wsiseg.errors import DatasetError, UsageError
from wsiseg.slides.image_file import ImageFileError, open_image

UInt8 = npt.NDArray[np.uint8]
Int32 = npt.NDArray[np.int32]


class LabelledImage(NamedTuple):
    """An image with its labels.

    Attributes:
        name: unique in its data set.
        image: (H, W, 3) uint8 RGB.
        mask: (H, W) uint8 classes 0..C-1, 255 = ignore.
        group: what must not be split between training and validation (a patient), or the name.
        instances: (H, W) int32 object numbers, 0 = none, where the data set has them.
    """

    name: str
    image: UInt8
    mask: UInt8
    group: str
    instances: Int32 | None = None


class LabelledDataset(ABC):
    """A sequence of labelled images of one resolution and one set of classes.

    Attributes:
        classes: the classes of the masks, in network order.
        mpp: micrometres per pixel of the images as they are given.
        names: the images' names, in order, all different.
        groups: the images' groups, in the same order.
        measuring: whether the part is the official one for measuring only.
        terms: what the data's terms say of weights that are trained on them; empty = nothing.
        folder: where its files are, None where it has none.
    """

    classes: Classes
    mpp: float
    names: tuple[str, ...]
    groups: tuple[str, ...]
    measuring: bool = False
    terms: str = ""
    folder: Path | None = None

    def __len__(self) -> int:
        return len(self.names)

    @abstractmethod
    def __getitem__(self, index: int) -> LabelledImage:
        """An image, read when it is asked for.

        Raises:
            DatasetError: files that are damaged or do not fit one another.
        """

    def mask(self, index: int) -> UInt8:
        """(H, W) mask of an image; cheaper than the whole where the data set can."""
        return self[index].mask

    @property
    def files(self) -> tuple[int, ...]:
        """Number of the file that each image is cut from: those of one file are read together."""
        return tuple(range(len(self)))


def rgb(image: Image.Image) -> UInt8:
    """(H, W, 3) uint8 of an image; what is transparent becomes white, as glass is."""
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("RGB"))


def load_image(path: Path, *, pixels: bool = True) -> Image.Image:
    """An image file; without `pixels` only its header is read.

    Raises:
        DatasetError: it is missing, no image, damaged or too large.
    """
    try:
        with open_image(path) as image:
            if pixels:
                image.load()
            return image
    except (ImageFileError, FileNotFoundError) as e:
        raise DatasetError(f"{path}: not a readable image ({e})") from e


class Subset(LabelledDataset):
    """Some of the images of a data set."""

    def __init__(self, whole: LabelledDataset, indices: Sequence[int]) -> None:
        """The images `indices` of `whole`, in that order."""
        self._whole, self._indices = whole, tuple(indices)
        self.classes, self.mpp = whole.classes, whole.mpp
        self.measuring, self.terms = whole.measuring, whole.terms
        self.folder = whole.folder
        self.names = tuple(whole.names[i] for i in self._indices)
        self.groups = tuple(whole.groups[i] for i in self._indices)

    def __getitem__(self, index: int) -> LabelledImage:
        return self._whole[self._indices[index]]

    def mask(self, index: int) -> UInt8:
        """As that of the whole."""
        return self._whole.mask(self._indices[index])

    @property
    def files(self) -> tuple[int, ...]:
        """As those of the whole."""
        whole = self._whole.files
        return tuple(whole[i] for i in self._indices)


class Renumbered(LabelledDataset):
    """A data set whose classes have the names and the order of a model's."""

    def __init__(self, whole: LabelledDataset, classes: Classes) -> None:
        """`whole` with its classes numbered as those of `classes` of the same names.

        Raises:
            DatasetError: the names differ by more than case and order.
        """
        places = {plain(name): k for k, name in enumerate(classes.names)}
        own = [plain(name) for name in whole.classes.names]
        if sorted(own) != sorted(places):
            raise DatasetError(
                f"the data set's classes ({', '.join(whole.classes.names)}) are not the model's "
                f"({', '.join(classes.names)}); name them alike in a YAML file for --dataset"
            )
        self._whole = whole
        self._numbers = np.arange(256, dtype=np.uint8)  # what is no class stays what it was
        self._numbers[: len(own)] = [places[name] for name in own]
        self.classes, self.mpp = classes, whole.mpp
        self.measuring, self.terms = whole.measuring, whole.terms
        self.folder, self.names, self.groups = whole.folder, whole.names, whole.groups

    def __getitem__(self, index: int) -> LabelledImage:
        item = self._whole[index]
        return item._replace(mask=self._numbers[item.mask])

    def mask(self, index: int) -> UInt8:
        """As that of the whole, in other numbers."""
        found: UInt8 = self._numbers[self._whole.mask(index)]
        return found

    @property
    def files(self) -> tuple[int, ...]:
        """As those of the whole."""
        return self._whole.files


def numbered_as(dataset: LabelledDataset, classes: Classes) -> LabelledDataset:
    """A data set with the names and the order of a model's classes.

    Raises:
        DatasetError: the names differ by more than case and order.
    """
    return dataset if dataset.classes.names == classes.names else Renumbered(dataset, classes)


def grouped_split(groups: Sequence[str], share: float, seed: int) -> tuple[list[int], list[int]]:
    """(training, validation) indices with whole groups on one side.

    Groups are shuffled by the seed and taken for validation until they hold `share` of the
    images. One with which they would hold more than three times that is passed over, unless
    without such groups they would hold less than half of it; one that would take more than half
    of what the share leaves for training always is. So training is left with images, except
    where all are of one group and `share` is above 0. With share 0 the second list is empty.

    Args:
        groups: the group of each image.
        share: of the images, 0 to below 1.
        seed: of the order of the groups.
    """
    order = sorted(set(groups))
    np.random.default_rng(seed).shuffle(order)
    sizes = Counter(groups)
    wanted = share * len(groups)
    most = (wanted + len(groups)) / 2 if len(order) > 1 else len(groups)
    chosen = _fitting(order, sizes, wanted, min(3 * wanted, most))
    if sum(sizes[g] for g in chosen) < wanted / 2:
        chosen = _fitting(order, sizes, wanted, most)
    held = [i for i, g in enumerate(groups) if g in chosen]
    return [i for i, g in enumerate(groups) if g not in chosen], held


def _fitting(
    order: Sequence[str], sizes: Mapping[str, int], wanted: float, most: float
) -> set[str]:
    """The first groups that hold `wanted` images, without those that would make it over `most`."""
    chosen: set[str] = set()
    count = 0
    for group in order:
        if count >= wanted:
            break
        if count + sizes[group] <= most:
            chosen.add(group)
            count += sizes[group]
    return chosen


def fold_split(
    groups: Sequence[str], fold: int, folds: int, *, files: Sequence[int] | None = None
) -> tuple[list[int], list[int]]:
    """(rest, fold) indices of fold 1..folds, whole groups on one side, the same in every call.

    Groups are shuffled once by a fixed seed, then each goes to the fold that holds the fewest
    files, the groups with most first: so folds are the same however files are cut into images,
    as long as none of them loses all.

    Args:
        groups: the group of each image.
        fold: which fold, from 1.
        folds: how many there are.
        files: the file of each image; None takes each for a file of its own.

    Raises:
        UsageError: fewer groups than folds, or a fold that is not among them.
    """
    order = sorted(set(groups))
    if not (2 <= folds <= len(order) and 1 <= fold <= folds):
        raise UsageError(
            f"fold {fold}/{folds}: give K/N with K from 1 to N, and N from 2 to the number of "
            f"groups (patients or images), {len(order)}"
        )
    np.random.default_rng(0).shuffle(order)
    held: dict[str, set[int]] = {}
    for group, file in zip(groups, range(len(groups)) if files is None else files, strict=True):
        held.setdefault(group, set()).add(file)
    order.sort(key=lambda g: -len(held[g]))  # stable: the shuffle decides among equals
    sizes, home = [0] * folds, {}
    for group in order:
        home[group] = sizes.index(min(sizes))
        sizes[home[group]] += len(held[group])
    own = [i for i, g in enumerate(groups) if home[g] == fold - 1]
    return [i for i, g in enumerate(groups) if home[g] != fold - 1], own


def parse_fold(text: str) -> tuple[int, int]:
    """(K, N) of 'K/N'.

    Raises:
        UsageError: not of that form.
    """
    left, slash, right = text.partition("/")
    if not (slash and left.isdecimal() and right.isdecimal()):
        raise UsageError(f"fold {text!r}: write it as K/N, such as 1/5")
    return int(left), int(right)


def class_pixels(dataset: LabelledDataset, indices: Sequence[int]) -> npt.NDArray[np.int64]:
    """(N, C) labelled pixels of each class in some images, an image a row; warns of tiny ones.

    Raises:
        DatasetError: a mask holds a value that is no class.
    """
    count = len(dataset.classes)
    counts = np.zeros((len(indices), 256), np.int64)
    sizes = []
    for row, i in enumerate(indices):
        mask = dataset.mask(i)
        sizes.append(mask.shape)
        counts[row] = np.bincount(mask.ravel(), minlength=256)
    warn_of_tiny([dataset.names[i] for i in indices], sizes)
    stray = [v for v in range(count, IGNORE) if counts[:, v].any()]
    if stray:
        raise DatasetError(
            f"masks hold the value {stray[0]}, which is none of the {count} classes "
            f"({', '.join(dataset.classes.names)}) nor 255 for ignore"
        )
    return counts[:, :count]


def fold_of(dataset: LabelledDataset, text: str) -> tuple[list[int], list[int]]:
    """(rest, fold) indices of fold 'K/N' of a data set; see `fold_split`.

    Raises:
        UsageError: not of that form, or a fold that cannot be.
    """
    return fold_split(dataset.groups, *parse_fold(text), files=dataset.files)
