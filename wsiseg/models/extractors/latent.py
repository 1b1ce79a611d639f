"""The parts of PathSegDiff's latent diffusion model: first stage, conditioner, U-Net and taps.

Source: PathSegDiff (arXiv:2504.06950) sections 3.1-3.2; CompVis latent-diffusion for the layouts;
parameter counts of the paper's Table 1. Knows no tiles and no heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from wsiseg.errors import ConfigError
from wsiseg.models.compat import ensure_torchvision_imports

TAP_COUNT = 13


@dataclass(frozen=True)
class FirstStageConfig:
    """Configuration of the autoencoder whose latents are denoised."""

    kind: Literal["vq", "kl"] = "vq"
    """Codebook (VQModel) or Gaussian (AutoencoderKL) bottleneck."""
    channels: tuple[int, ...] = (128, 256, 512)
    """Channels of the levels; the factor is 2 to the number of levels less one."""
    layers: int = 2
    """Residual blocks a level."""
    latent_channels: int = 3
    """Channels of the latent."""
    codes: int = 8192
    """Codebook entries (vq only)."""
    scale: float = 1.0
    """Latents are multiplied by this before noising."""
    shift: float = 0.0
    """Subtracted from the latents before scaling."""
    groups: int = 32
    """Groups of the group norms."""
    attention: bool = True
    """Self-attention in the middle of encoder and decoder, at the latent's resolution."""

    def __post_init__(self) -> None:
        _check_widths("first_stage", self.channels, self.groups)
        if min(self.layers, self.latent_channels, self.codes) < 1 or not self.scale > 0:
            raise ConfigError("first_stage: layers, latent_channels, codes and scale must be > 0")

    @property
    def factor(self) -> int:
        """Image pixels per latent pixel."""
        return int(2 ** (len(self.channels) - 1))


@dataclass(frozen=True)
class UNetConfig:
    """Configuration of the denoiser."""

    channels: tuple[int, ...] = (192, 384, 576, 960)
    """Channels of the four levels, fine to coarse."""
    layers: int = 2
    """Residual blocks a level (the decoder has one more)."""
    context_dim: int = 512
    """Width of a conditioning token."""
    groups: int = 32
    """Groups of the group norms."""

    def __post_init__(self) -> None:
        if len(self.channels) != 4 or self.layers != 2:
            raise ConfigError("the denoiser has four levels of two blocks: 12 decoder taps")
        if self.context_dim < 1:
            raise ConfigError(f"unet: context_dim {self.context_dim}: must be at least 1")
        _check_widths("unet", self.channels, self.groups)


def _check_widths(where: str, channels: Sequence[int], groups: int) -> None:
    if groups < 1 or not channels or any(c < 1 or c % groups for c in channels):
        raise ConfigError(
            f"{where}: channels {list(channels)} must be multiples of groups {groups}"
        )


def build_first_stage(config: FirstStageConfig) -> nn.Module:
    """The diffusers autoencoder of the configuration (VQModel or AutoencoderKL)."""
    ensure_torchvision_imports()
    from diffusers import AutoencoderKL, VQModel

    levels = len(config.channels)
    common: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "block_out_channels": config.channels,
        "layers_per_block": config.layers,
        "latent_channels": config.latent_channels,
        "norm_num_groups": config.groups,
        "scaling_factor": config.scale,
        "mid_block_add_attention": config.attention,
    }
    if config.kind == "vq":
        model: nn.Module = VQModel(
            **common, num_vq_embeddings=config.codes, vq_embed_dim=config.latent_channels
        )
    else:
        model = AutoencoderKL(**common)
    return model


def encode(first_stage: nn.Module, config: FirstStageConfig, images: Tensor) -> Tensor:
    """(B, C, H / f, W / f) latents of images in [-1, 1], deterministic, scaled.

    VQ: after quant_conv and before quantisation; KL: the mean of the Gaussian.
    """
    return encode_with_details(first_stage, config, images, ())[0]


def encode_with_details(
    first_stage: nn.Module, config: FirstStageConfig, images: Tensor, strides: Sequence[int]
) -> tuple[Tensor, list[Tensor]]:
    """Latents as of `encode`, and activations of the encoder on the way there.

    Args:
        first_stage: an autoencoder of `build_first_stage`.
        config: its configuration.
        images: (B, 3, H, W) in [-1, 1].
        strides: image pixels per pixel of the activations wanted, of `detail_layout`; each is
            read after the residual blocks of its level.

    Returns:
        The latents, and one (B, channels, H / stride, W / stride) tensor a stride.
    """
    net: Any = first_stage
    details: list[Tensor] = []
    x = net.encoder.conv_in(images)
    for level, block in enumerate(net.encoder.down_blocks):
        for resnet in block.resnets:
            x = resnet(x, temb=None)
        if 2**level in strides:
            details.append(x)
        for shrink in block.downsamplers or ():
            x = shrink(x)
    x = net.encoder.conv_act(net.encoder.conv_norm_out(net.encoder.mid_block(x)))
    latents: Tensor = net.quant_conv(net.encoder.conv_out(x))
    if config.kind == "kl":
        latents = latents[:, : config.latent_channels]
    return (latents - config.shift) * config.scale, details


def detail_layout(config: FirstStageConfig) -> dict[int, int]:
    """Channels of the first stage's activations by stride: those finer than the latent."""
    return {2**level: c for level, c in enumerate(config.channels[:-1])}


def build_unet(config: UNetConfig, latent_channels: int) -> nn.Module:
    """The diffusers U-Net with CompVis' layout: attention at downsamples 2, 4, 8, one head."""
    ensure_torchvision_imports()
    from diffusers import UNet2DConditionModel

    unet: nn.Module = UNet2DConditionModel(
        in_channels=latent_channels,
        out_channels=latent_channels,
        down_block_types=("DownBlock2D", *("CrossAttnDownBlock2D",) * 3),
        up_block_types=(*("CrossAttnUpBlock2D",) * 3, "UpBlock2D"),
        block_out_channels=config.channels,
        layers_per_block=config.layers,
        cross_attention_dim=config.context_dim,
        attention_head_dim=1,  # diffusers reads it as the number of heads here
        norm_num_groups=config.groups,
        use_linear_projection=False,
    )
    return unet


class Conditioner(nn.Module):
    """The authors' SSLEmbedder: two context tokens from the encoder's vector.

    The first token is the projection of the L2-normalised patch vector, the second that of a zero
    region vector: a constant (the bias of `region_fc`), but not a zero key, so it stays.
    """

    def __init__(self, patch_dim: int, region_dim: int, context_dim: int) -> None:
        super().__init__()
        self.patch_fc = nn.Linear(patch_dim, context_dim)
        self.region_fc = nn.Linear(region_dim, context_dim) if region_dim else None

    def forward(self, vectors: Tensor) -> Tensor:
        """(B, 2, context_dim) from (B, patch_dim); one token where there is no region_fc."""
        return self.context(nnf.normalize(vectors, dim=-1))

    def null(self, batch: int) -> Tensor:
        """(B, 2, context_dim) of the null condition: a zero patch vector."""
        weight = self.patch_fc.weight
        return self.context(weight.new_zeros(batch, weight.shape[1]))

    def context(self, patch: Tensor) -> Tensor:
        """Tokens of patch vectors that are normalised already."""
        tokens = [self.patch_fc(patch)]
        if self.region_fc is not None:
            tokens.append(self.region_fc(patch.new_zeros(len(patch), self.region_fc.in_features)))
        return torch.stack(tokens, dim=1)


def tap_layout(config: UNetConfig) -> list[tuple[int, int]]:
    """(channels, reduction against the latent) of the 13 taps, middle block first."""
    c0, c1, c2, c3 = config.channels
    return [
        (c3, 8),
        *[(c3, 8), (c3, 8), (c3, 4)],
        *[(c2, 4), (c2, 4), (c2, 2)],
        *[(c1, 2), (c1, 2), (c1, 1)],
        *[(c0, 1), (c0, 1), (c0, 1)],
    ]


def read_taps(
    unet: nn.Module, latents: Tensor, timestep: int, context: Tensor, taps: Sequence[int]
) -> list[Tensor]:
    """Activations of the middle block (tap 0) and the 12 decoder blocks (taps 1..12).

    A tap is read where CompVis' output_blocks end: after the attention, and after the upsampling
    convolution for the last block of a level. Nothing is computed beyond the last tap asked for.

    Args:
        unet: a UNet2DConditionModel of `build_unet`.
        latents: (B, C, h, w) noised latents.
        timestep: diffusion step the latents are at.
        context: (B, tokens, context_dim).
        taps: increasing tap numbers.

    Returns:
        One (B, channels, h / r, w / r) tensor a tap, see `tap_layout`.
    """
    net: Any = unet
    temb = _time(net, timestep, latents)
    x = net.conv_in(latents)
    skips: list[Tensor] = [x]
    for block in net.down_blocks:
        if hasattr(block, "attentions"):
            x, states = block(x, temb, encoder_hidden_states=context)
        else:
            x, states = block(x, temb)
        skips.extend(states)
    x = net.mid_block(x, temb, encoder_hidden_states=context)
    last, index, found = taps[-1], 0, []
    if 0 in taps:
        found.append(x)
    for block in net.up_blocks:
        attentions = getattr(block, "attentions", None)
        for layer, resnet in enumerate(block.resnets):
            if index == last:
                return found
            x = resnet(torch.cat((x, skips.pop()), dim=1), temb)
            if attentions is not None:
                x = attentions[layer](x, encoder_hidden_states=context, return_dict=False)[0]
            if layer == len(block.resnets) - 1 and block.upsamplers is not None:
                x = block.upsamplers[0](x)
            index += 1
            if index in taps:
                found.append(x)
    return found


def _time(net: Any, timestep: int, latents: Tensor) -> Tensor | int:
    """The time embedding of a batch; where it is folded into the blocks, its number there."""
    folded: tuple[int, ...] = getattr(net, "folded_times", ())
    if timestep in folded:
        return folded.index(timestep)
    time = torch.full((len(latents),), timestep, device=latents.device, dtype=torch.long)
    embedding: Tensor = net.time_embedding(net.time_proj(time).to(latents.dtype))
    return embedding
