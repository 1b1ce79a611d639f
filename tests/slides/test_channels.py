"""OME-TIFFs whose channels lie in planes of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

from wsiseg.errors import SlideError
from wsiseg.geometry import Box
from wsiseg.slides.slide import open_slide

RGB = np.random.default_rng(0).integers(0, 255, (300, 280, 3)).astype(np.uint8)
SIZES = {f"PhysicalSize{axis}": 0.5 for axis in "XY"}


def write(path: Path, pixels: np.ndarray, axes: str, **how: Any) -> Path:
    tifffile.imwrite(path, pixels, ome=True, metadata={"axes": axes, **SIZES}, **how)
    return path


@pytest.mark.parametrize("tile", [(128, 128), None])
@pytest.mark.parametrize(
    ("axes", "how"),
    [
        ("YXS", {"photometric": "rgb"}),
        ("SYX", {"photometric": "rgb", "planarconfig": "separate"}),
        ("CYX", {"photometric": "minisblack"}),
    ],
)
def test_three_channels_are_read_as_rgb_however_they_lie(
    tmp_path: Path, axes: str, how: dict[str, Any], tile: tuple[int, int] | None
) -> None:
    pixels = RGB if axes == "YXS" else np.moveaxis(RGB, 2, 0)
    path = write(tmp_path / "a.ome.tif", pixels, axes, tile=tile, **how)
    with open_slide(path) as slide:
        assert np.array_equal(slide.read(Box(0, 0, 280, 300), slide.grid(0.5)), RGB)


@pytest.mark.parametrize("backend", ["auto", "tiffslide"])
@pytest.mark.parametrize("count", [3, 4])
def test_channels_of_a_pyramid_are_counted(tmp_path: Path, count: int, backend: str) -> None:
    path, planes = tmp_path / "a.ome.tif", np.stack([RGB[..., k % 3] for k in range(count)])
    how: dict[str, Any] = {"tile": (64, 64), "photometric": "minisblack"}
    with tifffile.TiffWriter(path, ome=True) as tiff:
        tiff.write(planes, subifds=1, metadata={"axes": "CYX", **SIZES}, **how)
        tiff.write(planes[:, ::2, ::2], subfiletype=1, **how)
    if count == 3:
        with open_slide(path, backend=backend) as slide:
            assert (slide.backend, len(slide.level_sizes)) == ("tiffslide", 2)
            assert np.array_equal(slide.read(Box(0, 0, 280, 300), slide.grid(0.5)), RGB)
        return
    with pytest.raises(SlideError, match="holds 4 channels in planes of their own"):
        open_slide(path, backend=backend)


def test_other_channels_are_refused(tmp_path: Path) -> None:
    pixels = np.stack([RGB[..., 0]] * 5)
    for tile in ((128, 128), None):
        path = write(tmp_path / "a.ome.tif", pixels, "CYX", photometric="minisblack", tile=tile)
        with pytest.raises(SlideError, match="holds 5 channels in planes of their own"):
            open_slide(path)
