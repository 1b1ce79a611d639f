"""The whole, from pixels to labels, against the plain pipeline of literal_pipeline.py.

    python benchmarks/literal.py --model small
    python benchmarks/literal.py --model full --tiles 12 --device cuda

Both read the same synthetic slide file and have the same weights, windows and noise. Every label
must be the one that the plain pipeline's probabilities give, ties within 1e-4 left out. The ratio
is that of wall seconds in one run. It changes with the slide, as windows at the edge share less; it
is brought to a slide of 24 tiles a side by taking what a tile and what a window took here as many
times as tiles are encoded and windows classified there. Only the full-size model is judged.
The small one is there to be quick: its operators are so small that it takes as long to call them as
to compute them, one tile at a time as nine.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import torch
from literal_pipeline import predict, unlike
from shared import run
from stand_ins import device_option, model_option, stand_in
from timing import Row, Span, open_row, row_options, timed

from wsiseg.errors import UsageError
from wsiseg.geometry import Box, Grid, Point, Size
from wsiseg.inference.job import prepare
from wsiseg.inference.predict import PredictOptions, predict_slide
from wsiseg.inference.slide_windows import for_slides
from wsiseg.models.base import to_tensor
from wsiseg.models.segmenter import Segmenter
from wsiseg.slides.phantom import write_phantom
from wsiseg.slides.slide import Slide, open_slide

TARGETS = {2: 2.3, 1: 6.0}
"""The least ratio by stride in tiles."""
JUDGED_TILES = 24
"""Tiles along a side of the slide for which ratios are judged."""
JUDGED_MODEL = "random, full"


class Counts(NamedTuple):
    """What is done for a slide: tiles that are encoded, some more than once, and windows."""

    tiles: int
    windows: int


def counts(segmenter: Segmenter, side_tiles: int, options: PredictOptions) -> Counts:
    """Those of a slide of `side_tiles` tiles a side, with the memory that there is by default."""
    side, mpp = side_tiles * segmenter.info.tile_px, segmenter.info.mpp
    job = prepare(Grid.at_mpp(Size(side, side), mpp, mpp), segmenter, options=options)
    assert job.loads is not None
    return Counts(len(job.loads.tiles), len(job.layout.windows))


def brought(
    plain: float, tile_part: float, window_part: float, measured: Counts, wanted: Counts
) -> float:
    """Seconds of the plain pipeline over ours for a larger slide.

    Args:
        plain: seconds of the plain pipeline, all for windows, of the slide that was measured.
        tile_part: our seconds for its tiles.
        window_part: our seconds for its windows.
        measured: what was done for it.
        wanted: what is done for the larger one.
    """
    more_windows, more_tiles = wanted.windows / measured.windows, wanted.tiles / measured.tiles
    return plain * more_windows / (tile_part * more_tiles + window_part * more_windows)


def measure(row: Row, slide: Slide, segmenter: Segmenter, *, stride: int, folder: Path) -> None:
    """Judge one stride, in tiles."""
    info = segmenter.info
    overlap = info.window_px - stride * info.tile_px
    options = PredictOptions(overlap_px=overlap, precision="fp32")
    where = f"stride {stride * info.tile_px} px"
    shared, literal = Span(), Span()
    with timed(shared):
        canvas = predict_slide(slide, segmenter, folder / f"canvas-{stride}", options=options)
    with timed(literal):
        blended = predict(slide, segmenter, overlap_px=overlap)
    labels = canvas.labels(canvas.grid.box)
    differ, wrong = int((labels != blended.labels).sum()), unlike(labels, blended.probabilities)
    row.equal(
        f"{where}: {labels.size} labels; {differ} differ, {wrong} of them by more than a tie",
        wrong == 0,
    )
    ratio = literal.wall / shared.wall
    what = f"{where}: {info.name} model, seconds, plain / wsiseg"
    if stride in TARGETS and info.name == JUDGED_MODEL:
        timings = canvas.record["timings"]
        done = Counts(timings["tiles"], timings["windows"])
        wanted = counts(segmenter, JUDGED_TILES, options)
        part = timings["read"] + timings["encode"]
        rest = shared.wall - part
        whole = brought(literal.wall, part, rest, done, wanted)
        row.note(**{f"{where}: wsiseg, seconds for tiles": part})
        row.judge(f"{what}, for {JUDGED_TILES} tiles a side", whole, ">=", TARGETS[stride])
    row.note(
        **{
            what: ratio,
            f"{where}: plain, seconds": literal.wall,
            f"{where}: wsiseg, seconds": shared.wall,
            f"{where}: ratio of CPU seconds": literal.cpu / shared.cpu,
            f"{where}: classes seen": len(np.unique(labels)),
        }
    )


@click.command(help=__doc__.splitlines()[0])
@row_options
@model_option
@device_option
@click.option("--stride", "strides", type=int, multiple=True, default=(2, 1), help="In tiles.")
@click.option("--tiles", default=5, show_default=True, help="Tiles along a side of the slide.")
def main(**words: Any) -> None:
    """Measure every stride."""
    row = open_row("against the plain pipeline", words)
    segmenter = stand_in(words["model"], words["device"])
    info = segmenter.info
    if for_slides(segmenter).info.window_px == info.tile_px:
        raise UsageError(
            f"{info.name}: slides are gone through in windows of one tile, which share none; "
            "take a model of windows of more tiles"
        )
    side = words["tiles"] * info.tile_px
    row.note(model=info.name, side_px=side, device=words["device"])
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "phantom.tif"
        write_phantom(path, Size(side, side), mpp=info.mpp)
        with open_slide(path) as slide:
            warm_up(slide, segmenter)
            for stride in words["strides"]:
                measure(row, slide, segmenter, stride=stride, folder=Path(name))
    row.finish()


def warm_up(slide: Slide, segmenter: Segmenter) -> None:
    """One window that does not count: the first one pays for setting up."""
    side = segmenter.info.window_px
    pixels = slide.read(Box(0, 0, side, side), slide.grid(segmenter.info.mpp))
    with torch.inference_mode():
        segmenter.probabilities(to_tensor([pixels], device=segmenter.device), [Point(0, 0)])


if __name__ == "__main__":
    run(main)
