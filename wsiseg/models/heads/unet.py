"""A U-Net's decoder: upsample by 2, join the skip, two convolutions, up to the stride wanted.

Source: Ronneberger et al., U-Net (MICCAI 2015), with the usual changes of a Res-UNet: padded
convolutions, batch norm, nearest upsampling, widths 256 to 16. Knows no extractor, only strides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from wsiseg.errors import ConfigError
from wsiseg.models.base import Features, FeatureSpec, Head, lay_out


@dataclass(frozen=True)
class UNetHeadConfig:
    """Configuration of the U-Net decoder."""

    widths: tuple[int, ...] = (256, 128, 64, 32, 16)
    """Channels after each upsampling, coarse to fine. As many as the coarsest map has halvings end
    at full resolution; with fewer, the logits of the last stride are interpolated to it."""

    def __post_init__(self) -> None:
        if not self.widths or min(self.widths) < 1:
            raise ConfigError(f"head unet: widths {list(self.widths)} must be positive numbers")


class UNetHead(Head):
    """Logits at window resolution from maps whose strides are powers of two.

    Maps of one stride are concatenated; a stride without a map has no skip. All maps are laid out
    before the first convolution, so no seam is inside a window.
    """

    def __init__(
        self, specs: Sequence[FeatureSpec], class_count: int, config: UNetHeadConfig
    ) -> None:
        super().__init__()
        self.config = config
        self.class_count = class_count
        channels: dict[int, int] = {}
        self.maps: dict[int, list[int]] = {}
        for i, spec in enumerate(specs):
            channels[spec.stride] = channels.get(spec.stride, 0) + spec.channels
            self.maps.setdefault(spec.stride, []).append(i)
        self.coarsest = max(channels)
        if any(s < 1 or s & (s - 1) for s in channels):
            raise ConfigError(f"head unet: strides {sorted(channels)} must be powers of two")
        count = len(config.widths)
        self.finest = self.coarsest >> count
        if self.finest < 1:
            raise ConfigError(
                f"head unet: {count} widths where the coarsest stride, {self.coarsest}, "
                f"has {self.coarsest.bit_length() - 1} halvings"
            )
        if min(channels) < self.finest:
            raise ConfigError(
                f"head unet: {count} widths end at stride {self.finest} and would leave the maps "
                f"of stride {min(channels)} unread; give more widths or coarser maps"
            )
        before = [channels[self.coarsest], *config.widths[:-1]]
        strides = [self.coarsest >> (i + 1) for i in range(count)]
        self.blocks = nn.ModuleList(
            _double_convolution(incoming + channels.get(stride, 0), width)
            for incoming, stride, width in zip(before, strides, config.widths, strict=True)
        )
        self.classifier = nn.Conv2d(config.widths[-1], class_count, 3, padding=1)

    def forward(self, features: Features) -> Tensor:
        """(B, classes, R * tile, K * tile) logits; see the class of the contract."""
        stride = self.coarsest
        x = self._laid(features, stride)
        for block in self.blocks:
            stride //= 2
            x = nnf.interpolate(x, scale_factor=2, mode="nearest")
            if stride in self.maps:
                x = torch.cat((x, self._laid(features, stride)), dim=1)
            x = block(x)
        logits: Tensor = self.classifier(x)
        if stride > 1:
            logits = nnf.interpolate(logits, scale_factor=stride, mode="bilinear")
        return logits

    def _laid(self, features: Features, stride: int) -> Tensor:
        """The window's maps of a stride, (B, channels, R * h, K * w)."""
        return torch.cat([lay_out(features[i]) for i in self.maps[stride]], dim=1)


def _double_convolution(incoming: int, width: int) -> nn.Sequential:
    """Twice a 3x3 convolution, batch norm and ReLU."""
    layers: list[nn.Module] = []
    for channels in (incoming, width):
        layers += [
            nn.Conv2d(channels, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
        ]
    return nn.Sequential(*layers)
