"""`wsiseg export` and `wsiseg qupath-script` as they are called."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from wsiseg.canvas import Canvas
from wsiseg.classes import Classes, TissueClass
from wsiseg.cli import cli
from wsiseg.cli.summary import summary
from wsiseg.errors import UsageError
from wsiseg.geometry import Grid, Size
from wsiseg.lease import Locks
from wsiseg.outputs.files import OutputOptions, write_outputs
from wsiseg.outputs.geojson import PolygonOptions
from wsiseg.slides.phantom import write_phantom


@pytest.fixture
def canvas(tmp_path: Path) -> Canvas:
    classes = Classes(
        (TissueClass("Other", (9, 9, 9), background=True), TissueClass("A", (200, 0, 0)))
    )
    canvas = Canvas.create(
        tmp_path / "one.two.canvas",
        grid=Grid.at_mpp(Size(200, 160), 0.5, 0.5),
        classes=classes,
        record={"slide": {"path": "one.two.svs"}, "model": {"name": "m"}, "status": "ok"},
    )
    labels = np.ones((160, 200), np.uint8)
    yy, xx = np.mgrid[:160, :200]
    labels[(xx - 100) ** 2 + (yy - 80) ** 2 < 60**2] = 2
    labels[3:6, 3:6] = 2
    canvas.write_chunk(0, 0, labels, np.full_like(labels, 255))
    return canvas


def export(*args: object) -> Result:
    return CliRunner().invoke(cli, ["export", *map(str, args)])


def sidecar(folder: Path) -> dict[str, dict[str, float]]:
    data: dict[str, dict[str, float]] = json.loads((folder / "one.two.json").read_text())
    return data


def test_outputs_are_made_from_the_canvas(canvas: Canvas, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = export(canvas.path, "--out", out)
    assert result.exit_code == 0, result.output
    names = ["one.two.geojson", "one.two.json", "one.two.mask.ome.tif", "one.two.overview.png"]
    assert sorted(p.name for p in out.iterdir()) == names
    assert all(str(out / name) in result.output for name in names)
    assert sidecar(out)["polygons"]["features"] == 1


def test_polygons_traced_beside_inference_are_those_of_the_canvas(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slide, out, again = tmp_path / "colon.tif", tmp_path / "out", tmp_path / "again"
    write_phantom(slide, Size(780, 620), mpp=0.5, seed=1)
    words = ["predict", slide, "--out", out, "--keep-canvas", "--model", "stain-threshold"]
    with monkeypatch.context() as patched:
        patched.setattr("wsiseg.outputs.geojson.trace", None)  # not traced again
        result = CliRunner().invoke(cli, [*map(str, words), "--device", "cpu"])
    assert result.exit_code == 0, result.output
    result = export(out / "colon.canvas", "--out", again)
    assert result.exit_code == 0, result.output
    first, second = ((folder / "colon.geojson").read_bytes() for folder in (out, again))
    assert json.loads(first)["features"]
    assert first == second


def test_options_reach_the_polygons(canvas: Canvas, tmp_path: Path) -> None:
    out = tmp_path / "out"
    settings = ["--min-area", 1, "--tolerance", 0, "--all-classes", "--gzip", "--only", "geojson"]
    assert export(canvas.path, "--out", out, *settings).exit_code == 0
    assert sorted(p.name for p in out.iterdir()) == ["one.two.geojson.gz", "one.two.json"]
    assert sidecar(out)["polygons"]["features"] == 3
    result = export(canvas.path, "--out", out, "--tolerance", 0, "--max-vertices", 60)
    assert "polygons simplified to" in result.output
    assert sidecar(out)["polygons"]["vertices"] <= 60


def test_incomplete_and_foreign_canvases_are_refused_and_the_rest_is_done(
    canvas: Canvas, tmp_path: Path
) -> None:
    open_ended = Canvas.create(
        tmp_path / "b.canvas", grid=canvas.grid, classes=canvas.classes, record={}
    )
    out = tmp_path / "out"
    result = export(open_ended.path, tmp_path / "none.canvas", canvas.path, "--out", out)
    assert result.exit_code == 1
    assert "b.canvas: the canvas is incomplete" in result.output
    assert "none.canvas: not a readable wsiseg canvas" in result.output
    assert "2 of 3 failed" in result.output
    assert (out / "one.two.json").is_file()
    assert not (out / "b.json").exists()


def test_a_damaged_canvas_is_refused(canvas: Canvas, tmp_path: Path) -> None:
    chunk = canvas.path / "labels" / "c" / "0" / "0"
    whole = chunk.read_bytes()
    chunk.write_bytes(whole[:20])
    result = export(canvas.path, "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert "1 of its chunks are damaged" in result.output
    chunk.unlink()
    assert export(canvas.path, "--out", tmp_path / "out").exit_code == 1
    assert not (tmp_path / "out" / "one.two.json").exists()
    chunk.write_bytes(whole)
    assert export(canvas.path, "--out", tmp_path / "out").exit_code == 0


@pytest.fixture
def with_objects(tmp_path: Path, canvas: Canvas) -> Canvas:
    """A finished canvas of 2 x 2 chunks with all planes; nothing was analysed in the last one."""
    made = Canvas.create(
        tmp_path / "glands.canvas",
        grid=canvas.grid,
        classes=canvas.classes,
        record={"parameters": {"objects": {"min_area_um2": 9.0, "max_hole_um2": 0.0}}},
        chunk_px=100,
        border=True,
    )
    for key in list(made.chunks())[:3]:
        box = made.chunk_box(*key)
        labels = canvas.labels(box)
        made.write_chunk(*key, labels, np.full_like(labels, 255), np.full_like(labels, 7))
        made.write_labels(box, labels)
        made.write_objects(box, (labels == 2).astype(np.int32))
    made.update_record(status="ok", objects={"A": 1})
    return made


def test_a_canvas_of_all_planes_is_exported(with_objects: Canvas, tmp_path: Path) -> None:
    assert export(with_objects.path, "--out", tmp_path / "out").exit_code == 0
    with_objects.update_record(chunks=3)
    assert export(with_objects.path, "--out", tmp_path / "out").exit_code == 0
    with_objects.update_record(chunks=4)
    result = export(with_objects.path, "--out", tmp_path / "out")
    assert "glands.canvas: 1 of its chunks are damaged or missing" in result.output


@pytest.mark.parametrize(
    "lost",
    [
        ["cleaned/c/0/0"],
        ["objects/c/0/1"],
        ["cleaned/c/1"],
        ["cleaned", "objects"],
        ["cleaned"],
        ["objects"],
        ["done/c", "labels/c/0/0"],
        ["done/c/1", "labels/c/1", "confidence/c/1"],
        ["done/c/1", "labels/c/1", "cleaned/c/1", "objects/c/1"],
        [f"{name}/c" for name in ("labels", "confidence", "border", "done", "cleaned", "objects")],
    ],
)
def test_a_copy_that_lacks_files_is_refused(
    with_objects: Canvas, tmp_path: Path, lost: list[str]
) -> None:
    for name in lost:
        path = with_objects.path / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    result = export(with_objects.path, "--out", tmp_path / "out")
    assert result.exit_code == 1, lost
    assert "of its chunks are damaged or missing" in result.output
    assert not (tmp_path / "out").exists()


def test_a_row_of_done_chunks_that_cannot_be_read_is_damage(
    with_objects: Canvas, tmp_path: Path
) -> None:
    with_objects.path.joinpath("done", "c", "0", "0").write_bytes(b"")
    result = export(with_objects.path, "--out", tmp_path / "out")
    assert "2 of its chunks are damaged or missing" in result.output


def test_one_geojson_stays(canvas: Canvas, tmp_path: Path) -> None:
    for gzip in ((), ("--gzip",), ()):
        assert export(canvas.path, "--out", tmp_path / "out", *gzip).exit_code == 0
        found = [p.name for p in (tmp_path / "out").glob("*.geojson*")]
        assert found == ["one.two.geojson" + ".gz" * bool(gzip)]


def test_what_is_given_up_is_said(canvas: Canvas, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="zstd masks do not open"):
        result = export(
            canvas.path, "--out", tmp_path, "--max-vertices", 3, "--compression", "zstd"
        )
    assert "polygons stay at 1 um" in result.output
    assert "still over --max-vertices" in result.output
    for path in (tmp_path, tmp_path / "one.two.geojson"):
        assert "give the STEM.canvas folders" in export(path, "--out", tmp_path).output


def test_a_summary_tells_of_polygons_that_stay_too_many(canvas: Canvas, tmp_path: Path) -> None:
    canvas.update_record(timings={"tiles": 1, "tiles_per_s": 1.0})
    options = OutputOptions(PolygonOptions(max_vertices=3))
    text = summary(canvas, write_outputs(canvas, tmp_path, "s", options), seconds=1)
    assert "vertices of polygons are many for QuPath to hold" in text
    assert "simplified" not in text


def test_outputs_of_two_canvases_are_not_mixed(
    canvas: Canvas, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, other = tmp_path / "out", tmp_path / "other"
    shutil.copytree(canvas.path, other / canvas.path.name)
    twice = export(canvas.path, other / canvas.path.name, "--out", out)
    assert isinstance(twice.exception, UsageError)
    assert not out.exists()
    assert export(canvas.path, "--out", out).exit_code == 0
    theirs = Canvas.open(other / canvas.path.name, writable=True)
    theirs.update_record(model={"name": "n", "sha256": "1"})
    before = sidecar(out)
    result = export(theirs.path, "--out", out, "--only", "overview")
    assert result.exit_code == 1
    assert "tells of another slide, model or setting" in result.output
    assert sidecar(out) == before
    assert export(theirs.path, "--out", out).exit_code == 0
    monkeypatch.chdir(canvas.path)
    assert export(".", "--out", tmp_path / "here").exit_code == 0
    assert (tmp_path / "here" / "one.two.json").is_file()


def test_a_canvas_that_is_worked_on_is_left_alone(canvas: Canvas, tmp_path: Path) -> None:
    lease = Locks().take(tmp_path / "one.two.lock")
    assert lease is not None
    with lease:
        result = export(canvas.path, "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert "is at work on it; export it afterwards" in result.output
    assert not (tmp_path / "out").exists()
    assert export(canvas.path, "--out", tmp_path / "out").exit_code == 0
    assert not list(tmp_path.glob("*.lock*"))


def test_files_of_one_canvas_with_other_settings_are_not_mixed(
    canvas: Canvas, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert export(canvas.path, "--out", out).exit_code == 0
    before = sidecar(out)
    for changed in ({"parameters": {"tta": True}}, {"slide": {"size": [199, 160]}}):
        Canvas.open(canvas.path, writable=True).update_record(**changed)
        result = export(canvas.path, "--out", out, "--only", "geojson")
        assert "tells of another slide, model or setting" in result.output
        assert sidecar(out) == before


@pytest.mark.parametrize(
    "bad",
    [
        ["--only", "masks"],
        ["--only", ","],
        ["--min-area", "-1"],
        ["--compression", "jpeg"],
        ["--tolerance", "x"],
    ],
)
def test_bad_requests_are_usage_errors(canvas: Canvas, tmp_path: Path, bad: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "wsiseg.cli", "export", canvas.path, "--out", tmp_path / "o", *bad],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "o").exists()


def test_the_qupath_script(tmp_path: Path) -> None:
    printed = CliRunner().invoke(cli, ["qupath-script"])
    assert printed.exit_code == 0
    words = ("PathIO.readObjectsFromGeoJSON", "GZIPInputStream", "saveImageData", "addObjects")
    for word in (*words, '"run.json"', "toRealPath", "not clear of which image", "images failed"):
        assert word in printed.stdout
    path = tmp_path / "scripts" / "import.groovy"
    assert CliRunner().invoke(cli, ["qupath-script", "--out", str(path)]).exit_code == 0
    assert path.read_text() == printed.stdout
    for left, right in ("()", "[]", "{}"):
        assert printed.stdout.count(left) == printed.stdout.count(right)
