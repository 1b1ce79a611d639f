"""Measuring a segmenter on labelled images, at the images' own resolution. Changes no weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as nnf

from wsiseg.classes import Classes
from wsiseg.datasets.base import LabelledDataset
from wsiseg.errors import ModelError
from wsiseg.geometry import Point
from wsiseg.models.base import to_tensor
from wsiseg.models.segmenter import Segmenter
from wsiseg.training.metrics import Matrix, confusion_matrix, pixel_metrics


@dataclass
class Evaluation:
    """What was measured.

    Attributes:
        pixel: metrics of the one pooled confusion matrix, see `pixel_metrics`.
        per_image: the same metrics of each image, by name, without the matrix.
    """

    pixel: dict[str, Any]
    per_image: dict[str, dict[str, float]]

    def summary(self) -> dict[str, Any]:
        """The pooled metrics and the means of the per-image ones, ready for JSON."""
        names = ("accuracy", "dice", "miou")
        means = {
            n: float(np.mean([row[n] for row in self.per_image.values()]))
            if self.per_image
            else 0.0
            for n in names
        }
        return {"pixel": self.pixel, "per_image": means, "images": len(self.per_image)}


def evaluate(
    segmenter: Segmenter,
    dataset: LabelledDataset,
    *,
    indices: Sequence[int] | None = None,
    seed: int = 0,
    tta: bool = False,
) -> Evaluation:
    """Compare predictions with the labels of a data set.

    Args:
        segmenter: a model with the classes of the data set.
        dataset: labelled images.
        indices: which images; default all.
        seed: seed of the noise.
        tta: average over the eight flips and quarter turns.

    Raises:
        ModelError: the classes differ from those of the data set.
    """
    check_classes(segmenter.info.classes, dataset.classes)
    count = len(dataset.classes)
    pooled: Matrix = np.zeros((count, count), np.int64)
    result = Evaluation({}, {})
    for index in range(len(dataset)) if indices is None else indices:
        item = dataset[index]
        ratio = dataset.mpp / segmenter.info.mpp
        probabilities = predict_image(segmenter, item.image, ratio=ratio, seed=seed, tta=tta)
        predicted = probabilities.argmax(0).astype(np.uint8)
        matrix = confusion_matrix(item.mask, predicted, count)
        pooled += matrix
        metrics = pixel_metrics(matrix, dataset.classes)
        result.per_image[item.name] = {n: metrics[n] for n in ("accuracy", "dice", "miou")}
    result.pixel = pixel_metrics(pooled, dataset.classes)
    return result


def check_classes(model: Classes, data: Classes) -> None:
    """Refuse a model whose class names are not the data set's.

    Raises:
        ModelError: they differ.
    """
    if model.names != data.names:
        raise ModelError(
            f"the model's classes ({', '.join(model.names)}) are not the data set's "
            f"({', '.join(data.names)})"
        )


def predict_image(
    segmenter: Segmenter,
    image: npt.NDArray[np.uint8],
    *,
    ratio: float,
    seed: int = 0,
    tta: bool = False,
) -> npt.NDArray[np.float32]:
    """(C, H, W) float32 probabilities of an image of any size, at its own resolution.

    The image is scaled to the model's resolution, mirrored up to whole tiles, run as one window,
    cut and scaled back bilinearly.

    Args:
        segmenter: the model.
        image: (H, W, 3) uint8 RGB.
        ratio: image mpp / model mpp.
        seed: seed of the noise; the place of the image is (0, 0).
        tta: average over the eight flips and quarter turns.
    """
    height, width = image.shape[:2]
    size = (max(1, round(width * ratio)), max(1, round(height * ratio)))
    how = Image.Resampling.BOX if ratio < 1 else Image.Resampling.BICUBIC
    small = np.asarray(Image.fromarray(image).resize(size, how))
    views = range(8) if tta else range(1)
    total = torch.stack([_one_view(segmenter, small, v, seed) for v in views]).mean(0)
    full = nnf.interpolate(total[None], size=(height, width), mode="bilinear", align_corners=False)
    return full[0].numpy()


def _one_view(segmenter: Segmenter, image: npt.NDArray[np.uint8], view: int, seed: int) -> Tensor:
    """(C, h, w) probabilities of an image seen flipped (view >= 4) and turned (view % 4)."""
    turned = np.rot90(image[:, ::-1] if view >= 4 else image, view % 4)
    tile = segmenter.info.tile_px
    pad = [(0, -s % tile) for s in turned.shape[:2]]
    padded = np.pad(turned, (*pad, (0, 0)), mode="symmetric")
    with torch.inference_mode():
        batch = to_tensor(padded[None]).to(segmenter.device)
        probabilities = segmenter.probabilities(batch, [Point(0, 0)], seed)[0].cpu()
    probabilities = probabilities[:, : turned.shape[0], : turned.shape[1]]
    probabilities = torch.rot90(probabilities, -(view % 4), (1, 2))
    return probabilities.flip(2) if view >= 4 else probabilities
