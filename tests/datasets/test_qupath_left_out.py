"""Annotations that cannot be used: what is left out is named, what cannot be is an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from qupath_toys import SMALL, TWO, collection, feature, rectangle, slide, whole, write

from wsiseg.datasets.annotations import read_annotations
from wsiseg.datasets.qupath import QuPathDataset
from wsiseg.datasets.qupath_config import QuPathClass, QuPathConfig
from wsiseg.errors import ConfigError, DatasetError, ResolutionError


def test_what_has_no_class_or_area_is_left_out_with_a_warning(tmp_path: Path) -> None:
    slide(tmp_path)
    line = feature("Tumour", [[150, 10], [160, 20], [170, 30], [150, 10]])
    point = {**TWO[0], "geometry": {"type": "Point", "coordinates": [1, 2]}}
    nameless = feature(None, rectangle(0, 0, 9, 9))
    cell = feature("Nucleus", rectangle(0, 0, 9, 9), kind="cell")
    write(tmp_path / "s.geojson", collection(*TWO, point, line, nameless, cell))
    for k in range(6):
        slide(tmp_path, f"bare{k}.png")
    with pytest.warns(UserWarning, match="left out") as said:
        data = QuPathDataset(tmp_path, "all", QuPathConfig(**SMALL))
    expected = (
        f"{tmp_path}: left out: 1 objects of type cell, which are not annotations (option objects) "
        "(s.geojson); 2 annotations without area (s.geojson); 1 annotations without a class "
        "(s.geojson); 6 slides without a GeoJSON file (bare0.png, bare1.png, bare2.png, bare3.png "
        "and 2 others)"
    )
    assert [str(w.message) for w in said] == [expected]
    assert data.classes.names == ("Stroma", "Tumour")
    assert data.mask(0)[5, 5] == 255


def test_cells_and_files_of_another_suffix_are_named(tmp_path: Path) -> None:
    slide(tmp_path)
    slide(tmp_path, "t.tif")
    cells = [feature("A", rectangle(20 * k, 0, 9, 9), kind="cell") for k in range(3)]
    write(tmp_path / "s.geojson", collection(*cells))
    write(tmp_path / "t.json", collection(*TWO))
    with pytest.raises(DatasetError, match=r"3 objects of type cell, which are not annotations"):
        QuPathDataset(tmp_path, "all")
    write(tmp_path / "s.geojson", collection(*TWO))
    with pytest.warns(UserWarning, match=r"1 slides without .*\(t.tif\).*\.json \(t.json\)"):
        QuPathDataset(tmp_path, "all", QuPathConfig(**SMALL))


def test_nothing_annotated(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no such folder"):
        QuPathDataset(tmp_path / "none", "all")
    slide(tmp_path)
    with pytest.raises(DatasetError, match="no slide has annotations"):
        QuPathDataset(tmp_path, "all")
    write(tmp_path / "s.geojson", collection())
    with pytest.raises(DatasetError, match=r"1 files without annotations \(s.geojson\)"):
        QuPathDataset(tmp_path, "all")
    write(tmp_path / "s.geojson", collection(*TWO))
    with pytest.raises(DatasetError, match=r"90.00% of it annotated; lower min_labelled"):
        QuPathDataset(tmp_path, "all", QuPathConfig(**SMALL, min_labelled=0.9))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("3", "not GeoJSON"),
        ('{"type": "FeatureCollection"}', "not GeoJSON"),
        ('[{"geometry": 3}]', "feature 1 is not"),
        ("[1]", "not GeoJSON"),
    ],
)
def test_files_that_are_no_geojson(tmp_path: Path, text: str, message: str) -> None:
    slide(tmp_path)
    (tmp_path / "s.geojson").write_text(text)
    with pytest.raises(DatasetError, match=rf"s\.geojson: .*{message}"):
        QuPathDataset(tmp_path, "all")


@pytest.mark.parametrize(
    "coordinates",
    [
        [[[0, 0], [1, 0]]],
        [[[0], [1], [2]]],
        [[[0, 0], [float("nan"), 3], [4, 4]]],
        [[[0, 0], [float("inf"), 3], [4, 4]]],
        [[[0, 0], [10**400, 3], [4, 4]]],
        [[["a", 0], [1, 3], [4, 4]]],
        [],
        [[]],
        5,
        None,
    ],
)
def test_coordinates_that_cannot_be(tmp_path: Path, coordinates: Any) -> None:
    bad = feature("Tumour")
    bad["geometry"]["coordinates"] = coordinates
    path = write(tmp_path / "s.geojson", collection(TWO[0], bad))
    with pytest.raises(DatasetError, match="feature 2 has coordinates"):
        read_annotations(path)


@pytest.mark.parametrize("corner", [(300, 0), (0, 121), (-50, 0), (1e12, 1e12), (-9e9, 5)])
def test_polygons_outside_the_slide(tmp_path: Path, corner: tuple[float, float]) -> None:
    slide(tmp_path)
    ring = [[*corner], [corner[0] + 30, corner[1]], [corner[0], corner[1] + 20]]
    if corner[0] < -1e9:
        ring[1] = [100, 50]
    write(tmp_path / "s.geojson", collection(*TWO, feature("Tumour", ring)))
    with pytest.raises(DatasetError, match=r"feature 3 \(Tumour\) lies outside the slide s\.tif"):
        QuPathDataset(tmp_path, "all", QuPathConfig(**SMALL))


def test_crossing_and_overhanging_borders_are_taken(tmp_path: Path) -> None:
    slide(tmp_path)
    bow = feature("Tumour", [[10, 10], [50, 50], [50, 10], [10, 50]])
    over = feature("Stroma", rectangle(150, -30, 100, 60))
    write(tmp_path / "s.geojson", collection(bow, over))
    sheet = whole(QuPathDataset(tmp_path, "all", QuPathConfig(**SMALL)))
    assert (sheet[:30, 150:] == 0).all()
    assert (sheet[31:, 150:] == 255).all()
    assert sheet[30, 15] == 1
    assert sheet[30, 45] == 1
    assert sheet[15, 30] == 255


def test_files_that_do_not_belong_together(tmp_path: Path) -> None:
    slide(tmp_path)
    write(tmp_path / "s.geojson", collection(*TWO))
    write(tmp_path / "t.geojson", collection(*TWO))
    with pytest.raises(DatasetError, match=r"t\.geojson: there is no slide of this name"):
        QuPathDataset(tmp_path, "all")
    (tmp_path / "t.geojson").unlink()
    slide(tmp_path, "s.png")
    with pytest.raises(DatasetError, match=r"several slides \(s\.png, s\.tif\)"):
        QuPathDataset(tmp_path, "all")
    (tmp_path / "s.png").unlink()
    write(tmp_path / "annotations" / "s.geojson", collection(*TWO))
    with pytest.raises(DatasetError, match="two files of annotations"):
        QuPathDataset(tmp_path, "all")


def test_slides_without_a_resolution(tmp_path: Path) -> None:
    slide(tmp_path, mpp=None)
    write(tmp_path / "s.geojson", collection(*TWO))
    with pytest.raises(ResolutionError, match=r"s\.tif: .*set the option mpp_override"):
        QuPathDataset(tmp_path, "all", QuPathConfig(**SMALL))
    data = QuPathDataset(tmp_path, "all", QuPathConfig(**SMALL, mpp_override=0.5))
    assert (whole(data) != 255).sum() == 3600


@pytest.mark.parametrize(
    "change",
    [
        {"mpp": 0.0},
        {"mpp_override": float("nan")},
        {"patch_px": 0},
        {"stride_px": 0},
        {"min_labelled": 1.5},
        {"classes": (QuPathClass("A", (0, 0, 0)), QuPathClass("B", (0, 0, 0), qupath=("A",)))},
        {"classes": (QuPathClass("A", (0, 0, 0)),), "background": "B"},
        {"classes": (QuPathClass("A", (0, 0, 0)),), "ignore": ("A",)},
    ],
)
def test_options_that_cannot_be(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        QuPathConfig(**change)
