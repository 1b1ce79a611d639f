"""A folder of images and label images, described by a small YAML. Knows no particular data set."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import numpy.typing as npt

from wsiseg.classes import IGNORE, Classes, TissueClass
from wsiseg.datasets.base import LabelledDataset, LabelledImage, UInt8, load_image, rgb
from wsiseg.datasets.checks import alike, check_depth
from wsiseg.errors import ConfigError, DatasetError, UsageError

_MAX_VALUE = 65535
_UNKNOWN = -1


@dataclass(frozen=True)
class FolderClass:
    """One class of the network and the values that it has in the label images."""

    name: str
    """Its name."""
    color: tuple[int, int, int]
    """Red, green, blue, 0 to 255."""
    values: tuple[int, ...]
    """Its values in the label images, 0 to 65535; of palette images the index, not the colour."""
    background: bool = False
    """Whether it is the rest, not exported as polygons."""


@dataclass(frozen=True)
class FolderPart:
    """One part of the data set: images by a pattern, by name, or those of both."""

    name: str
    """Its name."""
    images: str = ""
    """Pattern of its images; empty: that of the data set."""
    masks: str = ""
    """Pattern of its label images; empty: that of the data set."""
    stems: tuple[str, ...] = ()
    """Names of its images without suffix; empty: all that match."""
    measuring: bool = False
    """Whether it is for measuring only."""


@dataclass(frozen=True)
class FolderConfig:
    """Options of the data set."""

    images: str
    """Pattern of the images below the folder, such as 'img/*.png'."""
    masks: str
    """Label image of an image, such as 'mask/{stem}.png'; {stem} is its name without suffix."""
    classes: tuple[FolderClass, ...]
    """Classes in network order."""
    mpp: float
    """Micrometres per pixel of the images."""
    ignore: tuple[int, ...] = ()
    """Values of the label images that are no class and take no part."""
    group: str = ""
    """Regular expression whose first group, found in the stem, is the patient or whatever else
    must not be split; empty: each image is its own."""
    instances: str = ""
    """Image of object numbers (0 = none) of an image, like `masks`; empty: there are none."""
    terms: str = ""
    """What the data's terms say of weights that are trained on them."""
    parts: tuple[FolderPart, ...] = ()
    """Parts; empty: `all`, and `train` for the same."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.mpp) and self.mpp > 0):
            raise ConfigError(f"mpp {self.mpp}: must be above 0")
        if len(self.classes) < 2:
            raise ConfigError("classes: give at least 2")
        pair = alike(c.name for c in self.classes)
        if pair:
            raise ConfigError(
                f"classes: {pair[0]!r} and {pair[1]!r} differ only in case or spaces; make one "
                "class of them, with the values of both, or rename one"
            )
        values = [v for c in self.classes for v in c.values] + list(self.ignore)
        wrong = [v for v in values if not 0 <= v <= _MAX_VALUE or values.count(v) > 1]
        if wrong:
            raise ConfigError(
                f"the value {wrong[0]} of label images is given twice or is not 0 to {_MAX_VALUE}"
            )
        empty = [c.name for c in self.classes if not c.values]
        if empty:
            raise ConfigError(f"class {empty[0]}: give its values in the label images")
        if len({p.name for p in self.parts}) < len(self.parts):
            raise ConfigError("parts: two have the same name")
        for pattern in [self.images, *(p.images for p in self.parts if p.images)]:
            _check_below(pattern)
        for pattern in [self.masks, self.instances, *(p.masks for p in self.parts)]:
            if pattern and "{stem}" not in pattern:
                raise ConfigError(f"{pattern}: write {{stem}} where the name of the image goes")
        _check_group(self.group)


def _check_below(pattern: str) -> None:
    path = PurePosixPath(pattern)
    if not path.parts or path.is_absolute() or ".." in path.parts:
        raise ConfigError(f"images {pattern!r}: must be a pattern below the folder")


def _check_group(text: str) -> None:
    try:
        groups = re.compile(text).groups
    except re.error as e:
        raise ConfigError(f"group {text!r}: not a regular expression ({e})") from e
    if text and not groups:
        raise ConfigError(f"group {text!r}: put parentheses around what is the patient")


class FolderDataset(LabelledDataset):
    """Images of a folder with a label image each."""

    def __init__(self, root: str | Path, part: str, config: FolderConfig) -> None:
        """Find the images of a part and their label images.

        Args:
            root: the folder.
            part: a name of `config.parts`, or without those `all` or `train`.
            config: what is where and what it means.

        Raises:
            UsageError: no such part.
            DatasetError: no image matches, a label image is missing, two images have one name,
                or the group is not found in a name.
        """
        self.root, self.config = Path(root), config
        chosen = _find_part(config, part)
        self.paths = _images(self.root, chosen)
        self.names = tuple(p.stem for p in self.paths)
        masks = chosen.masks
        self._masks = [_existing(self.root, masks, p) for p in self.paths]
        self._instances = [
            _existing(self.root, config.instances, p) for p in self.paths if config.instances
        ]
        self.groups = tuple(_group(config.group, p) for p in self.paths)
        self.classes = Classes(
            tuple(TissueClass(c.name, c.color, c.background) for c in config.classes)
        )
        self.mpp, self.measuring = config.mpp, chosen.measuring
        self.terms = config.terms
        self._labels = _label_table(config)

    def __getitem__(self, index: int) -> LabelledImage:
        path = self.paths[index]
        image = _read_rgb(path)
        instances = None
        if self._instances:
            numbers = _read_labels(self._instances[index])
            _check_size(self._instances[index], numbers.shape, path, image.shape[:2])
            if numbers.max(initial=0) > np.iinfo(np.int32).max or numbers.min(initial=0) < 0:
                raise DatasetError(f"{self._instances[index]}: object numbers must be 0 to 2^31-1")
            instances = numbers.astype(np.int32)
        return LabelledImage(path.stem, image, self.mask(index), self.groups[index], instances)

    def mask(self, index: int) -> UInt8:
        """(H, W) mask of an image, without reading the image's pixels."""
        path = self._masks[index]
        raw = _read_labels(path)
        width, height = load_image(self.paths[index], pixels=False).size
        _check_size(path, raw.shape, self.paths[index], (height, width))
        known = (raw >= 0) & (raw <= _MAX_VALUE)
        labels = np.where(known, self._labels[np.where(known, raw, 0)], _UNKNOWN)
        if (labels == _UNKNOWN).any():
            stray = np.unique(raw[labels == _UNKNOWN])
            raise DatasetError(
                f"{path}: holds the value {', '.join(map(str, stray[:5].tolist()))}, which is "
                "neither of a class nor in `ignore`; add it to the options"
            )
        return labels.astype(np.uint8)


def _find_part(config: FolderConfig, name: str) -> FolderPart:
    """The part, with the patterns of the data set where it has none."""
    parts = config.parts or (FolderPart("all"), FolderPart("train"))
    found = next((p for p in parts if p.name == name), None)
    if found is None:
        raise UsageError(
            f"the data set has no part {name!r}; it has {', '.join(p.name for p in parts)}"
        )
    images, masks = found.images or config.images, found.masks or config.masks
    return FolderPart(found.name, images, masks, found.stems, found.measuring)


def _images(root: Path, part: FolderPart) -> list[Path]:
    if not root.is_dir():
        raise DatasetError(f"{root}: no such folder; give the one that holds {part.images}")
    try:
        paths = sorted(p for p in root.glob(part.images) if p.is_file())
    except (ValueError, NotImplementedError) as e:
        raise ConfigError(f"images {part.images!r}: not a pattern ({e})") from e
    twice = [stem for stem, n in Counter(p.stem for p in paths).items() if n > 1]
    if twice:
        raise DatasetError(f"{root}: two images are named {twice[0]}; narrow {part.images!r}")
    if part.stems:
        missing = sorted(set(part.stems) - {p.stem for p in paths})
        if missing:
            raise DatasetError(
                f"{root}: the part {part.name} names {missing[0]}, which is none of {part.images}"
            )
        paths = [p for p in paths if p.stem in part.stems]
    if not paths:
        raise DatasetError(f"{root}: no image matches {part.images!r} of the part {part.name}")
    return paths


def _existing(root: Path, pattern: str, image: Path) -> Path:
    path = root / pattern.replace("{stem}", image.stem)
    if not path.is_file():
        raise DatasetError(f"{path}: not there, though {image} is; each image needs its labels")
    return path


def _group(pattern: str, path: Path) -> str:
    if not pattern:
        return path.stem
    match = re.search(pattern, path.stem)
    if match is None or match[1] is None:
        raise DatasetError(f"{path}: its name does not hold the group {pattern!r}")
    return match[1]


def _label_table(config: FolderConfig) -> npt.NDArray[np.int16]:
    """(65536,) label of each raw value, -1 where it is unknown."""
    table = np.full(_MAX_VALUE + 1, _UNKNOWN, np.int16)
    for i, item in enumerate(config.classes):
        table[list(item.values)] = i
    table[list(config.ignore)] = IGNORE
    return table


def _read_rgb(path: Path) -> UInt8:
    image = load_image(path)
    check_depth(path, image)
    return rgb(image)


def _read_labels(path: Path) -> npt.NDArray[np.int64]:
    """(H, W) values of a label image: of a palette image the index, of RGB the one grey value."""
    image = load_image(path)
    values = np.asarray(image)
    if values.ndim == 3:
        colours = values[..., : 1 if image.mode == "LA" else 3]
        if (colours != colours[..., :1]).any():
            raise DatasetError(
                f"{path}: is a colour picture; labels must be grey values or a palette image"
            )
        values = colours[..., 0]
    if values.dtype.kind == "f":
        raise DatasetError(f"{path}: holds fractions; labels must be whole numbers")
    return values.astype(np.int64)


def _check_size(path: Path, size: tuple[int, ...], image: Path, expected: tuple[int, ...]) -> None:
    if size != expected:
        raise DatasetError(
            f"{path}: is {size[1]} x {size[0]} px, but the image {image.name} is "
            f"{expected[1]} x {expected[0]} px"
        )
