"""`wsiseg predict` with a model that has borders: touching glands become separate polygons."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import shapely
import tifffile
import torch
from click.testing import CliRunner
from PIL import Image
from scipy import ndimage
from torch import Tensor

from wsiseg.canvas import Canvas
from wsiseg.classes import Classes, TissueClass
from wsiseg.cli import cli
from wsiseg.models.base import FeatureExtractor, Features, FeatureSpec, Head, lay_out
from wsiseg.models.segmenter import ModelInfo, Segmenter
from wsiseg.objects import ObjectsConfig

CLASSES = Classes(
    (TissueClass("Other", (190, 190, 190), background=True), TissueClass("Gland", (200, 0, 0)))
)
SIZE = (700, 900)


class Pixels(FeatureExtractor):
    """The pixels themselves."""

    tile_px = 64
    specs = (FeatureSpec(3, 64),)

    def forward(self, images: Tensor, places: Any, seed: int) -> Features:
        return (images,)


class Reads(Head):
    """Gland where the image is red, the border of a gland where it is also green."""

    class_count = 3

    def forward(self, features: Features) -> Tensor:
        red, green, _ = lay_out(features[0]).unbind(1)
        return torch.stack((-9 * red, 9 * red, 9 * green), dim=1)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors are slower on several threads, most of all beside other work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def glands() -> npt.NDArray[Any]:
    """Numbered glands that touch in rows, across the seams of chunks."""
    yy, xx = np.mgrid[: SIZE[0], : SIZE[1]]
    truth = np.zeros(SIZE, int)
    places = [(y, x) for y in (150, 232, 480, 562) for x in (120, 210, 300, 520, 606, 780)]
    for number, (y, x) in enumerate(places, start=1):
        inside = ((yy - y) / 44) ** 2 + ((xx - x) / 47) ** 2 <= 1
        truth[inside & (truth == 0)] = number
    return truth


def painted(truth: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """The picture that `Reads` reads as the glands, with specks and holes in it."""
    gland = truth > 0
    gland[40:44, 40:44] = True
    for number in (1, 8, 15):
        y, x = ndimage.center_of_mass(truth == number)
        gland[int(y) - 3 : int(y) + 3, int(x) - 3 : int(x) + 3] = False
    ring = np.zeros(SIZE, bool)
    for number, box in enumerate(ndimage.find_objects(truth), start=1):
        own = np.pad(truth[box] == number, 1)
        ring[box] |= (own & (ndimage.distance_transform_edt(own) <= 5))[1:-1, 1:-1]
    image = np.zeros((*SIZE, 3), np.uint8)
    image[..., 2] = 120
    image[gland, 0] = 255
    image[ring, 1] = 255
    return image


def predict(folder: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> dict[str, Any]:
    """Run the command on the painted glands; gives the record it wrote."""
    Image.fromarray(painted(glands())).save(folder / "slide.png")
    info = ModelInfo(
        "painter",
        "0" * 64,
        CLASSES,
        0.5,
        256,
        64,
        border=True,
        objects=ObjectsConfig(min_area_um2=50, max_hole_um2=50, min_core_um2=50),
    )
    model = Segmenter(Pixels(), Reads(), info)
    monkeypatch.setattr("wsiseg.cli.predict_run.load_model", lambda *a, **k: model)
    command = ["predict", str(folder / "slide.png"), "--out", str(folder), "--mpp", "0.5"]
    command += ["--tissue", "none", "--overlap", "64", "--device", "cpu", "--keep-canvas"]
    result = CliRunner().invoke(cli, [*command, *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    record: dict[str, Any] = json.loads((folder / "slide.json").read_text())
    return record


def polygons(folder: Path) -> list[Any]:
    found = json.loads((folder / "slide.geojson").read_text())["features"]
    assert {f["properties"]["classification"]["name"] for f in found} == {"Gland"}
    shapes = [shapely.geometry.shape(f["geometry"]) for f in found]
    areas = [f["properties"]["measurements"]["Area um^2"] for f in found]
    assert all(s.is_valid and s.geom_type == "Polygon" for s in shapes)
    assert areas == sorted(areas, reverse=True)
    return shapes


def test_touching_glands_are_separate_polygons(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = predict(tmp_path, monkeypatch, "--min-area", "0", "--tolerance", "0")
    truth = glands()
    assert truth.max() == 24
    assert ndimage.label(truth > 0)[1] == 6, "they do touch"
    assert record["objects"] == {"Gland": 24}
    assert record["parameters"]["objects"]["min_core_um2"] == 50
    mask = tifffile.imread(tmp_path / "slide.mask.ome.tif")
    assert np.array_equal(mask == 2, truth > 0), "specks and holes are gone"

    shapes = polygons(tmp_path)
    assert len(shapes) == 24
    assert sum(s.area for s in shapes) == (truth > 0).sum()
    canvas = Canvas.open(tmp_path / "slide.canvas")
    objects = canvas.objects(canvas.grid.box)
    areas = np.bincount(objects.ravel())[1:]
    assert sorted(s.area for s in shapes) == sorted(areas.tolist())
    for number in range(1, 25):
        own = truth == number
        best = np.bincount(objects[own]).argmax()
        assert ((objects == best) & own).sum() / ((objects == best) | own).sum() > 0.97


def test_simplified_polygons_share_their_borders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = predict(tmp_path, monkeypatch, "--tolerance", "1")
    shapes = polygons(tmp_path)
    assert len(shapes) == record["polygons"]["features"] == 24
    assert record["polygons"]["vertices"] < 24 * 60
    assert shapely.coverage_is_valid(shapes)
    again = tmp_path / "again"
    command = ["export", str(tmp_path / "slide.canvas"), "--out", str(again)]
    result = CliRunner().invoke(cli, command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    files = ("slide.geojson", "slide.mask.ome.tif", "slide.overview.png")
    assert all((again / f).read_bytes() == (tmp_path / f).read_bytes() for f in files)

    tree = shapely.STRtree(shapes)
    pairs = tree.query(shapes, predicate="touches")
    lengths = [shapes[a].intersection(shapes[b]).length for a, b in pairs.T if a < b]
    assert sum(length > 10 for length in lengths) == 24, "neighbours in rows and columns"
    union = shapely.union_all(shapes)
    assert union.area == pytest.approx(sum(s.area for s in shapes), abs=1e-6)
