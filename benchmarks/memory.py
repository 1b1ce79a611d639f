"""Peak memory of a whole slide, from prediction to output files, above the model's weights.

    python benchmarks/memory.py --size 20000 20000 --size 50000 50000 --size 50000 100000

Each slide runs in a process of its own. The slides are glass with tissue on about 30 %, one painted
block repeated. The model is a 1x1 convolution of mean colours with six classes, which makes
patches of 16 um at least (single pixels would be millions of polygons); its tiles also carry as
much memory in features as those of the full-size network (--feature-mib), as it is features and
sums that fill memory. What counts is the resident memory at its peak less that of the process once
model and slide are open. Labels are compared with the model applied to the tiles of five strips,
from the top left corner to the bottom right.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from literal_pipeline import unlike
from shared import Within, run
from stand_in_data import BLOCK_PX, is_tissue, write_sparse_slide
from stand_ins import trivial_model
from timing import Memory, Row, Span, in_child, open_row, row_options, timed, watched

from wsiseg.canvas import Canvas
from wsiseg.geometry import Box, Point, Size
from wsiseg.inference.engine import Engine
from wsiseg.inference.predict import PredictOptions, begin, carry_out
from wsiseg.models.segmenter import Segmenter
from wsiseg.outputs.files import write_outputs
from wsiseg.outputs.geojson import PolygonOptions
from wsiseg.outputs.tracing import Tracing
from wsiseg.slides.slide import Slide, open_slide
from wsiseg.slides.tissue import TissueMask, find_tissue

PATCH_PX = 32
"""Side of the smallest patch of a class, 16 um: no tissue map has single pixels."""
NARROW_PX = 50_000
LIMITS_MIB = (1536.0, 2560.0)
"""The most for slides up to NARROW_PX wide, and for wider ones up to twice that."""
STRIPS, STRIP_BLOCKS = 5, 8
"""Where labels are compared: strips over the slide, and the painted blocks along each."""
MAX_CHANGE = 0.05
"""How much a slide twice as high may change the memory."""


def whole_slide(slide_path: str, folder: str, feature_mib: float, threads: int) -> dict[str, Any]:
    """Predict a slide and write all outputs; for a process of its own."""
    torch.set_num_threads(threads)
    segmenter = trivial_model(feature_mib=feature_mib, block_px=PATCH_PX)
    parts = {"predict": (Memory(), Span()), "outputs": (Memory(), Span())}
    with open_slide(slide_path) as slide:
        tissue = find_tissue(slide)
        warm_up(slide, segmenter)
        memory, span = parts["predict"]
        path, options = Path(folder) / "canvas", PredictOptions()
        with Tracing() as tracing:  # as the command does it
            with watched(memory), timed(span):
                work = begin(slide, segmenter, path, options=options, tissue=tissue)
                chunks = work.job.layout.windows_per_chunk(work.canvas.chunk_px)
                tracing.follow(work.canvas, PolygonOptions(), chunks)
                canvas = carry_out(work)
            start = memory.before
            memory, span = parts["outputs"]
            with watched(memory), timed(span):
                write_outputs(canvas, folder, "slide", regions=tracing.regions)
        wrong, compared = wrong_labels(canvas, slide, segmenter, tissue)
    mib = {name: (memory.peak - start) / (1 << 20) for name, (memory, _) in parts.items()}
    return {
        "mib": mib,
        "wall": {name: span.wall for name, (_, span) in parts.items()},
        "timings": canvas.record["timings"],
        "wrong": wrong,
        "compared": compared,
    }


def warm_up(slide: Slide, segmenter: Segmenter) -> None:
    """A tile that does not count: libraries and thread pools take their memory with the first."""
    side = segmenter.info.tile_px
    tile = slide.read(Box(0, 0, side, side), slide.grid(segmenter.info.mpp))
    Engine(segmenter).encode([tile], [Point(0, 0)])


def wrong_labels(
    canvas: Canvas, slide: Slide, segmenter: Segmenter, tissue: TissueMask
) -> tuple[int, int]:
    """Labels that are not those of the model, and how many were looked at, see `strips`; 0 where
    a strip holds no tissue.

    Where there is no tissue the label must be 0.
    """
    engine = Engine(segmenter, precision="fp32")
    grid, side = canvas.grid, segmenter.info.tile_px
    wrong, found = 0, []
    for strip in strips(grid.size, side, segmenter.info.window_px):
        inside, compared = Within(tissue, strip), 0
        for x in range(0, strip.width, side):
            place = Point(strip.x + x, strip.y)
            box = Box(*place, side, side).intersection(strip)
            tile = slide.read(Box(*place, side, side), grid)
            features = engine.encode([tile], [place])
            values = engine.classify(tuple(m[:, None, None] for m in features), [place])[0]
            labels, seen = canvas.labels(box), inside.region(box, grid)
            wrong += int((labels[~seen] != 0).sum()) + int((labels[seen] == 0).sum())
            probabilities = values.numpy()[:, : box.height, : box.width]
            wrong += unlike(labels[seen][None], probabilities[:, seen][:, None])
            compared += int(seen.sum())
        found.append(compared)
    return wrong, sum(found) if all(found) else 0


def strips(size: Size, side: int, window: int) -> list[Box]:
    """Strips one tile high, from the top left corner of a slide to the bottom right.

    The last windows of rows and columns, which may begin between two tiles, are left out, and rows
    of blocks without tissue.
    """
    right = max(side, (size.width - window) // side * side)
    bottom = max(side, (size.height - window) // side * side)
    width, found = min(right, STRIP_BLOCKS * BLOCK_PX), []
    for k in range(STRIPS):
        x = (right - width) * k // (STRIPS - 1) // side * side
        y = (bottom - side) * k // (STRIPS - 1) // side * side
        if not is_tissue(np.arange(8), np.int64(y // BLOCK_PX)).any():
            y -= BLOCK_PX
        found.append(Box(x, y, width, side).intersection(Box(0, 0, *size)))
    return found


def judge(row: Row, size: Size, found: dict[str, Any]) -> float:
    """Set one slide beside its target; gives its memory in MiB."""
    where = f"{size.width} x {size.height}"
    row.equal(
        f"{where}: labels are those of the model ({found['compared']} compared, "
        f"{found['wrong']} wrong)",
        found["wrong"] == 0 and found["compared"] > 0,
    )
    most = float(max(found["mib"].values()))
    limit = LIMITS_MIB[size.width > NARROW_PX]
    row.judge(f"{where}: peak above the weights, MiB", most, "<=", limit)
    for part in found["mib"]:
        row.note(
            **{
                f"{where}: {part}, MiB": found["mib"][part],
                f"{where}: {part}, seconds": found["wall"][part],
            }
        )
    return most


def judge_heights(row: Row, peaks: dict[Size, float]) -> None:
    """Of slides of equal width, one twice as high as the other, judge the change."""
    for size, peak in peaks.items():
        twice = peaks.get(Size(size.width, 2 * size.height))
        if twice is not None:
            row.judge(
                f"{size.width} wide: change from {size.height} to {2 * size.height} px high",
                abs(twice / peak - 1),
                "<=",
                MAX_CHANGE,
            )


@click.command(help=__doc__.splitlines()[0])
@row_options
@click.option(
    "--size",
    "sizes",
    type=int,
    nargs=2,
    multiple=True,
    default=((20_000, 20_000), (50_000, 50_000), (50_000, 100_000)),
    show_default=True,
    help="Width and height of a slide in pixels; once a slide.",
)
@click.option(
    "--feature-mib", default=24.0, show_default=True, help="Features of a tile; full size: 24."
)
@click.option("--folder", type=click.Path(path_type=Path), help="For slides and canvases.")
def main(**words: Any) -> None:
    """Measure every slide."""
    row = open_row("memory", words)
    peaks: dict[Size, float] = {}
    for width, height in words["sizes"]:
        size = Size(width, height)
        with tempfile.TemporaryDirectory(dir=words["folder"]) as name:
            path = Path(name) / "sparse.tif"
            began = time.perf_counter()
            write_sparse_slide(path, size)
            row.note(**{f"{width} x {height}: seconds to make it": time.perf_counter() - began})
            threads = torch.get_num_threads()
            found = in_child(whole_slide, str(path), name, words["feature_mib"], threads)
        peaks[size] = judge(row, size, found)
    judge_heights(row, peaks)
    row.finish()


if __name__ == "__main__":
    run(main)
