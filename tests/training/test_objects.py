"""Object scores: cases by hand, a slow obvious version, invariances and speed."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
from label_map_makers import Labels, boxes, random_blobs, slow_hausdorff

from wsiseg.classes import Classes, TissueClass
from wsiseg.errors import UsageError
from wsiseg.training.findings import filled, without_small
from wsiseg.training.objects import ObjectScores, object_scores, objects_of, pool


def slow_scores(predicted: Labels, truth: Labels) -> tuple[float, float, float, float]:
    """TP, F1, object Dice and object Hausdorff by their definitions, object by object."""
    found = [k for k in np.unique(predicted) if k != 0]
    real = [k for k in np.unique(truth) if k != 0]
    tp = 0
    for k in found:
        below = [g for g in truth[predicted == k] if g != 0]
        if below:
            match = max(sorted(set(below)), key=below.count)
            tp += below.count(match) / int((truth == match).sum()) > 0.5
    totals = []
    for own, numbers, other, rest in (
        (predicted, found, truth, real),
        (truth, real, predicted, found),
    ):
        dice, distance = 0.0, 0.0
        for k in numbers:
            mask = own == k
            share = mask.sum() / (own > 0).sum()
            below = [g for g in other[mask] if g != 0]
            if below:
                match = other == max(sorted(set(below)), key=below.count)
                dice += share * 2 * (mask & match).sum() / (mask.sum() + match.sum())
                distance += share * slow_hausdorff(mask, match)
            else:
                distance += share * min(slow_hausdorff(mask, other == r) for r in rest)
        totals.append((dice, distance))
    f1 = 2 * tp / (len(found) + len(real))
    return tp, f1, *(float(sum(t)) / 2 for t in zip(*totals, strict=True))


def as_tuple(scores: ObjectScores) -> tuple[int, int, int, float, float, float]:
    return scores.tp, scores.fp, scores.fn, scores.f1, scores.dice, scores.hausdorff


def test_a_perfect_prediction_with_other_ids() -> None:
    truth = boxes((3, 1, 1, 4, 5), (9, 8, 2, 6, 6))
    predicted = boxes((70, 1, 1, 4, 5), (2, 8, 2, 6, 6))
    assert as_tuple(object_scores(predicted, truth)) == (2, 0, 0, 1.0, 1.0, 0.0)


def test_touching_objects_stay_apart() -> None:
    truth = boxes((1, 0, 0, 5, 10), (2, 5, 0, 5, 10))
    predicted = boxes((1, 0, 0, 6, 10), (2, 6, 0, 4, 10))
    got = object_scores(predicted, truth)
    assert (got.tp, got.fp, got.fn) == (2, 0, 0)
    left, right = 2 * 50 / (60 + 50), 2 * 40 / (40 + 50)
    assert got.dice == pytest.approx(((0.6 * left + 0.4 * right) + (left + right) / 2) / 2)
    assert got.hausdorff == pytest.approx(1.0)


def test_one_object_split_in_two() -> None:
    truth = boxes((1, 0, 0, 10, 10))
    got = object_scores(boxes((1, 0, 0, 7, 10), (2, 7, 0, 3, 10)), truth)
    assert (got.tp, got.fp, got.fn) == (1, 1, 0)
    assert got.f1 == pytest.approx(2 / 3)
    large, small = 2 * 70 / 170, 2 * 30 / 130
    assert got.dice == pytest.approx(((0.7 * large + 0.3 * small) + large) / 2)
    assert got.hausdorff == pytest.approx(((0.7 * 3 + 0.3 * 7) + 3) / 2)


def test_halves_detect_nothing() -> None:
    """Exactly half of the object is not more than half."""
    got = object_scores(boxes((1, 0, 0, 5, 10), (2, 5, 0, 5, 10)), boxes((1, 0, 0, 10, 10)))
    assert (got.tp, got.fp, got.fn, got.f1) == (0, 2, 1, 0.0)


def test_two_objects_merged() -> None:
    got = object_scores(boxes((1, 0, 0, 10, 10)), boxes((1, 0, 0, 6, 10), (2, 6, 0, 4, 10)))
    assert (got.tp, got.fp, got.fn) == (1, 0, 1)
    large, small = 2 * 60 / 160, 2 * 40 / 140
    assert got.dice == pytest.approx((large + (0.6 * large + 0.4 * small)) / 2)
    assert got.hausdorff == pytest.approx((4 + (0.6 * 4 + 0.4 * 6)) / 2)


def test_background_is_no_counterpart() -> None:
    """Most of the prediction lies over background; the match is still the object."""
    got = object_scores(boxes((1, 0, 0, 10, 10)), boxes((1, 0, 0, 3, 3)))
    assert (got.tp, got.fp, got.fn) == (1, 0, 0)
    assert got.dice == pytest.approx(2 * 9 / 109)
    assert got.hausdorff == pytest.approx(math.hypot(7, 7))


def test_an_object_over_background_takes_the_nearest_for_its_distance() -> None:
    truth = boxes((1, 0, 0, 4, 4), (2, 15, 0, 4, 4))
    got = object_scores(boxes((5, 0, 0, 4, 4), (6, 8, 0, 4, 4)), truth)
    assert (got.tp, got.fp, got.fn) == (1, 1, 1)
    assert got.dice == pytest.approx(0.5)
    assert got.hausdorff == pytest.approx(((0 + 7) / 2 + (0 + 7) / 2) / 2)


def test_of_equal_overlaps_the_smallest_id_is_the_counterpart() -> None:
    """As the mode of the official program: the smallest of the most frequent values."""
    predicted = boxes((1, 0, 0, 8, 2))
    got = object_scores(predicted, boxes((7, 0, 0, 4, 2), (5, 4, 0, 4, 6)))
    assert got.predicted.dice / got.predicted.area == pytest.approx(2 * 8 / (16 + 24))
    got = object_scores(predicted, boxes((5, 0, 0, 4, 2), (7, 4, 0, 4, 6)))
    assert got.predicted.dice / got.predicted.area == pytest.approx(2 * 8 / (16 + 8))


def test_empty_maps() -> None:
    empty, some = boxes(), boxes((1, 2, 2, 5, 5), (2, 10, 10, 3, 3))
    diagonal = math.hypot(19, 29)
    assert as_tuple(object_scores(empty, empty)) == (0, 0, 0, 1.0, 1.0, 0.0)
    no_truth = as_tuple(object_scores(some, empty))
    assert no_truth == (0, 2, 0, 0.0, 0.0, pytest.approx(diagonal))
    no_prediction = as_tuple(object_scores(empty, some))
    assert no_prediction == (0, 0, 2, 0.0, 0.0, pytest.approx(diagonal))


@pytest.mark.parametrize("kind", [np.int32, np.uint32, np.int64])
def test_large_ids_are_not_cut(kind: type) -> None:
    """256, 512 and 65,536 are 0 and 70,000 is 4,464 in narrower types."""
    plain = boxes((1, 0, 0, 4, 4), (2, 5, 0, 4, 4), (3, 10, 0, 4, 4), (4, 15, 0, 4, 4))
    ids = np.array([0, 256, 512, 65_536, 70_000])
    other = boxes((1, 0, 0, 4, 3), (2, 5, 0, 4, 4), (3, 10, 1, 4, 4), (4, 15, 0, 3, 4))
    want = as_tuple(object_scores(other, plain))
    assert want[0] == 4
    assert as_tuple(object_scores(ids[other].astype(kind), ids[plain].astype(kind))) == want
    assert as_tuple(object_scores(other, ids[plain].astype(kind))) == want


def test_many_small_integers() -> None:
    ids = np.arange(900, dtype=np.uint16).reshape(30, 30) + 1
    assert as_tuple(object_scores(ids, ids)) == (900, 0, 0, 1.0, 1.0, 0.0)


@pytest.mark.parametrize("seed", range(12))
def test_against_the_slow_obvious_version(seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth = random_blobs(rng, (45, 60), int(rng.integers(1, 14)))
    predicted = random_blobs(rng, (45, 60), int(rng.integers(1, 14)))
    if seed % 3 == 0:  # a prediction that follows the truth
        predicted = np.where(rng.random(truth.shape) < 0.8, np.roll(truth, 2, axis=1), 0)
    if seed % 4 == 1:  # everything merged
        predicted = (predicted > 0).astype(np.int64)
    got = object_scores(predicted, truth)
    tp, f1, dice, distance = slow_scores(predicted, truth)
    assert got.tp == tp
    assert (got.f1, got.dice, got.hausdorff) == pytest.approx((f1, dice, distance), abs=1e-9)


def test_the_middle_of_a_disc_may_be_farthest() -> None:
    """The distance is over all pixels: that of the boundaries alone would be smaller."""
    y, x = np.mgrid[:41, :41] - 20
    disc, ring = np.hypot(y, x) <= 12, (np.hypot(y, x) <= 14) & (np.hypot(y, x) >= 10)
    got = object_scores(ring.astype(np.int32), disc.astype(np.int32))
    assert got.hausdorff == pytest.approx(slow_hausdorff(disc, ring)) == pytest.approx(10.0)


def test_renaming_and_swapping_and_turning_change_nothing() -> None:
    rng = np.random.default_rng(3)
    truth, predicted = random_blobs(rng, (50, 40), 9), random_blobs(rng, (50, 40), 9)
    want = object_scores(predicted, truth)
    names = np.concatenate([[0], rng.choice(np.arange(1, 10**6), 9, replace=False)])
    renamed = object_scores(names[predicted], names[::-1].copy()[truth - 1] * (truth > 0))
    turned = object_scores(np.rot90(predicted), np.rot90(truth))
    for got in (renamed, turned):
        assert as_tuple(got) == pytest.approx(as_tuple(want))
    swapped = object_scores(truth, predicted)
    assert (swapped.dice, swapped.hausdorff) == pytest.approx((want.dice, want.hausdorff))


def test_pooling_weighs_objects_over_all_images() -> None:
    images = [
        (boxes((1, 0, 0, 10, 10)), boxes((1, 0, 0, 10, 10))),
        (boxes((1, 0, 0, 2, 2)), boxes((1, 10, 0, 2, 2))),
        (boxes(), boxes()),
    ]
    scores = [object_scores(p, t) for p, t in images]
    got = pool(scores)
    assert (got["tp"], got["fp"], got["fn"]) == (1, 1, 1)
    assert got["f1"] == pytest.approx(0.5)
    assert got["dice"] == pytest.approx(100 / 104)
    assert got["hausdorff"] == pytest.approx(4 * 10 / 104)
    means = {"f1": 2 / 3, "dice": 2 / 3, "hausdorff": 10 / 3}
    assert got["per_image"] == pytest.approx(means)


def test_pooling_equals_one_large_image() -> None:
    """Images far apart in one map give what they give together, where all objects match."""
    rng = np.random.default_rng(5)
    truth = [random_blobs(rng, (40, 40), 3) for _ in range(3)]
    predicted = [np.where(rng.random(t.shape) < 0.7, t, 0) for t in truth]
    whole = [
        np.concatenate([m + 10 * k * (m > 0) for k, m in enumerate(maps)], axis=1)
        for maps in (predicted, truth)
    ]
    want = object_scores(whole[0], whole[1])
    got = pool([object_scores(p, t) for p, t in zip(predicted, truth, strict=True)])
    for name in ("f1", "dice", "hausdorff"):
        assert got[name] == pytest.approx(getattr(want, name))


def grid_of_discs(rows: int, columns: int) -> tuple[Labels, Labels]:
    """Discs in 40 px cells, and the same with moved centres and other radii."""
    rng = np.random.default_rng(0)
    maps = []
    for spread in (0, 3):
        y, x, k = np.meshgrid(np.arange(40) - 20, np.arange(40) - 20, np.arange(rows * columns))
        centre = rng.normal(0, spread, size=(2, rows * columns))
        disc = np.hypot(y - centre[0], x - centre[1]) < rng.uniform(8, 14, rows * columns)
        cells = np.where(disc, k + 1, 0).reshape(40, 40, rows, columns)
        maps.append(cells.transpose(2, 0, 3, 1).reshape(40 * rows, 40 * columns))
    return maps[1], maps[0]


def test_two_thousand_objects_take_seconds() -> None:
    predicted, truth = grid_of_discs(50, 40)
    assert truth.shape == (2000, 1600)
    started = time.process_time()
    got = object_scores(predicted, truth)
    assert time.process_time() - started < 10
    assert got.tp + got.fn == 2000
    assert 0.5 < got.dice < 1


def test_one_object_against_many_takes_seconds() -> None:
    """A prediction that merges all objects, or that lies far from nearly all."""
    predicted, truth = grid_of_discs(20, 20)
    started = time.process_time()
    merged = object_scores((predicted > 0).astype(np.int32), truth)
    far = object_scores((predicted == 1).astype(np.int32), truth)
    assert time.process_time() - started < 10
    assert as_tuple(merged)[:3] == as_tuple(far)[:3] == (1, 0, 399)


def test_maps_that_cannot_be_scored() -> None:
    good = boxes((1, 0, 0, 3, 3))
    with pytest.raises(UsageError, match="differ in size"):
        object_scores(good, good[1:])
    with pytest.raises(UsageError, match="whole numbers"):
        object_scores(good.astype(float), good)
    with pytest.raises(UsageError, match="whole numbers"):
        object_scores(good[None], good[None])
    with pytest.raises(UsageError, match="not be negative"):
        object_scores(-good, good)
    with pytest.raises(UsageError, match="no image"):
        pool([])


def test_objects_of_a_mask() -> None:
    mask = np.zeros((12, 12), bool)
    mask[0:2, 0:2] = mask[2, 2] = True  # touches at a corner only
    mask[4:9, 4:9] = True
    mask[5:8, 5:8] = False
    mask[6, 6] = True
    mask[11, 11] = True
    plain = objects_of(mask)
    assert plain.dtype == np.int32
    assert sorted(np.bincount(plain.ravel())[1:]) == [1, 1, 5, 16]
    assert plain[0, 0] == plain[2, 2] != plain[4, 4]
    rows = (TissueClass("a", (0, 0, 0), background=True), TissueClass("b", (1, 1, 1)))
    whole = objects_of(filled(mask.astype(np.uint8), Classes(rows)) == 1)
    kept = without_small(whole, 5)
    assert sorted(np.bincount(kept.ravel())[1:]) == [5, 25]
    assert set(np.unique(kept)) == {0, 1, 2}
    assert sorted(np.bincount(without_small(plain, 6).ravel())[1:]) == [16]
    assert not objects_of(np.zeros((3, 4), bool)).any()
    full = objects_of(np.ones((3, 4), bool))
    assert full.min() == full.max() == 1


def test_objects_of_refuses_what_is_no_mask() -> None:
    with pytest.raises(UsageError, match="bool"):
        objects_of(np.zeros((3, 3), np.uint8))  # type: ignore[arg-type]
