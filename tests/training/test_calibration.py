from __future__ import annotations

import json
import math
import tracemalloc

import numpy as np
import pytest
from scipy.special import softmax
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss, log_loss

from wsiseg.classes import IGNORE
from wsiseg.training import calibration
from wsiseg.training.calibration import (
    BINS,
    TEMPERATURES,
    Reliability,
    checked_temperature,
    fit_temperature,
    sampled_pixels,
)


def image(classes: int = 3, seed: int = 0, spread: float = 2.0) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities (C, H, W) and a truth with ignored pixels that agrees with them half-way."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, spread, (classes, 17, 23))
    truth = (logits + rng.gumbel(0, 2, logits.shape)).argmax(0).astype(np.uint8)
    truth[rng.random(truth.shape) < 0.2] = IGNORE
    return softmax(logits, axis=0).astype(np.float32), truth


def drawn(
    temperature: float, classes: int = 3, count: int = 60_000, seed: int = 4
) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities at temperature 1 of logits whose truth follows softmax(logits / T)."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, (classes, count))
    truth = (logits / temperature + rng.gumbel(size=logits.shape)).argmax(0)
    return softmax(logits, axis=0).astype(np.float32), truth


def slow_rows(images: list[tuple[np.ndarray, np.ndarray]]) -> list[tuple[int, float, float]]:
    """(count, mean confidence, accuracy) of each bin, pixel by pixel."""
    members: list[list[tuple[float, bool]]] = [[] for _ in range(BINS)]
    for probabilities, truth in images:
        for y, x in np.ndindex(*truth.shape):
            if truth[y, x] == IGNORE:
                continue
            pixel = probabilities[:, y, x]
            p = float(pixel.max())
            k = next(k for k in range(BINS) if p <= (k + 1) / BINS or k == BINS - 1)
            members[k].append((p, bool(pixel.argmax() == truth[y, x])))
    return [
        (len(m), float(np.mean([p for p, _ in m])), float(np.mean([r for _, r in m])))
        if m
        else (0, math.nan, math.nan)
        for m in members
    ]


def test_bins_and_errors_are_those_of_a_slow_loop() -> None:
    images = [image(seed=s) for s in range(3)]
    tally = Reliability()
    for one in images:
        tally.add(*one)
    slow = slow_rows(images)
    for row, (count, confidence, accuracy) in zip(tally.rows(), slow, strict=True):
        assert row["count"] == count
        if count:
            assert row["confidence"] == pytest.approx(confidence, rel=1e-6)
            assert row["accuracy"] == pytest.approx(accuracy)
        else:
            assert row["confidence"] is None
            assert row["accuracy"] is None
    total = sum(n for n, _, _ in slow)
    gaps = [(n, abs(a - c)) for n, c, a in slow if n]
    assert tally.pixels == total
    assert tally.ece() == pytest.approx(sum(n * g for n, g in gaps) / total, rel=1e-5)
    assert tally.mce() == pytest.approx(max(g for _, g in gaps), rel=1e-5)
    assert tally.ece() > 0.05  # the logits are twice too large: it must be seen


def test_likelihood_and_brier_are_those_of_scikit_learn() -> None:
    for classes in (2, 3):
        probabilities, truth = image(classes)
        tally = Reliability()
        tally.add(probabilities, truth)
        kept = truth != IGNORE
        rows, labels = probabilities[:, kept].T.astype(np.float64), truth[kept]
        rows /= rows.sum(axis=1, keepdims=True)
        assert tally.nll() == pytest.approx(log_loss(labels, rows, labels=range(classes)), rel=1e-5)
        brier = sum(brier_score_loss(labels == k, rows[:, k]) for k in range(classes))
        assert tally.brier() == pytest.approx(brier, rel=1e-5)


def test_bins_are_those_of_scikit_learn() -> None:
    probabilities, truth = image(2)
    tally = Reliability()
    tally.add(probabilities, truth)
    kept = truth != IGNORE
    right = probabilities.argmax(0)[kept] == truth[kept]
    accuracy, confidence = calibration_curve(right, probabilities.max(0)[kept], n_bins=BINS)
    rows = [row for row in tally.rows() if row["count"]]
    np.testing.assert_allclose([row["accuracy"] for row in rows], accuracy)
    np.testing.assert_allclose([row["confidence"] for row in rows], confidence, rtol=1e-6)


def test_an_image_is_counted_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    probabilities, truth = image()
    whole = Reliability()
    whole.add(probabilities, truth)
    for chunk in (1, 50, 17 * 23):
        monkeypatch.setattr(calibration, "CHUNK_PX", chunk)
        parts = Reliability()
        parts.add(probabilities, truth)
        for name in ("pixels", "ece", "mce", "nll", "brier"):
            assert parts.summary()[name] == pytest.approx(whole.summary()[name], rel=1e-12)
        for one, other in zip(parts.rows(), whole.rows(), strict=True):
            assert (one["count"], one["accuracy"]) == (other["count"], other["accuracy"])
            assert not one["count"] or one["confidence"] == pytest.approx(other["confidence"])
    monkeypatch.setattr(calibration, "CHUNK_PX", 10_000)
    large = np.full((4, 500, 400), 0.25, np.float32)
    tracemalloc.start()
    try:
        Reliability().add(large, np.zeros((500, 400), np.uint8))
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < large.nbytes / 2


def test_bounds_of_bins_sure_mistakes_and_nothing() -> None:
    tally = Reliability(bins=4)
    assert (tally.ece(), tally.mce(), tally.nll(), tally.brier()) == (0, 0, 0, 0)
    high = np.float32([0.5, 0.75, 1.0, 1.0])
    probabilities = np.stack([high, 1 - high])[:, None]
    tally.add(probabilities, np.uint8([[0, 0, 0, 1]]))
    assert [row["count"] for row in tally.rows()] == [0, 1, 1, 2]
    assert math.isfinite(tally.nll())
    assert json.loads(json.dumps(tally.summary(), allow_nan=False))["pixels"] == 4


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
@pytest.mark.parametrize("classes", [2, 4])
def test_a_known_temperature_is_found(temperature: float, classes: int) -> None:
    probabilities, truth = drawn(temperature, classes)
    halves = [(probabilities[:, i::2], truth[i::2]) for i in range(2)]
    found = fit_temperature(iter(halves))
    assert found == pytest.approx(temperature, rel=0.03)


def test_the_temperature_found_mends_the_probabilities() -> None:
    probabilities, truth = drawn(2.5)
    found = fit_temperature([(probabilities, truth)])
    mended = softmax(np.log(probabilities) / found, axis=0).astype(np.float32)
    before, after = Reliability(), Reliability()
    before.add(probabilities[:, None], truth[None].astype(np.uint8))
    after.add(mended[:, None], truth[None].astype(np.uint8))
    assert after.ece() < 0.02 < 0.1 < before.ece()
    assert after.nll() < before.nll()
    assert (mended.argmax(0) == probabilities.argmax(0)).all()


def test_a_temperature_is_kept_where_it_carries_over_to_groups_left_out() -> None:
    def groups(*temperatures: float) -> dict[str, list[tuple[np.ndarray, np.ndarray]]]:
        return {
            str(i): [drawn(t, count=2000, seed=10 + i), drawn(t, count=1000, seed=50 + i)]
            for i, t in enumerate(temperatures)
        }

    assert checked_temperature(groups(2.5, 2.5)) == pytest.approx(2.5, rel=0.1)
    alike = groups(*[0.5, 0.6] * 7)
    expected = fit_temperature([part for parts in alike.values() for part in parts])
    assert checked_temperature(alike) == pytest.approx(expected, rel=1e-3)
    assert 0.45 < expected < 0.65
    assert checked_temperature(groups(0.57, 3.0)) == 1.0
    assert checked_temperature(groups(2.5)) == checked_temperature({}) == 1.0


def test_temperatures_of_nothing_and_of_what_is_always_right() -> None:
    assert fit_temperature([]) == 1.0
    empty = np.zeros((2, 0), np.float32), np.zeros(0, np.int64)
    assert fit_temperature([empty]) == 1.0
    sure = np.float32([[0.9] * 50, [0.1] * 50]), np.zeros(50, np.int64)
    assert fit_temperature([sure]) == pytest.approx(TEMPERATURES[0], rel=1e-3)
    wrong = np.float32([[0.0] * 50, [1.0] * 50]), np.zeros(50, np.int64)
    assert fit_temperature([wrong]) == pytest.approx(TEMPERATURES[1], rel=1e-3)


def test_sampled_pixels_are_labelled_ones_and_the_same_for_a_seed() -> None:
    probabilities, truth = image()
    values, labels = sampled_pixels(probabilities, truth, seed=1, most=50)
    assert values.shape == (3, 50)
    assert labels.shape == (50,)
    at = {tuple(p): int(t) for p, t in zip(probabilities.reshape(3, -1).T, truth.flat, strict=True)}
    assert len(set(map(tuple, values.T))) == 50
    assert [at[tuple(p)] for p in values.T] == labels.tolist()
    again = sampled_pixels(probabilities, truth, seed=1, most=50)
    other = sampled_pixels(probabilities, truth, seed=2, most=50)
    assert (values == again[0]).all()
    assert not (values == other[0]).all()
    everything, labels = sampled_pixels(probabilities, truth, seed=1)
    assert len(labels) == (truth != IGNORE).sum() == everything.shape[1]
