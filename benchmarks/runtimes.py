"""What OpenVINO gains over torch on the CPU, at equal output.

    python benchmarks/runtimes.py --model glas-small

One window of synthetic tissue: its tiles through the extractor, then the window through the head,
in every way in turn. In float32 the probabilities of OpenVINO must be those of torch to 1e-3; in
bf16 at least 99.9 % of the labels of a trained model must be those of torch in float32.
Without OpenVINO there is nothing to compare, which the row says.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import click
import numpy as np
import torch
from shared import run
from stand_ins import model_option, stand_in
from timing import Row, Span, open_row, row_options, timed
from torch import Tensor

from wsiseg.geometry import Box, Point, Size
from wsiseg.inference.engine import Engine
from wsiseg.inference.runtime import to_openvino
from wsiseg.models.folding import fold
from wsiseg.models.segmenter import Segmenter
from wsiseg.slides.phantom import render_phantom

MAX_ERROR = 1e-3
MIN_EQUAL = 0.999
TARGETS = {"fp32": 1.5, "bf16": 2.8}
"""What OpenVINO gains at least over torch in float32, by precision."""
REFERENCE = ("torch", "fp32")
Way = tuple[str, str]


class Window:
    """A window of synthetic tissue, for a model."""

    def __init__(self, segmenter: Segmenter) -> None:
        tile, self.side = segmenter.info.tile_px, segmenter.info.window_px // segmenter.info.tile_px
        whole = Box(0, 0, segmenter.info.window_px, segmenter.info.window_px)
        size = Size(whole.width, whole.height)
        image, _ = render_phantom(whole, size, mpp=segmenter.info.mpp, seed=1)
        self.places = [
            Point(x * tile, y * tile) for y in range(self.side) for x in range(self.side)
        ]
        self.tiles = [
            np.ascontiguousarray(image[p.y : p.y + tile, p.x : p.x + tile]) for p in self.places
        ]

    def probabilities(self, engine: Engine) -> Tensor:
        """(C[+1], window, window) of the window."""
        features = engine.encode(self.tiles, self.places)
        grid = tuple(m.unflatten(0, (1, self.side, self.side)) for m in features)
        return engine.classify(grid, [Point(0, 0)])[0]


def engines(segmenter: Segmenter) -> dict[Way, Engine]:
    """The ways to compute, the reference first."""
    found = {}
    for precision in TARGETS:
        found["torch", precision] = Engine(fold(segmenter), precision=precision)
        compiled = to_openvino(segmenter, precision=precision)
        found["openvino", precision] = Engine(fold(compiled), precision=precision)
    return found


def compare(row: Row, segmenter: Segmenter, repeats: int) -> None:
    """Equality, then the time of every way in turn."""
    ways, window, classes = engines(segmenter), Window(segmenter), len(segmenter.info.classes)
    maps = {way: window.probabilities(engine) for way, engine in ways.items()}  # warms up, too
    error = float((maps["openvino", "fp32"] - maps[REFERENCE]).abs().max())
    row.equal(f"probabilities in fp32 to {error:.2g}, at most {MAX_ERROR:g}", error <= MAX_ERROR)
    spans = {way: Span() for way in ways}
    for _ in range(repeats):
        for way, engine in ways.items():
            with timed(spans[way]):
                window.probabilities(engine)
    base = spans[REFERENCE].wall
    expected = maps[REFERENCE][:classes].argmax(dim=0)
    for precision, target in TARGETS.items():
        gain = base / spans["openvino", precision].wall
        row.judge(f"torch fp32 / OpenVINO {precision}, seconds", gain, ">=", target)
    for (runtime, precision), values in maps.items():
        name = f"{runtime} {precision}"
        equal = float((values[:classes].argmax(dim=0) == expected).float().mean())
        seconds = spans[runtime, precision].wall / repeats
        if precision == "bf16" and not segmenter.info.name.startswith("random"):
            row.judge(f"labels of {name} that are those of torch fp32", equal, ">=", MIN_EQUAL)
        row.note(
            **{
                f"{name}, tiles/s": len(window.tiles) / seconds,
                f"{name}, equal labels": equal,
                f"{name}, gain": base / spans[runtime, precision].wall,
            }
        )


@click.command(help=__doc__.splitlines()[0])
@row_options
@model_option
@click.option("--repeats", type=click.IntRange(1), default=5, show_default=True)
def main(**words: Any) -> None:
    """Compare the ways."""
    row = open_row("OpenVINO", words)
    if importlib.util.find_spec("openvino") is None:
        row.note(openvino="not installed; pip install 'wsiseg[openvino]'")
    else:
        row.note(model=words["model"], threads=torch.get_num_threads())
        compare(row, stand_in(words["model"]), words["repeats"])
    row.finish()


if __name__ == "__main__":
    run(main)
