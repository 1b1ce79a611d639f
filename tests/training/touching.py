"""A labelled data set of two squares that touch, and patches of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from wsiseg.classes import IGNORE, Classes, TissueClass
from wsiseg.config import from_mapping
from wsiseg.datasets.augment import AugmentConfig
from wsiseg.datasets.base import LabelledDataset, LabelledImage
from wsiseg.training.background import Background
from wsiseg.training.patches import ImageStore, Patches, to_resolution
from wsiseg.training.train import TrainConfig

CNN = {"name": "cnn", "channels": [8, 8, 8, 8], "tile_px": 32}
CLASSES = Classes((TissueClass("a", (0, 0, 0), background=True), TissueClass("b", (1, 1, 1))))


class Touching(LabelledDataset):
    """Images with two squares side by side, dark, and ignored pixels at the right edge."""

    classes = CLASSES
    mpp = 0.5
    names = groups = ("0", "1", "2", "3")
    with_instances = True

    def __getitem__(self, index: int) -> LabelledImage:
        instances = np.zeros((64, 96), np.int32)
        instances[16:48, 8:40], instances[16:48, 40:72] = 1, 5
        mask = (instances > 0).astype(np.uint8)
        mask[:, 90:] = IGNORE
        image = np.where(mask[..., None] == 1, 60, 220).repeat(3, axis=2).astype(np.uint8)
        kept = instances if self.with_instances else None
        return LabelledImage(str(index), image, mask, str(index), kept)


def config(**changes: Any) -> TrainConfig:
    loop = {"steps": 3, "batch_size": 2, "learning_rate": 0.01, "warmup_steps": 1}
    data = {"head": {"name": "unet", "widths": [8, 8, 8, 8, 8]}, "mpp": 1.0, "window_px": 32}
    data |= {"extractor": CNN, "trainable": "all", "patch_tiles": [1, 1]}
    return from_mapping(TrainConfig, {**data, "validation_share": 0, "loop": loop, **changes})


def store(data: LabelledDataset, border_px: float = 3.0) -> ImageStore:
    return ImageStore(
        data,
        lambda i, m: to_resolution(i, m, ratio=1.0, resize_px=None),
        limit_bytes=1 << 20,
        border_px=border_px,
    )


def sequence(
    data: LabelledDataset, background: Background | None = None, *, border_px: float = 3.0
) -> Patches:
    still = AugmentConfig(scale=(1.0, 1.0), rotate=False)
    return Patches(
        store(data, border_px),
        range(4),
        size_px=(64, 64),
        augment=still,
        seed=0,
        background=background,
    )


def grey_images(folder: Path) -> Path:
    folder.mkdir()
    for k in range(3):
        Image.new("RGB", (80, 80), (7, 7, 7)).save(folder / f"{k}.png")
    return folder


def stored(folder: Path) -> Touching:
    data = Touching()
    data.folder = folder
    return data
