"""Regions against GDAL's polygoniser in one shot, against pixels, and against themselves."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio.features
import shapely
from output_canvases import MakeCanvas, UInt8, blobs
from scipy import ndimage

from wsiseg.outputs import polygons
from wsiseg.outputs.polygons import Regions, by_region, trace, trace_regions


def by_gdal(labels: UInt8) -> list[tuple[int, shapely.Polygon]]:
    shapes = rasterio.features.shapes(labels, mask=labels > 0, connectivity=4)
    return [(int(value), shapely.geometry.shape(shape)) for shape, value in shapes]


def flood(labels: UInt8) -> list[tuple[int, frozenset[tuple[int, int]]]]:
    """Regions as sets of (x, y), found one pixel at a time."""
    left = {(int(x), int(y)) for y, x in zip(*np.nonzero(labels), strict=True)}
    found = []
    while left:
        start = left.pop()
        region, todo = {start}, [start]
        while todo:
            x, y = todo.pop()
            for near in ((x + 1, y), (x - 1, y), (x, y + 1), (x, y - 1)):
                if near in left and labels[near[1], near[0]] == labels[y, x]:
                    left.remove(near)
                    region.add(near)
                    todo.append(near)
        found.append((int(labels[start[1], start[0]]), frozenset(region)))
    return found


def same(a: Regions, b: Regions) -> bool:
    return (
        len(a) == len(b)
        and bool((a.values == b.values).all())
        and bool((a.areas_px == b.areas_px).all())
        and bool((a.confidences == b.confidences).all())
        and bool((a.dropped == b.dropped).all())
        and bool(shapely.equals_exact(a.polygons, b.polygons).all())
    )


def images() -> list[UInt8]:
    rng = np.random.default_rng(3)
    noise = [
        rng.integers(0, rng.integers(2, 5), rng.integers(1, 24, 2)).astype(np.uint8)
        for _ in range(16)
    ]
    coarse = [np.repeat(np.repeat(n, 2, 0), 3, 1) for n in noise[:6]]
    checks = [(np.indices((9, 8)).sum(0) % 2 + k).astype(np.uint8) for k in (0, 1)]
    ring = np.ones((7, 7), np.uint8)
    ring[1:3, 1:3] = ring[3:5, 3:5] = 0  # two holes that touch at a corner
    ring[5, 5] = ring[6, 6] = 0  # and one that touches the outside at a corner
    return [*noise, *coarse, *checks, ring, blobs(60, 50)]


def test_regions_are_those_of_gdal_and_a_valid_coverage(make_canvas: MakeCanvas) -> None:
    for labels in images():
        regions = trace(make_canvas(labels, chunk_px=8), band_px=5, strip_px=6)
        expected = by_gdal(labels)
        assert len(regions) == len(expected)
        assert shapely.is_valid(regions.polygons).all()
        tree = shapely.STRtree([polygon for _, polygon in expected])
        for value, polygon in zip(regions.values, regions.polygons, strict=True):
            assert any(
                expected[i][0] == value and shapely.equals(expected[i][1], polygon)
                for i in tree.query(polygon)
            )
        if len(regions):
            assert shapely.coverage_is_valid(regions.polygons)


def test_regions_are_those_of_a_flood_fill(make_canvas: MakeCanvas) -> None:
    rng = np.random.default_rng(4)
    labels = rng.integers(0, 4, (13, 17)).astype(np.uint8)
    confidence = rng.integers(0, 256, labels.shape).astype(np.uint8)
    regions = list(trace_regions(make_canvas(labels, confidence=confidence), band_px=4))
    expected = {}
    for value, pixels in flood(labels):
        mean = np.mean([confidence[y, x] for x, y in pixels]) / 255
        expected[pixels] = (value, len(pixels), pytest.approx(mean))
    found = {}
    ys, xs = np.indices(labels.shape)
    for region in regions:
        inside = shapely.contains_xy(region.polygon, xs + 0.5, ys + 0.5)
        pixels = frozenset((int(x), int(y)) for y, x in zip(*np.nonzero(inside), strict=True))
        found[pixels] = (region.value, region.area_px, region.confidence)
    assert found == expected


@pytest.mark.parametrize("min_area_px", [0, 6, 40])
def test_the_size_of_the_pieces_changes_nothing(
    make_canvas: MakeCanvas, min_area_px: float
) -> None:
    rng = np.random.default_rng(5)
    labels = blobs(46, 38, scale=3)
    labels[rng.random(labels.shape) < 0.05] = 1
    confidence = rng.integers(0, 256, labels.shape).astype(np.uint8)
    canvas = make_canvas(labels, confidence=confidence, chunk_px=16)
    whole = trace(canvas, band_px=1000, min_area_px=min_area_px)
    for band_px in (1, 2, 7, 16, 45, 46):
        assert same(trace(canvas, band_px=band_px, min_area_px=min_area_px), whole)
    for strip_px, band_px in ((1, 17), (2, 16), (13, 1), (19, 17), (19, 16), (37, 1000), (38, 1)):
        pieces = {"band_px": band_px, "strip_px": strip_px}
        assert same(trace(canvas, **pieces, min_area_px=min_area_px), whole)
    for labels in images():
        canvas = make_canvas(labels, chunk_px=8)
        whole = trace(canvas, band_px=1000, min_area_px=min_area_px)
        for piece in ((4, 3), (1, 1)) if labels.size < 100 else ((4, 3),):
            pieces = {"band_px": piece[0], "strip_px": piece[1]}
            assert same(trace(canvas, **pieces, min_area_px=min_area_px), whole)


@pytest.mark.parametrize("corners", [1, 40, 1000])
def test_how_many_regions_are_joined_at_a_time_changes_nothing(
    make_canvas: MakeCanvas, monkeypatch: pytest.MonkeyPatch, corners: int
) -> None:
    pieces = ({"band_px": 1000}, {"band_px": 7, "strip_px": 13, "min_area_px": 3})
    counts = []

    def counted(*arguments: Any) -> Iterator[Any]:
        found = list(by_region(*arguments, batch_corners=corners))
        counts.append(len(found))
        yield from found

    for labels in (*images(), blobs(90, 70, scale=2)):
        canvas = make_canvas(labels, chunk_px=8)
        for piece in pieces:
            whole = trace(canvas, **piece)
            with monkeypatch.context() as patch:
                patch.setattr(polygons, "by_region", counted)
                assert same(trace(canvas, **piece), whole)
    assert max(counts) > (1 if corners == 1000 else 10)


def test_rasterised_again_they_are_the_mask(make_canvas: MakeCanvas) -> None:
    labels = blobs(300, 400)
    regions = trace(make_canvas(labels), band_px=64)
    again = rasterio.features.rasterize(
        zip(regions.polygons, regions.values, strict=True), out_shape=labels.shape, dtype="uint8"
    )
    assert (again == labels).all()
    assert regions.areas_px.sum() == (labels > 0).sum()
    np.testing.assert_array_equal(shapely.area(regions.polygons), regions.areas_px)


def test_small_regions_go_and_small_holes_are_filled(make_canvas: MakeCanvas) -> None:
    labels = np.zeros((30, 30), np.uint8)
    labels[2:28, 2:28] = 2
    labels[5:8, 5:8] = 3  # 9 px inside the gland: dropped, and its hole filled
    labels[12:20, 12:20] = 0  # a lumen of 64 px stays
    labels[14:17, 14:17] = 3  # 9 px in the lumen: dropped
    labels[0, 0:9] = 1  # 9 px beside it: dropped
    regions = trace(make_canvas(labels), band_px=6, min_area_px=10)
    assert regions.values.tolist() == [2]
    assert regions.dropped[:4].tolist() == [0, 1, 0, 2]
    assert regions.areas_px[0] == 26 * 26 - 9 - 64
    assert regions.polygons[0].area == 26 * 26 - 64
    assert len(regions.polygons[0].interiors) == 1
    assert len(trace(make_canvas(labels), min_area_px=9)) == 4


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (513, 3)])
@pytest.mark.parametrize("value", [0, 2])
def test_plain_and_odd_sizes(make_canvas: MakeCanvas, shape: tuple[int, int], value: int) -> None:
    regions = trace(make_canvas(np.full(shape, value, np.uint8)))
    if value:
        box = shapely.box(0, 0, shape[1], shape[0])
        assert len(regions) == 1
        assert regions.polygons[0].equals(box)
        assert regions.confidences[0] == pytest.approx(0.8)
    else:
        assert len(regions) == 0


def test_simplified_together_they_leave_no_gaps(make_canvas: MakeCanvas) -> None:
    labels = blobs(400, 300) % 3 + 1  # no value 0
    regions = trace(make_canvas(labels.astype(np.uint8)))
    simple = shapely.coverage_simplify(regions.polygons, 3)
    assert shapely.get_num_coordinates(simple).sum() < 0.3 * (
        shapely.get_num_coordinates(regions.polygons).sum()
    )
    assert shapely.coverage_is_valid(simple)
    assert shapely.area(simple).sum() == pytest.approx(shapely.union_all(simple).area)


def test_real_masks_have_the_area_of_their_pixels(
    make_canvas: MakeCanvas, shared_data: Path
) -> None:
    from PIL import Image

    paths = sorted((shared_data / "glas").rglob("*_anno.png"))[:3]
    if not paths:
        pytest.skip("no GlaS masks")
    for path in paths:
        labels = (np.asarray(Image.open(path)) > 0).astype(np.uint8) + 1
        regions = trace(make_canvas(labels), band_px=100)
        assert len(regions) == len(by_gdal(labels))
        np.testing.assert_array_equal(shapely.area(regions.polygons), regions.areas_px)


@pytest.mark.parametrize("band_px", [7, 16, 100])
def test_objects_are_regions_of_their_own(make_canvas: MakeCanvas, band_px: int) -> None:
    labels = blobs(90, 70, seed=4, scale=5)
    halves = np.where(np.arange(70) < 30, 1, 2)[None] + 2 * (np.arange(90) >= 41)[:, None]
    numbers = np.zeros(labels.shape, np.int32)
    count = 0
    for value in (2, 3):
        for half in (1, 2, 3, 4):
            parts, found = ndimage.label((labels == value) & (halves == half))
            numbers[parts > 0] = parts[parts > 0] + count
            count += found
    canvas = make_canvas(labels, chunk_px=32)
    plain = trace(canvas)
    canvas.write_objects(canvas.grid.box, numbers)
    canvas.update_record(objects={"Gland": count})
    regions = trace(canvas, band_px=band_px, strip_px=23)
    whole = trace(canvas, band_px=90)
    assert shapely.equals_exact(regions.polygons, whole.polygons).all()
    assert len(regions) > len(plain)
    assert (regions.values > 1).sum() == count
    assert shapely.coverage_is_valid(regions.polygons)
    painted = np.zeros(labels.shape, int)
    for polygon, value, area in zip(
        regions.polygons, regions.values, regions.areas_px, strict=True
    ):
        assert polygon.is_valid
        inside = rasterio.features.rasterize([polygon], out_shape=labels.shape).astype(bool)
        assert inside.sum() == area == polygon.area
        assert set(labels[inside]) == {value}
        own = set(numbers[inside])
        assert len(own) == 1
        assert value == 1 or (numbers == own.pop()).sum() == area
        painted += inside
    assert np.array_equal(painted, labels > 0)
