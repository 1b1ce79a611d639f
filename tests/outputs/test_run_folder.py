"""What is read back of a run, and what is not believed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from output_canvases import CLASSES, MakeCanvas, blobs

from wsiseg.errors import UsageError
from wsiseg.outputs.files import write_outputs
from wsiseg.outputs.run_folder import read_run


@pytest.fixture
def out(make_canvas: MakeCanvas, tmp_path: Path) -> Path:
    canvas = make_canvas(blobs(300, 400), timings={"total": 2.5}, parameters={"tissue": "auto"})
    write_outputs(canvas, tmp_path / "out", "s")
    return tmp_path / "out"


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_sidecar_is_read_back(out: Path) -> None:
    (result,) = read_run(out)
    written = json.loads((out / "s.json").read_text())
    assert (result.stem, result.slide, result.status, result.error) == ("s", "slide.svs", "ok", "")
    assert result.areas_mm2 == written["areas_mm2"]
    assert result.analysed_mm2 == pytest.approx(300 * 400 * 0.25e-6, rel=0.4)
    assert result.classes == CLASSES
    assert (result.mpp, result.mask_mpp, result.seconds) == (0.25, (0.5, 0.5), 2.5)
    assert (result.model, result.tissue, result.objects) == ("tiny", "auto", None)
    assert set(result.files) == {"mask", "geojson", "overview"}


def test_slides_without_a_sidecar(out: Path) -> None:
    (out / "left.canvas").mkdir()
    (out / "s.canvas").mkdir()
    (out / "summary.csv").write_text(
        "path,status,seconds,error\nx/gone.svs,failed,1.5,cut short\nx/fine.svs,ok,1,\n"
    )
    found = {r.stem: r for r in read_run(out)}
    assert {k: r.status for k, r in found.items()} == {
        "s": "ok",
        "left": "incomplete",
        "gone": "failed",
        "fine": "damaged",  # its record is gone
    }
    assert (found["gone"].error, found["gone"].seconds) == ("cut short", 1.5)


def test_what_failed_is_told_beside_a_record_of_that_name(out: Path) -> None:
    (out / "summary.csv").write_text(
        "path,stem,status,error\na/s.svs,s,ok,\nb/s.svs,s,failed,outputs of another slide\n"
    )
    found = [(r.stem, r.status, r.error) for r in read_run(out)]
    assert found == [("s", "ok", ""), ("s", "failed", "outputs of another slide")]


def test_files_outside_the_folder_are_not_named(out: Path) -> None:
    secret = out.parent / "secret.tif"
    secret.write_text("x")
    for name in ("../secret.tif", str(secret), "gone.tif", 7, None, "a\0b"):
        edit(out / "s.json", files={"mask": name})
        (result,) = read_run(out)
        assert not result.files
        assert result.status == "damaged"
        assert "missing" in result.error


@pytest.mark.parametrize(
    "changes",
    [
        {"slide": {"mpp": 1e999, "size": [1, "x"], "path": 3}},
        {"slide": {"mpp": -1, "size": [0, 0]}},
        {"areas_mm2": {"Gland": "much"}, "timings": [], "mask": 1, "objects": {"Gland": "n"}},
        {"classes": [{"value": 9}]},
        {"classes": "none"},
        {"model": None, "parameters": 5, "files": []},
    ],
)
def test_odd_values_are_left_out(out: Path, changes: dict[str, Any]) -> None:
    edit(out / "s.json", **changes)
    (result,) = read_run(out)
    assert result.stem == "s"
    assert result.size is None or min(result.size) > 0
    assert result.mpp is None or result.mpp > 0


def test_damaged_sidecars_are_said_and_other_json_is_not(out: Path) -> None:
    for text in ("{", "[" * 100_000, '"x"', "\xff"):
        (out / "s.json").write_bytes(text.encode("latin-1"))
        (out / "other.json").write_bytes(text.encode("latin-1"))
        (result,) = read_run(out)
        assert (result.stem, result.status) == ("s", "damaged")
        assert "s.json" in result.error
        assert "\n" not in result.error


def test_a_folder_without_results_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    for folder, text in ((tmp_path, "no outputs"), (tmp_path / "no", "cannot be listed")):
        with pytest.raises(UsageError, match=text):
            read_run(folder)


def test_hidden_files_are_no_results(out: Path) -> None:
    (out / "._s.json").write_bytes(b"\0\5\26\7")  # as a Mac leaves them on other disks
    assert [r.status for r in read_run(out)] == ["ok"]
