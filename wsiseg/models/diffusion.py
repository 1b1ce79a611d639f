"""Noise schedules and noise that belongs to a place. Knows no network.

Source: PathSegDiff's latent diffusion model, DDPM with 1000 steps and beta 0.0015..0.0195 on a
`scaled_linear` schedule; Ho et al. 2020, eq. 4 for q_sample; Choi et al. 2022 (P2 weighting).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from wsiseg.errors import ConfigError
from wsiseg.geometry import Point


@dataclass(frozen=True)
class ScheduleConfig:
    """Configuration of a DDPM noise schedule."""

    steps: int = 1000
    """Number of diffusion steps T."""
    beta_start: float = 0.0015
    """First beta."""
    beta_end: float = 0.0195
    """Last beta."""
    kind: Literal["scaled_linear", "linear", "quadratic"] = "scaled_linear"
    """`linear`: betas evenly spaced; `scaled_linear` and `quadratic`: their square roots are."""

    def __post_init__(self) -> None:
        if self.steps < 1 or not 0 < self.beta_start <= self.beta_end < 1:
            raise ConfigError(
                "schedule: steps must be at least 1, and 0 < beta_start <= beta_end < 1"
            )


def alphas_bar(config: ScheduleConfig) -> Tensor:
    """(T,) float32 cumulative products of 1 - beta, computed in float64."""
    start, end = config.beta_start, config.beta_end
    kind = torch.float64
    if config.kind == "linear":
        betas = torch.linspace(start, end, config.steps, dtype=kind, device="cpu")
    else:
        betas = torch.linspace(start**0.5, end**0.5, config.steps, dtype=kind, device="cpu") ** 2
    return torch.cumprod(1.0 - betas, dim=0).float()


def add_noise(clean: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """q_sample: sqrt(abar) * clean + sqrt(1 - abar) * noise; alpha_bar a scalar or (B, 1, 1, 1)."""
    return alpha_bar.sqrt() * clean + (1.0 - alpha_bar).sqrt() * noise


def at_step(clean: Tensor, timestep: int, table: Tensor, draw: Callable[[], Tensor]) -> Tensor:
    """Clean samples as features are read from them: at step 0 as they are, else with noise.

    Args:
        clean: (B, C, h, w) of any floating type, which the result has too.
        timestep: diffusion step.
        table: `alphas_bar`, in float32 whatever the samples are: 1 - abar needs its digits.
        draw: gives the noise, (B, C, h, w) or (1, C, h, w); not called at step 0.
    """
    if timestep == 0:
        return clean
    return add_noise(clean, draw().to(clean), table[timestep])


def p2_weight(alphas_bar: Tensor) -> Tensor:
    """P2 weight of the noise loss, 1 / (k + SNR)^gamma with k = gamma = 1, of every step.

    The signal-to-noise ratio is abar / (1 - abar), so that 1 / (1 + SNR) = 1 - abar: nearly clean
    images count little.

    Args:
        alphas_bar: (T,) cumulative products of `alphas_bar`, or any selection of them.
    """
    return 1.0 - alphas_bar


Supply = Callable[[Sequence[Point], int, int, tuple[int, int, int]], Tensor]
_SUPPLY: ContextVar[Supply | None] = ContextVar("noise", default=None)


@contextmanager
def supplied_noise(supply: Supply) -> Iterator[None]:
    """Inside the block `place_noise` gives what `supply` does: for tracing a network."""
    token = _SUPPLY.set(supply)
    try:
        yield
    finally:
        _SUPPLY.reset(token)


def place_noise(
    places: Sequence[Point], seed: int, timestep: int, shape: tuple[int, int, int]
) -> Tensor:
    """Standard normal noise that depends on (seed, place, timestep) and nothing else.

    A counter-based generator (Philox) keyed by a digest of the four numbers gives raw bits that
    are the same on every machine and in every release; Box-Muller turns them into normals.

    Args:
        places: B tile places.
        seed: seed of the run.
        timestep: diffusion step.
        shape: (C, h, w) of one latent.

    Returns:
        (B, C, h, w) float32 on the CPU.
    """
    supply = _SUPPLY.get()
    if supply is not None:
        return supply(places, seed, timestep, shape)
    count = int(np.prod(shape))
    pairs = -(-count // 2)
    noise = np.empty((len(places), 2 * pairs), np.float32)
    for row, place in zip(noise, places, strict=True):
        text = f"{seed}:{place[0]}:{place[1]}:{timestep}".encode()
        key = np.frombuffer(hashlib.blake2b(text, digest_size=16).digest(), np.uint64)
        raw = np.random.Philox(key=key).random_raw(2 * pairs)
        uniform = ((raw >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
        radius = np.sqrt(-2.0 * np.log(uniform[:pairs]))
        angle = 2.0 * np.pi * uniform[pairs:]
        row[:pairs], row[pairs:] = radius * np.cos(angle), radius * np.sin(angle)
    return torch.from_numpy(noise[:, :count].reshape(len(places), *shape).copy())


def check_timesteps(timesteps: Sequence[int], steps: int) -> None:
    """Refuse timesteps outside 0..T-1, repeated ones and none at all.

    Raises:
        ConfigError: as said.
    """
    if not timesteps or len(set(timesteps)) != len(timesteps):
        raise ConfigError(f"timesteps {list(timesteps)}: give one or several different ones")
    if any(not 0 <= t < steps for t in timesteps):
        raise ConfigError(f"timesteps {list(timesteps)}: each must be from 0 to {steps - 1}")
