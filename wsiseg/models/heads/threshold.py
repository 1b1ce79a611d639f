"""A head without weights: two classes by a threshold on a single feature map."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from wsiseg.models.base import Features, Head, lay_out


@dataclass(frozen=True)
class ThresholdConfig:
    """Configuration of the threshold head."""

    threshold: float = 0.25
    """Value at which both classes have probability one half."""
    slope: float = 40.0
    """Logit per unit of the map."""


class ThresholdHead(Head):
    """Logits (-z, z) with z = slope * (map - threshold) / 2."""

    class_count = 2

    def __init__(self, config: ThresholdConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, features: Features) -> Tensor:
        """(B, 2, H, W) logits from one map (B, R, K, 1, tile, tile)."""
        z = (lay_out(features[0]) - self.config.threshold) * (self.config.slope / 2)
        return torch.cat((-z, z), dim=1)
