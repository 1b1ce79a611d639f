"""Which library opens what, and what bad files say."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from wsiseg.errors import ResolutionError, SlideError, SlideReadError, UsageError
from wsiseg.geometry import Box
from wsiseg.slides import backends, open_slide
from wsiseg.slides.backends import file_digest
from wsiseg.slides.tiffslide_backend import _level0


def picture(height: int = 300, width: int = 400) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return np.stack([x % 256, y % 256, (x + y) % 256], -1).astype(np.uint8)


def write_subifds(path: Path, image: np.ndarray) -> None:
    """An OME-TIFF pyramid whose reduced levels are SubIFDs."""
    with tifffile.TiffWriter(path, ome=True) as tiff:
        options = {"tile": (64, 64), "photometric": "rgb"}
        sizes = {"PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5}
        metadata = {"axes": "YXS", "PhysicalSizeXUnit": "µm", "PhysicalSizeYUnit": "µm", **sizes}
        tiff.write(image, subifds=2, metadata=metadata, **options)
        tiff.write(image[::2, ::2], subfiletype=1, **options)
        tiff.write(image[::4, ::4], subfiletype=1, **options)


def test_ome_pyramid_opens_with_all_levels(tmp_path: Path) -> None:
    path = tmp_path / "a.ome.tif"
    write_subifds(path, picture())
    with open_slide(path) as slide:
        assert (slide.backend, len(slide.level_sizes)) == ("tiffslide", 3)
        assert (slide.mpp, slide.mpp_source) == (0.5, "properties")
        grid = slide.grid(0.5)
        assert np.array_equal(slide.read(grid.box, grid), picture())
    with open_slide(path, backend="openslide", mpp=0.5) as slide:
        assert (slide.backend, len(slide.level_sizes)) == ("openslide", 1)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif"])
def test_plain_images(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    Image.fromarray(picture()).save(path)
    with pytest.raises(ResolutionError, match="--mpp"):
        open_slide(path)
    with open_slide(path, mpp=0.62) as slide:
        assert (slide.backend, slide.vendor, slide.size) == ("image", "image", (400, 300))
        assert len(slide.quickhash) == 64
        grid = slide.grid(0.62)
        wrong = np.abs(slide.read(grid.box, grid).astype(int) - picture())
        assert wrong.mean() < (8 if name == "a.jpg" else 1e-9)


def test_resolution_tags_of_a_plain_tiff(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, picture(), resolution=(20000, 20000), resolutionunit="CENTIMETER")
    with open_slide(path) as slide:
        assert (slide.backend, slide.mpp, slide.mpp_source) == ("image", 0.5, "tiff resolution")
    tifffile.imwrite(path, picture(), resolution=(72, 72), resolutionunit="INCH")
    with pytest.raises(ResolutionError):
        open_slide(path)


def test_transparent_pixels_are_white(tmp_path: Path) -> None:
    rgba = np.dstack([picture(), np.full((300, 400), 255, np.uint8)])
    rgba[:100, :, 3] = 0
    rgba[100:200, :, 3] = 128
    path = tmp_path / "a.png"
    Image.fromarray(rgba).save(path)
    with open_slide(path, mpp=1) as slide:
        image = slide.read(Box(0, 0, 400, 300), slide.grid(1)).astype(int)
    assert (image[:100] == 255).all()
    mixed = (picture()[100:200] * 128.0 + 255 * 127) / 255
    assert np.abs(image[100:200] - mixed).max() <= 1
    assert np.array_equal(image[200:], picture()[200:])


def test_grey_images_and_tiled_grey_slides(tmp_path: Path) -> None:
    grey = picture()[..., 0]
    Image.fromarray(grey).save(tmp_path / "a.png")
    tifffile.imwrite(tmp_path / "a.tif", grey, tile=(64, 64))
    for name, backend in (("a.png", "auto"), ("a.tif", "auto"), ("a.tif", "tiffslide")):
        with open_slide(tmp_path / name, mpp=1, backend=backend) as slide:
            image = slide.read(Box(0, 0, 400, 300), slide.grid(1))
        assert np.array_equal(image, np.repeat(grey[..., None], 3, 2))


def test_deep_images_are_refused(tmp_path: Path) -> None:
    deep = picture()[..., 0].astype(np.uint16) * 200
    Image.fromarray(deep).save(tmp_path / "a.png")
    tifffile.imwrite(tmp_path / "b.tif", deep, tile=(64, 64))
    for name, backend in (("a.png", "auto"), ("b.tif", "tiffslide")):
        with pytest.raises(SlideError, match="8-bit"):
            open_slide(tmp_path / name, mpp=1, backend=backend)


def test_huge_plain_images_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(picture()).save(path)
    limit = Image.MAX_IMAGE_PIXELS
    monkeypatch.setattr("wsiseg.slides.image_file.MAX_IMAGE_PX", 100_000)
    with pytest.raises(SlideError, match=r"too large .* convert it to a pyramidal TIFF"):
        open_slide(path, mpp=1)
    assert limit == Image.MAX_IMAGE_PIXELS


def test_a_chosen_backend_is_never_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(picture()).save(path)
    for backend in ("openslide", "tiffslide"):
        with pytest.raises(SlideError, match=f"{backend} does not read"):
            open_slide(path, mpp=1, backend=backend)
    with pytest.raises(UsageError, match="no backend"):
        open_slide(path, backend="vips")


def test_missing_empty_text_and_folder(tmp_path: Path) -> None:
    (tmp_path / "empty.svs").touch()
    (tmp_path / "text.svs").write_text("not a slide\n" * 100)
    (tmp_path / "folder").mkdir()
    for name, words in (
        ("none.svs", "no such file"),
        ("empty.svs", "empty"),
        ("text.svs", "not a slide or image"),
        ("folder", "without a DICOM slide"),
    ):
        with pytest.raises(SlideError, match=words) as e:
            open_slide(tmp_path / name)
        assert str(tmp_path / name) in str(e.value)
        assert "\n" not in str(e.value)


@pytest.mark.parametrize("share", [0.001, 0.05, 0.5, 0.9, 0.9999])
@pytest.mark.parametrize("backend", ["auto", "openslide", "tiffslide"])
def test_truncated_phantom(phantom: Path, tmp_path: Path, share: float, backend: str) -> None:
    data = phantom.read_bytes()
    path = tmp_path / "cut.tif"
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(SlideError, match="copy it again"):
        open_slide(path, backend=backend)


@pytest.mark.parametrize("share", [0.1, 0.6, 0.99])
def test_truncated_svs(shared_data: Path, tmp_path: Path, share: float) -> None:
    data = (shared_data / "slides" / "CMU-1-Small-Region.svs").read_bytes()
    path = tmp_path / "cut.svs"
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(SlideError, match="cut short"):
        open_slide(path)


def test_a_damaged_tile_names_slide_and_place(phantom: Path, tmp_path: Path) -> None:
    data = bytearray(phantom.read_bytes())
    with tifffile.TiffFile(phantom) as tiff:
        offset, length = tiff.pages[0].dataoffsets[6], tiff.pages[0].databytecounts[6]
    data[offset : offset + length] = bytes(length)
    path = tmp_path / "damaged.tif"
    path.write_bytes(data)
    with open_slide(path, backend="openslide") as slide:
        grid = slide.grid(slide.mpp)
        slide.read(Box(0, 0, 256, 256), grid)
        with pytest.raises(
            SlideReadError, match=r"damaged\.tif: cannot read level 0 at x=300 y=300"
        ):
            slide.read(Box(300, 300, 50, 50), grid)


def test_truncated_png(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(picture()).save(path)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(SlideError, match="damaged image"):
        open_slide(path, mpp=1)


def test_dicom(shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "slides" / "dicom"
    with open_slide(folder / "camelyon_overview.dcm") as slide:
        assert (slide.vendor, slide.size) == ("dicom", (1152, 700))
        assert slide.mpp == pytest.approx(28.9685)
    with pytest.raises(SlideError, match="holds 2 DICOM slides"):
        open_slide(folder)
    copy = tmp_path / "case"
    copy.mkdir()
    (copy / "a.dcm").write_bytes((folder / "cmu1_small_jpeg.dcm").read_bytes())
    with open_slide(copy) as slide:
        assert slide.size == (957, 715)
        assert slide.read(Box(0, 0, 5, 5), slide.grid(slide.mpp)).shape == (5, 5, 3)


def test_the_digest_tells_images_apart_that_differ_in_the_middle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [tmp_path / "a.tif", tmp_path / "b.tif"]
    for k, path in enumerate(paths):
        image = np.zeros((1500, 1500, 3), np.uint8)
        image[700:710] = k
        tifffile.imwrite(path, image)
    assert paths[0].stat().st_size == paths[1].stat().st_size > 4 << 20
    assert file_digest(paths[0]) != file_digest(paths[1])
    monkeypatch.setattr(backends, "_HASHED_WHOLE", 1 << 20)  # by samples, which meet here
    backends._digest.cache_clear()
    assert file_digest(paths[0]) != file_digest(paths[1])
    assert file_digest(paths[0]) == file_digest(paths[0])


def test_tiffslide_is_asked_for_the_pixel_that_it_is_to_give() -> None:
    rng = np.random.default_rng(0)
    for _ in range(2000):
        level0, level = int(rng.integers(2000, 60_000)), int(rng.integers(100, 2000))
        downsample = level0 / level
        for start in rng.integers(0, level, 20):
            assert int(_level0(int(start), downsample) / downsample) == start
    assert int(_level0(462, 16.0025) / 16.0025) == 462


def test_an_image_is_hashed_once_until_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(picture()).save(path)
    first = file_digest(path)
    with monkeypatch.context() as patch:
        patch.setattr(backends.hashlib, "sha256", None)  # type: ignore[attr-defined]
        assert file_digest(path) == first
    Image.fromarray(picture() // 2).save(path)
    assert file_digest(path) != first


def test_an_ome_tiff_in_strips_states_its_micrometres(tmp_path: Path) -> None:
    path = tmp_path / "a.ome.tif"
    sizes = {"PhysicalSizeX": 0.25, "PhysicalSizeY": 0.25}
    units = {"PhysicalSizeXUnit": "\N{MICRO SIGN}m", "PhysicalSizeYUnit": "\N{MICRO SIGN}m"}
    tifffile.imwrite(path, picture(), photometric="rgb", metadata={"axes": "YXS", **sizes, **units})
    with open_slide(path) as slide:
        assert (slide.backend, slide.mpp, slide.mpp_source) == ("image", 0.25, "properties")


def test_compressions_that_openslide_does_not_read(tmp_path: Path) -> None:
    path, other = tmp_path / "a.tif", tmp_path / "b.tif"
    options = {"photometric": "rgb", "tile": (64, 64)}
    lossless = {"compressionargs": {"reversible": True, "level": 0}}
    tifffile.imwrite(path, picture(), compression="jpeg2000", **lossless, **options)
    with open_slide(path, mpp=0.5) as slide:
        assert slide.backend == "tiffslide"
        grid = slide.grid(0.5)
        assert np.array_equal(slide.read(grid.box, grid), picture())
    tifffile.imwrite(other, picture(), compression="webp", **options)
    with pytest.raises(SlideError, match="compression 50001 is not read; convert it to JPEG"):
        open_slide(other, mpp=0.5)


@pytest.mark.parametrize(
    ("photometric", "compression"), [("rgb", None), ("rgb", "jpeg"), ("minisblack", None)]
)
def test_tiles_that_are_not_there_are_white(
    tmp_path: Path, photometric: str, compression: str | None
) -> None:
    colours = (3,) * (photometric == "rgb")
    tiles = [np.full((64, 64, *colours), 90, np.uint8), None]
    path = tmp_path / "a.tif"
    options = {"tile": (64, 64), "photometric": photometric, "compression": compression}
    with tifffile.TiffWriter(path) as tiff:
        for times, more in ((2, {"subifds": 1}), (1, {"subfiletype": 1})):
            shape = (64 * times, 128 * times, *colours)
            tiff.write(iter(tiles * times**2), shape=shape, dtype="uint8", **more, **options)
    with closing(backends.open_backend(path, "tiffslide")) as slide:
        assert len(slide.level_sizes) == 2
        for level, size in enumerate(slide.level_sizes):
            pixels = slide.read_level(level, Box(0, 0, *size)).reshape(size.height, -1, 128, 3)
            assert (pixels[:, :, :64] == 90).all()
            assert (pixels[:, :, 64:] == 255).all()
