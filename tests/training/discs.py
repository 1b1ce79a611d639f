"""A data set of dark discs, and training runs of a tiny network on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from wsiseg.classes import Classes, TissueClass
from wsiseg.config import from_mapping
from wsiseg.datasets.base import LabelledDataset, LabelledImage
from wsiseg.models.base import FeatureExtractor
from wsiseg.models.registry import build_extractor
from wsiseg.training import loop
from wsiseg.training.train import TrainConfig, train

CNN = {
    "name": "cnn",
    "arch": "resnet18",
    "channels": [4, 4, 8, 8],
    "strides": [2, 4, 8],
    "tile_px": 32,
}
VIT = {
    "name": "hipt",
    "encoder": {"dim": 16, "depth": 1, "heads": 2, "patch_px": 16, "position_px": 32},
    "tile_px": 32,
}


class Discs(LabelledDataset):
    """Dark discs on a light ground, two images a patient."""

    classes = Classes(
        (TissueClass("ground", (200, 200, 200), background=True), TissueClass("disc", (90, 0, 90)))
    )
    mpp = 1.0

    def __init__(self, count: int = 8) -> None:
        self.names = tuple(f"image {i}" for i in range(count))
        self.groups = tuple(f"patient {i // 2}" for i in range(count))

    def __getitem__(self, index: int) -> LabelledImage:
        rng = np.random.default_rng(index)
        y, x = np.mgrid[:48, :40]
        disc = (y - rng.integers(14, 34)) ** 2 + (x - rng.integers(14, 26)) ** 2 < 120
        image = np.where(disc[..., None], (110, 60, 150), (230, 180, 205)) + rng.normal(
            0, 5, (48, 40, 3)
        )
        return LabelledImage(
            self.names[index],
            image.clip(0, 255).astype(np.uint8),
            disc.astype(np.uint8),
            self.groups[index],
            disc.astype(np.int32),
        )


def config(**changes: Any) -> TrainConfig:
    loop = {"steps": 6, "batch_size": 4, "learning_rate": 0.01, "warmup_steps": 1}
    loop |= {"log_every": 2, "save_every": 2}
    data = {
        "extractor": CNN,
        "head": {"name": "unet", "widths": [8, 8, 8]},
        "trainable": "all",
        "mpp": 1.0,
        "window_px": 32,
        "patch_tiles": [1, 1],
        "validation_share": 0.25,
        "validate_every": 2,
        "loop": {**loop, **changes.pop("loop", {})},
        **changes,
    }
    return from_mapping(TrainConfig, data)


def frozen(**changes: Any) -> TrainConfig:
    head = {"name": "fcn", "widths": [8, 8, 8]}
    return config(extractor=VIT, head=head, trainable="none", **changes)


def network(run: TrainConfig) -> FeatureExtractor:
    torch.manual_seed(run.seed)
    return build_extractor(run.extractor)


def fit(run: TrainConfig, out: Path, **options: Any) -> Path:
    return train(run, options.pop("data", Discs()), network(run), out=out, **options)


def same(a: Path, b: Path) -> bool:
    first, second = load_file(a), load_file(b)
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def interrupt(run: TrainConfig, out: Path, *, after: int) -> None:
    """Leave what a kill after step `after` would leave."""
    save = loop._save

    def stop(path: Path, task: Any, optimiser: Any, step: int, seconds: float) -> None:
        save(path, task, optimiser, step, seconds)
        if step == after:
            raise KeyboardInterrupt

    loop._save = stop
    try:
        with pytest.raises(KeyboardInterrupt):
            fit(run, out)
    finally:
        loop._save = save
