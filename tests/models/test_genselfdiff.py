"""GenSelfDiff's network: the published count, its parts against definitions, what is trained."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_models import tiny_extractor

from wsiseg.errors import ConfigError, ModelError
from wsiseg.geometry import Point
from wsiseg.models.extractors.genselfdiff import (
    Attention,
    GenSelfDiffConfig,
    GenSelfDiffExtractor,
    LinearAttention,
    ResidualBlock,
    embed_time,
)
from wsiseg.models.registry import extractor_skeleton


def tiny() -> GenSelfDiffExtractor:
    extractor = tiny_extractor("genselfdiff")
    assert isinstance(extractor, GenSelfDiffExtractor)
    return extractor


def images(count: int = 2, side: int = 32) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_the_published_number_of_parameters() -> None:
    full = extractor_skeleton({"name": "genselfdiff"}, whole=False)
    last = 64 * 2 + 2
    assert sum(p.numel() for p in full.parameters()) + last == 31_267_018
    assert [tuple(s) for s in full.specs] == [(64, 1)]
    whole = extractor_skeleton({"name": "genselfdiff"})
    assert sum(p.numel() for p in whole.parameters()) + last == 31_267_018 + 64 * 3 + 3


@torch.inference_mode()
def test_the_image_goes_in_without_noise_at_the_timestep() -> None:
    extractor = tiny()
    found = extractor(images(), [Point(0, 0), Point(32, 0)], 3)[0]
    steps = torch.zeros(2, dtype=torch.long)
    assert torch.equal(found, extractor.unet(images(), steps))
    assert not torch.allclose(found, extractor.unet(images(), steps + 500), atol=1e-3)
    late = GenSelfDiffExtractor(GenSelfDiffConfig(8, (1, 2), 4, timestep=500, tile_px=32)).eval()
    late.load_state_dict(extractor.state_dict())
    assert torch.equal(late(images(), [Point(0, 0)] * 2, 0)[0], late.unet(images(), steps + 500))


@torch.inference_mode()
def test_noise_is_a_convolution_of_the_map() -> None:
    extractor = tiny()
    steps = torch.tensor([0, 700])
    found = extractor.predict_noise(images(), steps)
    assert found.shape == (2, 3, 32, 32)
    assert extractor.noise is not None
    weight = extractor.noise.weight[:, :, 0, 0]
    expected = torch.einsum("oc,bchw->bohw", weight, extractor.unet(images(), steps))
    expected = expected + extractor.noise.bias[:, None, None]
    assert torch.allclose(found, expected, atol=1e-5)
    alone = extractor.predict_noise(images()[1:], steps[1:])
    assert torch.allclose(found[1:], alone, atol=1e-5)


def test_a_segmenter_goes_without_the_noise_convolution() -> None:
    extractor = tiny()
    before = set(extractor.state_dict())
    extractor.drop_decoder()
    assert before - set(extractor.state_dict()) == {"noise.weight", "noise.bias"}
    assert extractor(images(), [Point(0, 0)] * 2, 0)[0].shape == (2, 8, 32, 32)
    with pytest.raises(ModelError, match="genselfdiff: this file is for prediction"):
        extractor.predict_noise(images(), torch.zeros(2, dtype=torch.long))


def test_what_can_be_trained() -> None:
    extractor = tiny()
    names = {id(p): n for n, p in extractor.named_parameters()}
    assert extractor.trainable("none") == []
    everything = {names[id(p)] for p in extractor.trainable("all")}
    assert everything == {n for n in names.values() if not n.startswith("noise.")}
    decoder = {names[id(p)].split(".")[1] for p in extractor.trainable("decoder")}
    assert decoder == {"ups", "last"}
    extractor.requires_grad_(True)
    extractor(images(), [Point(0, 0)] * 2, 0)[0].square().sum().backward()
    assert all(p.grad is not None for p in extractor.trainable("all"))


@torch.inference_mode()
def test_full_attention_by_its_definition() -> None:
    torch.manual_seed(0)
    layer, x = Attention(12), torch.randn(2, 12, 4, 6)
    q, k, v = (t.view(2, 4, 32, 24) for t in layer.qkv(x).split(128, dim=1))
    mixed = torch.zeros(2, 4, 32, 24)
    for place in range(24):
        scores = (q[..., place, None] * k).sum(2) / math.sqrt(32)
        mixed[..., place] = (scores.softmax(-1)[:, :, None] * v).sum(-1)
    expected = layer.out(mixed.view(2, 128, 4, 6))
    assert torch.allclose(layer(x), expected, atol=1e-5)


@torch.inference_mode()
def test_linear_attention_by_its_definition() -> None:
    torch.manual_seed(0)
    layer, x = LinearAttention(12), torch.randn(2, 12, 4, 6)
    q, k, v = (t.view(2, 4, 32, 24) for t in layer.qkv(x).split(128, dim=1))
    weights, queries = k.softmax(-1), q.softmax(2) / math.sqrt(32)
    mixed = torch.zeros(2, 4, 32, 24)
    for d in range(32):
        summary = (weights[:, :, d, None] * v).sum(-1)
        mixed += summary[..., None] * queries[:, :, d, None]
    expected = layer.norm(layer.out(mixed.view(2, 128, 4, 6)))
    assert torch.allclose(layer(x), expected, atol=1e-5)


@torch.inference_mode()
def test_time_reaches_residual_blocks_but_the_last() -> None:
    torch.manual_seed(0)
    x, time = torch.randn(1, 8, 4, 4), torch.randn(1, 16)
    block = ResidualBlock(8, 16, 16, 4)
    assert block(x, time).shape == (1, 16, 4, 4)
    assert not torch.allclose(block(x, time), block(x, -time))
    last = ResidualBlock(8, 8, None, 4)
    assert torch.equal(last(x, time), last(x, None))


def test_time_embedding_by_its_definition() -> None:
    found = embed_time(torch.tensor([0, 37]), 8)
    assert found.dtype == torch.float32
    angles = [37 * 10000 ** (-i / 3) for i in range(4)]
    expected = [*(math.sin(a) for a in angles), *(math.cos(a) for a in angles)]
    assert found[1].tolist() == pytest.approx(expected, abs=1e-4)
    assert found[0].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 12}, "dim 12"),
        ({"dim": 2, "groups": 1}, "dim 2"),
        ({"mults": (2, 4)}, "mults"),
        ({"mults": ()}, "mults"),
        ({"timestep": 1000}, "timesteps"),
        ({"tile_px": 100}, "tile_px 100: must be a multiple of 8"),
    ],
)
def test_what_cannot_be(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GenSelfDiffConfig(**changes)  # type: ignore[arg-type]
