"""Hostile slides and tissue masks: small phantoms of every container, damaged, and bombs."""

from __future__ import annotations

import random
import struct
import zlib
from pathlib import Path

import numpy as np
import tifffile
from fuzz_bytes import damage, damage_tiff
from fuzz_case import OUT, Case, Offence, command
from PIL import Image

from wsiseg.errors import ResolutionError
from wsiseg.geometry import Box, Size
from wsiseg.inference.plan import plan
from wsiseg.slides import open_slide
from wsiseg.slides.phantom import write_phantom
from wsiseg.slides.tissue import find_tissue

APERIO = "Aperio Image Library v10.0.51\r\n{w}x{h} [0,0 {w}x{h}] (256x256) |AppMag = 20|MPP = 0.5"
_QUICK_PX = 5_000_000_000
"""Pixels of a slide whose windows are laid; of larger ones that only takes longer."""
SIDES = (0, 1, 3, 1000, 65535, 2**20, 2**24, 2**31 - 1, 2**31, 2**32 - 1)


class Maker:
    """Makes slides from the good ones that it writes first."""

    def __init__(self, seeds: Path) -> None:
        self.model = seeds / "model.safetensors"
        write_phantom(seeds / "phantom.tif", Size(700, 500), seed=5)
        pixels = tifffile.imread(seeds / "phantom.tif")
        _write_tiffs(seeds, pixels)
        Image.fromarray(pixels).save(seeds / "a.png")
        Image.fromarray(pixels).save(seeds / "a.jpg", quality=60)
        Image.fromarray(pixels).quantize(16).save(seeds / "palette.png")
        Image.fromarray(pixels).save(seeds / "a.bmp")
        Image.fromarray(pixels).save(seeds / "lzw.tif", compression="tiff_lzw")
        self.files = {p.name: p.read_bytes() for p in sorted(seeds.iterdir()) if p != self.model}
        self.tiffs = [n for n in self.files if n.endswith((".tif", ".svs"))]
        self.bombs = {f.__name__: f() for f in BOMBS}
        self.masks = ["a.png", "palette.png", "lzw.tif", "a.jpg", "a.bmp"]

    def make(self, rng: random.Random, folder: Path) -> Case:
        """A slide, or a tissue mask for a good slide."""
        roll = rng.random()
        if roll < 0.02:
            name = rng.choice(sorted(self.bombs))
            return self._slide(rng, folder, f"{name}.png" if "png" in name else "bomb.tif", name)
        if roll < 0.1:
            return self._mask(rng, folder)
        if roll < 0.2:
            return self._absurd(rng, folder)
        name = rng.choice(self.tiffs if roll < 0.7 else sorted(self.files))
        data, what = self.files[name], "damaged bytes"
        if name in self.tiffs and rng.random() < 0.6:
            data, what = damage_tiff(data, rng)
        else:
            data = damage(data, rng)
        return self._try(rng, folder, name, data, f"{name}: {what}")

    def _slide(self, rng: random.Random, folder: Path, name: str, bomb: str) -> Case:
        return self._try(rng, folder, name, self.bombs[bomb], bomb)

    def _absurd(self, rng: random.Random, folder: Path) -> Case:
        """A TIFF whose first directory has absurd sizes that belong to one another."""
        width, height, side = (rng.choice(SIDES) for _ in range(3))
        data = bare_tiff(width, height, side, rng.choice((1, 7, 8, 34925)))
        what = f"absurd TIFF of {width} x {height} px, chunks of {side} px"
        return self._try(rng, folder, "absurd.tif", data, what)

    def _mask(self, rng: random.Random, folder: Path) -> Case:
        name = rng.choice(self.masks)
        data = damage(self.files[name], rng)
        if rng.random() < 0.1:
            name, data = "bomb.png", self.bombs["_png_bomb"]
        mask, slide = folder / f"mask-{name}", folder / "a.png"
        mask.write_bytes(data)
        slide.write_bytes(self.files["a.png"])

        def run() -> None:
            with open_slide(slide, mpp=0.5) as opened:
                find_tissue(opened, mask)

        return Case(f"tissue mask {name}", run)

    def _try(self, rng: random.Random, folder: Path, name: str, data: bytes, what: str) -> Case:
        path = folder / name
        path.write_bytes(data)
        roll, backend = rng.random(), rng.choice(("auto",) * 3 + ("tiffslide", "direct"))
        mpp = rng.choice((None, 0.25, 0.5, 5.0, 1000.0))
        if roll < 0.04:
            return Case(f"info, {what}", lambda: _info(path, backend))
        if roll < 0.08:
            if not self.model.exists():
                _write_model(self.model)
            return Case(f"predict, {what}", lambda: _predict(path, self.model, folder / OUT))
        return Case(f"{backend}, mpp {mpp}, {what}", lambda: use_slide(path, backend, mpp))


def _write_model(path: Path) -> None:
    """A model without weights and with small windows; torch is loaded only for it."""
    from tiny_models import CLASSES

    from wsiseg.models.checkpoint import save_checkpoint
    from wsiseg.models.registry import ModelConfig, build_segmenter

    config = ModelConfig(
        extractor={"name": "stain", "tile_px": 64},
        head={"name": "threshold"},
        classes=CLASSES,
        window_px=128,
    )
    save_checkpoint(path, build_segmenter(config), card={}, licence="CC0-1.0")


def use_slide(path: Path, backend: str, mpp: float | None) -> None:
    """What a prediction does with a slide before the model sees it."""
    try:
        slide = open_slide(path, backend=backend, mpp=mpp)
    except ResolutionError:
        slide = open_slide(path, backend=backend, mpp=0.5)
    with slide:
        grid = slide.grid(0.5)
        width, height = grid.size
        tissue = find_tissue(slide, "auto")
        for x, y in ((0, 0), (width - 200, height - 200), (width // 2, height // 2)):
            pixels = slide.read(Box(x, y, 256, 256), grid)
            if pixels.shape != (256, 256, 3) or pixels.dtype != np.uint8:
                raise Offence(f"{pixels.dtype} {pixels.shape}")
        slide.thumbnail(200)
        if width * height < _QUICK_PX:
            plan(grid, tissue, window_px=768, tile_px=256)


def _info(path: Path, backend: str) -> None:
    command("info", path, "--backend", backend)


def _predict(path: Path, model: Path, out: Path) -> None:
    """The whole command; slides that are large once opened would only take long."""
    try:
        with open_slide(path, mpp=0.5) as slide:
            large = slide.size.width * slide.size.height > 2_000_000
    except Exception:  # what it is, the command below must say
        large = False
    if large:
        return
    arguments = ("--mpp", 0.5, "--overlap", 32, "--device", "cpu", "--workers", 1)
    code = command("predict", path, "--out", out, "--model", model, *arguments)
    found = {p.name for p in out.iterdir()} if out.is_dir() else set()
    stem = path.name.removesuffix(".tif").removesuffix(".ome")
    stem = Path(path.name).stem if stem == path.name else stem
    made = {f"{stem}{s}" for s in (".mask.ome.tif", ".geojson", ".json", ".overview.png")}
    if code == 0 and not made <= found:
        raise Offence(f"ended with 0, but made {sorted(found)}")
    if code and made & found:
        raise Offence(f"ended with {code}, but made {sorted(found)}")
    if any(".part" in name or name.endswith(".canvas") for name in found):
        raise Offence(f"left half-made files behind: {sorted(found)}")


def _write_tiffs(folder: Path, pixels: np.ndarray) -> None:
    """An Aperio slide, an OME-TIFF with SubIFDs, a BigTIFF of DEFLATE tiles and one of strips."""
    height, width = pixels.shape[:2]
    common = {"photometric": "rgb", "tile": (128, 128)}
    with tifffile.TiffWriter(folder / "aperio.svs") as tiff:
        text = APERIO.format(w=width, h=height)
        jpeg = {**common, "compression": "jpeg", "metadata": None}
        tiff.write(pixels, description=text, **jpeg)
        tiff.write(pixels[::8, ::8], photometric="rgb", description=text, metadata=None)
        tiff.write(pixels[::2, ::2], subfiletype=1, description=text, **jpeg)
    with tifffile.TiffWriter(folder / "pyramid.ome.tif", ome=True) as tiff:
        sizes = {"PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5}
        tiff.write(pixels, subifds=2, metadata={"axes": "YXS", **sizes}, **common)
        tiff.write(pixels[::2, ::2], subfiletype=1, compression="zlib", **common)
        tiff.write(pixels[::4, ::4], subfiletype=1, **common)
    with tifffile.TiffWriter(folder / "deflate.tif", bigtiff=True) as tiff:
        options = {**common, "compression": "zlib", "metadata": None}
        tiff.write(pixels, resolution=(20000, 20000), resolutionunit="CENTIMETER", **options)
        tiff.write(pixels[::2, ::2], subfiletype=1, **options)
    tifffile.imwrite(folder / "strips.tif", pixels, photometric="rgb", rowsperstrip=16)


def bare_tiff(width: int, height: int, side: int, compression: int, chunk: bytes = b"") -> bytes:
    """A TIFF of one directory and one chunk of bytes, whatever the sizes that it states."""
    fields = [
        (256, 4, width),
        (257, 4, height),
        (258, 3, 8),
        (259, 3, compression),
        (262, 3, 2),
        (277, 3, 3),
        (284, 3, 1),
        (322, 4, side),
        (323, 4, side),
        (324, 4, 400),
        (325, 4, len(chunk) or 100),
    ]
    head = struct.pack("<2sHIH", b"II", 42, 8, len(fields))
    body = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in fields)
    return (head + body + bytes(4)).ljust(400, b"\0") + (chunk or bytes(100))


def _tile_bomb() -> bytes:
    """One DEFLATE tile of 256 px that unpacks to 4 GB."""
    return bare_tiff(256, 256, 256, 8, _zeros_deflated(4 << 30))


def _lzma_bomb() -> bytes:
    """One LZMA tile of 256 px that unpacks to 256 MB."""
    import lzma

    packer = lzma.LZMACompressor(lzma.FORMAT_XZ, preset=0)
    block = bytes(1 << 24)
    data = b"".join(packer.compress(block) for _ in range(16)) + packer.flush()
    return bare_tiff(256, 256, 256, 34925, data)


def _jpeg_bomb() -> bytes:
    """One JPEG tile of 256 px whose stream says 65500 x 65500."""
    import imagecodecs

    stream = bytearray(imagecodecs.jpeg8_encode(np.zeros((64, 64, 3), np.uint8)))
    place = stream.index(b"\xff\xc0") + 5
    stream[place : place + 4] = struct.pack(">HH", 65500, 65500)
    return bare_tiff(256, 256, 256, 7, bytes(stream))


def _png_bomb() -> bytes:
    """A PNG of 30,000 x 30,000 px of one bit, all alike: 900 megapixels in 110 kB."""
    return _flat_png(30_000)


def _png_large() -> bytes:
    """The same of 5,000 px, which is within the limit."""
    return _flat_png(5_000)


def _flat_png(side: int) -> bytes:
    rows = _zeros_deflated(side * (1 + -(-side // 8)))
    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", rows), (b"IEND", b"")]
    parts = [
        struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def _zeros_deflated(count: int) -> bytes:
    """The zlib stream of so many noughts, made of one packed block that repeats."""
    block = 1 << 24
    packer = zlib.compressobj(6)
    once = packer.compress(bytes(block)) + packer.flush(zlib.Z_FULL_FLUSH)
    unit = once[2:]  # a raw DEFLATE run that begins anew, without the header
    whole, rest = divmod(count, block)
    last = zlib.compressobj(6, zlib.DEFLATED, -15)
    tail = last.compress(bytes(rest)) + last.flush()
    # Adler-32 of n noughts: 1 in the low half, n modulo 65521 in the high one
    return once[:2] + unit * whole + tail + struct.pack(">I", (count % 65521) << 16 | 1)


BOMBS = (_png_bomb, _png_large, _tile_bomb, _lzma_bomb, _jpeg_bomb)
