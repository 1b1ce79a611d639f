"""A 1x1 convolution on one full-size map: the last layer of a network that is an extractor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from wsiseg.errors import ConfigError
from wsiseg.models.base import Features, FeatureSpec, Head, lay_out


@dataclass(frozen=True)
class LinearConfig:
    """Configuration of the linear head: it has none."""


class LinearHead(Head):
    """A linear classifier of every pixel."""

    def __init__(
        self, specs: Sequence[FeatureSpec], class_count: int, config: LinearConfig
    ) -> None:
        super().__init__()
        if [s.stride for s in specs] != [1]:
            raise ConfigError(
                f"head linear: needs an extractor with one full-size map, not strides "
                f"{[s.stride for s in specs]}; use head fcn"
            )
        self.config = config
        self.class_count = class_count
        self.classifier = nn.Conv2d(specs[0].channels, class_count, 1)

    def forward(self, features: Features) -> Tensor:
        """(B, classes, R * tile, K * tile) logits from one map (B, R, K, channels, tile, tile)."""
        logits: Tensor = self.classifier(lay_out(features[0]))
        return logits
