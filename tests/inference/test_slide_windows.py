"""Slides are gone through in other windows than the checkpoint's, with the same weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from wsiseg import load_model, open_slide, predict_slide
from wsiseg.classes import Classes, TissueClass
from wsiseg.cli.predict import command
from wsiseg.geometry import Grid, Point, Size
from wsiseg.inference.job import PredictOptions, prepare
from wsiseg.inference.runtime import to_openvino
from wsiseg.inference.slide_windows import for_slides
from wsiseg.models.base import FeatureExtractor, Features, FeatureSpec, Head, lay_out
from wsiseg.models.checkpoint import save_checkpoint
from wsiseg.models.registry import ModelConfig, build_segmenter
from wsiseg.models.segmenter import ModelInfo, Segmenter
from wsiseg.models.views import ViewedSegmenter
from wsiseg.slides.phantom import write_phantom

CLASSES = Classes(
    (TissueClass("Other", (9, 9, 9), background=True), TissueClass("Gland", (0, 99, 0)))
)

RESNET = {"name": "cnn", "channels": [4, 4, 4, 4], "strides": [4, 8], "tile_px": 64}
VGG = {
    "name": "cnn",
    "arch": "vgg16_bn",
    "channels": [4, 4, 8, 8, 8],
    "strides": [8, 16, 32],
    "pooled": True,
    "tile_px": 64,
}


def convolutional(tile_px: int, window_px: int | None = None, **more: Any) -> Segmenter:
    torch.manual_seed(0)
    config = ModelConfig(
        extractor={**RESNET, "tile_px": tile_px},
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


def test_two_by_two_tiles_become_windows_of_one() -> None:
    segmenter = load_model("glas-small", device="cpu")
    found = for_slides(segmenter)
    assert (segmenter.info.window_px, segmenter.info.tile_px) == (768, 384)
    assert (found.info.window_px, found.info.tile_px) == (384, 384)
    assert found.info.config == {**segmenter.info.config, "window_px": 384}
    assert found.extractor is segmenter.extractor
    assert found.head is segmenter.head
    assert for_slides(found) is found
    put_together = Segmenter(segmenter.extractor, segmenter.head, replace(found.info, config={}))
    put_together.info = replace(put_together.info, window_px=768)
    assert for_slides(put_together).info == replace(put_together.info, window_px=384)
    assert for_slides(convolutional(96, 192)).info.window_px == 768  # of one tile, then larger


@pytest.mark.parametrize(
    "segmenter",
    [load_model("stain-threshold", device="cpu"), convolutional(768), convolutional(96, 288)],
)
def test_others_stay_as_they_are(segmenter: Segmenter) -> None:
    assert for_slides(segmenter) is segmenter


class Tone(FeatureExtractor):
    """The mean colour of each pixel, made brighter or darker tile by tile."""

    specs = (FeatureSpec(1, 1),)
    tile_px = 32

    def forward(self, images: Tensor, places: Sequence[Point], seed: int) -> Features:
        signs = [1.0 if (p.x // 32 + p.y // 32) % 2 else -1.0 for p in places]
        return (images.mean(1, keepdim=True) + torch.tensor(signs)[:, None, None, None],)


class Darkness(Head):
    """Gland where it is dark."""

    class_count = 2

    def forward(self, features: Features) -> Tensor:
        z = lay_out(features[0])
        return torch.cat((z, -z), dim=1)


def test_what_tiles_do_not_agree_on_is_blended_away(tmp_path: Path) -> None:
    path = tmp_path / "white.tif"
    PIL.Image.new("RGB", (320, 320), (255, 255, 255)).save(path)
    info = ModelInfo("tone", "0" * 64, CLASSES, 1.0, 64, 32, licence="none")
    segmenter = Segmenter(Tone(), Darkness(), info)
    with open_slide(path, mpp=1.0) as slide:
        canvas = predict_slide(slide, segmenter, tmp_path / "canvas", options=PredictOptions())
    confidences = canvas.confidence(canvas.grid.box).astype(int)
    parameters = canvas.record["parameters"]
    assert [parameters[k] for k in ("window_px", "tile_px", "overlap_px")] == [32, 32, 10]
    steps = max(int(np.abs(np.diff(confidences, axis=a)).max()) for a in (0, 1))
    assert 0 < steps < 30  # of 255; 122 at once in windows of 2 x 2 tiles


@pytest.mark.parametrize("tta", [False, True])
def test_batch_norms_are_folded_on_slides(tta: bool) -> None:
    own = convolutional(96)
    grid = Grid.at_mpp(Size(400, 300), 1.0, 1.0)
    engine = prepare(grid, for_slides(own), options=PredictOptions(tta=tta)).engine
    assert any(isinstance(m, torch.nn.BatchNorm2d) for m in own.modules())
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in engine.segmenter.modules())


def test_what_is_compiled_keeps_the_windows_that_it_is_compiled_for(tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason="OpenVINO is not installed")
    path = tmp_path / "slide.tif"
    write_phantom(path, Size(400, 300), mpp=1.0)
    compiled = to_openvino(convolutional(64, 128).eval(), precision="fp32")
    assert for_slides(compiled) is compiled
    with open_slide(path) as slide:
        canvas = predict_slide(slide, compiled, tmp_path / "canvas", options=PredictOptions())
    assert canvas.record["parameters"]["window_px"] == 128


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


@pytest.mark.parametrize(
    ("extractor", "head"),
    [
        (RESNET, {"name": "fcn", "widths": [8, 8, 8]}),
        (RESNET, {"name": "unet", "widths": [8, 8]}),
        (RESNET, {"name": "pixel_mlp", "members": 2, "widths": [4, 4]}),
        (VGG, {"name": "fcn8", "fc_width": 8}),
    ],
)
def test_every_head_gives_its_larger_window(
    extractor: dict[str, Any], head: dict[str, Any]
) -> None:
    config = ModelConfig(extractor=extractor, head=head, classes=CLASSES, window_px=64)
    found = for_slides(build_segmenter(config))
    assert found.info.window_px == 768
    with torch.inference_mode():
        values, _ = found.judge(found.features(torch.zeros(1, 3, 768, 768), [Point(0, 0)], 0))
    assert values.shape == (1, 2, 768, 768)
    assert not any(p.requires_grad for p in found.parameters())


def test_a_segmenter_of_another_kind_stays() -> None:
    own = convolutional(96)
    views = ViewedSegmenter(own)
    assert for_slides(views) is views
    put_together = Segmenter(own.extractor, own.head, replace(own.info, config={}))
    assert for_slides(put_together) is put_together


def test_predict_says_the_larger_window(tmp_path: Path) -> None:
    path, model = tmp_path / "slide.tif", tmp_path / "own.safetensors"
    write_phantom(path, Size(1000, 800), mpp=1.0)
    save_checkpoint(model, convolutional(96), card={}, licence="CC0-1.0")
    words = [path, "--model", model, "--out", tmp_path / "out", "--dry-run"]
    result = CliRunner().invoke(command, [str(w) for w in words])
    assert result.exit_code == 0, result.output
    assert "of 768 px" in result.output
