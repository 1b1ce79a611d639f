"""Random crops, flips, scales and stain variation of images and masks. Knows no data set.

Geometry is drawn per image with Pillow (one resampling), colour per batch on tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from wsiseg.datasets.colour import channel_jitter, hed_jitter, random_blur, tone_jitter
from wsiseg.errors import ConfigError

UInt8 = npt.NDArray[np.uint8]
ELASTIC_CELL_PX = 64
"""Side of the cells of the net that elastic deformation moves."""


@dataclass(frozen=True)
class AugmentConfig:
    """How much images are varied."""

    scale: tuple[float, float] = (0.8, 1.25)
    """Range of the magnification, log-uniform; 1 = the model's mpp."""
    rotate: bool = True
    """Whether to rotate by any angle (else by multiples of 90 degrees)."""
    elastic_px: float = 0.0
    """The corners of a net of `ELASTIC_CELL_PX` cells are shifted by up to this along each axis,
    and what lies between them bilinearly; 0 = off."""
    stain_gain: float = 0.2
    """Optical density of each channel is multiplied by 1 +- this."""
    stain_shift: float = 0.05
    """And shifted by +- this."""
    hed_gain: float = 0.0
    """Amount of haematoxylin, of eosin and of the rest is multiplied by 1 +- this; 0 = off."""
    hed_shift: float = 0.0
    """And shifted by +- this, in optical density; 0 = off."""
    brightness: float = 0.0
    """Light is multiplied by 1 +- this; 0 = off."""
    contrast: float = 0.0
    """Contrast to the mean of the image is multiplied by 1 +- this; 0 = off."""
    saturation: float = 0.0
    """Saturation is multiplied by 1 +- this; 0 = off."""
    blur_px: float = 0.0
    """Half of the images are blurred by a Gaussian of sigma up to this; 0 = off."""

    def __post_init__(self) -> None:
        check_scale(self.scale, "augment.scale")
        for name in ("stain_gain", "hed_gain", "brightness", "contrast", "saturation"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"augment.{name}: must be from 0 to below 1")
        limits = {"stain_shift": 2.0, "hed_shift": 2.0, "blur_px": 16.0, "elastic_px": 16.0}
        for name, most in limits.items():
            if not 0 <= getattr(self, name) <= most:
                raise ConfigError(f"augment.{name}: must be from 0 to {most:g}")


def check_scale(scale: tuple[float, float], where: str) -> None:
    """Refuse a range of magnifications that cannot be.

    Raises:
        ConfigError: not 0 < low <= high.
    """
    if not 0 < scale[0] <= scale[1] < float("inf"):
        raise ConfigError(f"{where} {list(scale)}: must be two numbers, 0 < low <= high")


def stain_jitter(images: Tensor, config: AugmentConfig, generator: torch.Generator) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1] with their colours varied, each by itself.

    In this order: optical density by channel, by stain, tone, blur. What is off draws nothing.
    Computed in the precision of the images, also where autocast is on.

    Args:
        images: on any device.
        config: how much.
        generator: source of all randomness, on the CPU.
    """
    with torch.autocast(images.device.type, enabled=False):
        if config.stain_gain or config.stain_shift:
            images = channel_jitter(
                images, gain=config.stain_gain, shift=config.stain_shift, generator=generator
            )
        if config.hed_gain or config.hed_shift:
            images = hed_jitter(
                images, gain=config.hed_gain, shift=config.hed_shift, generator=generator
            )
        if config.brightness or config.contrast or config.saturation:
            images = tone_jitter(
                images,
                brightness=config.brightness,
                contrast=config.contrast,
                saturation=config.saturation,
                generator=generator,
            )
        if config.blur_px:
            images = random_blur(images, blur_px=config.blur_px, generator=generator)
    return images


def random_crop(
    image: Image.Image, size_px: int, rng: np.random.Generator, *, scale: tuple[float, float]
) -> UInt8:
    """A square crop (size, size, 3) of an image at a random place, scale, flip and quarter turn.

    A crop that would not fit is magnified until it does.
    """
    factor = float(np.exp(rng.uniform(np.log(scale[0]), np.log(scale[1]))))
    side = min(size_px / factor, image.width, image.height)
    left = rng.uniform(0, image.width - side)
    top = rng.uniform(0, image.height - side)
    crop = image.resize(
        (size_px, size_px), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side)
    )
    pixels = np.asarray(crop)
    if rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(np.rot90(pixels, int(rng.integers(4))))


def scaled(image: UInt8, ratio: float) -> UInt8:
    """An image (H, W, 3) scaled by `ratio`, area-averaged when shrinking."""
    size = (max(1, round(image.shape[1] * ratio)), max(1, round(image.shape[0] * ratio)))
    how = Image.Resampling.BOX if ratio < 1 else Image.Resampling.BICUBIC
    return np.asarray(Image.fromarray(image).resize(size, how))


def at_mpp(image: UInt8, mask: UInt8, ratio: float) -> tuple[UInt8, UInt8]:
    """Image (area-averaged when shrinking) and mask (nearest) scaled by `ratio`."""
    small = scaled(image, ratio)
    size = (small.shape[1], small.shape[0])
    return small, np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))


def random_patch(
    image: UInt8,
    mask: UInt8,
    size: tuple[int, int],
    *,
    rng: np.random.Generator,
    config: AugmentConfig,
) -> tuple[UInt8, UInt8]:
    """A patch at a random place, angle, scale and flip; mirrored beyond the image's edges.

    Args:
        image: (H, W, 3) uint8 at the model's mpp.
        mask: (H, W) uint8.
        size: (height, width) of the patch.
        rng: source of randomness.
        config: ranges.

    Returns:
        The patch and its mask.
    """
    height, width = size
    factor = float(np.exp(rng.uniform(*np.log(config.scale))))
    angle = rng.uniform(0, 2 * np.pi) if config.rotate else rng.integers(4) * np.pi / 2
    flip = -1.0 if rng.random() < 0.5 else 1.0
    cos, sin = np.cos(angle) / factor, np.sin(angle) / factor
    reach = int(np.ceil(np.hypot(height, width) / 2 / factor + 2 * config.elastic_px / factor)) + 2
    cx = _centre(image.shape[1], width / factor, rng)
    cy = _centre(image.shape[0], height / factor, rng)
    left, right = _span(image.shape[1], width / factor, cx, reach=reach)
    top, bottom = _span(image.shape[0], height / factor, cy, reach=reach)
    a, b, d, e = cos * flip, -sin, sin * flip, cos
    x0 = cx + reach - a * width / 2 - b * height / 2 - (left + reach)
    y0 = cy + reach - d * width / 2 - e * height / 2 - (top + reach)
    sheet, labels = (
        Image.fromarray(_mirrored(pixels, (top, bottom), (left, right))) for pixels in (image, mask)
    )
    how: Any = Image.Transform.AFFINE
    data: Any = (a, b, x0, d, e, y0)
    if config.elastic_px:
        how = Image.Transform.MESH
        data = _net(size, np.array(data).reshape(2, 3), rng, shift_px=config.elastic_px)
    patch = sheet.transform((width, height), how, data, Image.Resampling.BILINEAR)
    target = labels.transform((width, height), how, data, Image.Resampling.NEAREST)
    return np.asarray(patch), np.asarray(target)


def _net(
    size: tuple[int, int],
    matrix: npt.NDArray[np.float64],
    rng: np.random.Generator,
    *,
    shift_px: float,
) -> list[tuple[tuple[int, int, int, int], tuple[float, ...]]]:
    """Pillow's mesh of a patch: (box in the patch, corners in the image) of every cell.

    Args:
        size: (height, width) of the patch.
        matrix: (2, 3), from (x, y, 1) in the patch to (x, y) in the image.
        rng: source of randomness.
        shift_px: each corner is shifted by up to this along each axis of the patch.
    """
    ys, xs = (
        np.linspace(0, n, max(1, round(n / ELASTIC_CELL_PX)) + 1).round().astype(int) for n in size
    )
    x, y = np.meshgrid(xs, ys)
    moved = np.stack((x, y)) + rng.uniform(-shift_px, shift_px, (2, *x.shape))
    corners = np.einsum("ij,jyx->yxi", matrix[:, :2], moved) + matrix[:, 2]
    return [
        (
            (int(xs[k]), int(ys[r]), int(xs[k + 1]), int(ys[r + 1])),
            tuple(
                float(v)
                for corner in ((r, k), (r + 1, k), (r + 1, k + 1), (r, k + 1))
                for v in corners[corner]
            ),
        )
        for r in range(len(ys) - 1)
        for k in range(len(xs) - 1)
    ]


def _centre(extent: float, needed: float, rng: np.random.Generator) -> float:
    """A centre that keeps the patch inside where it fits, else the middle."""
    half = min(needed, extent) / 2
    return float(rng.uniform(half, extent - half))


def _span(extent: int, needed: float, centre: float, *, reach: int) -> tuple[int, int]:
    """Start and stop along an axis of what a patch may reach, which may be beyond the edges.

    Where the patch takes all of the axis, `reach` at either side of it: centres lie on whole pixels
    there, so that the last bits of coordinates matter, and nothing is gained by cutting.
    """
    if extent <= needed + 1:
        return -reach, extent + reach
    return int(centre) - reach, int(centre) + reach + 1


def _mirrored(pixels: UInt8, rows: tuple[int, int], columns: tuple[int, int]) -> UInt8:
    """A cut (start, stop) of an image (H, W, ...), mirrored where it is beyond the edges."""
    height, width = pixels.shape[:2]
    inner = pixels[
        max(0, rows[0]) : min(height, rows[1]), max(0, columns[0]) : min(width, columns[1])
    ]
    beyond = [
        (max(0, -start), max(0, stop - extent))
        for extent, (start, stop) in ((height, rows), (width, columns))
    ]
    beyond += [(0, 0)] * (pixels.ndim - 2)
    return np.pad(inner, beyond, mode="symmetric")
