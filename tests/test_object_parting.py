from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from scipy import ndimage

from wsiseg.errors import ConfigError
from wsiseg.objects import ObjectsConfig, clean_labels, cleanings, parting, separate

Array = npt.NDArray[Any]
BACKGROUND = (1,)
SIDES = ((-1, 0), (0, -1), (0, 1), (1, 0))


def clean(labels: Array, background: Sequence[int] = BACKGROUND, **areas: float) -> Array:
    config = ObjectsConfig(**areas)
    return clean_labels(labels, background=background, mpp=1.0, config=config)


def part(labels: Array, border: Array | None, mpp: float = 1.0, **values: float) -> Array:
    config = ObjectsConfig(**values)
    return separate(labels, border, background=BACKGROUND, mpp=mpp, config=config)


def picture(text: str) -> Array:
    return np.array([[int(c) for c in row] for row in text.split()], np.uint8)


def noise(seed: int, shape: tuple[int, int] = (40, 37), values: int = 4) -> Array:
    rng = np.random.default_rng(seed)
    smooth = ndimage.gaussian_filter(rng.normal(size=(values, *shape)), (0, 1.2, 1.2))
    return smooth.argmax(0).astype(np.uint8)


def disc(shape: tuple[int, int], y: float, x: float, radius: float) -> Array:
    yy, xx = np.mgrid[: shape[0], : shape[1]]
    return np.asarray((yy - y) ** 2 + (xx - x) ** 2 <= radius**2)


def ring_of(truth: Array, width: int) -> Array:
    """The ideal border: pixels of an instance within `width` of another pixel or the outside."""
    ring = np.zeros(truth.shape, bool)
    for number in np.unique(truth[truth > 0]):
        own = truth == number
        ring |= own & (ndimage.distance_transform_edt(own) <= width)
    return ring


def in_bands(labels: Array, border: Array, config: ObjectsConfig, height: int) -> tuple[Any, Any]:
    """Cleaned labels and objects, the image taken `height` rows at a time."""
    cuts = [*range(0, len(labels), height), len(labels)]
    rows = [slice(a, b) for a, b in pairwise(cuts)]
    for cleaning in cleanings(BACKGROUND, 1.0, config):
        for band in rows:
            cleaning.add(labels[band])
        cleaning.finish()
        labels = np.concatenate([cleaning.apply(i, labels[b]) for i, b in enumerate(rows)])
    work = parting(BACKGROUND, 1.0, config)
    for band in rows:
        work.add_cores(labels[band], border[band])
    work.finish_cores()
    cores = np.concatenate([work.core_numbers(i, labels[b], border[b]) for i, b in enumerate(rows)])
    drafts = []
    for band in rows:
        top = max(0, band.start - work.reach_px)
        halo = slice(top, band.stop + work.reach_px)
        grown = work.grow(labels[halo], cores[halo])[band.start - top :][: band.stop - band.start]
        drafts.append(work.add_grown(labels[band], grown, border[band]))
    work.finish()
    return labels, np.concatenate([work.numbers(d) for d in drafts])


def flood(same: Array, y: int, x: int) -> list[tuple[int, int]]:
    """The 4-connected pixels of the value at (y, x)."""
    seen, queue = {(y, x)}, deque([(y, x)])
    while queue:
        a, b = queue.popleft()
        for dy, dx in SIDES:
            p = (a + dy, b + dx)
            inside = 0 <= p[0] < same.shape[0] and 0 <= p[1] < same.shape[1]
            if inside and p not in seen and same[p] == same[y, x]:
                seen.add(p)
                queue.append(p)
    return sorted(seen)


def regions(image: Array) -> list[list[tuple[int, int]]]:
    """All 4-connected regions by their first pixels."""
    done, found = np.zeros(image.shape, bool), []
    for y, x in np.ndindex(image.shape):
        if not done[y, x]:
            found.append(flood(image, y, x))
            done[tuple(np.transpose(found[-1]))] = True
    return found


def is_cut(region: list[tuple[int, int]], shape: tuple[int, ...]) -> bool:
    """Whether a region is at the edge of the image."""
    return any(y in (0, shape[0] - 1) or x in (0, shape[1] - 1) for y, x in region)


def slow_clean(
    labels: Array, background: Sequence[int], hole: float, speck: float, cut_share: float = 1.0
) -> Array:
    for wanted_back, most in ((True, hole), (False, speck)):
        out = labels.copy()
        for region in regions(labels):
            y, x = region[0]
            value = labels[y, x]
            spared = not wanted_back and is_cut(region, labels.shape)
            area = most * cut_share if spared else most
            if value == 0 or (value in background) != wanted_back or len(region) >= area:
                continue
            padded = np.pad(labels, 1)
            beside = [padded[a + 1 + dy, b + 1 + dx] for a, b in region for dy, dx in SIDES]
            if wanted_back and 0 in beside:
                continue
            # Earlier regions have their new labels in `out`.
            if x and labels[y, x - 1]:
                new = out[y, x - 1]
            elif y and labels[y - 1, x]:
                new = out[y - 1, x]
            else:
                new = min(background, default=value)
            for p in region:
                out[p] = new
        labels = out
    return labels


def slow_separate(labels: Array, border: Array, config: ObjectsConfig) -> Array:
    front = labels > 1
    core = np.where(front & (border < config.border_threshold), labels, 0)
    grown, firsts = np.zeros(labels.shape, int), [(0, 0)]
    for region in regions(core):
        share = config.cut_share if is_cut(region, core.shape) else 1.0
        if core[region[0]] and len(region) >= config.min_core_um2 * share:
            firsts.append(region[0])
            grown[tuple(np.transpose(region))] = len(firsts) - 1
    for _ in range(round(config.reach_um)):
        before = np.pad(grown, 1)
        label = np.pad(labels, 1)
        for y, x in np.argwhere(front & (grown == 0)):
            near = [(y + 1 + dy, x + 1 + dx) for dy, dx in SIDES]
            numbers = [before[p] for p in near if before[p] and label[p] == labels[y, x]]
            grown[y, x] = min(numbers, default=0)
    reached = grown.copy()
    for region in regions(np.where(front & (reached == 0), labels, 0)):
        if reached[region[0]] or not front[region[0]]:
            continue
        touched = [
            reached[y + dy, x + dx]
            for y, x in region
            for dy, dx in SIDES
            if 0 <= y + dy < len(labels)
            and 0 <= x + dx < labels.shape[1]
            and reached[y + dy, x + dx]
            and labels[y + dy, x + dx] == labels[y, x]
        ]
        if not touched:
            firsts.append(region[0])
        grown[tuple(np.transpose(region))] = min(touched, default=len(firsts) - 1)
    order = sorted(range(1, len(firsts)), key=lambda k: firsts[k])
    rank = np.zeros(len(firsts), int)
    rank[order] = np.arange(1, len(firsts))
    return np.asarray(rank[grown])


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("background", [(1,), (1, 3), ()])
def test_cleaning_is_that_of_a_slow_obvious_version(seed: int, background: tuple[int, ...]) -> None:
    labels = noise(seed)
    got = clean(labels, background, max_hole_um2=15, min_area_um2=20)
    assert not np.array_equal(got, labels)
    assert np.array_equal(got, slow_clean(labels, background, 15, 20))
    spared = clean(labels, background, max_hole_um2=15, min_area_um2=20, cut_share=0.3)
    assert np.array_equal(spared, slow_clean(labels, background, 15, 20, 0.3))


@pytest.mark.parametrize("seed", range(12))
def test_objects_are_those_of_a_slow_obvious_version(seed: int) -> None:
    labels = noise(seed)
    border = ndimage.gaussian_filter(np.random.default_rng(99 + seed).random(labels.shape), 1)
    config = ObjectsConfig(border_threshold=0.5, min_core_um2=3, reach_um=2, cut_share=0.4)
    got = separate(labels, border, background=BACKGROUND, mpp=1.0, config=config)
    want = slow_separate(labels, border, config)
    assert got.dtype == np.int32
    assert np.array_equal(got, want)
    assert np.array_equal(got > 0, labels > 1)
    for number in range(1, got.max() + 1):
        assert ndimage.label(got == number)[1] == 1, "every object is 4-connected"
        assert len(np.unique(labels[got == number])) == 1


@pytest.mark.parametrize("height", [1, 2, 3, 7, 16, 39])
@pytest.mark.parametrize("join_um", [0.0, 20.0])
def test_the_height_of_the_bands_changes_nothing(height: int, join_um: float) -> None:
    for seed in range(4):
        labels = noise(seed)
        border = ndimage.gaussian_filter(np.random.default_rng(seed).random(labels.shape), 1.5)
        config = ObjectsConfig(
            min_area_um2=12,
            max_hole_um2=20,
            border_threshold=0.48,
            min_core_um2=4,
            reach_um=3,
            cut_share=0.3,
            join_um=join_um,
        )
        cleaned = clean_labels(labels, background=BACKGROUND, mpp=1.0, config=config)
        whole = separate(cleaned, border, background=BACKGROUND, mpp=1.0, config=config)
        apart = replace(config, join_um=0.0)
        apart_max = separate(cleaned, border, background=BACKGROUND, mpp=1.0, config=apart).max()
        assert (whole.max() < apart_max) == (join_um > 0)
        got_labels, got_objects = in_bands(labels, border, config, height)
        assert np.array_equal(got_labels, cleaned)
        assert np.array_equal(got_objects, whole)


@pytest.mark.parametrize("height", [1, 3])
def test_no_side_of_a_pixel_is_counted_twice_where_bands_meet(height: int) -> None:
    labels, border = np.full((9, 9), 2, np.uint8), np.zeros((9, 9), np.float32)
    border[:, 4] = 0.5  # even odds; 9 sides, 36 pixels right of them
    for join_um, count in ((3.9, 2), (4.1, 1)):
        config = ObjectsConfig(border_threshold=0.4, join_um=join_um, reach_um=9)
        assert in_bands(labels, border, config, height)[1].max() == count
        assert (
            part(labels, border, border_threshold=0.4, join_um=join_um, reach_um=9).max() == count
        )


def test_the_defaults_change_nothing() -> None:
    labels = noise(3)
    assert np.array_equal(clean(labels), labels)


def test_holes_are_filled_before_specks_are_removed() -> None:
    ring = picture("1111111 1222221 1211121 1211121 1211121 1222221 1111111")
    got = clean(ring, max_hole_um2=10, min_area_um2=20)  # the ring has 16 pixels, filled 25
    assert np.array_equal(got, picture("1111111 1222221 1222221 1222221 1222221 1222221 1111111"))


def test_background_cut_by_the_edge_or_by_what_was_not_analysed_is_no_hole() -> None:
    labels = picture("22222222 12221222 22222202 22222212 22222222")
    got = clean(labels, max_hole_um2=10)
    assert np.array_equal(got, picture("22222222 12222222 22222202 22222212 22222222"))


def test_specks_at_edges_and_corners_go_and_large_regions_stay() -> None:
    labels = picture("2111111 1111112 1133311 1133311 2133312")
    got = clean(labels, min_area_um2=3)
    assert np.array_equal(got, picture("1111111 1111111 1133311 1133311 1133311"))


def test_less_is_enough_at_the_edge_of_the_image() -> None:
    labels = picture("2211113 1111111 1122111 1022111 2111144 2111144")
    got = clean(labels, min_area_um2=5, cut_share=0.4)
    assert np.array_equal(got, picture("2211111 1111111 1111111 1011111 2111144 2111144"))
    border = np.zeros(labels.shape)
    border[4] = 1  # what is left of the regions below are cores of 1 and 2 pixels
    kept = labels[4:, :]
    assert part(kept, border[4:], min_core_um2=4, cut_share=0.5).max() == 2
    with pytest.raises(ConfigError, match="cut_share"):
        ObjectsConfig(cut_share=1.5)


def test_specks_take_the_label_left_of_them_and_so_on() -> None:
    labels = picture("33333333 33242433 33333333 11111111")
    got = clean(labels, min_area_um2=5)
    assert np.array_equal(got, picture("33333333 33333333 33333333 11111111"))


def test_areas_are_in_square_micrometres() -> None:
    labels = np.ones((10, 10), np.uint8)
    labels[3:5, 3:5] = 2
    config = ObjectsConfig(min_area_um2=1.1)
    for mpp, stays in ((0.5, False), (0.53, True)):
        got = clean_labels(labels, background=BACKGROUND, mpp=mpp, config=config)
        assert bool((got == 2).any()) == stays


@pytest.mark.parametrize("angle", [0.0, 0.4, 0.8])
def test_touching_discs_come_apart(angle: float) -> None:
    shape, radius = (100, 100), 20.0
    dy, dx = 19 * np.sin(angle), 19 * np.cos(angle)
    a, b = disc(shape, 50 - dy, 50 - dx, radius), disc(shape, 50 + dy, 50 + dx, radius)
    nearer = disc(shape, 50 - dy, 50 - dx, radius)  # the lens between them goes to the first
    truth = a.astype(int) + 2 * (b & ~nearer)
    labels = (1 + (truth > 0)).astype(np.uint8)
    assert part(labels, None).max() == 1
    border = ring_of(truth, 4).astype(np.float32)
    got = part(labels, border)
    assert got.max() == 2
    numbers = [int(got[disc(shape, 50 + s * dy, 50 + s * dx, 5)].max()) for s in (-1, 1)]
    overlaps = [((got == n) == (truth == t)).mean() for n, t in zip(numbers, (1, 2), strict=True)]
    assert min(overlaps) > 0.99
    assert np.array_equal(part(labels, (border * 255).astype(np.uint8)), got)


def test_touching_squares_part_exactly() -> None:
    labels = np.ones((30, 50), np.uint8)
    labels[5:25, 5:25] = labels[5:25, 25:45] = 2
    truth = np.zeros(labels.shape, int)
    truth[5:25, 5:25], truth[5:25, 25:45] = 1, 2
    got = part(labels, ring_of(truth, 3))
    assert np.array_equal(got, truth)
    assert not np.array_equal(part(labels, ring_of(truth, 3), reach_um=1.0), truth)


def test_a_dumb_bell_stays_whole_while_its_neck_has_a_core() -> None:
    shape = (60, 100)
    bell = disc(shape, 30, 25, 18) | disc(shape, 30, 75, 18)
    bell[25:36, 25:75] = True  # a neck of 11 pixels
    labels = (1 + bell).astype(np.uint8)
    assert part(labels, ring_of(bell.astype(int), 4)).max() == 1
    assert part(labels, ring_of(bell.astype(int), 6)).max() == 2


def test_a_gland_without_a_core_is_one_object() -> None:
    labels = np.ones((20, 60), np.uint8)
    labels[8:12, 3:57] = 2
    border = np.ones(labels.shape)
    assert np.array_equal(part(labels, border), labels - 1)
    border[9, 5:7] = border[10, 50:52] = 0  # two cores too small to count
    assert np.array_equal(part(labels, border, min_core_um2=4), labels - 1)
    assert part(labels, border).max() == 2


def test_a_ring_shaped_gland_is_one_object() -> None:
    shape = (80, 80)
    gland, lumen = disc(shape, 40, 40, 30), disc(shape, 40, 40, 12)
    truth = gland.astype(int)
    border = ring_of(truth, 4) | (disc(shape, 40, 40, 16) & ~lumen)
    labels = (1 + gland).astype(np.uint8)
    got = part(labels, border & ~lumen, min_core_um2=500)
    assert np.array_equal(got, truth), "the lumen as part of the gland, its core too small"
    hole = np.where(lumen, 1, labels).astype(np.uint8)
    assert np.array_equal(part(hole, border), (gland & ~lumen).astype(int))


def test_what_is_out_of_reach_joins_what_it_touches() -> None:
    labels = np.full((3, 40), 2, np.uint8)
    border = np.ones(labels.shape)
    border[:, :5] = 0
    assert part(labels, border, reach_um=6).max() == 1
    border[:, 35:] = 0
    got = part(labels, border, reach_um=6)
    assert np.array_equal(got, np.where(np.arange(40) < 29, 1, 2)[None].repeat(3, 0))


def test_objects_of_two_classes_are_never_one() -> None:
    labels = picture("222333 222333")
    assert part(labels, np.zeros(labels.shape)).tolist() == [[1, 1, 1, 2, 2, 2]] * 2
    border = np.ones(labels.shape)
    border[:, 0] = 0
    assert part(labels, border).tolist() == [[1, 1, 1, 2, 2, 2]] * 2


def test_values_that_cannot_be_are_refused() -> None:
    for bad in (
        {"min_area_um2": -1},
        {"reach_um": float("inf")},
        {"border_threshold": 0},
        {"max_hole_um2": float("nan")},
        {"join_um": -1},
    ):
        with pytest.raises(ConfigError, match="objects"):
            ObjectsConfig(**bad)
