"""Losses by hand, by a slow obvious version, and where pixels or classes take no part."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as nnf

from wsiseg.config import from_mapping, to_mapping
from wsiseg.errors import ConfigError, DatasetError
from wsiseg.training.losses import (
    LossConfig,
    focal_loss,
    frequency_weights,
    segmentation_loss,
    soft_dice_loss,
    structure_loss,
    thin_background,
)

ALL = LossConfig(cross_entropy=1.0, dice=0.5, focal=2.0, structure=0.25)


def batch(seed: int = 0, classes: int = 3, ignored: float = 0.2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, classes, 6, 5, generator=generator, dtype=torch.float64)
    target = torch.randint(0, classes, (2, 6, 5), generator=generator)
    target[torch.rand(target.shape, generator=generator) < ignored] = 255
    return logits, target


def two_class_logits(p: float) -> Tensor:
    """(1, 2, 1, 1) logits that give class 0 the probability p."""
    return torch.tensor([math.log(p), math.log(1 - p)]).view(1, 2, 1, 1)


def slow_structure(logits: Tensor, target: Tensor, weights: list[float]) -> float:
    """The definition, map by map and pixel by pixel."""
    probabilities = logits.softmax(dim=1).numpy()
    above = below = 0.0
    for image in range(len(target)):
        places = np.argwhere(target[image].numpy() != 255)
        for c in range(logits.shape[1]):
            y = np.array([float(target[image, i, j] == c) for i, j in places])
            p = np.array([probabilities[image, c, i, j] for i, j in places])
            normal = [(m - m.mean() + 0.01) / (m.std(ddof=1) + 0.01) for m in (y, p)]
            e = np.abs(normal[0] - normal[1])
            for (i, j), error in zip(places, e, strict=True):
                if error > 0.1 * e.max():
                    k = int(target[image, i, j])
                    above += error * weights[k] * -math.log(probabilities[image, k, i, j])
                    below += weights[k]
    return above / below


def test_what_existing_configurations_mean_is_unchanged() -> None:
    logits, target = batch()
    logits = logits.float()
    entropy = nnf.cross_entropy(logits, target, ignore_index=255)
    both = logits.new_zeros(()) + 1.0 * entropy + 1.0 * soft_dice_loss(logits, target)
    assert torch.equal(segmentation_loss(logits, target, LossConfig()), entropy)
    assert torch.equal(segmentation_loss(logits, target, LossConfig(dice=1.0)), both)


def test_focal_loss_by_hand() -> None:
    target = torch.zeros(1, 1, 1, dtype=torch.int64)
    for p in (0.1, 0.5, 0.9):
        got = focal_loss(two_class_logits(p), target, gamma=2.0)
        assert float(got) == pytest.approx(-((1 - p) ** 2) * math.log(p), rel=1e-5)
    pair = torch.cat([two_class_logits(0.9), two_class_logits(0.4)], dim=3)
    labels = torch.tensor([[[0, 1]]])
    want = (2 * 0.1**2 * -math.log(0.9) + 5 * 0.4**2 * -math.log(0.6)) / 7
    got = focal_loss(pair, labels, gamma=2.0, weights=torch.tensor([2.0, 5.0]))
    assert float(got) == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("weights", [None, [0.2, 1.0, 0.7]])
def test_focal_loss_of_gamma_0_is_the_cross_entropy(weights: list[float] | None) -> None:
    logits, target = batch()
    given = None if weights is None else torch.tensor(weights, dtype=torch.float64)
    logits.requires_grad_()
    got = focal_loss(logits, target, gamma=0.0, weights=given)
    want = nnf.cross_entropy(logits, target, weight=given, ignore_index=255)
    (mine,), (other,) = (torch.autograd.grad(loss, logits) for loss in (got, want))
    assert float(got.detach()) == pytest.approx(float(want.detach()))
    assert torch.allclose(mine, other)


def test_structure_loss_by_hand() -> None:
    """One certain pixel each way, one wrong: every map is (1, 0, 0) or (1, 1, 0), or reversed."""
    target = torch.tensor([[[0, 1, 1]]])
    probability = torch.tensor([0.8, 0.2, 0.2], dtype=torch.float64)
    logits = torch.stack([probability.log(), (1 - probability).log()]).view(1, 2, 1, 3)
    y, p = np.array([1.0, 0, 0]), np.array([0.8, 0.2, 0.2])
    errors = []
    for truth, map_ in ((y, p), (1 - y, 1 - p)):
        a = (truth - truth.mean() + 0.01) / (math.sqrt(1 / 3) + 0.01)
        b = (map_ - map_.mean() + 0.01) / (0.6 * math.sqrt(1 / 3) + 0.01)
        errors.append(np.abs(a - b))
    e = np.stack(errors)
    hard = e > 0.1 * e.max(axis=1, keepdims=True)
    want = (e * hard).sum() / hard.sum() * -math.log(0.8)
    assert float(structure_loss(logits, target)) == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.1, 0.9, 0.6]])
def test_structure_loss_against_the_slow_obvious_version(weights: list[float]) -> None:
    for seed in range(4):
        logits, target = batch(seed)
        got = structure_loss(logits, target, weights=torch.tensor(weights, dtype=torch.float64))
        assert float(got) == pytest.approx(slow_structure(logits, target, weights), rel=1e-6)


def test_structure_loss_of_certain_answers_and_flat_maps() -> None:
    _, target = batch(ignored=0.0)
    certain = nnf.one_hot(target, 3).permute(0, 3, 1, 2).double() * 60
    assert float(structure_loss(certain, target)) == pytest.approx(0.0, abs=1e-9)
    assert float(structure_loss(certain.roll(1, dims=1), target)) > 10
    flat = torch.zeros(1, 3, 4, 4, requires_grad=True)
    structure_loss(flat, torch.full((1, 4, 4), 2)).backward()
    assert flat.grad is not None
    assert bool(torch.isfinite(flat.grad).all())


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_gradients(gamma: float) -> None:
    logits, target = batch(1)
    logits.requires_grad_()
    weights = torch.tensor([0.3, 0.9, 0.8], dtype=torch.float64)
    config = LossConfig(cross_entropy=1.0, dice=0.5, focal=2.0, focal_gamma=gamma, structure=0.5)
    assert torch.autograd.gradcheck(
        lambda x: segmentation_loss(x, target, config, weights=weights), (logits,)
    )


@pytest.mark.parametrize("scale", [1.0, 1e4])
@pytest.mark.parametrize("weighted", [False, True])
def test_ignored_pixels_do_not_count(weighted: bool, scale: float) -> None:
    logits, target = batch()
    weights = torch.tensor([0.3, 0.9, 0.8], dtype=torch.float64) if weighted else None
    changed = logits + torch.randn(logits.shape, dtype=torch.float64) * 5 * scale * (
        target == 255
    ).unsqueeze(1)
    changed.requires_grad_()
    loss = segmentation_loss(changed, target, ALL, weights=weights)
    want = segmentation_loss(logits, target, ALL, weights=weights)
    assert float(loss.detach()) == pytest.approx(float(want))
    loss.backward()
    assert changed.grad is not None
    assert not changed.grad.permute(0, 2, 3, 1)[target == 255].any()


def test_an_image_without_labels_in_a_batch() -> None:
    logits, target = batch()
    target[1] = 255
    assert float(segmentation_loss(logits, target, ALL)) == pytest.approx(
        float(segmentation_loss(logits[:1], target[:1], ALL))
    )


@pytest.mark.parametrize("config", [LossConfig(), ALL, LossConfig(cross_entropy=0, structure=1)])
def test_a_batch_without_labels_gives_0_with_a_gradient(config: LossConfig) -> None:
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    loss = segmentation_loss(logits, torch.full((2, 4, 4), 255), config)
    assert float(loss.detach()) == 0
    loss.backward()
    assert logits.grad is not None
    assert not logits.grad.any()


def test_a_batch_of_classes_without_weight() -> None:
    logits = torch.randn(1, 2, 4, 4, requires_grad=True)
    config = LossConfig(focal=1.0, structure=1.0)
    target = torch.zeros(1, 4, 4, dtype=torch.int64)
    loss = segmentation_loss(logits, target, config, weights=torch.tensor([0.0, 1.0]))
    assert float(loss.detach()) == 0
    loss.backward()
    assert logits.grad is not None


def test_class_weights_of_the_cross_entropy() -> None:
    logits, target = batch()
    weights = torch.tensor([0.3, 0.0, 0.8], dtype=torch.float64)
    logs = logits.log_softmax(dim=1)
    above = below = 0.0
    for b, i, j in np.argwhere(target.numpy() != 255):
        k = int(target[b, i, j])
        above -= float(weights[k] * logs[b, k, i, j])
        below += float(weights[k])
    got = segmentation_loss(logits, target, LossConfig(), weights=weights)
    assert float(got) == pytest.approx(above / below)


def test_frequency_weights() -> None:
    assert frequency_weights([600, 300, 100]).tolist() == pytest.approx([0.4, 0.7, 0.9])
    big = torch.tensor([3_000_000_000, 1_000_000_000])
    assert frequency_weights(big).tolist() == pytest.approx([0.25, 0.75])
    assert frequency_weights(big).dtype == torch.float32
    with pytest.raises(DatasetError, match="no training pixel of class necrosis"):
        frequency_weights([5, 0, 5], names=["tumour", "necrosis", "stroma"])
    with pytest.raises(DatasetError, match="class number 1, number 2"):
        frequency_weights([5, 0, 0])
    assert frequency_weights([5, 0, 15], allow_empty=True).tolist() == [0.75, 1.0, 0.25]
    with pytest.raises(DatasetError, match="no labelled pixel"):
        frequency_weights([0, 0], allow_empty=True)


def test_background_is_thinned() -> None:
    target = torch.randint(0, 4, (3, 200, 200), generator=torch.Generator().manual_seed(0))
    target[:, :20] = 255
    before = target.clone()
    got = thin_background(target, [0, 2], 0.1, torch.Generator().manual_seed(1))
    assert torch.equal(target, before)
    changed = got != target
    assert set(got[changed].tolist()) == {255}
    assert set(target[changed].tolist()) == {0, 2}
    for k, share in ((0, 0.1), (1, 1.0), (2, 0.1), (3, 1.0)):
        kept = int((got == k).sum()) / int((target == k).sum())
        assert kept == pytest.approx(share, abs=0.01 * (share < 1))
    again = thin_background(target, [0, 2], 0.1, torch.Generator().manual_seed(1))
    assert torch.equal(got, again)
    other = thin_background(target, [0, 2], 0.1, torch.Generator().manual_seed(2))
    assert not torch.equal(got, other)


def test_nothing_is_drawn_where_all_background_stays() -> None:
    target = torch.randint(0, 2, (1, 8, 8))
    generator = torch.Generator().manual_seed(1)
    state = generator.get_state()
    assert torch.equal(thin_background(target, [0], 1.0, generator), target)
    assert torch.equal(thin_background(target, [], 0.1, generator), target)
    assert torch.equal(generator.get_state(), state)


def test_configurations() -> None:
    config = from_mapping(
        LossConfig, {"cross_entropy": 0, "structure": 1, "focal": 1, "class_weights": "frequency"}
    )
    assert config == LossConfig(0.0, structure=1.0, focal=1.0, class_weights="frequency")
    assert from_mapping(LossConfig, to_mapping(config)) == config


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"cross_entropy": 0.0}, "one must be above 0"),
        ({"focal": -1.0}, "not be negative"),
        ({"structure": math.nan}, "structure: nan"),
        ({"focal_gamma": -0.5}, "focal_gamma"),
        ({"focal_gamma": math.nan}, "focal_gamma"),
        ({"class_weights": "inverse"}, "class_weights"),
        ({"keep_background": 0.0}, "keep_background"),
        ({"keep_background": 1.5}, "keep_background"),
    ],
)
def test_configurations_that_cannot_be(values: dict[str, object], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        from_mapping(LossConfig, values)
