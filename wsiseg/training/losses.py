"""Losses on class logits, and the weights and pixels they take. Knows no networks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as nnf

from wsiseg.classes import IGNORE
from wsiseg.errors import ConfigError, DatasetError

STRUCTURE_SHARE = 0.1
"""Share of the largest error of a map above which a pixel is hard (beta of Zhao et al.)."""

STRUCTURE_CONSTANT = 0.01
"""What keeps the normalisation of flat maps finite (C of Zhao et al.)."""


@dataclass(frozen=True)
class LossConfig:
    """Weights of the losses, which are added, and which pixels they see."""

    cross_entropy: float = 1.0
    """Weight of the pixel-wise cross-entropy."""
    dice: float = 0.0
    """Weight of the soft Dice loss, averaged over the classes."""
    focal: float = 0.0
    """Weight of the focal loss."""
    focal_gamma: float = 2.0
    """Exponent of the focal loss; 0 makes it the cross-entropy."""
    structure: float = 0.0
    """Weight of the structural-similarity loss."""
    border: float = 1.0
    """Weight of the borders' loss, cross-entropy + soft Dice, where borders are learnt."""
    touching: float = 1.0
    """Weight in that loss of pixels between two objects, against 1 of others: few, and they part
    what touches (Ronneberger et al. 2015, eq. 2, give such pixels up to 11)."""
    class_weights: Literal["none", "frequency"] = "none"
    """Class weights of all losses but Dice: none, or 1 - share of the training pixels."""
    keep_background: float = 1.0
    """Share of the pixels of background classes that training sees, above 0 to 1."""

    def __post_init__(self) -> None:
        weights = (self.cross_entropy, self.dice, self.focal, self.structure)
        if not (min(*weights, self.border) >= 0 and 0 < sum(weights) < math.inf):
            raise ConfigError("loss: weights must not be negative, and one must be above 0")
        if not 0 < self.touching < math.inf:
            raise ConfigError(f"loss.touching: must be above 0, it is {self.touching}")
        if not 0 <= self.focal_gamma < math.inf:
            raise ConfigError(f"loss.focal_gamma: must not be negative, it is {self.focal_gamma}")
        if self.class_weights not in ("none", "frequency"):
            raise ConfigError(
                f"loss.class_weights: {self.class_weights!r} is not one of none, frequency"
            )
        if not 0 < self.keep_background <= 1:
            raise ConfigError(
                f"loss.keep_background: must be above 0 and at most 1, it is {self.keep_background}"
            )


def segmentation_loss(
    logits: Tensor, target: Tensor, config: LossConfig, *, weights: Tensor | None = None
) -> Tensor:
    """The weighted sum of the losses; pixels labelled 255 take no part.

    Where no pixel takes part, or only pixels of classes with weight 0, a pixel-wise loss is 0
    with gradients of 0.

    Args:
        logits: (B, C, H, W).
        target: (B, H, W) int64 classes, 255 = ignore.
        config: weights of the losses.
        weights: (C,) weights of the classes in all losses but Dice, see `frequency_weights`.
    """
    loss = logits.new_zeros(())
    valid = target[target != IGNORE]
    if not (valid.numel() if weights is None else bool(weights[valid].any())):
        loss = logits.sum() * 0.0
    else:
        if config.cross_entropy:
            loss = loss + config.cross_entropy * nnf.cross_entropy(
                logits, target, weight=weights, ignore_index=IGNORE
            )
        if config.focal:
            value = focal_loss(logits, target, gamma=config.focal_gamma, weights=weights)
            loss = loss + config.focal * value
        if config.structure:
            loss = loss + config.structure * structure_loss(logits, target, weights=weights)
    if config.dice:
        loss = loss + config.dice * soft_dice_loss(logits, target)
    return loss


def soft_dice_loss(logits: Tensor, target: Tensor) -> Tensor:
    """1 - soft Dice over the whole batch, averaged over classes (Milletari et al. 2016, eq. 3)."""
    valid = (target != IGNORE).unsqueeze(1)
    probabilities = logits.softmax(dim=1) * valid
    truth = _one_hot(target, probabilities)
    common = (probabilities * truth).sum(dim=(0, 2, 3))
    total = (probabilities.square() + truth.square()).sum(dim=(0, 2, 3))
    return 1 - ((2 * common + 1) / (total + 1)).mean()


def border_loss(logits: Tensor, border: Tensor, weight: Tensor) -> Tensor:
    """Binary cross-entropy + 1 - soft Dice of the borders of objects, both with weighted pixels.

    Args:
        logits: (B, H, W) of a border.
        border: (B, H, W) bool, where there is one.
        weight: (B, H, W) of the pixels, 0 for those that take no part.
    """
    weight = weight.to(logits.dtype)
    truth, found = border.to(logits.dtype), logits.sigmoid()
    entropy = nnf.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    common = (weight * found * truth).sum()
    total = (weight * (found.square() + truth)).sum()
    mean = (weight * entropy).sum() / weight.sum().clamp(min=1)
    return mean + 1 - (2 * common + 1) / (total + 1)


def focal_loss(
    logits: Tensor, target: Tensor, *, gamma: float = 2.0, weights: Tensor | None = None
) -> Tensor:
    """Mean of -w_t (1 - p_t)^gamma log p_t over the pixels, by weight (Lin et al. 2017, eq. 5).

    p_t is the probability of the pixel's class and w_t that class's weight; the sum is divided
    by the sum of w_t, as `cross_entropy` does, which this is for gamma 0.

    Args:
        logits: (B, C, H, W).
        target: (B, H, W) int64 classes, 255 = ignore.
        gamma: exponent, 0 or more.
        weights: (C,) weights of the classes.
    """
    entropy = nnf.cross_entropy(logits, target, ignore_index=IGNORE, reduction="none")
    weight = _pixel_weights(target, weights, entropy)
    doubt = (-torch.expm1(-entropy)).clamp(min=1e-12)
    return (weight * doubt.pow(gamma) * entropy).sum() / weight.sum()


def structure_loss(logits: Tensor, target: Tensor, *, weights: Tensor | None = None) -> Tensor:
    """Structural-similarity loss (Zhao et al. 2019, arXiv 1910.08711), over whole images.

    For the map y (0 or 1) of class c in the truth of an image and the map p of its
    probabilities, with the means m and the standard deviations s of the maps over the image:

        e = | (y - m_y + C) / (s_y + C) - (p - m_p + C) / (s_p + C) |      (error of a pixel)
        f = 1 where e > beta * max(e) over the map, else 0                 (hard pixels)
        loss = sum over images, classes, pixels of e f w CE / sum of f w

    CE is the pixel's cross-entropy, w its class's weight, beta 0.1 and C 0.01. Zhao et al. take
    the means and deviations in small windows; GenSelfDiff-HIS (Purma et al. 2024) over the
    image, as here. Its published code has the batch's mean cross-entropy in place of the
    pixel's. Where every class is certain and right the loss is 0.

    Args:
        logits: (B, C, H, W).
        target: (B, H, W) int64 classes, 255 = ignore.
        weights: (C,) weights of the classes.
    """
    entropy = nnf.cross_entropy(logits, target, ignore_index=IGNORE, reduction="none")
    weight = _pixel_weights(target, weights, entropy)
    valid = (target != IGNORE).unsqueeze(1).to(logits.dtype)
    truth = _one_hot(target, logits)
    error = (_normalised(truth, valid) - _normalised(logits.softmax(dim=1), valid)).abs() * valid
    hard = (error > STRUCTURE_SHARE * error.amax(dim=(2, 3), keepdim=True)).to(logits.dtype)
    scale = (hard * weight.unsqueeze(1)).sum()
    value = (error * hard * (weight * entropy).unsqueeze(1)).sum()
    return value / torch.where(scale > 0, scale, 1.0)


def frequency_weights(
    counts: Sequence[int] | Tensor, *, names: Sequence[str] = (), allow_empty: bool = False
) -> Tensor:
    """(C,) float32 class weights 1 - N_c / N from the classes' pixel numbers N_c.

    Args:
        counts: (C,) training pixels of each class, ignored ones left out.
        names: the classes' names, for messages.
        allow_empty: take a class without pixels (its weight is 1) instead of raising.

    Raises:
        DatasetError: no pixels at all, or a class without pixels.
    """
    numbers = torch.as_tensor(counts, dtype=torch.float64, device="cpu")
    if not numbers.sum() > 0:
        raise DatasetError("class weights: the training images have no labelled pixel")
    empty = [names[k] if names else f"number {k}" for k in range(len(numbers)) if numbers[k] == 0]
    if empty and not allow_empty:
        raise DatasetError(
            f"class weights: no training pixel of class {', '.join(empty)}; add images that show "
            "it, leave the class out, or set loss.class_weights to none"
        )
    return (1 - numbers / numbers.sum()).float()


def thin_background(
    target: Tensor, background_classes: Sequence[int], share: float, generator: torch.Generator
) -> Tensor:
    """The target with a random part of the background pixels ignored.

    Args:
        target: (B, H, W) int64 classes, 255 = ignore; stays as it is.
        background_classes: the classes to thin.
        share: probability of each of their pixels to stay; with 1 nothing is drawn.
        generator: source of the draw.

    Returns:
        (B, H, W) int64, dropped pixels 255.
    """
    if share >= 1 or not background_classes:
        return target
    classes = torch.tensor(list(background_classes), device=target.device)
    drawn = torch.rand(target.shape, generator=generator, device=generator.device)
    dropped = torch.isin(target, classes) & (drawn >= share).to(target.device)
    return target.masked_fill(dropped, IGNORE)


def _one_hot(target: Tensor, like: Tensor) -> Tensor:
    """(B, C, H, W) truth of each class in the dtype of `like`, 0 where ignored."""
    valid = (target != IGNORE).unsqueeze(1)
    truth = torch.zeros_like(like).scatter_(1, (target.unsqueeze(1) * valid).long(), 1.0)
    return truth * valid


def _pixel_weights(target: Tensor, weights: Tensor | None, like: Tensor) -> Tensor:
    """(B, H, W) weight of each pixel's class in the dtype of `like`, 0 where ignored."""
    valid = target != IGNORE
    if weights is None:
        return valid.to(like.dtype)
    return weights.to(like.dtype)[target * valid] * valid


def _normalised(maps: Tensor, valid: Tensor) -> Tensor:
    """(x - mean + C) / (deviation + C) of each (B, C, H, W) map over its valid pixels."""
    count = valid.sum(dim=(2, 3), keepdim=True)
    centred = maps - (maps * valid).sum(dim=(2, 3), keepdim=True) / count.clamp(min=1)
    squares = (centred.square() * valid).sum(dim=(2, 3), keepdim=True)
    deviation = (squares / (count - 1).clamp(min=1)).clamp(min=1e-12).sqrt()
    return (centred + STRUCTURE_CONSTANT) / (deviation + STRUCTURE_CONSTANT)
