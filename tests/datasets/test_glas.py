from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from wsiseg.datasets.glas import GlaS
from wsiseg.datasets.table import dataset_mapping, open_dataset
from wsiseg.errors import ConfigError, DatasetError, UsageError


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


def test_grades_are_classes(tmp_path: Path) -> None:
    make(tmp_path, 2)
    (tmp_path / "Grade.csv").write_text(
        "name, patient ID,grade (GlaS), other\ntrain_1 , 4, benign , x\ntrain_2,5,malignant,y\n"
    )
    data = open_dataset({"name": "glas", "classes": "grades"}, tmp_path, "train")
    assert data.classes.names == ("Other tissue", "Benign gland", "Malignant gland")
    assert set(np.unique(data[0].mask)) == {0, 1}
    assert set(np.unique(data.mask(1))) == {0, 2}
    assert data[1].instances is not None
    assert set(np.unique(data[1].instances)) == {0, 1, 7}
    (tmp_path / "Grade.csv").write_text("name,patient ID\ntrain_1,4\ntrain_2,5\n")
    with pytest.raises(DatasetError, match=r"no grade .* for train_1"):
        open_dataset({"name": "glas", "classes": "grades"}, tmp_path, "train")


def test_without_patients_there_is_a_warning(tmp_path: Path) -> None:
    make(tmp_path, 2)
    (tmp_path / "Grade.csv").unlink()
    with pytest.warns(UserWarning, match="has no row for train_1 and 1 others"):
        assert GlaS(tmp_path, "train").groups == ("train_1", "train_2")


def test_the_test_parts_are_for_measuring(tmp_path: Path) -> None:
    make(tmp_path, 1)
    for file in list(tmp_path.glob("train_*")):
        file.rename(file.with_name(file.name.replace("train", "testA")))
    (tmp_path / "Grade.csv").write_text("name,patient ID\ntestA_1,4\n")
    assert GlaS(tmp_path, "testA").measuring


def test_tables_that_are_none(tmp_path: Path) -> None:
    make(tmp_path, 2)
    for text, message in (
        ("", "no table with the columns"),
        ("name,patient\ntrain_1,3\n", "no table with the columns"),
        ("name,patient ID\ntrain_1,3\ntrain_2\n", "no patient ID for 'train_2'"),
        ("name,patient ID\n\0" + 9000 * "x" + ",\n", r"no patient ID for '\\x00x{59}'$"),
    ):
        (tmp_path / "Grade.csv").write_text(text)
        with pytest.raises(DatasetError, match=message):
            GlaS(tmp_path, "train")


def test_glass_behind_what_is_transparent(tmp_path: Path) -> None:
    make(tmp_path, 1, "png")
    image = np.full((20, 30, 4), 60, np.uint8)
    image[:10, :, 3], image[10:, :, 3] = 0, 255
    Image.fromarray(image).save(tmp_path / "train_1.png")
    pixels = GlaS(tmp_path, "train")[0].image
    assert (pixels[:10] == 255).all()
    assert (pixels[10:] == 60).all()


def test_an_image_of_both_kinds_is_an_error(tmp_path: Path) -> None:
    make(tmp_path, 1, "png")
    make(tmp_path, 1, "bmp")
    with pytest.raises(DatasetError, match="train_1 is there as bmp and as png"):
        GlaS(tmp_path, "train")


def test_options_come_from_yaml(tmp_path: Path) -> None:
    file = tmp_path / "glas.yaml"
    file.write_text("name: glas\nclasses: grades\n")
    assert dataset_mapping(file) == {"name": "glas", "classes": "grades"}
    assert dataset_mapping("glas") == {"name": "glas", "classes": "glands"}
    file.write_text("name: other\n")
    with pytest.raises(ConfigError, match="name must be one of"):
        dataset_mapping(file)
    file.write_text("name: glas\nclass: grades\n")
    with pytest.raises(ConfigError, match=r"glas.yaml: unknown key class"):
        dataset_mapping(file)
