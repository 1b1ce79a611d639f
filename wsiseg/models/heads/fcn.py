"""PathSegDiff's FCN: one convolution over all feature maps, two x2 upsamplings, a classifier.

Source: PathSegDiff (arXiv:2504.06950), section 3.3 and Table 1 (17,470,150 parameters for 7,296
input channels and 6 classes settle widths and kernels). The maps are brought to a quarter of the
window's resolution (64 x 64 a tile), bilinearly and tile by tile.

The first convolution over the upsampled, concatenated maps would hold 1 GB a window. It is
computed exactly, without that tensor, map by map: a 3x3 convolution is the sum of nine shifted 1x1
projections; a 1x1 projection commutes with bilinear upsampling; so each of the nine is done at
the maps' native resolution. What is left, to upsample tile by tile, lay out, shift with zero fill
and add, is linear along each axis: a product with a matrix, and another. Maps that need no
upsampling are convolved as they are. Knows no extractor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

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
        if kernels(self.conv.weight) is None:
            parts = (self._resolution(features, *group) for group in self.groups)
            total = reduce(_added, parts)
        else:
            total = self._at_once(features)
        assert self.conv.bias is not None
        return total + self.conv.bias.view(1, -1, 1, 1).to(total.dtype)

    def _resolution(
        self, features: Features, numbers: Sequence[int], runs: Sequence[tuple[int, int]]
    ) -> Tensor:
        """What the maps of one native resolution add to the first convolution."""
        parts = (self._part(features[i], *run) for i, run in zip(numbers, runs, strict=True))
        total = reduce(_added, parts)
        return total if total.dim() == 4 else self._spread(total)

    def _part(self, maps: Tensor, first: int, last: int) -> Tensor:
        """What one map adds: (B, widths[0], R * side, K * side), or where it is still to be spread
        its projections for the nine places of the kernel, (B, R, K, 9 * widths[0], h, w)."""
        weight = self.conv.weight[:, first:last].to(maps.dtype)
        if maps.shape[-1] == self.side_px:
            return nnf.conv2d(lay_out(maps), weight, padding=1)
        places = weight.permute(2, 3, 0, 1).flatten(0, 2)
        return torch.unflatten(places @ maps.flatten(4), 4, maps.shape[-2:])

    def _spread(self, projected: Tensor) -> Tensor:
        """Upsample, lay out, shift and add the projections (B, R, K, 9 * widths[0], h, w)."""
        b, r, k, _, h, w = projected.shape
        parts = torch.unflatten(projected, 3, (3, 3, -1))
        # to (B, widths[0], dy, R, h, dx, K, w)
        rows = parts.permute(0, 5, 3, 1, 6, 4, 2, 7).reshape(b, -1, 3 * r * h, 3 * k * w)
        across = upsampling(w, self.side_px, k, like=rows)
        return upsampling(h, self.side_px, r, like=rows) @ (rows @ across.T)

    def _at_once(self, features: Features) -> Tensor:
        """The same in one pass a resolution, by kernels of our own."""
        b, r, k = features[0].shape[:3]
        width, side = self.config.widths[0], self.side_px
        total: Tensor | None = None
        rest = []
        for numbers, runs in self.groups:
            maps = torch.cat([features[i].flatten(0, 2) for i in numbers], dim=1)
            weight = torch.cat([self.conv.weight[:, first:last] for first, last in runs], dim=1)
            if maps.shape[-1] == side:
                rows = torch.unflatten(maps.permute(0, 2, 3, 1), 0, (b, r, k))
                laid = rows.transpose(2, 3).reshape(b, r * side, k * side, -1).permute(0, 3, 1, 2)
                total = channels_last(nnf.conv2d(laid, weight.to(maps.dtype), padding=1))
            else:
                rest.append((maps, weight))
        if total is None:
            zeros = features[0].new_zeros(b, r * side, k * side, width)
            total = zeros.permute(0, 3, 1, 2)
        for maps, weight in rest:
            rows = maps.permute(0, 2, 3, 1).contiguous()
            places = weight.permute(2, 3, 0, 1).flatten(0, 2).to(maps.dtype)
            spread(nnf.linear(rows, places), total, tile_rows=r, tile_columns=k)
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


def upsampling(low: int, high: int, count: int, *, like: Tensor) -> Tensor:
    """The matrix that upsamples `count` tiles bilinearly along an axis, each by itself, and adds
    their parts for the three places of a kernel, shifted with zero fill.

    Args:
        low: pixels of a tile.
        high: pixels that they become.
        count: tiles along the axis.
        like: gives type and device.

    Returns:
        (count * high, 3 * count * low).
    """
    lines = nnf.interpolate(torch.eye(low)[None], size=high, mode="linear", align_corners=False)
    tiles = torch.eye(count)[:, None, :, None] * lines[0].T[:, None]  # (count, high, count, low)
    laid = tiles.reshape(count * high, count * low)
    padded = nnf.pad(laid, (0, 0, 1, 1))
    return torch.cat([padded[place : place + len(laid)] for place in range(3)], dim=1).to(like)


def _added(total: Tensor, part: Tensor) -> Tensor:
    """Their sum, in the memory of the first where no gradient needs it."""
    return total + part if torch.is_grad_enabled() else total.add_(part)
