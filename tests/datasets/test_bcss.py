from __future__ import annotations

import csv
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest
from bcss_phantom import picture, real_codes, synthetic_codes, textures, write_bcss
from PIL import Image

from wsiseg.datasets import bcss_files
from wsiseg.datasets.base import class_pixels, grouped_split
from wsiseg.datasets.bcss import BCSS, CLASSES, BCSSConfig, patch_boxes
from wsiseg.datasets.cache import ArrayCache
from wsiseg.datasets.table import open_dataset
from wsiseg.errors import ConfigError, DatasetError, UsageError
from wsiseg.geometry import Size

TRAIN = "TCGA-A1-A0SK-DX1_xmin45749_ymin25055_MPP-0.2500.png"
TRAIN_B = "TCGA-BH-A0BL-DX1_xmin25219_ymin42847_MPP-0.2500.png"
TEST = "TCGA-S3-AA15-DX1_xmin55486_ymin28926_MPP-0.2500.png"
SMALL = BCSSConfig(patch_px=100, stride_px=50)

TABLE = {  # written out by hand, code by code, from the published grouping
    0: 255,
    1: 0,
    2: 1,
    3: 2,
    4: 3,
    5: 4,
    6: 4,
    7: 4,
    8: 4,
    9: 4,
    10: 2,
    11: 2,
    12: 4,
    13: 4,
    14: 4,
    15: 4,
    16: 4,
    17: 4,
    18: 4,
    19: 0,
    20: 0,
    21: 4,
}


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(1)
    masks = {
        TRAIN: synthetic_codes((501, 700), rng),
        TRAIN_B: synthetic_codes((420, 130), rng, (1, 2, 10, 20)),
        TEST: synthetic_codes((300, 431), rng, (1, 2, 4, 19)),
    }
    return write_bcss(tmp_path_factory.mktemp("bcss"), masks, tile_px=256)


def copied(source: Path, target: Path) -> Path:
    for path in source.rglob("*.*"):
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    return target


def raw(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def codes_folder(root: Path, codes: np.ndarray, name: str = TRAIN) -> Path:
    """A data set of one region, its RGB telling column and row."""
    for folder in ("rgbs", "masks", "meta"):
        (root / folder).mkdir(parents=True)
    y, x = np.mgrid[: codes.shape[0], : codes.shape[1]]
    rgb = np.stack([x % 256, y % 256, (x + y) % 256], axis=2).astype(np.uint8)
    Image.fromarray(rgb).save(root / "rgbs" / name)
    Image.fromarray(codes.astype(np.uint8)).save(root / "masks" / name)
    rows = "".join(f"{n}\t{i}\n" for i, n in enumerate(bcss_files.CODES))
    (root / "meta" / "gtruth_codes.tsv").write_text("label\tGT_code\n" + rows)
    return root


def test_each_of_the_22_codes_has_its_group(tmp_path: Path) -> None:
    root = codes_folder(tmp_path / "b", np.repeat(np.arange(22), 4)[None].repeat(8, 0))
    config = BCSSConfig(mpp=0.25, patch_px=200, stride_px=200)
    mask = BCSS(root, "train", config)[0].mask
    assert CLASSES.names == ("Tumour", "Stroma", "Inflammatory", "Necrosis", "Other")
    assert {c: int(mask[0, 4 * c]) for c in range(22)} == TABLE
    assert (mask == mask[0]).all()
    assert (np.diff(mask[0].reshape(22, 4)) == 0).all()


def test_real_masks_and_codes(shared_data: Path, tmp_path: Path) -> None:
    """Every pixel of every real mask, and the published code table."""
    folder = shared_data / "bcss"
    bcss_files.check_codes(folder)
    (tmp_path / "masks").symlink_to(folder / "masks")
    (tmp_path / "rgbs").symlink_to(folder / "masks")  # sizes agree, pixels are not read
    (tmp_path / "meta").symlink_to(folder / "meta")
    config = BCSSConfig(mpp=0.25, cut="rois", cache_mb=0)
    count = 0
    for part in ("train", "test"):
        data = BCSS(tmp_path, part, config)
        for i, roi in enumerate(data.rois):
            codes = raw(roi.mask)
            mask = data.mask(i)
            assert mask.shape == codes.shape
            pixels = np.bincount(codes.ravel(), minlength=22)
            groups = np.bincount(mask.ravel(), minlength=256)
            for group in (0, 1, 2, 3, 4, 255):
                assert groups[group] == sum(pixels[c] for c, g in TABLE.items() if g == group)
            assert groups.sum() == codes.size
            y, x = (np.random.default_rng(i).integers(0, n, 500) for n in codes.shape)
            assert mask[y, x].tolist() == [TABLE[int(c)] for c in codes[y, x]]
            count += 1
    assert count == 13


def test_split_of_the_official_names(shared_data: Path, tmp_path: Path) -> None:
    with (shared_data / "bcss" / "meta" / "roiBounds.csv").open(newline="") as file:
        rows = list(csv.reader(file))[1:]
    assert len(rows) == 151
    for folder in ("rgbs_colorNormalized", "masks"):
        (tmp_path / folder).mkdir()
        for slide, x, y, *_ in rows:
            name = f"{slide}_xmin{x}_ymin{y}_MPP-0.2500.png"
            Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / folder / name)
    parts = {
        p: bcss_files.find_rois(tmp_path, p, images="auto", mpp=0.5) for p in ("train", "test")
    }
    assert {p: len(r) for p, r in parts.items()} == {"train": 106, "test": 45}
    patients = {p: {r.patient for r in rois} for p, rois in parts.items()}
    assert not patients["train"] & patients["test"]
    assert len(patients["train"] | patients["test"]) == 151
    assert {p[5:7] for p in patients["test"]} == {"OL", "LL", "E2", "EW", "GM", "S3"}


def test_parts_groups_names_and_files(official: Path) -> None:
    data = open_dataset({"name": "bcss", "patch_px": 100, "stride_px": 50}, official, "train")
    assert set(data.groups) == {"TCGA-A1-A0SK", "TCGA-BH-A0BL"}
    assert len(set(data.names)) == len(data)
    assert data.files == tuple(int("A0BL" in n) for n in data.names)
    assert not data.measuring
    rest, held = grouped_split(data.groups, 0.1, 0)
    assert not {data.groups[i] for i in rest} & {data.groups[i] for i in held}
    test = open_dataset("bcss", official, "test")
    assert test.measuring
    assert test.names == (TEST.removesuffix(".png"),)
    assert test[0].image.shape == (150, 215, 3)
    assert test[0].mask.shape == (150, 215)


def test_image_is_the_area_average_and_mask_the_nearest(official: Path) -> None:
    data = BCSS(official, "train", BCSSConfig(cut="rois"))
    rgb = raw(official / "rgbs_colorNormalized" / TRAIN).astype(float)
    codes = raw(official / "masks" / TRAIN)
    height, width = 501 // 2, 700 // 2
    blocks = rgb[: 2 * height, : 2 * width].reshape(height, 2, width, 2, 3).mean((1, 3))
    item = data[0]
    assert item.image.shape == (height, width, 3)
    assert np.abs(item.image - blocks).max() <= 0.51
    four = codes[: 2 * height, : 2 * width].reshape(height, 2, width, 2)
    among = (np.vectorize(TABLE.get)(four) == item.mask[:, None, :, None]).any((1, 3))
    assert among.all()


def test_other_resolutions(official: Path) -> None:
    native = BCSS(official, "train", BCSSConfig(mpp=0.25, cut="rois"))[0]
    np.testing.assert_array_equal(native.image, raw(official / "rgbs_colorNormalized" / TRAIN))
    coarse = BCSS(official, "train", BCSSConfig(mpp=0.62, cut="rois"))
    item = coarse[0]
    assert item.image.shape == (202, 282, 3)
    assert item.mask.shape == (202, 282)
    y, x = 100, 141  # the source pixel under the centre of this one
    assert item.mask[y, x] == native.mask[int((y + 0.5) * 2.48), int((x + 0.5) * 2.48)]
    assert abs(item.image.mean() - native.image.mean()) < 0.5
    double = BCSS(official, "test", BCSSConfig(mpp=0.125))[0]
    assert double.image.shape == (600, 862, 3)
    np.testing.assert_array_equal(double.mask[::2, ::2], native_mask(official, TEST))


def native_mask(root: Path, name: str) -> np.ndarray:
    return np.vectorize(TABLE.get)(raw(root / "masks" / name))


@pytest.mark.parametrize("size", [(800, 800), (1697, 1233), (799, 2000), (2400, 1201), (5, 7)])
def test_patches_cover_the_region(size: tuple[int, int]) -> None:
    boxes = patch_boxes(Size(*size), 800, 400)
    count = np.zeros(size[::-1], int)
    for box in boxes:
        assert (box.width, box.height) == (min(800, size[0]), min(800, size[1]))
        assert min(box[:2]) >= 0
        count[box.slices] += 1
    assert count.min() >= 1
    assert count.shape == size[::-1]
    assert len(set(boxes)) == len(boxes)


def test_patches_are_cut_where_their_names_say(official: Path) -> None:
    data = BCSS(official, "train", SMALL)
    whole = BCSS(official, "train", BCSSConfig(cut="rois"))
    for i in range(0, len(data), 3):
        roi, box = data.cuts[i]
        assert data.names[i] == f"{whole.names[roi]}_x{box.x}_y{box.y}"
        np.testing.assert_array_equal(data[i].image, whole[roi].image[box.slices])
        np.testing.assert_array_equal(data[i].mask, whole[roi].mask[box.slices])
        np.testing.assert_array_equal(data.mask(i), data[i].mask)


def test_dont_care_rule_against_a_slow_version(tmp_path: Path) -> None:
    codes = np.zeros((400, 600), np.uint8)
    codes[80:150, 100:400], codes[300:, 560:] = 1, 4
    root = codes_folder(tmp_path / "b", codes)
    for limit in (0.0, 0.5, 0.9, 1.0):
        config = BCSSConfig(mpp=0.25, patch_px=100, stride_px=50, max_ignored=limit)
        expected = []
        for y in range(0, 301, 50):
            for x in range(0, 501, 50):
                ignored = sum(int(v == 0) for v in codes[y : y + 100, x : x + 100].ravel())
                if ignored <= limit * 100 * 100:
                    expected.append((x, y))
        if not expected:
            with pytest.raises(DatasetError, match="annotated; raise max_ignored"):
                BCSS(root, "train", config)
            continue
        assert [tuple(c.box[:2]) for c in BCSS(root, "train", config).cuts] == expected
    assert len(expected) == 7 * 11


def test_class_pixels_read_masks_only(official: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wsiseg.datasets.bcss.read_image", lambda roi: pytest.fail("RGB was read"))
    data = BCSS(official, "test")
    counts = class_pixels(data, [0])[0]
    mask = native_mask(official, TEST)[1::2, 1::2]
    np.testing.assert_array_equal(counts, [(mask == k).sum() for k in range(5)])
    assert counts.sum() < mask.size  # the strip outside does not count


def test_a_patch_keeps_nothing_of_its_region(official: Path) -> None:
    data = BCSS(official, "train", SMALL)
    item = data[0]
    before = data[0].image.copy()
    item.image[:], item.mask[:] = 0, 0
    np.testing.assert_array_equal(data[0].image, before)
    assert item.image.base is None
    assert item.mask.base is None


def test_regions_are_decoded_once_while_they_fit(
    official: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[str] = []
    original = bcss_files.read_image

    def counted(roi: bcss_files.Roi) -> np.ndarray:
        decoded.append(roi.name)
        return original(roi)

    monkeypatch.setattr("wsiseg.datasets.bcss.read_image", counted)
    data = BCSS(official, "train", SMALL)
    for i in [*range(len(data)), *range(len(data))]:
        _ = data[i]
    assert len(decoded) == 2
    none = BCSS(official, "train", BCSSConfig(patch_px=100, stride_px=50, cache_mb=0))
    decoded.clear()
    for i in (0, 1, 2):
        np.testing.assert_array_equal(none[i].image, data[i].image)
    assert len(decoded) == 3
    assert none.cache.held == 0


def test_cache_never_holds_more_than_its_limit() -> None:
    cache, rng = ArrayCache(1000), np.random.default_rng(0)
    sizes = {k: int(rng.integers(1, 1200)) for k in range(30)}
    alive: dict[int, weakref.ref[np.ndarray]] = {}

    def living() -> int:
        return sum(a.nbytes for ref in alive.values() if (a := ref()) is not None)

    for key in rng.integers(0, 30, 400).tolist():

        def decode(key: int = key) -> np.ndarray:
            kept = sizes[key] <= 1000
            assert living() + (sizes[key] if kept else 0) <= 1000  # room is made before
            array = np.full(sizes[key], key, np.uint8)
            alive[key] = weakref.ref(array)
            return array

        array = cache.get(key, sizes[key], decode)
        assert (array == key).all()
        assert len(array) == sizes[key]
        del array
        assert cache.held == living() <= 1000


def test_cache_gives_up_the_least_recently_used() -> None:
    cache, made = ArrayCache(3), []

    def get(key: str) -> None:
        def decode() -> np.ndarray:
            made.append(key)
            return np.zeros(1, np.uint8)

        cache.get(key, 1, decode)

    for key in "abcadabcd":  # b goes for d; c for b; d for c ... a is always recent
        get(key)
    assert "".join(made) == "abcdbcd"


def test_cache_in_threads_decodes_once_and_survives_errors() -> None:
    cache, made = ArrayCache(10_000), []

    def decode(key: int) -> np.ndarray:
        made.append(key)
        return np.full(100, key, np.uint8)

    def work() -> None:
        for key in range(50):
            assert cache.get(key, 100, lambda key=key: decode(key))[0] == key

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(made) == list(range(50))
    assert cache.held == 5000

    def broken() -> np.ndarray:
        raise DatasetError("damaged")

    with pytest.raises(DatasetError):
        cache.get("x", 100, broken)
    assert cache.get("x", 100, lambda: decode(7))[0] == 7


def test_colour_normalised_comes_first(official: Path, tmp_path: Path) -> None:
    root = copied(official, tmp_path)
    (root / "rgbs").mkdir()
    name = root / "rgbs" / TEST
    Image.fromarray(np.full((300, 431, 3), 9, np.uint8)).save(name)
    assert BCSS(root, "test")[0].image.mean() != 9
    assert (BCSS(root, "test", BCSSConfig(images="original"))[0].image == 9).all()
    (root / "rgbs_colorNormalized").rename(root / "away")
    assert (BCSS(root, "test")[0].image == 9).all()
    with pytest.raises(DatasetError, match=r"no rgbs_colorNormalized/ in it; expected .* rgbs/"):
        BCSS(root, "test", BCSSConfig(images="colour_normalised"))


def test_more_pixels_than_pillow_allows(official: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = BCSS(official, "test")[0].image
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20_000)
    monkeypatch.setattr(bcss_files, "STRIP_PX", 32)
    with pytest.raises(Image.DecompressionBombError):
        Image.open(official / "masks" / TEST)
    np.testing.assert_array_equal(BCSS(official, "test")[0].image, whole)


def test_what_is_missing_is_said(official: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no part 'val'; it has train, test"):
        BCSS(official, "val")
    with pytest.raises(DatasetError, match=r"no such folder; .*masks/.*github.com/Pathology"):
        BCSS(tmp_path / "none", "train")
    with pytest.raises(DatasetError, match="no rgbs_colorNormalized/ or rgbs/"):
        BCSS(tmp_path, "train")
    root = copied(official, tmp_path / "b")
    (root / "masks" / TEST).unlink()
    with pytest.raises(DatasetError, match=rf"masks/{TEST}: not there, though its partner is"):
        BCSS(root, "test")
    assert len(BCSS(root, "train", SMALL)) > 0  # another part
    (root / "rgbs_colorNormalized" / TEST).unlink()
    with pytest.raises(DatasetError, match="no regions of BCSS test"):
        BCSS(root, "test")
    (root / "rgbs_colorNormalized" / TRAIN).unlink()
    with pytest.raises(DatasetError, match=rf"rgbs_colorNormalized/{TRAIN}: not there"):
        BCSS(root, "train")
    (root / "meta" / "gtruth_codes.tsv").unlink()
    (root / "masks" / TRAIN).unlink()
    with pytest.raises(DatasetError, match=r"gtruth_codes.tsv: not there"):
        BCSS(root, "train")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("stroma\t2", "tumor_bed\t2", "code 2 is tumor_bed, expected stroma"),
        ("other\t21\n", "", "code 21 is not listed, expected other"),
        ("other\t21\n", "other\t21\nnew\t22\n", "code 22 is new, expected none of that number"),
        ("label\t", "name\t", "each line must have a 'label'"),
        ("stroma\t2", "stroma\ttwo", "each line must have"),
    ],
)
def test_other_meaning_of_codes(
    official: Path, tmp_path: Path, old: str, new: str, message: str
) -> None:
    root = copied(official, tmp_path)
    table = root / "meta" / "gtruth_codes.tsv"
    table.write_text(table.read_text().replace(old, new))
    with pytest.raises(DatasetError, match=message):
        BCSS(root, "test")


def test_damaged_files(official: Path, tmp_path: Path) -> None:
    root = copied(official, tmp_path)
    image, mask = root / "rgbs_colorNormalized" / TEST, root / "masks" / TEST
    good = image.read_bytes()
    image.write_bytes(good[: len(good) // 2])
    with pytest.raises(DatasetError, match=rf"{TEST}: damaged PNG \(.*download it again"):
        _ = BCSS(root, "test")[0]
    assert BCSS(root, "test").mask(0).shape == (150, 215)
    for wrong in (b"", b"<html>", good[:20]):
        image.write_bytes(wrong)
        with pytest.raises(DatasetError, match="not a readable PNG"):
            BCSS(root, "test")
    image.write_bytes(good)
    codes = raw(mask).copy()
    codes[5, 6] = 22
    Image.fromarray(codes).save(mask)
    with pytest.raises(DatasetError, match=rf"masks/{TEST}: holds the code 22; BCSS has 0 to 21"):
        _ = BCSS(root, "test")[0]
    Image.fromarray(codes).convert("RGB").save(mask)
    with pytest.raises(DatasetError, match="one 8-bit channel of codes, not RGB"):
        BCSS(root, "test").mask(0)
    Image.fromarray(codes[:-1]).save(mask)
    with pytest.raises(DatasetError, match=r"is 431 x 299 px, but .* is 431 x 300"):
        BCSS(root, "test")
    mask.rename(mask.with_name("slide1.png"))
    with pytest.raises(DatasetError, match=r"slide1.png: not a name of BCSS"):
        BCSS(root, "test")


@pytest.mark.parametrize(
    "options",
    [{"mpp": 0.0}, {"stride_px": 900}, {"stride_px": 0}, {"max_ignored": 1.1}, {"cache_mb": -1}],
)
def test_options_that_cannot_be(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        BCSSConfig(**options)  # type: ignore[arg-type]


def test_phantom_textures_tell_the_classes_apart() -> None:
    rng = np.random.default_rng(0)
    codes = np.repeat(np.array([1, 2, 3, 4, 9], np.uint8), 60)[None].repeat(300, 0)
    image = picture(codes, textures(rng, 256), rng).astype(float)
    means = image.reshape(300, 5, 60, 3).mean((0, 2))
    gaps = np.linalg.norm(means[:, None] - means, axis=2) + 1000 * np.eye(5)
    assert gaps.min() > 10


def test_phantom_from_real_masks_by_command(shared_data: Path, tmp_path: Path) -> None:
    source = tmp_path / "two"
    (source / "masks").mkdir(parents=True)
    for name in (TRAIN, TEST):
        (source / "masks" / name).symlink_to(shared_data / "bcss" / "masks" / name)
    script = Path(__file__).with_name("bcss_phantom.py")
    command = [sys.executable, str(script), str(source), str(tmp_path / "out"), "--crop", "320"]
    subprocess.run(command, check=True, capture_output=True)
    crop = real_codes(source, 320)[TRAIN]
    assert crop.shape == (320, 320)
    data = BCSS(tmp_path / "out", "train", BCSSConfig(patch_px=80, stride_px=40))
    assert len(data) == 9
    assert data[4].image.shape == (80, 80, 3)
    assert len(BCSS(tmp_path / "out", "test")) == 1
