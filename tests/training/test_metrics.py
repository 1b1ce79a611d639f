from __future__ import annotations

import numpy as np
import pytest
import torch

from wsiseg.classes import Classes, TissueClass
from wsiseg.training.losses import LossConfig, segmentation_loss, soft_dice_loss
from wsiseg.training.metrics import confusion_matrix, pixel_metrics

THREE = Classes(tuple(TissueClass(n, (0, 0, 0)) for n in "abc"))


def test_metrics_against_the_obvious_definitions() -> None:
    rng = np.random.default_rng(0)
    truth = rng.choice([0, 1, 2, 255], size=(40, 50), p=[0.5, 0.2, 0.2, 0.1]).astype(np.uint8)
    predicted = np.where(rng.random((40, 50)) < 0.7, truth % 3, 1).astype(np.uint8)
    got = pixel_metrics(confusion_matrix(truth, predicted, 3), THREE)

    pairs = [(t, p) for t, p in zip(truth.ravel(), predicted.ravel(), strict=True) if t != 255]
    assert got["accuracy"] == pytest.approx(sum(t == p for t, p in pairs) / len(pairs))
    dices, ious = [], []
    for k in range(3):
        both = sum(t == k and p == k for t, p in pairs)
        either = sum(t == k or p == k for t, p in pairs)
        ious.append(both / either)
        dices.append(2 * both / (sum(t == k for t, _ in pairs) + sum(p == k for _, p in pairs)))
    assert got["miou"] == pytest.approx(np.mean(ious))
    assert got["dice"] == pytest.approx(np.mean(dices))
    assert got["f1"] == got["dice"]
    assert got["per_class"]["b"]["iou"] == pytest.approx(ious[1])


@pytest.mark.parametrize("present", [(0, 1, 2), (0, 2)])
def test_metrics_against_scikit_learn(present: tuple[int, ...]) -> None:
    known = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(1)
    truth = rng.choice([*present, 255], size=(60, 50))
    predicted = np.where(rng.random(truth.shape) < 0.6, truth % 255, rng.choice(present))
    predicted = rng.choice(present, size=truth.shape) * (truth == 255) + predicted * (truth != 255)
    matrix = confusion_matrix(truth.astype(np.uint8), predicted.astype(np.uint8), 3)
    got = pixel_metrics(matrix, THREE)
    t, p = truth[truth != 255], predicted[truth != 255]
    assert got["confusion"] == known.confusion_matrix(t, p, labels=[0, 1, 2]).tolist()
    assert got["accuracy"] == pytest.approx(known.accuracy_score(t, p))
    assert got["f1"] == pytest.approx(known.f1_score(t, p, average="macro"))
    assert got["dice"] == got["f1"]
    assert got["miou"] == pytest.approx(known.jaccard_score(t, p, average="macro"))
    for k in present:
        mine = got["per_class"]["abc"[k]]
        assert mine["precision"] == pytest.approx(known.precision_score(t == k, p == k))
        assert mine["recall"] == pytest.approx(known.recall_score(t == k, p == k))
        assert mine["iou"] == pytest.approx(known.jaccard_score(t == k, p == k))


def test_absent_classes_are_left_out_of_the_means() -> None:
    truth = np.zeros((4, 4), np.uint8)
    got = pixel_metrics(confusion_matrix(truth, truth, 3), THREE)
    assert got["dice"] == 1.0
    assert list(got["per_class"]) == ["a"]


def test_a_class_without_truth_is_in_the_means_unless_only_labelled_ones_are() -> None:
    matrix = np.array([[59, 0, 1], [0, 40, 0], [0, 0, 0]])  # a stray pixel of c
    whole = pixel_metrics(matrix, THREE)
    assert whole["dice"] == pytest.approx((118 / 119 + 1 + 0) / 3)
    labelled = pixel_metrics(matrix, THREE, only_labelled=True)
    assert labelled["dice"] == labelled["f1"] == pytest.approx((118 / 119 + 1) / 2)
    assert labelled["miou"] == pytest.approx((59 / 60 + 1) / 2)
    for name in ("accuracy", "per_class", "confusion"):
        assert labelled[name] == whole[name]
    assert pixel_metrics(matrix * 0, THREE, only_labelled=True)["dice"] == 0


def test_soft_dice_of_certain_answers() -> None:
    target = torch.randint(0, 3, (2, 16, 16), generator=torch.Generator().manual_seed(0))
    logits = torch.nn.functional.one_hot(target, 3).permute(0, 3, 1, 2).float() * 60
    assert float(soft_dice_loss(logits, target)) == pytest.approx(0.0, abs=1e-5)
    assert float(soft_dice_loss(logits.roll(1, dims=1), target)) > 0.9


def test_ignored_pixels_do_not_count() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 3, 8, 8, generator=generator)
    target = torch.randint(0, 3, (1, 8, 8), generator=generator)
    target[:, :4] = 255
    changed = logits.clone()
    changed[:, :, :4] += torch.randn(1, 3, 4, 8, generator=generator) * 5
    config = LossConfig(cross_entropy=1.0, dice=1.0)
    first = segmentation_loss(logits, target, config)
    assert float(first) == pytest.approx(float(segmentation_loss(changed, target, config)))
