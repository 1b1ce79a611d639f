"""The mask pyramid, read back with OpenSlide, tiffslide and tifffile."""

from __future__ import annotations

import tracemalloc
import warnings
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import openslide
import pytest
import tifffile
import tiffslide
from output_canvases import CLASSES, MakeCanvas, UInt8, blobs

from wsiseg.errors import OutputError, UsageError
from wsiseg.outputs.pyramid import level_sizes, write_pyramid

SIZES = [(1, 1), (511, 511), (512, 512), (513, 513), (1025, 700), (2300, 40)]


def levels_of(labels: UInt8) -> list[UInt8]:
    levels = [labels]
    while max(levels[-1].shape) > 512:
        levels.append(levels[-1][::2, ::2])
    return levels


def palette() -> UInt8:
    colours = CLASSES.lookup()
    colours[0] = 255
    return colours


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("chunk_px", [512, 300])
def test_every_reader_sees_every_level(
    make_canvas: MakeCanvas, tmp_path: Path, size: tuple[int, int], chunk_px: int
) -> None:
    width, height = size
    labels = blobs(height, width)
    path = tmp_path / "slide.mask.ome.tif"
    write_pyramid(path, make_canvas(labels, chunk_px=chunk_px))
    expected = levels_of(labels)
    sizes = [(a.shape[1], a.shape[0]) for a in expected]

    with tifffile.TiffFile(path) as tiff:
        assert tiff.is_bigtiff
        assert tiff.is_ome
        assert len(tiff.series) == 1
        assert len(tiff.pages) == len(expected)
        pages = [page.aspage() for page in tiff.pages]
        levels = [level.pages[0].aspage() for level in tiff.series[0].levels]
        offsets = {page.offset for page in pages}
        assert len(pages[0].subifds or ()) == len(levels) - 1
        assert not offsets & {page.offset for page in levels[1:]}  # these are the SubIFDs
        for page, again, level in zip(pages, levels, expected, strict=True):
            for one in (page, again):
                assert (one.asarray() == level).all()
                assert one.subfiletype == (page is not pages[0])
                assert one.tilewidth == one.tilelength == 512
                assert one.photometric.name == "PALETTE"
                assert (one.colormap == palette().T.astype(np.uint16) * 257).all()
                assert one.tags["ResolutionUnit"].value == 3
                assert one.predictor == 1

    with openslide.OpenSlide(path) as slide:
        assert list(slide.level_dimensions) == sizes
        assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(0.5, rel=1e-6)
        assert float(slide.properties["openslide.mpp-y"]) == pytest.approx(0.5, rel=1e-6)
        for number, level in enumerate(expected):
            image = np.asarray(slide.read_region((0, 0), number, sizes[number]))
            assert (image[..., :3] == palette()[level]).all()

    with tiffslide.TiffSlide(path) as slide:
        assert list(slide.level_dimensions) == sizes
        assert slide.properties["tiffslide.mpp-x"] == pytest.approx(0.5, rel=1e-6)
        for number, level in enumerate(expected):
            image = slide.read_region((0, 0), number, sizes[number], as_array=True)
            assert (image[..., 0] == level).all()


def test_resolution_is_exact_at_every_level(make_canvas: MakeCanvas, tmp_path: Path) -> None:
    path = tmp_path / "m.ome.tif"
    write_pyramid(path, make_canvas(blobs(700, 1025)))
    with tifffile.TiffFile(path) as tiff:
        for page in (
            p.aspage() for p in [*tiff.pages, *(s.pages[0] for s in tiff.series[0].levels)]
        ):
            for tag, pixels, whole in (
                ("XResolution", page.imagewidth, 1025),
                ("YResolution", page.imagelength, 700),
            ):
                a, b = page.tags[tag].value
                assert 1e4 * b / a * pixels == pytest.approx(0.5 * whole, rel=1e-6)


def test_ome_metadata(make_canvas: MakeCanvas, tmp_path: Path) -> None:
    path = tmp_path / "m.ome.tif"
    slide = {"path": 'a <b> & "c" äµ.svs'}
    write_pyramid(path, make_canvas(blobs(30, 40), slide=slide))
    raw = path.read_bytes()
    assert 'PhysicalSizeXUnit="µm"'.encode() in raw
    assert b"&#181;" not in raw
    with tifffile.TiffFile(path) as tiff:
        xml = tiff.pages[0].tags["ImageDescription"].value
        root = ElementTree.fromstring(xml)
    space = {"o": "http://www.openmicroscopy.org/Schemas/OME/2016-06"}
    image = root.find("o:Image", space)
    pixels = root.find("o:Image/o:Pixels", space)
    channel = root.find("o:Image/o:Pixels/o:Channel", space)
    data = root.findall("o:Image/o:Pixels/o:TiffData", space)
    assert image is not None
    assert image.get("Name") == slide["path"]
    assert pixels is not None
    assert (pixels.get("SizeX"), pixels.get("SizeY"), pixels.get("Type")) == ("40", "30", "uint8")
    assert float(pixels.get("PhysicalSizeX", "0")) == 0.5
    assert channel is not None
    assert channel.get("SamplesPerPixel") == "1"
    assert [d.attrib for d in data] == [{"IFD": "0", "PlaneCount": "1"}]


@pytest.mark.parametrize("compression", ["deflate", "lzw", "zstd"])
def test_compressions_keep_the_labels(
    make_canvas: MakeCanvas, tmp_path: Path, compression: str
) -> None:
    labels = blobs(600, 700)
    path = tmp_path / "m.ome.tif"
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        write_pyramid(path, make_canvas(labels), compression=compression)
    assert any("Bio-Formats" in str(w.message) for w in said) == (compression == "zstd")
    assert (tifffile.imread(path) == labels).all()
    with openslide.OpenSlide(path) as slide:
        image = np.asarray(slide.read_region((0, 0), 0, (700, 600)))
    assert (image[..., :3] == palette()[labels]).all()


def test_bad_requests_leave_nothing(make_canvas: MakeCanvas, tmp_path: Path) -> None:
    canvas = make_canvas(blobs(30, 40))
    out = tmp_path / "out"
    with pytest.raises(UsageError, match="jpeg"):
        write_pyramid(out / "m.ome.tif", canvas, compression="jpeg")
    blocker = tmp_path / "file"
    blocker.write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        write_pyramid(blocker / "m.ome.tif", canvas)
    assert not out.exists()


def test_level_sizes() -> None:
    from wsiseg.geometry import Size

    assert level_sizes(Size(512, 1)) == [(512, 1)]
    assert level_sizes(Size(1025, 700)) == [(1025, 700), (513, 350), (257, 175)]


def test_memory_does_not_grow_with_the_height(make_canvas: MakeCanvas, tmp_path: Path) -> None:
    def peak(height: int) -> int:
        canvas = make_canvas(np.tile(blobs(500, 900), (height // 500, 1)), name=f"{height}.canvas")
        peaks = []
        for _ in range(3):  # what its two threads hold at one time differs; growth would not
            tracemalloc.start()
            write_pyramid(tmp_path / "m.ome.tif", canvas)
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
        return min(peaks)

    peak(1000)  # what is loaded once
    assert peak(12_000) < 1.2 * peak(3000)
