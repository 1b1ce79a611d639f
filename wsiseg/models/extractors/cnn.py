"""ResNet and VGG encoders over timm, whole or narrow: maps at falling resolution. Knows no heads.

Source: He et al., Deep Residual Learning for Image Recognition (CVPR 2016); Simonyan and
Zisserman, Very Deep Convolutional Networks (ICLR 2015). A convolutional network's tile is the
whole window, so that no seam is inside a window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn import functional as nnf

from wsiseg.errors import ConfigError, ModelError
from wsiseg.geometry import Point
from wsiseg.models.base import FeatureExtractor, Features, FeatureSpec
from wsiseg.models.compat import ensure_torchvision_imports

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_STAGES = {"resnet": 4, "vgg": 5}


@dataclass(frozen=True)
class CNNConfig:
    """Configuration of a convolutional encoder; the defaults are Res-UNet's."""

    arch: Literal["resnet18", "resnet34", "resnet50", "vgg16", "vgg16_bn"] = "resnet18"
    """The network, by timm's name."""
    strides: tuple[int, ...] = (2, 4, 8, 16, 32)
    """Which maps are given, as input pixels per map pixel, fine to coarse; a VGG also has 1."""
    channels: tuple[int, ...] | None = None
    """Channels of the stages, 4 of a ResNet and 5 of a VGG, for a narrow network; null = the
    architecture's own. A ResNet's stem has 64 in any case, resnet50 gives 4 times these."""
    pooled: bool = False
    """VGG only: read a map after the pooling that makes its stride (pool3, pool4, pool5, as FCN-8s
    does) instead of before the next pooling."""
    tile_px: int = 768
    """Side of a tile in pixels, which is the whole window; no weight depends on it."""

    def __post_init__(self) -> None:
        offered = [2**i for i in range(1 if self.pooled or self.family == "resnet" else 0, 6)]
        if self.pooled and self.family != "vgg":
            raise ConfigError(f"pooled: {self.arch} has one pooling only; give false")
        if not self.strides or list(self.strides) != [s for s in offered if s in self.strides]:
            raise ConfigError(f"strides {list(self.strides)}: give increasing ones of {offered}")
        if self.tile_px < 1 or self.tile_px % self.strides[-1]:
            raise ConfigError(
                f"tile_px {self.tile_px}: must be a multiple of the largest stride, "
                f"{self.strides[-1]}"
            )
        stages = _STAGES[self.family]
        widths = self.channels
        if widths is not None and (len(widths) != stages or min(widths) < 1):
            raise ConfigError(f"channels {list(widths)}: {self.arch} needs {stages} positive ones")

    @property
    def family(self) -> str:
        """`resnet` or `vgg`."""
        return "vgg" if self.arch.startswith("vgg") else "resnet"

    @property
    def stages(self) -> tuple[int, ...]:
        """Indices of timm's feature stages that are read; of a ResNet, stage 0 has stride 2."""
        before = 1 if self.pooled or self.family == "resnet" else 0
        return tuple(s.bit_length() - 1 - before for s in self.strides)


class CNNExtractor(FeatureExtractor):
    """Feature maps of a ResNet or a VGG, fine to coarse.

    Images in [-1, 1] are brought to ImageNet's mean and deviation first, with random weights too:
    it is an affine map of each channel, and one kind of input serves both.
    """

    def __init__(self, config: CNNConfig) -> None:
        super().__init__()
        self.config = config
        self.tile_px = config.tile_px
        net: Any = _build(config)
        self.net: nn.Module = net
        channels = net.feature_info.channels()
        self.specs = tuple(FeatureSpec(c, s) for c, s in zip(channels, config.strides, strict=True))

    def forward(self, images: Tensor, places: Sequence[Point], seed: int) -> Features:
        """One map a stride of (B, 3, tile_px, tile_px) tiles; places and seed take no part."""
        mean = images.new_tensor(IMAGENET_MEAN).view(1, 3, 1, 1)
        deviation = images.new_tensor(IMAGENET_STD).view(1, 3, 1, 1)
        maps = self.net((images * 0.5 + 0.5 - mean) / deviation)
        if self.config.pooled:
            maps = [nnf.max_pool2d(m, 2) for m in maps]
        return tuple(maps)

    def load_imagenet(self) -> None:
        """Fill the network with timm's default ImageNet weights, from its cache or its hub.

        Raises:
            ModelError: a narrow network, which has none, or they cannot be had.
        """
        arch = self.config.arch
        if self.config.channels is not None:
            raise ModelError(
                f"{arch}: there are no ImageNet weights for channels of one's own; use "
                "channels: null or initial: random"
            )
        self.net.load_state_dict(_imagenet_weights(arch, self.config.stages))


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
        raise ModelError(
            f"{arch}: the ImageNet weights cannot be had ({type(e).__name__}); where there is a "
            f"network run 'hf download {source}' and copy the folder to the cache here "
            "($HF_HOME/hub, ~/.cache/huggingface/hub), or use initial: random"
        ) from e
    return net.state_dict()
