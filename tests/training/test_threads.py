"""Batches are the same however many threads make them."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import numpy as np
import pytest
from discs import Discs, config
from PIL import Image

from wsiseg.training import patches, tile_pool
from wsiseg.training.inputs import choose_inputs
from wsiseg.training.threads import batch_threads
from wsiseg.training.tiles import SourceConfig, load_pools
from wsiseg.training.train import training_patches


@pytest.mark.parametrize(
    ("cores", "processes", "threads"),
    [(1, 1, 2), (2, 1, 2), (4, 1, 3), (16, 1, 8), (16, 4, 3), (64, 8, 7), (16, 16, 2)],
)
def test_as_many_as_there_are_cores(
    cores: int, processes: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    assert batch_threads(processes) == threads


def test_patches_do_not_depend_on_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    run = config()
    stream = training_patches(run, choose_inputs(run, Discs()), tile_px=32, target=None)
    found = []
    for threads in (1, 7):
        monkeypatch.setattr(patches, "batch_threads", lambda _, n=threads: n)
        found.append(list(itertools.islice(stream.batches(4, start=2), 9)))
    for one, many in zip(*found, strict=True):
        assert one.numbers == many.numbers
        np.testing.assert_array_equal(one.images, many.images)
        np.testing.assert_array_equal(one.masks, many.masks)


def test_crops_do_not_depend_on_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 255, (40, 40, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    pool = load_pools([SourceConfig("*.png")], tmp_path, mpp=1.0).training
    found = []
    for threads in (1, 7):
        monkeypatch.setattr(tile_pool, "batch_threads", lambda _, n=threads: n)
        batches = pool.batches(32, 4, seed=0, start=3, scale=(0.8, 1.2))
        found.append(list(itertools.islice(batches, 9)))
        batches.close()  # type: ignore[attr-defined]
    np.testing.assert_array_equal(*found)
