"""benchmarks/errors.py: distances from annotated edges, objects parted as annotated."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from wsiseg.classes import IGNORE

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def errors() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        return importlib.import_module("errors")


def test_distances_are_those_of_a_slow_loop(errors: ModuleType) -> None:
    rng = np.random.default_rng(0)
    mask = rng.integers(0, 3, (5, 6)).repeat(4, 0).repeat(4, 1).astype(np.uint8)
    mask[8:12, 4:9] = IGNORE
    found = errors.from_edges(mask)
    for y, x in np.argwhere(mask != IGNORE):
        others = np.argwhere((mask != mask[y, x]) & (mask != IGNORE))
        assert found[y, x] == pytest.approx(np.hypot(*(others - (y, x)).T).min())
    assert np.isinf(errors.from_edges(np.zeros((4, 4), np.uint8))).all()


def test_objects_are_parted_as_the_truth_is(errors: ModuleType) -> None:
    truth = np.zeros((20, 60), np.int32)
    truth[5:15, 5:15], truth[5:15, 15:25] = 4, 9
    found = np.zeros_like(truth)
    found[5:15, 3:26] = 1  # both, and a little more
    found[5:15, 20:24] = 2  # a part of the second
    found[5:15, 40:50] = 3  # none
    found[0:2, 55:57] = 5  # a speck
    best = errors.parted_as(truth, found, reach_px=3.0, min_px=10)
    assert len(np.unique(best)) == 4
    for part in (np.s_[5:15, 3:15], np.s_[5:15, 15:26], np.s_[5:15, 40:50]):
        assert len(np.unique(best[part])) == 1
        assert (best == best[part][0, 0]).sum() == best[part].size
    nobody = errors.parted_as(np.zeros_like(truth), found, reach_px=3.0, min_px=10)
    assert np.array_equal(nobody > 0, (found > 0) & (found != 5))
    assert len(np.unique(nobody)) == 4


def glas(folder: Path) -> Path:
    """Two images of two touching squares in GlaS' layout, and their grades."""
    folder.mkdir()
    rows = "name, patient ID, grade (GlaS), grade (Sirinukunwattana et al. 2015)\n"
    for k in (1, 2):
        numbers = np.zeros((120, 160), np.uint8)
        numbers[20:100, 20:80], numbers[20:100, 80:140] = 1, 2
        image = np.where(numbers[..., None] > 0, 120, 230).repeat(3, 2).astype(np.uint8)
        Image.fromarray(image).save(folder / f"testA_{k}.png")
        Image.fromarray(numbers).save(folder / f"testA_{k}_anno.png")
        rows += f"testA_{k}, {k}, benign, healthy\n"
    (folder / "Grade.csv").write_text(rows)
    return folder


def test_on_the_command_line(
    errors: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, numbers = glas(tmp_path / "glas"), tmp_path / "errors.json"
    words = ["--data", str(data), "--split", "testA", "--json", str(numbers), "--threads", "1"]
    errors.main(words, standalone_mode=False)
    text = capsys.readouterr().out
    assert "2 images of testA: " in text
    assert "parted as annotated" in text
    found = json.loads(numbers.read_text())
    assert sum(found["pixels"]) == 2 * 120 * 160
    assert 0 <= sum(found["wrong"]) <= sum(found["pixels"])
    assert found["pixels"][0] > found["wrong"][0] >= 0
    assert set(found["objects"]) == {"as found", "parted as annotated"}


def test_images_without_objects_are_one_line(
    errors: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("img", "mask"):
        (tmp_path / name).mkdir()
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(tmp_path / "img" / "a.png")
    Image.fromarray(np.ones((64, 64), np.uint8)).save(tmp_path / "mask" / "a.png")
    described = tmp_path / "own.yaml"
    described.write_text(
        "name: folder\nimages: img/*.png\nmasks: mask/{stem}.png\nmpp: 1.28\nclasses:\n"
        "  - {name: Other tissue, color: [9, 9, 9], values: [1], background: true}\n"
        "  - {name: Gland, color: [0, 9, 0], values: [2]}\n"
    )
    words = ["--dataset", str(described), "--data", str(tmp_path), "--split", "all"]
    monkeypatch.setattr(sys, "argv", ["errors.py", *words])
    with pytest.raises(SystemExit) as ended:
        errors.run(errors.main)
    assert ended.value.code == 2
