"""Features of tiles shared by windows, against every window computed by itself.

    python benchmarks/sharing.py --model small

Both ways take turns, window by window, on the same pixels. The features must be equal bit for bit,
and the tiles that the extractor sees must be the distinct tiles of the plan, each once. The gain is
the ratio of the seconds spent on features; at best it is the ratio of the numbers of tiles. The
head costs the same both ways and is left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import click
import numpy as np
import numpy.typing as npt
import torch
from shared import run
from stand_ins import model_option, stand_in
from timing import Row, Span, open_row, row_options, timed

from wsiseg.geometry import Box, Grid, Point, Size
from wsiseg.inference.engine import Engine, Stopwatch, WindowFeatures
from wsiseg.inference.features import schedule
from wsiseg.inference.plan import Plan, plan
from wsiseg.models.base import Features
from wsiseg.models.segmenter import Segmenter
from wsiseg.slides.phantom import render_phantom

UInt8 = npt.NDArray[np.uint8]
MIN_SHARE = 0.95


@dataclass
class Turns:
    """What one pass over the windows found.

    Attributes:
        shared: time of features that windows share.
        alone: time of features window by window.
        evaluated: tiles that the extractor saw while sharing.
        unequal: windows whose features differ in any bit.
    """

    shared: Span = field(default_factory=Span)
    alone: Span = field(default_factory=Span)
    evaluated: int = 0
    unequal: int = 0


class Picture:
    """Tiles of an image in memory, white outside."""

    def __init__(self, size: Size, mpp: float) -> None:
        self.rgb, _ = render_phantom(Box(0, 0, *size), size, mpp=mpp, seed=0)

    def tile(self, place: Point, side: int) -> UInt8:
        """(side, side, 3) uint8 RGB."""
        tile = np.full((side, side, 3), 255, np.uint8)
        part = self.rgb[place.y : place.y + side, place.x : place.x + side]
        tile[: len(part), : part.shape[1]] = part
        return tile


def take_turns(segmenter: Segmenter, layout: Plan, picture: Picture, *, batch_size: int) -> Turns:
    """Features of every window both ways, in turn."""
    engine = Engine(segmenter, precision="fp32")
    loads = schedule(layout, capacity=len(layout.tiles))
    store = WindowFeatures(engine, layout, loads, batch_size=batch_size, group=1)
    turns, watch = Turns(), Stopwatch()
    pixels = _tiles(picture, layout, loads.tiles)
    first = layout.tile_place(0)
    engine.encode([picture.tile(first, layout.tile_px)], [first])  # pays for setting up
    for window in range(len(layout.windows)):
        with timed(turns.shared):
            for encoded in store.take(window, window + 1, pixels, watch):
                turns.evaluated = encoded
            shared = tuple(store.windows(window, window + 1))
        tiles = layout.window_tiles[window]
        places = [layout.tile_place(int(tile)) for tile in tiles]
        alone_pixels = [picture.tile(place, layout.tile_px) for place in places]
        with timed(turns.alone):
            alone = _laid_out(engine.encode(alone_pixels, places))
        turns.unequal += not all(torch.equal(a, b) for a, b in zip(shared, alone, strict=True))
    return turns


def _tiles(picture: Picture, layout: Plan, order: npt.NDArray[np.int64]) -> Iterator[UInt8]:
    """Pixels of tiles, all cut before the clock runs."""
    cut = [picture.tile(layout.tile_place(int(tile)), layout.tile_px) for tile in order]
    return iter(cut)


def _laid_out(features: Features) -> Features:
    """(1, R, K, channels, h, w) features of one window from those of its tiles."""
    side = round(len(features[0]) ** 0.5)
    return tuple(maps.unflatten(0, (1, side, side)) for maps in features)


def measure(row: Row, segmenter: Segmenter, size: Size, *, stride: int, batch_size: int) -> None:
    """Judge one stride, in tiles."""
    info = segmenter.info
    grid = Grid.at_mpp(size, info.mpp, info.mpp)
    overlap = info.window_px - stride * info.tile_px
    layout = plan(grid, None, window_px=info.window_px, tile_px=info.tile_px, overlap_px=overlap)
    seen: list[int] = []
    handle = segmenter.extractor.register_forward_hook(lambda m, i, out: seen.append(len(out[0])))
    try:
        turns = take_turns(segmenter, layout, Picture(size, info.mpp), batch_size=batch_size)
    finally:
        handle.remove()
    where = f"stride {stride * info.tile_px} px"
    row.equal(f"{where}: features of {len(layout.windows)} windows, bit for bit", not turns.unequal)
    shared = sum(seen) - 1 - layout.tiles_without_sharing
    row.equal(
        f"{where}: {shared} tiles evaluated, {len(layout.tiles)} distinct tiles",
        shared == len(layout.tiles) == turns.evaluated,
    )
    ratio = layout.tiles_without_sharing / len(layout.tiles)
    gain = turns.alone.wall / turns.shared.wall
    row.judge(f"{where}: gain in wall time / ratio of tiles", gain / ratio, ">=", MIN_SHARE)
    row.note(
        **{
            f"{where}: gain in wall time": gain,
            f"{where}: gain in CPU time": turns.alone.cpu / turns.shared.cpu,
            f"{where}: ratio of tiles": ratio,
        }
    )


@click.command(help=__doc__.splitlines()[0])
@row_options
@model_option
@click.option("--stride", "strides", type=int, multiple=True, default=(2, 1), help="In tiles.")
@click.option("--tiles", default=7, show_default=True, help="Tiles along a side of the picture.")
@click.option("--batch-size", default=4, show_default=True, help="Tiles encoded at a time.")
def main(**words: Any) -> None:
    """Measure every stride."""
    row = open_row("tile sharing", words)
    segmenter = stand_in(words["model"])
    side = words["tiles"] * segmenter.info.tile_px
    row.note(model=segmenter.info.name)
    for stride in words["strides"]:
        measure(row, segmenter, Size(side, side), stride=stride, batch_size=words["batch_size"])
    row.finish()


if __name__ == "__main__":
    run(main)
