from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from wsiseg.datasets.base import grouped_split
from wsiseg.datasets.glas import GlaS
from wsiseg.datasets.table import open_dataset
from wsiseg.errors import DatasetError, UsageError


def make(folder: Path, count: int = 3, suffix: str = "bmp") -> None:
    for i in range(1, count + 1):
        image = np.full((20, 30, 3), 10 * i, np.uint8)
        instances = np.zeros((20, 30), np.uint8)
        instances[2:5, 3:6], instances[10:15, 10:20] = 1, 7
        Image.fromarray(image).save(folder / f"train_{i}.{suffix}")
        Image.fromarray(instances).save(folder / f"train_{i}_anno.{suffix}")
    rows = "".join(f"train_{i}, {i % 2} , benign, healthy\n" for i in range(1, count + 1))
    (folder / "Grade.csv").write_text("name,patient ID ,grade (GlaS), grade (S)\n" + rows)


@pytest.mark.parametrize("suffix", ["bmp", "png"])
def test_official_layout(tmp_path: Path, suffix: str) -> None:
    make(tmp_path, 11, suffix)
    data = open_dataset("glas", tmp_path, "train")
    assert data.names[:3] == ("train_1", "train_2", "train_3")
    assert data.names[-1] == "train_11"
    assert data.groups[0] == "patient 1"
    item = data[1]
    assert item.image.shape == (20, 30, 3)
    assert item.image.max() == 20
    assert item.mask.sum() == 9 + 50
    assert set(np.unique(item.mask)) == {0, 1}
    assert set(np.unique(GlaS(tmp_path, "train").instances(0))) == {0, 1, 7}


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"expected .* train_1.bmp"):
        GlaS(tmp_path, "testA")
    with pytest.raises(DatasetError, match="no such folder"):
        GlaS(tmp_path / "none", "train")
    with pytest.raises(UsageError, match="no part"):
        GlaS(tmp_path, "validation")
    with pytest.raises(UsageError, match="no data set"):
        open_dataset("glass", tmp_path, "train")
    make(tmp_path, 1)
    (tmp_path / "train_1_anno.bmp").write_bytes(b"no image")
    with pytest.raises(DatasetError, match="not a readable image"):
        GlaS(tmp_path, "train")[0]


def test_groups_are_not_split() -> None:
    groups = tuple("aabbbccdde")
    training, held = grouped_split(groups, 0.3, seed=1)
    assert sorted(training + held) == list(range(10))
    assert not {groups[i] for i in training} & {groups[i] for i in held}
    assert 3 <= len(held) <= 5
    assert grouped_split(groups, 0.0, seed=1)[1] == []


def test_real_glas(shared_data: Path) -> None:
    train = GlaS(shared_data / "glas", "train")
    assert len(train) == 85
    assert len(GlaS(shared_data / "glas", "testA")) == 60
    assert len(set(train.groups)) < 20
    assert all(g.startswith("patient ") for g in train.groups)
    assert train[0].image.shape == (522, 775, 3)
