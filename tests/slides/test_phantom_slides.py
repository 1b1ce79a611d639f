"""Synthetic slides: the same however cut, truth that fits, colours of H&E."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import openslide
import pytest
import tifffile
import tiffslide
from scipy import ndimage

from wsiseg.errors import OutputError, UsageError
from wsiseg.geometry import Box, Size
from wsiseg.slides.phantom import render_phantom, write_phantom
from wsiseg.slides.phantom_brush import Style, paint

SIZE = Size(1101, 743)


def whole() -> tuple[np.ndarray, np.ndarray]:
    return render_phantom(Box(0, 0, *SIZE), SIZE, mpp=0.5, seed=5)


def test_rendering_does_not_depend_on_the_cut() -> None:
    rgb, labels = whole()
    for box in (
        Box(0, 0, 1, 1),
        Box(250, 251, 300, 77),
        Box(1023, 500, 78, 243),
        Box(511, 0, 2, 743),
    ):
        part, marks = render_phantom(box, SIZE, mpp=0.5, seed=5)
        assert np.array_equal(part, rgb[box.slices])
        assert np.array_equal(marks, labels[box.slices])


def test_places_far_out_are_glass() -> None:
    rgb, labels = render_phantom(Box(-900, -900, 50, 40), SIZE, mpp=0.5, seed=5)
    assert rgb.shape == (40, 50, 3)
    assert not labels.any()
    assert rgb.min() > 225


def test_the_seed_decides() -> None:
    box = Box(300, 200, 200, 200)
    first = render_phantom(box, SIZE, mpp=0.5, seed=5)[0]
    render_phantom(box, SIZE, mpp=0.5, seed=6)
    assert np.array_equal(render_phantom(box, SIZE, mpp=0.5, seed=5)[0], first)
    assert not np.array_equal(render_phantom(box, SIZE, mpp=0.5, seed=6)[0], first)


def test_it_looks_like_stained_tissue_with_crypts() -> None:
    size = Size(2000, 1500)
    rgb, labels = render_phantom(Box(0, 0, *size), size, mpp=0.5, seed=1)
    shares = np.bincount(labels.ravel(), minlength=3) / labels.size
    assert shares[0] > 0.1
    assert shares[1] > 0.2
    assert shares[2] > 0.1
    glass, stroma, gland = (rgb[labels == i].mean(0) for i in range(3))
    assert glass.min() > 235
    for colour, low, high in (
        (stroma, (180, 95, 180), (225, 150, 215)),
        (gland, (170, 85, 170), (220, 150, 215)),
    ):
        assert (colour > low).all()
        assert (colour < high).all()
    parts, count = ndimage.label(labels == 2)
    inner = [s for i, s in enumerate(ndimage.find_objects(parts), 1) if (parts == i).sum() > 2000]
    assert count >= 12
    widths = [(s[1].stop - s[1].start) * 0.5 for s in inner]
    assert 40 < np.median(widths) < 160


def test_glands_have_a_dark_rim_and_a_pale_lumen() -> None:
    rgb, labels = whole()
    depth = ndimage.distance_transform_edt(np.pad(labels == 2, 1))[1:-1, 1:-1] * 0.5
    green = rgb[..., 1]
    rim, middle = green[(depth > 2) & (depth < 7)].mean(), green[depth > 27].mean()
    assert rim < 110
    assert middle > 180


@pytest.mark.parametrize("goblet", [0.0, 1.0])
def test_any_label_map_can_be_painted(goblet: float) -> None:
    labels = np.zeros((150, 200), np.uint8)
    labels[20:130, 30:] = 1
    labels[50:100, 60:140] = 2
    image = paint(labels, mpp=0.5, rng=np.random.default_rng(0), style=Style(goblet, 12))
    again = paint(labels, mpp=0.5, rng=np.random.default_rng(0), style=Style(goblet, 12))
    assert image.shape == (150, 200, 3)
    assert image.dtype == np.uint8
    assert np.array_equal(image, again)
    assert image[:15].mean() > 235
    assert image[20:130, 150:].mean() < 210


def test_a_wrapped_texture_fits_itself() -> None:
    texture = paint(np.ones((128, 128), np.uint8), mpp=0.5, rng=np.random.default_rng(1), wrap=True)
    values = texture.astype(int)
    inner = np.abs(np.diff(values, axis=1)).mean()
    seam = np.abs(values[:, 0] - values[:, -1]).mean()
    assert seam < 1.6 * inner


def test_file_opens_everywhere_with_the_right_scale(phantom: Path) -> None:
    with openslide.OpenSlide(phantom) as slide:
        assert slide.level_dimensions == ((1101, 743), (551, 372), (276, 186))
        assert slide.properties["openslide.vendor"] == "generic-tiff"
        assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(0.5, rel=1e-6)
        assert slide.properties["openslide.level[0].tile-width"] == "256"
        image = np.asarray(slide.read_region((0, 0), 0, SIZE))[..., :3].astype(int)
        half = np.asarray(slide.read_region((0, 0), 1, (550, 371)))[..., :3].astype(int)
    rgb = whole()[0].astype(int)
    assert np.abs(image - rgb).mean() < 5
    means = rgb[:742, :1100].reshape(371, 2, 550, 2, 3).mean((1, 3))
    assert np.abs(half - means).mean() < 4
    with tiffslide.TiffSlide(phantom) as slide:
        assert slide.level_dimensions == ((1101, 743), (551, 372), (276, 186))
        assert slide.properties["tiffslide.mpp-x"] == pytest.approx(0.5, rel=1e-6)


def test_truth_is_exact_at_every_level(phantom: Path) -> None:
    labels = whole()[1]
    with tifffile.TiffFile(phantom.with_name("truth.tif")) as tiff:
        assert len(tiff.pages) == 3
        for level, page in enumerate(tiff.pages):
            assert np.array_equal(page.asarray(), labels[:: 2**level, :: 2**level])


def test_same_arguments_same_bytes(tmp_path: Path) -> None:
    for name in ("a.tif", "b.tif"):
        write_phantom(tmp_path / name, Size(300, 200), seed=2, mpp=1.0)
    assert (tmp_path / "a.tif").read_bytes() == (tmp_path / "b.tif").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tif", "b.tif"]


def test_sizes_around_a_tile(tmp_path: Path) -> None:
    for size in (Size(1, 1), Size(256, 257), Size(513, 255)):
        path = tmp_path / "a.tif"
        write_phantom(path, size, truth=tmp_path / "t.tif")
        with openslide.OpenSlide(path) as slide:
            assert slide.dimensions == size
            assert np.asarray(slide.read_region((0, 0), 0, size)).shape == (
                size.height,
                size.width,
                4,
            )
        truth = tifffile.imread(tmp_path / "t.tif")
        expected = render_phantom(Box(0, 0, *size), size, mpp=0.5, seed=0)[1]
        assert np.array_equal(truth, expected)


def test_bad_requests(tmp_path: Path) -> None:
    for options in ({"mpp": 0.0}, {"mpp": 9.0}, {"seed": -1}, {"truth": tmp_path / "a.tif"}):
        with pytest.raises(UsageError):
            write_phantom(tmp_path / "a.tif", Size(10, 10), **options)
    with pytest.raises(UsageError):
        write_phantom(tmp_path / "a.tif", Size(0, 10))
    with pytest.raises(OutputError, match="does not exist"):
        write_phantom(tmp_path / "none" / "a.tif", Size(10, 10))
    with pytest.raises(OutputError, match="is a folder"):
        write_phantom(tmp_path, Size(10, 10))
    assert not list(tmp_path.iterdir())


def test_nothing_is_left_after_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> bytes:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("wsiseg.slides.phantom.imagecodecs.jpeg8_encode", full)
    with pytest.raises(OutputError, match="No space left"):
        write_phantom(tmp_path / "a.tif", Size(300, 300))
    assert not list(tmp_path.iterdir())
