"""Does half precision change labels? bf16 against fp32 on slides or images, and what it gains.

    python benchmarks/precision.py --model glas-small --slide slide.svs --channels-last

The labels of `predict` are compared pixel by pixel where anything was analysed. Speeds are tiles
over the seconds of extractor and head, after a first tile that does not count. Other work on the
machine disturbs them: compare ratios of one run.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import torch
from shared import (
    Maps,
    Within,
    common_options,
    finish,
    load,
    probabilities,
    region_box,
    run,
    table,
)

from wsiseg.canvas import Canvas
from wsiseg.errors import UsageError
from wsiseg.geometry import Box
from wsiseg.inference.engine import Engine
from wsiseg.inference.estimate import measure_speed
from wsiseg.inference.predict import PredictOptions
from wsiseg.inference.slide_windows import for_slides
from wsiseg.models.segmenter import Segmenter
from wsiseg.slides.slide import Slide, open_slide
from wsiseg.slides.tissue import find_tissue

BAND_PX = 512


class Way(NamedTuple):
    """A way to compute: a precision and the order of the weights in memory."""

    precision: str
    order: torch.memory_format

    @property
    def name(self) -> str:
        """Such as "bf16 channels_last"."""
        last = self.order == torch.channels_last
        return f"{self.precision} channels_last" if last else self.precision


REFERENCE = Way("fp32", torch.contiguous_format)


@dataclass
class Tally:
    """What is counted of one way over the slides."""

    tiles: int = 0
    seconds: float = 0.0
    pixels: int = 0
    equal: int = 0
    difference: float = 0.0

    @property
    def tiles_per_s(self) -> float:
        """Speed of extractor and head."""
        return self.tiles / self.seconds if self.seconds else 0.0

    @property
    def agreement(self) -> float:
        """Share of pixels with the same label, in percent."""
        return 100 * self.equal / max(1, self.pixels)


def compare(tally: Tally, own: tuple[Maps, Canvas], reference: tuple[Maps, Canvas]) -> None:
    """Count a slide: labels that are the same, the largest difference of a probability, time."""
    width, height = own[1].grid.size
    for y in range(0, height, BAND_PX):
        box = Box(0, y, width, min(BAND_PX, height - y))
        labels, expected = (canvas.labels(box) for _, canvas in (own, reference))
        tally.pixels += int((expected > 0).sum())
        tally.equal += int(((labels == expected) & (expected > 0)).sum())
        one, two = (maps[(slice(None), *box.slices)] for maps, _ in (own, reference))
        tally.difference = max(tally.difference, float(np.abs(one - two).max(initial=0)))
    timings = own[1].record["timings"]
    tally.tiles += timings["tiles"]
    tally.seconds += timings["encode"] + timings["head"]


def reorder(module: torch.nn.Module, order: torch.memory_format) -> None:
    """Bring the weights of two-dimensional convolutions into an order in memory."""
    for parameter in module.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=order)


def one_slide(
    slide: Slide, segmenter: Segmenter, tallies: dict[Way, Tally], words: dict[str, Any]
) -> None:
    """Predict a slide in every way, the reference first, and count.

    Raises:
        UsageError: there is no tissue.
    """
    grid = slide.grid(segmenter.info.mpp)
    tissue = Within(find_tissue(slide, words["tissue"]), region_box(words["region"], grid))
    with tempfile.TemporaryDirectory() as folder:
        done: dict[Way, tuple[Maps, Canvas]] = {}
        for i, (way, tally) in enumerate(tallies.items()):
            reorder(segmenter, way.order)
            options = PredictOptions(overlap_px=words["overlap"], precision=way.precision)
            own = Path(folder, str(i))
            own.mkdir()
            measure_speed(Engine(segmenter, precision=way.precision), tiles=1)  # warms up
            done[way] = probabilities(slide, segmenter, own, options=options, tissue=tissue)
            compare(tally, done[way], done[REFERENCE])
        done.clear()
    if not tallies[REFERENCE].pixels:
        raise UsageError(f"{slide.path}: no tissue was found; give --tissue none or another slide")


@click.command(help=__doc__.splitlines()[0])
@common_options
@click.option("--half", default="bf16", show_default=True, help="Half precision to compare.")
@click.option("--channels-last", is_flag=True, help="Measure this order of the weights too.")
@click.option("--overlap", type=int, help="Pixels windows have in common; default as of predict.")
@click.option("--tissue", default="auto", show_default=True, help="auto, none or a mask file.")
@click.option(
    "--region",
    type=int,
    nargs=4,
    help="X Y WIDTH HEIGHT to look at, in pixels at the model's resolution.",
)
@click.option("--min-agreement", default=99.9, show_default=True, help="Percent; else exit 1.")
def main(**words: Any) -> None:
    """Measure the ways on all slides."""
    segmenter = for_slides(load(words["model"], words["device"], words["threads"]))
    orders = [torch.contiguous_format, torch.channels_last][: 1 + words["channels_last"]]
    ways = [Way(precision, order) for order in orders for precision in ("fp32", words["half"])]
    tallies = {way: Tally() for way in ways}
    for path in words["slides"]:
        with open_slide(path, mpp=words["mpp"]) as slide:
            one_slide(slide, segmenter, tallies, words)
    base = tallies[REFERENCE].tiles_per_s
    found: list[dict[str, Any]] = [
        {
            "way": way.name,
            "agreement_percent": tally.agreement,
            "max_difference": tally.difference,
            "tiles_per_s": tally.tiles_per_s,
            "speed_ratio": tally.tiles_per_s / base if base else 0.0,
            "pixels": tally.pixels,
            "tiles": tally.tiles,
        }
        for way, tally in tallies.items()
    ]
    click.echo(table(("way", "equal labels", "largest dp", "tiles/s", "speed"), _rows(found)))
    least, limit = min(f["agreement_percent"] for f in found), words["min_agreement"]
    passed = least >= limit
    sign = "at least" if passed else "below"
    verdict = f"precision: the least share of equal labels is {least:.3f} %, {sign} {limit:g} %"
    result = {"slides": [Path(p).name for p in words["slides"]], "ways": found}
    result |= {"min_agreement_percent": limit, "verdict": verdict, "passed": passed}
    finish(words["json_path"], segmenter, result)


def _rows(found: list[dict[str, Any]]) -> list[list[str]]:
    return [
        [
            f["way"],
            f"{f['agreement_percent']:.3f} %",
            f"{f['max_difference']:.4f}",
            f"{f['tiles_per_s']:.2f}",
            f"x{f['speed_ratio']:.2f}",
        ]
        for f in found
    ]


if __name__ == "__main__":
    run(main)
