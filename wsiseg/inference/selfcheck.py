"""Whether a model gives the labels here that it gave where it was made. Knows no slides.

The expected labels lie beside the model as a small PNG. The labels are the same to the last pixel
only on the same kind of processor: another one adds in another order, and where two classes are
nearly as likely the other may win. So they may differ in a few pixels, along borders, and not more.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, PngImagePlugin

from wsiseg.atomic import staged
from wsiseg.errors import ModelError
from wsiseg.geometry import Point
from wsiseg.models.segmenter import Segmenter

UInt8 = npt.NDArray[np.uint8]
SUFFIX = ".labels.png"
TILES = 2
"""Side of the image, in tiles of the model."""
LEAST_EQUAL = 0.995
"""Share of pixels that must have the expected label."""
MOST_AREA = 0.005
"""How much the share of a class may differ."""


class Agreement(NamedTuple):
    """How labels compare to the expected ones.

    Attributes:
        equal: share of pixels with the expected label.
        area: largest difference of a class's share.
    """

    equal: float
    area: float

    @property
    def good(self) -> bool:
        """Whether no more differs than rounding explains."""
        return self.equal >= LEAST_EQUAL and self.area <= MOST_AREA


def model_labels(segmenter: Segmenter, image: UInt8) -> UInt8:
    """(h, w) uint8 labels 1..C of an (h, w, 3) uint8 RGB image of whole tiles, in fp32."""
    pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None]
    scaled = (pixels.to(segmenter.device).float() / 127.5) - 1
    with torch.inference_mode():
        maps = segmenter.probabilities(scaled, [Point(0, 0)])
    best = maps[0, : len(segmenter.info.classes)].argmax(dim=0)
    return np.asarray(best.cpu().numpy() + 1, np.uint8)


def compare(labels: UInt8, expected: UInt8) -> Agreement:
    """How labels agree with the expected ones of the same size."""
    if labels.shape != expected.shape:
        return Agreement(0.0, 1.0)
    counts = [np.bincount(a.ravel(), minlength=256) / a.size for a in (labels, expected)]
    return Agreement(float((labels == expected).mean()), float(np.abs(counts[0] - counts[1]).max()))


def digest(labels: UInt8) -> str:
    """sha256 of labels, as hex."""
    return hashlib.sha256(labels.tobytes()).hexdigest()


def expected_path(model: Path) -> Path:
    """Where the expected labels of a model's file lie."""
    return model.with_suffix(SUFFIX)


def write_expected(path: Path, labels: UInt8, *, sha256: str) -> None:
    """Keep labels as those expected of the model with that digest.

    Raises:
        OutputError: the file cannot be written.
    """
    note = PngImagePlugin.PngInfo()
    note.add_text("model", sha256)
    with staged(path) as (temporary,):
        Image.fromarray(labels).save(temporary, "PNG", pnginfo=note, optimize=True)


def read_expected(path: Path, *, sha256: str) -> UInt8:
    """The labels expected of the model with that digest.

    Raises:
        ModelError: there are none, or they are those of another model.
    """
    try:
        with Image.open(path, formats=("PNG",)) as image:
            image.load()
            model, labels = str(image.info.get("model", "")), np.asarray(image, np.uint8)
    except (OSError, SyntaxError, ValueError) as e:
        raise ModelError(f"{path}: the expected labels cannot be read; install again") from e
    if model != sha256:
        raise ModelError(f"{path}: these labels are expected of another model file")
    return labels
