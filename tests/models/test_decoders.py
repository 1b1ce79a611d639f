"""U-Net, FCN-8s and linear heads: against forwards written out, sizes, starts, gradients, files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_model
from torch import Tensor
from torch.nn import functional as nnf

from wsiseg.errors import ConfigError
from wsiseg.geometry import Point
from wsiseg.models.base import FeatureSpec
from wsiseg.models.checkpoint import load_model, save_checkpoint
from wsiseg.models.heads.fcn8 import FCN8Config, FCN8Head, bilinear_upsampling
from wsiseg.models.heads.linear import LinearConfig, LinearHead
from wsiseg.models.heads.unet import UNetHead, UNetHeadConfig
from wsiseg.models.registry import ModelConfig, build_segmenter

TILE = 64
VGG_SPECS = [FeatureSpec(6, 8), FeatureSpec(5, 16), FeatureSpec(4, 32)]


def features(specs: list[FeatureSpec], rows: int = 1, columns: int = 1) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(
        torch.randn(
            2, rows, columns, s.channels, TILE // s.stride, TILE // s.stride, generator=generator
        )
        for s in specs
    )


def tiled(maps: Tensor) -> Tensor:
    """Tiles side by side, one by one."""
    rows = [
        torch.cat([maps[:, i, j] for j in range(maps.shape[2])], -1) for i in range(len(maps[0]))
    ]
    return torch.cat(rows, -2)


def settle(head: torch.nn.Module) -> None:
    """Batch norms with statistics and weights that are not those of the start."""
    for module in head.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor in (module.weight.data, module.bias.data, module.running_mean):
                torch.nn.init.uniform_(tensor, 0.2, 1.0)  # type: ignore[arg-type]
            torch.nn.init.uniform_(module.running_var, 0.5, 2.0)  # type: ignore[arg-type]


@torch.inference_mode()
def test_unet_is_the_forward_written_out() -> None:
    """Out of order, a stride without a map (4), one with two (8), full size (1), 2 x 1 tiles."""
    torch.manual_seed(0)
    specs = [FeatureSpec(3, 8), FeatureSpec(4, 2), FeatureSpec(2, 1), *[FeatureSpec(5, 16)] * 1]
    specs.append(FeatureSpec(6, 8))
    head = UNetHead(specs, 3, UNetHeadConfig((12, 10, 8, 6))).eval()
    settle(head)
    maps = features(specs, 2, 1)
    eight, two, one, sixteen, more = (tiled(m) for m in maps)
    w = head.state_dict()

    def block(x: Tensor, number: int) -> Tensor:
        for conv, norm in ((0, 1), (3, 4)):
            x = nnf.conv2d(x, w[f"blocks.{number}.{conv}.weight"], padding=1)
            at = f"blocks.{number}.{norm}."
            mean, var = (w[f"{at}running_{s}"][:, None, None] for s in ("mean", "var"))
            x = (x - mean) / torch.sqrt(var + 1e-5)
            x = x * w[f"{at}weight"][:, None, None] + w[f"{at}bias"][:, None, None]
            x = x.clamp(min=0)
        return x

    def double(x: Tensor) -> Tensor:
        return x.repeat_interleave(2, -1).repeat_interleave(2, -2)

    x = block(torch.cat((double(sixteen), eight, more), 1), 0)
    x = block(double(x), 1)
    x = block(torch.cat((double(x), two), 1), 2)
    x = block(torch.cat((double(x), one), 1), 3)
    wanted = nnf.conv2d(x, w["classifier.weight"], w["classifier.bias"], padding=1)
    found = head(maps)
    assert found.shape == (2, 3, 2 * TILE, TILE)
    assert torch.allclose(found, wanted, atol=1e-4)


@torch.inference_mode()
def test_unet_that_ends_coarse_interpolates_its_logits() -> None:
    torch.manual_seed(0)
    specs = [FeatureSpec(6, 8), FeatureSpec(5, 2)]
    head = UNetHead(specs, 3, UNetHeadConfig((8, 6))).eval()
    settle(head)
    maps = features(specs, 2, 1)
    found = head(maps)
    assert found.shape == (2, 3, 2 * TILE, TILE)
    fine = UNetHead([FeatureSpec(6, 4), FeatureSpec(5, 1)], 3, UNetHeadConfig((8, 6))).eval()
    fine.load_state_dict(head.state_dict())  # the same maps, taken for those of a smaller tile
    coarse = fine(maps)
    assert coarse.shape == (2, 3, TILE, TILE // 2)
    y, x = 7, 4  # between four coarse pixels: 9, 3, 3 and 1 sixteenths
    wanted = (
        9 * coarse[..., 3, 2] + 3 * coarse[..., 4, 2] + 3 * coarse[..., 3, 1] + coarse[..., 4, 1]
    ) / 16
    assert torch.allclose(found[..., y, x], wanted, atol=1e-5)


def count(extractor: dict[str, Any], head: dict[str, Any], classes: int) -> int:
    config = ModelConfig(
        extractor={"name": "cnn", **extractor},
        head=head,
        classes=[{"name": f"c{i}", "color": [i, 0, 0]} for i in range(classes)],
    )
    with torch.device("meta"):
        return sum(p.numel() for p in build_segmenter(config).parameters())


def test_full_sizes() -> None:
    """U-Net on ResNet-18 as segmentation_models.pytorch has it; VGG-16 less its last classifier."""
    assert count({}, {"name": "unet"}, 1) == 14_328_209
    vgg = {"arch": "vgg16", "strides": [8, 16, 32], "pooled": True}
    scores = sum(c * 21 + 21 for c in (256, 512, 4096)) + 2 * 21 * 21 * 16
    assert count(vgg, {"name": "fcn8"}, 21) == 138_357_544 - 4_097_000 + scores


@pytest.mark.parametrize("fc_width", [0, 8])
@torch.inference_mode()
def test_fcn8_is_the_forward_written_out(fc_width: int) -> None:
    torch.manual_seed(0)
    head = FCN8Head(VGG_SPECS[::-1], 3, FCN8Config(fc_width)).eval()
    maps = features(VGG_SPECS[::-1], 1, 2)
    pool5, pool4, pool3 = (tiled(m) for m in maps)
    if fc_width:
        pool5 = nnf.relu(nnf.conv2d(pool5, head.fc[0].weight, head.fc[0].bias, padding=3))
        pool5 = nnf.relu(nnf.conv2d(pool5, head.fc[3].weight, head.fc[3].bias))
    x = head.score32(pool5)
    for up, skip in ((head.up32, head.score16(pool4)), (head.up16, head.score8(pool3))):
        x = nnf.conv_transpose2d(x, up.weight, stride=2, padding=1) + skip
    wanted = nnf.interpolate(x, size=(TILE, 2 * TILE), mode="bilinear", align_corners=False)
    found = head(maps)
    assert found.shape == (2, 3, TILE, 2 * TILE)
    assert torch.allclose(found, wanted, atol=1e-5)


@torch.inference_mode()
def test_upsampling_starts_bilinear() -> None:
    x = torch.rand(1, 3, 6, 7)
    wanted = nnf.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
    found = bilinear_upsampling(3)(x)
    assert torch.allclose(found[..., 1:-1, 1:-1], wanted[..., 1:-1, 1:-1], atol=1e-6)


@torch.inference_mode()
def test_linear_is_a_classifier_of_each_pixel() -> None:
    torch.manual_seed(0)
    head = LinearHead([FeatureSpec(5, 1)], 3, LinearConfig())
    maps = features([FeatureSpec(5, 1)], 2, 2)
    kernel = head.classifier.weight[:, :, 0, 0]
    wanted = torch.einsum("kc,bchw->bkhw", kernel, tiled(maps[0]))
    assert head.classifier.bias is not None
    wanted = wanted + head.classifier.bias[:, None, None]
    assert torch.allclose(head(maps), wanted, atol=1e-5)


PAIRS = [
    ("cnn", "unet"),
    ("pathsegdiff", "unet"),
    ("cnn, VGG", "fcn8"),
    ("stain", "linear"),
    ("hipt", "fcn"),
]


@pytest.mark.parametrize(("extractor", "head"), PAIRS)
def test_gradients_reach_every_parameter(extractor: str, head: str) -> None:
    model = build(extractor, head).train()
    settle(model)  # timm starts the last batch norm of a residual block at zero
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    logits = model.window_logits(model.features(images, [Point(0, 0)] * 2, 0))
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    (logits * weights).sum().backward()
    trained = [*model.head.named_parameters()]
    if extractor != "pathsegdiff":
        trained += [*model.extractor.named_parameters()]
    assert [n for n, p in trained if p.grad is None or not p.grad.abs().sum() > 0] == []


@pytest.mark.parametrize(("extractor", "head"), PAIRS)
@torch.inference_mode()
def test_models_come_back_from_files(tmp_path: Path, extractor: str, head: str) -> None:
    model = build(extractor, head).eval()
    settle(model)
    save_checkpoint(tmp_path / "m.safetensors", model, card={}, licence="CC0-1.0")
    back = load_model(tmp_path / "m.safetensors", device="cpu")
    images = torch.rand(1, 3, 96, 96, generator=torch.Generator().manual_seed(1)) * 2 - 1
    before, after = (m.window_logits(m.features(images, [Point(0, 0)], 0)) for m in (model, back))
    assert torch.equal(before, after)


def build(extractor: str, head: str) -> Any:
    """A tiny model; the head of PathSegDiff's U-Net has a width for each of its halvings."""
    if (extractor, head) != ("pathsegdiff", "unet"):
        return tiny_model(extractor, head)
    info = tiny_model().info.config
    torch.manual_seed(0)
    return build_segmenter(
        ModelConfig(**{**info, "head": {"name": "unet", "widths": [16, 8, 8, 4]}})
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: UNetHead(VGG_SPECS, 2, UNetHeadConfig((8,) * 6)),
            "6 widths where .* 32, has 5 halv",
        ),
        (
            lambda: UNetHead(VGG_SPECS, 2, UNetHeadConfig((8,))),
            "1 widths end at stride 16 .* of stride 8 unread",
        ),
        (
            lambda: UNetHead([FeatureSpec(4, 14)], 2, UNetHeadConfig((8, 8, 8))),
            r"strides \[14\] must be powers of two",
        ),
        (lambda: UNetHeadConfig(()), r"widths \[\] must be positive"),
        (lambda: UNetHeadConfig((8, 0)), "must be positive"),
        (
            lambda: FCN8Head(VGG_SPECS[:2], 2, FCN8Config()),
            r"not \[8, 16\]; set extractor\.strides",
        ),
        (lambda: FCN8Head([*VGG_SPECS, VGG_SPECS[0]], 2, FCN8Config()), "needs one map each"),
        (lambda: FCN8Config(-1), "fc_width must be at least 0"),
        (lambda: FCN8Config(dropout=1.0), "dropout from 0 to below 1"),
        (lambda: LinearHead(VGG_SPECS, 2, LinearConfig()), r"full-size map, not strides \[8, 16"),
        (lambda: LinearHead([FeatureSpec(3, 2)], 2, LinearConfig()), "full-size map"),
    ],
)
def test_what_cannot_be_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()
