"""Slides read chunk by chunk against OpenSlide: which qualify, equal pixels, threads, damage."""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
import simplejpeg
import tifffile
from PIL import Image
from scipy import ndimage

from wsiseg.errors import SlideError, SlideReadError
from wsiseg.geometry import Box, Size
from wsiseg.slides import open_slide
from wsiseg.slides.backend_base import NotThisBackend
from wsiseg.slides.direct_backend import DirectBackend
from wsiseg.slides.openslide_backend import OpenSlideBackend
from wsiseg.slides.phantom import write_phantom
from wsiseg.slides.tiff_chunks import read_tables

APERIO = "Aperio Image Library v11.2.1\n{w}x{h} (64x64) Q=70|AppMag = 20|MPP = 0.5"
SIDE = 64
ADOBE_YCBCR = b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0\1"


def picture(height: int = 200, width: int = 300) -> np.ndarray:
    noise = np.random.default_rng(7).normal(size=(height, width, 3))
    smooth = ndimage.gaussian_filter(noise, (3, 3, 0))
    return np.clip(128 + 500 * smooth + 20 * noise, 0, 255).astype(np.uint8)


def cut(image: np.ndarray) -> Iterator[np.ndarray]:
    """Chunks of 64 px, padded with the last row and column."""
    h, w = (-n % SIDE for n in image.shape[:2])
    padded = np.pad(image, ((0, h), (0, w), (0, 0)), "edge")
    for y, x in product(range(0, padded.shape[0], SIDE), range(0, padded.shape[1], SIDE)):
        yield np.ascontiguousarray(padded[y : y + SIDE, x : x + SIDE])


def jpeg(chunk: np.ndarray, stored: str, subsampling: str) -> bytes:
    return bytes(
        imagecodecs.jpeg8_encode(
            chunk, level=85, colorspace="RGB", outcolorspace=stored, subsampling=subsampling
        )
    )


def marked(stream: bytes, marker: bytes) -> bytes:
    """With a marker just before the scan."""
    place = stream.index(b"\xff\xda")
    return stream[:place] + marker + stream[place:]


def j2k(chunk: np.ndarray, **options: Any) -> bytes:
    return bytes(imagecodecs.jpeg2k_encode(chunk, codecformat="J2K", **options))


def write(path: Path, image: np.ndarray, encode: Any, *, halves: int = 0, **tags: Any) -> Path:
    """A tiled pyramid of chunks encoded one by one."""
    aperio = path.suffix == ".svs"
    with tifffile.TiffWriter(path) as tiff:
        for level in range(halves + 1):
            part = image[:: 2**level, :: 2**level]
            h, w = part.shape[:2]
            tiff.write(
                (data for data in map(encode, cut(part))),
                shape=part.shape,
                dtype=np.uint8,
                tile=(SIDE, SIDE),
                subfiletype=0 if aperio or not level else 1,
                description=APERIO.format(w=w, h=h) if aperio else None,
                resolution=(20000, 20000),
                resolutionunit="CENTIMETER",
                metadata=None,
                **tags,
            )
    return path


def assert_equal_to_openslide(path: Path, count: int, mpp: tuple[float, ...] = (0.5,)) -> None:
    """Random regions, partly outside, at each resolution."""
    rng = np.random.default_rng(1)
    with (
        open_slide(path, mpp=0.5, backend="direct") as ours,
        open_slide(path, mpp=0.5, backend="openslide") as theirs,
    ):
        assert (ours.backend, theirs.backend) == ("direct", "openslide")
        assert ours.level_sizes == theirs.level_sizes
        assert ours.level_downsamples == theirs.level_downsamples
        assert ours.properties == theirs.properties
        assert (ours.vendor, ours.quickhash) == (theirs.vendor, theirs.quickhash)
        for at in mpp:
            grid = ours.grid(at)
            for _ in range(count):
                x, y = (int(rng.integers(-40, n + 20)) for n in grid.size)
                box = Box(x, y, int(rng.integers(1, 300)), int(rng.integers(1, 300)))
                assert np.array_equal(ours.read(box, grid), theirs.read(box, grid)), box


@pytest.mark.parametrize("subsampling", ["444", "422", "420", "411"])
@pytest.mark.parametrize("suffix", ["tif", "svs"])
def test_ycbcr_jpeg(tmp_path: Path, subsampling: str, suffix: str) -> None:
    factors = {"444": (1, 1), "422": (2, 1), "420": (2, 2), "411": (4, 1)}
    path = write(
        tmp_path / f"a.{suffix}",
        picture(),
        lambda chunk: jpeg(chunk, "YCBCR", subsampling),
        photometric="ycbcr",
        compression="jpeg",
        subsampling=factors[subsampling],
    )
    assert_equal_to_openslide(path, 15)


def test_colours_are_what_the_tag_says_not_what_the_stream_looks_like(tmp_path: Path) -> None:
    def as_rgb(chunk: np.ndarray) -> bytes:
        """Without Adobe's marker and with the component names of YCbCr, as old SVS files."""
        data = bytearray(jpeg(chunk, "RGB", "444"))
        marker = data.find(b"\xff\xee")
        if marker >= 0:
            del data[marker : marker + 2 + int.from_bytes(data[marker + 2 : marker + 4], "big")]
        for head, first, step in ((b"\xff\xc0", 10, 3), (b"\xff\xda", 5, 2)):
            place = data.find(head)
            for i in range(3):
                data[place + first + i * step] = i + 1
        return bytes(data)

    path = write(
        tmp_path / "a.svs",
        picture(),
        as_rgb,
        photometric="rgb",
        compression="jpeg",
        compressionargs={"outcolorspace": "rgb"},
    )
    assert read_tables(path)[0].photometric == 2
    assert_equal_to_openslide(path, 15)
    with open_slide(path, backend="direct") as slide:
        image = slide.read(Box(0, 0, 300, 200), slide.grid(0.5))
    assert np.abs(image.astype(int) - picture()).mean() < 6


@pytest.mark.parametrize("marker", [b"\xff\xe0\0\x10JFIF\0\1\1\0\0\1\0\1\0\0", ADOBE_YCBCR])
def test_a_stream_whose_markers_contradict_the_tag_is_left_to_openslide(
    tmp_path: Path, marker: bytes
) -> None:
    path = tmp_path / "a.tif"
    options = {"compression": "jpeg", "compressionargs": {"outcolorspace": "rgb"}}
    write(
        path,
        picture(),
        lambda c: marked(jpeg(c, "RGB", "444"), marker),
        photometric="rgb",
        **options,
    )
    with open_slide(path, mpp=0.5) as slide:
        assert slide.backend == "openslide"


def test_levels_on_whole_pixels_and_others(tmp_path: Path) -> None:
    options = {"photometric": "ycbcr", "compression": "jpeg", "subsampling": (2, 2)}

    def encode(chunk: np.ndarray) -> bytes:
        return jpeg(chunk, "YCBCR", "420")

    whole = write(tmp_path / "a.tif", picture(256, 384), encode, halves=2, **options)
    odd = write(tmp_path / "b.tif", picture(203, 301), encode, halves=1, **options)
    assert_equal_to_openslide(whole, 8, (0.5, 0.7, 1.0, 1.3, 2.0))
    assert_equal_to_openslide(odd, 8, (0.5, 1.0, 1.3))
    for path, levels in ((whole, {0, 1, 2}), (odd, {0})):
        backend = DirectBackend(path, OpenSlideBackend(path))
        assert set(backend._tables) == levels
        backend.close()


@pytest.mark.parametrize("compression", [33003, 33005])
def test_jpeg_2000(tmp_path: Path, compression: int) -> None:
    def encode(chunk: np.ndarray) -> bytes:
        return j2k(chunk, level=40, mct=compression == 33005)

    path = write(tmp_path / "a.svs", picture(), encode, photometric="rgb", compression=compression)
    assert_equal_to_openslide(path, 10)


def test_every_chroma_of_jpeg_2000(tmp_path: Path) -> None:
    i = np.arange(256, dtype=np.uint8)
    ycc = np.empty((512, 512, 3), np.uint8)
    for (y, x), luma in zip(product((0, 256), (0, 256)), (0, 60, 128, 255), strict=True):
        ycc[y : y + 256, x : x + 256, 0] = luma
        ycc[y : y + 256, x : x + 256, 1] = i[:, None]
        ycc[y : y + 256, x : x + 256, 2] = i
    options = {"level": 0, "reversible": True, "mct": False}
    path = tmp_path / "a.svs"
    write(path, ycc, lambda c: j2k(c, **options), photometric="rgb", compression=33003)
    with (
        open_slide(path, backend="direct") as ours,
        open_slide(path, backend="openslide") as theirs,
    ):
        assert ours.backend == "direct"
        grid = ours.grid(0.5)
        assert np.array_equal(ours.read(grid.box, grid), theirs.read(grid.box, grid))


def test_phantom(phantom: Path) -> None:
    assert_equal_to_openslide(phantom, 10, (0.5, 1.0, 3.1))


@pytest.mark.parametrize(
    ("name", "count"), [("CMU-1-Small-Region.svs", 25), ("TCGA-CR-7395-01A-01-TS1.svs", 3)]
)
def test_real_slides(shared_data: Path, name: str, count: int) -> None:
    assert_equal_to_openslide(shared_data / "slides" / name, count, (0.5, 0.8))


def test_what_is_left_to_openslide(tmp_path: Path) -> None:
    image = picture()
    plain = {"photometric": "rgb", "tile": (SIDE, SIDE), "metadata": None}
    tifffile.imwrite(tmp_path / "deflate.tif", image, compression="deflate", **plain)
    tifffile.imwrite(tmp_path / "none.tif", image, **plain)
    missing = write(
        tmp_path / "missing.tif",
        image,
        lambda chunk: b"" if (chunk[0, 0] == image[64, 64]).all() else jpeg(chunk, "YCBCR", "444"),
        photometric="ycbcr",
        compression="jpeg",
        subsampling=(1, 1),
    )
    with tifffile.TiffFile(missing) as tiff:
        assert list(tiff.pages.first.databytecounts).count(0) == 1
    for name in ("deflate.tif", "none.tif", "missing.tif"):
        with open_slide(tmp_path / name, mpp=0.5) as slide:
            assert slide.backend == "openslide"
        with pytest.raises(SlideError, match="direct does not read this format"):
            open_slide(tmp_path / name, mpp=0.5, backend="direct")


def test_a_decoder_that_differs_is_not_used(phantom: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = simplejpeg.decode_jpeg

    def wrong(*args: Any, **options: Any) -> np.ndarray:
        pixels: np.ndarray = decode(*args, **options)
        pixels[5, 5, 1] ^= 1
        return pixels

    monkeypatch.setattr(simplejpeg, "decode_jpeg", wrong)
    with pytest.raises(SlideError, match="direct does not read"):
        open_slide(phantom, backend="direct")


def test_it_is_taken_and_can_be_avoided(phantom: Path) -> None:
    for backend, name in (("auto", "direct"), ("direct", "direct"), ("openslide", "openslide")):
        with open_slide(phantom, backend=backend) as slide:
            assert slide.backend == name


@pytest.mark.parametrize("lacks_pread", [False, True])
def test_threads_read_the_same_and_decode_once(
    phantom: Path, monkeypatch: pytest.MonkeyPatch, lacks_pread: bool
) -> None:
    if lacks_pread:
        monkeypatch.delattr(os, "pread")
    decode, lock, calls = simplejpeg.decode_jpeg, threading.Lock(), []

    def counted(data: bytes, *args: Any, **options: Any) -> np.ndarray:
        with lock:
            calls.append(data)
        pixels: np.ndarray = decode(data, *args, **options)
        return pixels

    with open_slide(phantom, backend="openslide") as slide:
        grid = slide.grid(slide.mpp)
        rng = np.random.default_rng(2)
        corners = rng.integers(0, 600, (80, 2))
        boxes = [Box(int(x), int(y), 300, 200) for x, y in corners]
        expected = [slide.read(box, grid) for box in boxes]
    with open_slide(phantom, backend="direct") as slide:
        monkeypatch.setattr(simplejpeg, "decode_jpeg", counted)
        with ThreadPoolExecutor(8) as pool:
            results = list(pool.map(lambda box: slide.read(box, grid), boxes))
    assert all(map(np.array_equal, results, expected))
    assert 0 < len(calls) <= read_tables(phantom)[0].offsets.size


def test_damage_is_openslides_error_and_the_rest_is_read(phantom: Path, tmp_path: Path) -> None:
    data = bytearray(phantom.read_bytes())
    table = read_tables(phantom)[0]
    number = 7 if table.lengths.argmax() != 7 else 6
    offset, length = int(table.offsets[number]), int(table.lengths[number])
    data[offset : offset + length] = bytes(length)
    path, box = tmp_path / "damaged.tif", table.box(number)
    path.write_bytes(data)
    with open_slide(path, backend="direct") as slide:
        grid = slide.grid(slide.mpp)
        with pytest.raises(
            SlideReadError, match=rf"damaged\.tif: cannot read level 0 at x={box.x} y={box.y}"
        ) as error:
            slide.read(box, grid)
        assert "\n" not in str(error.value)
        assert slide.read(Box(0, 0, 200, 200), grid).std() > 0


def damaged(data: bytes, rng: np.random.Generator) -> bytes:
    """A stream with a bit flipped, a stretch of other bytes or noughts, or its end missing."""
    result, start = bytearray(data), int(rng.integers(len(data)))
    stop = min(len(data), start + int(rng.integers(1, 600)))
    kind = rng.integers(6)
    if kind == 0:
        result[start] ^= 1 << int(rng.integers(8))
    elif kind == 1:
        result[-int(rng.integers(1, 9))] ^= 1 << int(rng.integers(8))
    elif kind == 2:
        result[start:stop] = rng.bytes(stop - start)
    elif kind == 3:
        result[start:stop] = bytes(stop - start)
    elif kind == 4:
        result[start:] = bytes(len(data) - start)
    else:
        result[start:] = b"\xff\xd9" + bytes(len(data))
    return bytes(result[: len(data)])


def spoil(path: Path, out: Path, seed: int, *, most: int) -> list[Box]:
    """Write a slide with damage in many chunks of level 0; the boxes of these."""
    table, data, rng = (
        read_tables(path)[0],
        bytearray(path.read_bytes()),
        np.random.default_rng(seed),
    )
    kept = {0, int(table.lengths.argmax())}
    numbers = [n for n in range(len(table.offsets)) if n not in kept]
    numbers = sorted(rng.permutation(numbers)[:most].tolist())
    for number in numbers:
        start, length = int(table.offsets[number]), int(table.lengths[number])
        data[start : start + length] = damaged(bytes(data[start : start + length]), rng)
    out.write_bytes(data)
    return [table.box(number) for number in numbers]


def outcome(backend: DirectBackend | OpenSlideBackend, box: Box) -> np.ndarray | str:
    try:
        return backend.read_level(0, box)
    except SlideReadError as e:
        return str(e)


def assert_seen(path: Path, out: Path, seed: int, most: int) -> tuple[int, int]:
    """Same pixels or same error for every damaged chunk; how many of each."""
    boxes = spoil(path, out, seed, most=most)
    ours, theirs = DirectBackend(out, OpenSlideBackend(out)), OpenSlideBackend(out)
    errors = 0
    for box in boxes:
        first, second = outcome(ours, box), outcome(theirs, box)
        if isinstance(first, str) or isinstance(second, str):
            assert first == second, f"seed {seed}, {box}"
            errors += 1
        else:
            assert np.array_equal(first, second), f"seed {seed}, {box}"
    ours.close()
    theirs.close()
    return len(boxes) - errors, errors


def test_damage_is_seen_as_openslide_sees_it(phantom: Path, tmp_path: Path) -> None:
    counts = [assert_seen(phantom, tmp_path / "damaged.tif", seed, 100) for seed in range(12)]
    read, refused = np.sum(counts, axis=0)
    assert read > 10
    assert refused > 50


@pytest.mark.parametrize(
    ("name", "most"), [("CMU-1-Small-Region.svs", 50), ("TCGA-CR-7395-01A-01-TS1.svs", 40)]
)
def test_damage_of_real_slides_is_seen(
    shared_data: Path, tmp_path: Path, name: str, most: int
) -> None:
    path = shared_data / "slides" / name
    read, refused = assert_seen(path, tmp_path / "damaged.svs", 0, most)
    assert read > 0
    assert refused > 0


@pytest.mark.parametrize("options", [{"progressive": True}, {"restart_marker_blocks": 3}])
def test_every_kind_of_jpeg(tmp_path: Path, options: dict[str, Any]) -> None:
    def encode(chunk: np.ndarray) -> bytes:
        stream = io.BytesIO()
        Image.fromarray(chunk).save(stream, "JPEG", quality=80, subsampling=2, **options)
        return stream.getvalue()

    tags = {"photometric": "ycbcr", "compression": "jpeg", "subsampling": (2, 2)}
    path = write(tmp_path / "a.tif", picture(), encode, **tags)
    assert_equal_to_openslide(path, 8)
    assert_seen(path, tmp_path / "damaged.tif", 5, 30)


def test_flat_slides_are_read(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.tif",
        np.full((150, 150, 3), 240, np.uint8),
        lambda chunk: jpeg(chunk, "YCBCR", "420"),
        photometric="ycbcr",
        compression="jpeg",
        subsampling=(2, 2),
    )
    assert_equal_to_openslide(path, 5)


def test_a_file_that_shrinks_while_open(phantom: Path, tmp_path: Path) -> None:
    path = tmp_path / "shrunk.tif"
    path.write_bytes(phantom.read_bytes())
    with open_slide(path, backend="direct") as slide:
        os.truncate(path, 1000)
        with pytest.raises(SlideReadError, match="copy it again"):
            slide.read(Box(500, 300, 50, 50), slide.grid(slide.mpp))


def test_tables_of_what_is_no_tiff(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    for content in (b"not a slide" * 100, b"II*\0"):
        path.write_bytes(content)
        with pytest.raises(NotThisBackend):
            read_tables(path)


def test_a_damaged_tile_spoils_no_other_tile(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    write_phantom(path, Size(1024, 512), mpp=0.5, seed=2)
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages.first
        place, length = page.dataoffsets[0], page.databytecounts[0]
    data = bytearray(path.read_bytes())
    data[place + length // 2 : place + length] = bytes(length - length // 2)
    path.write_bytes(data)
    backend = OpenSlideBackend(path)
    good = backend.read_level(0, Box(512, 256, 100, 100))
    with pytest.raises(SlideReadError):
        backend.read_level(0, Box(0, 0, 100, 100))
    assert np.array_equal(backend.read_level(0, Box(512, 256, 100, 100)), good)
    backend.close()
