"""PathSegDiff's FCN: one convolution over all feature maps, two x2 upsamplings, a classifier.

Source: PathSegDiff (arXiv:2504.06950), section 3.3 and Table 1 (17,470,150 parameters for 7,296
input channels and 6 classes settle widths and kernels). The maps are brought to a quarter of the
window's resolution (64 x 64 a tile), bilinearly and tile by tile.

The first convolution over the upsampled, concatenated maps would hold 1 GB a window. It is
computed exactly, without that tensor: a 3x3 convolution is the sum of nine shifted 1x1
projections; a 1x1 projection commutes with bilinear upsampling; so each of the nine is done at
the maps' native resolution, upsampled tile by tile, laid out, shifted with zero fill and added.
Knows no extractor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from wsiseg.errors import ConfigError
from wsiseg.models.base import Features, FeatureSpec, Head, lay_out

STRIDE = 4
"""Window pixels per pixel of the FCN's input."""


@dataclass(frozen=True)
class FCNConfig:
    """Configuration of the FCN."""

    widths: tuple[int, int, int] = (256, 128, 64)
    """Channels after the first convolution and the two upsamplings."""

    def __post_init__(self) -> None:
        if min(self.widths) < 1:
            raise ConfigError(f"head fcn: widths {list(self.widths)} must be positive numbers")


class FCN(Head):
    """Logits at window resolution from the tile features of a window."""

    def __init__(
        self, specs: Sequence[FeatureSpec], class_count: int, config: FCNConfig, *, tile_px: int
    ) -> None:
        super().__init__()
        if tile_px % STRIDE:
            raise ConfigError(f"tile_px {tile_px}: must be a multiple of {STRIDE}")
        self.config = config
        self.class_count = class_count
        self.specs = tuple(specs)
        self.side_px = tile_px // STRIDE
        first, second, third = config.widths
        self.conv = nn.Conv2d(sum(s.channels for s in specs), first, 3, padding=1)
        self.norm = nn.BatchNorm2d(first)
        self.up1 = nn.ConvTranspose2d(first, second, 4, stride=2, padding=1)
        self.norm1 = nn.BatchNorm2d(second)
        self.up2 = nn.ConvTranspose2d(second, third, 4, stride=2, padding=1)
        self.norm2 = nn.BatchNorm2d(third)
        self.classifier = nn.Conv2d(third, class_count, 3, padding=1)
        self.groups = self._group_by_stride()

    def forward(self, features: Features) -> Tensor:
        """(B, classes, R * tile, K * tile) logits; see the class of the contract."""
        x = nnf.relu(self.norm(self.first_convolution(features)))
        x = nnf.relu(self.norm1(self.up1(x)))
        x = nnf.relu(self.norm2(self.up2(x)))
        logits: Tensor = self.classifier(x)
        return logits

    def first_convolution(self, features: Features) -> Tensor:
        """The 3x3 convolution over all maps, exactly, at their native resolutions.

        Returns:
            (B, widths[0], R * side, K * side), side = tile_px / 4.
        """
        b, r, k = features[0].shape[:3]
        total: Tensor | None = None
        stacked = [
            torch.cat([features[i].flatten(0, 2) for i in maps], dim=1) for maps, _ in self.groups
        ]
        for dy in range(3):
            for dx in range(3):
                laid = lay_out(torch.unflatten(self._project(stacked, dy, dx), 0, (b, r, k)))
                height, width = laid.shape[-2:]
                padded = nnf.pad(laid, (1, 1, 1, 1))
                part = padded[..., dy : dy + height, dx : dx + width]
                total = part if total is None else total + part
        assert total is not None
        assert self.conv.bias is not None
        return total + self.conv.bias.view(1, -1, 1, 1).to(total.dtype)

    def _project(self, stacked: Sequence[Tensor], dy: int, dx: int) -> Tensor:
        """Sum of the upsampled 1x1 projections of one kernel place, a tile each."""
        total: Tensor | None = None
        for maps, (_, columns) in zip(stacked, self.groups, strict=True):
            kernel = self.conv.weight[:, columns, dy, dx, None, None]
            part = nnf.conv2d(maps, kernel.to(maps.dtype))
            if part.shape[-1] != self.side_px:
                part = nnf.interpolate(
                    part, size=(self.side_px, self.side_px), mode="bilinear", align_corners=False
                )
            total = part if total is None else total + part
        assert total is not None
        return total

    def _group_by_stride(self) -> list[tuple[list[int], list[int]]]:
        """(map numbers, input channels of the first convolution) for each native resolution."""
        starts = [0]
        for spec in self.specs:
            starts.append(starts[-1] + spec.channels)
        groups: dict[int, tuple[list[int], list[int]]] = {}
        for i, spec in enumerate(self.specs):
            maps, columns = groups.setdefault(spec.stride, ([], []))
            maps.append(i)
            columns.extend(range(starts[i], starts[i + 1]))
        return list(groups.values())
