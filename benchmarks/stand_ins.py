"""Models that only cost time: random weights of real shapes, and one that costs nothing."""

from __future__ import annotations

from collections.abc import Sequence

import click
import torch
import torch.nn.functional as F
from stand_in_classes import CLASSES
from torch import Tensor, nn

from wsiseg.geometry import Point
from wsiseg.models.base import FeatureExtractor, Features, FeatureSpec, Head, lay_out
from wsiseg.models.checkpoint import load_model
from wsiseg.models.registry import ModelConfig, build_segmenter
from wsiseg.models.segmenter import ModelInfo, Segmenter

FULL = {"name": "pathsegdiff"}
"""The configuration's defaults: the full-size network."""
SMALL = {
    "name": "pathsegdiff",
    "encoder": {"dim": 48, "depth": 6, "heads": 3},
    "first_stage": {"channels": [16, 32, 64], "groups": 8, "codes": 64},
    "unet": {"channels": [24, 48, 72, 120], "context_dim": 64, "groups": 8},
    "region_dim": 0,
    "tile_px": 128,
}
"""The same with an eighth of the channels and half the side of the tiles."""

model_option = click.option(
    "--model",
    default="small",
    show_default=True,
    help="small or full (random weights), a name as of wsiseg predict, or a file.",
)
device_option = click.option(
    "--device", default="cpu", show_default=True, help="Where to compute: cpu or cuda."
)


def stand_in(model: str, device: str = "cpu") -> Segmenter:
    """The model of a name; "small" and "full" have random weights, the same at every call.

    Raises:
        ModelError: no such model.
    """
    if model not in ("small", "full"):
        return load_model(model, device=device).eval()
    torch.manual_seed(0)
    small = model == "small"
    config = ModelConfig(
        extractor=SMALL if small else FULL,
        head={"name": "fcn", **({"widths": [32, 16, 8]} if small else {})},
        classes=CLASSES,
        window_px=384 if small else 768,
    )
    segmenter = build_segmenter(config, info={"name": f"random, {model}", "licence": "none"})
    getattr(segmenter.extractor, "drop_decoder")()  # noqa: B009
    spread(segmenter)
    return segmenter.to(device).eval()


def spread(segmenter: Segmenter) -> None:
    """Scale the last layer so that random weights do not leave all classes nearly equal."""
    classifier = getattr(segmenter.head, "classifier", None)
    if isinstance(classifier, nn.Conv2d):
        classifier.weight.data.mul_(20.0)


BALLAST_MAPS = 13
"""Maps of the full-size network."""


class Pixels(FeatureExtractor):
    """The pixels or means of blocks, and ballast: zeros that take memory and no arithmetic."""

    def __init__(self, tile_px: int, ballast: int, block_px: int = 1) -> None:
        super().__init__()
        self.tile_px, self.block_px = tile_px, block_px
        part = -(-ballast // BALLAST_MAPS)
        self.specs = (FeatureSpec(3, 1), *[FeatureSpec(part, 4)] * (BALLAST_MAPS if part else 0))

    def forward(self, images: Tensor, places: Sequence[Point], seed: int) -> Features:
        """(B, 3, tile, tile) pixels, and maps (B, n, tile / 4, tile / 4) of zeros."""
        side = self.tile_px // 4
        if self.block_px > 1:
            means = F.avg_pool2d(images, self.block_px)
            images = F.interpolate(means, scale_factor=self.block_px, mode="nearest")
        return (
            images,
            *(images.new_zeros(len(images), s.channels, side, side) for s in self.specs[1:]),
        )


class Pointwise(Head):
    """A 1x1 convolution of the pixels."""

    def __init__(self, class_count: int) -> None:
        super().__init__()
        self.class_count = class_count
        self.classifier = nn.Conv2d(3, class_count, 1)

    def forward(self, features: Features) -> Tensor:
        """(B, classes, R * tile, K * tile) logits; every map is asked for, as of other heads."""
        for ballast in features[1:]:
            assert len(ballast)
        logits: Tensor = self.classifier(lay_out(features[0]))
        return logits


def trivial_model(
    *,
    window_px: int = 768,
    tile_px: int = 256,
    mpp: float = 0.5,
    feature_mib: float = 0,
    block_px: int = 1,
) -> Segmenter:
    """A model of six classes that is one 1x1 convolution of the pixels.

    Args:
        window_px: side of a window.
        tile_px: side of a tile.
        mpp: micrometres per pixel.
        feature_mib: memory that a tile's features take beside the pixels, in MiB at float32.
        block_px: side of the blocks of pixels whose mean is taken instead of them.
    """
    torch.manual_seed(0)
    ballast = round(feature_mib * (1 << 20) / 4 / (tile_px // 4) ** 2)
    info = ModelInfo("1x1 convolution", "0" * 64, CLASSES, mpp, window_px, tile_px, licence="none")
    segmenter = Segmenter(Pixels(tile_px, ballast, block_px), Pointwise(len(CLASSES)), info)
    spread(segmenter)
    return segmenter.eval()
