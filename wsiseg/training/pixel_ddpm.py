"""Training of the pixel-space denoisers, and what they have learnt. Knows no labels.

Sources: GenSelfDiff-HIS (IEEE TMI 2024): noise prediction weighted by 1 / (1 + SNR), as in Choi et
al., Perception Prioritized Training of Diffusion Models (CVPR 2022) with k = gamma = 1; DDPM
features for nuclei segmentation (ISBI 2024): the plain squared error of Ho et al. 2020, eq. 14.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from wsiseg.datasets.augment import AugmentConfig, stain_jitter
from wsiseg.models.base import FeatureExtractor, to_tensor
from wsiseg.models.diffusion import add_noise, p2_weight
from wsiseg.training.denoising import (
    REPORTED,
    check_denoising,
    ddim,
    draw_timesteps,
    move_average,
    steps_at,
)
from wsiseg.training.image_grid import save_grid

SHOWN = (0.05, 0.25, 0.5)
"""Shares of T that the picture shows."""
SHOWN_CROPS = 8


@dataclass(frozen=True)
class PixelDDPMConfig:
    """Configuration of the training of a pixel-space denoiser."""

    weight: Literal["p2", "none"] = "none"
    """`p2`: the error at t is weighted by 1 / (1 + SNR(t)); `none`: plain mean squared error."""
    timestep_power: float = 1.0
    """t = T * u ** power, u uniform: 1 draws all steps alike, above 1 favours small t."""
    ema: float = 0.995
    """Moving average of the weights, which is what is kept."""

    def __post_init__(self) -> None:
        check_denoising(self.timestep_power, self.ema, "ddpm")


class PixelDenoiser(Protocol):
    """An extractor that predicts noise in pixel space.

    Attributes:
        alphas_bar: (T,) float32 cumulative products of 1 - beta.
    """

    @property
    def alphas_bar(self) -> Tensor: ...

    def predict_noise(self, noised: Tensor, timesteps: Tensor) -> Tensor:
        """(B, 3, H, W) noise in noised images (B, 3, H, W) at diffusion steps (B,) int64."""
        ...


class PixelDDPMTask:
    """Noise prediction on images; `average` holds the weights to keep."""

    def __init__(
        self, extractor: FeatureExtractor, config: PixelDDPMConfig, augment: AugmentConfig
    ) -> None:
        self.config, self.augment = config, augment
        average = copy.deepcopy(extractor).requires_grad_(False)
        self.module = nn.ModuleDict({"live": extractor, "average": average})
        network: PixelDenoiser = extractor  # type: ignore[assignment]
        self.alphas_bar = network.alphas_bar.detach().cpu().float()
        plain = torch.ones_like(self.alphas_bar)
        self.weights = p2_weight(self.alphas_bar) if config.weight == "p2" else plain

    @property
    def average(self) -> FeatureExtractor:
        """The network with the averaged weights."""
        network: Any = self.module["average"]
        kept: FeatureExtractor = network
        return kept

    @property
    def steps(self) -> int:
        """The number of diffusion steps T."""
        return len(self.alphas_bar)

    def parameters(self) -> list[nn.Parameter]:
        """All parameters of the live network."""
        return list(self.module["live"].parameters())

    def losses(self, batch: object, step: int, generator: torch.Generator) -> Mapping[str, Tensor]:
        """Weighted and plain error of the predicted noise of a batch (B, H, W, 3) uint8."""
        device = self.parameters()[0].device
        pixels = to_tensor(batch, device=device)  # type: ignore[arg-type]
        images = stain_jitter(pixels, self.augment, generator)
        t = draw_timesteps(len(images), self.steps, self.config.timestep_power, generator)
        noise = torch.randn(images.shape, generator=generator).to(device)
        errors = self.errors("live", images, t, noise)
        return {"loss": (errors * self.weights[t].to(device)).mean(), "mse": errors.mean()}

    def errors(self, which: str, images: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """(B,) mean squared errors of the noise predicted by the `live` or `average` weights.

        Args:
            which: `live` or `average`.
            images: (B, 3, H, W) clean images in [-1, 1].
            t: (B,) int64 diffusion steps on the CPU.
            noise: (B, 3, H, W) standard normal.
        """
        predicted = self.predict(which, self.noised(images, t, noise), t)
        return (predicted - noise).square().mean(dim=(1, 2, 3))

    def noised(self, images: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """(B, 3, H, W) images at the diffusion steps t."""
        return add_noise(images, noise, self.alphas_bar[t].view(-1, 1, 1, 1).to(images.device))

    def predict(self, which: str, noised: Tensor, t: Tensor) -> Tensor:
        """(B, 3, H, W) float32 noise that the `live` or `average` weights see."""
        network: PixelDenoiser = self.module[which]  # type: ignore[assignment]
        return network.predict_noise(noised, t.to(noised.device)).float()

    def after_step(self, step: int, gone: float) -> None:
        """Move the averaged weights towards the live ones."""
        move_average(self.module["average"], self.module["live"], ema=self.config.ema, step=step)


def timestep_errors(task: PixelDDPMTask, images: Tensor, *, seed: int) -> dict[str, float]:
    """Mean squared error of the noise predicted by the averaged weights, one noise for all steps.

    Args:
        task: what was trained.
        images: (B, 3, H, W) images that it did not train on.
        seed: seed of the noise.

    Returns:
        `t<step>` for the steps at REPORTED shares of T, and `zero`: the error of predicting
        nothing, below which the others must be.
    """
    noise = _noise_like(images, seed)
    report = {}
    with torch.no_grad():
        for number in steps_at(REPORTED, task.steps):
            t = torch.full((len(images),), number)
            report[f"t{number}"] = float(task.errors("average", images, t, noise).mean())
    return {**report, "zero": float(noise.square().mean())}


def save_estimates(path: Path, task: PixelDDPMTask, images: Tensor, *, seed: int) -> None:
    """A picture of what the averaged weights see: a column a crop, at most SHOWN_CROPS.

    Rows: the crops, then for each of the SHOWN steps the noised crops and the images that one
    prediction gives back, (x_t - sqrt(1 - abar) eps) / sqrt(abar).

    Raises:
        OutputError: the file cannot be written.
    """
    images = images[:SHOWN_CROPS]
    noise = _noise_like(images, seed)
    rows = [images]
    with torch.no_grad():
        for number in steps_at(SHOWN, task.steps):
            t, abar = torch.full((len(images),), number), task.alphas_bar[number].to(images.device)
            noised = task.noised(images, t, noise)
            predicted = task.predict("average", noised, t)
            rows += [noised, (noised - (1 - abar).sqrt() * predicted) / abar.sqrt()]
    save_grid(path, rows)


def sample(task: PixelDDPMTask, shape: tuple[int, int, int], count: int, *, seed: int) -> Tensor:
    """(count, C, H, W) images that the averaged weights make of noise, by DDIM."""
    device = task.parameters()[0].device
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn((count, *shape), generator=generator).to(device)
    with torch.no_grad():
        return ddim(lambda x, t: task.predict("average", x, t), noise, task.alphas_bar, limit=1.0)


def _noise_like(images: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(images.shape, generator=generator).to(images.device)
