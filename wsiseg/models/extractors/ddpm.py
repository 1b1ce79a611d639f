"""Pixel-space denoiser whose decoder activations are features, at several noise levels.

Source: DDPM features for nuclei segmentation (ISBI 2024) after Baranchuk et al. (ICLR 2022):
guided diffusion's U-Net for 256 px (Dhariwal and Nichol 2021) with 128 base channels; decoder
blocks 6, 8, 10 and 12 at t = 50, 150 and 250 give 2,688 channels. Knows no heads and no windows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from wsiseg.errors import ConfigError, ModelError
from wsiseg.geometry import Point
from wsiseg.models.base import FeatureExtractor, Features, FeatureSpec
from wsiseg.models.compat import ensure_torchvision_imports
from wsiseg.models.diffusion import (
    ScheduleConfig,
    alphas_bar,
    at_step,
    check_timesteps,
    place_noise,
)


@dataclass(frozen=True)
class DDPMConfig:
    """Configuration of the extractor; the defaults are the published 256 px model."""

    channels: tuple[int, ...] = (128, 128, 256, 256, 512, 512)
    """Channels of the levels, fine to coarse; each level halves the resolution."""
    layers: int = 2
    """Residual blocks a level (the decoder has one more)."""
    attention: tuple[int, ...] = (8, 16, 32)
    """Downsamples of the levels with attention; the middle block always has it."""
    head_channels: int = 64
    """Channels of an attention head."""
    groups: int = 32
    """Groups of the group norms."""
    schedule: ScheduleConfig = ScheduleConfig(beta_start=1e-4, beta_end=0.02, kind="linear")
    """The noise schedule it was trained with."""
    timesteps: tuple[int, ...] = (50, 150, 250)
    """Diffusion steps at which features are read, without noise at 0; those of several are
    concatenated."""
    taps: tuple[int, ...] = (6, 8, 10, 12)
    """Decoder blocks whose outputs are read, numbered from 0 at the coarse end."""
    shared_noise: bool = True
    """One noise for all images, in training and prediction alike, as published (the seed has no
    part then); else one for each place, step and seed."""
    tile_px: int = 256
    """Side of a tile in pixels."""

    def __post_init__(self) -> None:
        check_timesteps(self.timesteps, self.schedule.steps)
        if (
            self.groups < 1
            or not self.channels
            or any(c < 1 or c % self.groups for c in self.channels)
        ):
            raise ConfigError(
                f"channels {list(self.channels)}: must be multiples of groups {self.groups}"
            )
        if self.layers < 1 or self.head_channels < 1:
            raise ConfigError("layers and head_channels: must be at least 1")
        self._check_attention()
        blocks = len(self.channels) * (self.layers + 1)
        if not self.taps or sorted(set(self.taps)) != list(self.taps):
            raise ConfigError(f"taps {list(self.taps)}: give increasing numbers, at least one")
        if not all(0 <= t < blocks for t in self.taps):
            raise ConfigError(f"taps {list(self.taps)}: each must be from 0 to {blocks - 1}")
        coarsest = 2 ** (len(self.channels) - 1)
        if self.tile_px < 1 or self.tile_px % coarsest:
            raise ConfigError(f"tile_px {self.tile_px}: must be a multiple of {coarsest}")

    def _check_attention(self) -> None:
        downsamples = {2**i: c for i, c in enumerate(self.channels)}
        if not set(self.attention) <= set(downsamples):
            raise ConfigError(
                f"attention {list(self.attention)}: each must be one of {list(downsamples)}"
            )
        widths = [*(downsamples[a] for a in self.attention), self.channels[-1]]
        if any(c % self.head_channels for c in widths):
            raise ConfigError(
                f"head_channels {self.head_channels}: must divide the channels of the levels with "
                f"attention, {widths}"
            )


class DDPMExtractor(FeatureExtractor):
    """A denoiser of images; forward gives the taps of every timestep.

    Attributes:
        alphas_bar: (T,) float32 cumulative products of the schedule, on the CPU.
    """

    def __init__(self, config: DDPMConfig) -> None:
        super().__init__()
        self.config = config
        self.tile_px = config.tile_px
        self.unet = build_denoiser(config)
        self.alphas_bar = alphas_bar(config.schedule)
        layout = block_layout(config)
        self.specs = tuple(layout[t] for t in config.taps) * len(config.timesteps)

    def trainable(self, part: str) -> list[nn.Parameter]:
        """Of what the taps depend on: `all`, or the `decoder` (middle block and decoder blocks)."""
        unet: Any = self.unet
        blocks = [m for b in decoder_blocks(unet)[: self.config.taps[-1] + 1] for m in b]
        decoder = [unet.mid_block, *blocks]
        before = [unet.conv_in, unet.time_embedding, unet.down_blocks]
        everything = [*before, *decoder]
        parts = {"none": [], "decoder": decoder, "all": everything, "network": everything}
        return [p for module in parts[part] for p in module.parameters()]

    def drop_decoder(self) -> None:
        """Remove the last layers, which only the prediction of noise needs."""
        for name in ("conv_norm_out", "conv_out"):
            if hasattr(self.unet, name):
                delattr(self.unet, name)

    def predict_noise(self, noised: Tensor, timesteps: Tensor) -> Tensor:
        """The noise in noised images, for pretraining.

        Args:
            noised: (B, 3, H, W) images of [-1, 1] with noise.
            timesteps: (B,) int64 steps they are at.

        Returns:
            (B, 3, H, W).

        Raises:
            ModelError: the last layers were dropped, as in a segmenter's file.
        """
        if not hasattr(self.unet, "conv_out"):
            raise ModelError(
                "ddpm: this file is for prediction; noise needs a pretrained extractor"
            )
        found: Tensor = self.unet(noised, timesteps, return_dict=False)[0]
        return found

    def forward(self, images: Tensor, places: Sequence[Point], seed: int) -> Features:
        """Taps of every timestep, timestep by timestep; see `specs`."""
        maps: list[Tensor] = []
        for t in self.config.timesteps:
            draw = partial(self.noise, places, seed, t)
            noised = at_step(images, t, self.alphas_bar, draw)
            maps.extend(read_blocks(self.unet, noised, t, self.config.taps))
        return tuple(maps)

    def noise(self, places: Sequence[Point], seed: int, timestep: int) -> Tensor:
        """(B, 3, tile, tile) noise of tiles; if shared (1, 3, tile, tile), that of place (0, 0)."""
        if self.config.shared_noise:
            places, seed, timestep = [Point(0, 0)], 0, 0
        return place_noise(places, seed, timestep, (3, self.tile_px, self.tile_px))


def build_denoiser(config: DDPMConfig) -> nn.Module:
    """The diffusers U-Net with guided diffusion's layout and its zeroed last convolutions."""
    ensure_torchvision_imports()
    from diffusers import UNet2DModel
    from diffusers.models.resnet import ResnetBlock2D

    attention = [2**level in config.attention for level in range(len(config.channels))]
    unet: nn.Module = UNet2DModel(
        sample_size=config.tile_px,
        block_out_channels=config.channels,
        layers_per_block=config.layers,
        down_block_types=["AttnDownBlock2D" if a else "ResnetDownsampleBlock2D" for a in attention],
        up_block_types=[
            "AttnUpBlock2D" if a else "ResnetUpsampleBlock2D" for a in reversed(attention)
        ],
        downsample_type="resnet",
        upsample_type="resnet",
        resnet_time_scale_shift="scale_shift",
        attention_head_dim=config.head_channels,
        norm_num_groups=config.groups,
    )
    net: Any = unet
    for module in [m.conv2 for m in net.modules() if isinstance(m, ResnetBlock2D)] + [net.conv_out]:
        nn.init.zeros_(module.weight)
        nn.init.zeros_(module.bias)
    return unet


def block_layout(config: DDPMConfig) -> list[FeatureSpec]:
    """Channels and stride of the decoder blocks' outputs, coarse to fine.

    The upsampling belongs to the last block of its level, whose output has the next stride.
    """
    layout: list[FeatureSpec] = []
    for level in reversed(range(len(config.channels))):
        strides = [2**level] * config.layers + [2 ** max(level - 1, 0)]
        layout.extend(FeatureSpec(config.channels[level], s) for s in strides)
    return layout


def decoder_blocks(unet: nn.Module) -> list[list[nn.Module]]:
    """The modules of each decoder block in their order: residual, attention, upsampling."""
    net: Any = unet
    blocks: list[list[nn.Module]] = []
    for level in net.up_blocks:
        attentions = getattr(level, "attentions", None)
        for i, resnet in enumerate(level.resnets):
            blocks.append([resnet] if attentions is None else [resnet, attentions[i]])
        blocks[-1].extend(level.upsamplers or [])
    return blocks


def read_blocks(
    unet: nn.Module, noised: Tensor, timestep: int, taps: Sequence[int]
) -> list[Tensor]:
    """Outputs of decoder blocks; nothing is computed beyond the last one asked for.

    Args:
        unet: a U-Net of `build_denoiser`.
        noised: (B, 3, H, W) noised images.
        timestep: diffusion step they are at.
        taps: increasing block numbers.

    Returns:
        One (B, channels, H / stride, W / stride) tensor a tap, see `block_layout`.
    """
    net: Any = unet
    time = torch.full((len(noised),), timestep, device=noised.device, dtype=torch.long)
    temb = net.time_embedding(net.time_proj(time).to(noised.dtype))
    x = net.conv_in(noised)
    skips: list[Tensor] = [x]
    for level in net.down_blocks:
        x, states = level(x, temb)
        skips.extend(states)
    x = net.mid_block(x, temb)
    found = []
    for number, block in enumerate(decoder_blocks(unet)[: taps[-1] + 1]):
        x = torch.cat((x, skips.pop()), dim=1)
        for module in block:
            x = module(x) if _is_attention(module) else module(x, temb)
        if number in taps:
            found.append(x)
    return found


def _is_attention(module: nn.Module) -> bool:
    return hasattr(module, "to_q")
