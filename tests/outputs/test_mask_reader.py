"""Tiles of masks, against the labels they were written from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile
from output_canvases import MakeCanvas, blobs

from wsiseg.errors import OutputError
from wsiseg.outputs.mask_reader import TILE_PX, MaskReader
from wsiseg.outputs.pyramid import write_pyramid


@pytest.mark.parametrize("size", [(1300, 1029), (512, 512), (1, 513)])
@pytest.mark.parametrize("compression", ["deflate", "lzw"])
def test_tiles_are_the_labels(
    make_canvas: MakeCanvas, tmp_path: Path, size: tuple[int, int], compression: str
) -> None:
    labels = blobs(*size)
    write_pyramid(tmp_path / "m.tif", make_canvas(labels), compression=compression)
    with MaskReader(tmp_path / "m.tif") as mask:
        for level, (width, height) in enumerate(mask.sizes):
            whole = np.full((height, width), 99, np.uint8)
            for row in range(-(-height // TILE_PX)):
                for column in range(-(-width // TILE_PX)):
                    y, x = row * TILE_PX, column * TILE_PX
                    tile = mask.tile(level, column, row)
                    assert tile.dtype == np.uint8
                    whole[y : y + TILE_PX, x : x + TILE_PX] = tile
            assert np.array_equal(whole, labels[:: 2**level, :: 2**level])
        assert max(mask.sizes[-1]) <= TILE_PX
        for wrong in ((len(mask.sizes), 0, 0), (-1, 0, 0), (0, 99, 0), (0, 0, 99), (0, -1, 0)):
            with pytest.raises(IndexError):
                mask.tile(*wrong)


def test_what_is_no_mask_is_refused(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "rgb.tif", np.zeros((600, 600, 3), np.uint8), tile=(512, 512))
    tifffile.imwrite(tmp_path / "strips.tif", np.zeros((600, 600), np.uint8))
    (tmp_path / "text.tif").write_text("no tiff")
    for name in ("rgb.tif", "strips.tif", "text.tif", "missing.tif"):
        with pytest.raises(OutputError, match=name):
            MaskReader(tmp_path / name)


def test_damage_is_one_line(make_canvas: MakeCanvas, tmp_path: Path) -> None:
    write_pyramid(tmp_path / "m.tif", make_canvas(blobs(700, 700)))
    with tifffile.TiffFile(tmp_path / "m.tif") as tiff:
        page = tiff.pages.first
        offset, count = page.dataoffsets[1], page.databytecounts[1]
    with (tmp_path / "m.tif").open("r+b") as file:
        file.seek(offset)
        file.write(b"\xff" * count)
    with MaskReader(tmp_path / "m.tif") as mask:
        assert mask.tile(0, 0, 0).shape == (512, 512)
        with pytest.raises(OutputError, match=r"m\.tif: the mask cannot be read") as caught:
            mask.tile(0, 1, 0)
        assert "\n" not in str(caught.value)
