"""Annotations of QuPath as labelled patches."""

from __future__ import annotations

import gzip
import json
import runpy
from pathlib import Path

import numpy as np
import pytest
from qupath_toys import SIZE, SMALL, TWO, collection, feature, rectangle, slide, whole, write
from scipy import ndimage

from wsiseg.canvas import Canvas
from wsiseg.classes import Classes, TissueClass, to_network
from wsiseg.datasets.annotations import read_annotations
from wsiseg.datasets.qupath import QuPathDataset
from wsiseg.datasets.qupath_config import QuPathClass, QuPathConfig
from wsiseg.datasets.table import open_dataset
from wsiseg.errors import ConfigError, DatasetError, UsageError
from wsiseg.geometry import Box, Grid, Size
from wsiseg.outputs.geojson import PolygonOptions, write_geojson
from wsiseg.slides.slide import Slide, open_slide


def test_polygons_become_masks_of_patches(tmp_path: Path) -> None:
    path = slide(tmp_path)
    write(tmp_path / "s.geojson", collection(*TWO))
    data = QuPathDataset(tmp_path, "all", QuPathConfig(**SMALL))
    expected = np.full((120, 200), 255)
    expected[10:40, 10:50] = 1
    expected[20:70, 70:120] = 0
    expected[30:40, 80:90] = 255
    np.testing.assert_array_equal(whole(data), expected)
    assert data.classes.names == ("Stroma", "Tumour")
    assert data.classes.items[0].colour == (10, 20, 30)
    assert data.names == ("s_x0_y0", "s_x64_y0", "s_x64_y64")
    assert set(data.groups) == {"s"}
    assert data.files == (0, 0, 0)
    assert data.mpp == 0.5
    item = data[2]
    with open_slide(path) as opened:
        image = opened.read(Box(64, 64, 64, 64), opened.grid(0.5))
    np.testing.assert_array_equal(item.image, image)
    np.testing.assert_array_equal(item.mask, data.mask(2))
    assert (item.image[56:] == 255).all()  # below the slide
    assert item.name == "s_x64_y64"
    assert item.group == "s"


def test_resolution_and_stride(tmp_path: Path) -> None:
    slide(tmp_path, mpp=0.25)
    write(tmp_path / "s.geojson", collection(*TWO))
    config = QuPathConfig(mpp=0.5, patch_px=32, stride_px=16, min_labelled=0.3)
    with pytest.warns(UserWarning, match="patches are left out") as said:
        data = QuPathDataset(tmp_path, "all", config)
    expected = np.full((92, 132), 255)
    expected[5:20, 5:25] = 1
    expected[10:35, 35:60] = 0
    expected[15:20, 40:45] = 255
    wanted = {
        (x, y): mask
        for y in range(0, 45, 16)
        for x in range(0, 85, 16)
        if ((mask := expected[y : y + 32, x : x + 32]) != 255).mean() >= 0.3
    }
    assert data.names == tuple(f"s_x{x}_y{y}" for x, y in wanted)
    assert len(wanted) >= 2
    lost = expected.copy()
    for x, y in wanted:
        lost[y : y + 32, x : x + 32] = 255
    areas = [(lost == k).sum() / 4 for k in (0, 1)]
    assert areas[0] == 0 < areas[1]
    assert f"with them {areas[1]:,.0f} um2 of Tumour ({4 * areas[1] / 300:.1%});" in str(
        said[0].message
    )
    for i, mask in enumerate(wanted.values()):
        np.testing.assert_array_equal(data.mask(i), mask)


def test_small_annotations_that_are_in_no_patch_are_told_once(tmp_path: Path) -> None:
    for name in "ab":
        slide(tmp_path, f"{name}.tif")
        bud, dot = rectangle(140, 10, 6, 5), rectangle(10, 110, 2, 2)
        features = (*TWO, feature("Bud", bud), feature("Tumour", dot))
        write(tmp_path / f"{name}.geojson", collection(*features))
    with pytest.warns(UserWarning, match="left out") as said:
        data = QuPathDataset(tmp_path, "all", QuPathConfig(**SMALL))
    assert len(said) == 1
    assert str(said[0].message).startswith(
        f"{tmp_path}: 4 patches are left out, as less than 1.00% of each is annotated, and with "
        "them 15 um2 of Bud (100.0%); to keep them lower the option min_"
    )
    assert len(data) == 6
    everything = QuPathDataset(tmp_path, "all", QuPathConfig(**SMALL, min_labelled=0))
    assert len(everything) == 10


@pytest.mark.parametrize("downsample", [1.0, 2.0, 2.37])
def test_what_predict_writes_comes_back(tmp_path: Path, downsample: float) -> None:
    """Canvas -> GeoJSON -> data set gives the labels of the canvas, pixel by pixel."""
    grid = Grid.at_mpp(SIZE, 0.5, 0.5 * downsample)
    rng = np.random.default_rng(3)
    planes = [ndimage.gaussian_filter(rng.random(grid.size[::-1]), 2) for _ in range(3)]
    labels = np.stack(planes).argmax(0).astype(np.uint8)  # 0 = not analysed
    classes = Classes((TissueClass("Other", (9, 9, 9), True), TissueClass("Gland", (8, 8, 8))))
    canvas = Canvas.create(tmp_path / "c", grid=grid, classes=classes, record={}, chunk_px=512)
    canvas.write_chunk(0, 0, labels, np.full(labels.shape, 200, np.uint8))
    slide(tmp_path / "d")
    options = PolygonOptions(min_area_um2=0, tolerance_um=0, all_classes=True)
    write_geojson(tmp_path / "d" / "s.geojson", canvas, options)
    rows = (
        QuPathClass("Rest", (9, 9, 9), True, qupath=("Other",)),
        QuPathClass("Gland", (8, 8, 8)),
    )
    config = QuPathConfig(mpp=0.5 * downsample, patch_px=64, classes=rows, min_labelled=0)
    data = QuPathDataset(tmp_path / "d", "all", config)
    assert data.classes.names == ("Rest", "Gland")
    np.testing.assert_array_equal(whole(data, grid.size), to_network(labels))


def test_slides_with_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Coordinates are from the corner of the bounds, as QuPath gives them, or of level 0."""
    slide(tmp_path)
    write(tmp_path / "s.geojson", collection(*TWO))
    monkeypatch.setattr("wsiseg.slides.slide._bounds", lambda *_: Box(30, 20, 150, 90))
    cropped = QuPathDataset(tmp_path, "all", QuPathConfig(**SMALL))
    full = QuPathDataset(tmp_path, "all", QuPathConfig(**SMALL, coords="openslide"))
    assert cropped[0].image[5, 5].tolist() == [35, 25, 60]
    assert full[0].image[5, 5].tolist() == [5, 5, 10]
    np.testing.assert_array_equal(cropped.mask(0), full.mask(0))


def test_every_form_of_geojson(tmp_path: Path) -> None:
    for name in "abcd":
        slide(tmp_path, f"{name}.tif")
    write(tmp_path / "a.geojson", list(TWO))
    write(tmp_path / "annotations" / "b.geojson", TWO[1])
    old = {"type": "Feature", "id": "PathAnnotationObject", "geometry": TWO[0]["geometry"]}
    old["properties"] = {"classification": {"name": "Tumour", "colorRGB": -3670016}}
    parts = {
        "type": "MultiPolygon",
        "coordinates": [[rectangle(0, 0, 20, 20)], [TWO[0]["geometry"]["coordinates"][0]]],
    }
    many = {**TWO[0], "geometry": parts}
    (tmp_path / "c.geojson.gz").write_bytes(gzip.compress(json.dumps([old]).encode()))
    write(tmp_path / "d.tif.geojson", collection(many))
    data = QuPathDataset(tmp_path, "all", QuPathConfig(**SMALL))
    assert sorted(set(data.groups)) == ["a", "b", "c", "d"]
    counts = dict.fromkeys("abcd", 0)
    for i, group in enumerate(data.groups):
        counts[group] += int((data.mask(i) != 255).sum())
    assert counts == {"a": 1200 + 2400, "b": 2400, "c": 1200, "d": 1200 + 300}
    assert read_annotations(tmp_path / "c.geojson.gz")[0].colour == (200, 0, 0)


def test_names_of_derived_classes(tmp_path: Path) -> None:
    derived = feature(None, rectangle(0, 0, 9, 9), classification={"names": ["Tumour", "Positive"]})
    slide(tmp_path)
    path = write(tmp_path / "s.geojson", collection(*TWO, derived))
    assert read_annotations(path)[2].class_name == "Tumour: Positive"
    with pytest.raises(DatasetError, match="'Tumour: Positive'"):
        QuPathDataset(tmp_path, "all", QuPathConfig(**SMALL))
    rows = (
        QuPathClass("Tumour", (1, 1, 1), qupath=("Tumour", "Tumour: Positive")),
        QuPathClass("Stroma", (2, 2, 2)),
    )
    data = QuPathDataset(tmp_path, "all", QuPathConfig(**SMALL, classes=rows))
    assert data.mask(0)[0, 0] == 0


def test_the_smaller_is_on_top_and_later_of_equals(tmp_path: Path) -> None:
    slide(tmp_path)
    square = rectangle(20, 20, 20, 20)
    small = rectangle(25, 25, 5, 5)
    features = [feature("B", small), feature("A", rectangle(0, 0, 60, 60)), feature("C", square)]
    features += [feature("A", square), feature("Ignore*", rectangle(0, 0, 3, 3))]
    write(tmp_path / "s.geojson", collection(*features))
    mask = QuPathDataset(tmp_path, "all", QuPathConfig(**SMALL)).mask(0)
    expected = np.full((64, 64), 255)
    expected[:60, :60] = 0
    expected[25:30, 25:30] = 1
    expected[:3, :3] = 255
    np.testing.assert_array_equal(mask, expected)


def test_background_inside_regions(tmp_path: Path) -> None:
    slide(tmp_path)
    region = feature("Region*", rectangle(5, 5, 30, 30))
    named = feature(None, rectangle(100, 5, 10, 10), name="Region*")
    tumour = feature("Tumour", rectangle(0, 0, 50, 10))  # larger than the region, yet on top
    write(tmp_path / "s.geojson", collection(tumour, region, named))
    data = QuPathDataset(tmp_path, "all", QuPathConfig(**SMALL, background="Rest"))
    expected = np.full((120, 200), 255)
    expected[5:35, 5:35] = expected[5:15, 100:110] = 0
    expected[:10, :50] = 1
    np.testing.assert_array_equal(whole(data), expected)
    assert data.classes.names == ("Rest", "Tumour")
    assert data.classes.items[0].background
    with pytest.raises(DatasetError, match=r"one class only \(Tumour\).*Region\*"):
        QuPathDataset(tmp_path, "all", QuPathConfig(**SMALL))
    write(tmp_path / "s.geojson", collection(*TWO, region))
    with pytest.warns(
        UserWarning, match=r"s\.geojson: 1 annotations of class Region\* say nothing"
    ):
        QuPathDataset(tmp_path, "all", QuPathConfig(**SMALL))


def test_classes_that_the_options_do_not_name(tmp_path: Path) -> None:
    slide(tmp_path)
    write(tmp_path / "s.geojson", collection(*TWO, feature("Fat", rectangle(0, 0, 5, 5))))
    rows = (QuPathClass("Tumour", (1, 1, 1)), QuPathClass("Necrosis", (2, 2, 2)))
    with pytest.raises(DatasetError, match=r"s\.geojson: classes .*: Fat, Stroma; add them"):
        QuPathDataset(tmp_path, "all", QuPathConfig(**SMALL, classes=rows))
    config = QuPathConfig(**SMALL, classes=rows, ignore=("Fat", "Stroma"))
    data = QuPathDataset(tmp_path, "all", config)
    assert data.names == ("s_x0_y0",)
    assert set(np.unique(data.mask(0))) == {0, 255}


def test_classes_that_differ_only_in_case_are_not_merged(tmp_path: Path) -> None:
    for name, classes in {"a": ("Tumour", "Stroma"), "b": ("tumour", "Stroma")}.items():
        slide(tmp_path, f"{name}.tif")
        features = [feature(c, rectangle(60 * k, 0, 40, 40)) for k, c in enumerate(classes)]
        write(tmp_path / f"{name}.geojson", collection(*features))
    said = (
        r"'Tumour' \(a.geojson\) and 'tumour' \(b.geojson\) differ only in case.*`classes`.*qupath"
    )
    with pytest.raises(DatasetError, match=said):
        QuPathDataset(tmp_path, "all", QuPathConfig(**SMALL))
    rows = (
        QuPathClass("Tumour", (1, 1, 1), qupath=("Tumour", "tumour")),
        QuPathClass("Stroma", (2, 2, 2)),
    )
    data = QuPathDataset(tmp_path, "all", QuPathConfig(**SMALL, classes=rows))
    assert [(data.mask(i) == 0).sum() for i in (0, 2)] == [1600, 1600]
    config = QuPathConfig(**SMALL, ignore=("tumour",), background="stroma")
    with pytest.raises(DatasetError, match=r"'stroma' \(option background\)"):
        QuPathDataset(tmp_path, "all", config)
    with pytest.raises(ConfigError, match="'Tumour' and 'TUMOUR' differ only in case"):
        QuPathConfig(classes=(QuPathClass("Tumour", (1, 1, 1)), QuPathClass("TUMOUR", (2, 2, 2))))


def test_parts_by_slide(tmp_path: Path) -> None:
    for name in "ab":
        slide(tmp_path, f"{name}.tif")
        write(tmp_path / f"{name}.geojson", collection(*TWO))
    test = QuPathConfig(**SMALL, test=("b",))
    assert set(QuPathDataset(tmp_path, "train", test).groups) == {"a"}
    data = QuPathDataset(tmp_path, "test", test)
    assert set(data.groups) == {"b"}
    assert data.measuring
    everything = open_dataset({"name": "qupath", "patch_px": 64}, tmp_path, "train")
    assert set(everything.groups) == {"a", "b"}
    assert not everything.measuring
    with pytest.raises(DatasetError, match="no slide is in the part test"):
        QuPathDataset(tmp_path, "test", QuPathConfig(**SMALL))
    with pytest.raises(DatasetError, match="test names c"):
        QuPathDataset(tmp_path, "all", QuPathConfig(**SMALL, test=("c",)))
    with pytest.raises(UsageError, match="no part"):
        QuPathDataset(tmp_path, "testA", QuPathConfig(**SMALL))


def test_a_slide_is_closed_after_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slide(tmp_path)
    write(tmp_path / "s.geojson", collection(*TWO))
    closed = []
    real = Slide.close
    monkeypatch.setattr(Slide, "close", lambda self: (closed.append(1), real(self)))
    data = QuPathDataset(tmp_path, "all", QuPathConfig(**SMALL))
    assert len(closed) == 1
    for i in range(len(data)):
        data[i]
    assert len(closed) == 1 + len(data)


def test_the_example_writes_what_can_be_read(tmp_path: Path) -> None:
    path = Path(__file__).resolve().parents[2] / "examples" / "correct_and_retrain.py"
    example = runpy.run_path(str(path))
    slide(tmp_path, "colon.tif", mpp=1.0, size=Size(700, 500))
    predicted = [
        feature("Gland", rectangle(250, 150, 300, 300)),
        feature("Other tissue", rectangle(100, 20, 500, 470)),
    ]
    write(tmp_path / "first.json", collection(*predicted))
    example["correct"](tmp_path / "first.json", tmp_path / "colon.geojson")
    data = QuPathDataset(tmp_path, "train", QuPathConfig(mpp=1.0, patch_px=700))
    assert data.classes.names == ("Gland", "Stroma")
    mask = data.mask(0)
    assert [mask[y, x] for y, x in ((150, 258), (161, 422), (290, 360))] == [0, 0, 0]
    assert [mask[y, x] for y, x in ((400, 500), (225, 500), (10, 10))] == [1, 1, 255]
