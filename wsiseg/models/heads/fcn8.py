"""FCN-8s: class scores at strides 32, 16 and 8, each upsampled onto the next, then by 8.

Source: Long, Shelhamer and Darrell, Fully Convolutional Networks for Semantic Segmentation (CVPR
2015), section 4. With VGG-16's fc6 and fc7 as convolutions, padded so that sizes stay whole. The
paper starts its score layers at zero, on a pretrained network; here they start at random, so that
training from scratch works too. Knows no extractor, only strides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from wsiseg.errors import ConfigError
from wsiseg.models.base import Features, FeatureSpec, Head, lay_out

STRIDES = (8, 16, 32)


@dataclass(frozen=True)
class FCN8Config:
    """Configuration of FCN-8s."""

    fc_width: int = 4096
    """Channels of fc6 (7x7) and fc7 (1x1) at stride 32; 0 = the score straight from the map."""
    dropout: float = 0.5
    """Share of the channels' values that is dropped after fc6 and fc7 in training."""

    def __post_init__(self) -> None:
        if self.fc_width < 0 or not 0 <= self.dropout < 1:
            raise ConfigError("head fcn8: fc_width must be at least 0, dropout from 0 to below 1")


class FCN8Head(Head):
    """Logits at window resolution from one map each of strides 8, 16 and 32.

    The two upsamplings by 2 are transposed convolutions that start as bilinear interpolation and
    are learned; the last, by 8, stays bilinear, as in the paper.
    """

    def __init__(self, specs: Sequence[FeatureSpec], class_count: int, config: FCN8Config) -> None:
        super().__init__()
        strides = [s.stride for s in specs]
        if sorted(strides) != list(STRIDES):
            raise ConfigError(
                f"head fcn8: needs one map each of strides 8, 16 and 32, not {strides}; "
                "set extractor.strides to [8, 16, 32]"
            )
        self.config = config
        self.class_count = class_count
        self.order = [strides.index(s) for s in STRIDES]
        pool3, pool4, pool5 = (specs[i].channels for i in self.order)
        width = config.fc_width
        self.fc = _fully_connected(pool5, config) if width else nn.Identity()
        self.score32 = nn.Conv2d(width or pool5, class_count, 1)
        self.score16 = nn.Conv2d(pool4, class_count, 1)
        self.score8 = nn.Conv2d(pool3, class_count, 1)
        self.up32 = bilinear_upsampling(class_count)
        self.up16 = bilinear_upsampling(class_count)

    def forward(self, features: Features) -> Tensor:
        """(B, classes, R * tile, K * tile) logits; see the class of the contract."""
        pool3, pool4, pool5 = (lay_out(features[i]) for i in self.order)
        scores = self.up32(self.score32(self.fc(pool5))) + self.score16(pool4)
        scores = self.up16(scores) + self.score8(pool3)
        return nnf.interpolate(scores, scale_factor=8, mode="bilinear", align_corners=False)


def _fully_connected(incoming: int, config: FCN8Config) -> nn.Sequential:
    """VGG-16's fc6 and fc7 as convolutions, with their dropout."""
    width = config.fc_width
    return nn.Sequential(
        nn.Conv2d(incoming, width, 7, padding=3),
        nn.ReLU(inplace=True),
        nn.Dropout(config.dropout),
        nn.Conv2d(width, width, 1),
        nn.ReLU(inplace=True),
        nn.Dropout(config.dropout),
    )


def bilinear_upsampling(channels: int) -> nn.ConvTranspose2d:
    """A learnable upsampling by 2, full between channels, that starts as bilinear interpolation."""
    layer = nn.ConvTranspose2d(channels, channels, 4, stride=2, padding=1, bias=False)
    line = torch.tensor([0.25, 0.75, 0.75, 0.25])
    kernel = torch.eye(channels)[:, :, None, None] * torch.outer(line, line)
    with torch.no_grad():
        layer.weight.copy_(kernel)
    return layer
