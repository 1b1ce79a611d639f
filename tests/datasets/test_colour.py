"""Colour variation: what each kind does, and that it is reproducible."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor

from wsiseg.config import from_mapping
from wsiseg.datasets.augment import AugmentConfig, stain_jitter
from wsiseg.datasets.colour import STAINS, density_of, hed_jitter, random_blur, tone_jitter
from wsiseg.errors import ConfigError

OFF = {"stain_gain": 0.0, "stain_shift": 0.0}
KINDS: list[dict[str, Any]] = [
    {"hed_gain": 0.2},
    {"hed_shift": 0.05},
    {"brightness": 0.2},
    {"contrast": 0.3},
    {"saturation": 0.3},
    {"blur_px": 1.5},
]


def batch(count: int = 3, side: int = 24, seed: int = 0) -> Tensor:
    """Random pixels that are not near black or white."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, side, side, generator=generator) * 1.2 - 0.6


def seeded(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def varied(images: Tensor, seed: int = 1, **kinds: float) -> Tensor:
    return stain_jitter(images, AugmentConfig(**{**OFF, **kinds}), seeded(seed))


def test_by_default_only_the_optical_density_of_channels_varies() -> None:
    """What it was before there were other kinds, bit for bit."""
    images, generator = batch(), seeded()
    gain = 1 + 0.2 * (2 * torch.rand(3, 3, 1, 1, generator=generator) - 1)
    shift = 0.05 * (2 * torch.rand(3, 3, 1, 1, generator=generator) - 1)
    density = -torch.log(((images + 1) * 127.5 + 1) / 256)
    light = torch.exp(-(density * gain + shift).clamp(min=0)) * 256 - 1
    expected = (light / 127.5 - 1).clamp(-1, 1)
    own = seeded()
    assert torch.equal(stain_jitter(images, AugmentConfig(), own), expected)
    assert torch.equal(own.get_state(), generator.get_state()), "nothing else is drawn"
    assert varied(images) is images


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: next(iter(k)))
def test_every_kind_is_reproducible_by_image_and_bounded(kind: dict[str, Any]) -> None:
    images = batch().repeat(4, 1, 1, 1)
    result = varied(images, **kind)
    assert torch.equal(result, varied(images, **kind))
    assert not torch.equal(result, varied(images, seed=2, **kind))
    assert result.shape == images.shape
    assert result.abs().max() <= 1
    changes = (result - images).abs().amax((1, 2, 3))
    assert changes.max() > 0.01
    assert len({round(float(c), 6) for c in changes}) > 3, "each image by itself"


def test_autocast_changes_nothing() -> None:
    images = batch()
    kinds: dict[str, Any] = {k: v for kind in KINDS for k, v in kind.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = varied(images, **kinds)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, varied(images, **kinds))


def test_no_strength_is_no_change() -> None:
    images = batch()
    same = hed_jitter(images, gain=0.0, shift=0.0, generator=seeded())
    assert (same - images).abs().max() < 2e-5, "far below a level, 2 / 255"
    tone = tone_jitter(images, brightness=0, contrast=0, saturation=0, generator=seeded())
    assert (tone - images).abs().max() < 1e-6
    sharp = random_blur(images, blur_px=1e-6, generator=seeded())
    assert torch.equal(sharp, images)


def test_stains_vary_as_in_a_slow_version() -> None:
    images, generator = batch(), seeded()
    result = hed_jitter(images, gain=0.3, shift=0.02, generator=seeded())
    gain = 1 + 0.3 * (2 * torch.rand(3, 3, generator=generator).double().numpy() - 1)
    shift = 0.02 * (2 * torch.rand(3, 3, generator=generator).double().numpy() - 1)
    stains = np.array(STAINS) / np.linalg.norm(STAINS, axis=1, keepdims=True)
    for k in range(3):
        density = density_of(images[k]).double().numpy().reshape(3, -1).T
        amounts = density @ np.linalg.inv(stains) * gain[k] + shift[k]
        light = 256 * np.exp(-np.maximum(amounts @ stains, 0)) - 1
        expected = (light / 127.5 - 1).clip(-1, 1).T.reshape(3, 24, 24)
        assert np.abs(result[k].numpy() - expected).max() < 1e-4


def test_pure_haematoxylin_stays_haematoxylin_and_glass_stays_white() -> None:
    stain = torch.tensor(STAINS[0]) / torch.tensor(STAINS[0]).norm()
    pixel = (256 * torch.exp(-0.8 * stain) - 1) / 127.5 - 1
    images = torch.stack([pixel, torch.ones(3)]).view(2, 3, 1, 1).expand(2, 3, 4, 4)
    result = hed_jitter(images, gain=0.4, shift=0.0, generator=seeded())
    density = density_of(result)[0, :, 0, 0]
    assert float(density @ stain / density.norm()) == pytest.approx(1, abs=1e-5)
    assert abs(float(density.norm()) - 0.8) > 0.01
    assert result[1] == pytest.approx(images[1], abs=1e-4)


def test_tone_does_what_it_says() -> None:
    images = batch(8) * 0.5
    light = (images + 1) / 2
    bright = (varied(images, brightness=0.3) + 1) / 2 / light
    assert bright.flatten(1).std(1).max() < 1e-4
    flat = varied(images, contrast=0.5)
    ratio = flat.std((1, 2, 3)) / images.std((1, 2, 3))
    assert 0.5 < ratio.min() < ratio.max() < 1.5
    grey = images.mean(1, keepdim=True).expand_as(images)
    assert varied(grey, saturation=0.9) == pytest.approx(grey, abs=1e-5)
    assert (varied(images, saturation=0.9) - images).abs().max() > 0.05


def test_half_are_blurred_as_scipy_blurs() -> None:
    images, generator = batch(40), seeded()
    result = random_blur(images, blur_px=1.5, generator=seeded())
    chosen = torch.rand(40, 1, generator=generator) < 0.5
    sigmas = torch.rand(40, 1, generator=generator) * 1.5
    assert 10 < int(chosen.sum()) < 30
    for image, blurred, yes, sigma in zip(images, result, chosen, sigmas, strict=True):
        if not yes:
            assert torch.equal(image, blurred)
            continue
        s = float(sigma)
        slow = ndimage.gaussian_filter(image.numpy(), (0, s, s), mode="nearest", radius=5)
        assert np.abs(blurred.numpy() - slow).max() < 1e-5


@pytest.mark.parametrize(
    "change",
    [
        {"hed_gain": 1.0},
        {"hed_shift": -0.1},
        {"brightness": 1.5},
        {"contrast": -0.1},
        {"saturation": -0.5},
        {"blur_px": 99.0},
        {"stain_shift": -1.0},
    ],
)
def test_impossible_strengths(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"augment\.{next(iter(change))}: must be from 0"):
        from_mapping(AugmentConfig, change, "augment")
