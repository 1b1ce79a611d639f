"""Pixel-space denoiser that is fine-tuned whole into a segmenter: features of the clean image.

Source: GenSelfDiff-HIS (Purma et al., IEEE TMI 2024): a U-Net of residual blocks with linear
attention at every level and full attention in the middle, pretrained to predict noise (T = 1000,
quadratic betas 1e-4..0.02, P2 weight), then trained at t = 0 with another last convolution. The
original feeds [0, 1] when fine-tuning after pretraining on [-1, 1]; here both see [-1, 1].
31,267,018 parameters with a last convolution for 2 classes settle the layout. Knows no heads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from wsiseg.errors import ConfigError, ModelError
from wsiseg.geometry import Point
from wsiseg.models.base import FeatureExtractor, Features, FeatureSpec
from wsiseg.models.diffusion import ScheduleConfig, alphas_bar, check_timesteps

HEADS = 4
"""Heads of the attentions."""
HEAD_CHANNELS = 32
"""Channels of an attention head."""


@dataclass(frozen=True)
class GenSelfDiffConfig:
    """Configuration of the extractor; the defaults are the published model."""

    dim: int = 64
    """Channels of the finest level and of the feature map."""
    mults: tuple[int, ...] = (1, 2, 4, 8)
    """Multiples of dim: channels of the levels, fine to coarse."""
    groups: int = 8
    """Groups of the group norms in the residual blocks."""
    schedule: ScheduleConfig = ScheduleConfig(beta_start=1e-4, beta_end=0.02, kind="quadratic")
    """The noise schedule it was pretrained with."""
    timestep: int = 0
    """Diffusion step that the network is told the (clean) image is at."""
    tile_px: int = 256
    """Side of a tile in pixels."""

    def __post_init__(self) -> None:
        check_timesteps((self.timestep,), self.schedule.steps)
        if not self.mults or min(self.mults) < 1 or self.mults[0] != 1:
            raise ConfigError(f"mults {list(self.mults)}: whole numbers, the first one 1")
        if self.dim < 4 or self.dim % 2 or self.groups < 1 or self.dim % self.groups:
            raise ConfigError(
                f"dim {self.dim}: must be even, at least 4 and a multiple of groups {self.groups}"
            )
        coarsest = 2 ** (len(self.mults) - 1)
        if self.tile_px < 1 or self.tile_px % coarsest:
            raise ConfigError(f"tile_px {self.tile_px}: must be a multiple of {coarsest}")


class GenSelfDiffExtractor(FeatureExtractor):
    """The denoiser without its last convolution: one full-size map of dim channels.

    Attributes:
        alphas_bar: (T,) float32 cumulative products of the schedule, on the CPU.
    """

    def __init__(self, config: GenSelfDiffConfig) -> None:
        super().__init__()
        self.config = config
        self.tile_px = config.tile_px
        self.specs = (FeatureSpec(config.dim, 1),)
        self.unet = UNet(config)
        self.noise: nn.Conv2d | None = nn.Conv2d(config.dim, 3, 1)
        self.alphas_bar = alphas_bar(config.schedule)

    def trainable(self, part: str) -> list[nn.Parameter]:
        """`all` but the noise convolution, or the `decoder`: all that follows the middle."""
        unet = self.unet
        parts: dict[str, list[nn.Module]] = {
            "none": [],
            "all": [unet],
            "network": [unet],
            "decoder": [unet.ups, unet.last],
        }
        return [p for module in parts[part] for p in module.parameters()]

    def drop_decoder(self) -> None:
        """Remove the convolution that only the prediction of noise needs."""
        self.noise = None

    def predict_noise(self, noised: Tensor, timesteps: Tensor) -> Tensor:
        """The noise in noised images, for pretraining.

        Args:
            noised: (B, 3, H, W) images of [-1, 1] with noise.
            timesteps: (B,) int64 steps they are at.

        Returns:
            (B, 3, H, W).

        Raises:
            ModelError: the last convolution was dropped, as in a segmenter's file.
        """
        if self.noise is None:
            raise ModelError(
                "genselfdiff: this file is for prediction; noise needs a pretrained extractor"
            )
        found: Tensor = self.noise(self.unet(noised, timesteps))
        return found

    def forward(self, images: Tensor, places: Sequence[Point], seed: int) -> Features:
        """The map of the images as they are, without noise; places and seed are not used."""
        steps = torch.full(
            (len(images),), self.config.timestep, device=images.device, dtype=torch.long
        )
        return (self.unet(images, steps),)


class UNet(nn.Module):
    """Images and timesteps to a (B, dim, H, W) map.

    Every level has two residual blocks and a linear attention; the finer levels are left with a
    stride 2 convolution of 4 x 4, and come back with a transposed one after theirs.
    """

    def __init__(self, config: GenSelfDiffConfig) -> None:
        super().__init__()
        dim, time = config.dim, config.dim * 4
        self.dim = dim
        widths = [dim // 3 * 2, *(dim * m for m in config.mults)]
        self.first = nn.Conv2d(3, widths[0], 7, padding=3)
        self.time = nn.Sequential(nn.Linear(dim, time), nn.GELU(), nn.Linear(time, time))
        self.downs = nn.ModuleList(Level(a, b, time, config.groups) for a, b in pairwise(widths))
        self.reduce = nn.ModuleList(nn.Conv2d(c, c, 4, stride=2, padding=1) for c in widths[1:-1])
        coarse = widths[-1]
        self.middle1 = ResidualBlock(coarse, coarse, time, config.groups)
        self.attention = PreNormResidual(coarse, Attention(coarse))
        self.middle2 = ResidualBlock(coarse, coarse, time, config.groups)
        upwards = widths[:0:-1]
        self.ups = nn.ModuleList(UpLevel(a, b, time, config.groups) for a, b in pairwise(upwards))
        self.last = ResidualBlock(dim, dim, None, config.groups)

    def forward(self, images: Tensor, timesteps: Tensor) -> Tensor:
        """(B, dim, H, W) from (B, 3, H, W) and (B,) int64 steps."""
        time = self.time(embed_time(timesteps, self.dim).to(images.dtype))
        x = self.first(images)
        skips: list[Tensor] = []
        for i, level in enumerate(self.downs):
            x = level(x, time)
            skips.append(x)
            if i < len(self.reduce):
                x = self.reduce[i](x)
        x = self.middle2(self.attention(self.middle1(x, time)), time)
        for level in self.ups:
            x = level(torch.cat((x, skips.pop()), dim=1), time)
        found: Tensor = self.last(x, None)
        return found


class Level(nn.Module):
    """Two residual blocks and a linear attention."""

    def __init__(self, inputs: int, outputs: int, time: int, groups: int) -> None:
        super().__init__()
        self.block1 = ResidualBlock(inputs, outputs, time, groups)
        self.block2 = ResidualBlock(outputs, outputs, time, groups)
        self.attention = PreNormResidual(outputs, LinearAttention(outputs))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """(B, outputs, H, W) from (B, inputs, H, W)."""
        found: Tensor = self.attention(self.block2(self.block1(x, time), time))
        return found


class UpLevel(nn.Module):
    """A level on a map and its skip, then twice the resolution."""

    def __init__(self, inputs: int, outputs: int, time: int, groups: int) -> None:
        super().__init__()
        self.level = Level(2 * inputs, outputs, time, groups)
        self.enlarge = nn.ConvTranspose2d(outputs, outputs, 4, stride=2, padding=1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """(B, outputs, 2 H, 2 W) from (B, 2 inputs, H, W)."""
        found: Tensor = self.enlarge(self.level(x, time))
        return found


class ResidualBlock(nn.Module):
    """Twice convolution, group norm and SiLU, the time added between, and a shortcut."""

    def __init__(self, inputs: int, outputs: int, time: int | None, groups: int) -> None:
        super().__init__()
        self.time = None if time is None else nn.Linear(time, outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm1 = nn.GroupNorm(groups, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, time: Tensor | None) -> Tensor:
        """(B, outputs, H, W) from (B, inputs, H, W) and a (B, time) embedding."""
        h = nnf.silu(self.norm1(self.conv1(x)))
        if self.time is not None and time is not None:
            h = h + self.time(nnf.silu(time))[:, :, None, None]
        h = nnf.silu(self.norm2(self.conv2(h)))
        found: Tensor = h + self.shortcut(x)
        return found


class PreNormResidual(nn.Module):
    """x + inner(norm(x)), the norm over all channels and places of an image."""

    def __init__(self, channels: int, inner: nn.Module) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, channels)
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        """The same shape."""
        found: Tensor = x + self.inner(self.norm(x))
        return found


class Attention(nn.Module):
    """Attention of every place to every place."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.qkv = nn.Conv2d(channels, 3 * HEADS * HEAD_CHANNELS, 1, bias=False)
        self.out = nn.Conv2d(HEADS * HEAD_CHANNELS, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """The same shape."""
        q, k, v = (t.transpose(-1, -2) for t in split_heads(self.qkv(x)))
        mixed = nnf.scaled_dot_product_attention(q, k, v).transpose(-1, -2)
        found: Tensor = self.out(mixed.reshape(len(x), -1, *x.shape[-2:]))
        return found


class LinearAttention(nn.Module):
    """Attention through a summary of all places (Shen et al. 2021): linear in their number."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.qkv = nn.Conv2d(channels, 3 * HEADS * HEAD_CHANNELS, 1, bias=False)
        self.out = nn.Conv2d(HEADS * HEAD_CHANNELS, channels, 1)
        self.norm = nn.GroupNorm(1, channels)

    def forward(self, x: Tensor) -> Tensor:
        """The same shape."""
        q, k, v = split_heads(self.qkv(x))
        summary = v @ k.softmax(dim=-1).transpose(-1, -2)
        mixed = summary @ (q.softmax(dim=-2) * HEAD_CHANNELS**-0.5)
        found: Tensor = self.norm(self.out(mixed.reshape(len(x), -1, *x.shape[-2:])))
        return found


def split_heads(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value (B, heads, head channels, H * W) of a (B, 3 * channels, H, W) map."""
    q, k, v = qkv.reshape(len(qkv), 3, HEADS, HEAD_CHANNELS, -1).unbind(1)
    return q, k, v


def embed_time(timesteps: Tensor, dim: int) -> Tensor:
    """(B, dim) float32 sines, then cosines of (B,) steps, wavelengths 2 pi to 20000 pi."""
    half = dim // 2
    exponents = torch.arange(half, device=timesteps.device, dtype=torch.float32) / (half - 1)
    angles = timesteps[:, None] * torch.exp(exponents * -math.log(10000.0))[None]
    return torch.cat((angles.sin(), angles.cos()), dim=1)
