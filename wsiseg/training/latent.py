"""Training of the first stage and of the conditioned denoiser. Knows no labels.

Sources: Rombach et al., High-Resolution Image Synthesis with Latent Diffusion Models (CVPR 2022);
Graikos et al. (CVPR 2024) for the self-supervised guidance and the dropped condition.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from wsiseg.datasets.augment import AugmentConfig, stain_jitter
from wsiseg.errors import ConfigError
from wsiseg.models.base import to_tensor
from wsiseg.models.diffusion import add_noise, alphas_bar
from wsiseg.models.extractors.latent import (
    Conditioner,
    FirstStageConfig,
    build_first_stage,
    build_unet,
    encode,
)
from wsiseg.models.extractors.pathsegdiff import PathSegDiffConfig
from wsiseg.models.extractors.vit import ViT
from wsiseg.training.denoising import check_denoising, draw_timesteps, move_average


@dataclass(frozen=True)
class AutoencoderConfig:
    """Configuration of the first stage's training."""

    bottleneck_weight: float = 1e-4
    """Weight of the KL term (kl) or of the commitment term (vq)."""
    edge_weight: float = 1.0
    """Weight of the L1 loss on horizontal and vertical differences, against blur."""


@dataclass(frozen=True)
class DenoiserConfig:
    """Configuration of the denoiser's training."""

    null_share: float = 0.1
    """Share of the crops that get the null condition."""
    timestep_power: float = 2.0
    """t = T * u ** power, u uniform: above 1 favours small t, where features are read."""
    ema: float = 0.995
    """Moving average of the weights, which is what is kept."""

    def __post_init__(self) -> None:
        check_denoising(self.timestep_power, self.ema, "denoiser")
        if not 0 <= self.null_share <= 1:
            raise ConfigError(f"denoiser.null_share {self.null_share}: must be from 0 to 1")


class AutoencoderTask:
    """L1 on pixels and on their differences, plus the bottleneck's term."""

    def __init__(
        self, first_stage: FirstStageConfig, config: AutoencoderConfig, augment: AugmentConfig
    ) -> None:
        self.first_stage, self.config, self.augment = first_stage, config, augment
        self.module = build_first_stage(first_stage)

    def parameters(self) -> list[nn.Parameter]:
        """All parameters."""
        return list(self.module.parameters())

    def losses(self, batch: object, step: int, generator: torch.Generator) -> Mapping[str, Tensor]:
        """Reconstruction and bottleneck losses of a batch (B, H, W, 3) uint8."""
        device = self.parameters()[0].device
        pixels = to_tensor(batch, device=device)  # type: ignore[arg-type]
        images = stain_jitter(pixels, self.augment, generator)
        rebuilt, bottleneck = self.reconstruct(images, generator)
        rebuilt = rebuilt.float()
        pixel = (rebuilt - images).abs().mean()
        edges = sum((rebuilt.diff(dim=d) - images.diff(dim=d)).abs().mean() for d in (-1, -2))
        loss = pixel + self.config.edge_weight * edges + self.config.bottleneck_weight * bottleneck
        psnr = -10 * torch.log10((rebuilt - images).square().mean() / 4)
        return {"loss": loss, "l1": pixel, "bottleneck": bottleneck, "psnr": psnr}

    def reconstruct(
        self, images: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """(reconstruction, bottleneck term); with a generator KL latents are sampled."""
        net: Any = self.module
        h = net.quant_conv(net.encoder(images))
        if self.first_stage.kind == "vq":
            z, term, _ = net.quantize(h)
        else:
            mean, log_variance = h.float().chunk(2, dim=1)
            log_variance = log_variance.clamp(-30, 20)
            term = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
            z = mean
            if generator is not None:
                noise = torch.randn(mean.shape, generator=generator).to(mean)
                z = mean + (0.5 * log_variance).exp() * noise
        return net.decoder(net.post_quant_conv(z)), term

    def after_step(self, step: int) -> None:
        """Nothing."""


def latent_statistics(
    first_stage: nn.Module, config: FirstStageConfig, images: Tensor
) -> FirstStageConfig:
    """The configuration with shift and scale that give latents of images mean 0 and deviation 1."""
    with torch.no_grad():
        latents = encode(first_stage, replace(config, scale=1.0, shift=0.0), images)
    return replace(config, scale=float(1 / latents.std()), shift=float(latents.mean()))


class DenoiserTask:
    """Noise prediction on latents, conditioned on the frozen encoder's vector."""

    def __init__(
        self,
        config: PathSegDiffConfig,
        training: DenoiserConfig,
        augment: AugmentConfig,
        *,
        encoder: ViT,
        first_stage: nn.Module,
    ) -> None:
        self.config, self.training, self.augment = config, training, augment
        self.encoder = encoder.eval().requires_grad_(False)
        self.first_stage = first_stage.eval().requires_grad_(False)
        live = nn.ModuleDict(
            {
                "unet": build_unet(config.unet, config.first_stage.latent_channels),
                "conditioner": Conditioner(
                    config.encoder.dim, config.region_dim, config.unet.context_dim
                ),
            }
        )
        average = copy.deepcopy(live).requires_grad_(False)
        self.module = nn.ModuleDict({"live": live, "average": average})
        self.alphas_bar = alphas_bar(config.schedule)

    def parameters(self) -> list[nn.Parameter]:
        """U-Net and conditioner."""
        return list(self.module["live"].parameters())

    def losses(self, batch: object, step: int, generator: torch.Generator) -> Mapping[str, Tensor]:
        """Mean squared error of the predicted noise of a batch (B, H, W, 3) uint8."""
        device = self.parameters()[0].device
        pixels = to_tensor(batch, device=device)  # type: ignore[arg-type]
        images = stain_jitter(pixels, self.augment, generator)
        with torch.no_grad():
            latents = encode(self.first_stage, self.config.first_stage, images).float()
            vectors = nnf.normalize(self.encoder(images).float(), dim=-1)
        b, steps = len(images), self.config.schedule.steps
        keep = torch.rand(b, 1, generator=generator) >= self.training.null_share
        t = draw_timesteps(b, steps, self.training.timestep_power, generator)
        noise = torch.randn(latents.shape, generator=generator).to(device)
        return {"loss": self.error("live", latents, vectors * keep.to(device), t, noise)}

    def error(
        self, which: str, latents: Tensor, vectors: Tensor, t: Tensor, noise: Tensor
    ) -> Tensor:
        """Mean squared error of the noise predicted by the `live` or `average` weights.

        Args:
            which: `live` or `average`.
            latents: (B, C, h, w) clean latents, scaled.
            vectors: (B, dim) L2-normalised vectors of the encoder; zeros for the null condition.
            t: (B,) int64 diffusion steps on the CPU.
            noise: (B, C, h, w) standard normal.
        """
        parts: Any = self.module[which]
        alpha_bar = self.alphas_bar[t].view(-1, 1, 1, 1).to(latents.device)
        noised = add_noise(latents, noise, alpha_bar)
        context = parts["conditioner"].context(vectors)
        predicted = parts["unet"](noised, t.to(noised.device), context).sample
        return nnf.mse_loss(predicted.float(), noise)

    def after_step(self, step: int) -> None:
        """Move the averaged weights towards the live ones."""
        move_average(self.module["average"], self.module["live"], ema=self.training.ema, step=step)
