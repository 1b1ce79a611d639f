"""Dividing labelled images: folds, subsets, counts."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from wsiseg.classes import Classes, TissueClass
from wsiseg.datasets.base import (
    LabelledDataset,
    LabelledImage,
    Subset,
    class_pixels,
    fold_split,
    grouped_split,
    numbered_as,
    parse_fold,
)
from wsiseg.errors import DatasetError, UsageError


class Masks(LabelledDataset):
    """Images with given mask values."""

    classes = Classes((TissueClass("a", (0, 0, 0)), TissueClass("b", (1, 1, 1))))
    mpp = 0.5
    measuring = True

    def __init__(self, masks: list[list[int]], rows: int = 1) -> None:
        self.masks, self.rows = masks, rows
        self.names = tuple(f"n{i}" for i in range(len(masks)))
        self.groups = tuple(f"g{i // 2}" for i in range(len(masks)))

    def __getitem__(self, index: int) -> LabelledImage:
        mask = np.array([self.masks[index]] * self.rows, np.uint8)
        image = np.zeros((*mask.shape, 3), np.uint8)
        return LabelledImage(self.names[index], image, mask, self.groups[index])


def test_folds_part_the_groups_evenly() -> None:
    groups = [f"p{i}" for i in range(11) for _ in range(1 + i % 3)]
    seen: list[int] = []
    for k in range(1, 6):
        rest, own = fold_split(groups, k, 5)
        assert sorted(rest + own) == list(range(len(groups)))
        assert not {groups[i] for i in rest} & {groups[i] for i in own}
        assert abs(len(own) - len(groups) / 5) <= 2
        seen += own
        assert fold_split(groups, k, 5) == (rest, own)
    assert sorted(seen) == list(range(len(groups)))


def test_folds_do_not_depend_on_how_files_are_cut() -> None:
    rng = np.random.default_rng(0)
    patients = [f"p{rng.integers(9)}" for _ in range(30)]  # of each file
    cuts = [np.ones(30, int), rng.integers(1, 20, 30)]
    for k in range(1, 4):
        own = []
        for cut in cuts:
            files = np.repeat(np.arange(30), cut)
            groups = [patients[f] for f in files]
            _, fold = fold_split(groups, k, 3, files=files.tolist())
            own.append({groups[i] for i in fold})
        assert own[0] == own[1]


@pytest.mark.parametrize("text", ["", "1", "a/3", "1/2/3", "-1/3", "1 of 3", "²/5"])
def test_folds_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="write it as K/N"):
        parse_fold(text)


def test_folds_that_cannot_be() -> None:
    assert parse_fold("2/5") == (2, 5)
    for fold, folds in ((0, 2), (3, 2), (1, 1), (1, 4)):
        with pytest.raises(UsageError, match=f"fold {fold}/{folds}: give K/N"):
            fold_split(["a", "b", "c"], fold, folds)


def test_groups_are_not_split() -> None:
    groups = tuple("aabbbccdde")
    training, held = grouped_split(groups, 0.3, seed=1)
    assert sorted(training + held) == list(range(10))
    assert not {groups[i] for i in training} & {groups[i] for i in held}
    assert grouped_split(groups, 0.0, seed=1)[1] == []


@pytest.mark.parametrize(
    ("sizes", "share", "allowed"),
    [
        ((1, 1, 9), 0.15, {2}),
        ((1, 1, 9), 0.03, {1}),
        ((6, 2), 0.3, {2}),
        ((9, 9, 1, 1), 0.1, {2}),
        ((1, 1), 0.9, {1}),
        ((5, 1, 1, 1, 1), 0.15, {2}),
        ((50, 50, 50, 1), 0.15, {50, 51}),  # one image would be too few
    ],
)
def test_validation_takes_not_much_more_than_its_share(
    sizes: tuple[int, ...], share: float, allowed: set[int]
) -> None:
    groups = [f"p{k}" for k, size in enumerate(sizes) for _ in range(size)]
    for seed in range(20):
        training, held = grouped_split(groups, share, seed)
        assert sorted(training + held) == list(range(len(groups)))
        assert not {groups[i] for i in training} & {groups[i] for i in held}
        assert len(held) in allowed


def test_groups_of_ordinary_sizes_are_taken_in_order() -> None:
    """As the sizes of the patients of GlaS, or all alike."""
    glas = (1, 1, 1, 1, 2, 4, 4, 4, 4, 4, 8, 8, 12, 15, 16)
    for sizes in (glas, *((size,) * n for n in range(2, 12) for size in (1, 3))):
        groups = [f"p{k:02}" for k, size in enumerate(sizes) for _ in range(size)]
        for share, seed in itertools.product((0.1, 0.15, 0.2, 0.5), range(10)):
            order = sorted(set(groups))
            np.random.default_rng(seed).shuffle(order)
            expected: set[str] = set()
            while sum(g in expected for g in groups) < share * len(groups):
                expected.add(order[len(expected)])
            held = grouped_split(groups, share, seed)[1]
            assert {groups[i] for i in held} == expected


def test_one_group_is_all_of_validation() -> None:
    assert grouped_split(["a", "a"], 0.2, seed=0) == ([], [0, 1])
    assert grouped_split(["a", "a"], 0.0, seed=0) == ([0, 1], [])


def test_a_subset_is_the_whole_renumbered() -> None:
    whole = Masks([[0], [1], [0], [1]])
    part = Subset(whole, [3, 0])
    assert (len(part), part.names, part.groups) == (2, ("n3", "n0"), ("g1", "g0"))
    assert part[0].name == "n3"
    assert part.mask(1).tolist() == [[0]]
    assert part.files == (3, 0)
    assert part.measuring
    assert part.mpp == 0.5


def test_classes_are_numbered_as_those_of_a_model() -> None:
    whole = Masks([[0, 1, 255], [1, 1, 7]])
    model = Classes((TissueClass("B ", (2, 2, 2)), TissueClass("A", (3, 3, 3))))
    data = numbered_as(whole, model)
    assert data.classes is model
    assert data.mask(0).tolist() == [[1, 0, 255]]
    assert data[1].mask.tolist() == [[0, 0, 7]]  # a value that is no class is not hidden
    assert (data.names, data.groups, data.files) == (whole.names, whole.groups, whole.files)
    assert data.measuring
    assert data.mpp == 0.5
    assert numbered_as(whole, whole.classes) is whole
    for names in (("a",), ("a", "c"), ("a", "b", "c")):
        other = Classes(tuple(TissueClass(name, (0, 0, 0)) for name in names))
        with pytest.raises(DatasetError, match=r"classes \(a, b\) are not the model's \(a"):
            numbered_as(whole, other)


def test_pixels_are_counted_by_class() -> None:
    data = Masks([[0, 0, 1, 255] * 2, [1, 1, 255, 255] * 2, [7] * 8], rows=8)
    assert class_pixels(data, [0, 1]).tolist() == [[32, 16], [0, 32]]
    assert class_pixels(data, [1]).tolist() == [[0, 32]]
    with pytest.raises(DatasetError, match="masks hold the value 7, which is none of the 2"):
        class_pixels(data, [2])


def test_images_too_small_to_be_meant_are_warned_of_once() -> None:
    data = Masks([[0] * 8, [1], [0] * 7], rows=8)
    with pytest.warns(UserWarning, match=r"n1 \(1 x 8 px\) and 1 more of 3 images: under 8 px"):
        assert class_pixels(data, [0, 1, 2]).tolist() == [[64, 0], [0, 8], [56, 0]]
    assert class_pixels(data, [0]).tolist() == [[64, 0]]
