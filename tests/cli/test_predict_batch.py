"""Many slides: continued runs, the table of the run, locks, two processes on one folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import tifffile
from tiny_run import Run, names, outputs_of, rows, slides

import wsiseg.lease
from wsiseg.canvas import Canvas
from wsiseg.cli import predict_slides
from wsiseg.errors import OutputError
from wsiseg.lease import Locks
from wsiseg.outputs.run_folder import read_run

TINY = Path(__file__).with_name("tiny_predict.py")


def test_the_table_says_what_became_of_each_slide(run: Run, tmp_path: Path) -> None:
    folder, out = slides(tmp_path / "in", "a", "c"), tmp_path / "out"
    (folder / "b.png").write_bytes((folder / "a.png").read_bytes()[:900])
    code, _, err = run(folder, "--out", out)
    assert code == 1
    assert names(out) == outputs_of("a", "c")
    found = rows(out)
    assert {k: r["status"] for k, r in found.items()} == {"a": "ok", "b": "failed", "c": "ok"}
    assert found["b"]["error"] in err
    assert str(folder / "b.png") == found["b"]["path"]
    sidecar = json.loads((out / "a.json").read_text())
    for name, area in sidecar["areas_mm2"].items():
        assert float(found["a"][f"mm2_{name}"]) == pytest.approx(area, abs=1e-6)
        assert area > 0
    assert found["b"]["mm2_Gland"] == ""
    assert all(float(r["seconds"]) >= 0 for r in found.values())
    data = json.loads((out / "run.json").read_text())
    (one,) = data["runs"]
    assert data["counts"] == one["counts"] == {"ok": 2, "failed": 1}
    assert one["model"]["sha256"] == "2" * 64
    assert one["command"]["overlap"] == 32
    assert {"wsiseg", "torch"} <= set(one["versions"])
    assert one["ended"] >= one["began"]
    assert {r.stem: r.status for r in read_run(out)} == {"a": "ok", "b": "failed", "c": "ok"}

    slides(tmp_path / "more", "b")
    (folder / "b.png").write_bytes((tmp_path / "more" / "b.png").read_bytes())
    seconds = found["a"]["seconds"]
    code, text, _ = run(folder, "--out", out)
    assert code == 0
    assert text.count("outputs are complete, skipped") == 2
    assert {r["status"] for r in rows(out).values()} == {"ok"}
    assert rows(out)["a"]["seconds"] == seconds
    assert len(json.loads((out / "run.json").read_text())["runs"]) == 2


def test_a_gpu_that_computes_nothing_more_ends_the_run(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out = slides(tmp_path / "in", "a", "b", "c"), tmp_path / "out"
    (folder / "b.png").write_bytes((folder / "a.png").read_bytes()[:900])
    monkeypatch.setattr("wsiseg.cli.predict_run.is_broken", lambda device: True)
    code, _, err = run(folder, "--out", out)
    assert code == 1
    assert "cpu: fails at everything since " in err
    assert "start the same command again, with --processes 1 if" in err
    assert {k: r["status"] for k, r in rows(out).items()} == {"a": "ok", "b": "failed"}


def test_a_table_of_another_program_is_said_at_once(run: Run, tmp_path: Path) -> None:
    folder, out = slides(tmp_path / "in", "a"), tmp_path / "out"
    out.mkdir()
    (out / "summary.csv").write_text("name,age\n")
    code, _, err = run(folder, "--out", out)
    assert code == 1
    assert "summary.csv: was not written by wsiseg predict" in err
    assert names(out) == ["summary.csv"]


def test_a_table_that_cannot_be_written_stops_nothing(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    folder, out = slides(tmp_path / "in", "a", "b"), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("wsiseg.outputs.run_files._store", full)
        code, _, err = run(folder, "--out", out)
    assert code == 1
    assert err.count("wsiseg: warning: ") == err.count("No space left") == 1
    assert err.count("wsiseg: error: ") == err.count("does not tell of this run") == 1
    assert {"a.json", "b.json"} <= set(names(out))
    assert run(folder, "--out", out)[0] == 0
    assert {k: r["status"] for k, r in rows(out).items()} == {"a": "ok", "b": "ok"}


def stopped(run: Run, monkeypatch: pytest.MonkeyPatch, *args: object) -> None:
    """Run until some chunks are done, and stop there."""

    def stop(canvas: Canvas, *values: Any) -> None:
        if canvas.done_count == 5:
            raise KeyboardInterrupt
        plain(canvas, *values)

    plain = Canvas.write_chunk
    with monkeypatch.context() as patch:
        patch.setattr(Canvas, "write_chunk", stop)
        assert run(*args)[0] == 130


def test_an_interrupted_run_is_continued_and_overwrite_begins_anew(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out, whole = slides(tmp_path / "in", "a"), tmp_path / "out", tmp_path / "whole"
    assert run(folder, "--out", whole)[0] == 0
    stopped(run, monkeypatch, folder, "--out", out)
    assert names(out) == ["a.canvas"]
    code, text, _ = run(folder, "--out", out)
    assert code == 0
    assert "a: continuing: 5 of 20 chunks were done\n" in text
    assert names(out) == outputs_of("a")
    for ending in (".mask.ome.tif", ".geojson"):
        assert (out / f"a{ending}").read_bytes() == (whole / f"a{ending}").read_bytes()

    (out / "a.json").unlink()
    stopped(run, monkeypatch, folder, "--out", out)
    _, text, _ = run(folder, "--out", out, "--seed", 1)
    assert "a: beginning anew: a.canvas was left by other settings\n" in text
    (out / "a.json").unlink()
    stopped(run, monkeypatch, folder, "--out", out)
    code, text, _ = run(folder, "--out", out, "--overwrite")
    assert code == 0
    assert "continuing" not in text
    assert names(out) == outputs_of("a")


def test_a_canvas_that_was_asked_for_stays_and_others_go(run: Run, tmp_path: Path) -> None:
    folder, out = slides(tmp_path / "in", "a"), tmp_path / "out"
    run(folder, "--out", out, "--keep-canvas")
    run(folder, "--out", out)
    assert "a.canvas" in names(out)
    canvas = Canvas.open(out / "a.canvas", writable=True)
    canvas.update_record(kept=False)  # as if the run had been killed before removing it
    _, text, _ = run(folder, "--out", out)
    assert "skipped" in text
    assert names(out) == outputs_of("a")


def test_a_slide_that_another_process_has_is_left_to_it(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wsiseg.lease, "LEASE_S", 3.0)
    folder, out = slides(tmp_path / "in", "a", "b"), tmp_path / "out"
    out.mkdir()
    with Locks(lease_s=3.0).take(out / "a.lock") or pytest.fail("not taken"):
        code, text, _ = run(folder, "--out", out)
        assert code == 0
        assert "a: running elsewhere (process " in text
        assert names(out) == sorted([*outputs_of("b"), "a.lock"])
        assert rows(out)["a"]["status"] == "running elsewhere"
    assert run(folder, "--out", out)[0] == 0
    assert names(out) == outputs_of("a", "b")
    assert rows(out)["a"]["status"] == "ok"


def test_two_slides_of_one_name_in_one_folder_of_outputs(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wsiseg.lease, "LEASE_S", 3.0)
    ours, out = slides(tmp_path / "ours", "a"), tmp_path / "out"
    theirs = slides(tmp_path / "theirs", "b", "a")
    stopped(run, monkeypatch, ours, "--out", out)
    code, _, err = run(theirs, "--out", out)
    assert code == 1
    assert f"error: {out / 'a.canvas'}: was begun for another slide of that name" in err
    assert {k: r["status"] for k, r in rows(out).items()} == {"a": "failed", "b": "ok"}
    with Locks(lease_s=3.0).take(out / "a.lock", "1" * 64) or pytest.fail("not taken"):
        code, _, err = run(theirs, "--out", out)
    assert code == 1
    assert f"error: {out / 'a.lock'}: process {os.getpid()} on " in err
    assert "is at work on another slide of that name; choose another --out" in err
    mounted = ours.rename(tmp_path / "as another machine sees it")
    code, text, _ = run(mounted, "--out", out)
    assert code == 0
    assert "a: continuing: 5 of 20 chunks were done" in text


def test_a_slide_that_was_replaced_begins_anew(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out = slides(tmp_path / "in", "a"), tmp_path / "out"
    stopped(run, monkeypatch, folder, "--out", out)
    slides(tmp_path / "new", "b", "a")
    (tmp_path / "new" / "a.png").replace(folder / "a.png")
    code, text, _ = run(folder, "--out", out)
    assert code == 0
    assert "a: beginning anew: a.canvas was left by another slide" in text


def test_a_lock_of_a_dead_process_elsewhere_is_taken_over(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wsiseg.lease, "LEASE_S", 0.5)
    folder, out = slides(tmp_path / "in", "a"), tmp_path / "out"
    out.mkdir()
    dead = {"host": "elsewhere", "machine": "x", "pid": 1, "token": "abc", "beat": "000"}
    (out / "a.lock").write_text(json.dumps(dead))
    assert run(folder, "--out", out)[0] == 0
    assert names(out) == outputs_of("a")


@pytest.mark.parametrize("where", ["canvas", "outputs"])
def test_who_lost_a_lock_leaves_the_slide_as_it_is(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    monkeypatch.setattr(wsiseg.lease, "LEASE_S", 0.6)
    folder, out = slides(tmp_path / "in", "a"), tmp_path / "out"
    taker = {"host": "elsewhere", "machine": "x", "pid": 1, "token": "abc", "beat": "000"}
    plain, lost = predict_slides.write_outputs, []

    def lose() -> None:
        lost.append(where)
        (tmp_path / "lock").write_text(json.dumps(taker))
        (tmp_path / "lock").replace(out / "a.lock")
        time.sleep(0.3)

    def is_of(*args: Any) -> bool:
        lose()
        return False

    def write(*args: Any, **more: Any) -> Any:
        if not lost:
            lose()
            raise OutputError("a.mask.ome.tif: cannot write")
        return plain(*args, **more)

    if where == "canvas":
        monkeypatch.setattr(predict_slides.Slides, "_is_of", is_of)
        stamps = iter([(1,), (2,)])  # then as one that does not change
        monkeypatch.setattr(predict_slides, "file_stamp", lambda path: next(stamps, None))
    else:
        monkeypatch.setattr(predict_slides, "write_outputs", write)
    code, text, err = run(folder, "--out", out)
    assert (code, err, lost) == (0, "", [where])
    assert "a: continuing: 20 of 20 chunks were done" in text
    assert names(out) == outputs_of("a")


def test_two_processes_share_the_slides_of_one_folder(tmp_path: Path) -> None:
    stems = [f"s{k}" for k in range(6)]
    folder, out = slides(tmp_path / "in", *stems), tmp_path / "out"
    logs = [tmp_path / "1.log", tmp_path / "2.log"]
    processes = [
        subprocess.Popen(
            [
                *(sys.executable, str(TINY), str(log), str(folder), "--out", str(out)),
                *("--mpp", "0.5", "--device", "cpu"),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for log in logs
    ]
    texts = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], texts
    done = [line for log in logs if log.exists() for line in log.read_text().split()]
    assert sorted(done) == stems, "each slide once"
    assert names(out) == outputs_of(*stems)
    assert {r["status"] for r in rows(out).values()} == {"ok"}
    assert list(rows(out)) == stems


def test_names_that_are_no_utf8_or_very_long_make_outputs(run: Run, tmp_path: Path) -> None:
    folder, out = slides(tmp_path / "in", "a", "c"), tmp_path / "out"
    (folder / "a.png").rename(folder / os.fsdecode(b"gr\xf6sse.png"))
    (folder / "c.png").rename(folder / f"{'c' * 240}.png")
    for _ in range(2):
        code, text, err = run(*folder.iterdir(), "--out", out)
        assert (code, err) == (0, "")
    assert text.count("outputs are complete, skipped") == 2
    found = rows(out)
    assert sorted(stem[:9] for stem in found) == ["ccccccccc", "gr_udcf6s"]
    assert all((out / f"{stem}.mask.ome.tif").is_file() for stem in found)
    told = json.loads((out / "run.json").read_text())["runs"][0]["command"]["inputs"]
    assert any("gr\\udcf6sse" in text for text in told)


def test_names_with_line_ends_and_control_characters_make_outputs(run: Run, tmp_path: Path) -> None:
    folder, out = slides(tmp_path / "in", "a"), tmp_path / "out"
    (folder / "a.png").rename(folder / "a\nb\x01.png")
    code, _, err = run(folder, "--out", out)
    assert (code, err) == (0, "")
    ((stem, row),) = rows(out).items()
    assert stem.startswith("a_nb_x01-")
    assert row["path"].endswith("a\\nb\\x01.png")
    with tifffile.TiffFile(out / f"{stem}.mask.ome.tif") as mask:
        assert "a\\nb\\x01.png" in ElementTree.tostring(
            ElementTree.fromstring(mask.ome_metadata or ""), "unicode"
        )


def test_a_slide_keeps_its_name_whichever_slides_come_with_it(run: Run, tmp_path: Path) -> None:
    one, two, out = slides(tmp_path / "one", "a"), slides(tmp_path / "two", "a"), tmp_path / "out"
    assert run(one, "--out", out)[0] == 0
    assert names(out) == outputs_of("a")
    code, text, _ = run(one, two, "--out", out)
    assert code == 0
    assert "a: outputs are complete, skipped" in text
    stems = list(rows(out))
    assert (len(stems), stems[0]) == (2, "a")
    assert names(out) == outputs_of(*stems)
    code, text, _ = run(two, "--out", out)
    assert code == 0
    assert f"{stems[1]}: outputs are complete, skipped" in text
    assert list(rows(out)) == stems
    assert names(out) == outputs_of(*stems)
