"""Losses on class logits. Knows no networks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as nnf

from wsiseg.classes import IGNORE
from wsiseg.errors import ConfigError


@dataclass(frozen=True)
class LossConfig:
    """Weights of the losses."""

    cross_entropy: float = 1.0
    """Weight of the pixel-wise cross-entropy."""
    dice: float = 0.0
    """Weight of the soft Dice loss, averaged over the classes."""

    def __post_init__(self) -> None:
        if min(self.cross_entropy, self.dice) < 0 or not self.cross_entropy + self.dice > 0:
            raise ConfigError("loss: weights must not be negative, and one must be above 0")


def segmentation_loss(logits: Tensor, target: Tensor, config: LossConfig) -> Tensor:
    """The weighted sum of the losses; pixels labelled 255 take no part.

    Args:
        logits: (B, C, H, W).
        target: (B, H, W) int64 classes, 255 = ignore.
        config: weights.
    """
    loss = logits.new_zeros(())
    if config.cross_entropy:
        loss = loss + config.cross_entropy * nnf.cross_entropy(logits, target, ignore_index=IGNORE)
    if config.dice:
        loss = loss + config.dice * soft_dice_loss(logits, target)
    return loss


def soft_dice_loss(logits: Tensor, target: Tensor) -> Tensor:
    """1 - soft Dice over the whole batch, averaged over classes (Milletari et al. 2016, eq. 3)."""
    valid = (target != IGNORE).unsqueeze(1)
    probabilities = logits.softmax(dim=1) * valid
    truth = torch.zeros_like(probabilities).scatter_(1, (target.unsqueeze(1) * valid).long(), 1.0)
    truth = truth * valid
    common = (probabilities * truth).sum(dim=(0, 2, 3))
    total = (probabilities.square() + truth.square()).sum(dim=(0, 2, 3))
    return 1 - ((2 * common + 1) / (total + 1)).mean()
