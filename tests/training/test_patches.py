"""Patches by number: the same in any order of asking, every image once an epoch, bounded memory."""

from __future__ import annotations

import itertools
import warnings
from collections import Counter

import numpy as np
import pytest

from wsiseg.classes import Classes, TissueClass
from wsiseg.datasets.augment import AugmentConfig
from wsiseg.datasets.base import LabelledDataset, LabelledImage
from wsiseg.training.patches import (
    FILES_AT_ONCE,
    ImageStore,
    Patches,
    to_resolution,
    warn_of_enlarging,
)


class Numbered(LabelledDataset):
    """Images of one grey value each, several a file."""

    classes = Classes((TissueClass("a", (0, 0, 0)), TissueClass("b", (1, 1, 1))))
    mpp = 1.0

    def __init__(self, count: int, *, in_a_file: int = 1) -> None:
        self.names = self.groups = tuple(map(str, range(count)))
        self.in_a_file, self.reads = in_a_file, Counter[int]()

    def __getitem__(self, index: int) -> LabelledImage:
        self.reads[index] += 1
        image = np.full((20, 30, 3), index, np.uint8)
        return LabelledImage(str(index), image, np.full((20, 30), index % 2, np.uint8), str(index))

    @property
    def files(self) -> tuple[int, ...]:
        return tuple(i // self.in_a_file for i in range(len(self)))


def patches(data: Numbered, *, limit_bytes: int = 1 << 20, seed: int = 0) -> Patches:
    store = ImageStore(
        data, lambda i, m: to_resolution(i, m, ratio=1.0, resize_px=None), limit_bytes=limit_bytes
    )
    return Patches(
        store,
        range(len(data)),
        size_px=(8, 8),
        augment=AugmentConfig(scale=(1.0, 1.0), stain_gain=0.0, stain_shift=0.0),
        seed=seed,
    )


def values(sequence: Patches, numbers: range) -> list[int]:
    return [int(sequence.patch(n)[0][0, 0, 0]) for n in numbers]


def test_an_epoch_shows_every_image_once_in_a_new_order() -> None:
    sequence = patches(Numbered(11))
    first, second = values(sequence, range(11)), values(sequence, range(11, 22))
    assert sorted(first) == sorted(second) == list(range(11))
    assert first != second
    assert values(patches(Numbered(11), seed=1), range(11)) != first
    assert values(sequence, range(11)) == first  # asked for again, after another epoch


def test_images_of_a_file_are_taken_close_to_one_another() -> None:
    files, each = 3 * FILES_AT_ONCE, 4
    data = Numbered(files * each, in_a_file=each)
    order = values(patches(data), range(len(data)))
    assert sorted(order) == list(range(len(data)))
    span = FILES_AT_ONCE * each
    for start in range(0, len(order), span):
        assert len({v // each for v in order[start : start + span]}) == FILES_AT_ONCE
    assert [v // each for v in order[:each]] != [order[0] // each] * each  # mixed all the same


def test_batches_and_shares_are_the_numbered_patches() -> None:
    sequence = patches(Numbered(7))
    whole = list(itertools.islice(sequence.batches(4), 3))
    assert [b.numbers for b in whole] == [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9, 10, 11)]
    later = next(sequence.batches(4, start=2))
    assert np.array_equal(later.images, whole[2].images)
    assert np.array_equal(later.masks, whole[2].masks)
    assert later.places == whole[2].places
    halves = [next(sequence.batches(4, start=1, share=(p, 2))) for p in (0, 1)]
    assert [h.numbers for h in halves] == [(4, 6), (5, 7)]
    assert np.array_equal(halves[1].images, whole[1].images[1::2])
    again = list(itertools.islice(sequence.batches(4, pool=9), 3))
    assert [b.numbers for b in again] == [(0, 1, 2, 3), (4, 5, 6, 7), (8, 0, 1, 2)]
    small = list(itertools.islice(sequence.batches(4, pool=2), 2))  # no image is left out
    assert [b.numbers for b in small] == [(0, 1, 2, 3), (4, 5, 6, 0)]


def test_what_fails_in_a_thread_is_raised() -> None:
    data = Numbered(3)
    sequence = patches(data)
    data.names = ()  # not used any more
    sequence.store.get = lambda index: 1 / 0  # type: ignore[assignment, method-assign]
    with pytest.raises(ZeroDivisionError):
        next(sequence.batches(2))


def test_the_store_is_bounded() -> None:
    one = 20 * 30 * 4
    data = Numbered(6)
    store = ImageStore(data, lambda i, m: (i, m), limit_bytes=2 * one)
    for i in (0, 1, 0, 1, 2, 1, 0):
        assert int(store.get(i)[0][0, 0, 0]) == i
        assert store.held_bytes <= 2 * one
    assert data.reads == {0: 2, 1: 1, 2: 1}


def test_resolution() -> None:
    image, mask = np.zeros((20, 30, 3), np.uint8), np.zeros((20, 30), np.uint8)
    assert to_resolution(image, mask, ratio=0.5, resize_px=None)[0].shape == (10, 15, 3)
    stretched = to_resolution(image, mask, ratio=0.5, resize_px=16)
    assert stretched[0].shape == (16, 16, 3)
    assert stretched[1].shape == (16, 16)


def test_images_coarser_than_the_model_are_warned_of() -> None:
    with pytest.warns(UserWarning, match=r"read at 0\.5 um per pixel and enlarged to the 0\.25 of"):
        warn_of_enlarging(0.5, 0.25)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_enlarging(0.62, 0.5)
        warn_of_enlarging(0.25, 1.0)
