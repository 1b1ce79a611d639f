from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from wsiseg.datasets.augment import (
    AugmentConfig,
    _net,
    at_mpp,
    random_crop,
    random_patch,
    stain_jitter,
)
from wsiseg.errors import ConfigError


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


def test_elastic_deformation_moves_patch_and_mask_together_and_nothing_far() -> None:
    yy, xx = np.mgrid[:200, :300]
    mask = ((yy // 25 + xx // 25) % 2).astype(np.uint8)
    image = np.repeat(mask[..., None] * np.uint8(200), 3, axis=2)
    still = AugmentConfig(scale=(1.0, 1.0), rotate=False)
    for seed in range(5):
        patches = [
            random_patch(image, mask, (128, 192), rng=np.random.default_rng(seed), config=config)
            for config in (still, replace(still, elastic_px=6.0))
        ]
        (_, before), (moved, after) = patches
        assert ((moved[..., 0] > 100) != (after > 0)).mean() < 0.02
        differing = (before != after).astype(bool)
        assert 0.05 < differing.mean() < 0.6
        # A pixel's new label lies within the largest shift of where it was.
        near = ndimage.maximum_filter(before, 19), ndimage.minimum_filter(before, 19)
        inner = np.s_[10:-10, 10:-10]
        assert (after[inner] <= near[0][inner]).all()
        assert (after[inner] >= near[1][inner]).all()


def test_the_net_without_shifts_is_the_affine_map() -> None:
    rng = np.random.default_rng(0)
    matrix = np.array([[0.8, 0.3, 5.0], [-0.3, 0.8, 40.0]])
    image = Image.fromarray(rng.integers(0, 256, (200, 200), dtype=np.uint8))
    net = _net((100, 150), matrix, rng, shift_px=0.0)
    boxes = np.zeros((100, 150), int)
    for (left, top, right, bottom), _ in net:
        boxes[top:bottom, left:right] += 1
    assert (boxes == 1).all()
    size, nearest = (150, 100), Image.Resampling.NEAREST
    found = np.asarray(image.transform(size, Image.Transform.MESH, net, nearest))
    wanted = np.asarray(
        image.transform(size, Image.Transform.AFFINE, tuple(matrix.ravel()), nearest)
    )
    assert (found != wanted).mean() < 0.01


def test_elastic_deformation_has_a_limit() -> None:
    with pytest.raises(ConfigError, match="elastic_px"):
        AugmentConfig(elastic_px=40.0)


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
