"""Unlabelled tissue: which files are read, at which resolution, in which order."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from wsiseg.errors import DatasetError
from wsiseg.geometry import Size
from wsiseg.slides.phantom import write_phantom
from wsiseg.training.tiles import SourceConfig, TilePool


def paint(path: Path, value: int, size: tuple[int, int] = (60, 40)) -> None:
    Image.new("RGB", size, (value, value, value)).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, value in (("train_1", 10), ("train_2", 20), ("testA_1", 99), ("testB_1", 98)):
        paint(tmp_path / f"{name}.png", value)
        paint(tmp_path / f"{name}_anno.png", 77)
    return tmp_path


def colours(pool: TilePool) -> set[int]:
    return {int(np.asarray(i)[0, 0, 0]) for g in pool.groups for i in g}


def test_test_images_and_annotations_stay_out(folder: Path) -> None:
    source = SourceConfig("train_*.png", exclude="*_anno.png")
    assert colours(TilePool.load([source], folder, mpp=1.0)) == {10, 20}


def test_images_are_brought_to_the_resolution(folder: Path) -> None:
    known = TilePool.load([SourceConfig("testA_1.png", mpp=0.5)], folder, mpp=1.0)
    assert known.groups[0][0].size == (30, 20)
    unknown = TilePool.load([SourceConfig("testA_1.png")], folder, mpp=1.0)
    assert unknown.groups[0][0].size == (60, 40)


def test_batches_depend_on_their_number_and_end_with_their_reader(folder: Path) -> None:
    sources = [SourceConfig("train_1.png", weight=3.0), SourceConfig("train_2.png")]
    pool = TilePool.load(sources, folder, mpp=1.0)
    before = threading.active_count()
    first = pool.batches(8, 50, seed=4, start=0, scale=(1.0, 1.0))
    third = [next(first) for _ in range(3)][2]
    later = pool.batches(8, 50, seed=4, start=2, scale=(1.0, 1.0))
    assert np.array_equal(next(later), third)
    share = np.mean([float((next(later) == 10).mean()) for _ in range(10)])
    assert 0.68 < share < 0.82
    first.close()  # type: ignore[attr-defined]
    later.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before


def test_an_error_in_the_thread_reaches_the_reader(folder: Path) -> None:
    pool = TilePool([[]], [1.0])
    with pytest.raises(ValueError, match="high <= 0"):
        next(pool.batches(8, 2, seed=0, start=0, scale=(1.0, 1.0)))


def test_tissue_is_cut_from_slides(tmp_path: Path) -> None:
    write_phantom(tmp_path / "slide.tiff", Size(1536, 1536), mpp=0.5, seed=1)
    pool = TilePool.load([SourceConfig("*.tiff")], tmp_path, mpp=1.0)
    assert len(pool) >= 1
    assert all(min(i.size) >= 256 and max(i.size) <= 1024 for i in pool.groups[0])
    batch = pool.batch(64, 3, np.random.default_rng(0), scale=(1.0, 1.0))
    assert batch.shape == (3, 64, 64, 3)
    assert batch.std() > 5


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no such images; check the data folder"):
        TilePool.load([SourceConfig("*.png")], tmp_path, mpp=1.0)
    (tmp_path / "a.png").write_text("no image")
    with pytest.raises(DatasetError, match=r"a\.png: not a readable image"):
        TilePool.load([SourceConfig("*.png")], tmp_path, mpp=1.0)
