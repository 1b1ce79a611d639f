"""What every denoiser shares: drawn timesteps, averaged weights, samples. Knows no network."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from wsiseg.errors import ConfigError

REPORTED = (0.01, 0.05, 0.15, 0.25, 0.5, 0.9)
"""Shares of T at which errors are reported."""
SAMPLING_STEPS = 50
"""Steps of a sample for a picture."""


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
    """Move averaged weights towards the live ones of the same network; faster at the start.

    Statistics that the network keeps (those of batch norm) are averaged as the weights are.
    """
    decay = min(ema, (1 + step) / (10 + step))
    with torch.no_grad():
        kept: tuple[Tensor, ...] = tuple(average.parameters())
        torch._foreach_lerp_(kept, tuple(live.parameters()), 1 - decay)  # on a GPU: few launches
        for buffer, current in zip(average.buffers(), live.buffers(), strict=True):
            if buffer.is_floating_point():
                buffer.lerp_(current, 1 - decay)
            else:
                buffer.copy_(current)


def ddim(
    predict: Callable[[Tensor, Tensor], Tensor],
    noise: Tensor,
    alphas_bar: Tensor,
    *,
    count: int = SAMPLING_STEPS,
    limit: float | None = None,
) -> Tensor:
    """Samples by DDIM without added noise (Song et al., ICLR 2021, eq. 12 with eta 0).

    Args:
        predict: the noise seen in (B, C, h, w) noised samples at (B,) int64 diffusion steps.
        noise: (B, C, h, w) standard normal, the start.
        alphas_bar: (T,) cumulative products of 1 - beta.
        count: steps, evenly spaced from T - 1 down to 0.
        limit: estimates of the clean sample are kept within +- this; None: as they are.

    Returns:
        (B, C, h, w) float32 clean samples.
    """
    x = noise.float()
    steps = torch.linspace(len(alphas_bar) - 1, 0, min(count, len(alphas_bar))).round().long()
    for i, step in enumerate(steps.tolist()):
        abar = float(alphas_bar[step])
        t = torch.full((len(x),), step)
        seen = predict(x, t).float()
        clean = (x - (1 - abar) ** 0.5 * seen) / abar**0.5
        if limit is not None:
            clean = clean.clamp(-limit, limit)
            seen = (x - abar**0.5 * clean) / (1 - abar) ** 0.5
        following = float(alphas_bar[steps[i + 1]]) if i + 1 < len(steps) else 1.0
        x = following**0.5 * clean + (1 - following) ** 0.5 * seen
    return x


def steps_at(shares: tuple[float, ...], steps: int) -> list[int]:
    """Distinct diffusion steps at shares of T."""
    return sorted({min(round(share * steps), steps - 1) for share in shares})
