"""Noise by place, the schedule and q_sample against their definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from wsiseg.errors import ConfigError
from wsiseg.geometry import Point
from wsiseg.models.diffusion import (
    ScheduleConfig,
    add_noise,
    alphas_bar,
    at_step,
    check_timesteps,
    p2_weight,
    place_noise,
)

SHAPE = (3, 8, 8)


def test_noise_depends_on_seed_place_and_timestep_alone() -> None:
    first = place_noise([Point(256, 512)], 7, 50, SHAPE)[0]
    places = [Point(0, 0), Point(256, 512), Point(512, 256), Point(-256, 512)]
    batch = place_noise(places, 7, 50, SHAPE)
    assert batch.dtype == torch.float32
    assert torch.equal(batch[1], first)
    assert torch.equal(place_noise(places[::-1], 7, 50, SHAPE).flip(0), batch)
    others = [
        *(batch[i] for i in (0, 2, 3)),
        place_noise([Point(256, 0)], 7, 50, SHAPE)[0],
        place_noise([Point(0, 512)], 7, 50, SHAPE)[0],
        place_noise([Point(256, 512)], 8, 50, SHAPE)[0],
        place_noise([Point(256, 512)], 7, 51, SHAPE)[0],
    ]
    for other in others:
        assert float((other - first).abs().min(dim=-1).values.max()) > 0.01
        assert not torch.equal(other, first)


def test_numbers_that_join_to_the_same_text_differ() -> None:
    a = place_noise([Point(1, 23)], 4, 5, SHAPE)
    b = place_noise([Point(12, 3)], 4, 5, SHAPE)
    assert not torch.equal(a, b)


def test_noise_keeps_its_values() -> None:
    """Results must not change between processes, machines and releases."""
    found = place_noise([Point(256, 512)], 7, 50, (1, 1, 4)).flatten().tolist()
    assert found == pytest.approx(EXPECTED, abs=1e-6)


EXPECTED = [-0.95374346, 0.15362900, 1.04188192, -0.14710680]


def test_noise_is_standard_normal() -> None:
    places = [Point(256 * x, 256 * y) for x in range(10) for y in range(10)]
    noise = place_noise(places, 0, 50, (3, 32, 32)).double().numpy()
    assert stats.kstest(noise.ravel(), "norm").pvalue > 0.01
    assert abs(noise.mean()) < 0.01
    assert abs(noise.var() - 1) < 0.01
    assert abs(stats.kurtosis(noise.ravel())) < 0.05
    flat = noise.reshape(len(places), -1)
    between = np.corrcoef(flat)[~np.eye(len(places), dtype=bool)]
    assert np.abs(between).max() < 5 / np.sqrt(flat.shape[1])
    for axis in (2, 3):
        a, b = np.take(noise, range(31), axis), np.take(noise, range(1, 32), axis)
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.01


def test_odd_sizes() -> None:
    assert place_noise([Point(0, 0)], 0, 0, (1, 3, 3)).shape == (1, 1, 3, 3)
    assert place_noise([], 0, 0, (1, 3, 3)).shape == (0, 1, 3, 3)


def test_schedule_is_the_originals() -> None:
    products = alphas_bar(ScheduleConfig())
    assert products.shape == (1000,)
    assert float(products[50]) == pytest.approx(0.91668742, abs=5e-8)
    running, slow = 1.0, []
    for i in range(1000):
        root = 0.0015**0.5 + (0.0195**0.5 - 0.0015**0.5) * i / 999
        running *= 1 - root**2
        slow.append(running)
    assert np.allclose(products.numpy(), slow, rtol=1e-6)
    with torch.device("meta"):
        assert alphas_bar(ScheduleConfig()).device.type == "cpu"


def test_other_schedules() -> None:
    linear = alphas_bar(ScheduleConfig(steps=10, beta_start=0.1, beta_end=0.2, kind="linear"))
    assert linear.tolist() == pytest.approx(np.cumprod(1 - np.linspace(0.1, 0.2, 10)).tolist())
    quadratic = ScheduleConfig(steps=10, beta_start=1e-4, beta_end=0.02, kind="quadratic")
    betas = np.linspace(0.01, 0.02**0.5, 10) ** 2
    assert alphas_bar(quadratic).tolist() == pytest.approx(np.cumprod(1 - betas).tolist())


def test_p2_weight_is_one_over_one_plus_snr() -> None:
    products = alphas_bar(ScheduleConfig(beta_start=1e-4, beta_end=0.02, kind="quadratic"))
    ratio = products.double() / (1 - products.double())
    assert torch.allclose(p2_weight(products).double(), 1 / (1 + ratio), rtol=1e-3, atol=1e-7)
    assert p2_weight(torch.tensor([0.25])).tolist() == [0.75]


def test_q_sample() -> None:
    clean, noise = torch.full((2, 1, 2, 2), 3.0), torch.full((2, 1, 2, 2), 5.0)
    found = add_noise(clean, noise, torch.tensor([0.64, 1.0]).view(2, 1, 1, 1))
    assert found[0].unique().tolist() == pytest.approx([0.8 * 3 + 0.6 * 5])
    assert found[1].unique().tolist() == pytest.approx([3.0])


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_features_are_read_from_clean_samples_at_step_0_alone(kind: torch.dtype) -> None:
    """Rounding 1 - abar to bf16 would leave out 7 % of the noise at t = 5."""
    table = alphas_bar(ScheduleConfig())
    clean, noise = (
        torch.zeros(1, 3, 64, 64, dtype=kind),
        place_noise([Point(0, 0)], 0, 1, (3, 64, 64)),
    )
    assert at_step(clean, 0, table, pytest.fail) is clean
    for t in (1, 5, 50, 900):
        found = at_step(clean, t, table, lambda: noise)
        assert found.dtype == kind
        strength = float(found.float().std() / noise.std())
        assert strength == pytest.approx((1 - float(table[t])) ** 0.5, rel=3e-3)


@pytest.mark.parametrize("steps", [(), (5, 5), (-1,), (1000,)])
def test_timesteps_that_cannot_be(steps: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="timesteps"):
        check_timesteps(steps, 1000)
