"""HIPT's patch tokens as a feature map: the "HIPT + FCN" baseline. Knows no diffusion, no heads.

Source: PathSegDiff (arXiv:2504.06950), baseline HIPT; Chen et al. (CVPR 2022) for the network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wsiseg.errors import ConfigError, ModelError
from wsiseg.geometry import Point
from wsiseg.models.base import FeatureExtractor, Features, FeatureSpec
from wsiseg.models.extractors.pathsegdiff import PathSegDiffExtractor
from wsiseg.models.extractors.vit import ViT, ViTConfig


@dataclass(frozen=True)
class HIPTConfig:
    """Configuration of the extractor; the defaults are HIPT's 256 px level."""

    encoder: ViTConfig = ViTConfig()
    """The vision transformer."""
    tile_px: int = 256
    """Side of a tile in pixels."""

    def __post_init__(self) -> None:
        if self.tile_px < 1 or self.tile_px % self.encoder.patch_px:
            raise ConfigError(
                f"tile_px {self.tile_px}: must be a multiple of patch_px {self.encoder.patch_px}"
            )


class HIPTExtractor(FeatureExtractor):
    """One map: the patch tokens after the last norm, in their places. The CLS token is left out."""

    def __init__(self, config: HIPTConfig) -> None:
        super().__init__()
        self.config = config
        self.tile_px = config.tile_px
        self.encoder = ViT(config.encoder)
        self.specs = (FeatureSpec(config.encoder.dim, config.encoder.patch_px),)

    def forward(self, images: Tensor, places: Sequence[Point], seed: int) -> Features:
        """(B, dim, tile / patch, tile / patch) tokens of tiles; places and seed take no part."""
        tokens = self.encoder.tokens(images)[:, 1:]
        rows, columns = (n // self.config.encoder.patch_px for n in images.shape[-2:])
        return (torch.unflatten(tokens.transpose(1, 2), 2, (rows, columns)),)


def from_pathsegdiff(extractor: FeatureExtractor) -> HIPTExtractor:
    """The encoder that guides a PathSegDiff extractor, as an extractor by itself.

    Args:
        extractor: a pathsegdiff extractor, as of `load_extractor`; its tensors are copied.

    Returns:
        A frozen extractor in evaluation mode on the same device.

    Raises:
        ModelError: an extractor of another kind.
    """
    if not isinstance(extractor, PathSegDiffExtractor):
        raise ModelError(
            f"{type(extractor).__name__}: holds no HIPT encoder; give a pathsegdiff extractor"
        )
    config = extractor.config
    found = HIPTExtractor(HIPTConfig(encoder=config.encoder, tile_px=config.tile_px))
    found.encoder.load_state_dict(extractor.encoder.state_dict())
    found.to(next(extractor.encoder.parameters()).device)
    found.requires_grad_(False)
    return found.eval()
