"""examples/consep_glands.py: tiles put together, and glands from nuclei, by running it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from wsiseg.datasets.table import dataset_mapping, open_dataset

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "consep_glands.py"
SIDE, TILE = 1000, 256
UInt8 = npt.NDArray[np.uint8]


def run(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def nuclei() -> UInt8:
    """A gland of nuclei 5 um apart at the left, stroma at the right, a lone cell, a thin gap."""
    types = np.zeros((SIDE, SIDE), np.uint8)
    for y in range(100, 700, 30):
        for x in range(100, 300, 30):
            types[y : y + 12, x : x + 12] = 3
    types[100:700, 196:202] = 4  # spindle-shaped, within the gland
    types[850:860, 150:160] = 3  # a lone cell
    for y in range(100, 900, 60):
        types[y : y + 12, 600:612] = 4
        types[y : y + 12, 320:326] = 2  # 8 um from the gland at most
    return types


def write_tiles(folder: Path, number: int, types: UInt8) -> UInt8:
    """The tiles of an image as CoNSeP's have been cut, and the image: a slope of grey."""
    for name in ("images", "seg_mask"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    slope = (np.arange(SIDE)[:, None] + np.arange(SIDE) * 2) // 13
    image = np.repeat(slope.astype(np.uint8)[..., None], 3, axis=2)
    starts = [(y, x) for y in (0, 256, 512) for x in (0, 256, 512)]
    starts += [(744, x) for x in (0, 256, 512)] + [(y, 744) for y in (0, 256, 512)] + [(744, 744)]
    for k, (y, x) in enumerate(starts):
        part = np.s_[y : y + TILE, x : x + TILE]
        stem = f"train_{number}_{k:03d}"
        Image.fromarray(image[part]).save(folder / "images" / f"{stem}.jpg", quality=95)
        Image.fromarray(types[part]).save(folder / "seg_mask" / f"{stem}.png")
    return image


def test_images_and_masks(tmp_path: Path) -> None:
    types = nuclei()
    image = write_tiles(tmp_path / "consep", 1, types)
    only_stroma = np.where(types == 3, 0, types).astype(np.uint8)
    write_tiles(tmp_path / "consep", 12, only_stroma)
    done = run(tmp_path / "consep", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("2 images in ")
    whole = np.asarray(Image.open(tmp_path / "out" / "img" / "train_1.png")).astype(int)
    assert np.abs(whole - image).max() <= 6  # JPEG
    mask = np.asarray(Image.open(tmp_path / "out" / "mask" / "train_1.png"))
    epithelium = (types == 3) & (np.arange(SIDE)[:, None] < 750)
    spindle = (types == 4) & (np.arange(SIDE) < 400)
    beside = np.zeros_like(spindle)
    beside[100:700, 184:214] = True  # 3 um on either side of the spindle
    assert (mask[epithelium & ~beside] == 2).all()
    assert (mask[130:660, 112:130] == 2).all()  # between nuclei
    assert (mask[spindle] != 2).all()
    assert mask[855, 155] == 0
    assert (mask[(types == 4) & (np.arange(SIDE) > 500)] == 1).all()
    assert (mask[(types == 2)] != 2).all()
    assert mask[50, 900] == 0
    empty = np.asarray(Image.open(tmp_path / "out" / "mask" / "train_12.png"))
    assert (empty == 1).all()


def test_the_data_set_that_it_makes_has_its_parts(tmp_path: Path) -> None:
    for number in range(1, 28):
        for folder in ("img", "mask"):
            (tmp_path / folder).mkdir(exist_ok=True)
            one = np.ones((8, 8) if folder == "mask" else (8, 8, 3), np.uint8)
            Image.fromarray(one).save(tmp_path / folder / f"train_{number}.png")
    described = dataset_mapping("consep-glands")
    parts = [
        set(open_dataset(described, tmp_path, p).names) for p in ("train", "other", "measured")
    ]
    assert sum(len(p) for p in parts) == len(set.union(*parts)) == 27


def test_no_tiles_is_one_line(tmp_path: Path) -> None:
    done = run(tmp_path, tmp_path / "out")
    assert done.returncode == 2
    assert "has no images/train_*_000.jpg" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["images", "seg_mask"])
def test_a_missing_tile_is_one_line(tmp_path: Path, kind: str) -> None:
    write_tiles(tmp_path / "consep", 3, nuclei())
    name = "train_3_007" + (".jpg" if kind == "images" else ".png")
    (tmp_path / "consep" / kind / name).unlink()
    done = run(tmp_path / "consep", tmp_path / "out")
    assert done.returncode == 1
    assert name in done.stderr
    assert "Traceback" not in done.stderr
