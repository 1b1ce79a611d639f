"""examples/label_efficiency.py: a curve of Dice against labelled images, by running it."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image, ImageDraw

from wsiseg.cli import cli

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "label_efficiency.py"
EXTRACTOR = "{name: genselfdiff, dim: 8, mults: [1, 2], tile_px: 32}"
TRAIN = f"""
extractor: {EXTRACTOR}
head: {{name: linear}}
trainable: all
mpp: 1.24
window_px: 32
patch_tiles: [1, 1]
validation_share: 0
loop: {{steps: 2, batch_size: 2, warmup_steps: 0}}
"""
PRETRAIN = f"""
mpp: 1.24
extractor: {EXTRACTOR}
sources: [{{path: "train_*.png", exclude: "*_anno.png", mpp: 0.62}}]
crop_px: 32
loop: {{steps: 1, batch_size: 2, warmup_steps: 0}}
"""


@pytest.fixture(scope="module")
def glas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four images to train on and two to measure on, in GlaS' layout, with two configurations."""
    folder = tmp_path_factory.mktemp("glas")
    rows, rng = "", np.random.default_rng(0)
    for i, name in enumerate([*(f"train_{k}" for k in range(4)), "testA_1", "testA_2"]):
        image, labels = Image.new("RGB", (96, 80), (230, 170, 200)), Image.new("L", (96, 80))
        x, y = (int(v) for v in rng.integers(20, 60, 2))
        ImageDraw.Draw(image).ellipse((x - 15, y - 15, x + 15, y + 15), (110, 60, 150))
        ImageDraw.Draw(labels).ellipse((x - 15, y - 15, x + 15, y + 15), 1)
        image.save(folder / f"{name}.png")
        labels.save(folder / f"{name}_anno.png")
        rows += f"{name},{i},benign,healthy\n"
    (folder / "Grade.csv").write_text("name, patient ID,grade (GlaS),x\n" + rows)
    (folder / "tiny.yaml").write_text(TRAIN)
    (folder / "pretrain.yaml").write_text(PRETRAIN)
    return folder


def python(*words: str | Path) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, words)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def here(*words: object) -> None:
    """A command of wsiseg in this process, which spares the seconds that a start of torch takes."""
    CliRunner().invoke(cli, [*map(str, words)], catch_exceptions=False, standalone_mode=False)


def test_a_curve_is_measured_and_gone_on_with(
    glas: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    spec = importlib.util.spec_from_file_location("label_efficiency", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr(script, "wsiseg", here)

    def measure(*words: object) -> str:
        monkeypatch.setattr(sys, "argv", [*map(str, words)])
        script.main()
        return capsys.readouterr().out

    pretrain = ["pretrain", "--config", glas / "pretrain.yaml", "--data", glas]
    here(*pretrain, "--out", tmp_path / "pre")
    tiny, pretrained = glas / "tiny.yaml", tmp_path / "pre" / "extractor.safetensors"
    out = tmp_path / "curve"
    words = [SCRIPT, glas, out, tiny, f"{tiny}={pretrained}", "--images", "2", "0"]
    assert "tiny-pretrained: 4 images, seed 0: Dice 0." in measure(*words)
    table = json.loads((out / "label_efficiency.json").read_text())
    assert {name: sorted(row) for name, row in table.items()} == {
        "tiny": ["2", "4"],
        "tiny-pretrained": ["2", "4"],
    }
    assert table["tiny"] != table["tiny-pretrained"]
    for name, row in table.items():
        for count, values in row.items():
            run = out / f"{name}-{count if count == '2' else 'all'}-0"
            measured = json.loads((run / "testA" / "metrics.json").read_text())
            assert values == [measured["pixel"]["dice"]]
    images = [json.loads((out / f"{n}-2-0" / "inputs.json").read_text())["images"] for n in table]
    assert images[0] == images[1], "a seed draws the same images for all methods"
    with Image.open(out / "label_efficiency.png") as picture:
        assert picture.size[0] > 500

    other = tmp_path / "other.json"
    other.write_text(json.dumps({"tiny": table["tiny"]}))
    drawn: list[dict[str, dict[int, list[float]]]] = []
    monkeypatch.setattr(script, "draw_label_efficiency", lambda _, rows: drawn.append(rows))
    measure(*words, "--beside", f"again={other}")
    (rows,) = drawn
    assert rows["again"] == rows["tiny"]
    assert json.loads((out / "label_efficiency.json").read_text()) == table
    with pytest.raises(SystemExit):
        measure(*words, "--beside", f"again={out / 'label_efficiency.json'}")  # of two methods
    assert "of one method" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        measure(*words, "--beside", f"tiny={other}")
    assert "method tiny already" in capsys.readouterr().err

    models = {file: file.stat().st_mtime_ns for file in out.rglob("model.safetensors")}
    assert measure(*words).count("Dice 0.") == 4
    assert len(models) == 4
    assert all(file.stat().st_mtime_ns == when for file, when in models.items())


def test_a_run_that_failed_at_once_leaves_its_folder_to_another_command(
    glas: Path, tmp_path: Path
) -> None:
    words = [sys.executable, SCRIPT, glas, tmp_path / "curve", glas / "tiny.yaml", "--images", "2"]
    wrong = [*words, "--set", "loop.steps=none"]
    assert subprocess.run(wrong, capture_output=True, check=False).returncode != 0
    assert "tiny: 2 images, seed 0: Dice 0." in python(*words[1:])
    other = [*words, "--set", "loop.steps=3"]
    done = subprocess.run(other, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "was made by another command" in done.stderr
    (tmp_path / "curve" / "tiny-2-0" / "train.json").unlink()  # as in a folder of `wsiseg train`
    done = subprocess.run([*words], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "was made by another command" in done.stderr
    assert "Traceback" not in done.stderr
