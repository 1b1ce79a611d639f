"""What labelled images hold, in checksums, whatever their files are called. Knows no networks."""

from __future__ import annotations

import time
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy.typing as npt

from wsiseg.datasets.base import LabelledDataset
from wsiseg.training.processes import Processes

SAID_EVERY_S = 20.0
"""Seconds between two lines on how far the reading is."""


class Contents(NamedTuple):
    """Checksums of images and of their labels, in order, 8 hexadecimal digits each.

    Attributes:
        images: of the decoded pixels.
        labels: of the masks, and of the object numbers where there are some.
    """

    images: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()


def contents_of(dataset: LabelledDataset, indices: Sequence[int]) -> Contents:
    """Read some images of a data set, one after the other, with their labels.

    Raises:
        DatasetError, SlideError: an image or its labels cannot be read.
    """
    images, labels = [], []
    said, first = time.monotonic(), Processes().first
    for done, index in enumerate(indices):
        if first and time.monotonic() - said > SAID_EVERY_S:
            said = time.monotonic()
            print(f"reading images: {done} of {len(indices)}", flush=True)
        item = dataset[index]
        label = _crc(item.mask)
        if item.instances is not None:
            label = _crc(item.instances, label)
        images.append(checksum_of(item.image))
        labels.append(f"{label:08x}")
    return Contents(tuple(images), tuple(labels))


def checksum_of(image: npt.NDArray[Any]) -> str:
    """8 hexadecimal digits of an image's decoded pixels."""
    return f"{_crc(image):08x}"


def _crc(array: npt.NDArray[Any], start: int = 0) -> int:
    """CRC-32 of an array's shape and bytes."""
    return zlib.crc32(array.tobytes(), zlib.crc32(repr(array.shape).encode(), start))
