"""Convolutional networks go through slides in larger windows, with the weights they have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from wsiseg import load_model, open_slide, predict_slide
from wsiseg.classes import Classes, TissueClass
from wsiseg.geometry import Point, Size
from wsiseg.inference.job import PredictOptions
from wsiseg.inference.slide_windows import for_slides
from wsiseg.models.registry import ModelConfig, build_segmenter
from wsiseg.models.segmenter import Segmenter
from wsiseg.slides.phantom import write_phantom

CLASSES = Classes(
    (TissueClass("Other", (9, 9, 9), background=True), TissueClass("Gland", (0, 99, 0)))
)


def convolutional(tile_px: int, window_px: int | None = None, **more: Any) -> Segmenter:
    torch.manual_seed(0)
    extractor = {"name": "cnn", "channels": [4, 4, 4, 4], "strides": [4, 8], "tile_px": tile_px}
    config = ModelConfig(
        extractor=extractor,
        head={"name": "unet", "widths": [8]},
        classes=CLASSES,
        mpp=1.0,
        window_px=window_px or tile_px,
        **more,
    )
    return build_segmenter(config, info={"name": "own", "sha256": "ab", "card": {"use": "x"}})


@pytest.mark.parametrize(("trained", "on_slides"), [(96, 768), (384, 768), (320, 960), (736, 1472)])
def test_small_windows_grow_and_weights_stay(trained: int, on_slides: int) -> None:
    segmenter = convolutional(trained).train()
    found = for_slides(segmenter)
    assert (found.info.window_px, found.info.tile_px) == (on_slides, on_slides)
    assert found.extractor.tile_px == on_slides
    own = segmenter.state_dict()
    assert {k: v.data_ptr() for k, v in found.state_dict().items()} == {
        k: v.data_ptr() for k, v in own.items()
    }
    assert not found.training
    assert (found.info.name, found.info.sha256, found.info.card) == ("own", "ab", {"use": "x"})
    assert for_slides(found) is found


def test_far_from_borders_the_outputs_are_those_of_the_small_window() -> None:
    segmenter = convolutional(640).eval()
    found = for_slides(segmenter)
    images = torch.rand(1, 3, 1280, 1280) * 2 - 1
    with torch.inference_mode():
        large = found.probabilities(images, [Point(0, 0)])
        small = segmenter.probabilities(images[..., 320:960, 320:960], [Point(0, 0)])
    middle = slice(304, 336)
    torch.testing.assert_close(
        large[..., 624:656, 624:656], small[..., middle, middle], rtol=0, atol=1e-5
    )


def test_what_is_trained_on_stretched_images_has_no_square_on_slides() -> None:
    assert for_slides(convolutional(256, resize_px=256)).info.window_px == 768


@pytest.mark.parametrize("name", ["glas-small", "stain-threshold"])
def test_others_stay_as_they_are(name: str) -> None:
    segmenter = load_model(name, device="cpu")
    assert for_slides(segmenter) is segmenter


@pytest.mark.parametrize("segmenter", [convolutional(768), convolutional(96, 192)])
def test_large_windows_and_those_of_several_tiles_stay(segmenter: Segmenter) -> None:
    assert for_slides(segmenter) is segmenter


def test_a_slide_is_gone_through_in_the_larger_window(tmp_path: Path) -> None:
    path = tmp_path / "slide.tif"
    write_phantom(path, Size(1000, 800), mpp=1.0)
    with open_slide(path) as slide:
        a, b = (
            predict_slide(slide, segmenter, tmp_path / name, options=PredictOptions())
            for name, segmenter in (
                ("a", convolutional(96)),
                ("b", for_slides(convolutional(96))),
            )
        )
    parameters = a.record["parameters"]
    assert [parameters[k] for k in ("window_px", "tile_px", "overlap_px")] == [768, 768, 256]
    assert np.array_equal(a.labels(a.grid.box), b.labels(b.grid.box))
