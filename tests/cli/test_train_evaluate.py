"""`wsiseg train` and `wsiseg evaluate` as a user runs them: folds, options, files, bad input."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import warnings
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import yaml
from PIL import Image

from wsiseg.cli import main

RUN = """
extractor: {name: cnn, arch: resnet18, channels: [4, 4, 8, 8], strides: [2, 4, 8], tile_px: 32}
head: {name: unet, widths: [8, 8, 8]}
trainable: all
mpp: 1.0
window_px: 32
patch_tiles: [1, 1]
validation_share: 0.34
validate_every: 3
loop: {steps: 6, batch_size: 2, learning_rate: 0.01, warmup_steps: 1, log_every: 3, save_every: 3}
"""
DATA = """
name: folder
images: images/*.png
masks: masks/{stem}.png
instances: masks/{stem}.png
mpp: 1.0
group: '^(p[0-9]+)_'
terms: for tests
classes:
  - {name: ground, color: [200, 200, 200], values: [0], background: true}
  - {name: disc, color: [90, 0, 90], values: [1, 2]}
"""


def wsiseg(*words: str | Path) -> subprocess.CompletedProcess[str]:
    """The command line in this process, which spares the seconds that a start of torch takes."""
    arguments = ["wsiseg", *map(str, words)]
    out, err = StringIO(), StringIO()
    with (
        warnings.catch_warnings(action="default"),
        mock.patch.object(sys, "argv", arguments),
        redirect_stdout(out),
        redirect_stderr(err),
        pytest.raises(SystemExit) as ended,
    ):
        main()
    code = ended.value.code
    assert isinstance(code, int)
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def fails(code: int, message: str, *words: str | Path) -> None:
    done = wsiseg(*words)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(("wsiseg: error: ", "Error: "))
    assert message in last


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of six patients, two discs each, with run.yaml and data.yaml beside."""
    root = tmp_path_factory.mktemp("discs")
    (root / "images").mkdir()
    (root / "masks").mkdir()
    y, x = np.mgrid[:48, :40]
    for i in range(12):
        rng = np.random.default_rng(i)
        labels = np.zeros((48, 40), np.uint8)
        for k, cy in enumerate((12, 35), start=1):
            labels[(y - cy) ** 2 + (x - rng.integers(12, 28)) ** 2 < 80] = k
        image = np.where(labels[..., None] > 0, (110, 60, 150), (230, 180, 205))
        image = (image + rng.normal(0, 5, (48, 40, 3))).clip(0, 255).astype(np.uint8)
        Image.fromarray(image).save(root / "images" / f"p{i // 2}_{i}.png")
        Image.fromarray(labels).save(root / "masks" / f"p{i // 2}_{i}.png")
    (root / "run.yaml").write_text(RUN)
    (root / "data.yaml").write_text(DATA)
    return root


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    out = folder / "run"
    done = wsiseg(
        *("train", "--dataset", folder / "data.yaml", "--data", folder),
        *("--config", folder / "run.yaml", "--fold", "1/3", "--limit", "4", "--out", out),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith(f"wrote {out / 'model.safetensors'}")
    return out


def measure(folder: Path, run: Path, out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return wsiseg(
        *("evaluate", "--model", run / "model.safetensors", "--dataset", folder / "data.yaml"),
        *("--data", folder, "--split", "all", "--out", out, *more),
    )


def test_a_fold_is_left_out_and_measured(folder: Path, run: Path, tmp_path: Path) -> None:
    done = measure(folder, run, tmp_path, "--fold", "1/3", "--panels", "3")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "metrics.json").read_text())
    assert report["images"] == 4
    assert report["fold"] == "1/3"
    assert report["licence"] == "for tests"
    assert report["dataset"]["name"] == "folder"
    assert report["object"].keys() >= {"f1", "dice", "hausdorff", "per_image"}
    assert f"Dice {report['pixel']['dice']:.4f}" in done.stdout
    assert f"object F1 {report['object']['f1']:.4f}" in done.stdout
    assert "were in the model's training" not in done.stderr
    assert report["model"] == "run"
    with (tmp_path / "per_image.csv").open() as file:
        rows = list(csv.DictReader(file))
    trained = json.loads((run / "inputs.json").read_text())["images"]
    assert len(trained) == 4
    assert not {r["name"].split("_")[0] for r in rows} & {n.split("_")[0] for n in trained}
    mean = np.mean([float(r["object_f1"]) for r in rows])
    assert mean == pytest.approx(report["object"]["per_image"]["f1"], abs=1e-5)
    mean = np.mean([float(r["dice"]) for r in rows])
    assert mean == pytest.approx(report["per_image"]["dice"], abs=1e-5)
    assert len(list((tmp_path / "panels").glob("*.png"))) == 3
    page = (tmp_path / "report.html").read_text()
    assert f"{report['pixel']['dice']:.3f}" in page
    with Image.open(tmp_path / "confusion.png") as picture:
        assert picture.width > 200


def test_objects_are_cleaned_when_asked(folder: Path, run: Path, tmp_path: Path) -> None:
    plain = measure(folder, run, tmp_path / "a", "--panels", "0")
    clean = measure(folder, run, tmp_path / "b", "--panels", "0", "--min-object-um2", "1e6")
    assert (plain.returncode, clean.returncode) == (0, 0)
    report = json.loads((tmp_path / "b" / "metrics.json").read_text())
    assert report["object"]["tp"] == report["object"]["fp"] == 0
    assert report["object"]["fn"] == 24
    assert "of the 12 images were in the model's training" in clean.stderr
    assert report["pixel"] == json.loads((tmp_path / "a" / "metrics.json").read_text())["pixel"]


def test_classes_of_the_data_may_stand_in_another_order(
    folder: Path, run: Path, tmp_path: Path
) -> None:
    described = yaml.safe_load(DATA)
    described["classes"] = [{**c, "name": c["name"].upper()} for c in described["classes"][::-1]]
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(described))
    assert measure(folder, run, tmp_path / "a").returncode == 0
    done = wsiseg(
        *("evaluate", "--model", run / "model.safetensors", "--dataset", tmp_path / "other.yaml"),
        *("--data", folder, "--split", "all", "--out", tmp_path / "b"),
    )
    assert done.returncode == 0, done.stderr
    one, other = (json.loads((tmp_path / k / "metrics.json").read_text()) for k in "ab")
    assert one["pixel"] == other["pixel"]
    assert one["object"] == other["object"]


def test_images_of_the_training_are_known_under_other_options(
    folder: Path, run: Path, tmp_path: Path
) -> None:
    described = {**yaml.safe_load(DATA), "images": "images/p*.png", "mpp": 1.01, "group": ""}
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(described))
    words = ["evaluate", "--model", run / "model.safetensors", "--split", "all", "--panels", "0"]
    words += ["--dataset", tmp_path / "other.yaml", "--out", tmp_path / "out"]
    known = json.loads((run / "inputs.json").read_text())
    count = len(known["images"]) + len(known["validation"])
    done = wsiseg(*words, "--data", folder)
    assert f"{count} of the 12 images were in the model's training" in done.stderr
    for kind in ("images", "masks"):  # others of the same names
        (tmp_path / kind).mkdir()
        for file in (folder / kind).iterdir():
            with Image.open(file) as image:
                Image.fromarray(np.asarray(image)[::-1]).save(tmp_path / kind / file.name)
    done = wsiseg(*words, "--data", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "model's training" not in done.stderr


def test_images_without_labels_are_not_measured(folder: Path, run: Path, tmp_path: Path) -> None:
    described = yaml.safe_load(DATA)
    for item, values in zip(described["classes"], ([8], [9]), strict=True):
        item["values"] = values
    (tmp_path / "none.yaml").write_text(yaml.safe_dump({**described, "ignore": [0, 1, 2]}))
    words = ["evaluate", "--model", run / "model.safetensors", "--split", "all"]
    words += ["--dataset", tmp_path / "none.yaml", "--data", folder, "--out", tmp_path / "out"]
    fails(1, "none of the 12 images has a labelled pixel", *words)
    assert not (tmp_path / "out").exists()


def test_images_coarser_than_the_model_are_warned_of(folder: Path, tmp_path: Path) -> None:
    done = wsiseg(
        *("train", "--dataset", folder / "data.yaml", "--data", folder, "--out", tmp_path),
        *("--config", folder / "run.yaml", "--set", "mpp=0.5", "--set", "loop.steps=1"),
    )
    assert done.returncode == 0, done.stderr
    measured = measure(folder, tmp_path, tmp_path / "all")
    for text in (done.stderr, measured.stderr):
        assert "read at 1 um per pixel and enlarged to the 0.5 of the model" in text


def test_folds_are_pooled(folder: Path, run: Path, tmp_path: Path) -> None:
    for k in "12":
        assert measure(folder, run, tmp_path / k, "--fold", f"{k}/3").returncode == 0
    script = Path(__file__).resolve().parents[2] / "examples" / "pool_folds.py"
    done = subprocess.run(
        [sys.executable, script, tmp_path / "1", tmp_path / "2"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    heads, _, one, other, both = done.stdout.splitlines()
    assert [h.strip() for h in heads.split("|")[5:7]] == ["Dice ground", "IoU ground"]
    matrix = sum(
        np.array(json.loads((tmp_path / k / "metrics.json").read_text())["pixel"]["confusion"])
        for k in "12"
    )
    assert both.startswith(f"| all | {np.trace(matrix) / matrix.sum():.3f} |")
    assert (one[:7], other[:7]) == ("| 1/3 |", "| 2/3 |")
    path = tmp_path / "2" / "metrics.json"
    measured = json.loads(path.read_text())
    for changes in ({"raw": True}, {"fold": "2/5"}):
        path.write_text(json.dumps({**measured, **changes}))
        words = [sys.executable, script, tmp_path / "1", tmp_path / "2"]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert "measured alike" in done.stderr


def test_resuming_what_is_complete_changes_nothing(folder: Path, run: Path) -> None:
    before = (run / "log.csv").read_text()
    words = ["train", "--dataset", folder / "data.yaml", "--data", folder]
    words += ["--config", folder / "run.yaml", "--fold", "1/3", "--limit", "4", "--out", run]
    fails(2, "holds a run already", *words)
    assert wsiseg(*words, "--resume").returncode == 0
    assert (run / "log.csv").read_text() == before
    fails(2, "was started with another configuration", *words, "--resume", "--set", "mpp=2.0")


def test_bad_requests(folder: Path, run: Path, tmp_path: Path) -> None:
    data, out = folder / "data.yaml", tmp_path / "out"
    train = ["train", "--data", folder, "--config", folder / "run.yaml", "--out", out]
    fails(2, "no data set 'tissue'", *train, "--dataset", "tissue")
    fails(2, "told in a YAML file, --dataset MINE.yaml", *train, "--dataset", "folder")
    fails(2, "fold 4/3", *train, "--dataset", data, "--fold", "4/3")
    fails(2, "write it as K/N", *train, "--dataset", data, "--fold", "first")
    fails(2, "limit 100", *train, "--dataset", data, "--limit", "100")
    fails(2, "device 'gpu': use auto", *train, "--dataset", data, "--device", "gpu")
    fails(2, "unknown key loops", *train, "--dataset", data, "--set", "loops.steps=3")
    fails(1, "expected a folder with", *train, "--dataset", "bcss")
    other = ["evaluate", "--model", "glas-small", "--dataset", data, "--data", folder]
    fails(1, "are not the model's", *other, "--split", "all", "--out", out)
    other += ["--split", "all", "--out", out]
    fails(2, "objects of at least nan um", *other, "--min-object-um2", "nan")
    assert not out.exists() or not list(out.iterdir())
    rate = ["--set", "loop.learning_rate=1.0e30", "--set", "loop.clip_norm=0"]
    fails(1, "the loss is not finite at step", *train, "--dataset", data, *rate)
    assert not (out / "model.safetensors").exists()


def test_bad_images(folder: Path, tmp_path: Path) -> None:
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
        for file in (folder / kind).iterdir():
            (tmp_path / kind / file.name).write_bytes(file.read_bytes())
    train = ["train", "--data", tmp_path, "--config", folder / "run.yaml", "--out", tmp_path / "r"]
    train += ["--dataset", folder / "data.yaml"]
    mask = tmp_path / "masks" / "p0_0.png"
    good = mask.read_bytes()
    Image.new("L", (10, 10)).save(mask)
    fails(1, "p0_0", *train)
    Image.new("L", (40, 48), 9).save(mask)
    fails(1, "p0_0", *train)
    mask.write_bytes(good[: len(good) // 2])
    fails(1, "p0_0", *train)
    mask.unlink()
    fails(1, "p0_0", *train)
    for file in (tmp_path / "masks").iterdir():
        Image.new("L", (40, 48), 0).save(file)
    Image.new("L", (40, 48), 0).save(mask)
    fails(1, "no pixel of class 'disc'", *train)
