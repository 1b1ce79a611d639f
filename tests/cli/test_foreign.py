"""Files of somebody else, tissue masks that were changed, spellings of paths."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_run import Run

from wsiseg.cli import main, predict_slides
from wsiseg.errors import OutputError
from wsiseg.geometry import Size
from wsiseg.outputs.files import refuse_foreign
from wsiseg.slides.phantom import write_phantom
from wsiseg.slides.slide import Slide
from wsiseg.slides.tissue import TissueMask

ANNOTATIONS = json.dumps({"type": "FeatureCollection", "features": []}, indent=2)


@pytest.fixture(scope="module")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("phantom") / "colon.tif"
    write_phantom(path, Size(300, 260), mpp=0.5, seed=1)
    return path


@pytest.mark.parametrize("name", ["colon.geojson", "colon.geojson.gz", "colon.json"])
def test_annotations_of_a_person_are_not_overwritten(
    run: Run, phantom: Path, tmp_path: Path, name: str
) -> None:
    data = ANNOTATIONS.encode()
    own = tmp_path / name
    own.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    before = own.read_bytes()
    code, _, err = run(phantom, "--out", tmp_path)
    assert code == 1
    assert f"{name}: is not as wsiseg writes it" in err
    assert own.read_bytes() == before
    assert {p.name for p in tmp_path.iterdir()} <= {name, "run.json", "summary.csv"}
    code, _, err = run(phantom, "--out", tmp_path, "--overwrite")
    assert code == 0, err
    assert not own.exists() or own.read_bytes() != before


def test_what_wsiseg_wrote_is_its_own(run: Run, phantom: Path, tmp_path: Path) -> None:
    for words in ([], ["--overwrite"], ["--overwrite", "--gzip"]):
        code, _, err = run(phantom, "--out", tmp_path, *words)
        assert code == 0, err
        refuse_foreign(tmp_path, "colon")
    corrected = tmp_path / "colon.geojson"
    corrected.write_text(ANNOTATIONS)
    with pytest.raises(OutputError, match=r"colon\.geojson"):
        refuse_foreign(tmp_path, "colon")
    corrected.write_text("")  # nothing would be lost
    refuse_foreign(tmp_path, "colon")
    for damaged in (b"\x1f\x8bdamaged", gzip.compress(b"x")[:10] + b"\xff" * 20):
        (tmp_path / "colon.geojson.gz").write_bytes(damaged)
        with pytest.raises(OutputError, match=r"colon\.geojson\.gz"):
            refuse_foreign(tmp_path, "colon")


@pytest.mark.parametrize("name", ["mask.png", os.fsdecode(b"gr\xfcn.png")])
def test_a_tissue_mask_that_was_changed_is_noticed(
    name: str,
    phantom: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    mask, out = tmp_path / name, tmp_path / "out"
    words = ["wsiseg", "predict", str(phantom), "--out", str(out), "--device", "cpu"]
    words += ["--model", "stain-threshold", "--tissue", str(mask)]
    monkeypatch.setattr(sys, "argv", words)

    def paint(columns: slice) -> tuple[int, str]:
        painted = np.zeros((26, 30), np.uint8)
        painted[:, columns] = 255
        Image.fromarray(painted).save(mask)
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), "".join(capsys.readouterr())

    assert paint(slice(0, 15))[0] == 0
    code, text = paint(slice(0, 15))
    assert (code, "skipped" in text) == (0, True)
    code, text = paint(slice(15, 30))
    assert code == 1
    assert "outputs of other settings (tissue_sha256 differs)" in text


def test_the_digest_of_a_tissue_mask_is_of_what_was_read(
    run: Run, phantom: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mask, out, plain = tmp_path / "mask.png", tmp_path / "out", predict_slides.find_tissue
    Image.fromarray(np.full((26, 30), 255, np.uint8)).save(mask)
    digest = hashlib.sha256(mask.read_bytes()).hexdigest()

    def find(slide: Slide, mode: str) -> TissueMask:
        found = plain(slide, mode)
        Image.fromarray(np.zeros((26, 30), np.uint8)).save(mask)  # edited while the model works
        return found

    monkeypatch.setattr(predict_slides, "find_tissue", find)
    monkeypatch.setattr(predict_slides.Settings, "tissue_of", lambda *_: str(mask))
    assert run(phantom, "--out", out)[0] == 0
    parameters = json.loads((out / f"{phantom.stem}.json").read_text())["parameters"]
    assert (parameters["tissue"], parameters["tissue_sha256"]) == ("mask.png", digest)


def test_a_slide_stands_once_in_the_table_however_it_is_spelt(
    run: Run, phantom: Path, tmp_path: Path
) -> None:
    link = tmp_path / "link"
    link.symlink_to(phantom.parent, target_is_directory=True)
    (tmp_path / "sub").mkdir()
    for path in (phantom, link / phantom.name, phantom.parent / ".." / phantom.parent.name):
        slide = path if path.suffix else path / phantom.name
        code, _, err = run(slide, "--out", tmp_path / "out")
        assert code == 0, err
    with (tmp_path / "out" / "summary.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [Path(row["path"]) for row in rows] == [phantom.resolve()]
