"""Class probabilities of a whole image of any size by overlapping windows. Knows no data sets.

Slides go through wsiseg.inference, which shares tiles and works on disk; this is for labelled
images, at the images' own resolution.

Memory bound: the probabilities of one image at the model's resolution, and a window's features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as nnf

from wsiseg.geometry import Point
from wsiseg.models.base import to_tensor
from wsiseg.models.segmenter import Segmenter
from wsiseg.stain import normalise_image
from wsiseg.training.patches import stretch

UInt8 = npt.NDArray[np.uint8]


class Prediction(NamedTuple):
    """What a model says of an image, at the image's own resolution.

    Attributes:
        probabilities: (C, H, W) float32.
        uncertainty: (H, W) float32 where the head is an ensemble, else None.
    """

    probabilities: npt.NDArray[np.float32]
    uncertainty: npt.NDArray[np.float32] | None


def predict_image(
    segmenter: Segmenter,
    image: UInt8,
    *,
    ratio: float,
    seeds: Sequence[int] = (0,),
    tta: bool = False,
) -> Prediction:
    """Probabilities of an image, averaged over noise seeds and views.

    The image's stains are normalised if the model's training images were; it is scaled to the
    model's resolution (or stretched to a square, `resize_px`), mirrored up to whole tiles, and
    gone through in windows that overlap by half, weighted towards their middle; what comes out is
    scaled back bilinearly.

    Args:
        segmenter: the model.
        image: (H, W, 3) uint8 RGB.
        ratio: image mpp / model mpp.
        seeds: seeds of the noise; the place of the image is (0, 0).
        tta: average over the eight flips and quarter turns.
    """
    height, width = image.shape[:2]
    if segmenter.info.stain_target is not None:
        image = normalise_image(image, segmenter.info.stain_target)
    small = _scaled(image, ratio, segmenter.info.resize_px)
    total = torch.zeros(0)
    views = range(8) if tta else range(1)
    with torch.inference_mode():
        for seed in seeds:
            for view in views:
                part = _one_view(segmenter, small, view, seed)
                total = part if total.numel() == 0 else total.add_(part)
    total = total / (len(seeds) * len(views))
    full = nnf.interpolate(total[None], size=(height, width), mode="bilinear", align_corners=False)
    maps = full[0].numpy()
    count = len(segmenter.info.classes)
    return Prediction(maps[:count], maps[count] if len(maps) > count else None)


def _scaled(image: UInt8, ratio: float, resize_px: int | None) -> UInt8:
    if resize_px is not None:
        return stretch(image, resize_px)
    height, width = image.shape[:2]
    size = (max(1, round(width * ratio)), max(1, round(height * ratio)))
    how = Image.Resampling.BOX if ratio < 1 else Image.Resampling.BICUBIC
    return np.asarray(Image.fromarray(image).resize(size, how))


def _one_view(segmenter: Segmenter, image: UInt8, view: int, seed: int) -> Tensor:
    """(C[+1], h, w) maps of an image seen flipped (view >= 4) and turned (view % 4)."""
    turned = np.rot90(image[:, ::-1] if view >= 4 else image, view % 4)
    height, width = turned.shape[:2]
    tile = segmenter.info.tile_px
    pad = ((0, -height % tile), (0, -width % tile), (0, 0))
    maps = _windows(segmenter, np.pad(turned, pad, mode="symmetric"), seed)
    maps = torch.rot90(maps[:, :height, :width], -(view % 4), (1, 2))
    return maps.flip(2) if view >= 4 else maps


def _windows(segmenter: Segmenter, image: UInt8, seed: int) -> Tensor:
    """(C[+1], H, W) blended maps of an image whose sides are multiples of the tile."""
    sides = [min(segmenter.info.window_px, s) for s in image.shape[:2]]
    weight = _weights(sides[0], sides[1])
    total, weights = torch.zeros(0), torch.zeros(image.shape[:2])
    tile = segmenter.info.tile_px
    for y in starts(image.shape[0], sides[0], tile):
        for x in starts(image.shape[1], sides[1], tile):
            window = image[y : y + sides[0], x : x + sides[1]]
            maps = _window(segmenter, window, Point(x, y), seed)
            if total.numel() == 0:
                total = torch.zeros(len(maps), *image.shape[:2])
            total[:, y : y + sides[0], x : x + sides[1]] += maps * weight
            weights[y : y + sides[0], x : x + sides[1]] += weight
    return total / weights


def starts(length: int, window: int, tile: int) -> list[int]:
    """Where windows begin along an axis: half overlapping, on the tile grid where they have tiles.

    The last one ends at the end.
    """
    stride = max(1, window // 2 // tile * tile or window // 2)
    return [*range(0, length - window, stride), length - window]


def _weights(height: int, width: int) -> Tensor:
    """(h, w) weights that fall linearly from the middle to a small value at the borders."""
    rows, columns = (
        1 - (torch.arange(n) + 0.5 - n / 2).abs() / (n / 2) * 0.98 for n in (height, width)
    )
    return rows[:, None] * columns[None, :]


def _window(segmenter: Segmenter, window: UInt8, place: Point, seed: int) -> Tensor:
    """(C[+1], h, w) probabilities, and the uncertainty where the head gives one, on the CPU."""
    batch = to_tensor(window[None], device=segmenter.device)
    features = segmenter.features(batch, [place], seed)
    probabilities = segmenter.window_probabilities(features)[0]
    uncertainty = segmenter.head.uncertainty(features)
    if uncertainty is None:
        return probabilities.cpu()
    return torch.cat((probabilities, uncertainty)).cpu()
