"""Small models of every kind for the tests; more than one tile a window, all 13 taps."""

from __future__ import annotations

from typing import Any

import torch

from wsiseg.models.base import FeatureExtractor
from wsiseg.models.registry import ModelConfig, build_extractor, build_segmenter
from wsiseg.models.segmenter import Segmenter

CLASSES = [
    {"name": "Other tissue", "color": [200, 200, 200], "background": True},
    {"name": "Gland", "color": [200, 0, 0]},
]
PATHSEGDIFF: dict[str, Any] = {
    "name": "pathsegdiff",
    "encoder": {"dim": 64, "depth": 1, "heads": 1, "position_px": 64},
    "first_stage": {"channels": [32, 32], "layers": 1, "codes": 16},
    "unet": {"channels": [32, 32, 64, 64], "context_dim": 24},
    "region_dim": 16,
    "tile_px": 32,
}
KL = {"kind": "kl", "channels": [32, 32], "layers": 1, "latent_channels": 4, "scale": 0.2}
EXTRACTORS: dict[str, dict[str, Any]] = {
    "pathsegdiff": PATHSEGDIFF,
    "pathsegdiff, KL": {**PATHSEGDIFF, "first_stage": KL},
    "pathsegdiff, null": {**PATHSEGDIFF, "conditioning": "null"},
    "pathsegdiff, steps and taps": {**PATHSEGDIFF, "timesteps": [5, 900], "taps": [0, 3, 12]},
    "pathsegdiff, one token": {**PATHSEGDIFF, "region_dim": 0},
    "stain": {"name": "stain", "tile_px": 32},
}
HEADS: dict[str, dict[str, Any]] = {
    "fcn": {"name": "fcn", "widths": [8, 8, 8]},
    "threshold": {"name": "threshold"},
}


def tiny_extractor(key: str = "pathsegdiff", seed: int = 0) -> FeatureExtractor:
    """An extractor with random weights, the same for the same seed."""
    torch.manual_seed(seed)
    return build_extractor(EXTRACTORS[key]).eval().requires_grad_(False)


def tiny_model(
    extractor: str = "pathsegdiff", head: str = "fcn", *, classes: Any = CLASSES, seed: int = 0
) -> Segmenter:
    """A segmenter with random weights and windows of 3 x 3 tiles."""
    torch.manual_seed(seed)
    config = ModelConfig(
        extractor=EXTRACTORS[extractor], head=HEADS[head], classes=classes, window_px=96
    )
    return build_segmenter(config).eval()
