"""The README's commands and the examples, run as a new user would."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile

from wsiseg.geometry import Box, Size
from wsiseg.models.zoo import MODELS
from wsiseg.slides.phantom import render_phantom

ROOT = Path(__file__).resolve().parents[1]
SAMPLE = ROOT / "examples" / "colon.tif"


def shell_blocks() -> list[str]:
    return re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_the_first_two_commands_are_the_main_job_and_the_tests() -> None:
    first, second = (b.split("#")[0].strip() for b in shell_blocks()[:2])
    assert first == "pip install . && wsiseg predict examples/colon.tif --out masks/"
    assert second == "pip install '.[test]' && pytest"


def test_every_command_in_the_readme_exists() -> None:
    from wsiseg.cli import COMMANDS

    used = {m for block in shell_blocks() for m in re.findall(r"wsiseg ([a-z-]+)", block)}
    assert used <= set(COMMANDS)
    assert len(used) >= 6


def test_files_named_in_the_readme_exist() -> None:
    text = (ROOT / "README.md").read_text()
    for name in re.findall(r"\]\(((?:docs|configs|examples)/[^)]+)\)", text):
        assert (ROOT / name).is_file(), name
    for name in re.findall(r"configs/[\w/.-]+\.yaml", text):
        assert (ROOT / name).is_file(), name


@pytest.mark.parametrize("name", ["predict_slide", "correct_and_retrain"])
def test_examples_tell_what_they_take(name: str, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "examples" / f"{name}.py"), "--help"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("usage: ")
    assert list(tmp_path.iterdir()) == []


def test_the_sample_slide_is_small() -> None:
    assert SAMPLE.stat().st_size <= 4 << 20


@pytest.fixture(scope="module")
def main_job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("masks")
    command = [sys.executable, "-m", "wsiseg.cli", "predict", str(SAMPLE), "--out", str(out)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert result.returncode == 0, result.stderr
    assert "Gland" in result.stdout
    assert "mm2" in result.stdout
    return out


def test_the_main_job_finds_the_glands(main_job: Path) -> None:
    names = {p.name for p in main_job.iterdir()}
    suffixes = (".mask.ome.tif", ".geojson", ".json", ".overview.png")
    assert names == {"run.json", "summary.csv", *(f"colon{suffix}" for suffix in suffixes)}
    mask = tifffile.imread(main_job / "colon.mask.ome.tif")
    sidecar = json.loads((main_job / "colon.json").read_text())
    dx, dy = sidecar["mask"]["downsample"]
    size = Size(3000, 2500)
    _, truth = render_phantom(Box(0, 0, *size), size, mpp=0.5, seed=0)
    rows = ((np.arange(mask.shape[0]) + 0.5) * dy).astype(int)
    columns = ((np.arange(mask.shape[1]) + 0.5) * dx).astype(int)
    wanted, found = truth[np.ix_(rows, columns)] == 2, mask == 2
    dice = 2 * (wanted & found).sum() / (wanted.sum() + found.sum())
    assert dice > 0.6


def test_polygons_of_the_main_job_are_glands(main_job: Path) -> None:
    features = json.loads((main_job / "colon.geojson").read_text())["features"]
    assert len(features) > 20
    assert {f["properties"]["classification"]["name"] for f in features} == {"Gland"}


@pytest.mark.parametrize("name", [n for n, m in MODELS.items() if m.weights == "bundled"])
def test_a_bundled_model_is_small_and_has_a_card(name: str) -> None:
    from wsiseg.models.checkpoint import read_card

    path = MODELS[name].path
    assert path is not None
    assert path.stat().st_size <= 40 << 20
    about = read_card(path)
    assert "esearch only" in about["licence"]
    assert {"use", "data", "terms", "limits", "commands", "metrics"} <= set(about["card"])
    assert all({"accuracy", "dice", "miou"} <= set(m) for m in about["card"]["metrics"].values())


def test_the_python_example(tmp_path: Path) -> None:
    phantom = tmp_path / "small.tif"
    run = [sys.executable, "-m", "wsiseg.cli", "phantom", str(phantom), "--size", "900x700"]
    subprocess.run(run, check=True, capture_output=True)
    example = str(ROOT / "examples" / "predict_slide.py")
    command = [sys.executable, example, str(phantom), str(tmp_path / "out"), "stain-threshold"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"small.mask.ome.tif", "small.geojson"}
    mask = tifffile.imread(tmp_path / "out" / "small.mask.ome.tif")
    assert 0 < (mask == 0).mean() < 0.5  # the glass, as `predict` leaves it out
