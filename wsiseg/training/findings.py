"""Labels and objects of a prediction, after the post-processing that belongs to the model.

Knows no networks and no files.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from wsiseg.classes import Classes
from wsiseg.models.segmenter import ModelInfo
from wsiseg.objects import ObjectsConfig, clean_labels, separate
from wsiseg.training.objects import objects_of
from wsiseg.training.sliding import Prediction

UInt8 = npt.NDArray[np.uint8]
Int32 = npt.NDArray[np.int32]


def found_labels(
    prediction: Prediction, info: ModelInfo, *, mpp: float, raw: bool = False
) -> UInt8:
    """(H, W) uint8 classes 0..C-1 of a prediction.

    Args:
        prediction: of an image.
        info: of the model that made it.
        mpp: micrometres per pixel of the image.
        raw: leave the model's post-processing out.
    """
    labels: UInt8 = prediction.probabilities.argmax(0).astype(np.uint8)
    if raw:
        return labels
    on_disk = clean_labels(labels + 1, background=_background(info), mpp=mpp, config=info.objects)
    found: UInt8 = np.subtract(on_disk, 1, dtype=np.uint8)
    return found


def found_objects(
    labels: UInt8,
    prediction: Prediction,
    info: ModelInfo,
    *,
    mpp: float,
    ignored: npt.NDArray[np.bool_],
    raw: bool = False,
) -> Int32:
    """(H, W) int32 objects 1..n, 0 = none, of labels of `found_labels`.

    Of a model without borders and post-processing they are the connected parts (8-connected) of
    what is not background, as the GlaS challenge counts them; of another what `separate` gives.

    Args:
        labels: of the same prediction.
        prediction: its border, if it has one, parts touching objects.
        info: of the model.
        mpp: micrometres per pixel of the image.
        ignored: (H, W) bool, pixels that belong to no object.
        raw: leave the model's post-processing and borders out.
    """
    background = _background(info)
    if raw or not (info.border or info.objects != ObjectsConfig()):
        return objects_of(~np.isin(labels + 1, background) & ~ignored)
    found = separate(
        labels + 1, prediction.border, background=background, mpp=mpp, config=info.objects
    )
    found[ignored] = 0
    return found


def filled(labels: UInt8, classes: Classes) -> UInt8:
    """Labels with the holes of what is not background given to the class around them.

    A hole takes the class of the pixel left of its first pixel in reading order.
    """
    background = [k for k, c in enumerate(classes) if c.background]
    empty = np.isin(labels, background)
    holes, count = ndimage.label(ndimage.binary_fill_holes(~empty) & empty)
    _, firsts = np.unique(holes, return_index=True)
    beside = labels.ravel()[firsts[1:] - 1] if count else np.zeros(0, np.uint8)
    values = np.concatenate([np.zeros(1, np.uint8), beside])
    return np.where(holes > 0, values[holes], labels).astype(np.uint8)


def without_small(objects: Int32, min_area_px: float) -> Int32:
    """Objects (H, W) of at least `min_area_px` pixels, numbered anew."""
    keep = np.bincount(objects.ravel()) >= min_area_px
    keep[0] = False
    kept: Int32 = np.where(keep, np.cumsum(keep), 0).astype(np.int32)[objects]
    return kept


def _background(info: ModelInfo) -> list[int]:
    """Values on disk of the background classes."""
    return [value for value, c in info.classes.values() if c.background]
