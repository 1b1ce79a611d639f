from __future__ import annotations

import tracemalloc
from dataclasses import replace
from typing import Any

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


def slow_patch(
    image: np.ndarray,
    mask: np.ndarray,
    size: tuple[int, int],
    *,
    rng: np.random.Generator,
    config: AugmentConfig,
) -> tuple[np.ndarray, np.ndarray]:
    """`random_patch` of the whole image, mirrored at all sides."""
    height, width = size
    factor = float(np.exp(rng.uniform(*np.log(config.scale))))
    angle = rng.uniform(0, 2 * np.pi) if config.rotate else rng.integers(4) * np.pi / 2
    flip = -1.0 if rng.random() < 0.5 else 1.0
    cos, sin = np.cos(angle) / factor, np.sin(angle) / factor
    reach = int(np.ceil(np.hypot(height, width) / 2 / factor + 2 * config.elastic_px / factor)) + 2
    halves = [min(n / factor, extent) / 2 for n, extent in zip(size, image.shape, strict=False)]
    cx = float(rng.uniform(halves[1], image.shape[1] - halves[1])) + reach
    cy = float(rng.uniform(halves[0], image.shape[0] - halves[0])) + reach
    a, b, d, e = cos * flip, -sin, sin * flip, cos
    x0, y0 = cx - a * width / 2 - b * height / 2, cy - d * width / 2 - e * height / 2
    pad = ((reach, reach), (reach, reach))
    sheet = Image.fromarray(np.pad(image, (*pad, (0, 0)), mode="symmetric"))
    labels = Image.fromarray(np.pad(mask, pad, mode="symmetric"))
    how: Any = Image.Transform.AFFINE
    data: Any = (a, b, x0, d, e, y0)
    if config.elastic_px:
        how = Image.Transform.MESH
        data = _net(size, np.array(data).reshape(2, 3), rng, shift_px=config.elastic_px)
    patch = sheet.transform((width, height), how, data, Image.Resampling.BILINEAR)
    target = labels.transform((width, height), how, data, Image.Resampling.NEAREST)
    return np.asarray(patch), np.asarray(target)


@pytest.mark.parametrize("elastic_px", [0.0, 6.0, 16.0])
@pytest.mark.parametrize("rotate", [True, False])
@pytest.mark.parametrize("scale", [(0.8, 1.25), (1.0, 1.0), (0.5, 0.5), (0.2, 4.0)])
def test_patches_are_those_of_the_whole_mirrored_image(
    scale: tuple[float, float], rotate: bool, elastic_px: float
) -> None:
    config = AugmentConfig(scale=scale, rotate=rotate, elastic_px=elastic_px)
    draw = np.random.default_rng(0)
    shapes = [(64, 64), (128, 128), (500, 400), (33, 700), (900, 20), (1, 1), (5, 300), (129, 64)]
    for shape in shapes:
        image = draw.integers(0, 256, (*shape, 3), dtype=np.uint8)
        mask = draw.integers(0, 256, shape, dtype=np.uint8)
        for size in ((64, 64), (96, 31)):
            for seed in range(3):
                fast, slow = (np.random.default_rng(seed) for _ in range(2))
                patch, target = random_patch(image, mask, size, rng=fast, config=config)
                wanted, labels = slow_patch(image, mask, size, rng=slow, config=config)
                assert np.array_equal(patch, wanted), (shape, size, seed)
                assert np.array_equal(target, labels), (shape, size, seed)
                assert fast.random() == slow.random()


def test_a_patch_of_a_large_image_takes_the_memory_of_a_patch() -> None:
    image, mask = np.zeros((2000, 2000, 3), np.uint8), np.zeros((2000, 2000), np.uint8)
    rng = np.random.default_rng(0)
    tracemalloc.start()
    try:
        for _ in range(5):
            random_patch(image, mask, (64, 64), rng=rng, config=AugmentConfig())
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 1_000_000


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
