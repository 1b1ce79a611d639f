"""Which files of a source are used: those that can be decoded, at a resolution that can be."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image
from touching import Touching, grey_images, sequence, stored

from wsiseg.errors import ConfigError, DatasetError
from wsiseg.geometry import Size
from wsiseg.slides.phantom import write_phantom
from wsiseg.training.background import Background, BackgroundConfig
from wsiseg.training.tiles import Pools, SourceConfig, load_pools, warn_of_small

SCALE = (0.75, 1.33)


def load(root: Path, *sources: SourceConfig, **options: Any) -> Pools:
    return load_pools(sources, root, **{"mpp": 0.5, **options})


def paint(path: Path, size: tuple[int, int] = (60, 40), **options: Any) -> Path:
    path.parent.mkdir(exist_ok=True)
    noise = np.random.default_rng(1).integers(0, 255, (size[1], size[0], 3), np.uint8)
    Image.fromarray(noise).save(path, **options)
    return path


def cut(path: Path) -> None:
    """Leave the first half of a file, with its header."""
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def names(pools: Pools, side: str) -> list[list[str]]:
    pool = getattr(pools, side)
    return [[f.path.name for f in group] for group in pool.groups]


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """Two sources of JPEG files."""
    for source, count in (("a", 12), ("b", 6)):
        for number in range(count):
            paint(tmp_path / source / f"{number:02d}.jpg")
    return tmp_path


TWO = (SourceConfig("a/*.jpg"), SourceConfig("b/*.jpg"))


def test_a_damaged_file_alone_held_out_ends_the_run_before_it_begins(two: Path) -> None:
    sound = load(two, *TWO, validation_share=0.1)
    assert [len(g) for g in names(sound, "held_out")] == [2, 1]
    (name,) = names(sound, "held_out")[1]
    cut(two / "b" / name)
    with pytest.raises(DatasetError) as caught:
        load(two, *TWO, validation_share=0.1)
    said = str(caught.value)
    assert "source b/*.jpg: none of its 1 held-out files can be read; " in said
    assert f"{name}: not a readable image" in said
    assert said.endswith("leave it out with exclude")
    without = SourceConfig("b/*.jpg", exclude=name)
    assert len(names(load(two, TWO[0], without, validation_share=0.1), "held_out")[1]) == 1


@pytest.mark.parametrize("side", ["held_out", "training"])
def test_damaged_files_are_left_out_until_one_is_read(two: Path, side: str) -> None:
    sound = load(two, *TWO, validation_share=0.5)
    first, second, *rest = names(sound, side)[1]
    cut(two / "b" / first)
    cut(two / "b" / rest[-1])
    with pytest.warns(UserWarning, match=r"it is left out; exclude of source b/\*\.jpg") as caught:
        pools = load(two, *TWO, validation_share=0.5)
    assert len(caught) == 1
    assert first in str(caught[0].message)
    assert names(pools, side) == [names(sound, side)[0], [second, *rest]]
    other = "training" if side == "held_out" else "held_out"
    assert names(pools, other) == names(sound, other)


def test_a_damaged_file_is_left_out_of_all_sources(two: Path) -> None:
    cut(two / "a" / "00.jpg")
    with pytest.warns(UserWarning, match=r"00\.jpg") as caught:
        pools = load(two, SourceConfig("[ab]/0[5-9].jpg"), TWO[0], SourceConfig("a/0[01].jpg"))
    assert len(caught) == 1
    assert not any("00.jpg" in group for group in names(pools, "training"))
    with (
        warnings.catch_warnings(action="ignore"),
        pytest.raises(DatasetError, match=r"source a/00\.jpg: none of its 1 training files"),
    ):
        load(two, TWO[0], SourceConfig("a/00.jpg"))


@pytest.mark.parametrize("mpp", [1000.0, 250.0, 10.0])
def test_a_resolution_in_nanometres_is_refused(tmp_path: Path, mpp: float) -> None:
    paint(tmp_path / "a.png", (32, 32))
    with pytest.raises(DatasetError) as caught:
        load(tmp_path, SourceConfig("*.png", mpp=mpp))
    said = str(caught.value)
    assert f"a.png: {mpp:g} um per pixel is too coarse to be read at 0.5" in said
    assert f"{32 * mpp / 0.5:.0f} x" in said
    assert "set mpp of its source right, in micrometres" in said


def test_an_image_that_would_fill_the_memory_is_refused(tmp_path: Path) -> None:
    paint(tmp_path / "a.png", (4000, 2000))
    with pytest.raises(DatasetError, match="makes 32000 x 16000 px of 4000 x 2000"):
        load(tmp_path, SourceConfig("*.png", mpp=4.0))


def test_resolutions_that_none_has(tmp_path: Path) -> None:
    for mpp in (0.0, -1.0, 1e-6, 2000.0, float("nan")):
        with pytest.raises(ConfigError, match=r"source a\.png: mpp must be between 0\.01 and 1000"):
            SourceConfig("a.png", mpp=mpp)
    with pytest.raises(ConfigError, match="weight must be above 0"):
        SourceConfig("a.png", weight=0)


def test_images_of_hardly_a_pixel_are_refused(tmp_path: Path) -> None:
    paint(tmp_path / "a.png", (1, 1))
    with pytest.raises(DatasetError, match=r"1 x 1 px, which are 1 x 1 at 0\.5 um per pixel"):
        load(tmp_path, SourceConfig("a.png"))
    paint(tmp_path / "b.png", (300, 200))
    with pytest.raises(DatasetError, match=r"300 x 200 px, which are 6 x 4 at 0\.5 um"):
        load(tmp_path, SourceConfig("b.png", mpp=0.01))
    with pytest.warns(UserWarning, match=r"a\.png: .* show nothing; set mpp .* it is left out"):
        pools = load(tmp_path, SourceConfig("*.png"))
    assert names(pools, "training") == [["b.png"]]


def test_small_images_are_warned_of_once_a_source(tmp_path: Path) -> None:
    for number, side in enumerate((100, 97, 50, 30, 200, 200)):
        paint(tmp_path / "a" / f"{number}.png", (side, 200))
    paint(tmp_path / "b" / "0.png", (48, 48))
    paint(tmp_path / "c" / "0.png", (400, 400))
    sources = [SourceConfig(f"{name}/*.png", mpp=0.5 if name == "a" else 1.0) for name in "abc"]
    pools = load(tmp_path, *sources, mpp=0.5, validation_share=0.4)
    with pytest.warns(UserWarning, match="too small") as caught:
        warn_of_small((pools.training, pools.held_out), 128, SCALE)
    said = [str(w.message) for w in caught]
    assert len(said) == 1  # 48 px at 1 um are 96 at half of it, which fit if magnified by 1.33
    assert said[0].startswith("source a/*.png: 2 of 6 images are too small for crops of 128 px")
    assert "magnified up to 4.3 times, more than the 1.33 of scale" in said[0]
    assert "3.png: 30 px" in said[0]
    warn_of_small((pools.training, None), 30, SCALE)
    with pytest.warns(UserWarning, match="too small") as caught:
        warn_of_small((pools.training, pools.held_out), 128, (0.5, 1.0))
    assert [str(w.message).split(" images")[0] for w in caught] == [
        "source a/*.png: 4 of 6",
        "source b/*.png: 1 of 1",
    ]


def test_slides_are_not_magnified(tmp_path: Path) -> None:
    pixels = np.full((80, 80, 3), (160, 80, 160), np.uint8)
    with tifffile.TiffWriter(tmp_path / "s.tif") as file:
        file.write(pixels, tile=(64, 64), subifds=1, photometric="rgb")
        file.write(pixels[::2, ::2], tile=(64, 64), subfiletype=1, photometric="rgb")
    pools = load(tmp_path, SourceConfig("*.tif", mpp=0.5))
    warn_of_small([pools.training], 500, (1.0, 1.0))
    pools.slides.close()


def test_background_smaller_than_a_patch_is_warned_of(tmp_path: Path) -> None:
    grey_images(tmp_path / "grey")  # 80 x 80 px
    for mpp, fits in ((1.0, True), (0.5, False)):
        chosen = BackgroundConfig((SourceConfig("grey/*.png", mpp=mpp),))
        background = Background.load(chosen, stored(tmp_path), mpp=1.0)
        if fits:
            sequence(Touching(), background)
        else:
            with pytest.warns(UserWarning, match=r"source grey/\*\.png: 3 of 3 .* crops of 64 px"):
                sequence(Touching(), background)
    sequence(Touching(), Background(None, [], BackgroundConfig(), label=0))


def test_a_folder_in_place_of_its_images(tmp_path: Path) -> None:
    paint(tmp_path / "imgs" / "a.png")
    (tmp_path / "imgs" / "deep").mkdir()
    for path in ("imgs", "imgs/", "im*", "imgs/d*"):
        with pytest.raises(DatasetError, match="names folders only") as caught:
            load(tmp_path, SourceConfig(path))
        assert f"; {path.rstrip('/')}/* names what lies in them" in str(caught.value)
    with pytest.raises(DatasetError, match="no such images; check the data folder and path"):
        load(tmp_path, SourceConfig("images"))
    assert names(load(tmp_path, SourceConfig("imgs/*")), "training") == [["a.png"]]


def test_an_image_of_too_many_pixels_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paint(tmp_path / "a.png", (2100, 1000))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000_000)
    with pytest.raises(DatasetError) as caught:
        load(tmp_path, SourceConfig("*.png"))
    said = str(caught.value)
    assert "a.png: more than 2 megapixels are too many to be decoded at once" in said
    assert "convert it to a pyramidal TIFF" in said
    assert "bomb" not in said


def test_what_is_transparent_is_white(tmp_path: Path) -> None:
    pixels = np.zeros((20, 40, 4), np.uint8)
    pixels[:, :20] = (160, 80, 160, 255)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    view = load(tmp_path, SourceConfig("*.png")).training.groups[0][0].view(20)
    assert (view[:, :10] == (160, 80, 160)).all()
    assert (view[:, 10:] == 255).all()


def test_images_that_are_not_read_as_they_are(tmp_path: Path) -> None:
    Image.fromarray(np.full((20, 20), 9000, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(
        DatasetError, match=r"1 files can be used; .*deep\.png: has more than 8 bit"
    ):
        load(tmp_path, SourceConfig("deep.png"))
    (tmp_path / "eps.png").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\nshowpage\n"
    )
    with pytest.raises(
        DatasetError, match=r"1 files can be used; .*eps\.png: not a readable image"
    ):
        load(tmp_path, SourceConfig("eps.png"))


def test_slides_of_doubtful_or_coarse_resolution_are_warned_of(tmp_path: Path) -> None:
    write_phantom(tmp_path / "a.tiff", Size(1024, 1024), mpp=1.0)
    cases = (
        (None, 0.5, [r"its pixels of 1 um are enlarged to 0.5 um"]),
        (0.5, 0.5, ["states 1 um per pixel (tiff resolution), 0.5 is used as given"]),
        (None, 0.7, []),
    )
    for own, mpp, wanted in cases:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            load(tmp_path, SourceConfig("*.tiff", mpp=own), mpp=mpp).slides.close()
        said = [str(w.message).split("a.tiff: ")[1] for w in caught]
        assert said == [f"{text}; set mpp of its source if that is wrong" for text in wanted]
