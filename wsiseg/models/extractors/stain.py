"""Haematoxylin density by colour deconvolution: an extractor without weights. Sanity baseline.

Source: Ruifrok and Johnston, Quantification of histochemical staining by color deconvolution,
Anal Quant Cytol Histol 23 (2001), table of stain vectors (haematoxylin, eosin, DAB).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as nnf

from wsiseg.errors import ConfigError
from wsiseg.geometry import Point
from wsiseg.models.base import FeatureExtractor, Features, FeatureSpec

STAINS = ((0.650, 0.704, 0.286), (0.072, 0.990, 0.105), (0.268, 0.570, 0.776))


@dataclass(frozen=True)
class StainConfig:
    """Configuration of the stain extractor."""

    tile_px: int = 256
    """Side of a tile in pixels."""
    smooth_px: int = 9
    """Side of the box over which the density is averaged inside a tile; odd."""

    def __post_init__(self) -> None:
        if self.tile_px < 1 or self.smooth_px % 2 == 0 or not 1 <= self.smooth_px <= self.tile_px:
            raise ConfigError(f"smooth_px {self.smooth_px}: must be odd and no more than tile_px")


class StainExtractor(FeatureExtractor):
    """One map: the haematoxylin optical density, averaged over a small box."""

    def __init__(self, config: StainConfig) -> None:
        super().__init__()
        self.config = config
        self.tile_px = config.tile_px
        self.specs = (FeatureSpec(1, 1),)
        matrix = nnf.normalize(torch.tensor(STAINS), dim=1)
        self.register_buffer("unmix", torch.linalg.inv(matrix)[:, 0].contiguous())
        self.unmix: Tensor

    def forward(self, images: Tensor, places: Sequence[Point], seed: int) -> Features:
        """(B, 1, H, W) densities of (B, 3, H, W) tiles; places and seed take no part."""
        transmitted = ((images.float() + 1.0) * 127.5 + 1.0) / 256.0
        density = -torch.log10(transmitted.clamp(min=1.0 / 256.0))
        haematoxylin = torch.einsum("bchw,c->bhw", density, self.unmix.float()).unsqueeze(1)
        k = self.config.smooth_px
        smooth = nnf.avg_pool2d(haematoxylin, k, stride=1, padding=k // 2, count_include_pad=False)
        return (smooth,)
