from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from wsiseg.classes import Classes
from wsiseg.datasets.base import class_pixels
from wsiseg.datasets.pannuke import LOW_DATA, PanNuke, PanNukeConfig, labels_of
from wsiseg.datasets.table import open_dataset
from wsiseg.errors import DatasetError, UsageError

TISSUES = ("Breast", "Colon", "Bile-duct")


def arrays(count: int, px: int, dtype: str, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, px, px, 3)).astype(dtype)
    masks = np.zeros((count, px, px, 6), dtype if dtype != "uint8" else "int32")
    for n in range(count):
        for k in range(5):
            masks[n, 2 * k : 2 * k + 2, : px // 2, k] = 300 + 10 * n + k
    masks[..., 5] = masks[..., :5].sum(-1) == 0
    types = np.array([TISSUES[n % 3] for n in range(count)])
    return {"images": images, "masks": masks, "types": types}


def make(
    root: Path,
    fold: str = "fold1",
    *,
    count: int = 4,
    px: int = 16,
    dtype: str = "float64",
    flat: bool = False,
) -> dict[str, np.ndarray]:
    made = arrays(count, px, dtype, int(fold[-1]))
    outer = root / f"Fold {fold[-1]}"
    images = root / fold if flat else outer / "images" / fold
    masks = root / fold if flat else outer / "masks" / fold
    for folder in {images, masks}:
        folder.mkdir(parents=True)
    for name, array in made.items():
        np.save((masks if name == "masks" else images) / f"{name}.npy", array)
    return made


@pytest.mark.parametrize("dtype", ["float64", "float32", "uint8"])
@pytest.mark.parametrize("flat", [False, True])
def test_both_layouts(tmp_path: Path, dtype: str, flat: bool) -> None:
    made = make(tmp_path, "fold2", dtype=dtype, flat=flat)
    data = open_dataset("pannuke", tmp_path, "fold2")
    assert (len(data), data.mpp, data.measuring) == (4, 0.25, False)
    assert data.names == ("fold2_0000", "fold2_0001", "fold2_0002", "fold2_0003")
    assert data.groups == data.names
    assert data.tissues == ("Breast", "Colon", "Bile-duct", "Breast")  # type: ignore[attr-defined]
    item = data[2]
    assert item.image.dtype == np.uint8
    assert item.instances is not None
    assert item.instances.dtype == np.int32
    np.testing.assert_array_equal(item.image, made["images"][2])
    np.testing.assert_array_equal(item.mask, slow_labels(made["masks"][2])[0])
    np.testing.assert_array_equal(data.mask(2), item.mask)
    item.image[:] = 0  # a copy: the file stays as it is
    np.testing.assert_array_equal(data[2].image, made["images"][2])


def slow_labels(channels: np.ndarray) -> tuple[np.ndarray, dict[tuple[int, int], set[int]]]:
    """Labels, and the pixels of each (channel, number), pixel by pixel."""
    height, width = channels.shape[:2]
    mask = np.full((height, width), 5)
    objects: dict[tuple[int, int], set[int]] = {}
    for y in range(height):
        for x in range(width):
            for k in range(5):
                if channels[y, x, k] > 0:
                    mask[y, x] = k
            if mask[y, x] < 5:
                key = int(mask[y, x]), int(channels[y, x, mask[y, x]])
                objects.setdefault(key, set()).add(y * width + x)
    return mask, objects


def test_classes_are_the_channels_in_the_order_of_the_paper() -> None:
    assert isinstance(PanNuke.classes, Classes)
    names = ("Neoplastic", "Inflammatory", "Connective", "Dead", "Epithelial", "Background")
    assert PanNuke.classes.names == names
    assert [c.background for c in PanNuke.classes] == [False] * 5 + [True]
    channels = np.zeros((1, 6, 6))
    for k in range(6):
        channels[0, k, k] = 1
    assert labels_of(channels)[0].tolist() == [[0, 1, 2, 3, 4, 5]]


@pytest.mark.parametrize("dtype", [np.float64, np.uint16, np.int32])
def test_labels_and_objects_against_a_slow_version(dtype: type) -> None:
    rng = np.random.default_rng(5)
    for share in (0.0, 0.3, 1.0):
        channels = np.zeros((20, 18, 6), dtype)
        inside = rng.random((20, 18, 5)) < share  # channels overlap, numbers repeat across them
        channels[..., :5] = inside * rng.integers(250, 700, (20, 18, 5))
        mask, instances = labels_of(channels)
        expected, objects = slow_labels(channels)
        np.testing.assert_array_equal(mask, expected)
        assert instances.max(initial=0) == len(objects)
        found = {}
        for (k, number), pixels in objects.items():
            (one,) = {int(instances.flat[p]) for p in pixels}
            assert int((instances == one).sum()) == len(pixels)
            found[one] = (k, number)
        assert [found[n] for n in sorted(found)] == sorted(objects)
        assert ((instances == 0) == (mask == 5)).all()


def test_more_than_255_objects_stay_apart() -> None:
    channels = np.zeros((40, 40, 6))
    channels[..., 1] = np.arange(1600).reshape(40, 40)
    mask, instances = labels_of(channels)
    assert instances.max() == 1599
    assert len(np.unique(instances)) == 1600
    assert (mask == 1).sum() == 1599


def test_arrays_stay_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, count=6)
    data = PanNuke(tmp_path, "fold1")
    for array in (data.fold.images, data.fold.masks):
        assert isinstance(array, np.memmap)
        assert array.mode == "r"
    number, path = 3, tmp_path / "Fold 1" / "images" / "fold1" / "images.npy"
    on_disk = np.load(path, mmap_mode="r+")
    on_disk[number] = 77  # seen only by who reads when asked
    on_disk.flush()
    assert (data[number].image == 77).all()
    np.testing.assert_array_equal(
        class_pixels(data, [0])[0], np.bincount(data.mask(0).ravel(), minlength=6)
    )


def test_low_data_protocol(tmp_path: Path) -> None:
    for fold, count in (("fold1", 460), ("fold3", 1140)):
        make(tmp_path, fold, count=count, px=2, dtype="uint8", flat=True)
    train, test = (PanNuke(tmp_path, part) for part in LOW_DATA)
    assert (len(train), len(test)) == (448, 1132)
    assert (train.measuring, test.measuring) == (False, True)
    assert len(set(train.names)) == 448
    assert len(set(test.names)) == 1132
    assert not set(train.names) & set(test.names)
    assert train.names == PanNuke(tmp_path, "lowdata-train").names
    assert train.names != tuple(sorted(train.names))  # the first 28 are a sample of the fold
    assert train.names[0] == f"fold1_{train.indices[0]:04d}"
    np.testing.assert_array_equal(train[0].image, train.fold.images[train.indices[0]])
    colon = PanNuke(tmp_path, "lowdata-train", PanNukeConfig(tissues=("Colon",)))
    known = zip(train.names, train.tissues, strict=True)
    assert colon.names == tuple(n for n, tissue in known if tissue == "Colon")
    make(tmp_path / "few", count=447, px=2, dtype="uint8")
    with pytest.raises(DatasetError, match="takes 448 images, but the fold has 447"):
        PanNuke(tmp_path / "few", "lowdata-train")


def test_tissues(tmp_path: Path) -> None:
    made = make(tmp_path, count=7)
    mapping = {"name": "pannuke", "tissues": ["Colon", "Bile-duct"]}
    data = open_dataset(mapping, tmp_path, "fold1")
    assert data.names == ("fold1_0001", "fold1_0002", "fold1_0004", "fold1_0005")
    np.testing.assert_array_equal(data[2].image, made["images"][4])
    np.testing.assert_array_equal(data[2].mask, labels_of(made["masks"][4])[0])
    with pytest.raises(UsageError, match=r"no tissue 'Brain' here; it has Bile-duct, Breast"):
        PanNuke(tmp_path, "fold1", PanNukeConfig(tissues=("Brain",)))


def test_what_is_missing_or_damaged_is_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no part 'train'; it has fold1"):
        PanNuke(tmp_path, "train")
    with pytest.raises(DatasetError, match=r"no such folder; .*Fold 1.*warwick"):
        PanNuke(tmp_path / "none", "fold1")
    with pytest.raises(DatasetError, match=r"fold1/images.npy: not there"):
        PanNuke(tmp_path, "fold1")
    made = make(tmp_path)
    inner = tmp_path / "Fold 1"
    with pytest.raises(DatasetError, match=r"fold2/images.npy: not there"):
        PanNuke(tmp_path, "fold2")
    masks = inner / "masks" / "fold1" / "masks.npy"
    whole = masks.read_bytes()
    for wrong in (whole[: len(whole) // 2], b"", b"PK\x03\x04 no", b"text"):
        masks.write_bytes(wrong)
        with pytest.raises(DatasetError, match=r"masks.npy: not a readable array"):
            PanNuke(tmp_path, "fold1")
    np.save(masks, made["masks"][:3])
    with pytest.raises(DatasetError, match=r"\(3, 16, 16, 6\) and types \(4,\) do not fit"):
        PanNuke(tmp_path, "fold1")
    np.save(masks, np.full_like(made["masks"], np.nan))
    with pytest.raises(DatasetError, match="masks of image 1 are no numbers"):
        PanNuke(tmp_path, "fold1").mask(1)
    np.save(masks, made["masks"].astype(str))
    with pytest.raises(DatasetError, match="must be numbers"):
        PanNuke(tmp_path, "fold1")


def test_images_of_another_range(tmp_path: Path) -> None:
    made = make(tmp_path)
    path = tmp_path / "Fold 1" / "images" / "fold1" / "images.npy"
    for wrong in (made["images"] / 255, made["images"] - 10, made["images"] * 200):
        np.save(path, wrong)
        with pytest.raises(DatasetError, match=r"image 2 has values from .*; expected 0 to 255"):
            _ = PanNuke(tmp_path, "fold1")[2]
