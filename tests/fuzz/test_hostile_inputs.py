"""What the fuzzer found, one input each: what it is refused for, and that it is quick."""

from __future__ import annotations

import gzip
import struct
from dataclasses import dataclass
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
from fuzz_slides import bare_tiff
from PIL import Image

from wsiseg.classes import TissueClass
from wsiseg.config import from_mapping, load_yaml
from wsiseg.datasets.annotations import read_annotations
from wsiseg.datasets.base import load_image
from wsiseg.errors import ConfigError, DatasetError, ResolutionError, SlideError, WsisegError
from wsiseg.geometry import Size
from wsiseg.slides import open_slide
from wsiseg.slides.limits import check_levels
from wsiseg.slides.resolution import resolve
from wsiseg.slides.stream_size import stated_size
from wsiseg.slides.tiff_check import check_tiff


def flat(path: Path, side: int = 50) -> Path:
    Image.new("RGB", (side, side), (200, 100, 150)).save(path)
    return path


def test_messages_are_one_printable_line() -> None:
    text = str(WsisegError("a\nb\x1b[2J\udcff " + "x" * 10**6))
    assert text.startswith(r"a\nb\x1b[2J\udcff xxx")
    assert len(text) < 2100
    assert text.isprintable()


def test_yaml_that_stands_for_too_much(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    rows = ["a0: &a0 [1, 1]", *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 40))]
    merged = [
        "m0: &m0 {x: 1}",
        *(f"m{i}: &m{i}\n  <<: [*m{i - 1}, *m{i - 1}]" for i in range(1, 40)),
    ]
    for text in ("\n".join(rows), "\n".join(merged), "a: &a [*a]", "[" * 5000, "a: " + "[" * 60):
        path.write_text(text)
        with pytest.raises(ConfigError, match="not YAML"):
            load_yaml(path)
    path.write_text("#" * (1 << 21))
    with pytest.raises(ConfigError, match="over 1 MiB"):
        load_yaml(path)
    path.write_text("a: !!timestamp x")
    with pytest.raises(ConfigError, match="not YAML"):
        load_yaml(path)


@dataclass(frozen=True)
class Number:
    value: float


def test_numbers_that_python_cannot_even_print() -> None:
    with pytest.raises(ConfigError, match=r"value: a number beyond 2\^63 is too large"):
        from_mapping(Number, {"value": 16**5000})


def test_directories_without_end(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    data = bytearray(bare_tiff(64, 64, 64, 1, bytes(64 * 64 * 3)))
    path.write_bytes(data)
    check_tiff(path)
    struct.pack_into("<I", data, 8 + 2 + 11 * 12, 8)
    path.write_bytes(data)
    with pytest.raises(SlideError, match="no end"):
        check_tiff(path)
    entry = struct.pack("<HHQQ", 324, 16, 2**61, 16)
    path.write_bytes(struct.pack("<2sHHHQQ", b"II", 43, 8, 0, 16, 1) + entry + bytes(8))
    with pytest.raises(SlideError, match="cut short"):  # not a MemoryError
        check_tiff(path)


def test_tiles_and_slides_that_are_too_large(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    path.write_bytes(bare_tiff(100, 100, 1 << 20, 1))
    with pytest.raises(SlideError, match="too large to decode"):
        open_slide(path, mpp=0.5)
    with pytest.raises(SlideError, match="more than any slide has"):
        check_levels(path, (Size(1_900_000, 1_900_000),), ())
    for sizes in ((Size(0, 5),), (Size(4000, 4000), Size(2000, 40)), (Size(9, 9), Size(9, 900))):
        with pytest.raises(SlideError):
            check_levels(path, sizes, ())
    check_levels(path, (Size(5000, 3001), Size(1250, 751), Size(20, 12)), [Size(4096, 4096)])


@pytest.mark.parametrize("code", ["jpeg", "j2k"])
def test_streams_state_their_size(tmp_path: Path, code: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 72, 3), np.uint8)
    if code == "jpeg":
        data = bytearray(imagecodecs.jpeg8_encode(pixels))
        place, form = data.index(b"\xff\xc0") + 5, ">HH"
    else:
        data = bytearray(imagecodecs.jpeg2k_encode(pixels, codecformat="J2K"))
        place, form = data.index(b"\xff\x51") + 6, ">II"
    assert stated_size(bytes(data)) == (72, 40)
    struct.pack_into(form, data, place, 60_000, 60_000)
    assert stated_size(bytes(data)) == (60_000, 60_000)
    path = tmp_path / "a.tif"
    path.write_bytes(bare_tiff(64, 64, 64, 7 if code == "jpeg" else 34712, bytes(data)))
    with pytest.raises(SlideError, match="stream states 60000 x 60000 px"):
        open_slide(path, mpp=0.5, backend="tiffslide")


def test_only_formats_that_run_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    )
    with Image.open(path) as image:
        assert image.format == "EPS"  # Pillow would hand it to Ghostscript
    with pytest.raises(SlideError, match="not a slide or image"):
        open_slide(path, mpp=0.5)
    with pytest.raises(DatasetError, match="not a readable image"):
        load_image(path)


def test_a_slide_is_not_enlarged_beyond_all_slides(tmp_path: Path) -> None:
    with open_slide(flat(tmp_path / "a.png", 500), mpp=1000) as slide:
        with pytest.raises(ResolutionError, match=r"too coarse .* give the right one with --mpp"):
            slide.grid(0.5)
        assert slide.grid(10.0).size == (50_000, 50_000)


def test_encodings_of_xml_that_there_are_not() -> None:
    for encoding in ("nonsense", "utf-7", "utf-32"):
        text = f'<?xml version="1.0" encoding="{encoding}"?><OME><Pixels/></OME>'
        with pytest.raises(ResolutionError, match="--mpp"):
            resolve("a", {"tiff.ImageDescription": text}, vendor="generic-tiff", option=None)


def test_geojson_bombs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wsiseg.datasets.annotations._MAX_BYTES", 1 << 20)
    path = tmp_path / "a.geojson.gz"
    path.write_bytes(gzip.compress(b" " * (1 << 22)))
    with pytest.raises(DatasetError, match="over 1 MiB of text"):
        read_annotations(path)
    path = tmp_path / "a.geojson"
    head = '{"type":"Feature","geometry":{"type":"GeometryCollection","geometries":['
    for inner in ("3", '"a"', "null"):
        path.write_text(head + inner + "]}}")
        with pytest.raises(DatasetError, match="feature 1 has coordinates that cannot be"):
            read_annotations(path)
    path.write_text('{"type":"Feature","properties":{"name":' + "[" * 400 + "]" * 400 + "}}")
    assert read_annotations(path)[0].label == ""


def test_class_names_are_one_short_line() -> None:
    for name in ("a\nb", "\x1b[2J", "a" * 201):
        with pytest.raises(ConfigError, match="class name"):
            TissueClass(name, (1, 2, 3))
