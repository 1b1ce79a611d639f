"""The table of a run: complete after every slide, nothing of others lost, read back by reports."""

from __future__ import annotations

import csv
import json
import threading
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from wsiseg.errors import OutputError
from wsiseg.outputs.run_files import Row, RunFiles, check_folder, earlier_stems
from wsiseg.outputs.run_folder import read_run


def files(folder: Path, **more: Any) -> RunFiles:
    return RunFiles(folder, about={"command": {"seed": 0}}, **{"lock": nullcontext, **more})


def rows(folder: Path) -> dict[str, dict[str, str]]:
    with (folder / "summary.csv").open(newline="", encoding="utf-8") as file:
        return {row["stem"]: row for row in csv.DictReader(file)}


def slide(name: str, status: str = "ok", **more: Any) -> Row:
    return Row(Path("/x") / f"{name}.svs", name, status, **more)


def test_each_slide_has_a_row(tmp_path: Path) -> None:
    run = files(tmp_path)
    run.add(slide("b", seconds=1.26, areas_mm2={"Gland": 0.5, "a, b": 2.0}))
    assert list(rows(tmp_path)) == ["b"], "at once"
    run.add(slide("A", "failed", seconds=3.0, error='torn "x",\nat 7'))
    run.add(Row(Path("/x/bad\udcff.svs"), "bad\udcff", "no tissue"))
    run.end()
    found = rows(tmp_path)
    assert list(found) == ["A", "b", "bad\\udcff"]
    assert found["b"] == {
        "path": str(Path("/x/b.svs").absolute()),
        "stem": "b",
        "status": "ok",
        "seconds": "1.3",
        "mm2_Gland": "0.500000",
        "mm2_a, b": "2.000000",
        "error": "",
    }
    assert found["A"]["error"] == 'torn "x", at 7'
    data = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))
    assert data["counts"] == {"failed": 1, "ok": 1, "no tissue": 1} == data["runs"][0]["counts"]
    assert data["runs"][0]["command"] == {"seed": 0}
    assert data["runs"][0]["began"] <= data["runs"][0]["ended"]
    assert data["slides"][1]["areas_mm2"] == {"Gland": 0.5, "a, b": 2.0}
    assert data["slides"][0]["seconds"] == 3.0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run.json", "summary.csv"]


def test_what_others_wrote_stays(tmp_path: Path) -> None:
    one, two = files(tmp_path), files(tmp_path)
    one.add(slide("a", "failed", error="torn"))
    two.add(slide("b", areas_mm2={"Gland": 1.0}))
    two.add(slide("a", areas_mm2={"Gland": 3.0}))
    one.add(slide("c", areas_mm2={"Stroma": 2.0}))
    found = rows(tmp_path)
    assert {k: r["status"] for k, r in found.items()} == {"a": "ok", "b": "ok", "c": "ok"}
    assert (found["a"]["mm2_Gland"], found["c"]["mm2_Gland"]) == ("3.000000", "")
    assert len(json.loads((tmp_path / "run.json").read_text())["runs"]) == 2


def test_a_row_that_tells_more_is_kept(tmp_path: Path) -> None:
    run = files(tmp_path)
    run.add(slide("a", seconds=5.0))
    run.add(slide("a", seconds=1.0, weak=True))
    assert rows(tmp_path)["a"]["seconds"] == "5.0", "skipped now"
    run.add(slide("a", "running elsewhere", error="by 7", weak=True))
    assert rows(tmp_path)["a"]["status"] == "ok"
    run.add(slide("b", "failed", error="torn"))
    run.add(slide("b", weak=True))
    assert rows(tmp_path)["b"]["status"] == "ok"
    run.add(slide("c", "running elsewhere", error="by 7", weak=True))
    assert rows(tmp_path)["c"]["status"] == "running elsewhere"


@pytest.mark.parametrize("name", ["summary.csv", "run.json"])
@pytest.mark.parametrize(
    "text", [b"name,age\nx,3\n", b"[]", b'{"slide": 1}', b"\xff\xfe\x00", b"7"]
)
def test_files_of_others_are_not_touched(tmp_path: Path, name: str, text: bytes) -> None:
    (tmp_path / name).write_bytes(text)
    with pytest.raises(OutputError, match="not written by wsiseg predict; move it away"):
        check_folder(tmp_path)
    with pytest.raises(OutputError, match="not written by wsiseg"):
        files(tmp_path).add(slide("a"))
    assert (tmp_path / name).read_bytes() == text
    (tmp_path / name).write_bytes(b"")
    check_folder(tmp_path)


def test_what_could_not_be_written_comes_with_the_next(tmp_path: Path) -> None:
    run = files(tmp_path / "out")
    (tmp_path / "out").write_text("in the way")
    with pytest.raises(OutputError):
        run.add(slide("a"))
    (tmp_path / "out").unlink()
    run.add(slide("b"))
    assert list(rows(tmp_path / "out")) == ["a", "b"]


def test_writers_in_turn_lose_nothing(tmp_path: Path) -> None:
    lock = threading.Lock()

    def write(letter: str) -> None:
        run = files(tmp_path, lock=lambda: lock)
        for number in range(10):
            run.add(slide(f"{letter}{number}"))

    threads = [threading.Thread(target=write, args=(letter,)) for letter in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(rows(tmp_path)) == 30


def test_a_report_reads_it(tmp_path: Path) -> None:
    run = files(tmp_path)
    run.add(slide("a", "failed", seconds=2.0, error="torn"))
    run.add(slide("b", "running elsewhere", error="process 7 on x"))
    run.add(slide("c", "no tissue"))
    found = {r.stem: r for r in read_run(tmp_path)}
    assert set(found) == {"a", "b", "c"}, "run.json is no slide's record"
    assert (found["a"].status, found["a"].error, found["a"].seconds) == ("failed", "torn", 2.0)
    assert (found["a"].slide, found["b"].status) == ("a.svs", "running elsewhere")
    assert (found["c"].status, found["c"].error) == ("damaged", "missing: c.json")


def test_the_name_of_each_slide_is_known_again(tmp_path: Path) -> None:
    assert earlier_stems(tmp_path) == {}
    run = files(tmp_path)
    for place, stem, status in (
        ("a", "a", "failed"),
        ("one/b", "b", "failed"),
        ("two/b", "B", "ok"),
        ("one/c", "c", "failed"),
        ("two/c", "c", "failed"),
        ("one/d", "d", "ok"),
        ("two/d", "d", "no tissue"),
    ):
        run.add(Row(tmp_path / place, stem, status))
    known = {
        Path(p).relative_to(tmp_path).as_posix(): s for p, s in earlier_stems(tmp_path).items()
    }
    assert known == {"a": "a", "two/b": "B"}
