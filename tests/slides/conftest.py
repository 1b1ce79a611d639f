"""Small synthetic slides for the tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from wsiseg.geometry import Size
from wsiseg.slides.phantom import write_phantom

PHANTOM_SIZE = Size(1101, 743)


@pytest.fixture(scope="session")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A phantom of 1101 x 743 px at 0.5 um per pixel, seed 5, with truth beside it."""
    folder = tmp_path_factory.mktemp("phantom")
    path = folder / "phantom.tif"
    write_phantom(path, PHANTOM_SIZE, seed=5, truth=folder / "truth.tif")
    return path
