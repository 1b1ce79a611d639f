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
GENSELFDIFF: dict[str, Any] = {
    "name": "genselfdiff",
    "dim": 8,
    "mults": [1, 2],
    "groups": 4,
    "tile_px": 32,
}
DDPM: dict[str, Any] = {
    "name": "ddpm",
    "channels": [8, 16, 16],
    "layers": 1,
    "attention": [4],
    "head_channels": 8,
    "groups": 4,
    "timesteps": [50, 250],
    "taps": [1, 2, 4],
    "tile_px": 32,
}
EXTRACTORS: dict[str, dict[str, Any]] = {
    "pathsegdiff": PATHSEGDIFF,
    "pathsegdiff, KL": {**PATHSEGDIFF, "first_stage": KL},
    "pathsegdiff, null": {**PATHSEGDIFF, "conditioning": "null"},
    "pathsegdiff, steps and taps": {**PATHSEGDIFF, "timesteps": [5, 900], "taps": [0, 3, 12]},
    "pathsegdiff, details": {
        **PATHSEGDIFF,
        "first_stage": {**KL, "attention": False},
        "taps": [0, 12],
        "details": [1],
    },
    "pathsegdiff, one token": {**PATHSEGDIFF, "region_dim": 0},
    "stain": {"name": "stain", "tile_px": 32},
    "genselfdiff": GENSELFDIFF,
    "ddpm": DDPM,
    "ddpm, own noise": {**DDPM, "shared_noise": False, "timesteps": [5]},
    "cnn": {"name": "cnn", "channels": [8, 8, 16, 16], "tile_px": 32},
    "cnn, VGG": {
        "name": "cnn",
        "arch": "vgg16_bn",
        "channels": [4, 4, 8, 8, 8],
        "strides": [8, 16, 32],
        "pooled": True,
        "tile_px": 32,
    },
    "hipt": {"name": "hipt", "encoder": PATHSEGDIFF["encoder"], "tile_px": 32},
}
HEADS: dict[str, dict[str, Any]] = {
    "fcn": {"name": "fcn", "widths": [8, 8, 8]},
    "threshold": {"name": "threshold"},
    "pixel_mlp": {"name": "pixel_mlp", "members": 3, "widths": [8, 4]},
    "unet": {"name": "unet", "widths": [16, 8, 8, 8, 4]},
    "fcn8": {"name": "fcn8", "fc_width": 8},
    "linear": {"name": "linear"},
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
