"""The GeoJSON: what QuPath needs, and the same shapes as the mask."""

from __future__ import annotations

import gzip
import json
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

import geojson
import numpy as np
import pytest
import rasterio.features
import shapely
from output_canvases import CLASSES, MakeCanvas, UInt8, blobs

from wsiseg.canvas import Canvas
from wsiseg.errors import UsageError
from wsiseg.geometry import Size
from wsiseg.outputs.geojson import PolygonOptions, write_geojson
from wsiseg.outputs.level0 import to_level0

EXACT = PolygonOptions(min_area_um2=0, tolerance_um=0, all_classes=True)


def features(path: Path) -> list[dict[str, Any]]:
    text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    collection = geojson.loads(text.decode("utf-8"))
    assert collection.is_valid, collection.errors()
    assert collection["type"] == "FeatureCollection"
    for feature in collection["features"]:
        geometry = shapely.geometry.shape(feature["geometry"])
        shapely.set_precision(geometry, 0.01)  # raises on what stops QuPath's import
        assert shapely.is_valid(geometry)
        assert geometry.area > 0
    return list(collection["features"])


def rasterised(found: list[dict[str, Any]], canvas: Canvas) -> UInt8:
    """The polygons as labels on the canvas's grid."""
    value = {c.name: v for v, c in canvas.classes.values()}
    dx, dy = canvas.grid.downsample
    shapes = [(f["geometry"], value[f["properties"]["classification"]["name"]]) for f in found]
    size = canvas.grid.size
    if not shapes:
        return np.zeros((size.height, size.width), np.uint8)
    return np.asarray(
        rasterio.features.rasterize(
            shapes,
            out_shape=(size.height, size.width),
            transform=rasterio.Affine(dx, 0, 0, 0, dy, 0),
            dtype="uint8",
        )
    )


def iou(a: UInt8, b: UInt8, value: int) -> float:
    return float(((a == value) & (b == value)).sum() / ((a == value) | (b == value)).sum())


@pytest.mark.parametrize("level0", [None, Size(801, 1203), Size(266, 399)])
def test_before_simplifying_the_polygons_are_the_mask(
    make_canvas: MakeCanvas, tmp_path: Path, level0: Size | None
) -> None:
    labels = blobs(600, 400)
    canvas = make_canvas(labels, level0=level0)
    report = write_geojson(tmp_path / "a.geojson", canvas, EXACT)
    found = features(tmp_path / "a.geojson")
    again = rasterised(found, canvas)
    assert min(iou(labels, again, v) for v in (1, 2, 3)) > 0.9999
    assert report.features == len(found)
    assert report.tolerance_um == 0
    assert report.vertices == sum(
        shapely.get_num_coordinates(shapely.geometry.shape(f["geometry"])) for f in found
    )
    total = sum(f["properties"]["measurements"]["Area um^2"] for f in found)
    expected = (labels > 0).sum() * canvas.grid.pixel_area_um2
    assert total == pytest.approx(expected, abs=0.005 * len(found))


def test_with_the_defaults_they_still_agree_and_are_far_smaller(
    make_canvas: MakeCanvas, tmp_path: Path
) -> None:
    labels = blobs(900, 1000, scale=12)
    canvas = make_canvas(labels)
    exact = write_geojson(tmp_path / "a.geojson", canvas, EXACT)
    report = write_geojson(tmp_path / "b.geojson", canvas, PolygonOptions(all_classes=True))
    again = rasterised(features(tmp_path / "b.geojson"), canvas)
    assert min(iou(labels, again, v) for v in (1, 2, 3)) >= 0.95
    assert report.vertices < 0.25 * exact.vertices
    assert not report.tolerance_raised
    assert report.within_budget


def test_properties_are_what_qupath_reads(make_canvas: MakeCanvas, tmp_path: Path) -> None:
    labels = np.zeros((60, 80), np.uint8)
    labels[:, 1:70] = 1
    labels[5:25, 5:25] = 2
    labels[10:15, 10:15] = 0  # a lumen
    labels[30:60, 30:60] = 2
    labels[40:50, 5:20] = 3
    confidence = np.full(labels.shape, 51, np.uint8)
    confidence[labels == 2] = 204
    canvas = make_canvas(labels, confidence=confidence)
    options = PolygonOptions(min_area_um2=1, tolerance_um=0)
    write_geojson(tmp_path / "a.geojson", canvas, options)
    found = features(tmp_path / "a.geojson")
    assert [f["properties"]["name"] for f in found] == ["Gland 1", "Gland 2", "Lymphocytes 1"]
    large, small, cells = found
    assert large["properties"]["measurements"] == {
        "Area um^2": 900 * 0.25,
        "Mean probability": 0.8,
    }
    assert small["properties"]["measurements"]["Area um^2"] == (400 - 25) * 0.25
    assert cells["properties"]["measurements"]["Mean probability"] == 0.2
    assert len(small["geometry"]["coordinates"]) == 2
    outside, hole = (shapely.Polygon(ring).bounds for ring in small["geometry"]["coordinates"])
    assert outside == (10, 10, 50, 50)  # level-0 pixels, twice those of the grid
    assert hole == (20, 20, 30, 30)
    for feature in found:
        properties = feature["properties"]
        item = next(c for c in CLASSES if properties["name"].startswith(c.name))
        assert properties["objectType"] == "annotation"
        assert properties["isLocked"] is True
        assert properties["classification"] == {"name": item.name, "color": list(item.colour)}
        assert properties["metadata"]["wsiseg.model"] == "tiny"
        assert uuid.UUID(feature["id"]).version == 5
    assert len({f["id"] for f in found}) == len(found)
    text = (tmp_path / "a.geojson").read_text()
    assert "null" not in text
    assert ", " not in text
    for geometry in text.split('"geometry":')[1:]:
        assert ".0" not in geometry.split('"properties"')[0]  # whole numbers have no decimals


def test_background_is_exported_only_when_asked_and_changes_nothing_else(
    make_canvas: MakeCanvas, tmp_path: Path
) -> None:
    canvas = make_canvas(blobs(300, 300))
    write_geojson(tmp_path / "a.geojson", canvas)
    write_geojson(tmp_path / "b.geojson", canvas, PolygonOptions(all_classes=True))
    some, every = features(tmp_path / "a.geojson"), features(tmp_path / "b.geojson")
    background = [f for f in every if f["properties"]["classification"]["name"] == "Other tissue"]
    assert background
    assert some == [f for f in every if f not in background]


def test_the_same_run_gives_the_same_file_and_another_model_other_ids(
    make_canvas: MakeCanvas, tmp_path: Path
) -> None:
    labels = blobs(300, 200)
    canvas = make_canvas(labels)
    options = PolygonOptions(gzip=True)
    write_geojson(tmp_path / "a.gz", canvas, options)
    write_geojson(tmp_path / "b.gz", canvas, replace(options, band_px=37))
    assert (tmp_path / "a.gz").read_bytes() == (tmp_path / "b.gz").read_bytes()
    write_geojson(tmp_path / "a.geojson", canvas)
    other = make_canvas(labels, name="other.canvas", model={"name": "tiny", "sha256": "cd" * 32})
    write_geojson(tmp_path / "b.geojson", other)
    a, b = features(tmp_path / "a.geojson"), features(tmp_path / "b.geojson")
    assert features(tmp_path / "a.gz") == a
    assert [f["geometry"] for f in a] == [f["geometry"] for f in b]
    assert not {f["id"] for f in a} & {f["id"] for f in b}


def test_the_vertex_budget_raises_the_tolerance(make_canvas: MakeCanvas, tmp_path: Path) -> None:
    canvas = make_canvas(blobs(600, 600))
    free = write_geojson(tmp_path / "a.geojson", canvas)
    held = write_geojson(
        tmp_path / "b.geojson", canvas, PolygonOptions(max_vertices=free.vertices // 2)
    )
    assert held.tolerance_raised
    assert held.tolerance_um > free.tolerance_um == 1.0
    assert held.vertices <= free.vertices // 2
    assert held.within_budget
    assert len(features(tmp_path / "b.geojson")) == held.features
    least = write_geojson(tmp_path / "c.geojson", canvas, PolygonOptions(max_vertices=1))
    assert not least.within_budget
    assert not least.tolerance_raised
    asked, kept = features(tmp_path / "a.geojson"), features(tmp_path / "c.geojson")
    assert [f["geometry"] for f in kept] == [f["geometry"] for f in asked]


@pytest.mark.parametrize("value", [0, 1])
def test_nothing_to_export_is_a_valid_empty_file(
    make_canvas: MakeCanvas, tmp_path: Path, value: int
) -> None:
    report = write_geojson(tmp_path / "a.geojson", make_canvas(np.full((20, 30), value, np.uint8)))
    assert features(tmp_path / "a.geojson") == []
    assert json.loads((tmp_path / "a.geojson").read_text())["features"] == []
    assert (report.features, report.vertices) == (0, 0)


def test_repair() -> None:
    bow_tie = shapely.Polygon([(0, 0), (10, 10), (10, 0), (0, 10)])
    sliver = shapely.Polygon([(0, 0), (10, 0.001), (10, 0)])
    crossing = shapely.Polygon(
        shapely.box(0, 0, 10, 10).exterior.coords, [[(5, 5), (15, 5), (5, 8)]]
    )
    shapes = to_level0(np.array([bow_tie, sliver, crossing, shapely.box(0, 0, 1, 1)]), (2, 1))
    assert shapes[1] is None
    assert shapes[0].geom_type == "MultiPolygon"
    assert shapes[0].area == pytest.approx(100)
    assert shapes[2].area < 200
    assert shapes[3].equals(shapely.box(0, 0, 2, 1))
    for shape in shapes[[0, 2, 3]]:
        assert shapely.is_valid(shape)
        assert shapely.set_precision(shape, 0.01).equals(shape)


@pytest.mark.parametrize(
    "bad", [{"min_area_um2": -1.0}, {"tolerance_um": float("nan")}, {"max_vertices": 0}]
)
def test_impossible_options(bad: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(bad))):
        PolygonOptions(**bad)
