"""Whole images through overlapping windows: places, weights, against one window."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from wsiseg.geometry import Point
from wsiseg.models.base import Features
from wsiseg.models.checkpoint import load_model
from wsiseg.models.registry import ModelConfig, build_segmenter
from wsiseg.models.segmenter import Segmenter
from wsiseg.stain import StainBasis
from wsiseg.training import sliding
from wsiseg.training.sliding import predict_image, starts

CLASSES = [
    {"name": "light", "color": [200, 200, 200], "background": True},
    {"name": "dark", "color": [0, 0, 0]},
]


def stain_model(tile_px: int, window_px: int, **changes: object) -> Segmenter:
    config = ModelConfig(
        extractor={"name": "stain", "tile_px": tile_px, "smooth_px": 1},
        head={"name": "threshold"},
        classes=CLASSES,
        mpp=1.0,
        window_px=window_px,
        **changes,  # type: ignore[arg-type]
    )
    return build_segmenter(config)


def noise_image(height: int, width: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return np.random.default_rng(0).integers(30, 255, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("length", "window", "tile", "expected"),
    [
        (768, 768, 256, [0]),
        (1024, 768, 256, [0, 256]),
        (1536, 768, 256, [0, 256, 512, 768]),
        (512, 256, 256, [0, 128, 256]),
        (300, 256, 1, [0, 44]),
    ],
)
def test_windows_begin_on_the_tile_grid_and_end_at_the_end(
    length: int, window: int, tile: int, expected: list[int]
) -> None:
    assert starts(length, window, tile) == expected


def test_a_model_of_single_pixels_gives_the_same_in_any_windows() -> None:
    image = noise_image(150, 210)
    whole = predict_image(stain_model(32, 256), image, ratio=1.0).probabilities
    for tile, window in ((32, 64), (32, 96), (64, 64), (16, 32)):
        cut = predict_image(stain_model(tile, window), image, ratio=1.0).probabilities
        assert np.abs(cut - whole).max() < 1e-5
    assert whole.shape == (2, 150, 210)
    assert whole.dtype == np.float32
    assert np.allclose(whole.sum(0), 1, atol=1e-5)


def test_tiles_know_their_place_and_are_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    model, places = stain_model(32, 64), []

    def note(self: Segmenter, images: Tensor, at: Sequence[Point], seed: int) -> Features:
        places.extend((tuple(p), seed) for p in at)
        return plain(self, images, at, seed)

    plain = Segmenter.tile_features
    monkeypatch.setattr(Segmenter, "tile_features", note)
    predict_image(model, noise_image(128, 90), ratio=1.0, seeds=(3, 5))
    grid = [(x, y) for y in range(0, 128, 32) for x in range(0, 96, 32)]
    assert sorted(places) == sorted((p, seed) for seed in (3, 5) for p in grid)  # each tile once


def test_seeds_are_averaged() -> None:
    own = load_model("glas-small", device="cpu")
    extractor = {**own.info.config["extractor"], "timesteps": [50]}
    model = build_segmenter(ModelConfig(**{**own.info.config, "extractor": extractor})).eval()
    model.load_state_dict(own.state_dict(), strict=False)  # its file has no decoder of pixels
    image = noise_image(120, 130)
    one, two, both = (
        predict_image(model, image, ratio=1.0, seeds=s).probabilities for s in ((0,), (1,), (0, 1))
    )
    assert np.abs(one - two).max() > 1e-5
    assert np.abs((one + two) / 2 - both).max() < 1e-6


def test_stretched_images_come_back_at_their_size() -> None:
    model = stain_model(32, 64, resize_px=64)
    image = np.full((90, 200, 3), 240, np.uint8)
    image[30:60, 50:150] = (70, 40, 130)
    dark = predict_image(model, image, ratio=7.0).probabilities[1] > 0.5  # the ratio has no part
    y, x = (float(v.mean()) for v in np.nonzero(dark))
    assert dark.shape == (90, 200)
    assert abs(y - 44.5) < 2
    assert abs(x - 99.5) < 2


def test_stains_are_normalised_first() -> None:
    rng = np.random.default_rng(0)
    amounts = rng.gamma(2.0, 0.3, (96, 96, 2))
    vectors = np.array([(0.6, 0.74, 0.3), (0.09, 0.93, 0.35)])
    image = (255 * np.exp(-amounts @ vectors)).clip(0, 255).astype(np.uint8)
    target = StainBasis(((0.64, 0.72, 0.268), (0.0, 0.96, 0.28)), (1.5, 1.2))
    plain = predict_image(stain_model(32, 96), image, ratio=1.0).probabilities
    model = stain_model(32, 96, stain_target=target)
    assert np.abs(predict_image(model, image, ratio=1.0).probabilities - plain).max() > 0.05


def test_an_ensemble_says_how_unsure_it_is() -> None:
    torch.manual_seed(0)
    config = ModelConfig(
        extractor={"name": "stain", "tile_px": 32},
        head={"name": "pixel_mlp", "members": 3, "widths": [8, 4]},
        classes=CLASSES,
        mpp=1.0,
        window_px=32,
    )
    model = build_segmenter(config).eval()
    prediction = predict_image(model, noise_image(50, 40), ratio=1.0, tta=True)
    assert prediction.uncertainty is not None
    assert prediction.uncertainty.shape == (50, 40)
    assert 0 <= prediction.uncertainty.min() <= prediction.uncertainty.max() <= 1
    assert prediction.probabilities.shape == (2, 50, 40)


def test_maps_of_seeds_are_added_up_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[Tensor]] = []
    several = []

    def windows(_: Segmenter, image: np.ndarray, seed: int) -> Tensor:
        several.append(sum(kept() is not None for kept in made))
        maps = torch.full((2, *image.shape[:2]), float(seed))
        made.append(weakref.ref(maps))
        return maps

    monkeypatch.setattr(sliding, "_windows", windows)
    seeds = (1, 2, 3, 6)
    found = predict_image(stain_model(32, 64), noise_image(50, 70), ratio=1.0, seeds=seeds)
    assert max(several) == 1
    assert found.probabilities.shape == (2, 50, 70)
    assert (found.probabilities == 3).all()
