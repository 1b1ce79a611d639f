"""The contracts between extractors, heads and whoever runs them. Knows no particular network.

Image tensors are (B, 3, H, W) float in [-1, 1] (uint8 / 127.5 - 1, METHOD: the same tensor for
every part). A *place* is the (x, y) of a tile's or window's top left pixel in the slide's grid at
the model's mpp, or in the image; noise depends on it, never on the batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from wsiseg.errors import ConfigError, ModelError
from wsiseg.geometry import Point

Features = Sequence[Tensor]
"""A tensor for each feature map. Those of windows may be put together only when they are asked
for, again each time: take each once, and do not keep more of them than are worked on."""
Criterion = Callable[[Tensor, Tensor], Tensor]
"""Loss of logits (B, C, H, W) and target (B, H, W)."""


class FeatureSpec(NamedTuple):
    """One feature map of a tile: (channels, tile_px / stride, tile_px / stride)."""

    channels: int
    stride: int


def to_tensor(
    images: npt.NDArray[np.uint8] | Sequence[npt.NDArray[np.uint8]],
    *,
    device: torch.device | None = None,
) -> Tensor:
    """uint8 RGB images (B, H, W, 3) as a (B, 3, H, W) float32 tensor in [-1, 1] on a device."""
    batch = torch.from_numpy(np.ascontiguousarray(np.stack(list(images))))
    if device is not None and device.type == "cuda":  # copied while the host goes on
        batch = batch.pin_memory().to(device, non_blocking=True)
    batch = batch.to(device)
    return batch.permute(0, 3, 1, 2).contiguous().float().div_(127.5).sub_(1.0)


class FeatureExtractor(nn.Module, ABC):
    """Turns tiles into feature maps. Tiles are independent of one another.

    Attributes:
        specs: one entry a feature map, in the order in which forward returns them.
        tile_px: side of a tile in pixels; a network that sees a whole window has tile = window.
    """

    specs: tuple[FeatureSpec, ...]
    tile_px: int

    def trainable(self, part: str) -> list[nn.Parameter]:
        """The parameters that training may change.

        Args:
            part: `none`, `decoder` where there is one, `all`, or `network`: `all` and what comes
                before it, where `all` is not everything.

        Raises:
            ConfigError: the extractor has no such part.
        """
        if part == "decoder":
            raise ConfigError("trainable: this extractor has no decoder; give none or all")
        return [] if part == "none" else list(self.parameters())

    def load_imagenet(self) -> None:
        """Fill the network with ImageNet weights through timm, from its cache or its hub.

        Raises:
            ModelError: the extractor has none, or they cannot be had.
        """
        raise ModelError(f"{type(self).__name__}: has no ImageNet weights; use initial: random")

    @abstractmethod
    def forward(self, images: Tensor, places: Sequence[Point], seed: int) -> Features:
        """Feature maps of a batch of tiles.

        Args:
            images: (B, 3, tile_px, tile_px) float in [-1, 1].
            places: B places, one a tile; deterministic extractors ignore them.
            seed: seed of the noise; deterministic extractors ignore it.

        Returns:
            One (B, channels, tile_px / stride, tile_px / stride) tensor a spec.
        """


class Head(nn.Module, ABC):
    """Turns the features of a window's tiles into class logits."""

    class_count: int

    @abstractmethod
    def forward(self, features: Features) -> Tensor:
        """Logits of a batch of windows.

        Args:
            features: one (B, R, K, channels, h, w) tensor a spec: R rows and K columns of tiles.

        Returns:
            (B, class_count, R * tile_px, K * tile_px) logits.
        """

    def loss(self, features: Features, target: Tensor, criterion: Criterion) -> Tensor:
        """The training loss of a batch; an ensemble takes the mean of its members'.

        Args:
            features: as for `forward`.
            target: (B, R * tile_px, K * tile_px) int64 classes, 255 = ignore.
            criterion: loss of float32 logits (B, C, H, W) and the target.
        """
        return criterion(self(features).float(), target)

    def judge(self, features: Features) -> tuple[Tensor, Tensor | None]:
        """Logits as of `forward` and, where the head can tell (an ensemble), how unsure they are.

        Returns:
            (B, class_count, H, W) logits, and (B, H, W) float32 from 0 (sure) to 1, or None.
        """
        return self(features), None


def lay_out(maps: Tensor) -> Tensor:
    """Tile maps (B, R, K, C, h, w) side by side in their places: (B, C, R * h, K * w)."""
    b, r, k, c, h, w = maps.shape
    return maps.permute(0, 3, 1, 4, 2, 5).reshape(b, c, r * h, k * w)


def cut_tiles(images: Tensor, tile_px: int) -> Tensor:
    """Windows (B, C, R * tile, K * tile) as tiles (B, R, K, C, tile, tile)."""
    b, c, h, w = images.shape
    r, k = h // tile_px, w // tile_px
    return images.reshape(b, c, r, tile_px, k, tile_px).permute(0, 2, 4, 1, 3, 5)
