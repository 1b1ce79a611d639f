"""`wsiseg info`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from wsiseg.cli import cli
from wsiseg.errors import ResolutionError, SlideError
from wsiseg.geometry import Size
from wsiseg.slides.phantom import write_phantom


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("info") / "a.tif"
    write_phantom(path, Size(800, 600), seed=1)
    return path


def test_json(slide: Path) -> None:
    result = CliRunner().invoke(cli, ["info", str(slide), "--json"])
    assert result.exit_code == 0
    record = json.loads(result.output)
    assert record["size"] == [800, 600]
    assert record["mpp"] == pytest.approx(0.5, rel=1e-6)
    assert (record["mpp_source"], record["backend"]) == ("tiff resolution", "direct")
    assert [level["size"] for level in record["levels"]] == [[800, 600], [400, 300]]
    assert 0.2 < record["tissue_fraction"] < 1
    assert record["tissue_mm2"] == pytest.approx(record["tissue_fraction"] * 0.12, rel=1e-4)
    assert len(record["quickhash"]) == 64


def test_text_and_options(slide: Path) -> None:
    result = CliRunner().invoke(
        cli, ["info", str(slide), "--mpp", "0.25", "--backend", "tiffslide"]
    )
    assert result.exit_code == 0
    lines = dict(
        line.split(maxsplit=1) for line in result.output.splitlines() if line[:5] != "level"
    )
    assert lines["mpp"] == "0.25 um per pixel (from option)"
    assert lines["size"] == "800 x 600 px (0.20 x 0.15 mm)"
    assert lines["format"].endswith("tiffslide")


def test_a_dark_picture_still_tells_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(np.full((40, 60, 3), 15, np.uint8)).save(path)
    result = CliRunner().invoke(cli, ["info", str(path), "--mpp", "0.5"])
    assert result.exit_code == 0
    assert "tissue     unknown" in result.output
    assert "dark all over (at most 15 of 255)" in result.output
    record = json.loads(CliRunner().invoke(cli, ["info", str(path), "--json"]).output)
    assert record["tissue_fraction"] is None
    assert len(record["warnings"]) == 2


def test_unknown_mpp_still_tells_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(np.full((40, 60, 3), 250, np.uint8)).save(path)
    result = CliRunner().invoke(cli, ["info", str(path)])
    assert result.exit_code == 0
    assert "mpp        unknown" in result.output
    assert "60 x 40 px" in result.output
    assert "tissue     0.0% (as if at 0.5 um per pixel)" in result.output
    assert "--mpp" in result.output
    record = json.loads(CliRunner().invoke(cli, ["info", str(path), "--json"]).output)
    assert (record["mpp"], record["mpp_source"], record["tissue_mm2"]) == (None, None, None)
    assert record["tissue_fraction"] == 0


def test_errors(slide: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["info", str(tmp_path / "none.svs")])
    assert isinstance(result.exception, SlideError)
    result = CliRunner().invoke(cli, ["info", str(slide), "--mpp", "-1"])
    assert isinstance(result.exception, ResolutionError)
