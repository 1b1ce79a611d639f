"""Corrections over predictions, what has no class, and what is said of the slides."""

from __future__ import annotations

from pathlib import Path

import pytest
from qupath_toys import SMALL, feature, rectangle, slide, write

from wsiseg.datasets.table import open_dataset


def test_a_correction_lies_on_all_parts_of_a_larger_annotation(tmp_path: Path) -> None:
    slide(tmp_path)
    stroma = feature("Stroma", rectangle(0, 0, 60, 64))
    parts = [[rectangle(0, 0, 30, 64)], [rectangle(44, 24, 4, 4)]]
    stroma["geometry"] = {"type": "MultiPolygon", "coordinates": parts}
    tumour = feature("Tumor", rectangle(40, 20, 12, 12))
    write(tmp_path / "s.geojson", {"type": "FeatureCollection", "features": [tumour, stroma]})
    data = open_dataset({"name": "qupath", **SMALL}, tmp_path, "train")
    mask = data.mask(0)  # type: ignore[attr-defined]
    assert (mask[20:32, 40:52] == data.classes.names.index("Tumor")).all()
    assert (mask[:, :30] == data.classes.names.index("Stroma")).all()


def test_inside_a_region_what_has_no_class_is_no_background(tmp_path: Path) -> None:
    slide(tmp_path)
    features = [
        feature(None, rectangle(0, 0, 200, 120)),  # around the region
        feature("Region*", rectangle(0, 0, 64, 64)),
        feature("Tumor", rectangle(0, 0, 16, 16)),
        feature(None, rectangle(32, 32, 16, 16)),
        feature(None, rectangle(0, 48, 8, 8), kind="detection"),
    ]
    write(tmp_path / "s.geojson", {"type": "FeatureCollection", "features": features})
    with pytest.warns(UserWarning, match="3 annotations without a class"):
        data = open_dataset({"name": "qupath", "background": "Other", **SMALL}, tmp_path, "train")
    mask = data.mask(0)  # type: ignore[attr-defined]
    other = data.classes.names.index("Other")
    assert (mask[32:48, 32:48] == 255).all()
    assert mask[20, 20] == mask[50, 4] == other
    assert len(data) == 1


def test_what_is_said_of_a_slide_is_said_in_training(tmp_path: Path) -> None:
    slide(tmp_path, mpp=4.0)
    write(
        tmp_path / "s.geojson",
        [feature(name, rectangle(k, 0, 40, 40)) for k, name in ((0, "A"), (60, "B"))],
    )
    with pytest.warns(UserWarning, match="4 um are enlarged to the 0.5"):
        open_dataset({"name": "qupath", **SMALL}, tmp_path, "train")
