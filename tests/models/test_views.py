"""Test-time augmentation against views made by hand, and its being blind to flips and turns."""

from __future__ import annotations

import pytest
import torch
from tiny_models import CLASSES, EXTRACTORS
from torch import Tensor

from wsiseg.geometry import Point
from wsiseg.models.registry import ModelConfig, build_segmenter
from wsiseg.models.segmenter import Segmenter
from wsiseg.models.views import VIEWS, ViewedSegmenter, seen, unseen


def model(name: str, head: str, *, border: bool = False) -> Segmenter:
    torch.manual_seed(0)
    described = {"name": head} | ({"widths": [8, 8, 8]} if head == "fcn" else {"widths": [8]})
    config = ModelConfig(
        extractor=EXTRACTORS[name],
        head=described,
        classes=CLASSES,
        window_px=64,
        border=border,
        temperature=2.0,
    )
    return build_segmenter(config).eval()


def by_hand(own: Segmenter, images: Tensor) -> Tensor:
    """Whole windows flipped and turned before they are cut into tiles."""
    total = torch.zeros(())
    for view in range(VIEWS):
        turned = images.flip(3) if view >= 4 else images
        turned = torch.rot90(turned, view % 4, (2, 3))
        found = own.probabilities(turned, [Point(0, 0)] * len(images))
        found = torch.rot90(found, -(view % 4), (2, 3))
        total = total + (found.flip(3) if view >= 4 else found)
    return total / VIEWS


@pytest.mark.parametrize("border", [False, True])
def test_views_are_those_of_the_whole_window(border: bool) -> None:
    own = model("genselfdiff", "fcn", border=border)  # without noise
    images = torch.rand(2, 3, 64, 96) * 2 - 1
    with torch.inference_mode():
        found = ViewedSegmenter(own).probabilities(images, [Point(0, 0)] * 2)
        expected = by_hand(own, images)
        assert found.shape == (2, 2 + border, 64, 96)
        assert torch.allclose(found, expected, atol=1e-5)
        assert not torch.allclose(found, own.probabilities(images, [Point(0, 0)] * 2), atol=1e-3)
        mirrored = ViewedSegmenter(own).probabilities(images.flip(3), [Point(0, 0)] * 2)
        assert torch.allclose(mirrored.flip(3), found, atol=1e-5)


def test_specs_say_what_is_kept() -> None:
    viewed = ViewedSegmenter(model("pathsegdiff", "fcn"))
    with torch.inference_mode():
        maps = viewed.tile_features(torch.zeros(1, 3, 32, 32), [Point(0, 0)], 0)
    assert [(m.shape[1], 32 // m.shape[2]) for m in maps] == [tuple(s) for s in viewed.map_specs]


@pytest.mark.parametrize("view", range(VIEWS))
def test_unseen_undoes_seen(view: int) -> None:
    values = torch.arange(24.0).reshape(1, 1, 4, 6)
    assert torch.equal(unseen(seen(values, view, (2, 3)), view, (2, 3)), values)
