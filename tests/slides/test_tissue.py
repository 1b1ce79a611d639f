"""Tissue detection and its mask."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageDraw, ImageFilter
from scipy import ndimage

from wsiseg.errors import SlideError
from wsiseg.geometry import Box, Grid, Size
from wsiseg.slides import open_slide
from wsiseg.slides.phantom import render_phantom
from wsiseg.slides.tissue import TissueMask, detect, find_tissue

PINK = (205, 130, 195)
INKS = {"green": (20, 120, 60), "blue": (30, 50, 170), "red": (215, 30, 40), "black": (25, 25, 30)}


def scene(size: tuple[int, int] = (400, 300)) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """Glass with a stained disc around (200, 150) of radius 80 px."""
    image = Image.new("RGB", size, (244, 243, 245))
    draw = ImageDraw.Draw(image)
    draw.ellipse((120, 70, 280, 230), fill=PINK)
    return image, draw


def found(image: Image.Image, mpp: float = 8.0) -> np.ndarray:
    noise = np.random.default_rng(0).normal(0, 2, (image.height, image.width, 3))
    soft = np.asarray(image.filter(ImageFilter.GaussianBlur(1))).astype(float)
    return detect(np.clip(soft + noise, 0, 255).astype(np.uint8), mpp=mpp)


def disc() -> np.ndarray:
    y, x = np.mgrid[:300, :400]
    return np.hypot(x - 200, y - 150) <= 80


def iou(a: np.ndarray, b: np.ndarray) -> float:
    return (a & b).sum() / (a | b).sum()


def test_stained_tissue_on_glass() -> None:
    assert iou(found(scene()[0]), disc()) > 0.93


def test_faint_tissue_is_kept() -> None:
    image, draw = scene()
    draw.ellipse((120, 70, 280, 230), fill=(238, 222, 234))
    assert iou(found(image), disc()) > 0.93


def test_glass_alone_has_no_tissue() -> None:
    for colour in ((255, 255, 255), (244, 243, 245), (225, 228, 224)):
        assert not found(Image.new("RGB", (300, 200), colour)).any()


def test_tissue_alone_is_all_tissue() -> None:
    rng = np.random.default_rng(1)
    texture = ndimage.gaussian_filter(rng.normal(0, 1, (60, 80)), 1.5)[..., None] * 60
    image = np.clip(np.array(PINK) + texture * (1, 1.4, 0.8), 0, 255).astype(np.uint8)
    assert detect(image, mpp=8.0).mean() > 0.97


@pytest.mark.parametrize("ink", INKS)
def test_ink_is_not_tissue(ink: str) -> None:
    image, draw = scene()
    draw.line((20, 260, 200, 285), fill=INKS[ink], width=9)
    draw.line((300, 20, 380, 120), fill=INKS[ink], width=12)
    mask = found(image)
    marks = Image.new("L", image.size)
    pen = ImageDraw.Draw(marks)
    pen.line((20, 260, 200, 285), fill=255, width=9)
    pen.line((300, 20, 380, 120), fill=255, width=12)
    assert mask[np.asarray(marks) > 0].mean() < 0.02
    assert iou(mask, disc()) > 0.9


@pytest.mark.parametrize("ink", ["green", "blue", "black"])
def test_ink_across_tissue_leaves_the_rest(ink: str) -> None:
    image, draw = scene()
    draw.line((100, 150, 300, 150), fill=INKS[ink], width=9)
    mask = found(image)
    assert mask[147:153, 130:270].mean() < 0.02
    assert mask[disc()].mean() > 0.8


def test_black_borders_are_not_tissue() -> None:
    image, draw = scene()
    draw.rectangle((0, 0, 400, 20), fill=(4, 4, 4))
    draw.rectangle((0, 0, 12, 300), fill=(0, 0, 0))
    mask = found(image)
    assert not mask[:21].any()
    assert iou(mask, disc()) > 0.9


def test_a_blue_stain_is_not_ink() -> None:
    image, draw = scene()
    draw.ellipse((120, 70, 280, 230), fill=(60, 110, 190))
    assert iou(found(image), disc()) > 0.9


@pytest.mark.parametrize("ink", ["green", "blue", "red"])
def test_a_thick_ring_of_a_pen_around_a_biopsy_is_ink(ink: str) -> None:
    image, draw = scene()
    draw.rectangle((0, 0, *image.size), fill=(244, 243, 245))
    draw.ellipse((180, 130, 220, 170), fill=PINK)
    draw.ellipse((80, 30, 320, 270), outline=INKS[ink], width=16)
    mask = found(image)
    assert mask[130:171, 180:221].sum() > 1200
    assert mask.sum() < 2 * mask[130:171, 180:221].sum()


def test_a_blue_stain_beside_a_red_pen_is_not_ink() -> None:
    image, draw = scene()
    draw.ellipse((120, 70, 280, 230), fill=(60, 110, 190))
    draw.line((20, 260, 200, 285), fill=INKS["red"], width=9)
    assert iou(found(image), disc()) > 0.9


def test_a_stain_among_another_is_not_ink() -> None:
    image, draw = scene()
    for x in range(140, 261, 20):  # fibres of a trichrome in the tissue
        draw.line((x, 100, x, 200), fill=(60, 110, 190), width=16)
    assert iou(found(image), disc()) > 0.9


def test_specks_go_and_small_holes_fill() -> None:
    image, draw = scene()
    draw.ellipse((30, 30, 34, 34), fill=PINK)
    draw.ellipse((190, 140, 206, 156), fill=(244, 243, 245))
    mask = found(image)
    assert not mask[20:45, 20:45].any()
    assert mask[148, 198]


def test_phantom_tissue_fits_its_truth(phantom: Path) -> None:
    with open_slide(phantom) as slide:
        tissue = find_tissue(slide)
        grid = slide.grid(slide.mpp)
        mask = tissue.region(grid.box, grid)
        assert tissue.area_mm2 == pytest.approx(tissue.fraction * 1101 * 743 * 0.25e-6, rel=1e-4)
    size = Size(1101, 743)
    labels = render_phantom(Box(0, 0, *size), size, mpp=0.5, seed=5)[1]
    assert mask[labels > 0].mean() > 0.99
    away_um = ndimage.distance_transform_edt(labels == 0) * 0.5
    assert not mask[away_um > 35].any()


def test_region_and_covers_do_not_depend_on_the_split() -> None:
    rng = np.random.default_rng(2)
    tissue = TissueMask(rng.random((23, 31)) < 0.1, 1e6)
    for size in (Size(310, 230), Size(17, 12), Size(97, 71), Size(31, 23)):
        grid = Grid(size, 1.0, 1.0, size)
        whole = tissue.region(grid.box, grid)
        for y in range(0, size.height, 7):
            for x in range(0, size.width, 5):
                box = Box(x, y, 5, 7).intersection(grid.box)
                assert np.array_equal(tissue.region(box, grid), whole[box.slices])
                rows = {
                    int(v * 23 / size.height) for v in np.linspace(box.y, box.bottom - 1e-6, 50)
                }
                cols = {int(v * 31 / size.width) for v in np.linspace(box.x, box.right - 1e-6, 50)}
                touched = tissue.mask[np.ix_(sorted(rows), sorted(cols))].any()
                assert tissue.covers(box, grid) == touched
    assert np.array_equal(tissue.region(grid.box, grid), tissue.mask)
    outside = tissue.region(Box(-2, -3, 4, 5), grid)
    assert not outside[:3].any()
    assert np.array_equal(outside[3:, 2:], tissue.mask[:2, :2])
    assert not tissue.covers(Box(500, 500, 4, 4), grid)


def test_none_takes_everything(phantom: Path) -> None:
    with open_slide(phantom) as slide:
        tissue = find_tissue(slide, "none")
        assert tissue.fraction == 1.0
        assert tissue.grid_size == slide.grid(8.0).size


def test_mask_files(phantom: Path, tmp_path: Path) -> None:
    path = tmp_path / "mask.png"
    mask = np.zeros((74, 110), np.uint8)
    mask[10:40, 20:60] = 1
    Image.fromarray(mask).save(path)
    with open_slide(phantom) as slide:
        tissue = find_tissue(slide, path)
        assert np.array_equal(tissue.mask, mask > 0)
        Image.fromarray(mask).convert("LA").save(path)
        assert np.array_equal(find_tissue(slide, str(path)).mask, mask > 0)
        for image, words in (
            (np.zeros((74, 110), np.uint8), "black everywhere"),
            (np.ones((74, 120), np.uint8), "another shape"),
        ):
            Image.fromarray(image).save(path)
            with pytest.raises(SlideError, match=words):
                find_tissue(slide, path)
        path.write_text("nothing")
        with pytest.raises(SlideError, match="not a readable tissue mask"):
            find_tissue(slide, path)
        with pytest.raises(SlideError, match="no such tissue mask"):
            find_tissue(slide, tmp_path / "none.png")


@pytest.mark.parametrize("kind", ["white palette", "black palette", "probabilities", "16 bit"])
def test_masks_of_any_kind_say_where_the_tissue_is(tmp_path: Path, kind: str) -> None:
    wanted = np.zeros((30, 40), bool)
    wanted[5:15, 10:30] = True
    path = tmp_path / "mask.tif"
    if kind.endswith("palette"):
        image = Image.fromarray(wanted.astype(np.uint8) ^ (kind == "black palette"))
        image = image.convert("P")
        first = (255, 255, 255)
        image.putpalette([*first, *((200, 0, 0) if kind == "white palette" else (0, 0, 0))])
    else:
        dtype = np.float32 if kind == "probabilities" else np.uint16
        image = Image.fromarray(wanted.astype(dtype) * dtype(0.4 if dtype == np.float32 else 300))
    image.save(path)
    Image.new("RGB", (400, 300), (230, 200, 220)).save(tmp_path / "slide.png")
    with open_slide(tmp_path / "slide.png", mpp=0.5) as slide:
        found = find_tissue(slide, path)
    assert np.array_equal(found.mask, wanted)


def test_samples_of_12_bits_in_16_are_no_slide_without_tissue(tmp_path: Path) -> None:
    rng = np.random.default_rng(6)
    pixels = rng.integers(1500, 4000, (300, 400, 3)).astype(np.uint16)
    pixels[:2, :10] = 65535  # hot pixels
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="rgb")
    tifffile.imwrite(tmp_path / "b.tif", pixels * 16, photometric="rgb")
    with open_slide(tmp_path / "a.tif", mpp=0.5) as slide:
        with pytest.raises(SlideError, match=r"dark all over .* --tissue none"):
            find_tissue(slide)
        assert find_tissue(slide, "none").fraction == 1
    with open_slide(tmp_path / "b.tif", mpp=0.5) as slide:
        find_tissue(slide)


def test_real_slides(shared_data: Path) -> None:
    folder = shared_data / "slides"
    for name, mpp, low, high in (
        ("TCGA-CR-7395-01A-01-TS1.svs", 0.5, 0.55, 0.75),
        ("CMU-1-Small-Region.svs", None, 0.3, 0.5),
    ):
        with open_slide(folder / name, mpp=mpp) as slide:
            assert low < find_tissue(slide).fraction < high


def test_a_patch_full_of_tissue(shared_data: Path) -> None:
    with open_slide(shared_data / "glas" / "train_1.png", mpp=0.62005) as slide:
        assert find_tissue(slide).fraction > 0.9
