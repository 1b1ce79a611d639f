"""Batch norms folded into convolutions, and weights that bfloat16 holds once they are."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from wsiseg.classes import Classes, TissueClass
from wsiseg.geometry import Point
from wsiseg.models.card import add_to_card
from wsiseg.models.checkpoint import load_model, read_card, save_checkpoint
from wsiseg.models.folding import fold, round_weights
from wsiseg.models.heads.unet import UNetHead, UNetHeadConfig
from wsiseg.models.registry import ModelConfig, build_segmenter
from wsiseg.models.segmenter import Segmenter
from wsiseg.models.views import ViewedSegmenter

CLASSES = Classes((TissueClass("rest", (0, 0, 200), True), TissueClass("gland", (200, 0, 0))))
STRIDES = [4, 8, 16, 32]
NETWORKS: dict[str, dict[str, Any]] = {
    "resnet18": {"channels": [4, 4, 4, 4]},
    "resnet50": {"channels": [4, 4, 4, 4]},
    "vgg16": {"channels": [4, 4, 4, 8, 8]},
    "vgg16_bn": {"channels": [4, 4, 4, 8, 8], "pooled": True},
    "tf_efficientnet_lite0": {},
}


def lively(segmenter: Segmenter) -> Segmenter:
    """Statistics and weights of norms as after training, one channel switched off."""
    for module in segmenter.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.running_mean, -0.2, 0.2),
                (module.running_var, 0.3, 2.0),
                (module.weight, 0.5, 1.5),
                (module.bias, -0.2, 0.2),
            ):
                assert tensor is not None
                nn.init.uniform_(tensor, low, high)
            with torch.no_grad():
                module.weight[0] = 0
    return segmenter.eval()


def convolutional(arch: str = "tf_efficientnet_lite0", head: str = "unet") -> Segmenter:
    torch.manual_seed(0)
    heads: dict[str, dict[str, Any]] = {
        "unet": {"name": "unet", "widths": [8, 8, 8]},
        "fcn": {"name": "fcn", "widths": [8, 8, 8]},
    }
    config = ModelConfig(
        extractor={
            "name": "cnn",
            "arch": arch,
            "tile_px": 64,
            "strides": STRIDES,
            **NETWORKS[arch],
        },
        head=heads[head],
        classes=CLASSES,
        window_px=64,
    )
    return lively(build_segmenter(config))


def norms(module: nn.Module) -> list[nn.BatchNorm2d]:
    return [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]


def outputs(segmenter: Segmenter, *, half: bool = False) -> Tensor:
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=half):
        logits = segmenter.window_logits(segmenter.features(images, [Point(0, 0)] * 2, 0))
    return logits.float()


@pytest.mark.parametrize("arch", NETWORKS)
def test_what_is_folded_gives_the_same(arch: str) -> None:
    own = convolutional(arch)
    before = copy.deepcopy(own.state_dict())
    found = fold(own)
    wanted = outputs(own)
    assert float(wanted.std()) > 0
    torch.testing.assert_close(outputs(found), wanted, rtol=1e-4, atol=1e-5)
    assert norms(own)
    assert not norms(found)
    assert all(torch.equal(v, before[k]) for k, v in own.state_dict().items())
    assert all(p.requires_grad for p in own.parameters())
    assert found.info is own.info


def test_a_head_of_another_kind_is_left_and_all_else_is_shared() -> None:
    own = convolutional(head="fcn")
    found = fold(own)
    assert found.head is own.head
    assert not norms(found.extractor)
    last = own.head.classifier.weight  # type: ignore[union-attr]
    with_unet = convolutional()
    shared = fold(with_unet).head.classifier.weight  # type: ignore[union-attr]
    assert shared is with_unet.head.classifier.weight  # type: ignore[union-attr]
    assert found.head.classifier.weight is last  # type: ignore[union-attr]


def test_it_is_made_once_and_anew_after_training() -> None:
    own = convolutional()
    first = fold(own)
    assert fold(own).extractor is first.extractor
    assert fold(first) is first
    before = outputs(first)
    with torch.no_grad():
        norms(own.extractor)[1].weight.data.mul_(3)  # which no version tells
    again = fold(own)
    assert again.extractor is not first.extractor
    assert again.head is first.head
    torch.testing.assert_close(outputs(again), outputs(own), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(outputs(again), before)


class Otherwise(UNetHead):
    """A head of somebody else, which may use its batch norms in another way."""


def test_what_has_nothing_to_fold_stays() -> None:
    own = convolutional(head="fcn")
    other = Segmenter(
        own.extractor, Otherwise(own.map_specs, 2, UNetHeadConfig((8,) * 3)), own.info
    )
    assert fold(other).head is other.head
    views = ViewedSegmenter(convolutional())
    assert fold(views) is views
    config = ModelConfig(
        extractor={"name": "stain", "tile_px": 32},
        head={"name": "linear"},
        classes=CLASSES,
        window_px=32,
    )
    plain = build_segmenter(config).eval()
    assert fold(plain) is plain


def test_rounded_weights_are_those_of_half_precision_once_folded() -> None:
    own = convolutional()
    rounded = copy.deepcopy(own)
    round_weights(rounded)
    for module in fold(rounded).modules():
        if isinstance(module, nn.Conv2d):
            weight = module.weight.detach()
            torch.testing.assert_close(weight, weight.bfloat16().float(), rtol=1e-6, atol=0)
    for (name, a), b in zip(own.state_dict().items(), rounded.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1.001 * 2**-8, atol=0, msg=name)
    once = copy.deepcopy(rounded.state_dict())
    round_weights(rounded)  # nothing is left to round
    for name, value in rounded.state_dict().items():
        torch.testing.assert_close(value, once[name], rtol=1e-6, atol=0, msg=name)


def test_rounding_brings_half_precision_nearer() -> None:
    own = convolutional()
    rounded = copy.deepcopy(own)
    round_weights(rounded)

    def apart(segmenter: Segmenter) -> float:
        found = fold(segmenter)
        return float((outputs(found, half=True) - outputs(found)).pow(2).mean().sqrt())

    assert apart(rounded) < 0.8 * apart(own)
    change = (outputs(rounded) - outputs(own)).pow(2).mean().sqrt()
    assert change < 0.05 * outputs(own).std()


def test_a_card_says_that_weights_were_rounded(tmp_path: Path) -> None:
    path, out = tmp_path / "own.safetensors", tmp_path / "rounded.safetensors"
    own = convolutional()
    save_checkpoint(path, own, card={"metrics": {"a": 1}, "use": "x"}, licence="CC0-1.0")
    add_to_card(path, {}, out=out, rounded=True)
    assert read_card(out)["card"] == {"use": "x", "rounded": "bfloat16"}
    expected = copy.deepcopy(own)
    round_weights(expected)
    # float16, in which the file is, keeps enough digits for bfloat16 to find its own
    for a, b in zip(
        fold(load_model(out, device="cpu")).parameters(), fold(expected).parameters(), strict=True
    ):
        if a.ndim == 4:
            told = b.abs() > 1e-3  # float16 has fewer digits of smaller ones
            assert torch.equal(a[told].bfloat16(), b[told].bfloat16())


def test_weights_that_were_made_in_inference_mode() -> None:
    with torch.inference_mode():
        own = convolutional()
    torch.testing.assert_close(outputs(fold(own)), outputs(own), rtol=1e-4, atol=1e-5)
