"""`wsiseg phantom`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import openslide
import pytest
import tifffile
from click.testing import CliRunner

from wsiseg.cli import cli
from wsiseg.errors import OutputError


def test_slide_and_truth(tmp_path: Path) -> None:
    out, truth = tmp_path / "a.tif", tmp_path / "t.tif"
    args = [
        "phantom",
        str(out),
        "--size",
        "600x400",
        "--mpp",
        "1",
        "--seed",
        "3",
        "--truth",
        str(truth),
    ]
    result = CliRunner().invoke(cli, args)
    assert result.exit_code == 0, result.output
    assert str(out) in result.output
    assert str(truth) in result.output
    with openslide.OpenSlide(out) as slide:
        assert slide.dimensions == (600, 400)
        assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(1, rel=1e-6)
    labels = tifffile.imread(truth)
    assert labels.shape == (400, 600)
    assert set(np.unique(labels)) == {0, 1, 2}


@pytest.mark.parametrize("size", ["600", "600x", "axb", "600x400x3", "-5x10"])
def test_a_size_that_is_none(tmp_path: Path, size: str) -> None:
    result = CliRunner().invoke(cli, ["phantom", str(tmp_path / "a.tif"), f"--size={size}"])
    assert result.exit_code == 2
    assert "WIDTHxHEIGHT" in result.output


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["phantom", str(tmp_path / "no" / "a.tif"), "--size", "9x9"])
    assert isinstance(result.exception, OutputError)
