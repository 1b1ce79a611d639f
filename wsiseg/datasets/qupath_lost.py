"""What of annotated slides is in no patch. Knows no files and no polygons."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from wsiseg.classes import Classes
from wsiseg.datasets.qupath_config import QuPathConfig
from wsiseg.geometry import Box

_MOST_CLASSES = 5
_SMALL = 0.01
"""Share of a class that may be lost without a word: rims of annotations in the next patch."""


class Lost(NamedTuple):
    """What of a slide is in no patch.

    Attributes:
        patches: how many were left out though something in them is labelled.
        pixels: (255,) pixels of each class that are in those only.
        total: (255,) pixels of each class.
    """

    patches: int
    pixels: npt.NDArray[np.int64]
    total: npt.NDArray[np.int64]


def covered(box: Box, taken: set[tuple[int, int]], stride: int) -> npt.NDArray[np.bool_]:
    """(h, w) which pixels of a patch lie in others, whose corners are given, too."""
    covered = np.zeros((box.height, box.width), bool)
    steps = range(-((box.width - 1) // stride), (box.width - 1) // stride + 1)
    for dx, dy in itertools.product([k * stride for k in steps], repeat=2):
        if (box.x + dx, box.y + dy) in taken:
            part = box.intersection(Box(box.x + dx, box.y + dy, box.width, box.height))
            covered[Box(part.x - box.x, part.y - box.y, part.width, part.height).slices] = True
    return covered


def warn_of_lost(
    root: Path, slides: Sequence[Lost], config: QuPathConfig, classes: Classes
) -> None:
    """One warning of the area of classes that is in no patch, where that is not a small share."""
    lost = np.sum([s.pixels for s in slides], axis=0)
    total = np.sum([s.total for s in slides], axis=0)
    shares = [(lost[k] / total[k], k) for k in np.flatnonzero(lost > _SMALL * total)]
    if not shares:
        return
    listed = ", ".join(
        f"{lost[k] * config.mpp**2:,.0f} um2 of {classes.names[k]} ({share:.1%})"
        for share, k in sorted(shares, reverse=True)[:_MOST_CLASSES]
    )
    more = f" and of {len(shares) - _MOST_CLASSES} others" * (len(shares) > _MOST_CLASSES)
    warnings.warn(
        f"{root}: {sum(s.patches for s in slides)} patches are left out, as less than "
        f"{config.min_labelled:.2%} of each is annotated, and with them {listed}{more}; "
        "to keep them lower the option min_labelled (in a YAML file for --dataset, a copy of "
        "configs/datasets/qupath.yaml)",
        stacklevel=4,
    )
