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
from wsiseg.models.fused import channels_last, kernels, spread

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
        stacked = []
        for numbers, _ in self.groups:
            maps = [features[i] for i in numbers]
            b, r, k = maps[0].shape[:3]
            stacked.append(torch.cat([m.flatten(0, 2) for m in maps], dim=1))
        weights = [
            torch.cat([self.conv.weight[:, first:last] for first, last in runs], dim=1)
            for _, runs in self.groups
        ]
        total = self._at_once(stacked, weights, (b, r, k))
        if total is None:
            total = self._place_by_place(stacked, weights, (b, r, k))
        assert self.conv.bias is not None
        return total + self.conv.bias.view(1, -1, 1, 1).to(total.dtype)

    def _place_by_place(
        self, stacked: Sequence[Tensor], weights: Sequence[Tensor], layout: tuple[int, int, int]
    ) -> Tensor:
        """The sum over the nine kernel places of projections, upsampled, laid out and shifted."""
        total: Tensor | None = None
        for dy in range(3):
            for dx in range(3):
                places = [w[:, :, dy, dx, None, None].contiguous() for w in weights]
                projected = self._project(stacked, places)
                laid = lay_out(torch.unflatten(projected, 0, layout))
                height, width = laid.shape[-2:]
                padded = nnf.pad(laid, (1, 1, 1, 1))
                part = padded[..., dy : dy + height, dx : dx + width]
                total = part if total is None else total + part
        assert total is not None
        return total

    def _at_once(
        self, stacked: Sequence[Tensor], weights: Sequence[Tensor], layout: tuple[int, int, int]
    ) -> Tensor | None:
        """The same in one pass a resolution, where there are kernels for it, else None.

        Maps that need no upsampling are convolved as they are.
        """
        if kernels(stacked[0]) is None:
            return None
        b, r, k = layout
        width, side = self.config.widths[0], self.side_px
        total: Tensor | None = None
        rest = []
        for maps, weight in zip(stacked, weights, strict=True):
            if maps.shape[-1] == side and total is None:
                rows = torch.unflatten(maps.permute(0, 2, 3, 1), 0, layout)
                laid = rows.transpose(2, 3).reshape(b, r * side, k * side, -1).permute(0, 3, 1, 2)
                total = channels_last(nnf.conv2d(laid, weight.to(maps.dtype), padding=1))
            else:
                rest.append((maps, weight))
        if total is None:
            zeros = stacked[0].new_zeros(b, r * side, k * side, width)
            total = zeros.permute(0, 3, 1, 2)
        for maps, weight in rest:
            rows = maps.permute(0, 2, 3, 1).contiguous()
            places = weight.permute(2, 3, 0, 1).flatten(0, 2).to(maps.dtype)
            spread(nnf.linear(rows, places), total, tile_rows=r, tile_columns=k)
        return total

    def _project(self, stacked: Sequence[Tensor], places: Sequence[Tensor]) -> Tensor:
        """Sum of the upsampled 1x1 projections of one kernel place, a tile each."""
        total: Tensor | None = None
        for maps, kernel in zip(stacked, places, strict=True):
            part = nnf.conv2d(maps, kernel.to(maps.dtype))
            if part.shape[-1] != self.side_px:
                part = nnf.interpolate(
                    part, size=(self.side_px, self.side_px), mode="bilinear", align_corners=False
                )
            total = part if total is None else total + part
        assert total is not None
        return total

    def _group_by_stride(self) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """(map numbers, runs of input channels of the first convolution) by native resolution."""
        start = 0
        groups: dict[int, tuple[list[int], list[tuple[int, int]]]] = {}
        for i, spec in enumerate(self.specs):
            maps, runs = groups.setdefault(spec.stride, ([], []))
            maps.append(i)
            runs.append((start, start + spec.channels))
            start += spec.channels
        return list(groups.values())
