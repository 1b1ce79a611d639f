"""Training of the conditioned denoiser on latents, and its samples. Knows no labels.

Sources: Rombach et al., High-Resolution Image Synthesis with Latent Diffusion Models (CVPR 2022);
Graikos et al. (CVPR 2024) for the self-supervised guidance and the dropped condition.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
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
    build_unet,
    encode,
)
from wsiseg.models.extractors.pathsegdiff import PathSegDiffConfig
from wsiseg.models.extractors.vit import ViT
from wsiseg.training.autoencoder import decode
from wsiseg.training.denoising import check_denoising, ddim, draw_timesteps, move_average


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
            vectors = self.vectors(images)
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
        alpha_bar = self.alphas_bar[t].view(-1, 1, 1, 1).to(latents.device)
        predicted = self.predict(which, add_noise(latents, noise, alpha_bar), vectors, t)
        return nnf.mse_loss(predicted, noise)

    def predict(self, which: str, noised: Tensor, vectors: Tensor, t: Tensor) -> Tensor:
        """(B, C, h, w) float32 noise that the `live` or `average` weights see; as of `error`."""
        parts: Any = self.module[which]
        context = parts["conditioner"].context(vectors)
        seen: Tensor = parts["unet"](noised, t.to(noised.device), context).sample
        return seen.float()

    def vectors(self, images: Tensor) -> Tensor:
        """(B, dim) L2-normalised float32 vectors of the encoder."""
        return nnf.normalize(self.encoder(images).float(), dim=-1)

    def after_step(self, step: int, gone: float) -> None:
        """Move the averaged weights towards the live ones."""
        move_average(self.module["average"], self.module["live"], ema=self.training.ema, step=step)


def denoising_error(
    task: DenoiserTask, images: Tensor, timestep: int, *, seed: int
) -> dict[str, float]:
    """Mean squared error of the noise predicted by the averaged weights at one timestep.

    Returns:
        `conditioned` with each image's own vector, `null` with the null condition, `shuffled`
        with another image's vector (of two images or more): conditioning is used where the first
        is the lowest.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        latents = encode(task.first_stage, task.config.first_stage, images)
        vectors = task.vectors(images)
        t = torch.full((len(images),), timestep)
        noise = torch.randn(latents.shape, generator=generator).to(latents.device)
        variants = {
            "conditioned": vectors,
            "null": torch.zeros_like(vectors),
        }
        if len(images) > 1:
            variants["shuffled"] = vectors.roll(1, dims=0)
        return {
            name: float(task.error("average", latents, v, t, noise)) for name, v in variants.items()
        }


def sample_like(task: DenoiserTask, images: Tensor, *, seed: int) -> Tensor:
    """(B, 3, H, W) images sampled by DDIM from the vectors of images (B, 3, H, W) alone."""
    generator = torch.Generator().manual_seed(seed)
    stage = task.config.first_stage
    with torch.no_grad():
        vectors = task.vectors(images)
        shape = encode(task.first_stage, stage, images).shape
        noise = torch.randn(shape, generator=generator).to(images.device)
        latents = ddim(lambda x, t: task.predict("average", x, vectors, t), noise, task.alphas_bar)
        return decode(task.first_stage, stage, latents)
