"""Writing the mask of a whole slide: seconds, memory, bytes.

    python benchmarks/pyramid.py --size 50000 40000

A canvas is filled with labels on about 30 % of it, made once and repeated. Every level of the mask
is then read back and must be the canvas's labels, every second pixel a level. The writing runs in a
process of its own; its memory is what it adds to that of the process.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import click
import numpy as np
import tifffile
from shared import run
from stand_in_data import fill_canvas, sparse_labels
from timing import Memory, Span, in_child, open_row, row_options, timed, watched

from wsiseg.canvas import Canvas
from wsiseg.geometry import Box, Size
from wsiseg.outputs.pyramid import write_pyramid

MAX_SECONDS, MAX_MIB = 5.0, 150.0
"""Seconds a gigapixel (10 s for 2 Gpx), and memory whatever the height."""
ROWS_PX = 2048


def write(canvas_path: str, mask_path: str) -> dict[str, Any]:
    """Write the mask; for a process of its own."""
    canvas = Canvas.open(canvas_path)
    span, memory = Span(), Memory()
    with watched(memory), timed(span):
        write_pyramid(mask_path, canvas)
    return {"wall": span.wall, "cpu": span.cpu, "mib": memory.mib}


def levels_equal(mask_path: Path, canvas: Canvas) -> bool:
    """Whether each level holds every second pixel of the one before, the first the labels.

    There must be as many levels as halve the longer side to a tile or less.
    """
    width, height = canvas.grid.size
    with tifffile.TiffFile(mask_path) as tiff:
        levels = tiff.series[0].levels
        if max(width, height) > tiff.pages.first.tile[0] * 2 ** (len(levels) - 1):
            return False
        for k, level in enumerate(levels):
            step = 2**k
            if level.shape != (-(-height // step), -(-width // step)):
                return False
            rows = max(ROWS_PX, step)
            pixels = level.asarray()
            if k and not np.array_equal(tifffile.imread(mask_path, key=k), pixels):
                return False  # the pages for readers that know no SubIFDs
            for y in range(0, height, rows):
                labels = canvas.labels(Box(0, y, width, min(rows, height - y)))
                part = labels[::step, ::step]
                if not np.array_equal(pixels[y // step : y // step + len(part)], part):
                    return False
    return True


@click.command(help=__doc__.splitlines()[0])
@row_options
@click.option("--size", type=int, nargs=2, default=(50000, 40000), show_default=True)
@click.option("--block", default=8192, show_default=True, help="Side of the labels repeated.")
def main(**words: Any) -> None:
    """Fill, write, read back."""
    row = open_row("mask", words)
    size = Size(*words["size"])
    gigapixels = size.width * size.height / 1e9
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        canvas = fill_canvas(folder / "canvas", size, sparse_labels(words["block"]))
        path = folder / "mask.ome.tif"
        found = in_child(write, str(canvas.path), str(path))
        row.equal("every level is that of the canvas", levels_equal(path, canvas))
        row.note(gigapixels=gigapixels, file_mib=path.stat().st_size / (1 << 20))
    row.judge("seconds per Gpx", found["wall"] / gigapixels, "<=", MAX_SECONDS)
    row.judge("peak memory, MiB", found["mib"], "<=", MAX_MIB)
    row.note(seconds=found["wall"], cpu_seconds=found["cpu"])
    row.finish()


if __name__ == "__main__":
    run(main)
