"""`wsiseg predict` on small phantoms with the model that needs no weights."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from wsiseg.canvas import Canvas
from wsiseg.cli import main
from wsiseg.errors import CanvasError
from wsiseg.geometry import Size
from wsiseg.slides.phantom import write_phantom
from wsiseg.slides.slide import Slide, open_slide

MODEL = ["--model", "stain-threshold", "--device", "cpu"]
ENDINGS = (".geojson", ".json", ".mask.ome.tif", ".overview.png")


class Result(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Result]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*args: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["wsiseg", "predict", *map(str, args), *MODEL])
        with pytest.raises(SystemExit) as stop:
            main()
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return Result(int(stop.value.code or 0), out, err)

    return call


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors are slower on several threads, most of all beside other work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("phantom") / "colon.tif"
    write_phantom(path, Size(780, 620), mpp=0.5, seed=1)
    return path


def names(folder: Path) -> list[str]:
    """What lies in a folder beside the files about the run."""
    return sorted({p.name for p in folder.iterdir()} - {"run.json", "summary.csv"})


def outputs_of(*stems: str) -> list[str]:
    return sorted(s + e for s in stems for e in ENDINGS)


def labels(folder: Path, stem: str = "colon") -> np.ndarray:
    return np.asarray(tifffile.imread(folder / f"{stem}.mask.ome.tif", key=0))


def error_line(result: Result) -> str:
    """The one line on stderr."""
    lines = result.err.strip().splitlines()
    assert len(lines) == 1, result.err
    assert lines[0].startswith("wsiseg: error: ")
    return lines[0]


def test_a_slide_gives_four_files_and_a_summary(run: Run, phantom: Path, tmp_path: Path) -> None:
    out = tmp_path / "masks"
    result = run(phantom, "--out", out)
    assert result.code == 0
    assert names(out) == outputs_of("colon")
    sidecar = json.loads((out / "colon.json").read_text())
    assert sidecar["status"] == "ok"
    assert sidecar["slide"]["path"] == "colon.tif"
    assert sidecar["slide"]["mpp"] == pytest.approx(0.5)
    assert sidecar["model"]["name"] == "stain-threshold"
    assert sidecar["parameters"]["overlap_px"] == 256
    assert sidecar["parameters"]["tissue"] == "auto"
    mask = labels(out)
    assert mask.shape == (620, 780)
    for value, (name, area) in enumerate(sidecar["areas_mm2"].items(), start=1):
        mm2 = (mask == value).sum() * 0.25e-6
        assert area == pytest.approx(mm2, abs=1e-6)
        assert f"{name:<24} {mm2:12.4f} mm2" in result.out
    assert "tiles/s" in result.out
    for ending in ENDINGS:
        assert f"colon{ending}" in result.out


def test_labels_do_not_depend_on_the_batch_size(run: Run, phantom: Path, tmp_path: Path) -> None:
    for size in (1, 4, 16):
        assert run(phantom, "--out", tmp_path / str(size), "--batch-size", size).code == 0
    first = labels(tmp_path / "1")
    assert len(np.unique(first)) == 3
    assert (labels(tmp_path / "4") == first).all()
    assert (labels(tmp_path / "16") == first).all()


def test_complete_outputs_are_skipped_unless_told(run: Run, phantom: Path, tmp_path: Path) -> None:
    assert run(phantom, "--out", tmp_path).code == 0
    before = {n: (tmp_path / n).stat().st_mtime_ns for n in names(tmp_path)}
    result = run(phantom, "--out", tmp_path)
    assert result.code == 0
    assert "colon: outputs are complete, skipped (--overwrite makes them again)" in result.out
    assert {n: (tmp_path / n).stat().st_mtime_ns for n in names(tmp_path)} == before
    (tmp_path / "colon.geojson").unlink()
    assert "skipped" not in run(phantom, "--out", tmp_path).out
    assert names(tmp_path) == outputs_of("colon")
    stamp = (tmp_path / "colon.mask.ome.tif").stat().st_mtime_ns
    assert "skipped" not in run(phantom, "--out", tmp_path, "--overwrite").out
    assert (tmp_path / "colon.mask.ome.tif").stat().st_mtime_ns > stamp


def test_outputs_of_another_slide_are_not_taken_for_done(
    run: Run, phantom: Path, tmp_path: Path
) -> None:
    out, other = tmp_path / "out", tmp_path / "colon.tif"
    assert run(phantom, "--out", out).code == 0
    write_phantom(other, Size(600, 500), seed=9)
    result = run(other, "--out", out)
    assert result.code == 1
    assert "outputs of another slide (quickhash differs)" in result.err
    result = run(phantom, "--out", out, "--mpp", 0.4)
    assert "outputs of another resolution (mpp differs)" in result.err
    for setting, named in (
        (["--tta"], "tta"),
        (["--seed", "5"], "seed"),
        (["--overlap", "0"], "overlap_px"),
        (["--tissue", "none"], "tissue"),
    ):
        result = run(phantom, "--out", out, *setting)
        assert result.code == 1
        assert f"outputs of other settings ({named} differs)" in result.err
    record = json.loads((out / "colon.json").read_text())
    for part, key, value, what in (
        ("slide", "size", [590, 500], "another frame (--coords)"),
        ("parameters", "window_px", 384, "other settings"),
    ):
        changed = {**record, part: {**record[part], key: value}}
        (out / "colon.json").write_text(json.dumps(changed))
        result = run(phantom, "--out", out)
        assert f"outputs of {what} ({key} differs)" in result.err
    (out / "colon.json").write_text(json.dumps(record))
    result = run(phantom, "--out", out, "--tolerance", 0)
    assert "skipped (--overwrite makes them again); its polygons were made with other" in result.out
    assert "its outputs are complete" in run(phantom, "--out", out, "--dry-run").out
    assert run(other, "--out", out, "--overwrite").code == 0


def test_canvas_is_kept_when_asked(run: Run, phantom: Path, tmp_path: Path) -> None:
    result = run(phantom, "--out", tmp_path, "--keep-canvas", "--gzip", "--tissue", "none")
    assert result.code == 0
    assert (tmp_path / "colon.canvas" / "zarr.json").is_file()
    assert "colon.canvas" in result.out
    assert "colon.geojson.gz" in names(tmp_path)
    assert (labels(tmp_path) > 0).all()
    assert json.loads((tmp_path / "colon.json").read_text())["parameters"]["tissue"] == "none"


def test_one_bad_slide_does_not_stop_the_others(run: Run, phantom: Path, tmp_path: Path) -> None:
    folder, out = tmp_path / "slides", tmp_path / "out"
    folder.mkdir()
    (folder / "a.svs").write_text("no slide at all")
    (folder / "b.tif").write_bytes(b"")
    (folder / "c.tif").write_bytes(phantom.read_bytes())
    (folder / "d.tif").write_bytes(phantom.read_bytes()[:5000])
    result = run(folder, "--out", out)
    assert result.code == 1
    assert names(out) == outputs_of("c")
    errors = [line for line in result.err.splitlines() if line.startswith("wsiseg: error: ")]
    assert len(errors) == 3
    for error, name in zip(errors, ("a.svs", "b.tif", "d.tif"), strict=True):
        assert str(folder / name) in error
    tail = result.err.strip().splitlines()[-4:]
    assert tail[0] == "3 of 4 slides failed:"
    assert [Path(line.strip()).name for line in tail[1:]] == ["a.svs", "b.tif", "d.tif"]


def test_slides_of_one_name_do_not_overwrite_each_other(
    run: Run, phantom: Path, tmp_path: Path
) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "s.tif").write_bytes(phantom.read_bytes())
    assert run(tmp_path / "*" / "s.tif", "--out", tmp_path / "out").code == 0
    stems = {n.split(".")[0] for n in names(tmp_path / "out")}
    assert len(stems) == 2
    assert all(s.startswith("s-") and len(s) == 10 for s in stems)


def test_files_of_one_dicom_slide_are_one_slide(
    run: Run, phantom: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def open_as_dicom(path: Path, **options: Any) -> Slide:
        slide = open_slide(phantom, **options)
        series = "1.2.3" if path.stem != "c" else "1.2.4"
        slide.properties = {**slide.properties, "dicom.SeriesInstanceUID": series}
        return slide

    monkeypatch.setattr("wsiseg.cli.predict_settings.open_slide", open_as_dicom)
    for name in ("a.dcm", "b.dcm", "c.dcm"):
        (tmp_path / name).write_bytes(b"x")
    out = tmp_path / "out"
    for note in ("a: ", "a: outputs are complete, skipped"):
        result = run(tmp_path, "--out", out)
        assert result.code == 0
        assert result.out.startswith(note)
        assert "b: the same DICOM slide as a.dcm, skipped" in result.out
        assert names(out) == outputs_of("a", "c")


def test_table_with_mpp_and_tissue(run: Run, phantom: Path, tmp_path: Path) -> None:
    with Image.open(phantom) as image:
        image.save(tmp_path / "plain.png")
    mask = np.zeros((62, 78), np.uint8)
    mask[20:60, 10:50] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    (tmp_path / "list.csv").write_text("path,mpp,tissue\nplain.png,0.5,mask.png\n")
    result = run(tmp_path / "list.csv", "--out", tmp_path / "out")
    assert result.code == 0, result.err
    expected = np.zeros((620, 780), bool)
    expected[200:600, 100:500] = True
    assert ((labels(tmp_path / "out", "plain") > 0) == expected).all()
    sidecar = json.loads((tmp_path / "out" / "plain.json").read_text())
    assert sidecar["slide"]["mpp_source"] == "option"
    assert sidecar["parameters"]["tissue"] == "mask.png"


def test_a_slide_without_tissue_gives_valid_empty_outputs(run: Run, tmp_path: Path) -> None:
    Image.new("RGB", (700, 600), (245, 245, 245)).save(tmp_path / "glass.png")
    result = run(tmp_path / "glass.png", "--mpp", "0.5", "--out", tmp_path / "out")
    assert result.code == 0, result.err
    assert "glass: no tissue found" in result.out
    assert names(tmp_path / "out") == outputs_of("glass")
    assert json.loads((tmp_path / "out" / "glass.json").read_text())["status"] == "no tissue"
    assert json.loads((tmp_path / "out" / "glass.geojson").read_text())["features"] == []
    assert not labels(tmp_path / "out", "glass").any()


def test_dry_run_says_what_it_would_cost(run: Run, phantom: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run(phantom, "--out", out, "--dry-run", "--tissue", "none", "--mpp", "0.25")
    assert result.code == 0
    assert not out.exists()
    words = {line[2:13].strip(): line[14:] for line in result.out.splitlines()[1:]}
    assert words["size"] == "780 x 620 px at 0.25 um/px"
    assert words["mpp from"] == "option"
    assert words["level read"] == "1 (downsample 2)"
    assert words["grid"] == "390 x 310 px at 0.5 um/px"
    assert words["tissue"] == "whole slide (none)"
    assert words["windows"] == "1 of 768 px"
    assert words["tiles"] == "9 (9 without sharing)"
    assert "GiB" in words["memory"]
    assert " s of the model, measured just now" in words["time"]


BAD = {
    "missing": (["gone.svs"], 2, "gone.svs: no such file or folder"),
    "empty": (["empty.svs"], 1, "empty.svs: the file is empty"),
    "text": (["text.svs"], 1, "text.svs: not a slide"),
    "no slides": (["nothing"], 2, "nothing: no slide in this folder"),
    "no match": (["*.ndpi"], 2, "no slide matches"),
    "no mpp": (["plain.png"], 1, "give them with --mpp"),
    "mpp": (["colon.tif", "--mpp", "-1"], 2, "--mpp -1.0: must be"),
    "overlap": (["colon.tif", "--overlap", "768"], 2, "must be from 0 to 720 px"),
    "negative overlap": (["colon.tif", "--overlap", "-1"], 2, "must be from 0 to 720 px"),
    "batch": (["colon.tif", "--batch-size", "0"], 2, "batch size 0"),
    "workers": (["colon.tif", "--workers", "0"], 2, "0 workers"),
    "memory": (["colon.tif", "--memory", "0"], 2, "memory of 0.0 GiB"),
    "precision": (["colon.tif", "--precision", "fp16"], 2, "not available on cpu"),
    "tissue": (["colon.tif", "--tissue", "gone.png"], 2, "no such mask file"),
    "black mask": (["colon.tif", "--tissue", "black.png"], 1, "black everywhere"),
    "out": (["colon.tif", "--out", "plain.png/x"], 1, "--out plain.png/x: cannot write there"),
    "device": (["colon.tif", "--device", "cuda:99"], 2, "device cuda:99"),
    "device name": (["colon.tif", "--device", "abacus"], 2, "device 'abacus'"),
    "model": (["colon.tif", "--model", "none-such"], 2, "none-such"),
    "model file": (["colon.tif", "--model", "model.safetensors"], 1, "model.safetensors"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_line_and_leaves_nothing(
    case: str,
    run: Run,
    phantom: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "colon.tif").write_bytes(phantom.read_bytes())
    (tmp_path / "empty.svs").write_bytes(b"")
    (tmp_path / "text.svs").write_text("this is no slide")
    (tmp_path / "model.safetensors").write_text("this is no model")
    (tmp_path / "nothing").mkdir()
    Image.new("RGB", (100, 90), (200, 100, 150)).save(tmp_path / "plain.png")
    Image.new("L", (78, 62)).save(tmp_path / "black.png")
    args, code, message = BAD[case]
    chosen = MODEL if "--model" not in args and "--device" not in args else []
    monkeypatch.setattr(sys.modules[__name__], "MODEL", chosen)
    result = run("--out", "out", *args)
    assert message in error_line(result)
    assert result.code == code
    assert result.out == ""
    assert not (tmp_path / "out").exists() or names(tmp_path / "out") == []


@pytest.mark.parametrize("part", ["status", "kept"])
def test_after_a_disk_that_was_full_the_same_command_goes_on(
    run: Run, phantom: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    def full(canvas: Canvas, **entries: Any) -> None:
        if part in entries:
            raise CanvasError("No space left on device")
        plain(canvas, **entries)

    plain = Canvas.update_record
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(Canvas, "update_record", full)
        result = run(phantom, "--out", out)
    assert result.code == 1
    assert "No space left on device" in error_line(result)
    assert names(out) == ["colon.canvas"]
    result = run(phantom, "--out", out)
    assert result.code == 0
    assert "colon: continuing: 4 of 4 chunks were done" in result.out
    assert names(out) == outputs_of("colon")


def test_what_fails_before_anything_is_done_leaves_nothing(
    run: Run, phantom: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **more: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("wsiseg.canvas.Canvas.write_chunk", full)
    result = run(phantom, "--out", tmp_path / "out")
    assert result.code == 1
    assert "No space left on device" in error_line(result)
    assert names(tmp_path / "out") == []


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_with_one_line_and_leaves_nothing_half_written(
    tmp_path: Path, sent: signal.Signals, code: int
) -> None:
    Image.new("RGB", (2900, 2800), (200, 100, 150)).save(tmp_path / "big.png")
    out = tmp_path / "out"
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "wsiseg.cli", "predict", str(tmp_path / "big.png"), *MODEL),
            *("--mpp", "0.5", "--overlap", "720", "--out", str(out)),
        ],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 90
    while not (out / "big.canvas" / "tissue").exists() and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(sent)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == code
    *progress, last = stderr.strip().splitlines()
    assert last == "wsiseg: stopped"
    assert all("tiles" in line for line in progress)
    assert stdout == ""
    assert set(names(out)) <= {"big.canvas"}, "what was done is kept"


def test_a_slide_too_coarse_for_the_model_is_said(run: Run, tmp_path: Path) -> None:
    Image.new("RGB", (60, 40), (200, 100, 150)).save(tmp_path / "thumb.png")
    coarse = run(tmp_path / "thumb.png", "--mpp", 0.8, "--out", tmp_path / "out")
    assert "0.8 um per pixel is too coarse for model stain-threshold, which sees 0.5" in coarse.err
    fine = run(tmp_path / "thumb.png", "--mpp", 0.7, "--out", tmp_path / "out", "--overwrite")
    assert "coarse" not in fine.err


def test_regions_too_small_for_polygons_are_said(run: Run, phantom: Path, tmp_path: Path) -> None:
    result = run(phantom, "--out", tmp_path, "--min-area", 200)
    dropped = json.loads((tmp_path / "colon.json").read_text())["polygons"]["dropped_small"]
    assert dropped > 0
    assert f"{dropped} regions under 200 um2 are in the mask only" in result.out
    result = run(phantom, "--out", tmp_path, "--min-area", 0, "--overwrite")
    assert "in the mask only" not in result.out
