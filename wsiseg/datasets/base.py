"""The contract of labelled images. Knows no particular data set."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from wsiseg.classes import Classes

UInt8 = npt.NDArray[np.uint8]


class LabelledImage(NamedTuple):
    """An image with its labels.

    Attributes:
        name: unique in its data set.
        image: (H, W, 3) uint8 RGB.
        mask: (H, W) uint8 classes 0..C-1, 255 = ignore.
        group: what must not be split between training and validation (a patient), or the name.
    """

    name: str
    image: UInt8
    mask: UInt8
    group: str


class LabelledDataset(Protocol):
    """A sequence of labelled images of one resolution and one set of classes.

    Attributes:
        classes: the classes of the masks, in network order.
        mpp: micrometres per pixel of the images.
        names: the images' names, in order.
        groups: the images' groups, in the same order.
    """

    classes: Classes
    mpp: float
    names: tuple[str, ...]
    groups: tuple[str, ...]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> LabelledImage: ...


def grouped_split(groups: tuple[str, ...], share: float, seed: int) -> tuple[list[int], list[int]]:
    """(training, validation) indices with whole groups on one side.

    Groups are shuffled by the seed and taken for validation until they hold `share` of the
    images; with share 0 the second list is empty.
    """
    order = sorted(set(groups))
    np.random.default_rng(seed).shuffle(order)
    wanted, chosen, count = share * len(groups), set(), 0
    for group in order:
        if count >= wanted:
            break
        chosen.add(group)
        count += groups.count(group)
    held = [i for i, g in enumerate(groups) if g in chosen]
    return [i for i, g in enumerate(groups) if g not in chosen], held
