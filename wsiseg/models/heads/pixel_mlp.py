"""An ensemble of pixel classifiers: each a small MLP on all feature maps at image resolution.

Source: Baranchuk et al. (ICLR 2022), section 4: maps upsampled bilinearly to the image and
concatenated, ten MLPs Linear-ReLU-BatchNorm 128, 32 and a last Linear, trained independently on
labelled pixels, majority vote, Jensen-Shannon divergence of the members as uncertainty.

The concatenated maps of a whole image (2,688 channels) are never held. To predict, the first
Linear, which commutes with bilinear upsampling, is done at the maps' native resolutions, a tile
and a member at a time. To train, the maps are read at the drawn pixels only. Both are exact.
Knows no extractor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from wsiseg.classes import IGNORE
from wsiseg.errors import ConfigError
from wsiseg.models.base import Criterion, Features, FeatureSpec, Head, lay_out

TIE = 1e-3
"""Votes that the members' mean probability counts for, to break ties."""
SMALLEST = 1e-12
"""Least probability of a class."""


@dataclass(frozen=True)
class PixelMLPConfig:
    """Configuration of the ensemble."""

    members: int = 10
    """Number of classifiers."""
    widths: tuple[int, int] = (128, 32)
    """Channels of a classifier's hidden layers."""
    pixels: int = 8192
    """Labelled pixels of a batch that a member learns from, each its own draw; 0: all of them."""

    def __post_init__(self) -> None:
        if self.members < 1 or min(self.widths) < 1:
            raise ConfigError("head pixel_mlp: members and widths must be at least 1")
        if self.pixels < 0 or self.pixels == 1:
            raise ConfigError(f"head pixel_mlp: pixels {self.pixels}: must be 0, or 2 and more")


class PixelMLPHead(Head):
    """Votes of the members at window resolution from the tile features of a window."""

    def __init__(
        self,
        specs: Sequence[FeatureSpec],
        class_count: int,
        config: PixelMLPConfig,
        *,
        tile_px: int,
    ) -> None:
        super().__init__()
        self.config = config
        self.class_count = class_count
        self.specs = tuple(specs)
        self.tile_px = tile_px
        channels = sum(s.channels for s in specs)
        self.members = nn.ModuleList(
            Member(channels, class_count, config.widths) for _ in range(config.members)
        )

    @property
    def ensemble(self) -> list[Member]:
        """The members."""
        return [m for m in self.members if isinstance(m, Member)]

    def forward(self, features: Features) -> Tensor:
        """(B, classes, R * tile, K * tile) float32 logits whose softmax is the share of votes.

        A class's share counts its members' votes and TIE of their mean probability, so that
        shares are exact to TIE / members, equal votes are decided by the mean probability, and a
        class without votes keeps a trace.
        """
        return self._each_tile(features, vote)

    def judge(self, features: Features) -> tuple[Tensor, Tensor]:
        """The votes, and the Jensen-Shannon divergence of the members / log classes (B, H, W).

        0: the members agree on the probabilities; 1: each is certain, of all classes equally often.
        """
        both = self._each_tile(
            features, lambda p: torch.cat((vote(p), divergence(p)[:, None]), dim=1)
        )
        return both[:, :-1], both[:, -1]

    def loss(self, features: Features, target: Tensor, criterion: Criterion) -> Tensor:
        """Mean over the members of the criterion on what they say of their drawn pixels.

        The pixels come as one row: logits (1, classes, 1, N) and target (1, 1, N). With pixels = 0
        members see whole windows (B, classes, H, W) instead, as a criterion on shapes needs, and
        their batch norms the unlabelled pixels too. The draw follows torch's global CPU generator.
        Of fewer than two labelled pixels batch norm has no statistics: the loss is 0 then.
        """
        losses = []
        for member in self.ensemble:
            if not self.config.pixels:
                losses.append(criterion(self._windows(member, features).float(), target))
                continue
            drawn = self._draw(target)
            if len(drawn) < 2:
                losses.append(torch.stack([p.sum() for p in member.parameters()]).sum() * 0.0)
                continue
            logits = member(member.first(self.read_pixels(features, drawn)).T[None])
            losses.append(
                criterion(logits.float()[:, :, None], target.flatten()[drawn][None, None])
            )
        return torch.stack(losses).mean()

    def read_pixels(self, features: Features, pixels: Tensor) -> Tensor:
        """(N, channels) of all maps at window pixels, as if upsampled tile by tile and joined.

        Args:
            features: as for `forward`.
            pixels: (N,) places in a flat (B, R * tile, K * tile) array.
        """
        r, k = features[0].shape[1:3]
        size = self.tile_px
        x, rest = pixels % (k * size), pixels // (k * size)
        y, image = rest % (r * size), rest // (r * size)
        tile = (image * r + y // size) * k + x // size
        parts = []
        for maps, spec in zip(features, self.specs, strict=True):
            flat = maps.flatten(0, 2).permute(0, 2, 3, 1)
            parts.append(_bilinear(flat, tile, y % size, x % size, spec.stride))
        return torch.cat(parts, dim=1)

    def _draw(self, target: Tensor) -> Tensor:
        """(N,) flat places of a member's pixels, in random order."""
        places = (target.flatten() != IGNORE).nonzero()[:, 0]
        order = torch.randperm(len(places))[: self.config.pixels]
        return places[order.to(places.device)]

    def _windows(self, member: Member, features: Features) -> Tensor:
        """(B, classes, R * tile, K * tile) logits of one member."""
        maps = self._tile_logits(member, tuple(f.flatten(0, 2) for f in features))
        return lay_out(torch.unflatten(maps, 0, features[0].shape[:3]))

    def _tile_logits(self, member: Member, maps: Sequence[Tensor]) -> Tensor:
        """(T, classes, tile, tile) logits of one member for T tiles."""
        hidden = self.first_layer(member, maps)
        size = self.tile_px
        logits: Tensor = member(hidden.flatten(2))
        return torch.unflatten(logits, -1, (size, size))

    def first_layer(self, member: Member, maps: Sequence[Tensor]) -> Tensor:
        """(T, widths[0], tile, tile): the first Linear on maps (T, channels, h, w) upsampled."""
        weight = member.first.weight[..., None, None]
        parts: dict[int, Tensor] = {}
        start = 0
        for tile, spec in zip(maps, self.specs, strict=True):
            kernel = weight[:, start : start + spec.channels].to(tile.dtype)
            part = nnf.conv2d(tile, kernel)
            parts[spec.stride] = parts[spec.stride] + part if spec.stride in parts else part
            start += spec.channels
        total: Tensor | None = None
        for stride, part in parts.items():
            if stride > 1:
                size = (self.tile_px, self.tile_px)
                part = nnf.interpolate(part, size=size, mode="bilinear", align_corners=False)
            total = part if total is None else total + part
        assert total is not None
        return total + member.first.bias.view(1, -1, 1, 1).to(total.dtype)

    def _each_tile(self, features: Features, reduce: Callable[[Tensor], Tensor]) -> Tensor:
        """Members' probabilities (members, classes, tile, tile) reduced, tile by tile, laid out."""
        whole = list(features)
        tiles, layout = [f.flatten(0, 2) for f in whole], whole[0].shape[:3]
        done = []
        for i in range(len(tiles[0])):
            maps = [t[i : i + 1] for t in tiles]
            logits = torch.cat([self._tile_logits(m, maps) for m in self.ensemble])
            done.append(reduce(logits.float().softmax(dim=1)[:, None]))
        return lay_out(torch.unflatten(torch.cat(done), 0, layout))


class Member(nn.Module):
    """One classifier: `first` on all channels of pixels, `rest` on what it gives."""

    def __init__(self, channels: int, class_count: int, widths: tuple[int, int]) -> None:
        super().__init__()
        self.first = nn.Linear(channels, widths[0])
        self.rest = nn.Sequential(
            nn.ReLU(),
            nn.BatchNorm1d(widths[0]),
            nn.Conv1d(widths[0], widths[1], 1),
            nn.ReLU(),
            nn.BatchNorm1d(widths[1]),
            nn.Conv1d(widths[1], class_count, 1),
        )

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, classes, N) logits of what `first` gave for N pixels, (B, widths[0], N)."""
        logits: Tensor = self.rest(hidden)
        return logits


def vote(probabilities: Tensor) -> Tensor:
    """(B, classes, H, W) logs of the shares of votes from (members, B, classes, H, W)."""
    classes = probabilities.shape[2]
    winners = probabilities.argmax(dim=2)
    votes = nnf.one_hot(winners, classes).movedim(-1, 2).sum(dim=0)
    counts = votes + TIE * probabilities.mean(dim=0)
    return (counts / (len(probabilities) + TIE)).clamp_min(SMALLEST).log()


def divergence(probabilities: Tensor) -> Tensor:
    """Jensen-Shannon divergence of the members over log classes, from 0 to 1.

    The entropy of the members' mean less the mean of their entropies.

    Args:
        probabilities: (members, B, classes, H, W).

    Returns:
        (B, H, W).
    """
    between = entropy(probabilities.mean(dim=0), 1) - entropy(probabilities, 2).mean(dim=0)
    return (between / math.log(max(2, probabilities.shape[2]))).clamp(0.0, 1.0)


def entropy(probabilities: Tensor, dim: int) -> Tensor:
    """Entropy in nats along a dimension."""
    total: Tensor = torch.special.entr(probabilities).sum(dim=dim)
    return total


def _bilinear(maps: Tensor, tile: Tensor, y: Tensor, x: Tensor, stride: int) -> Tensor:
    """(N, C) of maps (T, h, w, C) at pixels of their tiles, in float32 or better.

    Pixel centres are those of `interpolate` with align_corners=False.
    """
    (y0, y1, fy), (x0, x1, fx) = (
        _neighbours(p, stride, n) for p, n in ((y, maps.shape[1]), (x, maps.shape[2]))
    )
    kind = torch.promote_types(maps.dtype, torch.float32)
    fy, fx = fy[:, None].to(kind), fx[:, None].to(kind)
    top = maps[tile, y0, x0] * (1 - fx) + maps[tile, y0, x1] * fx
    bottom = maps[tile, y1, x0] * (1 - fx) + maps[tile, y1, x1] * fx
    return top * (1 - fy) + bottom * fy


def _neighbours(pixels: Tensor, stride: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Map indices on both sides of pixels and the share of the second, clamped at the border."""
    centre = ((pixels + 0.5) / stride - 0.5).clamp_min(0.0)
    low = centre.long()
    return low, (low + 1).clamp_max(count - 1), centre - low
