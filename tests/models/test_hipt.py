"""HIPT's tokens as a map, and its weights out of a PathSegDiff extractor."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import tiny_extractor

from wsiseg.errors import ConfigError, ModelError
from wsiseg.geometry import Point
from wsiseg.models.checkpoint import load_extractor, save_extractor
from wsiseg.models.extractors.hipt import HIPTConfig, HIPTExtractor, from_pathsegdiff
from wsiseg.models.extractors.pathsegdiff import PathSegDiffExtractor
from wsiseg.models.extractors.vit import ViTConfig
from wsiseg.models.registry import extractor_mapping, extractor_skeleton

PLACES = [Point(0, 0), Point(0, 0)]


def images() -> torch.Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_full_size() -> None:
    extractor = extractor_skeleton({"name": "hipt"})
    assert sum(p.numel() for p in extractor.parameters()) == 21_665_664
    assert [tuple(s) for s in extractor.specs] == [(384, 16)]
    assert extractor.tile_px == 256


@torch.inference_mode()
def test_tokens_lie_in_their_places() -> None:
    extractor = tiny_extractor("hipt")
    assert isinstance(extractor, HIPTExtractor)
    (found,) = extractor(images(), PLACES, 0)
    tokens = extractor.encoder.tokens(images())
    assert found.shape == (2, 64, 2, 2)
    for y in range(2):
        for x in range(2):
            assert torch.equal(found[:, :, y, x], tokens[:, 1 + 2 * y + x])


@torch.inference_mode()
def test_a_changed_patch_changes_its_own_token_most() -> None:
    extractor = tiny_extractor("hipt")
    changed = images()
    changed[:, :, 16:, :16] *= -1
    difference = (extractor(changed, PLACES, 0)[0] - extractor(images(), PLACES, 0)[0]).norm(dim=1)
    assert difference.flatten(1).argmax(1).tolist() == [2, 2]


@torch.inference_mode()
def test_the_encoder_of_a_pathsegdiff_file(tmp_path: Path) -> None:
    save_extractor(tmp_path / "x.safetensors", tiny_extractor(), card={}, licence="CC0-1.0")
    source = load_extractor(tmp_path / "x.safetensors", device="cpu")
    assert isinstance(source, PathSegDiffExtractor)
    found = from_pathsegdiff(source)
    assert extractor_mapping(found)["encoder"] == extractor_mapping(source)["encoder"]
    assert found.tile_px == 32
    assert not found.training
    assert not any(p.requires_grad for p in found.parameters())
    (maps,) = found(images(), PLACES, 0)
    assert torch.equal(maps.flatten(2).transpose(1, 2), source.encoder.tokens(images())[:, 1:])
    for ours in found.parameters():
        ours.zero_()
    assert any(p.abs().sum() > 0 for p in source.encoder.parameters())


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ModelError, match="StainExtractor: holds no HIPT encoder"):
        from_pathsegdiff(tiny_extractor("stain"))
    with pytest.raises(ConfigError, match="tile_px 40: must be a multiple of patch_px 16"):
        HIPTConfig(ViTConfig(dim=64, heads=1), tile_px=40)
