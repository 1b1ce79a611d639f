from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from wsiseg.config import from_mapping
from wsiseg.datasets.base import class_pixels
from wsiseg.datasets.folder import FolderClass, FolderConfig, FolderDataset, FolderPart
from wsiseg.datasets.table import dataset_mapping, open_dataset
from wsiseg.errors import ConfigError, DatasetError, UsageError

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "datasets"
CONFIG = FolderConfig(
    images="img/*.png",
    masks="mask/{stem}.png",
    classes=(
        FolderClass("Tumour", (200, 0, 0), (3, 9)),
        FolderClass("Other", (200, 200, 200), (0,), background=True),
    ),
    mpp=0.5,
    ignore=(7,),
    group=r"^p(\d+)_",
)
RAW = np.array([[0, 3, 9], [7, 0, 3]])
LABELS = [[1, 0, 0], [255, 1, 0]]


def make(root: Path, names: tuple[str, ...] = ("p1_a", "p1_b", "p22_a"), kind: str = "L") -> Path:
    """Images of 3 x 2 px with the label image RAW, in the mode `kind`."""
    for name in names:
        for folder in ("img", "mask"):
            (root / folder).mkdir(exist_ok=True)
        image = np.full((2, 3, 3), 10 * len(name), np.uint8)
        Image.fromarray(image).save(root / "img" / f"{name}.png")
        labels(kind).save(root / "mask" / f"{name}.png")
    return root


def labels(kind: str) -> Image.Image:
    if kind == "I;16":
        return Image.fromarray(RAW.astype(np.uint16))
    image = Image.fromarray(RAW.astype(np.uint8))
    if kind == "P":
        image = image.convert("P")
        image.putpalette([255 - i // 3 for i in range(768)])  # colours that are not the index
    return image.convert("RGB") if kind == "RGB" else image


@pytest.mark.parametrize("kind", ["L", "P", "I;16", "RGB"])
def test_raw_values_become_classes(tmp_path: Path, kind: str) -> None:
    data = FolderDataset(make(tmp_path, kind=kind), "all", CONFIG)
    assert data.names == ("p1_a", "p1_b", "p22_a")
    assert data.groups == ("1", "1", "22")
    assert data.classes.names == ("Tumour", "Other")
    assert data.mpp == 0.5
    assert [c.background for c in data.classes] == [False, True]
    item = data[2]
    assert item.mask.dtype == np.uint8
    assert item.mask.tolist() == LABELS
    assert item.image.shape == (2, 3, 3)
    assert (item.image == 50).all()
    assert item.name == "p22_a"
    assert item.group == "22"
    assert item.instances is None
    np.testing.assert_array_equal(data.mask(0), LABELS)


def test_16_bit_values_and_instances(tmp_path: Path) -> None:
    make(tmp_path, ("p1_a",))
    raw = np.array([[300, 0, 301], [0, 70, 300]], np.uint16)
    Image.fromarray(raw).save(tmp_path / "mask" / "p1_a.png")
    rows = (FolderClass("A", (1, 2, 3), (300, 301, 70)), FolderClass("B", (4, 5, 6), (0,)))
    config = replace(CONFIG, classes=rows, ignore=(), instances="mask/{stem}.png")
    item = FolderDataset(tmp_path, "train", config)[0]
    assert item.mask.tolist() == [[0, 1, 0], [1, 0, 0]]
    assert item.instances is not None
    assert item.instances.dtype == np.int32
    np.testing.assert_array_equal(item.instances, raw)


def test_jpeg_images_and_grey_ones(tmp_path: Path) -> None:
    make(tmp_path, ("p1_a",))
    (tmp_path / "img" / "p1_a.png").unlink()
    Image.new("L", (3, 2), 90).save(tmp_path / "img" / "p1_a.jpg")
    item = FolderDataset(tmp_path, "all", replace(CONFIG, images="img/*.jpg"))[0]
    assert item.image.shape == (2, 3, 3)
    assert abs(int(item.image.mean()) - 90) <= 2


def test_parts(tmp_path: Path) -> None:
    make(tmp_path)
    parts = (
        FolderPart("fit", images="img/p1_*.png"),
        FolderPart("check", stems=("p22_a",), measuring=True),
    )
    config = replace(CONFIG, parts=parts)
    fit, check = FolderDataset(tmp_path, "fit", config), FolderDataset(tmp_path, "check", config)
    assert fit.names == ("p1_a", "p1_b")
    assert not fit.measuring
    assert check.names == ("p22_a",)
    assert check.measuring
    with pytest.raises(UsageError, match=r"no part 'all'; it has fit, check"):
        FolderDataset(tmp_path, "all", config)
    stray = replace(CONFIG, parts=(FolderPart("x", stems=("nobody",)),))
    with pytest.raises(DatasetError, match="nobody"):
        FolderDataset(tmp_path, "x", stray)


def test_without_a_group_each_image_is_its_own(tmp_path: Path) -> None:
    data = FolderDataset(make(tmp_path), "all", replace(CONFIG, group=""))
    assert data.groups == data.names


def test_unknown_value_names_file_and_value(tmp_path: Path) -> None:
    data = FolderDataset(make(tmp_path), "all", replace(CONFIG, ignore=()))
    with pytest.raises(DatasetError, match=r"p1_b\.png: holds the value 7, "):
        data.mask(1)


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    make(tmp_path)
    Image.new("L", (4, 2)).save(tmp_path / "mask" / "p1_a.png")
    Image.fromarray(np.zeros((2, 3, 3), np.uint8) + np.uint8([1, 2, 3])).save(
        tmp_path / "mask" / "p1_b.png"
    )
    data = FolderDataset(tmp_path, "all", CONFIG)
    with pytest.raises(DatasetError, match=r"is 4 x 2 px, but the image p1_a\.png is 3 x 2"):
        data.mask(0)
    with pytest.raises(DatasetError, match="colour picture"):
        data.mask(1)
    (tmp_path / "mask" / "p22_a.png").unlink()
    with pytest.raises(DatasetError, match=r"p22_a\.png: not there"):
        FolderDataset(tmp_path, "all", CONFIG)


@pytest.mark.parametrize("folder", ["img", "mask"])
def test_damaged_images(tmp_path: Path, folder: str) -> None:
    make(tmp_path, ("p1_a", "p1_b"))
    whole = (tmp_path / folder / "p1_a.png").read_bytes()
    (tmp_path / folder / "p1_a.png").write_bytes(whole[:48])
    (tmp_path / folder / "p1_b.png").write_bytes(b"no image")
    data = FolderDataset(tmp_path, "all", CONFIG)
    for i in (0, 1):
        with pytest.raises(DatasetError, match=rf"{folder}/{data.names[i]}\.png: not a readable"):
            data[i]


def test_16_bit_pictures_are_refused(tmp_path: Path) -> None:
    make(tmp_path, ("p1_a",))
    Image.fromarray(RAW.astype(np.uint16)).save(tmp_path / "img" / "p1_a.png")
    with pytest.raises(DatasetError, match="8-bit RGB"):
        FolderDataset(tmp_path, "all", CONFIG)[0]


def test_folders_without_images(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no such folder"):
        FolderDataset(tmp_path / "none", "all", CONFIG)
    with pytest.raises(DatasetError, match="no image matches"):
        FolderDataset(tmp_path, "all", CONFIG)
    with pytest.raises(ConfigError, match="not a pattern"):
        FolderDataset(tmp_path, "all", replace(CONFIG, images="a**.png/"))
    make(tmp_path, ("a",))
    with pytest.raises(DatasetError, match="does not hold the group"):
        FolderDataset(tmp_path, "all", CONFIG)
    (tmp_path / "more").mkdir()
    Image.new("RGB", (3, 2)).save(tmp_path / "more" / "a.png")
    with pytest.raises(DatasetError, match="two images are named a"):
        FolderDataset(tmp_path, "all", replace(CONFIG, images="*/*.png", group=""))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mpp": 0}, "mpp"),
        ({"masks": "mask/a.png"}, "stem"),
        ({"images": "../x/*.png"}, "below the folder"),
        ({"images": ""}, "below the folder"),
        ({"group": "("}, "not a regular expression"),
        ({"group": "abc"}, "parentheses"),
        ({"ignore": [0]}, "value 0"),
        ({"ignore": [70000]}, "70000"),
        ({"classes": [{"name": "A", "color": [0, 0, 0], "values": [1]}]}, "at least 2"),
        (
            {
                "classes": [
                    {"name": "Tumor", "color": [0, 0, 0], "values": [1]},
                    {"name": "tumor ", "color": [9, 9, 9], "values": [0]},
                ]
            },
            "'Tumor' and 'tumor ' differ only in case",
        ),
        ({"parts": [{"name": "a"}, {"name": "a"}]}, "same name"),
        ({"colour": 1}, "unknown key"),
    ],
)
def test_options_that_cannot_be(change: dict[str, object], message: str) -> None:
    good: dict[str, object] = {
        "images": "img/*.png",
        "masks": "mask/{stem}.png",
        "mpp": 1,
        "classes": [
            {"name": "A", "color": [0, 0, 0], "values": [1]},
            {"name": "B", "color": [9, 9, 9], "values": [0]},
        ],
    }
    from_mapping(FolderConfig, good)
    with pytest.raises(ConfigError, match=message):
        from_mapping(FolderConfig, {**good, **change})


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_configs_load(path: Path) -> None:
    assert dataset_mapping(path)["name"]


@pytest.mark.parametrize(
    ("name", "images", "groups"), [("wsss4luad", "img", 67), ("consep", "images", 27)]
)
def test_real_data(shared_data: Path, name: str, images: str, groups: int) -> None:
    root = shared_data / name
    if not root.is_dir():
        pytest.skip(f"no real data: {root} is not there")
    data = open_dataset(str(CONFIGS / f"{name}.yaml"), root, "all")
    assert len(data) == len(list((root / images).iterdir()))
    assert len(set(data.groups)) == groups
    raw = np.zeros(256, np.int64)
    folder = "mask" if name == "wsss4luad" else "seg_mask"
    for stem in data.names:
        values = np.asarray(Image.open(root / folder / f"{stem}.png"))
        raw += np.bincount(values.ravel(), minlength=256)
    counts = class_pixels(data, range(len(data))).sum(axis=0)
    np.testing.assert_array_equal(counts, raw[: len(counts)])
    assert (counts > 0).all()
    assert data[0].image.shape[:2] == data[0].mask.shape
