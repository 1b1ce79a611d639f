"""The import script, run by Groovy on a stand-in for QuPath: which file comes to which image."""

from __future__ import annotations

import gzip
import json
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from wsiseg.outputs.qupath import write_qupath_script

GROOVY = shutil.which("groovy")
STAND_IN = Path(__file__).with_name("qupath_stand_in.groovy")
pytestmark = pytest.mark.skipif(GROOVY is None, reason="no Groovy here")


class Case:
    """A project, and a folder of results whose files hold nothing but a word."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.images = folder, list[dict[str, Any]]()
        self.rows = list[dict[str, str]]()
        (folder / "out").mkdir(parents=True)

    def slide(self, path: str, content: str = "x") -> Path:
        file = self.folder / path
        file.parent.mkdir(exist_ok=True)
        file.write_text(content)
        return file

    def result(self, stem: str, text: str, slide: str | Path, *, row: bool = True) -> None:
        out = self.folder / "out"
        (out / f"{stem}.geojson").write_text(text)
        about = {"slide": {"path": Path(slide).name}, "mask": {"level0_size": [9, 9]}}
        (out / f"{stem}.json").write_text(json.dumps(about))
        if row:
            self.rows.append({"path": str(slide), "stem": stem, "status": "ok"})
        (out / "run.json").write_text(json.dumps({"slides": self.rows}))

    def image(self, at: str | Path, *, width: int = 9) -> None:
        uri = at.as_uri() if isinstance(at, Path) else at
        self.images.append({"uri": uri, "name": Path(uri).name, "width": width, "height": 9})

    def told(self) -> dict[str, Any]:
        return {"folder": str(self.folder / "out"), "images": self.images}


def run(folder: Path, cases: Sequence[Case]) -> list[tuple[str, list[list[str]]]]:
    """What the script said and what each image got, by case."""
    write_qupath_script(folder / "import.groovy")
    (folder / "cases.json").write_text(json.dumps([case.told() for case in cases]))
    done = subprocess.run(
        [str(GROOVY), str(STAND_IN), str(folder / "import.groovy"), str(folder / "cases.json")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found, said = [], ""
    for line in done.stdout.splitlines():
        if line.startswith("got "):
            found.append((said, json.loads(line.removeprefix("got "))))
            said = ""
        else:
            said += line + "\n"
    return found


def test_a_file_comes_to_the_image_of_its_slide(tmp_path: Path) -> None:
    expected = []

    def case(*got: str) -> Case:
        expected.append((Case(tmp_path / str(len(expected))), [[t] if t else [] for t in got]))
        return expected[-1][0]

    apart = case("A", "B")  # in two runs
    both = case("B", "A")  # in one run
    first = case("", "A")  # the other one not at all
    for one, stems in ((apart, ("1", "1-1a2b3c4d")), (both, ("1-00112233", "1-1a2b3c4d"))):
        for stem, text in zip(stems, "AB", strict=True):
            one.result(stem, text, one.slide(f"case{text}/1.tif"))
    first.result("1", "A", first.slide("caseA/1.tif"))
    first.slide("caseB/1.tif")
    for one, order in ((apart, "AB"), (both, "BA"), (first, "BA")):
        for text in order:
            one.image(one.folder / f"case{text}" / "1.tif")

    moved = case("A", "O")
    moved.result("1", "A", "/elsewhere/caseA/1.tif")
    moved.image("file:/D:/caseA/1.tif")
    moved.result("case-20260101", "O", "case-20260101.svs", row=False)
    moved.image("file:/D:/caseA/case-20260101.svs")
    other, copy = case(""), case("A")
    for one, content in ((other, "another"), (copy, "x")):
        one.result("1", "A", one.slide("caseA/1.tif"))
        one.image(one.slide("caseB/1.tif", content))
    series = case("S", "S", "")
    series.result("s", "S", "s.czi", row=False)
    for width in (9, 9, 4):
        series.image("file:/D:/s.czi", width=width)

    found = run(tmp_path, [one for one, _ in expected])
    assert [got for _, got in found] == [got for _, got in expected]
    assert not any("not clear" in said for said, _ in found)


def test_where_nothing_tells_none_is_imported(tmp_path: Path) -> None:
    two, shared = Case(tmp_path / "two"), Case(tmp_path / "shared")
    two.result("1", "A", "/srv/caseA/1.tif")
    two.result("1-1a2b3c4d", "B", "/srv/caseB/1.tif")
    shared.result("1", "A", "1.tif", row=False)
    for one in (two, shared):
        one.image("file:/D:/caseA/1.tif")
        one.image("file:/D:/caseB/1.tif")
    one_left = Case(tmp_path / "left")
    one_left.result("1", "A", "/srv/caseA/1.tif")
    one_left.result("1-1a2b3c4d", "B", "/srv/caseB/1.tif")
    one_left.image("file:/D:/1.tif")
    found = run(tmp_path, [two, shared, one_left])
    assert [got for _, got in found] == [[[], []], [[], []], [[]]]
    for (said, _), files in zip(
        found, ("1-1a2b3c4d.geojson, 1.geojson", "1.geojson", "1-1a2b3c4d.geojson"), strict=True
    ):
        assert said.startswith(f"{files}")
        assert said.count("\n") == 1
        assert "not clear of which image (/D:/" in said


def test_an_image_that_fails_does_not_keep_the_others_back(tmp_path: Path) -> None:
    case = Case(tmp_path / "case")
    for stem in "abc":
        case.result(stem, stem.upper(), f"{stem}.svs", row=False)
        case.image(f"file:/D:/{stem}.svs")
    case.images[0]["gone"] = True
    cut = case.folder / "out" / "b.geojson"
    cut.with_name("b.geojson.gz").write_bytes(gzip.compress(cut.read_bytes())[:-9])
    cut.unlink()
    ((said, got),) = run(tmp_path, [case])
    assert got == [[], [], ["C"]]
    gone, damaged, imported, last = said.splitlines()
    assert gone == "a.geojson: not imported into a.svs (java.io.IOException: no such slide)"
    assert damaged.startswith("b.geojson.gz: not imported into b.svs (java.io.EOFException")
    assert imported.startswith("c.geojson: 1 objects")
    assert last == "2 of 3 images failed, see above"
