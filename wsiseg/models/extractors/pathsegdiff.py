"""PathSegDiff's extractor: 13 activations of a conditioned denoiser in one pass a tile and step.

Source: PathSegDiff (arXiv:2504.06950), section 3. tile -> HIPT vector -> context; tile -> latent
-> noised at t -> U-Net -> middle block and 12 decoder blocks. Knows no heads and no windows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from wsiseg.errors import ConfigError
from wsiseg.geometry import Point
from wsiseg.models.base import FeatureExtractor, Features, FeatureSpec
from wsiseg.models.diffusion import (
    ScheduleConfig,
    alphas_bar,
    at_step,
    check_timesteps,
    place_noise,
)
from wsiseg.models.extractors.latent import (
    TAP_COUNT,
    Conditioner,
    FirstStageConfig,
    UNetConfig,
    build_first_stage,
    build_unet,
    detail_layout,
    encode_with_details,
    read_taps,
    tap_layout,
)
from wsiseg.models.extractors.vit import ViT, ViTConfig
from wsiseg.models.fused import channels_last


@dataclass(frozen=True)
class PathSegDiffConfig:
    """Configuration of the extractor; the defaults are the released BRCA 20x model."""

    encoder: ViTConfig = ViTConfig()
    """The self-supervised encoder that guides the denoiser."""
    first_stage: FirstStageConfig = FirstStageConfig()
    """The autoencoder of the latents."""
    unet: UNetConfig = UNetConfig()
    """The denoiser."""
    schedule: ScheduleConfig = ScheduleConfig()
    """The noise schedule it was trained with."""
    region_dim: int = 768
    """Width of the region vector of the second token; 0 for one token."""
    conditioning: Literal["encoder", "null"] = "encoder"
    """`null`: every tile gets the null condition, a stand-in for an unconditional model."""
    timesteps: tuple[int, ...] = (50,)
    """Diffusion steps at which features are read, without noise at 0; those of several are
    concatenated."""
    taps: tuple[int, ...] = tuple(range(TAP_COUNT))
    """Blocks whose activations are read: 0 the middle block, 1..12 the decoder."""
    details: tuple[int, ...] = ()
    """Strides at which activations of the first stage's encoder are read as well, fine to coarse:
    of a first stage with factor 4, 1 and 2. Not in the paper; empty as there."""
    tile_px: int = 256
    """Side of a tile in pixels."""

    def __post_init__(self) -> None:
        check_timesteps(self.timesteps, self.schedule.steps)
        if not self.taps or sorted(set(self.taps)) != list(self.taps):
            raise ConfigError(f"taps {list(self.taps)}: give increasing numbers, at least one")
        if not all(0 <= t < TAP_COUNT for t in self.taps):
            raise ConfigError(f"taps {list(self.taps)}: each must be from 0 to {TAP_COUNT - 1}")
        finer = sorted(detail_layout(self.first_stage))
        if sorted(set(self.details) & set(finer)) != list(self.details):
            raise ConfigError(
                f"details {list(self.details)}: give increasing strides out of {finer}"
            )
        if self.tile_px % (self.first_stage.factor * 8) or self.tile_px % self.encoder.patch_px:
            raise ConfigError(f"tile_px {self.tile_px}: not divisible by the networks' strides")


class PathSegDiffExtractor(FeatureExtractor):
    """Encoder, first stage, conditioner and U-Net; forward gives the taps of every timestep.

    The first stage's decoder takes no part in the features; `drop_decoder` removes it.
    """

    def __init__(self, config: PathSegDiffConfig) -> None:
        super().__init__()
        self.config = config
        self.tile_px = config.tile_px
        self.encoder = ViT(config.encoder)
        self.first_stage = build_first_stage(config.first_stage)
        self.conditioner = Conditioner(
            config.encoder.dim, config.region_dim, config.unet.context_dim
        )
        self.unet = build_unet(config.unet, config.first_stage.latent_channels)
        self.alphas_bar = alphas_bar(config.schedule)
        layout = tap_layout(config.unet)
        factor = config.first_stage.factor
        one_step = tuple(FeatureSpec(layout[t][0], layout[t][1] * factor) for t in config.taps)
        fine = detail_layout(config.first_stage)
        details = tuple(FeatureSpec(fine[s], s) for s in config.details)
        self.specs = one_step * len(config.timesteps) + details

    def trainable(self, part: str) -> list[nn.Parameter]:
        """Of the denoiser: `all` of it, or its `decoder` (middle block and up blocks).

        `network` adds what comes before it: the encoder of the first stage, the self-supervised
        encoder and the conditioner.
        """
        unet: Any = self.unet
        first_stage: Any = self.first_stage
        before = [first_stage.encoder, first_stage.quant_conv, self.encoder, self.conditioner]
        parts: dict[str, list[Any]] = {
            "none": [],
            "decoder": [unet.mid_block, unet.up_blocks],
            "all": [unet],
            "network": [unet, *before],
        }
        return [p for module in parts[part] for p in module.parameters()]

    def drop_decoder(self) -> None:
        """Remove the parts of the first stage that only reconstruction needs."""
        for name in ("decoder", "post_quant_conv", "quantize"):
            if hasattr(self.first_stage, name):
                delattr(self.first_stage, name)

    def context(self, images: Tensor) -> Tensor:
        """(B, tokens, context_dim) conditioning of tiles in [-1, 1]."""
        if self.config.conditioning == "null":
            return self.conditioner.null(len(images))
        context: Tensor = self.conditioner(self.encoder(images))
        return context

    def forward(self, images: Tensor, places: Sequence[Point], seed: int) -> Features:
        """Taps of every timestep, timestep by timestep, then the details; see `specs`."""
        if images.is_cpu and not torch.is_grad_enabled():  # see docs/performance.md
            images = channels_last(images)
        latents, details = encode_with_details(
            self.first_stage, self.config.first_stage, images, self.config.details
        )
        context = self.context(images)
        maps: list[Tensor] = []
        c, h, w = latents.shape[1:]
        for t in self.config.timesteps:
            draw = partial(place_noise, places, seed, t, (c, h, w))
            noised = at_step(latents, t, self.alphas_bar, draw)
            maps.extend(read_taps(self.unet, noised, t, context, self.config.taps))
        return (*maps, *details)


def parameter_counts(extractor: PathSegDiffExtractor) -> dict[str, int]:
    """Parameters of each part, named as in the paper's Table 1."""
    parts: dict[str, torch.nn.Module] = {
        "hipt": extractor.encoder,
        "unet": extractor.unet,
        "first_stage": extractor.first_stage,
        "conditioner": extractor.conditioner,
    }
    return {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
