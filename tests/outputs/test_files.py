"""All outputs of a canvas: complete or nothing; sidecar and overview."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from output_canvases import RECORD, MakeCanvas, blobs
from PIL import Image

from wsiseg.errors import LeaseLostError, OutputError, UsageError
from wsiseg.outputs import files
from wsiseg.outputs.files import OutputOptions, complete_outputs, write_outputs
from wsiseg.outputs.geojson import PolygonOptions
from wsiseg.outputs.overview import (
    area_text,
    draw_overview,
    length_text,
    round_length_um,
)
from wsiseg.outputs.sidecar import class_areas

NAMES = ["s.geojson", "s.json", "s.mask.ome.tif", "s.overview.png"]


def listing(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_all_files_and_their_record(make_canvas: MakeCanvas, tmp_path: Path) -> None:
    labels = blobs(300, 400)
    canvas = make_canvas(labels)
    out = tmp_path / "out"
    assert complete_outputs(out, "s") is None
    written = write_outputs(canvas, out, "s")
    assert listing(out) == NAMES
    assert written.paths[-1] == out / "s.json"
    assert complete_outputs(out, "s")
    sidecar = json.loads((out / "s.json").read_text(encoding="utf-8"))
    assert sidecar["status"] == "ok"
    assert sidecar["slide"]["quickhash"] == "0123"
    assert sidecar["model"]["sha256"] == "ab" * 32
    assert sidecar["mask"] == {
        "mpp": [0.5, 0.5],
        "downsample": [2.0, 2.0],
        "size": [400, 300],
        "level0_size": [800, 600],
        "frame": "qupath",
    }
    gland = (labels == 2).sum() * 0.25e-6
    assert sidecar["areas_mm2"]["Gland"] == pytest.approx(gland, abs=1e-6)
    assert sidecar["polygons"]["tolerance_um"] == 1.0
    assert sidecar["polygons"]["options"]["min_area_um2"] == 50.0
    assert sidecar["parameters"] == {"seed": 0}
    assert sidecar["timings"] == {"inference": 1.5}
    assert {"torch", "wsiseg"} <= set(sidecar["versions"])
    assert sorted([*sidecar["files"].values(), "s.json"]) == NAMES
    (out / "s.mask.ome.tif").unlink()
    assert complete_outputs(out, "s") is None
    (out / "s.json").write_text("[" * 100_000)
    assert complete_outputs(out, "s") is None


def test_some_again_keep_the_others(make_canvas: MakeCanvas, tmp_path: Path) -> None:
    canvas = make_canvas(blobs(200, 200))
    write_outputs(canvas, tmp_path / "out", "s")
    mask = (tmp_path / "out" / "s.mask.ome.tif").stat().st_mtime_ns
    polygons = PolygonOptions(gzip=True, tolerance_um=2)
    write_outputs(canvas, tmp_path / "out", "s", OutputOptions(polygons, kinds=("geojson",)))
    assert listing(tmp_path / "out") == ["s.geojson.gz", *NAMES[1:]]
    assert (tmp_path / "out" / "s.mask.ome.tif").stat().st_mtime_ns == mask
    assert complete_outputs(tmp_path / "out", "s")
    write_outputs(canvas, tmp_path / "out", "s", OutputOptions(kinds=("overview",)))
    sidecar = json.loads((tmp_path / "out" / "s.json").read_text())
    assert sidecar["polygons"]["tolerance_um"] == 2
    assert sidecar["files"]["geojson"] == "s.geojson.gz"


@pytest.mark.parametrize("stage", ["write_geojson", "write_overview", "write_sidecar"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_changes_nothing(
    make_canvas: MakeCanvas,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
    error: BaseException,
) -> None:
    canvas = make_canvas(blobs(100, 100))
    out = tmp_path / "out"
    write_outputs(canvas, out, "s")
    before = {p.name: p.read_bytes() for p in out.iterdir()}

    def fail(path: Path, *args: object, **more: object) -> None:
        Path(path).write_text("half")
        raise error

    monkeypatch.setattr(files, stage, fail)
    expected = OutputError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected) as caught:
        write_outputs(canvas, out, "s", OutputOptions(PolygonOptions(tolerance_um=3)))
    if expected is OutputError:
        assert "No space left on device" in str(caught.value)
        assert "\n" not in str(caught.value)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


def test_a_full_disk_leaves_nothing(make_canvas: MakeCanvas, tmp_path: Path) -> None:
    pytest.importorskip("resource")
    rng = np.random.default_rng(0)
    canvas = make_canvas(rng.integers(0, 4, (600, 600)).astype(np.uint8))
    code = (
        "import resource, signal, sys\n"
        "from wsiseg.canvas import Canvas\n"
        "from wsiseg.errors import OutputError\n"
        "from wsiseg.outputs.files import write_outputs\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (30000, 30000))\n"
        "try:\n"
        "    write_outputs(Canvas.open(sys.argv[1]), sys.argv[2], 's')\n"
        "except OutputError as e:\n"
        "    print(e)\n"
    )
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-c", code, str(canvas.path), str(out)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "cannot write (File too large)" in done.stdout
    assert listing(out) == []


def test_no_tissue_gives_valid_empty_outputs(make_canvas: MakeCanvas, tmp_path: Path) -> None:
    canvas = make_canvas(np.zeros((50, 60), np.uint8), status="no tissue")
    written = write_outputs(canvas, tmp_path / "out", "s")
    assert listing(tmp_path / "out") == NAMES
    assert json.loads((tmp_path / "out" / "s.json").read_text())["status"] == "no tissue"
    assert {(a.mm2, a.percent) for a in written.areas} == {(0.0, 0.0)}


def test_unknown_kinds() -> None:
    with pytest.raises(UsageError, match="polygon"):
        OutputOptions(kinds=("mask", "polygon"))
    with pytest.raises(UsageError):
        OutputOptions(kinds=())


def test_class_areas(make_canvas: MakeCanvas) -> None:
    labels = np.zeros((10, 10), np.uint8)
    labels[:2], labels[2:8] = 1, 2
    other, gland, cells = class_areas(make_canvas(labels))
    assert other == ("Other tissue", pytest.approx(20 * 0.25e-6), pytest.approx(25))
    assert gland == ("Gland", pytest.approx(60 * 0.25e-6), pytest.approx(75))
    assert cells == ("Lymphocytes", 0, 0)


def test_overview_shows_classes_where_they_are(make_canvas: MakeCanvas, tmp_path: Path) -> None:
    labels = np.zeros((600, 500), np.uint8)
    labels[:300, :250] = 2
    labels[300:, 250:] = 1
    canvas = make_canvas(labels)
    canvas.set_image("thumbnail", np.full((150, 125, 3), 100, np.uint8))
    picture = np.asarray(draw_overview(canvas, class_areas(canvas)))
    reds = (picture[..., 0] > 120) & (picture[..., 1] < 70)
    ys, xs = np.nonzero(reds[: 76 + 600])
    assert (xs.max() - xs.min() + 1, ys.max() - ys.min() + 1) == (250, 300)
    assert (ys.min(), xs.min()) == (76, 24 + 500 + 16)
    # Inside, the slide shines through; the border is drawn in the full colour.
    assert picture[76 + 150, xs.min() + 125].tolist() == [140, 60, 60]
    assert picture[76 + 150, xs.max()].tolist() == [200, 0, 0]


@pytest.mark.parametrize("shape", [(1, 1), (3000, 20), (20, 3000), (700, 700)])
@pytest.mark.parametrize("status", ["ok", "no tissue"])
def test_overview_of_any_shape(
    make_canvas: MakeCanvas, tmp_path: Path, shape: tuple[int, int], status: str
) -> None:
    canvas = make_canvas(np.full(shape, 2 * (status == "ok"), np.uint8), status=status)
    write_outputs(canvas, tmp_path, "s", OutputOptions(kinds=("overview",)))
    with Image.open(tmp_path / "s.overview.png") as picture:
        assert picture.mode == "RGB"
        assert max(picture.size) < 1800


def test_overview_of_a_slide_of_any_name(make_canvas: MakeCanvas, tmp_path: Path) -> None:
    named = {**RECORD["slide"], "path": "line\nbreak Größe 日本.svs"}
    canvas = make_canvas(np.full((20, 30), 2, np.uint8), slide=named)
    write_outputs(canvas, tmp_path / "out", "s", OutputOptions(kinds=("overview",)))
    assert (tmp_path / "out" / "s.overview.png").is_file()


def test_lengths_and_areas_as_text() -> None:
    assert round_length_um(999) == 500
    assert round_length_um(1000) == 1000
    assert round_length_um(0.3) == pytest.approx(0.2)
    assert length_text(500) == "500 um"
    assert length_text(2000) == "2 mm"
    assert [area_text(a) for a in (0, 0.00123, 1.5, 250)] == [
        "0.000 mm",
        "0.0012 mm",
        "1.500 mm",
        "250 mm",
    ]


def test_the_overview_draws_a_line_between_objects(make_canvas: MakeCanvas) -> None:
    canvas = make_canvas(np.full((600, 600), 2, np.uint8))
    plain = np.asarray(draw_overview(canvas, class_areas(canvas))).astype(int)
    objects = np.where(np.arange(600) < 300, 1, 2)[None].repeat(600, 0).astype(np.int32)
    canvas.write_objects(canvas.grid.box, objects)
    canvas.update_record(objects={"Gland": 2})
    lined = np.asarray(draw_overview(canvas, class_areas(canvas))).astype(int)
    differ = np.abs(lined - plain).max(axis=2) > 0
    columns = np.flatnonzero(differ.sum(axis=0) > 300)
    assert 2 <= len(columns) <= 8, "one line from top to bottom"
    assert columns[-1] - columns[0] < 8
    assert not np.delete(differ, columns, axis=1).any()


def test_outputs_of_who_lost_the_lock_do_not_appear(
    make_canvas: MakeCanvas, tmp_path: Path
) -> None:
    def lost() -> None:
        raise LeaseLostError("taken over")

    canvas, out = make_canvas(blobs(100, 100)), tmp_path / "out"
    with pytest.raises(LeaseLostError):
        write_outputs(canvas, out, "s", check=lost)
    assert listing(out) == []
    write_outputs(canvas, out, "s", check=lambda: None)
    assert listing(out) == NAMES
