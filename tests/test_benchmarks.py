from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from torch import Tensor

from wsiseg.classes import Classes, TissueClass
from wsiseg.geometry import Box, Grid, Point, Size
from wsiseg.inference.plan import plan
from wsiseg.inference.predict import PredictOptions
from wsiseg.models.base import FeatureExtractor, Features, FeatureSpec, Head, lay_out
from wsiseg.models.checkpoint import save_checkpoint
from wsiseg.models.registry import ModelConfig, build_segmenter
from wsiseg.models.segmenter import ModelInfo, Segmenter
from wsiseg.slides.phantom import write_phantom
from wsiseg.slides.slide import open_slide

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
CLASSES = Classes((TissueClass("rest", (0, 0, 200), True), TissueClass("gland", (200, 0, 0))))
TILE = 32
SMALL = Size(176, 144)


def module(name: str) -> ModuleType:
    """A benchmark as a module, found as when it is run as a script."""
    sys.path.insert(0, str(FOLDER))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def slide_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("slide") / "phantom.tif"
    write_phantom(path, Size(400, 330), mpp=1.0, seed=3)
    return path


@pytest.fixture(scope="module")
def small_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("slide") / "small.tif"
    write_phantom(path, SMALL, mpp=1.0, seed=1)
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = ModelConfig(
        extractor={"name": "genselfdiff", "dim": 8, "mults": [1, 2], "groups": 4, "tile_px": TILE},
        head={"name": "linear"},
        classes=CLASSES,
        mpp=1.0,
        window_px=96,
    )
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    save_checkpoint(path, build_segmenter(config).eval(), card={}, licence="none")
    return path


class Tone(FeatureExtractor):
    """The mean colour of each pixel, made brighter or darker tile by tile."""

    specs = (FeatureSpec(1, 1),)
    tile_px = TILE

    def __init__(self, seam: float) -> None:
        super().__init__()
        self.seam = seam

    def forward(self, images: Tensor, places: Sequence[Point], seed: int) -> Features:
        signs = [1.0 if (p.x // TILE + p.y // TILE) % 2 else -1.0 for p in places]
        return (
            images.mean(1, keepdim=True) + self.seam * torch.tensor(signs)[:, None, None, None],
        )


class Darkness(Head):
    """Gland where it is dark."""

    class_count = 2

    def forward(self, features: Features) -> Tensor:
        z = lay_out(features[0])
        return torch.cat((z, -z), dim=1)


def tone_model(seam: float) -> Segmenter:
    info = ModelInfo("tone", "0" * 64, CLASSES, 1.0, 96, TILE, licence="none")
    return Segmenter(Tone(seam), Darkness(), info)


def invoked(name: str, *arguments: object) -> Result:
    return CliRunner().invoke(module(name).main, [str(a) for a in arguments])


@pytest.mark.parametrize(("seam", "low", "high"), [(0.0, 0.85, 1.15), (0.5, 1.5, 50.0)])
@pytest.mark.parametrize("overlap", [32, 48])
def test_a_planted_seam_is_caught_and_a_smooth_model_is_not(
    slide_path: Path, seam: float, low: float, high: float, overlap: int
) -> None:
    options = PredictOptions(overlap_px=overlap)
    with open_slide(slide_path) as slide:
        seams = module("seams").seams_of(slide, tone_model(seam), options, None)
    assert low < seams.ratio() < high
    assert low < seams.ratio("x") < high
    assert low < seams.ratio("y") < high
    ends = seams.interval()
    assert ends[0] < seams.ratio() < ends[1]
    assert ends == seams.interval()


def test_the_borders_lie_elsewhere_each_time(slide_path: Path) -> None:
    seams = module("seams")
    options = PredictOptions(overlap_px=32)
    model = tone_model(0.5)  # windows of 96 px, whose borders repeat after 64
    with open_slide(slide_path) as slide:
        one = seams.seams_of(slide, model, options, (64, 64, 256, 224))
        three = seams.seams_of(slide, model, options, (64, 64, 256, 224), shifts=3)
        grid, whole = slide.grid(1.0), slide.read(slide.grid(1.0).box, slide.grid(1.0))
        moved = seams.Moved(slide, grid, 21)
        box = moved.grid().box
        pixels = moved.read(box, moved.grid())
        tissue = seams.Within(seams.find_tissue(slide), grid.box)
        seen = seams.MovedTissue(tissue, grid, 21).region(box, moved.grid())
        assert (seen[21:, 21:] == tissue.region(grid.box, grid)).all()
    assert (box.width, box.height) == (421, 351)
    assert (pixels[21:, 21:] == whole).all()
    assert (pixels[:21] == 255).all()
    assert (pixels[:, :21] == 255).all()
    assert not seen[:21].any()
    assert not seen[:, :21].any()
    whole_steps = Grid.at_mpp(Size(416, 416), 1, 1)
    layout = plan(whole_steps, None, window_px=96, tile_px=96, overlap_px=32)
    lines = np.flatnonzero(seams.border_lines(layout, 0, 416)) + 1
    assert len({int(n - i * 64 // 5) % 64 for n in lines for i in range(5)}) == 10  # all differ
    assert three.x.shape == one.x.shape  # bands lie on the same pixels
    assert three.ratio() > 1.5
    for found, first in ((three.x, one.x), (three.y, one.y)):
        assert found[:, 1::2].sum() == 3 * first[:, 1::2].sum()  # all pairs of pixels, three times
        assert found[:, 1].sum() != 3 * first[:, 1].sum()  # of which others straddle borders


def test_jumps_are_those_of_a_slow_loop() -> None:
    rng = np.random.default_rng(0)
    maps = rng.dirichlet((1, 1, 1), (70, 90)).transpose(2, 0, 1).astype(np.float32)
    maps[:, 10:30, 40:70] = 0  # not analysed
    layout = plan(Grid.at_mpp(Size(90, 70), 1, 1), None, window_px=40, tile_px=20, overlap_px=20)
    seams = module("seams").measure_seams(maps, layout)
    borders = [{20, 40, 60, 80, 50, 70}, {20, 40, 60, 30, 50}]
    sums = {"x": np.zeros(4), "y": np.zeros(4)}
    for y, x in np.ndindex(70, 90):
        for axis, (v, u), place in (("x", (y, x - 1), x), ("y", (y - 1, x), y)):
            if place == 0 or not maps[:, y, x].any() or not maps[:, v, u].any():
                continue
            k = 0 if place in borders[axis == "y"] else 2
            sums[axis][k] += 0.5 * sum(abs(float(maps[c, y, x] - maps[c, v, u])) for c in range(3))
            sums[axis][k + 1] += 1
    for axis, found in (("x", seams.x), ("y", seams.y)):
        np.testing.assert_allclose(found.sum(axis=0), sums[axis], rtol=1e-5)
        a, n, b, m = sums[axis]
        assert seams.ratio(axis) == pytest.approx((a / n) / (b / m), rel=1e-5)
    assert seams.pairs == sums["x"][1] + sums["y"][1]


@pytest.mark.parametrize("ratios", [[1.0, float("nan")], [float("nan"), 1.0]])
def test_a_slide_without_a_ratio_is_not_hidden_by_another(ratios: list[float]) -> None:
    verdict_of = module("seams").verdict_of
    assert verdict_of([1.0, 1.1], 1.2) == ("seams: the largest ratio is 1.100, at most 1.2", True)
    verdict, passed = verdict_of(ratios, 1.2)
    assert not passed
    assert "nothing is told" in verdict


def test_seams_on_the_command_line(small_path: Path, checkpoint: Path, tmp_path: Path) -> None:
    report = tmp_path / "seams.json"
    words = ["--model", checkpoint, "--slide", small_path, "--json", report]
    good = invoked("seams", *words, "--overlap", 32, "--overlap", 64, "--max-ratio", 1000)
    assert good.exit_code == 0, good.output
    found = json.loads(report.read_text())
    assert [row["overlap_px"] for row in found["seams"]] == [32, 64]
    assert good.output.splitlines()[-1] == found["verdict"]
    assert "at most 1000" in found["verdict"]
    bad = invoked("seams", *words, "--max-ratio", 0.01)
    assert bad.exit_code == 1
    (row,) = json.loads(report.read_text())["seams"]
    assert row["overlap_px"] == 32  # a third of the window, as of predict
    assert "above 0.01" in bad.output.splitlines()[-1]


def test_the_region_is_all_that_is_looked_at(slide_path: Path, tmp_path: Path) -> None:
    shared = module("shared")
    with open_slide(slide_path) as slide:
        grid = slide.grid(1.0)
        box = shared.region_box((100, 60, 120, 90), grid)
        everything = module("precision").find_tissue(slide, "none")
        tissue = shared.Within(everything, box)
        options = PredictOptions(overlap_px=32)
        maps, canvas = shared.probabilities(
            slide, tone_model(0.1), tmp_path, options=options, tissue=tissue
        )
    seen = maps.sum(axis=0) > 0
    expected = np.zeros((330, 400), bool)
    expected[60:150, 100:220] = True
    assert (seen == expected).all()
    np.testing.assert_allclose(maps.sum(axis=0)[seen], 1, atol=1e-5)
    labels = canvas.labels(canvas.grid.box)
    assert (labels == np.where(seen, maps.argmax(axis=0) + 1, 0)).all()
    with pytest.raises(shared.UsageError, match="outside the slide, which is 400 x 330 px"):
        shared.region_box((500, 0, 10, 10), grid)


def test_precision_on_the_command_line(small_path: Path, checkpoint: Path, tmp_path: Path) -> None:
    report = tmp_path / "precision.json"
    words = ["--model", checkpoint, "--slide", small_path, "--json", report, "--overlap", 32]
    result = invoked("precision", *words, "--channels-last", "--min-agreement", 0)
    assert result.exit_code == 0, result.output
    ways = {row["way"]: row for row in json.loads(report.read_text())["ways"]}
    assert list(ways) == ["fp32", "bf16", "fp32 channels_last", "bf16 channels_last"]
    assert ways["fp32"]["agreement_percent"] == 100
    assert ways["fp32"]["max_difference"] == 0
    assert ways["fp32"]["speed_ratio"] == 1
    assert 0 < ways["bf16"]["max_difference"] < 0.2
    assert 50 < ways["bf16"]["agreement_percent"] <= 100
    assert all(row["tiles_per_s"] > 0 for row in ways.values())
    assert len({row["pixels"] for row in ways.values()}) == 1
    result = invoked("precision", *words, "--min-agreement", 100.1)
    assert result.exit_code == 1
    assert "below 100.1 %" in result.output.splitlines()[-1]


def test_labels_that_differ_are_counted(slide_path: Path, tmp_path: Path) -> None:
    precision, shared = module("precision"), module("shared")
    done = []
    with open_slide(slide_path) as slide:
        for k, seam in enumerate((0.0, 0.3)):
            (tmp_path / str(k)).mkdir()
            options = PredictOptions(overlap_px=32)
            done.append(
                shared.probabilities(
                    slide, tone_model(seam), tmp_path / str(k), options=options, tissue=None
                )
            )
    tally = precision.Tally()
    precision.compare(tally, done[1], done[0])
    one, two = (np.asarray(maps) for maps, _ in done)
    assert tally.equal == (one.argmax(0) == two.argmax(0)).sum() < tally.pixels == 400 * 330
    assert tally.difference == pytest.approx(np.abs(one - two).max())


def test_behaviour_on_the_command_line(small_path: Path, checkpoint: Path, tmp_path: Path) -> None:
    report, out = tmp_path / "behaviour.json", tmp_path / "pictures"
    words = ["--model", checkpoint, "--slide", small_path, "--json", report, "--overlap", 32]
    result = invoked("behaviour", *words, "--out", out, "--max-glass", 100)
    assert result.exit_code == 0, result.output
    rows: list[dict[str, Any]] = json.loads(report.read_text())["rows"]
    assert [(r["area"], r["class"]) for r in rows] == [
        (area, name) for area in ("glass", "tissue") for name in ("rest", "gland")
    ]
    assert sum(r["area_mm2"] for r in rows) / 2 == pytest.approx(SMALL.width * SMALL.height / 1e6)
    for area in ("glass", "tissue"):
        shares = [r["percent"] for r in rows if r["area"] == area]
        assert sum(shares) == pytest.approx(100)
    with Image.open(out / "small.tif.overview.png") as picture:
        assert picture.width > SMALL.width
    most = max(r["percent"] for r in rows if r["area"] == "tissue" and r["class"] == "gland")
    assert f"{most:.2f} % of tissue" in result.output.splitlines()[-1]
    result = invoked("behaviour", *words, "--max-glass", 100, "--max-tissue", most - 1)
    assert result.exit_code == 1


def test_slides_of_one_name_are_counted_apart(
    small_path: Path, slide_path: Path, checkpoint: Path, tmp_path: Path
) -> None:
    other, report = tmp_path / "small.tif", tmp_path / "behaviour.json"
    other.write_bytes(slide_path.read_bytes())
    words = ["--model", checkpoint, "--slide", small_path, "--slide", other, "--json", report]
    words += ["--overlap", 32, "--out", tmp_path / "out", "--max-glass", 100, "--max-tissue", 100]
    result = invoked("behaviour", *words)
    rows: list[dict[str, Any]] = json.loads(report.read_text())["rows"]
    names = ["small.tif", "small.tif (2)"]
    assert [row["slide"] for row in rows] == [names[0]] * 4 + [names[1]] * 4
    most = max(r["percent"] for r in rows if (r["area"], r["class"]) == ("tissue", "gland"))
    assert f"{most:.2f} % of tissue" in result.output.splitlines()[-1]
    found = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert found == sorted(f"{name}.overview.png" for name in names)


def test_what_is_painted_is_counted_by_area_and_class() -> None:
    painted = module("behaviour").Painted(2)
    labels = np.uint8([[1, 1, 2, 0], [2, 2, 2, 2]])
    confidence = np.uint8([[255, 153, 204, 0], [255, 255, 255, 102]])
    tissue = np.array([[False, False, False, False], [True, True, True, True]])
    painted.add(labels, confidence, tissue)
    painted.add(labels[:, :1], confidence[:, :1], tissue[:, :1])
    rows = painted.rows(CLASSES, 0.5)
    keys = ("area_mm2", "percent", "confidence", "sure_percent")
    assert [tuple(row[k] for k in keys) for row in rows] == [
        (2.0, 75.0, pytest.approx((1 + 0.6 + 1) / 3), pytest.approx(200 / 3)),
        (2.0, 25.0, pytest.approx(0.8), 0.0),
        (2.5, 0.0, None, None),
        (2.5, 100.0, pytest.approx((4 + 0.4) / 5), 80.0),
    ]
    judged = module("behaviour").judged
    rows = [{"slide": "a", **row} for row in rows]
    assert judged(rows, {"glass": 25.0, "tissue": None})["passed"] is True
    assert judged(rows, {"glass": 24.9, "tissue": None})["passed"] is False
    assert judged(rows, {"glass": 25.0, "tissue": 99.0})["passed"] is False
    rows = [{**row, "background": False} for row in rows]
    assert judged(rows, {"glass": 0.0, "tissue": 0.0})["passed"] is None


class Everywhere:
    """Tissue everywhere."""

    mask = np.ones((1, 1), bool)

    def covers(self, box: Box, grid: Grid) -> bool:
        return not box.is_empty()

    def region(self, box: Box, grid: Grid) -> np.ndarray:
        return np.ones((box.height, box.width), bool)


def test_boxes_that_lie_outside_the_region() -> None:
    tissue = module("shared").Within(Everywhere(), Box(10, 10, 5, 5))
    grid = Grid.at_mpp(Size(50, 50), 1, 1)
    assert not tissue.covers(Box(20, 20, 8, 8), grid)
    assert tissue.covers(Box(8, 8, 8, 8), grid)
    assert not tissue.region(Box(20, 20, 8, 8), grid).any()
    assert tissue.region(Box(8, 12, 4, 2), grid).tolist() == [[False, False, True, True]] * 2


@pytest.mark.parametrize("name", ["seams", "precision", "behaviour"])
def test_a_slide_that_is_not_there_is_one_line(
    name: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [name, "--model", str(checkpoint), "--slide", "none.svs"])
    with pytest.raises(SystemExit) as stop:
        module("shared").run(module(name).main)
    assert stop.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("error: none.svs")
    assert error.count("\n") == 1
