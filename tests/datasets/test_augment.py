from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from wsiseg.datasets.augment import (
    AugmentConfig,
    at_mpp,
    random_crop,
    random_patch,
    stain_jitter,
)


def test_patch_and_mask_move_together() -> None:
    yy, xx = np.mgrid[:200, :300]
    mask = ((xx - 150) ** 2 + (yy - 100) ** 2 < 60**2).astype(np.uint8)
    image = np.repeat(mask[..., None] * np.uint8(200), 3, axis=2)
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(20):
        patch, target = random_patch(image, mask, (64, 128), rng=rng, config=AugmentConfig())
        assert patch.shape == (64, 128, 3)
        assert target.shape == (64, 128)
        assert ((patch[..., 0] > 100) != (target > 0)).mean() < 0.02
        seen.add(int(target.sum()))
    assert len(seen) > 10


def test_patches_larger_than_the_image_are_mirrored() -> None:
    image = np.random.default_rng(0).integers(50, 200, (40, 60, 3), dtype=np.uint8)
    patch, _ = random_patch(
        image,
        np.zeros((40, 60), np.uint8),
        (256, 256),
        rng=np.random.default_rng(1),
        config=AugmentConfig(scale=(1.0, 1.0), rotate=False),
    )
    assert patch.min() >= 50
    assert patch.max() < 200


def test_patch_without_variation_is_a_cut_of_the_image() -> None:
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    mask = (image[..., 0] > 99).astype(np.uint8)
    config = AugmentConfig(scale=(1.0, 1.0), rotate=False)
    turns = {np.rot90(m, k).tobytes() for m in (mask, mask[:, ::-1]) for k in range(4)}
    for seed in range(6):
        rng = np.random.default_rng(seed)
        _, target = random_patch(image, mask, (64, 64), rng=rng, config=config)
        assert target.tobytes() in turns


def test_crops_fit_small_images() -> None:
    image = Image.fromarray(np.full((50, 90, 3), 77, np.uint8))
    crop = random_crop(image, 128, np.random.default_rng(0), scale=(0.5, 1.0))
    assert crop.shape == (128, 128, 3)
    assert set(np.unique(crop)) == {77}


def test_scaling_to_a_resolution() -> None:
    image, mask = at_mpp(np.full((100, 60, 3), 9, np.uint8), np.ones((100, 60), np.uint8), 0.5)
    assert image.shape == (50, 30, 3)
    assert mask.shape == (50, 30)
    assert mask.min() == 1


def test_stain_jitter_changes_colour_but_not_glass() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.stack([torch.full((3, 4, 4), 1.0), torch.full((3, 4, 4), 0.2)])
    config = AugmentConfig(stain_gain=0.3, stain_shift=0.0)
    varied = stain_jitter(images, config, generator)
    assert varied[0] == pytest.approx(images[0], abs=0.02)
    assert (varied[1] - images[1]).abs().max() > 0.02
    assert varied.abs().max() <= 1
    none = AugmentConfig(stain_gain=0.0, stain_shift=0.0)
    assert torch.equal(stain_jitter(images, none, generator), images)
