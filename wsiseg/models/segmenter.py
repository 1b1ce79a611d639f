"""A segmenter: extractor + head + classes, with everything a prediction needs to know of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from wsiseg.classes import Classes
from wsiseg.geometry import Point
from wsiseg.models.base import FeatureExtractor, Features, Head, cut_tiles
from wsiseg.objects import ObjectsConfig
from wsiseg.stain import StainBasis


@dataclass(frozen=True)
class ModelInfo:
    """What a prediction takes from the model, and nothing else decides.

    Attributes:
        name: name in the zoo, of the training run, or stem of the checkpoint file.
        sha256: digest of the checkpoint file; of the configuration for a model without weights.
        classes: classes in network order.
        mpp: micrometres per pixel of its windows.
        window_px: side of a window.
        tile_px: side of a tile; window_px is a multiple of it.
        licence: terms of the weights, an SPDX name or a sentence.
        config: the resolved configuration, plain data.
        card: provenance: data, training, metrics, versions; plain data.
        stain_target: the stains that images must be normalised to before the model sees them.
        resize_px: the square that labelled images are stretched to, or None.
        border: whether the last output of the head is the border of objects, not a class.
        temperature: what class logits are divided by.
        objects: post-processing of the labels.
    """

    name: str
    sha256: str
    classes: Classes
    mpp: float
    window_px: int
    tile_px: int
    licence: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    card: Mapping[str, Any] = field(default_factory=dict)
    stain_target: StainBasis | None = None
    resize_px: int | None = None
    border: bool = False
    temperature: float = 1.0
    objects: ObjectsConfig = ObjectsConfig()

    @property
    def output_count(self) -> int:
        """Maps that the network gives: the classes, and the border if it has one."""
        return len(self.classes) + int(self.border)


class Segmenter(nn.Module):
    """Windows to class probabilities.

    Inference uses `tile_features` and `window_probabilities` so that windows share tiles;
    `probabilities` does both for whole windows.

    Attributes:
        map_specs: one entry a map of `tile_features`.
    """

    def __init__(self, extractor: FeatureExtractor, head: Head, info: ModelInfo) -> None:
        super().__init__()
        self.extractor = extractor
        self.head = head
        self.info = info
        self.map_specs = extractor.specs

    @property
    def device(self) -> torch.device:
        """Device of the weights (CPU for a model without any)."""
        for tensor in chain(self.parameters(), self.buffers()):
            return tensor.device
        return torch.device("cpu")

    def tile_features(self, tiles: Tensor, places: Sequence[Point], seed: int) -> Features:
        """Features of tiles (B, 3, tile_px, tile_px) in [-1, 1] at their places."""
        features: Features = self.extractor(tiles, places, seed)
        return features

    def window_logits(self, features: Features) -> Tensor:
        """(B, C[+1], window, window) logits from tile features (B, R, K, channels, h, w)."""
        logits: Tensor = self.head(features)
        return logits

    def to_probabilities(self, logits: Tensor) -> Tensor:
        """(B, C[+1], H, W) float32 probabilities of logits of that shape.

        Those of the classes sum to 1; that of the border, where there is one, comes after them.
        """
        count = len(self.info.classes)
        classes = (logits[:, :count].float() / self.info.temperature).softmax(dim=1)
        if not self.info.border:
            return classes
        return torch.cat((classes, logits[:, count:].float().sigmoid()), dim=1)

    def window_probabilities(self, features: Features) -> Tensor:
        """Probabilities, see `to_probabilities`, from features (B, R, K, channels, h, w)."""
        return self.to_probabilities(self.window_logits(features))

    def judge(self, features: Features) -> tuple[Tensor, Tensor | None]:
        """Probabilities of windows and, where the head can tell, how unsure they are.

        Returns:
            (B, C[+1], H, W) float32, and (B, H, W) float32 from 0 (sure) to 1, or None.
        """
        logits, uncertainty = self.head.judge(features)
        return self.to_probabilities(logits), uncertainty

    def features(self, images: Tensor, places: Sequence[Point], seed: int) -> Features:
        """Features (B, R, K, channels, h, w) of whole windows (B, 3, R * tile, K * tile).

        Args:
            images: windows in [-1, 1].
            places: the place of each window's top left pixel.
            seed: seed of the noise.
        """
        size = self.info.tile_px
        tiles = cut_tiles(images, size)
        b, r, k = tiles.shape[:3]
        spots = [
            Point(p.x + column * size, p.y + row * size)
            for p in places
            for row in range(r)
            for column in range(k)
        ]
        maps = self.tile_features(tiles.flatten(0, 2), spots, seed)
        return tuple(torch.unflatten(m, 0, (b, r, k)) for m in maps)

    def probabilities(self, images: Tensor, places: Sequence[Point], seed: int = 0) -> Tensor:
        """(B, C[+1], H, W) float32 probabilities of whole windows (B, 3, H, W) in [-1, 1]."""
        return self.window_probabilities(self.features(images, places, seed))
