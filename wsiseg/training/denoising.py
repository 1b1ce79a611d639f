"""What every denoiser's training shares: drawn timesteps, averaged weights. Knows no network."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from wsiseg.errors import ConfigError


def check_denoising(timestep_power: float, ema: float, where: str) -> None:
    """Refuse options of a denoiser's training that cannot be.

    Raises:
        ConfigError: `timestep_power` not above 0, `ema` not from 0 to below 1.
    """
    if not 0 < timestep_power < float("inf"):
        raise ConfigError(f"{where}.timestep_power {timestep_power}: must be above 0")
    if not 0 <= ema < 1:
        raise ConfigError(f"{where}.ema {ema}: must be from 0 to below 1")


def draw_timesteps(count: int, steps: int, power: float, generator: torch.Generator) -> Tensor:
    """(count,) int64 diffusion steps T * u ** power, u uniform; uniform over 0..T-1 for power 1."""
    u = torch.rand(count, generator=generator) ** power
    return (u * steps).long().clamp(max=steps - 1)


def move_average(average: nn.Module, live: nn.Module, *, ema: float, step: int) -> None:
    """Move averaged weights towards the live ones of the same network; faster at the start."""
    decay = min(ema, (1 + step) / (10 + step))
    with torch.no_grad():
        for kept, now in zip(average.parameters(), live.parameters(), strict=True):
            kept.lerp_(now, 1 - decay)
