"""Colour variation of batches: stains, tone and blur. Knows no files, no masks, no geometry.

Every function takes images (B, 3, H, W) in [-1, 1] and draws for each image by itself, from a
generator on the CPU, so that a batch is the same whatever device it is on.

Source of the stain variation: Tellez et al., Whole-slide mitosis detection in H&E breast histology
using PHH3, IEEE TMI 2018, and Quantifying the effects of data augmentation and stain color
normalization, Med Image Anal 2019; stain vectors of Ruifrok and Johnston 2001.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as nnf

STAINS = ((0.650, 0.704, 0.286), (0.072, 0.990, 0.105), (0.268, 0.570, 0.776))
"""Optical density in (R, G, B) of haematoxylin, eosin and diaminobenzidine."""
LUMA = (0.299, 0.587, 0.114)
BLUR_SHARE = 0.5


def spread(
    count: int, width: float, generator: torch.Generator, *, channels: int = 1, centre: float = 0.0
) -> Tensor:
    """(count, channels, 1, 1) numbers, uniform in centre +- width."""
    draws = torch.rand(count, channels, 1, 1, generator=generator)
    return centre + width * (2 * draws - 1)


def density_of(images: Tensor) -> Tensor:
    """Optical density, 0 for white."""
    return -torch.log(((images + 1) * 127.5 + 1) / 256)


def image_of(density: Tensor) -> Tensor:
    """Images in [-1, 1] of optical densities; below 0 counts as 0."""
    varied = torch.exp(-density.clamp(min=0)) * 256 - 1
    return (varied / 127.5 - 1).clamp(-1, 1)


def channel_jitter(
    images: Tensor, *, gain: float, shift: float, generator: torch.Generator
) -> Tensor:
    """Optical density of each channel times 1 +- gain, plus +- shift."""
    b = len(images)
    gains = spread(b, gain, generator, channels=3, centre=1.0).to(images.device)
    shifts = spread(b, shift, generator, channels=3).to(images.device)
    return image_of(density_of(images) * gains + shifts)


def hed_jitter(images: Tensor, *, gain: float, shift: float, generator: torch.Generator) -> Tensor:
    """Amount of each of three stains times 1 +- gain, plus +- shift (in optical density)."""
    b = len(images)
    gains = spread(b, gain, generator, channels=3, centre=1.0).squeeze(3)
    shifts = spread(b, shift, generator, channels=3).squeeze(3)
    stains = nnf.normalize(torch.tensor(STAINS, dtype=torch.float64), dim=1)
    apart = torch.linalg.inv(stains)
    # densities are rows: d -> (d @ apart * gains + shifts) @ stains, as columns here
    matrix = (stains.T @ (gains.double() * apart.T)).to(images)
    offset = (stains.T @ shifts.double()).to(images)
    density = density_of(images).flatten(2)
    return image_of((matrix @ density + offset).view_as(images))


def tone_jitter(
    images: Tensor,
    *,
    brightness: float,
    contrast: float,
    saturation: float,
    generator: torch.Generator,
) -> Tensor:
    """Light times 1 +- brightness; the distance to the image's mean grey times 1 +- contrast; that
    to each pixel's own grey times 1 +- saturation."""
    b = len(images)
    factors = [
        spread(b, width, generator, centre=1.0).to(images.device)
        for width in (brightness, contrast, saturation)
    ]
    light = (images + 1) / 2 * factors[0]
    luma = torch.tensor(LUMA, device=images.device).view(1, 3, 1, 1)
    mean = (light * luma).sum(1, keepdim=True).mean((2, 3), keepdim=True)
    light = mean + (light - mean) * factors[1]
    grey = (light * luma).sum(1, keepdim=True)
    light = grey + (light - grey) * factors[2]
    return (light * 2 - 1).clamp(-1, 1)


def random_blur(images: Tensor, *, blur_px: float, generator: torch.Generator) -> Tensor:
    """Half of the images blurred by a Gaussian of sigma 0 .. blur_px pixels."""
    b, c, h, w = images.shape
    chosen = torch.rand(b, 1, generator=generator) < BLUR_SHARE
    sigma = (torch.rand(b, 1, generator=generator) * blur_px * chosen).clamp(min=1e-3)
    radius = math.ceil(3 * blur_px)
    weights = torch.exp(-((torch.arange(-radius, radius + 1) / sigma) ** 2) / 2)
    weights = (weights / weights.sum(1, keepdim=True)).repeat_interleave(c, 0).to(images)
    padded = nnf.pad(images.reshape(1, b * c, h, w), (radius,) * 4, mode="replicate")
    rows = nnf.conv2d(padded, weights[:, None, :, None], groups=b * c)
    return nnf.conv2d(rows, weights[:, None, None, :], groups=b * c).view_as(images)
