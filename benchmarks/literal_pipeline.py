"""A plain pipeline as the paper describes it, kept as the reference for speed and labels.

Source: PathSegDiff (arXiv:2504.06950), section 3. Every window is read and computed by itself, its
tiles in one batch; all maps of a tile are brought bilinearly to a quarter of the window's
resolution and concatenated to one tensor of all channels; a plain convolution of those begins the
FCN; the probabilities are summed with their weights over the whole slide. Shares nothing between
windows and rewrites nothing. Weights, places and noise are those of the segmenter.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as nnf

from wsiseg.errors import UsageError
from wsiseg.geometry import Box, Grid, Point
from wsiseg.inference.blend import window_weight
from wsiseg.inference.plan import axis_places
from wsiseg.models.base import Features, lay_out, to_tensor
from wsiseg.models.heads.fcn import FCN
from wsiseg.models.segmenter import Segmenter

TIE = 1e-4
"""Classes whose probabilities are this close count as equal: sums are rounded in another order."""


class Readable(Protocol):
    """A slide, as far as this pipeline goes."""

    def grid(self, mpp: float) -> Grid:
        """Its pixels at `mpp` micrometres per pixel."""

    def read(self, box: Box, grid: Grid) -> npt.NDArray[np.uint8]:
        """(h, w, 3) uint8 RGB of a box, white outside."""


class Blended(NamedTuple):
    """Probabilities (C, H, W) float32 and labels (H, W) uint8, 1..C."""

    probabilities: npt.NDArray[np.float32]
    labels: npt.NDArray[np.uint8]


def concatenated(head: FCN, features: Features) -> Tensor:
    """(B, all channels, R * side, K * side): every map brought to the FCN's input, side by side."""
    b, r, k = features[0].shape[:3]
    side = (head.side_px, head.side_px)
    maps = []
    for feature in features:
        tiles = feature.flatten(0, 2)
        if tiles.shape[-2:] != side:
            tiles = nnf.interpolate(tiles, size=side, mode="bilinear", align_corners=False)
        maps.append(lay_out(torch.unflatten(tiles, 0, (b, r, k))))
    return torch.cat(maps, dim=1)


def first_convolution(head: FCN, features: Features) -> Tensor:
    """The plain 3x3 convolution over all channels."""
    result: Tensor = head.conv(concatenated(head, features))
    return result


def logits(head: FCN, features: Features) -> Tensor:
    """(B, classes, R * tile, K * tile) logits of the FCN, layer by layer."""
    x = nnf.relu(head.norm(first_convolution(head, features)))
    x = nnf.relu(head.norm1(head.up1(x)))
    x = nnf.relu(head.norm2(head.up2(x)))
    result: Tensor = head.classifier(x)
    return result


def predict(slide: Readable, segmenter: Segmenter, *, overlap_px: int, seed: int = 0) -> Blended:
    """All of a slide, window by window.

    Raises:
        UsageError: a model whose head is not the FCN.
    """
    head, info = plain_head(segmenter), segmenter.info
    grid = slide.grid(info.mpp)
    width, height = grid.size
    side = info.window_px
    weight = window_weight(side)
    total = np.zeros((len(info.classes), height, width), np.float32)
    weights = np.zeros((height, width), np.float32)
    for y in axis_places(height, side, side - overlap_px):
        for x in axis_places(width, side, side - overlap_px):
            pixels = slide.read(Box(x, y, side, side), grid)
            values = _window(segmenter, head, pixels, Point(x, y), seed)
            inside = Box(x, y, side, side).intersection(grid.box)
            part = (slice(inside.height), slice(inside.width))
            total[:, *inside.slices] += values[:, *part] * weight[part]
            weights[inside.slices] += weight[part]
    total /= weights
    return Blended(total, total.argmax(axis=0).astype(np.uint8) + np.uint8(1))


def plain_head(segmenter: Segmenter) -> FCN:
    """The head of a segmenter, which must be the FCN."""
    if not isinstance(segmenter.head, FCN):
        raise UsageError(f"model {segmenter.info.name}: its head is not the FCN of the paper")
    return segmenter.head


def _window(
    segmenter: Segmenter, head: FCN, pixels: npt.NDArray[np.uint8], place: Point, seed: int
) -> npt.NDArray[np.float32]:
    """(C, window, window) probabilities of one window."""
    with torch.inference_mode():
        images = to_tensor([pixels], device=segmenter.device)
        features = segmenter.features(images, [place], seed)
        values = segmenter.to_probabilities(logits(head, features))
    result: npt.NDArray[np.float32] = values[0].float().cpu().numpy()
    return result


def unlike(labels: npt.NDArray[np.uint8], probabilities: npt.NDArray[np.float32]) -> int:
    """How many labels are not those of the probabilities, ties (within TIE) left out.

    Pixels that were not analysed (0), and probabilities that are no numbers, are unlike.

    Args:
        labels: (H, W) 1..C.
        probabilities: (C, H, W).
    """
    chosen = np.take_along_axis(probabilities, labels[None].astype(np.int64) - 1, axis=0)[0]
    right = (labels > 0) & (chosen >= probabilities.max(axis=0) - TIE)
    return int((~right).sum())
