"""Class probabilities of a whole image of any size by overlapping windows. Knows no data sets.

Slides go through wsiseg.inference, which shares tiles and works on disk; this is for labelled
images, at the images' own resolution.

Memory bound: the probabilities of one image at the model's resolution, twice where there are
several seeds of noise, and the features of the rows of tiles that one row of windows needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as nnf

from wsiseg.datasets.augment import scaled
from wsiseg.geometry import Point
from wsiseg.models.base import Features, to_tensor
from wsiseg.models.segmenter import Segmenter
from wsiseg.models.views import ViewedSegmenter
from wsiseg.stain import normalise_image
from wsiseg.training.patches import stretch

UInt8 = npt.NDArray[np.uint8]


class Prediction(NamedTuple):
    """What a model says of an image, at the image's own resolution.

    Attributes:
        probabilities: (C, H, W) float32.
        uncertainty: (H, W) float32 where the head is an ensemble, else None.
        border: (H, W) float32 probability of a border of objects, None where the model has none.
    """

    probabilities: npt.NDArray[np.float32]
    uncertainty: npt.NDArray[np.float32] | None
    border: npt.NDArray[np.float32] | None = None


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
    side = segmenter.info.resize_px
    small = scaled(image, ratio) if side is None else stretch(image, side)
    if tta:
        segmenter = ViewedSegmenter(segmenter)
    tile = segmenter.info.tile_px
    pad = ((0, -small.shape[0] % tile), (0, -small.shape[1] % tile), (0, 0))
    padded = np.pad(small, pad, mode="symmetric")
    with torch.inference_mode():
        total = _windows(segmenter, padded, seeds[0])
        for seed in seeds[1:]:
            total += _windows(segmenter, padded, seed)
        total = total.div_(len(seeds))[:, : small.shape[0], : small.shape[1]]
    full = nnf.interpolate(total[None], size=(height, width), mode="bilinear", align_corners=False)
    maps = full[0].numpy()
    count, outputs = len(segmenter.info.classes), segmenter.info.output_count
    return Prediction(
        probabilities=maps[:count],
        uncertainty=maps[outputs] if len(maps) > outputs else None,
        border=maps[count] if segmenter.info.border else None,
    )


def _windows(segmenter: Segmenter, image: UInt8, seed: int) -> Tensor:
    """Blended maps (outputs [+ 1], H, W) of an image whose sides are whole tiles."""
    sides = [min(segmenter.info.window_px, s) for s in image.shape[:2]]
    weight = _weights(sides[0], sides[1])
    total, weights = torch.zeros(0), torch.zeros(image.shape[:2])
    tiles = _Tiles(segmenter, image, seed)
    for y in starts(image.shape[0], sides[0], tiles.side_px):
        tiles.forget_above(y)
        for x in starts(image.shape[1], sides[1], tiles.side_px):
            maps = _maps(segmenter, tiles.features(Point(x, y), sides))
            if total.numel() == 0:
                total = torch.zeros(len(maps), *image.shape[:2])
            total[:, y : y + sides[0], x : x + sides[1]] += maps * weight
            weights[y : y + sides[0], x : x + sides[1]] += weight
    return total.div_(weights)


class _Tiles:
    """The features of an image's tiles, each computed once and shared by the windows it is in.

    Memory bound: the rows of tiles that windows of one row need.
    """

    def __init__(self, segmenter: Segmenter, image: UInt8, seed: int) -> None:
        self.segmenter, self.image, self.seed = segmenter, image, seed
        self.side_px = segmenter.info.tile_px
        self._kept: dict[Point, Features] = {}

    def forget_above(self, y: int) -> None:
        self._kept = {p: maps for p, maps in self._kept.items() if p.y >= y}

    def features(self, place: Point, sides: Sequence[int]) -> Features:
        """Maps (1, R, K, channels, h, w) of the window of `sides` (height, width) at a place."""
        side = self.side_px
        rows, columns = sides[0] // side, sides[1] // side
        maps = [
            self._tile(Point(place.x + k * side, place.y + r * side))
            for r in range(rows)
            for k in range(columns)
        ]
        return tuple(
            torch.unflatten(torch.cat(parts), 0, (1, rows, columns))
            for parts in zip(*maps, strict=True)
        )

    def _tile(self, place: Point) -> Features:
        """Maps (1, channels, h, w) of the tile at a place."""
        if place not in self._kept:
            side, model = self.side_px, self.segmenter
            tile = self.image[place.y : place.y + side, place.x : place.x + side]
            batch = to_tensor(tile[None], device=model.device)
            self._kept[place] = model.tile_features(batch, [place], self.seed)
        return self._kept[place]


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


def _maps(segmenter: Segmenter, features: Features) -> Tensor:
    """(outputs [+ 1], h, w) probabilities, and the uncertainty where the head gives one."""
    probabilities, uncertainty = segmenter.judge(features)
    if uncertainty is None:
        return probabilities[0].cpu()
    return torch.cat((probabilities[0], uncertainty)).cpu()
