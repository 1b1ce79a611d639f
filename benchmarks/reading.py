"""How fast slides are read: OpenSlide, tiffslide and ours in one run, against the decode limit.

    python benchmarks/reading.py --slide slide.svs --windows 60 --threads 1 --threads 2

Windows that tile level 0 are read in rows, from the corner of the first chunk (aligned, where a
window is whole chunks) and from half a chunk beside (off-grid), each time by a freshly opened
slide. The decode limit is the pixels of the chunks under the windows over the seconds in which
imagecodecs decodes each once, without any check, by as many threads. That all readers give the
same pixels is checked first. Other work on the machine disturbs the speeds: compare ratios of one
run.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import click
import imagecodecs
import numpy as np

from wsiseg.errors import UsageError, WsisegError
from wsiseg.geometry import Box, Size
from wsiseg.slides.phantom import write_phantom
from wsiseg.slides.slide import open_slide
from wsiseg.slides.tiff_chunks import ChunkTable, read_tables

READERS = ("openslide", "tiffslide", "direct")
CHECKED = 8
PLAIN = 10.0
"""Standard deviation of pixels up to which a window counts as glass."""


class Speed(NamedTuple):
    """What was measured of a reader."""

    reader: str
    aligned: bool
    threads: int
    mpx_per_s: float


def windows(size: Size, step: Size, window_px: int, *, aligned: bool, count: int) -> list[Box]:
    """Windows that tile level 0 in rows; from the first chunk's corner, or half a chunk beside."""
    shift = Size(0, 0) if aligned else Size(step.width // 2 + 3, step.height // 2 + 5)
    xs, ys = (
        range(first, n - window_px + 1, window_px) for first, n in zip(shift, size, strict=True)
    )
    found = [Box(x, y, window_px, window_px) for y, x in product(ys, xs)]
    if not found:
        raise UsageError(f"the slide ({size.width} x {size.height} px) is smaller than a window")
    return found[:count]


def timed(work: Callable[[Any], object], items: Sequence[Any], threads: int) -> float:
    """Seconds for all items, by so many threads."""
    with ThreadPoolExecutor(threads) as pool:
        start = time.perf_counter()
        for _ in pool.map(work, items):
            pass
        return time.perf_counter() - start


def check_equal(path: Path, boxes: Sequence[Box], readers: Sequence[str]) -> None:
    """Raises unless all readers give the pixels of the first, in boxes that are not all glass."""
    varied = False
    slides = [open_slide(path, backend=name, mpp=0.5, crop_to_bounds=False) for name in readers]
    try:
        grid = slides[0].grid(slides[0].mpp)
        for box in boxes:
            first, *others = (slide.read(box, grid) for slide in slides)
            varied = varied or float(first.std()) > PLAIN
            for name, pixels in zip(readers[1:], others, strict=True):
                if not np.array_equal(first, pixels):
                    raise WsisegError(f"{path}: {name} differs from {readers[0]} at {box}")
    finally:
        for slide in slides:
            slide.close()
    if not varied:
        raise WsisegError(f"{path}: nothing but glass in the windows that are compared; take more")


def reader_speed(path: Path, reader: str, boxes: Sequence[Box], threads: int) -> float:
    """Megapixels of windows a second."""
    with open_slide(path, backend=reader, mpp=0.5, crop_to_bounds=False) as slide:
        grid = slide.grid(slide.mpp)
        seconds = timed(lambda box: slide.read(box, grid), boxes, threads)
    return sum(box.width * box.height for box in boxes) / seconds / 1e6


def limit_speed(path: Path, table: ChunkTable, boxes: Sequence[Box], threads: int) -> float:
    """Megapixels a second of the chunks under the boxes, each read and decoded once."""
    width, height = table.chunk
    numbers = {
        row * table.columns + column
        for box in boxes
        for row in range(box.y // height, -(-box.bottom // height))
        for column in range(box.x // width, -(-box.right // width))
    }
    data = path.read_bytes()
    stored = {2: "RGB", 6: "YCBCR"}[table.photometric]

    def decode(number: int) -> None:
        place = int(table.offsets[number])
        stream = data[place : place + int(table.lengths[number])]
        if table.is_jpeg:
            imagecodecs.jpeg8_decode(
                stream, tables=table.jpeg_tables, colorspace=stored, outcolorspace="RGB"
            )
        else:
            imagecodecs.jpeg2k_decode(stream)

    return len(numbers) * width * height / timed(decode, sorted(numbers), threads) / 1e6


def measure(
    path: Path, *, window_px: int, count: int, threads: Sequence[int], repeats: int
) -> list[Speed]:
    """The best of some repeats of every reader, the readers in turn."""
    with open_slide(path, backend="direct", mpp=0.5, crop_to_bounds=False) as slide:
        size = slide.size
    table = next(table for table in read_tables(path) if table.size == size)
    best: dict[tuple[str, bool, int], float] = {}
    for aligned in (True, False):
        boxes = windows(size, table.chunk, window_px, aligned=aligned, count=count)
        compared = np.unique(np.linspace(0, len(boxes) - 1, CHECKED).round().astype(int))
        check_equal(path, [boxes[i] for i in compared], READERS)
        for _, number in product(range(repeats), threads):
            speeds = {name: reader_speed(path, name, boxes, number) for name in READERS}
            speeds["decode limit"] = limit_speed(path, table, boxes, number)
            for name, speed in speeds.items():
                key = (name, aligned, number)
                best[key] = max(speed, best.get(key, 0.0))
    return [Speed(*key, value) for key, value in best.items()]


def lines(speeds: Sequence[Speed], threads: Sequence[int]) -> list[str]:
    """A Markdown table: megapixels a second, and the share of the decode limit."""
    value = {(s.reader, s.aligned, s.threads): s.mpx_per_s for s in speeds}
    cases = [(aligned, number) for number in threads for aligned in (True, False)]
    titles = [f"{'aligned' if a else 'off-grid'}, {n} thread{'s'[: n > 1]}" for a, n in cases]
    result = ["| Mpx/s (share of limit) | " + " | ".join(titles) + " |", "|---" * (len(cases) + 1)]
    result[1] += "|"
    for name in (*READERS, "decode limit"):
        cells = [
            f"{value[name, *case]:.0f} ({value[name, *case] / value['decode limit', *case]:.2f})"
            for case in cases
        ]
        result.append(f"| {name} | " + " | ".join(cells) + " |")
    return result


@click.command()
@click.option("--slide", type=click.Path(path_type=Path), help="JPEG SVS or TIFF; else a phantom.")
@click.option("--phantom-px", default=6144, show_default=True, help="Side of the phantom.")
@click.option("--window-px", default=768, show_default=True)
@click.option("--windows", "count", default=49, show_default=True, help="Windows at most.")
@click.option("--threads", multiple=True, default=(1, 2), show_default=True, type=int)
@click.option("--repeats", default=3, show_default=True, help="The best of these counts.")
def main(
    slide: Path | None,
    phantom_px: int,
    window_px: int,
    count: int,
    threads: tuple[int, ...],
    repeats: int,
) -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as folder:
        path = slide or Path(folder) / "phantom.tif"
        try:
            if slide is None:
                write_phantom(path, Size(phantom_px, phantom_px), seed=1)
            options = {"window_px": window_px, "count": count, "repeats": repeats}
            speeds = measure(path, threads=threads, **options)
        except WsisegError as e:
            raise click.ClickException(str(e)) from e
    click.echo("\n".join(lines(speeds, threads)))


if __name__ == "__main__":
    main()
